"""What the doors promise: bad data and models are turned away by a rule, what came and a cure; bad numbers reject the step and say so."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import all_values, assert_equal, fit, renewed, trainable

from keras_hf import ConstantDamping, HFModel, Identity
from keras_hf.common import checks

# No preconditioner, few iterations: what is tested here comes before them. A chunk of all cases, so that one trace is for arrays and datasets.
SETTINGS = {"preconditioner": Identity(), "max_iterations": 3, "curvature_batch_size": 1000}


def network(*first):
    return keras.Sequential([keras.Input((2,)), *first, layers.Dense(2)])


def compiled(net=None, loss="mse", **compile_arguments):
    net = network() if net is None else net
    return trainable(net, loss, damping=None, compile_arguments=compile_arguments, **SETTINGS)


def cases(num_cases=20):
    rng = np.random.default_rng(0)
    return rng.normal(size=(num_cases, 2)).astype("float32"), rng.normal(size=(num_cases, 2)).astype("float32")


def weighted(num_cases=20):
    """`x, y, sample_weight`: where all tests have weights, one trace is for all."""
    return *cases(num_cases), np.ones(num_cases, "float32")


def dataset(*batches):
    """A dataset of these batches, whose shapes TensorFlow does not know before they come."""
    signature = tuple(tf.TensorSpec((None, *part.shape[1:]), part.dtype) for part in batches[0])
    data = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=signature)
    return data.apply(tf.data.experimental.assert_cardinality(len(batches)))


def assert_rejected(model, history, before):
    assert history["step_size"] == [0]
    assert_equal(before, model.get_weights())


# Data.


X, Y = cases()
SAME_NUMBER = "must hold the same number of cases. Received: "
NO_ARRAYS = "`sample_weight` must hold dense arrays.*Received: sample_weight.*of type float.*np.asarray"
NO_COUNT = "`batch_size` must be an integer >= 1 or `None`. Received: batch_size="
# Arguments of `fit`, and the message.
REFUSED = {
    "x and y of different length": ((X, Y[:12]), SAME_NUMBER + "x of 20, y of 12. The first axis is the case"),
    "x and y of different length in batches": ((X, Y[:12], 5), SAME_NUMBER + "x of 20, y of 12."),
    "parts of x of different length": (({"a": X, "b": X[:3]}, Y), SAME_NUMBER + r"x\[0\] of 20, x\[1\] of 3, y of 20"),
    "empty arrays": (cases(0), "`x` must hold at least one case. Received: arrays of length 0"),
    "no x": ((None, Y), "`fit` needs cases. Received: x=None"),
    "no y": ((X,), "`y` must hold what the loss 'mse' compares predictions with. Received: y=None"),
    "words for x": ((np.full((20, 3), "word"), Y), "`x` must hold numbers. Received: strings.*`TextVectorization`"),
    "words for y": ((X, np.full((20, 1), "word")), "`y` must hold numbers. Received: strings. Number the classes"),
    "a batch_size of 0": ((X, Y, 0), NO_COUNT + "0"),
    "a negative batch_size": ((X, Y, -3), NO_COUNT + "-3"),
    "a broken batch_size": ((X, Y, 7.5), NO_COUNT + "7.5"),
}
REFUSED_WEIGHTS = {
    "another length": (np.ones(7), SAME_NUMBER + "x of 20, y of 20, sample_weight of 7"),
    "a number": (2.0, NO_ARRAYS),
    "a list of numbers": ([1.0] * 20, NO_ARRAYS),
    "a matrix that Keras would broadcast": (
        np.ones((20, 20)),
        r"one weight per value of the loss .*shape \(cases, 20\) for values of shape \(cases,\)",
    ),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_cases_that_do_not_fit_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(renewed(compiled), *arguments)


@pytest.mark.parametrize("weight, message", REFUSED_WEIGHTS.values(), ids=REFUSED_WEIGHTS)
def test_weights_that_are_not_one_for_each_case_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        fit(compiled(), X, Y, sample_weight=weight)


def reads_words():
    look_up = layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")
    return compiled(keras.Sequential([keras.Input((1,), dtype="string"), look_up, layers.Dense(1)]))


def test_words_are_taken_where_the_network_reads_them():
    x, y = np.array([["a"], ["b"]] * 10), np.tile([[0.0], [1.0]], (10, 1))
    for kind in ("U", "S", object):
        model, words = renewed(reads_words), x.astype(kind)
        assert fit(model, words, y, validation_data=(words, y))["step_size"][0] > 0
        assert fit(model, words, y, 10, validation_split=0.5)["val_loss"][0] == model.evaluate(words, y, verbose=0)
        np.testing.assert_array_equal(model.predict(words, verbose=0), model(tf.constant(x)))


def test_sparse_matrices_are_refused():
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(ValueError, match="`x` must hold dense arrays.*of type csr_matrix.*toarray"):
        fit(renewed(compiled), sparse.csr_matrix(X), Y)


@pytest.mark.parametrize(
    ("x", "cure"), [(tf.sparse.from_dense(X), "to_dense"), (tf.RaggedTensor.from_tensor(X), "to_tensor")]
)
def test_sparse_and_ragged_tensors_are_refused(x, cure):
    with pytest.raises(ValueError, match=rf"dense tensors.*Received: a {type(x).__name__} of shape \(.*{cure}"):
        fit(renewed(compiled), x, Y)


def regularized():
    return compiled(network(layers.Dense(3, kernel_regularizer="l2")))


@pytest.mark.parametrize("make", [compiled, pytest.param(regularized, marks=pytest.mark.slow)])
def test_an_empty_batch_changes_nothing_and_says_so(make):
    model = renewed(make)
    before = model.get_weights()
    with pytest.warns(UserWarning, match="update on 0 cases"):
        history = fit(model, dataset(weighted(0)))
    assert history["num_cases"] == [0]
    assert_rejected(model, history, before)


def test_a_batch_whose_shape_says_that_it_is_empty_is_refused_with_a_regularizer_too():
    with pytest.raises(ValueError, match="`x` must hold at least one case. Received: a batch of length 0"):
        renewed(regularized).fit(tf.data.Dataset.from_tensors((X[:0], Y[:0])), verbose=0)


def test_a_batch_of_unequal_lengths_is_refused_when_it_comes():
    message = "must hold the same number of cases.*Received: a batch where y is not as long as x"
    for length in (12, 30):
        with pytest.raises(Exception, match=message):
            fit(renewed(compiled), dataset((X, *weighted(length)[1:])))


def test_train_on_batch_refuses_unequal_lengths_and_no_cases():
    with pytest.raises(ValueError, match="same number of cases.*Received: a batch where x is of 20 and y of 12"):
        renewed(compiled).train_on_batch(X, Y[:12])
    with pytest.raises(ValueError, match="`x` must hold at least one case. Received: a batch of length 0"):
        renewed(compiled).train_on_batch(X[:0], Y[:0])


def test_equal_lengths_looks_at_every_part():
    ten = tf.zeros([10, 3])
    checks.equal_lengths({"a": ten, "b": ten}, [ten, None], tf.ones([10]))
    for x, y, weight in (({"a": ten, "b": ten[:3]}, ten, None), (ten, [ten, ten[:3]], None), (ten, ten, tf.ones([3]))):
        with pytest.raises(ValueError, match="Received: a batch where x is of 10 and .* of 3"):
            checks.equal_lengths(x, y, weight)


# Shapes of weights, by that of the values of the loss.
FITTING = {
    (): [(None,)],
    (20,): [(20,)],
    (None,): [(None,), (None, 1)],
    (None, 5): [(None, 1), (None, 5), (None, 5, 1)],
    (None, 5, 5): [(None, 1, 1)],
}
OTHERS = {(20,): [(20, 20)], (None,): [(None, 5)], (None, 5): [(None,), (None, 4)], (None, 5, 5): [(None, 1)]}


def check_shapes(weights, values):
    with tf.Graph().as_default():
        checks.sample_weight("mse", *(tf.compat.v1.placeholder("float32", shape) for shape in (weights, values)))


def test_weights_must_have_the_shape_of_the_loss_values():
    message = r"`sample_weight` must hold one weight per value of the loss 'mse'.*shape \((cases|20),"
    for values, shapes in FITTING.items():
        for weights in shapes:
            check_shapes(weights, values)
    for values, shapes in OTHERS.items():
        for weights in shapes:
            with pytest.raises(ValueError, match=message):
                check_shapes(weights, values)


@pytest.mark.parametrize("method", ["laplace", "parameter_covariance", "objective", "check_products"])
def test_methods_that_need_all_cases_refuse_a_dataset_with_the_cure(method):
    model = compiled()
    with pytest.raises(
        ValueError, match=f"`{method}` needs all cases at once, as arrays. Received: x of type .*concatenate"
    ):
        getattr(model, method)(tf.data.Dataset.from_tensor_slices((X, Y)).batch(5))


def test_one_weight_for_a_whole_sequence_is_refused_with_the_shape_that_it_must_have():
    model = compiled(keras.Sequential([keras.Input((5, 3)), layers.Dense(1)]))
    with pytest.raises(
        ValueError, match=r"of shape \(cases,\) for values of shape \(cases, 5\). .* shape \(cases, 1\)"
    ):
        fit(model, np.zeros((20, 5, 3)), np.zeros((20, 5, 1)), sample_weight=np.ones(20))


@pytest.mark.parametrize("loss, y", [("mse", np.zeros((20, 3))), ("categorical_crossentropy", np.zeros(20))])
def test_targets_of_the_wrong_shape_are_refused_by_keras(loss, y):
    with pytest.raises(ValueError, match=r"Dimensions must be equal|must have the same rank"):
        fit(compiled(loss=loss), X, y)


NOT_FINITE = "1 of the cases of the batch hold numbers that are not finite"
OVERFLOW = "not finite, though the numbers in the cases are"
# What the first numbers are, the warning, and the loss.
BAD_NUMBERS = {
    "NaN in x": ({"x": [np.nan]}, NOT_FINITE, np.nan),
    "NaN in y": ({"y": [np.nan]}, NOT_FINITE, np.nan),
    "NaN in sample_weight": ({"sample_weight": [np.nan]}, NOT_FINITE, np.nan),
    # The squares of these are too large for float32.
    "infinite loss": ({"y": [1e30] * 4}, OVERFLOW, np.inf),
    "difference of infinities": ({"y": [1e30] * 4, "sample_weight": [1, -1]}, OVERFLOW, np.nan),
    "weights of zero": ({"sample_weight": [0] * 20}, "The gradient of the first update is zero", 0),
}


def test_bad_numbers_reject_the_step_and_say_so():
    for name, (numbers, warning, loss) in BAD_NUMBERS.items():
        model, data = renewed(compiled), dict(zip(("x", "y", "sample_weight"), weighted(), strict=True))
        for part, values in numbers.items():
            data[part].flat[: len(values)] = values
        before = model.get_weights()
        with pytest.warns(UserWarning, match=warning):
            history = fit(model, **data)
        np.testing.assert_equal(history["loss"], [loss], err_msg=name)
        assert np.isnan(history["reduction_ratio"]).all(), name
        assert_rejected(model, history, before)


def test_negative_weights_are_taken_as_they_are():
    model, (x, y) = renewed(compiled), cases(16)
    # Two opposite weights of one case take everything from each other.
    expected = model.evaluate(x, y, batch_size=16, verbose=0) * 16 / 20
    sample_weight = np.r_[np.ones(18), -np.ones(2)]
    history = fit(model, np.r_[x, x[:2], x[:2]], np.r_[y, y[:2], y[:2]], sample_weight=sample_weight)
    assert history["loss"][0] == pytest.approx(expected, rel=1e-5)


def test_a_small_batch_of_a_dataset_is_said_once():
    with pytest.warns(UserWarning, match="update on 8 cases says little") as record:
        fit(renewed(compiled), dataset(weighted(8), weighted(8)), epochs=2)
    assert len(record) == 1


def test_a_small_remainder_is_said_once_with_the_cure():
    message = "An update on 3 cases.*Others held up to 300. Leave out the remainder"
    with pytest.warns(UserWarning, match=message) as record:
        fit(renewed(compiled), dataset(weighted(300), weighted(3)), epochs=2)
    assert sum("says little" in str(warning.message) for warning in record) == 1


def test_a_batch_size_that_leaves_a_rest_makes_batches_of_near_equal_size():
    x, y, weight = weighted(205)
    counts = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: counts.append(int(logs["num_cases"])))
    fit(renewed(compiled), x, y, sample_weight=weight, batch_size=100, epochs=2, callbacks=[count])
    assert counts == [68, 68, 69] * 2


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
    message = f"must be real floating-point numbers.*the weight '.*scaled/scale' of dtype {dtype}.*trainable=False"
    with pytest.raises(ValueError, match=message):
        compiled(network(Scaled(dtype, trainable=True)))


def test_a_network_that_fit_builds_is_looked_at_too():
    model = compiled(keras.Sequential([Scaled("int32", trainable=True), layers.Dense(2)]))
    with pytest.raises(ValueError, match="Received: the weight '.*scaled/scale' of dtype int32"):
        fit(model, X, Y)


def test_a_network_all_frozen_is_refused():
    net = network()
    net.trainable = False
    with pytest.raises(ValueError, match="at least one trainable weight.*layer.trainable = True"):
        fit(compiled(net), X, Y)


def test_weights_that_are_not_trained_stay_and_a_layer_unfrozen_without_compile_too_which_is_said():
    scaled, dense = Scaled("int32", trainable=False), layers.Dense(3)
    dense.trainable = False
    model = compiled(network(scaled, dense))
    kernel = dense.kernel.numpy()
    fit(model, X, Y)
    np.testing.assert_array_equal(dense.kernel, kernel)
    dense.trainable = True
    with pytest.warns(UserWarning, match="has changed since `compile`.*dense.*stay as they were then. Compile again"):
        fit(model, X, Y)
    np.testing.assert_array_equal(dense.kernel, kernel)
    assert int(scaled.scale) == 1
    for method in (model.objective, model.check_products, model.laplace, model.parameter_covariance):
        with pytest.raises(
            ValueError, match="weights that `compile` found trainable. Received: .*dense.*Compile again"
        ):
            method(X, Y)


# Losses.


def forgetful(y, y_pred):
    tf.reduce_mean((y - y_pred) ** 2)


class Forgetful(keras.losses.Loss):
    def call(self, y, y_pred):
        forgetful(y, y_pred)


RETURNED = {
    "None": (forgetful, "None. Is a `return` missing"),
    "None from an object": (Forgetful(name="forgetful"), "None. Is a `return` missing"),
    "string": (lambda y, y_pred: "big", "'big' of type str"),
    "list": (lambda y, y_pred: [0.5, 0.5], r"\[0.5, 0.5\] of type list"),
    "number": (lambda y, y_pred: 1.0, "1.0 of type float"),
    "integers": (lambda y, y_pred: tf.argmax(y - y_pred, -1), "a tensor of dtype int64"),
    "bools": (lambda y, y_pred: tf.reduce_all(y > y_pred, -1), "a tensor of dtype bool"),
}


@pytest.mark.parametrize("loss, received", RETURNED.values(), ids=RETURNED)
def test_what_a_loss_must_return(loss, received):
    message = f"The loss '(forgetful|<lambda>)' must return a floating-point tensor.*Received: {received}"
    with pytest.raises(ValueError, match=message):
        fit(compiled(loss=loss), X, Y)


def test_a_loss_with_fewer_values_than_cases_is_refused_by_name():
    def of_some(y, y_pred):
        return tf.boolean_mask(tf.reduce_mean((y - y_pred) ** 2, -1), y[:, 0] > 0)

    message = "The loss .*of_some.* must return.*another number of values than there are cases.*the value 0"
    with pytest.raises(Exception, match=message):
        fit(compiled(loss=of_some), X, Y)


def test_the_check_of_a_loss_leaves_its_name_and_what_is_saved(tmp_path):
    model = compiled(loss=keras.losses.huber)
    model.evaluate(X, Y, verbose=0)
    assert model.loss is keras.losses.huber
    model.save(tmp_path / "run.keras")
    assert keras.models.load_model(tmp_path / "run.keras").loss is keras.losses.huber


@pytest.mark.slow
def test_a_loss_in_any_form_is_the_same_loss():
    forms = ["huber", keras.losses.huber, keras.losses.Huber, keras.losses.Huber()]
    inputs = keras.Input((2,))
    net = keras.Model(inputs, [layers.Dense(2)(inputs) for _ in forms])
    expected = [float(keras.losses.Huber()(Y, output)) for output in net(X)]
    assert len(set(expected)) == len(forms)
    assert fit(compiled(net, forms), X, [Y] * len(forms))["loss"] == [pytest.approx(sum(expected), rel=1e-6)]


def test_no_loss_is_refused():
    with pytest.raises(ValueError, match=r"needs a loss to minimise.*`compile` without `loss`.*add_loss"):
        fit(compiled(loss=None), X, Y)


@pytest.mark.slow
def test_a_loss_that_the_network_adds_is_enough():
    class Adding(layers.Layer):
        def call(self, x):
            self.add_loss(tf.reduce_mean(x**2))
            return x

    net = keras.Sequential([keras.Input((2,)), layers.Dense(3), Adding()])
    history = fit(compiled(net, None), X, epochs=2)
    assert history["loss"][1] < history["loss"][0]


# Models that are not compiled.


@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch", "test_on_batch", "check_products"])
def test_what_needs_a_loss_says_that_compile_comes_first(method):
    with pytest.raises(ValueError, match=r"You must call `compile\(\)` before"):
        getattr(HFModel(network()), method)(X, Y)


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
    assert_equal(before, model.get_weights())


def test_a_file_of_the_network_alone_is_refused_with_the_call_that_loads_it(tmp_path):
    model, other = HFModel(network()), HFModel(network())
    other.network.save_weights(tmp_path / "network.weights.h5")
    with pytest.raises(ValueError, match=r"network alone is loaded by `model.network.load_weights\(...\)`"):
        model.load_weights(tmp_path / "network.weights.h5")
    model.network.load_weights(tmp_path / "network.weights.h5")
    assert_equal(other.get_weights(), model.get_weights())


# What a call leaves.


def in_pairs():
    return compiled(steps_per_execution=2)


@pytest.mark.filterwarnings("ignore:(An update on 3 cases|In the last 40 updates)")
@pytest.mark.parametrize("make", [compiled, pytest.param(in_pairs, marks=pytest.mark.slow)])
def test_steps_per_epoch_are_updates(make):
    model, counts = renewed(make), []

    def count(epoch, logs):
        counts.append(int(model.optimizer.iterations))

    def numbers(num_cases, **arguments):
        x, y, weight = weighted(num_cases)
        callbacks = [ConstantDamping(), keras.callbacks.LambdaCallback(on_epoch_end=count)]
        fit(model, x, y, sample_weight=weight, epochs=2, callbacks=callbacks, **arguments)
        return counts

    # On the one batch that holds all cases.
    assert numbers(20, batch_size=50, steps_per_epoch=3) == [3, 6]
    # They do not divide the 61 cases left for training. Keras' warning that the data ran out would be an error.
    assert numbers(68, validation_split=0.1, steps_per_epoch=20) == [3, 6, 26, 46]


def test_a_check_of_products_leaves_weights_that_violate_a_constraint(capsys):
    dense = layers.Dense(3, kernel_constraint="non_neg")
    model = compiled(network(dense))
    dense.kernel.assign(-np.ones((2, 3)))
    before = all_values(model) + [variable.numpy() for variable in model.metrics_variables]
    model.check_products(X, Y)
    assert_equal(before, all_values(model) + [variable.numpy() for variable in model.metrics_variables])
