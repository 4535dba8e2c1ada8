"""What the terms of a compiled loss promise: what Keras computes, and how micro-batches combine."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import MASK_ROUNDING

from keras_hf.problem.loss_terms import LossTerm, WholeLoss, recorded_terms
from keras_hf.training.compiled_model import checked

BY_WEIGHT = "mean_with_sample_weight"


def mse(reduction="sum_over_batch_size"):
    return keras.losses.MeanSquaredError(reduction, dtype="float64")


def masked(y_pred, mask):
    y_pred = tf.constant(y_pred)
    if mask is not None:
        keras.src.backend.set_keras_mask(y_pred, tf.constant(mask))
    return y_pred


def term(loss, y, y_pred, weight=None, mask=None, loss_weight=None):
    weight = None if weight is None else tf.constant(weight)
    return LossTerm(loss, loss_weight, tf.constant(y), masked(y_pred, mask), weight, 1)


@pytest.mark.parametrize(
    ("loss", "is_weighted", "is_masked", "combination"),
    [
        (mse(), False, False, "cases"),
        (mse(), True, False, "cases"),
        (mse("mean"), True, False, "cases"),
        (mse("mean"), True, True, "data"),
        (mse("mean"), False, True, "data"),
        (mse("sum"), False, False, "sum"),
        (mse("sum"), True, True, "sum"),
        (mse(BY_WEIGHT), False, False, "cases"),
        (mse(BY_WEIGHT), True, False, "data"),
        (mse(BY_WEIGHT), False, True, "data"),
    ],
)
def test_combination_of_keras_losses(loss, is_weighted, is_masked, combination):
    y = np.zeros((5, 2))
    weight, mask = np.ones(5) if is_weighted else None, np.ones(5, bool) if is_masked else None
    assert term(loss, y, y, weight, mask).combination() == combination


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", BY_WEIGHT, "sum"])
def test_a_scalar_from_the_loss_function_combines_in_no_known_way(reduction):
    class ToScalar(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return keras.ops.mean(keras.ops.square(y_true - y_pred))

    assert term(ToScalar(reduction=reduction), np.zeros((5, 2)), np.ones((5, 2))).combination() == "unknown"
    assert WholeLoss(lambda: tf.constant(1.0)).combination() == "unknown"


@pytest.mark.parametrize(
    "loss",
    [keras.losses.Circle(2.0), keras.losses.Circle(2.0, reduction="sum", name="mine"), "circle", keras.losses.circle],
    ids=["object", "renamed", "string", "function"],
)
def test_a_loss_that_compares_cases_combines_in_no_known_way(loss):
    compile_loss = keras.src.trainers.compile_utils.CompileLoss(checked(loss))
    y, y_pred = np.array([0, 0, 1, 1]), tf.random.stateless_normal([4, 3], [0, 0])
    compile_loss.build(y, y_pred)
    with recorded_terms(compile_loss, 1) as terms:
        compile_loss(y, y_pred)
    assert [term.combination() for term in terms] == ["unknown"]


def test_an_unreduced_loss_is_refused():
    with pytest.raises(
        ValueError, match=r"'mean_squared_error' must be reduced.*Received: reduction=None.*`reduction="
    ):
        term(mse(None), np.zeros((5, 2)), np.zeros((5, 2))).combination()


@pytest.mark.parametrize("values_per_case", [(), (3, 2)])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", BY_WEIGHT])
def test_losses_of_micro_batches_add_up_to_the_loss_of_all(reduction, is_weighted, is_masked, values_per_case):
    # The promise of the room, on what Keras computes: sum(denominator * loss) over micro-batches / denominator of all = loss of all.
    rng = np.random.default_rng(0)
    y, y_pred = rng.normal(size=(2, 10, *values_per_case, 4))
    weight = rng.uniform(1, 3, size=(10, *values_per_case)) if is_weighted else None
    mask = rng.uniform(size=(10, *values_per_case)) < 0.6 if is_masked else None

    def of(cases):
        parts = [None if array is None else array[cases] for array in (y, y_pred, weight, mask)]
        return term(mse(reduction), *parts)

    def scaled(part, num_cases):
        denominator = {"cases": num_cases, "sum": 1.0}.get(part.combination())
        denominator = part.denominator() if denominator is None else tf.constant(denominator, tf.float64)
        return denominator * part.value(), denominator

    micro_batches = [scaled(of(slice(start, stop)), stop - start) for start, stop in ((0, 5), (5, 6), (6, 10))]
    whole, denominator = scaled(of(slice(0, 10)), 10)
    rounding = MASK_ROUNDING if is_masked else 1e-13
    np.testing.assert_allclose(sum(loss for loss, _ in micro_batches), whole, rtol=rounding)
    if reduction != "sum":
        np.testing.assert_allclose(sum(part for _, part in micro_batches), denominator, rtol=1e-14)
    # And the accurate value is the value, which is that of Keras.
    everything = of(slice(0, 10))
    np.testing.assert_allclose(everything.accurate_value(), everything.value(), rtol=1e-13)
    np.testing.assert_allclose(everything.value(), mse(reduction)(y, masked(y_pred, mask), weight), rtol=1e-14)


def test_what_cases_add_to_a_term_is_their_weighted_loss_over_the_denominator():
    y, y_pred, weight = np.zeros((4, 2)), np.array([[1.0, 3.0], [0, 2], [0, 0], [2, 2]]), np.array([1.0, 5.0, 1.0, 3.0])
    losses = np.array([5.0, 2.0, 0.0, 4.0])
    np.testing.assert_allclose(term(mse(), y, y_pred).case_losses(), losses / 4)
    np.testing.assert_allclose(term(mse("sum"), y, y_pred, weight, loss_weight=0.5).case_losses(), weight * losses / 2)
    steps = [array.reshape(2, 2, 2) for array in (y, y_pred)]
    np.testing.assert_allclose(term(mse(), *steps).case_losses(), [7 / 4, 1])
    # Not linear in the weights, or one number.
    assert term(mse(BY_WEIGHT), y, y_pred, weight).case_losses() is WholeLoss(lambda: y).case_losses() is None


def test_an_accurate_value_is_summed_in_float64():
    # 2^24 + 1 is no float32, and a float32 sum of one large and many small losses loses the small ones.
    y = np.zeros((1001, 1), "float32")
    y_pred = np.full((1001, 1), 1.0, "float32")
    y_pred[0] = 2.0**13
    loss = keras.losses.MeanSquaredError(reduction="sum")
    assert float(term(loss, y, y_pred).accurate_value()) == 2.0**26 + 1000


def test_the_loss_weight_multiplies():
    half = term(mse(), np.zeros((4, 1)), np.full((4, 1), 3.0), loss_weight=0.5)
    assert float(half.value()) == float(half.accurate_value()) == 4.5


def test_recorded_terms_are_keras_matching_of_outputs_and_losses():
    network = keras.Model(x := keras.Input((2,)), {"a": keras.layers.Dense(1)(x), "b": keras.layers.Dense(1)(x)})
    network.compile(loss={"a": "mse", "b": "mae"}, loss_weights={"a": 1.0, "b": 3.0})
    y, y_pred = {"a": tf.zeros([4, 1]), "b": tf.zeros([4, 1])}, {"a": tf.ones([4, 1]), "b": 2 * tf.ones([4, 1])}
    network._compile_loss.build(y, y_pred)
    entries = network._compile_loss._flat_losses
    with recorded_terms(network._compile_loss, 1) as terms:
        network._compile_loss(y, y_pred, None)
    assert {t.name: float(t.value()) for t in terms} == {"mse": 1.0, "mae": 6.0}
    assert network._compile_loss._flat_losses is entries
    with pytest.raises(RuntimeError), recorded_terms(network._compile_loss, 1):
        raise RuntimeError
    assert network._compile_loss._flat_losses is entries
