"""What the doors promise: bad data and models are turned away by a rule, what came and a cure; bad numbers reject the step and say so."""

import keras
import numpy as np
import problems
import pytest
import tensorflow as tf
from keras import layers

from keras_hf import ConjugateGradient, ConstantDamping, HessianFree, HFModel, Identity, LevenbergMarquardt
from keras_hf.advice import Advice
from keras_hf.common import checks


def network(*first):
    return keras.Sequential([keras.Input((2,)), *first, layers.Dense(2)])


def compiled(net, loss="mse"):
    # No preconditioner, few iterations: what is tested here comes before them.
    return problems.compiled(
        net, loss, optimizer=HessianFree(solver=ConjugateGradient(preconditioner=Identity(), max_iterations=3), seed=0)
    )


def cases(num_cases=20):
    rng = np.random.default_rng(0)
    return rng.normal(size=(num_cases, 2)).astype("float32"), rng.normal(size=(num_cases, 2)).astype("float32")


def fit(model, *data, **arguments):
    return model.fit(*data, **{"verbose": 0, "callbacks": [LevenbergMarquardt()], **arguments}).history


def dataset(*batches):
    """A dataset of these batches, whose shapes TensorFlow does not know before they come."""
    signature = tuple(tf.TensorSpec((None, *part.shape[1:]), part.dtype) for part in batches[0])
    data = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=signature)
    return data.apply(tf.data.experimental.assert_cardinality(len(batches)))


def assert_rejected(model, history, before):
    assert history["step_size"] == [0]
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


# Data.


@pytest.mark.parametrize("batch_size", [None, 5])
def test_x_and_y_of_different_length_are_refused(batch_size):
    x, y = cases()
    with pytest.raises(
        ValueError, match="must hold the same number of cases. Received: x of 20, y of 12. The first axis is the case"
    ):
        fit(compiled(network()), x, y[:12], batch_size=batch_size)


def test_parts_of_x_of_different_length_are_refused():
    x, y = cases()
    with pytest.raises(ValueError, match=r"same number of cases. Received: x\[0\] of 20, x\[1\] of 3, y of 20"):
        fit(compiled(network()), {"a": x, "b": x[:3]}, y)


def test_weights_of_another_length_are_refused():
    with pytest.raises(ValueError, match="same number of cases. Received: x of 20, y of 20, sample_weight of 7"):
        fit(compiled(network()), *cases(), sample_weight=np.ones(7))


@pytest.mark.parametrize("weight", [2.0, [1.0] * 20])
def test_weights_that_are_no_arrays_are_refused(weight):
    with pytest.raises(
        ValueError, match="`sample_weight` must hold dense arrays.*Received: sample_weight.*of type float.*np.asarray"
    ):
        fit(compiled(network()), *cases(), sample_weight=weight)


def test_sparse_matrices_are_refused():
    sparse = pytest.importorskip("scipy.sparse")
    x, y = cases()
    with pytest.raises(ValueError, match="`x` must hold dense arrays.*of type csr_matrix.*toarray"):
        fit(compiled(network()), sparse.csr_matrix(x), y)


def test_empty_arrays_are_refused():
    with pytest.raises(ValueError, match="`x` must hold at least one case. Received: arrays of length 0"):
        fit(compiled(network()), *cases(0))


def test_no_x_is_refused():
    with pytest.raises(ValueError, match="`fit` needs cases. Received: x=None"):
        fit(compiled(network()), None, cases()[1])


def test_no_y_is_refused():
    with pytest.raises(
        ValueError, match="`y` must hold what the loss 'mse' compares predictions with. Received: y=None"
    ):
        fit(compiled(network()), cases()[0])


@pytest.mark.parametrize("batch_size", [0, -3, 7.5])
def test_a_batch_size_that_is_no_count_is_refused(batch_size):
    with pytest.raises(
        ValueError, match=f"`batch_size` must be an integer >= 1 or `None`. Received: batch_size={batch_size}"
    ):
        fit(compiled(network()), *cases(), batch_size=batch_size)


@pytest.mark.slow
@pytest.mark.parametrize("regularizer", [None, "l2"])
def test_an_empty_batch_changes_nothing_and_says_so(regularizer):
    model = compiled(network(layers.Dense(3, kernel_regularizer=regularizer)))
    before = model.get_weights()
    with pytest.warns(UserWarning, match="update on 0 cases"):
        history = fit(model, dataset(cases(0)))
    assert history["num_cases"] == [0]
    assert_rejected(model, history, before)


def test_a_batch_of_unequal_lengths_is_refused_when_it_comes():
    model, (x, _) = compiled(network()), cases()
    for length in (12, 30):
        with pytest.raises(
            Exception, match="must hold the same number of cases.*Received: a batch where y is not as long as x"
        ):
            fit(model, dataset((x, cases(length)[1])))


def test_train_on_batch_refuses_unequal_lengths_and_no_cases():
    x, y = cases()
    with pytest.raises(ValueError, match="same number of cases.*Received: a batch where x is of 20 and y of 12"):
        compiled(network()).train_on_batch(x, y[:12])
    with pytest.raises(ValueError, match="`x` must hold at least one case. Received: a batch of length 0"):
        compiled(network()).train_on_batch(x[:0], y[:0])


def test_equal_lengths_looks_at_every_part():
    ten = tf.zeros([10, 3])
    checks.equal_lengths({"a": ten, "b": ten}, [ten, None], tf.ones([10]))
    for x, y, weight in (({"a": ten, "b": ten[:3]}, ten, None), (ten, [ten, ten[:3]], None), (ten, ten, tf.ones([3]))):
        with pytest.raises(ValueError, match="Received: a batch where x is of 10 and .* of 3"):
            checks.equal_lengths(x, y, weight)


@pytest.mark.parametrize(
    "weights, values, fits",
    [
        ((None,), (None,), True),
        ((None, 1), (None,), True),
        ((None, 5), (None,), False),
        ((None,), (None, 5), False),
        ((None, 1), (None, 5), True),
        ((None, 5), (None, 5), True),
        ((None, 4), (None, 5), False),
        ((None, 5, 1), (None, 5), True),
        ((None, 1), (None, 5, 5), False),
        ((None, 1, 1), (None, 5, 5), True),
        ((20,), (20,), True),
        ((20, 20), (20,), False),
        ((None,), (), True),
    ],
)
def test_weights_must_have_the_shape_of_the_loss_values(weights, values, fits):
    graph = tf.Graph()
    with graph.as_default():
        weight, value = (tf.compat.v1.placeholder("float32", shape) for shape in (weights, values))
    if fits:
        checks.sample_weight("mse", weight, value)
        return
    with pytest.raises(
        ValueError, match=r"`sample_weight` must hold one weight per value of the loss 'mse'.*shape \((cases|20),"
    ):
        checks.sample_weight("mse", weight, value)


def test_weights_that_keras_would_broadcast_are_refused():
    with pytest.raises(
        ValueError,
        match=r"one weight per value of the loss .*shape \(cases, 20\) for values of shape \(cases,\)",
    ):
        fit(compiled(network(), keras.losses.MeanSquaredError()), *cases(), sample_weight=np.ones((20, 20)))


@pytest.mark.parametrize("loss, y", [("mse", np.zeros((20, 3))), ("categorical_crossentropy", np.zeros(20))])
def test_targets_of_the_wrong_shape_are_refused_by_keras(loss, y):
    with pytest.raises(ValueError, match=r"Dimensions must be equal|must have the same rank"):
        fit(compiled(network(), loss), cases()[0], y)


@pytest.fixture(scope="module")
def traced():
    return compiled(network())


@pytest.fixture
def weighted(traced):
    """A model for twenty weighted cases, traced once, that has given no warning yet."""
    traced._advice = Advice()
    return traced


@pytest.mark.parametrize("where", ["x", "y", "sample_weight"])
def test_a_nan_anywhere_rejects_the_step(where, weighted):
    x, y = cases()
    data = {"x": x, "y": y, "sample_weight": np.ones(20)}
    data[where].flat[3] = np.nan
    model, before = weighted, weighted.get_weights()
    with pytest.warns(UserWarning, match="1 of the 20 cases of an update hold numbers that are not finite"):
        history = fit(model, **data)
    assert np.isnan(history["loss"]).all() and np.isnan(history["reduction_ratio"]).all()
    assert_rejected(model, history, before)


@pytest.mark.slow
def test_weights_of_zero_leave_nothing_to_do():
    model = compiled(network())
    before = model.get_weights()
    with pytest.warns(UserWarning, match="The gradient of the first update is zero"):
        history = fit(model, *cases(), sample_weight=np.zeros(20))
    assert history["loss"] == [0] and history["gradient_norm"] == [0]
    assert_rejected(model, history, before)


def test_negative_weights_are_taken_as_they_are(weighted):
    x, y = cases(16)
    # Two opposite weights of one case take everything from each other.
    expected = weighted.evaluate(x, y, batch_size=16, verbose=0) * 16 / 20
    sample_weight = np.r_[np.ones(18), -np.ones(2)]
    history = fit(weighted, np.r_[x, x[:2], x[:2]], np.r_[y, y[:2], y[:2]], sample_weight=sample_weight)
    assert history["loss"][0] == pytest.approx(expected, rel=1e-5)


# Models.


class Scaled(layers.Layer):
    """Multiplies by a weight of its own."""

    def __init__(self, dtype, trainable):
        super().__init__(name="scaled")
        self._own = dtype, trainable

    def build(self, shape):
        dtype, trainable = self._own
        self.scale = self.add_weight(shape=(), dtype=dtype, initializer="ones", trainable=trainable, name="scale")

    def call(self, x):
        return x * tf.cast(self.scale, x.dtype)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_a_trainable_weight_that_is_no_real_number_is_refused_by_name(dtype):
    with pytest.raises(
        ValueError,
        match=f"must be real floating-point numbers.*the weight '.*scaled/scale' of dtype {dtype}.*trainable=False",
    ):
        compiled(network(Scaled(dtype, trainable=True)))


@pytest.mark.slow
def test_a_weight_of_integers_that_is_not_trained_is_fine():
    fit(compiled(network(Scaled("int32", trainable=False))), *cases())


def test_a_network_that_fit_builds_is_looked_at_too():
    model = compiled(keras.Sequential([Scaled("int32", trainable=True), layers.Dense(2)]))
    with pytest.raises(ValueError, match="Received: the weight '.*scaled/scale' of dtype int32"):
        fit(model, *cases())


def test_a_network_all_frozen_is_refused():
    net = network()
    net.trainable = False
    with pytest.raises(ValueError, match="at least one trainable weight.*layer.trainable = True"):
        fit(compiled(net), *cases())


# Losses.


def giving(function):
    def custom(y, y_pred):
        return function(y, y_pred)

    return custom


def forgetful(y, y_pred):
    tf.reduce_mean((y - y_pred) ** 2)


class Forgetful(keras.losses.Loss):
    def call(self, y, y_pred):
        forgetful(y, y_pred)


@pytest.mark.parametrize(
    "loss, name, received",
    [
        (forgetful, "forgetful", "None. Is a `return` missing"),
        (Forgetful(name="absent"), "absent", "None. Is a `return` missing"),
        (giving(lambda y, y_pred: "big"), "custom", "'big' of type str"),
        (giving(lambda y, y_pred: [0.5, 0.5]), "custom", r"\[0.5, 0.5\] of type list"),
        (giving(lambda y, y_pred: 1.0), "custom", "1.0 of type float"),
        (
            giving(lambda y, y_pred: tf.cast(tf.reduce_sum(y - y_pred, -1), "int32")),
            "custom",
            "a tensor of dtype int32",
        ),
        (giving(lambda y, y_pred: tf.reduce_all(y > y_pred, -1)), "custom", "a tensor of dtype bool"),
    ],
    ids=["None", "None from an object", "string", "list", "number", "integers", "bools"],
)
def test_what_a_loss_must_return(loss, name, received):
    with pytest.raises(
        ValueError, match=f"The loss '{name}' must return a floating-point tensor.*Received: {received}"
    ):
        fit(compiled(network(), loss), *cases())


def test_a_loss_with_fewer_values_than_cases_is_refused_by_name():
    def of_some(y, y_pred):
        values = tf.reduce_mean((y - y_pred) ** 2, -1)
        return tf.boolean_mask(values, y[:, 0] > 0)

    model = compiled(network(), of_some)
    with pytest.raises(
        Exception, match="The loss .*of_some.* must return.*another number of values than there are cases.*the value 0"
    ):
        fit(model, *cases())


def test_the_check_of_a_loss_leaves_its_name_and_what_is_saved(tmp_path):
    model = compiled(network(), keras.losses.huber)
    model.evaluate(*cases(), verbose=0)
    assert model.loss is keras.losses.huber
    model.save(tmp_path / "run.keras")
    assert keras.models.load_model(tmp_path / "run.keras").loss is keras.losses.huber


@pytest.mark.parametrize("loss", ["huber", keras.losses.huber, keras.losses.Huber, keras.losses.Huber()])
@pytest.mark.slow
def test_a_loss_in_any_form_is_the_same_loss(loss):
    model = compiled(network(), loss)
    x, y = cases()
    expected = keras.losses.Huber()(y, model(x))
    assert fit(model, x, y)["loss"][0] == pytest.approx(float(expected), rel=1e-6)


def test_a_loss_that_is_nan_rejects_the_step():
    model = compiled(network(), giving(lambda y, y_pred: tf.reduce_mean((y - y_pred) ** 2, -1) * np.nan))
    before = model.get_weights()
    with pytest.warns(UserWarning, match="not finite, though the numbers in the cases are"):
        history = fit(model, *cases())
    assert np.isnan(history["loss"]).all()
    assert_rejected(model, history, before)


def test_no_loss_is_refused():
    with pytest.raises(ValueError, match=r"needs a loss to minimise.*`compile` without `loss`.*add_loss"):
        fit(compiled(network(), None), *cases())


@pytest.mark.slow
def test_a_loss_that_the_network_adds_is_enough():
    class Adding(layers.Layer):
        def call(self, x):
            self.add_loss(tf.reduce_mean(x**2))
            return x

    model = HFModel(keras.Sequential([keras.Input((2,)), layers.Dense(3), Adding()]))
    model.compile()
    history = fit(model, cases()[0], epochs=2)
    assert history["loss"][1] < history["loss"][0]


# Models that are not compiled.


@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch", "test_on_batch", "check_products"])
def test_what_needs_a_loss_says_that_compile_comes_first(method):
    with pytest.raises(ValueError, match=r"You must call `compile\(\)` before"):
        getattr(HFModel(network()), method)(*cases())


def test_weights_come_and_go_without_compile(tmp_path):
    x, _ = cases()
    source, target = HFModel(network()), HFModel(network())
    source.save_weights(tmp_path / "a.weights.h5")
    target.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_array_equal(target.predict(x, verbose=0), source.predict(x, verbose=0))
    source.save(tmp_path / "a.keras")
    loaded = keras.models.load_model(tmp_path / "a.keras")
    assert not loaded.compiled
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), source.predict(x, verbose=0))


def test_weights_that_do_not_fit_a_model_without_compile_leave_it_as_it_was(tmp_path):
    HFModel(network(layers.Dense(5))).save_weights(tmp_path / "a.weights.h5")
    model = HFModel(network())
    before = model.get_weights()
    with pytest.raises(ValueError, match="does not hold the weights of this model, which stays as it was"):
        model.load_weights(tmp_path / "a.weights.h5")
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


# What a call leaves.


@pytest.mark.slow
def test_steps_per_epoch_are_updates_on_the_one_batch_that_holds_all_cases():
    for steps_per_execution in (1, 2):
        model = HFModel(network())
        optimizer = HessianFree(
            solver=ConjugateGradient(preconditioner=Identity(), max_iterations=2), growing_batch=None, seed=0
        )
        model.compile(optimizer, "mse", steps_per_execution=steps_per_execution)
        fit(model, *cases(), batch_size=50, steps_per_epoch=3, epochs=2, callbacks=[ConstantDamping()])
        assert int(model.optimizer.iterations) == 6


@pytest.mark.filterwarnings("ignore:(An update on 3 cases|In the last 40 updates)")
@pytest.mark.parametrize("steps_per_execution", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_steps_per_epoch_are_updates_where_they_do_not_divide_the_cases(steps_per_execution):
    model = HFModel(network())
    optimizer = HessianFree(
        solver=ConjugateGradient(preconditioner=Identity(), max_iterations=2), growing_batch=None, seed=0
    )
    model.compile(optimizer, "mse", steps_per_execution=steps_per_execution)
    counts = []
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: counts.append(int(optimizer.iterations)))
    # 61 cases are left for training. Keras' warning that the data ran out would be an error.
    arguments = {"validation_split": 0.1, "steps_per_epoch": 20, "epochs": 2}
    fit(model, *cases(68), **arguments, callbacks=[ConstantDamping(), count])
    assert counts == [20, 40]


def test_a_check_of_products_leaves_weights_that_violate_a_constraint(capsys):
    dense = layers.Dense(3, kernel_constraint="non_neg")
    model = compiled(network(dense))
    dense.kernel.assign(-np.ones((2, 3)))
    values = lambda: [v.numpy() for v in (*model.variables, *model.metrics_variables, *model.optimizer.variables)]  # noqa: E731
    before = values()
    model.check_products(*cases())
    for one, other in zip(before, values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_small_remainder_is_said_once_with_the_cure():
    model = compiled(network())
    with pytest.warns(
        UserWarning, match="An update on 3 cases.*Others held up to 300. Choose a `batch_size` that leaves no"
    ) as record:
        fit(model, *cases(603), batch_size=300, epochs=2)
    assert sum("fits their noise" in str(warning.message) for warning in record) == 1


def test_a_layer_unfrozen_without_compile_stays_frozen_and_that_is_said():
    dense = layers.Dense(3)
    dense.trainable = False
    model = compiled(network(dense))
    fit(model, *cases())
    before, dense.trainable = dense.kernel.numpy(), True
    with pytest.warns(UserWarning, match="has changed since `compile`.*dense.*stay as they were then. Compile again"):
        fit(model, *cases())
    np.testing.assert_array_equal(dense.kernel, before)
