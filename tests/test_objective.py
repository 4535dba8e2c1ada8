"""What the objective promises: one fixed function per update, whatever the micro-batches."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import (
    KERAS,
    MASK_ROUNDING,
    compiled,
    dense_matrix,
    hessian_free,
    inputs,
    loss_and_gradient,
    loss_derivatives,
    make_model,
    model_data,
    moved,
    objective_function,
    sequential,
    set_up,
    with_objective,
)
from training import assert_equal, assert_same, normal

from keras_hf import DoubleBackward, EmpiricalFisherDiagonal, GaussNewton

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"rtol": 1e-12, "atol": 1e-14}
SLOW = pytest.mark.slow


def problem(*stack, x=None, y=None, loss="mse", **arguments):
    """A compiled model of some layers and its data; the targets are zero where nothing is said."""
    x = inputs() if x is None else x
    model = compiled(sequential(*stack, shape=x.shape[1:]), loss, **arguments)
    return model, model_data(model, x, np.zeros((len(x), 1)) if y is None else y)


def product_of(objective):
    return objective.product(GaussNewton(DoubleBackward()))


def matrix_of(objective):
    return dense_matrix(product_of(objective), objective.num_weights)


def a_step(objective):
    return tf.sin(tf.range(objective.num_weights, dtype=tf.float64))


def matrix_and_loss(objective):
    """The matrix at the start, and the loss after a step."""
    return matrix_of(objective), objective.loss_at(a_step(objective))


def of_the_batch(objective):
    """Loss, gradient and squares at the start, and the loss after a step."""
    at_start = objective.loss_and_gradient()
    return at_start.loss, at_start.gradient, objective.squared_gradients(), objective.loss_at(a_step(objective))


def of_the_chunk(objective):
    """The matrix at the start by products of vectors and by one of all rows of an identity, and the loss after a step."""
    of_rows = tf.transpose(product_of(objective)(tf.eye(objective.num_weights, dtype=tf.float64)))
    return matrix_of(objective), of_rows, objective.chunk_change_at(a_step(objective)).loss_after


def masked_sequences():
    """15 sequences of 4 steps, of which some are padding."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(15, 4, 2))
    for i, length in enumerate(rng.integers(0, 5, size=15)):
        x[i, length:] = 0
    return x


def problem_of_all_reductions(weighted, masked):
    """A regularized network with a loss of every reduction, under a mask also one behind it, and its data.

    Returns the model, one for a third of the cases alone, for which a sum of losses stands for one three times as large, and the data.
    """
    x = keras.Input((4, 2) if masked else (2,))
    first = layers.Dense(3, "tanh", kernel_regularizer=keras.regularizers.L2(0.25))
    hidden = first(layers.Masking()(x) if masked else x)
    outputs = {"a": layers.Dense(2, "softmax")(hidden), "b": layers.Dense(2)(hidden), "c": layers.Dense(1)(hidden)}
    losses = {
        "a": "categorical_crossentropy",
        "b": keras.losses.MeanSquaredError(reduction="sum"),
        "c": keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
    }
    shape = (15, 4) if masked else (15,)
    y = {"a": np.eye(2)[np.arange(np.prod(shape)).reshape(shape) % 2], "b": normal(*shape, 2), "c": normal(*shape, 1)}
    weights = dict.fromkeys(outputs, np.linspace(0.1, 2, np.prod(shape)).reshape(shape))
    if masked:
        outputs["d"] = layers.Dense(1)(layers.GlobalAveragePooling1D()(hidden))
        losses["d"], y["d"], weights["d"] = losses["c"], normal(15, 1), np.linspace(0.1, 2, 15)
    network = keras.Model(x, outputs)
    scales = {name: {"a": 2.0, "b": 0.125, "c": 0.5, "d": 0.75}[name] for name in outputs}
    model = compiled(network, losses, loss_weights=scales)
    alone = compiled(network, losses, loss_weights=scales | {"b": 3 * scales["b"]})
    cases = masked_sequences() if masked else inputs(), y, weights if weighted else None
    model_data(alone, *cases)
    return model, alone, model_data(model, *cases)


# Weights and masks of all three reductions.


@pytest.mark.parametrize(
    ("weighted", "masked"),
    [(True, False), pytest.param(False, True, marks=SLOW), pytest.param(True, True, marks=SLOW)],
)
def test_micro_batches_make_up_the_whole_of_keras_and_products_are_those_of_their_chunk_alone(weighted, masked):
    model, alone, data = problem_of_all_reductions(weighted, masked)
    before = model.get_weights()
    found, of_chunk = with_objective(
        model,
        data,
        lambda objective: (of_the_batch(objective), of_the_chunk(objective)),
        curvature_batch_size=5,
        micro_batch_size=2,
        update_number=1,
    )
    structure = model.setup_for(data).structure
    assert structure.cuts == ("logits", "output", "output", "output")[: 3 + masked]
    behind_the_mask = ["data" if weighted else "cases"]
    expected = ["data", "sum", "data", *behind_the_mask] if masked else ["cases", "sum", "data"]
    assert structure.combinations == expected
    masks = {"rtol": max(1e-10, 10 * MASK_ROUNDING), "atol": max(1e-12, MASK_ROUNDING)}
    exact = masks if masked else EXACT
    assert_equal(model.get_weights(), before)
    assert_same([found[2]], [with_objective(model, data, lambda o: o.squared_gradients())], **exact)
    loss, gradient = loss_and_gradient(model, data)
    np.testing.assert_allclose(found[0], loss, **EXACT)
    np.testing.assert_allclose(found[1], gradient, **exact)
    of_place = objective_function(alone, matrix_and_loss)
    places = [of_place(data.take(start + tf.range(5))) for start in (0, 5, 10)]
    ((matrix, loss),) = [place for place in places if np.allclose(place[0], of_chunk[0], **exact)]
    assert_same(of_chunk, (matrix, matrix, loss), **exact)
    model.set_weights(moved(before, np.sin(np.arange(len(gradient)))))
    np.testing.assert_allclose(found[3], loss_and_gradient(model, data)[0], **EXACT)


def assert_micro_batches_give_what_keras_computes(model, data, micro_batch_size, rtol=1e-10):
    """That loss, gradient and matrix in micro-batches are those of the Keras loss of a linear network, whose Hessian is its Gauss-Newton matrix."""
    compute = lambda o: (*o.loss_and_gradient()[:2], matrix_of(o))  # noqa: E731
    found = with_objective(model, data, compute, micro_batch_size=micro_batch_size)
    assert_same(found, loss_derivatives(model, data), rtol=rtol, atol=1e-12)


def test_ignored_classes_are_a_mask_too():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1)
    of_classes = problem(layers.Dense(3), y=np.arange(15) % 3, loss=loss)
    assert_micro_batches_give_what_keras_computes(*of_classes, micro_batch_size=4, rtol=max(1e-10, 10 * MASK_ROUNDING))


def test_targets_of_any_rank():
    # The loss of an image has one value a pixel; a case's weight spreads over them.
    images, y = normal(5, 3, 2, 1), normal(5, 3, 2, 2, seed=1)
    of_images = problem(layers.Conv2D(2, 2, padding="same"), x=images, y=y)
    assert_micro_batches_give_what_keras_computes(*of_images, micro_batch_size=2)


def test_a_mask_is_as_good_as_leaving_the_steps_out():
    def compute(objective):
        at_start = objective.loss_and_gradient()
        return at_start.loss, at_start.gradient, objective.squared_gradients(), matrix_of(objective)

    x, y, stack = masked_sequences(), normal(15, 4, 2), [layers.Dense(3, "tanh"), layers.Dense(2)]
    masked = with_objective(*problem(layers.Masking(), *stack, x=x, y=y), compute)
    # The same steps as weights of a network that knows no mask: Keras means over all steps then, of which 60 / valid count.
    plain, data = problem(*stack, x=x, y=y)
    valid = (x != 0).any(-1).astype("float64")
    weights = tf.constant(valid * valid.size / valid.sum())
    weighted = with_objective(plain, data._replace(sample_weight=weights), compute)
    assert_same(masked, weighted, rtol=max(1e-10, MASK_ROUNDING), atol=max(1e-12, MASK_ROUNDING))


# Random numbers and batch statistics.


def test_dropout_is_one_fixed_function_per_update_and_another_in_the_next():
    stack = [layers.Dense(8), layers.Dropout(0.5, seed=1), layers.Dense(1)]
    model, data = problem(*stack, y=normal(15, 1))
    seed_before = stack[1].seed_generator.state.numpy()

    def losses(objective):
        zero, product = tf.zeros([objective.num_weights], tf.float64), product_of(objective)
        of_losses = objective.loss_and_gradient().loss, objective.loss_at(zero), objective.loss_at(zero)
        return of_losses, product(tf.ones_like(zero)), product(tf.ones_like(zero))

    set_up(model, micro_batch_size=8)
    compute = objective_function(model, losses)
    for first, *others in (found := [compute(data, update_number=number) for number in (0, 1)]):
        assert first[0] == first[1] == first[2]
        assert_equal(*([other] for other in others))
    assert found[0][0][0] != found[1][0][0]
    assert (stack[1].seed_generator.state.numpy() == seed_before).all()


def test_dropout_masks_are_the_optimizers_seed_and_differ_between_layers():
    def gradient(optimizer_seed, seeds):
        stack = [layers.Dropout(0.5, seed=seed) for seed in seeds]
        stack.append(layers.Dense(1, use_bias=False, kernel_initializer="zeros"))
        optimizer = hessian_free(preconditioner=EmpiricalFisherDiagonal(), growing_batch=None, seed=optimizer_seed)
        model, data = problem(*stack, x=np.ones((1, 64)), y=np.ones((1, 1)), optimizer=optimizer)
        return with_objective(model, data, lambda o: o.loss_and_gradient().gradient).numpy()

    one, same, other = gradient(5, (1, 2)), gradient(5, (3, 4)), gradient(6, (1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    # A quarter is left by two masks, a half where both are one.
    assert 4 <= np.count_nonzero(one) <= 26


def test_micro_batches_have_dropout_masks_of_their_own():
    model, data = problem(layers.Dropout(0.5, seed=1), layers.Dense(1, use_bias=False), x=np.ones((2, 64)))
    # With inputs 1 and target 0, the gradient is mask'(mask w); two equal masks would give two proportional gradients.
    gradient = with_objective(model, data, lambda o: o.loss_and_gradient().gradient, micro_batch_size=1).numpy()
    assert len(np.unique(gradient.round(9))) == 4


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
    model, data = problem(normalization, layers.Dense(1))
    found = with_objective(model, data, lambda o: o.next_states(o.loss_and_gradient().states, 0.0))
    names = [state.name for state in model.setup_for(data).structure.states]
    assert set(names) == {"moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev"}
    for name in ("moving_mean", "renorm_mean"):
        np.testing.assert_allclose(found[names.index(name)], 0.01 * inputs().mean(0), **EXACT)


def test_batch_statistics_are_those_of_all_micro_batches_follow_the_weights_and_weigh_by_the_cases_behind_them():
    dense, normalization = layers.Dense(3, use_bias=False), layers.BatchNormalization(momentum=0.75)
    model, data = problem(dense, normalization, layers.Dense(1), x=(x := 100 + inputs()))
    kernel = dense.kernel.numpy()
    normalization.moving_mean.assign([0.3, -0.2, 0.1])
    normalization.moving_variance.assign([2.0, 0.5, 1.0])
    mean, variance = normalization.moving_mean.numpy(), normalization.moving_variance.numpy()
    # The first unit grows by half, the second one shrinks, the third stays.
    new = kernel * [1.5, 0.5, 1.0]
    # The number of cases behind the statistics of before -> the share of the new ones.
    shares = {0: 1, 10: 1, 15: 1, 60: 0.25}

    def after_a_step(objective):
        states = objective.loss_and_gradient().states
        dense.kernel.value.assign(new)
        found = [objective.next_states(states, tf.constant(number, tf.float64)) for number in shares]
        dense.kernel.value.assign(kernel)
        return states, found

    at_start, found = with_objective(model, data, after_a_step, micro_batch_size=8)
    before, after = x @ kernel, x @ new
    np.testing.assert_allclose(at_start, [before.mean(0), before.var(0)], rtol=1e-10)
    assert_equal([normalization.moving_mean, normalization.moving_variance], [mean, variance])
    assert normalization.momentum == 0.75
    moved_on = [mean + after.mean(0) - before.mean(0), variance + after.var(0) - before.var(0)]
    moved_on[1][1] = variance[1] * 0.25
    for states, share in zip(found, shares.values(), strict=True):
        pairs = zip((after.mean(0), after.var(0)), moved_on, strict=True)
        assert_same(states, [share * fresh + (1 - share) * old for fresh, old in pairs], rtol=1e-10, atol=1e-12)


# Losses.


def test_weights_that_the_loss_does_not_touch_have_zero_rows():
    class Unused(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(2,), initializer="ones")

        def call(self, x):
            return x

    model, data = problem(Unused(), layers.Dense(1))
    rows = with_objective(model, data, lambda o: (o.loss_and_gradient().gradient, o.squared_gradients(), matrix_of(o)))
    for values in rows:
        assert (values[:2].numpy() == 0).all() and (values[2:].numpy() != 0).any(-1).all()


def test_a_scalar_loss_is_taken_in_one_micro_batch_and_said():
    def scalar(y, y_pred):
        return tf.reduce_max((y - y_pred) ** 2) + tf.reduce_mean((y - y_pred) ** 2)

    model = make_model(loss=scalar)
    with pytest.warns(UserWarning, match="cannot be put together from parts of it"):
        data = model_data(model, inputs(), normal(15, 3))
        assert model.setup_for(data).structure.combinations == ["unknown"]


def test_a_loss_that_compares_cases_is_that_of_all_cases_whatever_the_micro_batches():
    loss = keras.losses.Circle(gamma=2.0)
    model = make_model("sigmoid", loss)
    y = np.arange(15) % 3
    with pytest.warns(UserWarning, match="compares cases, as `Circle`"):
        data = model_data(model, inputs(), y)
        sizes = {"curvature_batch_size": 6, "micro_batch_size": 4}
        found = with_objective(model, data, lambda o: o.loss_and_gradient().loss, **sizes)
    assert float(found) == pytest.approx(float(loss(y, model(inputs()))), rel=1e-12)


def test_float32_losses_tell_a_relative_change_of_1e_6():
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    dense = layers.Dense(3, use_bias=False)
    x, y = normal(20000, 2, dtype="float32"), normal(20000, 3, seed=1, dtype="float32")
    model, data = problem(dense, x=x, y=y)
    kernel = dense.kernel.numpy()
    step = np.float32(-1e-6) * kernel.ravel()
    found = with_objective(model, data, lambda o: o.loss_at(tf.constant(step)) - o.loss_at(tf.zeros_like(step)))
    x, y, start, end = (array.astype("float64") for array in (x, y, kernel, kernel + step.reshape(kernel.shape)))
    exact = ((x @ end - y) ** 2).mean() - ((x @ start - y) ** 2).mean()
    # Rounding of single cases, 6e-8 each and at random, averages to 1e-9; a float32 sum would be off by as much as the change.
    assert abs(float(found) / exact - 1) < 0.005


# Constraints.


def test_candidates_are_projected_and_the_start_where_it_violates():
    dense = layers.Dense(1, use_bias=False, kernel_constraint=keras.constraints.NonNeg())
    model, data = problem(dense)
    dense.kernel.assign([[1.0], [-2.0]])

    def compute(objective):
        step = tf.constant([-3.0, 5.0], tf.float64)
        return objective.start()[0], objective.candidate(step)[0], objective.loss_at(step)

    start, candidate, loss = with_objective(model, data, compute)
    np.testing.assert_array_equal(start, [[1.0], [0.0]])
    np.testing.assert_array_equal(candidate, [[0.0], [5.0]])
    np.testing.assert_allclose(loss, np.mean((5 * inputs()[:, 1]) ** 2), **EXACT)


def test_a_projection_by_rounding_alone_leaves_the_start_bit_equal():
    dense = layers.Dense(1, kernel_constraint=keras.constraints.MaxNorm(2.0))
    model, data = problem(dense)
    dense.kernel.assign([[0.3], [-0.4]])
    start = with_objective(model, data, lambda objective: objective.start()[0])
    np.testing.assert_array_equal(start, [[0.3], [-0.4]])
