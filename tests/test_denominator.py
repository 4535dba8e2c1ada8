import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_hf.denominator import Denominator, denominator_of, recorded_ranks
from keras_hf.objective import Data

BY_WEIGHT = "mean_with_sample_weight"


def mse(reduction="sum_over_batch_size"):
    return keras.losses.MeanSquaredError(reduction)


@pytest.mark.parametrize(
    ("loss", "is_weighted", "kind"),
    [
        ("mse", False, "cases"),
        ("mse", True, "cases"),
        (keras.losses.mean_squared_error, True, "cases"),
        (mse(), False, "cases"),
        (mse(), True, "cases"),
        (mse("mean"), True, "cases"),
        (mse("sum"), False, "sum"),
        (mse("sum"), True, "sum"),
        (mse(BY_WEIGHT), False, "cases"),
        (mse(BY_WEIGHT), True, "weights"),
        (mse(None), False, "unknown"),
        (mse("none"), True, "unknown"),
        (keras.losses.BinaryCrossentropy(), True, "cases"),
        (keras.losses.CategoricalCrossentropy(reduction="sum"), True, "sum"),
        # Several outputs.
        (["mse", mse("mean")], True, "cases"),
        ({"a": "mse", "b": None}, True, "cases"),
        ([mse("sum"), mse("sum")], True, "sum"),
        ([mse("sum"), "mse"], False, "unknown"),
        (["mse", mse(BY_WEIGHT)], False, "cases"),
        (["mse", mse(BY_WEIGHT)], True, "unknown"),
        # Each output may have weights of its own.
        ([mse(BY_WEIGHT), mse(BY_WEIGHT)], True, "unknown"),
        (None, False, "unknown"),
        ([None, None], False, "unknown"),
    ],
)
def test_kind_of_keras_losses(loss, is_weighted, kind):
    assert denominator_of(loss, False, is_weighted, {1}).kind == kind


@pytest.mark.parametrize(("reduction", "kind"), [("mean", "unknown"), (BY_WEIGHT, "unknown"), ("sum", "sum")])
def test_a_mask_hides_the_denominator_of_means(reduction, kind):
    # Keras divides by the mask's sum, which no case alone tells; a sum has no denominator.
    assert denominator_of(mse(reduction), True, False, {1}).kind == kind


@pytest.mark.parametrize("reduction", ["mean", BY_WEIGHT, "sum"])
@pytest.mark.parametrize("ranks", [{0}, {0, 1}])
def test_a_scalar_from_the_loss_function_hides_the_denominator(reduction, ranks):
    assert denominator_of(mse(reduction), False, False, ranks).kind == "unknown"


@pytest.mark.parametrize("values_per_case", [(), (3,)])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", BY_WEIGHT])
def test_losses_of_pieces_add_up_to_the_loss_of_all(reduction, is_weighted, values_per_case):
    # The promise of the room, on what Keras computes: sum(denominator * loss) over pieces / denominator of all = loss of all.
    rng = np.random.default_rng(0)
    y, y_pred = rng.normal(size=(2, 10, *values_per_case, 4))
    weight = rng.uniform(1, 3, size=(10, *values_per_case)) if is_weighted else None
    loss = keras.losses.MeanSquaredError(reduction, dtype="float64")
    denominator = denominator_of(loss, False, is_weighted, {1 + len(values_per_case)})

    def scaled_loss(cases):
        some_weights = None if weight is None else tf.constant(weight[cases])
        data = Data(tf.constant(y[cases]), None, some_weights)
        scale = 1 if denominator.is_sum else tf.cast(denominator.of(data, data.num_cases), tf.float64)
        return scale * loss(y[cases], y_pred[cases], some_weights), scale

    pieces = [scaled_loss(slice(*bounds)) for bounds in ((0, 5), (5, 6), (6, 10))]
    whole, scale_of_whole = scaled_loss(slice(0, 10))
    np.testing.assert_allclose(sum(piece for piece, _ in pieces), whole, rtol=1e-14)
    if not denominator.is_sum:
        np.testing.assert_allclose(sum(scale for _, scale in pieces), scale_of_whole, rtol=1e-15)


def test_only_a_mean_by_weight_looks_at_the_cases():
    weighted = Data(tf.zeros(3), None, tf.constant([1.0, 2.0, 5.0]))
    assert Denominator("weights").of(weighted, tf.constant(3)) == 8
    for kind in ("cases", "sum", "unknown"):
        assert Denominator(kind).of(None, tf.constant(3)) == 3
    assert [kind for kind in ("cases", "weights", "sum", "unknown") if Denominator(kind).needs_data] == ["weights"]
    assert [kind for kind in ("cases", "weights", "sum", "unknown") if Denominator(kind).is_sum] == ["sum"]


def test_recorded_ranks_are_those_before_reduction():
    class ToScalar(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return keras.ops.mean(keras.ops.square(y_true - y_pred))

    losses = [keras.losses.MeanSquaredError(), ToScalar()]
    calls = [loss.call for loss in losses]
    for loss, shape, ranks in ((losses[0], (5, 2), {1}), (losses[0], (5, 3, 2), {2}), (losses[1], (5, 2), {0})):
        with recorded_ranks(losses) as recorded:
            loss(tf.zeros(shape), tf.ones(shape))
        assert recorded == ranks
    with recorded_ranks(losses) as recorded:
        for loss in losses:
            assert loss(tf.zeros((5, 2)), tf.ones((5, 2))) == 1
    assert recorded == {0, 1}
    assert [loss.call for loss in losses] == calls


def test_ranks_are_no_longer_recorded_after_an_error():
    loss = keras.losses.MeanSquaredError()
    call = loss.call
    with pytest.raises(RuntimeError), recorded_ranks([loss]) as recorded:
        raise RuntimeError
    assert loss.call == call
    loss(tf.zeros((5, 2)), tf.ones((5, 2)))
    assert not recorded
