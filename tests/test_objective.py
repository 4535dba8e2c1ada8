"""What the objective promises: one fixed function per update, whatever the pieces."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import (
    KERAS,
    MASK_ROUNDING,
    PROBLEMS,
    compiled,
    dense_matrix,
    inputs,
    loss_and_gradient,
    make_model,
    model_data,
    with_objective,
)

from keras_hf import ConjugateGradient, DoubleBackward, EmpiricalFisherDiagonal, GaussNewton, HessianFree

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"rtol": 1e-12, "atol": 1e-14}


def a_step(objective):
    return tf.sin(tf.range(objective.num_weights, dtype=tf.float64))


def matrix_and_loss(objective):
    """The matrix at the start, and the loss after a step."""
    matrix = dense_matrix(objective.product(GaussNewton(DoubleBackward())), objective.num_weights)
    return matrix, objective.loss_at(a_step(objective))


def everything(objective):
    """Loss, gradient, matrix and squares at the start, the loss after a step, and that of the chunk."""
    at_start, (matrix, loss) = objective.loss_and_gradient(), matrix_and_loss(objective)
    squares, chunk_loss = objective.squared_gradients(), objective.chunk_change_at(a_step(objective)).loss_after
    return at_start.loss, at_start.gradient, matrix, squares, loss, chunk_loss


def assert_pieces_equal_the_whole(model, data, micro_batch_size=4, rtol=1e-10):
    """And the whole has the loss that Keras computes."""

    def compute(objective):
        at_start = objective.loss_and_gradient()
        return at_start.loss, at_start.gradient, *matrix_and_loss(objective)

    whole = with_objective(model, data, compute)
    in_pieces = with_objective(model, data, compute, micro_batch_size=micro_batch_size)
    for one, other in zip(whole, in_pieces, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(whole[0], loss_and_gradient(model, data)[0], **EXACT)


def weights_after(model, step):
    start = 0
    for weight in model.trainable_weights:
        size = int(np.prod(weight.shape))
        weight.assign(weight + step[start : start + size].reshape(weight.shape))
        start += size


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("reduction", "weighted"),
    [
        pytest.param("sum_over_batch_size", False, marks=SLOW),
        pytest.param("sum_over_batch_size", True, marks=SLOW),
        pytest.param("sum", False, marks=SLOW),
        ("sum", True),
        pytest.param("mean_with_sample_weight", False, marks=SLOW),
        ("mean_with_sample_weight", True),
    ],
)
def test_pieces_of_7_and_8_equal_one_of_15(reduction, weighted):
    model = make_model(loss=keras.losses.MeanSquaredError(reduction=reduction), regularizer=keras.regularizers.L2(0.25))
    weight = np.linspace(0.1, 2, 15) if weighted else None
    data = model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)), weight)
    whole = with_objective(model, data, everything)
    in_pieces = with_objective(model, data, everything, micro_batch_size=8)
    for one, other in zip(whole, in_pieces, strict=True):
        np.testing.assert_allclose(one, other, **EXACT)
    loss, gradient = loss_and_gradient(model, data)
    np.testing.assert_allclose(whole[0], loss, **EXACT)
    np.testing.assert_allclose(whole[1], gradient, **EXACT)


@pytest.mark.parametrize(
    "reduction",
    ["sum_over_batch_size", *(pytest.param(r, marks=pytest.mark.slow) for r in ("sum", "mean_with_sample_weight"))],
)
def test_products_and_chunk_loss_are_those_of_the_chunk_alone(reduction):
    model = make_model(loss=keras.losses.MeanSquaredError(reduction=reduction))
    weight = np.linspace(0.1, 2, 15)
    data = model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)), weight)
    of_chunk = with_objective(model, data, everything, curvature_batch_size=5, micro_batch_size=2, update_number=1)
    # One trace for all places.
    of_place = tf.function(lambda start: with_objective(model, data.take(start + tf.range(5)), matrix_and_loss))
    alone = [of_place(tf.constant(start)) for start in (0, 5, 10)]
    scale = 3 if reduction == "sum" else 1  # a sum over 5 cases stands for one over 15
    matches = [np.allclose(scale * matrix, of_chunk[2], **EXACT) for matrix, _ in alone]
    assert sum(matches) == 1
    np.testing.assert_allclose(of_chunk[5], scale * alone[matches.index(True)][1], **EXACT)
    whole = with_objective(model, data, everything)
    for i in (0, 1, 3, 4):
        np.testing.assert_allclose(of_chunk[i], whole[i], **EXACT)


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_product_of_rows_is_that_of_each(micro_batch_size):
    model = make_model(regularizer=keras.regularizers.L2(0.25))
    data = model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)))

    def compute(objective):
        product, rows = (
            objective.product(GaussNewton(DoubleBackward())),
            tf.random.stateless_normal([3, 27], [0, 0], dtype=tf.float64),
        )
        return product(rows), tf.stack([product(row) for row in tf.unstack(rows)])

    found, expected = with_objective(model, data, compute, micro_batch_size=micro_batch_size)
    np.testing.assert_allclose(found, expected, **EXACT)


def test_loss_at_is_the_keras_loss_there_and_leaves_the_weights_bit_equal():
    model = make_model(regularizer=keras.regularizers.L2(0.25))
    data = model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)))
    before = model.get_weights()
    found = with_objective(model, data, lambda objective: objective.loss_at(a_step(objective)))
    assert all((one == other).all() for one, other in zip(before, model.get_weights(), strict=True))
    weights_after(model, np.sin(np.arange(27.0)))
    np.testing.assert_allclose(found, model.evaluate(data.x, data.y, batch_size=15, verbose=0), **EXACT)


def test_dropout_is_one_fixed_function_per_update_and_another_in_the_next():
    model = compiled(
        keras.Sequential([keras.Input((2,)), layers.Dense(8), layers.Dropout(0.5, seed=1), layers.Dense(1)])
    )
    data = model_data(model, inputs(), np.random.default_rng(3).normal(size=(15, 1)))
    seed_before = model.network.layers[1].seed_generator.state.numpy()

    def losses(objective):
        zero = tf.zeros([objective.num_weights], tf.float64)
        v = tf.ones_like(zero)
        product = objective.product(GaussNewton(DoubleBackward()))
        return (
            objective.loss_and_gradient().loss,
            objective.loss_at(zero),
            objective.loss_at(zero),
            product(v),
            product(v),
        )

    first, second = (with_objective(model, data, losses, micro_batch_size=8, update_number=n) for n in (0, 1))
    assert first[0] == first[1] == first[2]
    assert (first[3].numpy() == first[4].numpy()).all()
    assert first[0] != second[0]
    assert (model.network.layers[1].seed_generator.state.numpy() == seed_before).all()


def test_dropout_masks_are_the_optimizers_seed_and_differ_between_layers():
    def gradient(optimizer_seed, seeds):
        stack = [layers.Dropout(0.5, seed=seeds[0]), layers.Dropout(0.5, seed=seeds[1])]
        net = keras.Sequential([keras.Input((64,)), *stack, layers.Dense(1, use_bias=False)])
        optimizer = HessianFree(
            solver=ConjugateGradient(preconditioner=EmpiricalFisherDiagonal()), growing_batch=None, seed=optimizer_seed
        )
        model = compiled(net, optimizer=optimizer)
        data = model_data(model, np.ones((1, 64)), np.ones((1, 1)))
        net.set_weights([np.zeros((64, 1))])
        return with_objective(model, data, lambda o: o.loss_and_gradient().gradient).numpy()

    one, same, other = gradient(5, (1, 2)), gradient(5, (3, 4)), gradient(6, (1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    # A quarter is left by two masks, a half where both are one.
    assert 4 <= np.count_nonzero(one) <= 26


def test_pieces_have_dropout_masks_of_their_own():
    model = compiled(
        keras.Sequential([keras.Input((64,)), layers.Dropout(0.5, seed=1), layers.Dense(1, use_bias=False)])
    )
    data = model_data(model, np.ones((2, 64)), np.zeros((2, 1)))
    # With inputs 1 and target 0, the gradient is mask'(mask w); two equal masks would give two proportional gradients.
    gradient = with_objective(model, data, lambda o: o.loss_and_gradient().gradient, micro_batch_size=1).numpy()
    assert len(np.unique(gradient.round(9))) == 4


def test_batch_statistics_are_those_of_all_pieces_together():
    normalization = layers.BatchNormalization(momentum=0.75)
    model = compiled(keras.Sequential([keras.Input((2,)), normalization, layers.Dense(1)]))
    x = 100 + inputs()[:12]
    data = model_data(model, x, np.zeros((12, 1)))
    found = with_objective(model, data, lambda o: o.loss_and_gradient().states, micro_batch_size=8)
    np.testing.assert_allclose(found, [x.mean(0), x.var(0)], rtol=1e-10)
    assert (normalization.moving_mean.numpy() == 0).all() and normalization.momentum == 0.75


def test_batch_statistics_of_a_layer_called_twice_are_the_mean_of_both():
    x, normalization = keras.Input((2,)), layers.BatchNormalization()
    outputs = layers.Dense(1)(normalization(layers.Rescaling(3.0, 1.0)(normalization(x))))
    model = compiled(keras.Model(x, outputs))
    data = model_data(model, inputs(), np.zeros((15, 1)))
    found = with_objective(model, data, lambda o: o.loss_and_gradient().states)
    mean, variance = inputs().mean(0), inputs().var(0)
    np.testing.assert_allclose(found[0], (mean + 1) / 2, **EXACT)
    np.testing.assert_allclose(found[1], (variance + 9 * variance / (variance + 1e-3)) / 2, rtol=1e-10)


@pytest.mark.skipif(KERAS < (3, 14), reason="BatchNormalization has `renorm` from Keras 3.14 on")
def test_renormalization_keeps_the_moving_averages_that_training_normalizes_by():
    normalization = layers.BatchNormalization(renorm=True)
    model = compiled(keras.Sequential([keras.Input((2,)), normalization, layers.Dense(1)]))
    data = model_data(model, inputs(), np.zeros((15, 1)))
    found = with_objective(model, data, lambda o: o.next_states(o.loss_and_gradient().states, 0.0))
    names = [state.name for state in model._task(data)[1].states]
    assert set(names) == {"moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev"}
    for name in ("moving_mean", "renorm_mean"):
        np.testing.assert_allclose(found[names.index(name)], 0.01 * inputs().mean(0), **EXACT)


@pytest.mark.parametrize(("num_before", "share"), [(0, 1), pytest.param(10, 1, marks=SLOW), (15, 1), (60, 0.25)])
def test_batch_statistics_follow_the_weights_and_weigh_by_the_cases_behind_them(num_before, share):
    dense, normalization = layers.Dense(3, use_bias=False), layers.BatchNormalization()
    model = compiled(keras.Sequential([keras.Input((2,)), dense, normalization, layers.Dense(1)]))
    data = model_data(model, inputs(), np.zeros((15, 1)))
    kernel = dense.kernel.numpy()
    normalization.moving_mean.assign([0.3, -0.2, 0.1])
    normalization.moving_variance.assign([2.0, 0.5, 1.0])
    mean, variance = normalization.moving_mean.numpy(), normalization.moving_variance.numpy()
    # The first unit grows by half, the second one shrinks, the third stays.
    new = kernel * [1.5, 0.5, 1.0]

    def after_a_step(objective):
        states = objective.loss_and_gradient().states
        dense.kernel.value.assign(new)
        states = objective.next_states(states, tf.constant(num_before, tf.float64))
        dense.kernel.value.assign(kernel)
        return states

    found = with_objective(model, data, after_a_step, micro_batch_size=8)
    before, after = inputs() @ kernel, inputs() @ new
    moved = [mean + after.mean(0) - before.mean(0), variance + after.var(0) - before.var(0)]
    moved[1][1] = variance[1] * 0.25
    for value, old, fresh in zip(found, moved, (after.mean(0), after.var(0)), strict=True):
        np.testing.assert_allclose(value, share * fresh + (1 - share) * old, rtol=1e-10, atol=1e-12)


def test_weights_that_the_loss_does_not_touch_have_zero_rows():
    class Unused(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(2,), initializer="ones")

        def call(self, x):
            return x

    model = compiled(keras.Sequential([keras.Input((2,)), Unused(), layers.Dense(1)]))
    data = model_data(model, inputs(), np.zeros((15, 1)))
    _, gradient, matrix, squares, *_ = with_objective(model, data, everything)
    assert (gradient.numpy()[:2] == 0).all() and (matrix.numpy()[:2] == 0).all() and (squares.numpy()[:2] == 0).all()
    assert (gradient.numpy()[2:] != 0).all()


def test_a_scalar_loss_is_taken_in_one_piece_and_said():
    def scalar(y, y_pred):
        return tf.reduce_max((y - y_pred) ** 2) + tf.reduce_mean((y - y_pred) ** 2)

    model = make_model(loss=scalar)
    with pytest.warns(UserWarning, match="cannot be put together from parts of it"):
        data = model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)))
        assert model._task(data)[1].combinations == ["unknown"]


def test_a_loss_that_compares_cases_is_that_of_all_cases_whatever_the_pieces():
    loss = keras.losses.Circle(gamma=2.0)
    model = make_model("sigmoid", loss)
    y = np.arange(15) % 3
    with pytest.warns(UserWarning, match="compares cases, as `Circle`"):
        data = model_data(model, inputs(), y)
        sizes = {"curvature_batch_size": 6, "micro_batch_size": 4}
        found = with_objective(model, data, lambda o: o.loss_and_gradient().loss, **sizes)
    assert float(found) == pytest.approx(float(loss(y, model(inputs()))), rel=1e-12)


def test_multi_output_losses_add_with_their_weights():
    x = keras.Input((2,))
    hidden = layers.Dense(3, "tanh")(x)
    network = keras.Model(
        x, {"a": layers.Dense(1, name="a")(hidden), "b": layers.Dense(2, "softmax", name="b")(hidden)}
    )
    losses = {"a": "mse", "b": "categorical_crossentropy"}
    model = compiled(network, losses, loss_weights={"a": 0.5, "b": 2.0})
    y = {"a": np.random.default_rng(3).normal(size=(15, 1)), "b": np.eye(2)[np.arange(15) % 2]}
    data = model_data(model, inputs(), y)
    loss, gradient = loss_and_gradient(model, data)
    found = with_objective(model, data, lambda o: o.loss_and_gradient(), micro_batch_size=8)
    np.testing.assert_allclose(found.loss, loss, **EXACT)
    np.testing.assert_allclose(found.gradient, gradient, rtol=1e-10, atol=1e-12)
    assert model._task(data)[1].cuts == ("output", "logits")


def test_float32_losses_tell_a_relative_change_of_1e_6():
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    dense = layers.Dense(3, use_bias=False)
    model = compiled(keras.Sequential([keras.Input((2,)), dense]))
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(20000, 2)), rng.normal(size=(20000, 3))
    data = model_data(model, x.astype("float32"), y.astype("float32"))
    kernel = dense.kernel.numpy().astype("float64")
    step = np.float32(-1e-6) * kernel.astype("float32").reshape(-1)
    found = with_objective(model, data, lambda o: o.loss_at(tf.constant(step)) - o.loss_at(tf.zeros_like(step)))
    stepped = (kernel.astype("float32").reshape(-1) + step).astype("float64").reshape(kernel.shape)
    x, y = data.x.numpy().astype("float64"), data.y.numpy().astype("float64")
    exact = ((x @ stepped - y) ** 2).mean() - ((x @ kernel - y) ** 2).mean()
    # Rounding of single cases, 6e-8 each and at random, averages to 1e-9; a float32 sum would be off by as much as the change.
    assert abs(float(found) / exact - 1) < 0.005


# Masks.


def masked_sequences():
    """A network with a mask and one output a step, and 15 sequences of 4 steps of which some are padding."""
    network = keras.Sequential([keras.Input((4, 2)), layers.Masking(), layers.Dense(3, "tanh"), layers.Dense(2)])
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(15, 4, 2)), rng.normal(size=(15, 4, 2))
    for i, length in enumerate(rng.integers(0, 5, size=15)):
        x[i, length:] = 0
    return network, x, y


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.slow
def test_pieces_of_masked_sequences_equal_the_whole(reduction, weighted):
    network, x, y = masked_sequences()
    model = compiled(network, keras.losses.MeanSquaredError(reduction=reduction))
    weight = np.linspace(0.1, 2, 15)[:, None] * np.linspace(1, 2, 4) if weighted else None
    data = model_data(model, x, y, weight)
    whole = with_objective(model, data, everything)
    in_pieces = with_objective(model, data, everything, micro_batch_size=4)
    for one, other in zip(whole, in_pieces, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)
    loss, gradient = loss_and_gradient(model, data)
    np.testing.assert_allclose(whole[0], loss, **EXACT)
    np.testing.assert_allclose(whole[1], gradient, rtol=1e-10, atol=1e-12)


def test_a_mask_is_as_good_as_leaving_the_steps_out():
    network, x, y = masked_sequences()
    model = compiled(network)
    masked = with_objective(model, model_data(model, x, y), everything)
    # The same steps as weights of a network that knows no mask: Keras means over all steps then, of which 60 / valid count.
    plain = compiled(keras.Sequential([keras.Input((4, 2)), *network.layers[1:]]))
    valid = (x != 0).any(-1).astype("float64")
    weighted = with_objective(plain, model_data(plain, x, y, valid * valid.size / valid.sum()), everything)
    for one, other in zip(masked, weighted, strict=True):
        np.testing.assert_allclose(one, other, rtol=max(1e-10, MASK_ROUNDING), atol=max(1e-12, MASK_ROUNDING))


def test_ignored_classes_are_a_mask_too():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1)
    model = compiled(keras.Sequential([keras.Input((2,)), layers.Dense(3)]), loss)
    data = model_data(model, inputs(), np.arange(15) % 3)
    assert_pieces_equal_the_whole(model, data, rtol=max(1e-10, 10 * MASK_ROUNDING))


@pytest.mark.slow
def test_each_output_has_a_denominator_of_its_own():
    x = keras.Input((4, 2))
    hidden = layers.Dense(3, "tanh")(layers.Masking()(x))
    a, b = layers.Dense(2, name="a")(hidden), layers.Dense(1, name="b")(layers.GlobalAveragePooling1D()(hidden))
    _, sequences, y = masked_sequences()
    losses = {"a": "mse", "b": keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")}
    model = compiled(keras.Model(x, {"a": a, "b": b}), losses, loss_weights={"a": 0.5, "b": 2.0})
    weights = {"a": np.ones((15, 4)), "b": np.linspace(0.1, 2, 15)}
    data = model_data(model, sequences, {"a": y, "b": y[:, 0, :1]}, weights)
    assert model._task(data)[1].combinations == ["data", "data"]
    assert_pieces_equal_the_whole(model, data)


def test_targets_of_any_rank():
    # The loss of an image has one value a pixel; a case's weight spreads over them.
    model = compiled(keras.Sequential([keras.Input((3, 2, 1)), layers.Conv2D(2, 2, padding="same", activation="tanh")]))
    rng = np.random.default_rng(4)
    data = model_data(model, rng.normal(size=(5, 3, 2, 1)), rng.normal(size=(5, 3, 2, 2)))
    assert_pieces_equal_the_whole(model, data, micro_batch_size=2)


# Constraints.


def test_candidates_are_projected_and_the_start_where_it_violates():
    dense = layers.Dense(1, use_bias=False, kernel_constraint=keras.constraints.NonNeg())
    model = compiled(keras.Sequential([keras.Input((2,)), dense]))
    data = model_data(model, inputs(), np.zeros((15, 1)))
    dense.kernel.assign([[1.0], [-2.0]])

    def losses(objective):
        return objective.start()[0], objective.candidate(tf.constant([-3.0, 5.0], tf.float64))[0]

    start, candidate = with_objective(model, data, losses)
    np.testing.assert_array_equal(start, [[1.0], [0.0]])
    np.testing.assert_array_equal(candidate, [[0.0], [5.0]])
    found = with_objective(model, data, lambda o: o.loss_at(tf.constant([-3.0, 5.0], tf.float64)))
    np.testing.assert_allclose(found, np.mean((5 * inputs()[:, 1]) ** 2), **EXACT)


def test_a_projection_by_rounding_alone_leaves_the_start_bit_equal():
    dense = layers.Dense(1, kernel_constraint=keras.constraints.MaxNorm(2.0))
    model = compiled(keras.Sequential([keras.Input((2,)), dense]))
    data = model_data(model, inputs(), np.zeros((15, 1)))
    dense.kernel.assign([[0.3], [-0.4]])
    start = with_objective(model, data, lambda objective: objective.start()[0])
    np.testing.assert_array_equal(start, [[0.3], [-0.4]])
