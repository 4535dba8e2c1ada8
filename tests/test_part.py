"""What parts that remember promise: the optimizer keeps their state, saves it, and an update hands it on."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import assert_equal, fit, normal, renewed, trainable

from keras_hf import GaussNewton, GrowingBatch
from keras_hf.common.part import Part
from keras_hf.solvers.preconditioners import Preconditioner


@keras.saving.register_keras_serializable("tests")
class Averaging(Preconditioner):
    """The running mean of the gradient's absolute values, to the half."""

    def initial_state(self, variables, layers):
        size = sum(variable.shape.num_elements() for variable in variables)
        return {
            "mean": tf.ones([size], tf.float64),
            "updates": tf.constant(0),
            "layers": tf.constant(len(layers), tf.int64),
            "started": tf.constant(False),
        }

    def inverse(self, objective, linearize, damping, state):
        gradient = objective.loss_and_gradient().gradient
        mean = (state["mean"] + tf.cast(tf.abs(gradient), tf.float64)) / 2
        scale = tf.cast(tf.sqrt(mean), gradient.dtype) + damping
        new = {"mean": mean, "updates": state["updates"] + 1, "started": tf.constant(True)}
        return lambda residual: residual / scale, {**state, **new}


@keras.saving.register_keras_serializable("tests")
class Scaled(GaussNewton):
    """Gauss-Newton times the number in its state, two at first."""

    def initial_state(self, variables, layers):
        return {"factor": tf.constant(2.0, tf.float64)}

    def prepared(self, objective, state):
        prepared = type(self)(self.linearization)
        prepared.factor = state["factor"]
        return prepared, {"factor": state["factor"] / 2}

    def linearize(self, micro_batch):
        product, factor = super().linearize(micro_batch), self.factor
        return lambda v: [tf.cast(factor, part.dtype) * part for part in product(v)]


def remembering(preconditioner=None, network=None, **arguments):
    arguments = {"max_iterations": 5, "growing_batch": None, **arguments}
    return trainable(network, preconditioner=preconditioner or Averaging(), **arguments)


def cases():
    return normal(20, 2), normal(20, 1, seed=1)


def memory(optimizer):
    """What the preconditioner remembers: a dict of tensors."""
    return optimizer.state().solver["preconditioner"]


def state_of(model):
    return {key: value.numpy() for key, value in memory(model.optimizer).items()}


def assert_same_state(one, other):
    assert {key: value.dtype for key, value in one.items()} == {key: value.dtype for key, value in other.items()}
    assert_equal(one, other)


def test_a_part_remembers_nothing_unless_it_says_so():
    assert Part().initial_state([], []) == {}


class Own(Part):
    """A part of a user: with a part of its own, and arguments without a default."""

    def __init__(self, inner, *rest, power, **options):
        self.inner = inner
        if power > 0:
            self.power = power


def test_a_configuration_is_that_of_named_arguments_and_their_parts():
    config = Own(GrowingBatch(7), power=2).get_config()
    assert set(config) == {"inner", "power"} and config["power"] == 2
    again = Own.from_config(config)
    assert again.inner.get_config() == GrowingBatch(7).get_config() and again.power == 2
    with pytest.raises(TypeError, match="every argument.*Received: a `Own` without power. Assign it in `__init__`"):
        Own(GrowingBatch(7), power=0).get_config()


def test_a_built_optimizer_holds_the_initial_state_of_every_part():
    model = remembering(growing_batch=GrowingBatch(7))
    state = state_of(model)
    # Of 17 weights, in two layers or more.
    initial = {"mean": np.ones(17), "updates": np.int32(0), "layers": state["layers"], "started": np.bool_(False)}
    assert_same_state(state, initial)
    assert state["layers"] >= 2
    growing = {key: int(value) for key, value in model.optimizer.state().growing_batch.items()}
    assert growing == {"size": 7, "start": 0, "misses": 0}
    assert model.optimizer.state().curvature == model.optimizer.state().solver["stopping"] == {}
    names = [variable.name for variable in model.optimizer.variables]
    assert {"solver_preconditioner_mean", "solver_preconditioner_updates", "growing_batch_size"} <= set(names)


def test_a_state_assigned_is_the_state_read_and_saved():
    saved, again = (remembering(growing_batch=GrowingBatch(7)).optimizer for _ in range(2))
    new = {
        "mean": tf.range(17, dtype=tf.float64) / 7,
        "updates": tf.constant(3),
        "layers": tf.constant(2**40, tf.int64),
        "started": tf.constant(True),
    }
    state = saved.state()
    solver, growing_batch = {**state.solver, "preconditioner": new}, {**state.growing_batch, "start": tf.constant(11)}
    saved.assign_state(state._replace(solver=solver, growing_batch=growing_batch))
    store = {}
    saved.save_own_variables(store)
    again.load_own_variables(store)
    for optimizer in (saved, again):
        assert_same_state(memory(optimizer), new)
        assert int(optimizer.state().growing_batch["start"]) == 11


@pytest.mark.slow
def test_every_update_hands_the_state_to_the_next_and_a_saved_model_goes_on(tmp_path):
    x, y = cases()
    model = renewed(remembering)
    initial, mean = state_of(model), np.ones(17)
    for number in (1, 2):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        gradient = np.concatenate([np.ravel(g) for g in tape.gradient(loss, model.trainable_weights)])
        fit(model, x, y)
        mean = 0.5 * mean + 0.5 * abs(gradient)
        state = state_of(model)
        np.testing.assert_allclose(state["mean"], mean, rtol=1e-5)
        assert state["updates"] == number and state["started"] and state["layers"] == initial["layers"]
    model.save(tmp_path / "run.keras")
    again = keras.models.load_model(tmp_path / "run.keras")
    assert_same_state(state_of(again), state)
    assert fit(again, x, y) == fit(model, x, y)
    assert_same_state(state_of(again), state_of(model))
    assert state_of(again)["updates"] == 3


@pytest.mark.slow
def test_numbers_that_are_not_finite_are_not_handed_on():
    x, y = cases()
    model = renewed(remembering)
    fit(model, x, y)
    before = state_of(model)
    x[3] = np.nan
    with pytest.warns(UserWarning, match="1 of the cases of the batch"):
        assert fit(model, x, y)["step_size"] == [0]
    assert_same_state(state_of(model), before)
    assert fit(model, *cases())["step_size"][0] > 0
    assert state_of(model)["updates"] == before["updates"] + 1


def one_layer():
    return keras.Sequential([keras.Input((2,)), layers.Dense(1, kernel_initializer="zeros")])


def test_a_rejected_step_hands_its_state_on():
    def only_at_the_start(y, y_pred):
        return tf.where(y_pred == 0, (y - y_pred) ** 2, np.nan)

    model = remembering(network=one_layer(), loss=only_at_the_start)
    before = state_of(model)
    assert fit(model, *cases())["step_size"] == [0]
    after = state_of(model)
    assert after["updates"] == 1 and (after["mean"] != before["mean"]).all()


@pytest.mark.slow
def test_a_step_that_raises_leaves_the_state():
    class Raising(Averaging):
        def inverse(self, objective, linearize, damping, state):
            precondition, new = super().inverse(objective, linearize, damping, state)

            def fail():
                raise MemoryError("no memory left")

            def raising(residual):
                with tf.control_dependencies([tf.py_function(fail, [], [])]):
                    return precondition(residual)

            return raising, new

    model = remembering(Raising(), one_layer())
    before = state_of(model)
    with pytest.raises(Exception, match="no memory left"):
        fit(model, *cases())
    assert_same_state(state_of(model), before)


def test_products_outside_of_updates_are_those_of_the_next_update(float64, capsys):
    x, y = cases()
    plain, scaled = (trainable(curvature=curvature, growing_batch=None) for curvature in (GaussNewton(), Scaled()))
    scaled.set_weights(plain.get_weights())
    v = normal(plain.count_params(), seed=3)
    expected = plain.objective(x, y).product(plain.objective(x, y).weights, v)
    for factor in (2.0, 1.0):
        objective = scaled.objective(x, y)
        np.testing.assert_allclose(objective.product(plain.objective(x, y).weights, v), factor * expected, rtol=1e-12)
        assert all(check.holds for check in scaled.check_products(x, y))
        fit(scaled, x, y)
