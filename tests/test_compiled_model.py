import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import set_up

from keras_hf import DoubleBackward, FiniteDifferenceHessian, ForwardAccumulation, GaussNewton, HessianFree, HFModel
from keras_hf.network.fixed_network import Data
from keras_hf.training import compiled_model
from keras_hf.training.compiled_model import checked, loss_name, overrides_compute_loss, task_of
from keras_hf.training.setup import prepare

X, Y = tf.ones([4, 3]), tf.ones([4, 2])


class WithOwnLoss(HFModel):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        self.seen = list(self.losses)
        return super().compute_loss(x, y, y_pred, sample_weight)


def compiled(*stack, model=HFModel, loss="mse"):
    stack = stack or (layers.Dense(2, kernel_regularizer="l2"),)
    model = model(keras.Sequential([keras.Input((3,)), *stack]))
    model.compile(HessianFree(0.1, seed=0), loss)
    return model


def prepared(model, curvature):
    set_up(model, curvature=curvature)
    model.network.name = "of_mine"
    return prepare(model, Data(X, Y, None))


def test_a_loss_has_the_name_of_keras_function_and_a_checked_one_that_and_the_values_of_the_users():
    absolute = keras.losses.mean_absolute_error
    names = {"mse": "mean_squared_error", keras.losses.Hinge(): "hinge", absolute: "mean_absolute_error", None: None}
    assert {loss: loss_name(loss) for loss in names} == names

    def mine(y, y_pred):
        return tf.reduce_mean(tf.square(y - y_pred), -1)

    assert checked(mine).__name__ == "mine" and checked("mse") == "mse"
    np.testing.assert_array_equal(checked(mine)(Y, 3 * Y), mine(Y, 3 * Y))
    of_keras = keras.losses.MeanSquaredError(reduction="sum", name="theirs")
    assert (checked(of_keras).name, checked(of_keras).reduction) == ("theirs", "sum")
    assert float(checked(of_keras)(Y, 3 * Y)) == float(of_keras(Y, 3 * Y))


def test_a_checked_loss_says_what_the_users_returned():
    class Nothing(keras.losses.Loss):
        def call(self, y_true, y_pred):
            pass

    for loss in (Nothing(name="nothing"), Nothing(name="nothing").call):
        with pytest.raises(ValueError, match="The loss '(nothing|call)' must return.*Received: None"):
            checked(loss)(Y, Y)


def test_a_task_holds_weights_states_and_seeds_apart():
    model = compiled(layers.Dense(4, kernel_regularizer="l2"), layers.BatchNormalization(), layers.Dropout(0.5))
    task = task_of(model)
    assert [id(v) for v in task.variables] == [id(v.value) for v in model.trainable_variables]
    assert [state.name for state in task.states] == ["moving_mean", "moving_variance"]
    assert len(task.seeds) == 1 and len(task.regularizers) == 1
    assert type(task.layers[0]) is keras.Sequential and len(task.layers) >= 4


@pytest.mark.parametrize(("model", "combination"), [(HFModel, "cases"), (WithOwnLoss, "unknown")])
def test_the_loss_has_a_term_per_output_or_one_where_compute_loss_is_overridden(model, combination):
    model = compiled(model=model)
    assert overrides_compute_loss(model) == (combination == "unknown")
    (term,) = task_of(model).loss_terms(Data(X, Y, None), 3 * Y)
    assert term.combination() == combination and float(term.value()) == 4.0


def test_an_overridden_compute_loss_sees_no_regularizers_of_an_update_and_all_in_evaluation():
    model = compiled(model=WithOwnLoss)
    compiled_model._whole_loss(model, Data(X, Y, None), Y)
    assert model.seen == [] and "adds_losses" not in vars(model)
    model.compute_loss(X, Y, Y)
    assert len(model.seen) == len(model.losses) == 1


def test_an_overridden_compute_loss_that_raises_leaves_the_regularizers():
    class Raising(HFModel):
        def compute_loss(self, *args, **kwargs):
            raise RuntimeError("mine")

    model = compiled(model=Raising)
    with pytest.raises(RuntimeError, match="mine"):
        compiled_model._whole_loss(model, Data(X, Y, None), Y)
    assert len(model.losses) == 1


def test_an_overridden_compute_loss_is_warned_about_only_where_it_is_to_be_divided():
    model = compiled(model=WithOwnLoss)
    model.fit(X, Y, verbose=0)
    model = compiled(model=WithOwnLoss)
    set_up(model, micro_batch_size=2)
    with pytest.warns(UserWarning, match="or `compute_loss` is overridden.*are not used"):
        model.fit(X, Y, verbose=0)


def test_a_trace_names_the_solver_and_gives_the_linearization(caplog):
    model = compiled()
    with caplog.at_level(logging.INFO, "keras_hf"):
        setup = prepared(model, GaussNewton())
    assert "Steps for 'of_mine': by ConjugateGradient." in caplog.text
    assert isinstance(setup.linearization, DoubleBackward)
    forward = prepared(model, GaussNewton(linearization=ForwardAccumulation()))
    assert isinstance(forward.linearization, ForwardAccumulation)
    assert prepared(model, FiniteDifferenceHessian()).linearization is None


@pytest.mark.parametrize(
    ("stack", "operation"),
    [
        (lambda: [layers.Reshape((3, 1)), layers.LSTM(2)], "While"),
        (lambda: [layers.Dense(4), layers.Reshape((2, 2)), layers.Conv1D(2, 2, groups=2)], "PartitionedCall"),
    ],
)
def test_a_trace_refuses_what_would_be_wrong_for_the_network(stack, operation):
    with pytest.raises(ValueError, match=rf"gives wrong products.*'\w*{operation}'.*DoubleBackward"):
        prepared(compiled(*stack(), layers.Flatten()), GaussNewton(linearization=ForwardAccumulation()))
