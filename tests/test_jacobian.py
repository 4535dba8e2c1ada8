"""What the weighted Jacobian promises: the Gauss-Newton matrix and the gradient of every loss, whole or in blocks, and second derivatives."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from oracles import first_derivative, loss_at, loss_hessian, prepare
from problems import (
    compiled,
    dense_matrix,
    inputs,
    jacobian,
    loss_and_gradient,
    make_model,
    model_data,
    moved,
    objective_function,
    second_derivative,
    sequential,
    values_of,
    with_objective,
)
from support import LOSSES, ROWS
from training import assert_equal, assert_same

from examples.precision import precision
from keras_hf import DoubleBackward, GaussNewton
from keras_hf.common import loops
from keras_hf.differentiation import jacobian as room
from keras_hf.problem import local_objective

SLOW = pytest.mark.slow
CLASSES = np.eye(3)[np.arange(15) % 3]
# Losses in which the cases of a batch are not apart, and one without a second derivative.
TOGETHER = {"Dice", "Tversky", "Loss, a function, scalar", "Circle", "Circle, a class with one case", "CTC"}
# Losses that differ from another one in their targets, their scale or the function of an entry: `test_support.py` has the products of all, whose
# second derivatives and whose choice of diagonal ones are those of rows.
ALIKE = {
    *(row.name for row in LOSSES if "label_smoothing" in row.name or row.name.startswith("MeanSquaredError")),
    *("BinaryFocalCrossentropy, from other outputs", "SparseCategoricalCrossentropy, from logits", "Hinge", "LogCosh"),
    *("MeanSquaredLogarithmicError", "MeanAbsolutePercentageError", "Loss, subclassed", "Loss, a function, (N,)"),
}
# One of each kind: a diagonal second derivative and one between outputs, through logits or not, weighted, masked, indefinite, without curvature.
QUICK = {
    *("BinaryCrossentropy, from logits", "CategoricalCrossentropy, from softmax"),
    *("BinaryFocalCrossentropy, from sigmoid", "MeanSquaredError, mean_with_sample_weight, weighted"),
    *("MeanSquaredError, sum_over_batch_size, masked", "MeanAbsoluteError", "Poisson", "CosineSimilarity"),
    "Loss, a function, (N, T)",
}
# Losses of which a case may have a slope where it has no curvature, or curvature of the other sign.
WITH_REST = {
    *("CategoricalCrossentropy, from other outputs", "BinaryFocalCrossentropy, from sigmoid", "Dice, axis", "Huber"),
    *("CategoricalFocalCrossentropy, from softmax", "SparseCategoricalCrossentropy, ignore_class, from softmax"),
    *("Poisson", "CosineSimilarity", "MeanAbsoluteError", "CategoricalHinge"),
}
NAMES = {row.name for row in LOSSES} - TOGETHER - ALIKE | QUICK | {"MeanSquaredError, sum, weighted"}
pytestmark = pytest.mark.filterwarnings("ignore:.*(no curvature|no second derivative)")


def numbers(model, data, function):
    """What a function of an objective returns, as arrays."""
    return tf.nest.map_structure(lambda x: x.numpy(), with_objective(model, data, function))


def assert_close(found, expected, error, size=None):
    """That arrays differ by no more than this share of the largest entry."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=error * np.abs(expected if size is None else size).max())


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [SLOW]) for n in sorted(NAMES)])
def test_rows_give_gauss_newton_matrix_and_gradient_of_every_kind_of_loss(name):
    row = ROWS[name]
    with precision(row.floatx):
        model, data = prepare(row)
        gram, pulled = numbers(model, data, lambda o: (o.rows.gram(), o.rows.pull(o.rows.residuals)))
        j, hessian = first_derivative(row, model, data), loss_hessian(row, model, data)
        loss, cut = loss_at(row, model, data)
        with tf.GradientTape() as tape:
            tape.watch(cut)
            value = loss(cut)
        slope = tf.reshape(tape.gradient(value, cut), [-1]).numpy()
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    positive = vectors[:, values > 1e-12 * np.abs(values).max()]
    # Of a loss that is not convex, its convex part.
    assert_close(gram, expected := j.T @ positive @ (positive.T @ hessian @ positive) @ positive.T @ j, 1e-12)
    gradient = j.T @ slope
    assert_close(pulled, j.T @ positive @ (positive.T @ slope), 1e-12, size=gradient)
    assert (np.abs(pulled - gradient).max() > 0.05 * np.abs(gradient).max()) == (name in WITH_REST)
    if name not in WITH_REST:
        assert expected.any()
        assert_close(pulled, gradient, 1e-12)


def two_outputs():
    """A network with two outputs, losses of their own and a weight of each."""
    x = keras.Input((2,))
    hidden = layers.Dense(3, "tanh")(x)
    network = keras.Model(x, {"a": layers.Dense(2)(hidden), "b": layers.Dense(3, "softmax")(hidden)})
    losses = {"a": "mse", "b": "categorical_crossentropy"}
    model = compiled(network, losses, loss_weights={"a": 0.3, "b": 2.0})
    rng = np.random.default_rng(0)
    y = {"a": rng.normal(size=(15, 2)), "b": np.eye(3)[rng.integers(0, 3, 15)]}
    return model, model_data(model, inputs(), y, rng.uniform(0.5, 2, 15))


def regularized():
    """A classifier with a regularizer of its first kernel and a constraint that holds."""
    kernel = layers.Dense(4, "tanh", kernel_regularizer=keras.regularizers.L2(0.125))
    bounded = layers.Dense(3, kernel_constraint=keras.constraints.MaxNorm(0.5))
    model = compiled(sequential(kernel, bounded), keras.losses.CategoricalCrossentropy(from_logits=True))
    bounded.kernel.assign(0.4 * bounded.kernel / tf.norm(bounded.kernel, axis=0))
    return model, model_data(model, inputs(), CLASSES)


class OwnCell(layers.LSTMCell):
    """A cell that is not Keras' own, so that its derivatives are TensorFlow's."""


def recurrent(*stack):
    """A recurrent network on sequences of different lengths, with two outputs."""
    model = compiled(sequential(*stack, layers.Dense(2), shape=(3, 2)))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3, 2))
    x[1, 2] = 0
    return model, model_data(model, x, rng.normal(size=(5, 2)))


def losses_of_candidates(objective):
    """The losses at several weights, together and one by one."""
    steps = tf.constant(np.random.default_rng(0).normal(size=(3, objective.num_weights)))
    return objective.losses_at(steps), tf.map_fn(objective.loss_at, steps)


@pytest.mark.parametrize("problem", [two_outputs, regularized])
def test_rows_and_losses_of_several_candidates_agree_with_products_forward_derivatives_and_losses_of_each(
    problem, float64
):
    model, data = problem()
    before = model.get_weights()

    def compute(o):
        matrix, v = dense_matrix(o.product(GaussNewton(DoubleBackward())), o.num_weights), tf.ones([o.num_weights])
        error = o.rows.tangent_error(tf.cast(v, o.dtype))
        added, gradient = o.regularization_matrix(), o.loss_and_gradient().gradient
        gram = o.rows.gram() if added is None else o.rows.gram() + added
        return matrix, gram, gradient, gradient - o.rows.pull(o.rows.residuals), error, losses_of_candidates(o)

    matrix, gram, gradient, rest, tangent_error, (losses, one_by_one) = numbers(model, data, compute)
    assert_close(gram, matrix, 1e-13)
    assert gradient.any() and tangent_error < 1e-13
    # What rows leave over of the gradient is that of the regularizer.
    expected = np.zeros(len(rest))
    if problem is regularized:
        kernel = before[0].ravel()
        expected[: len(kernel)] = 0.25 * kernel
    assert_close(rest, expected, 1e-13, size=gradient)
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, one_by_one, rtol=1e-13)
    assert_equal(model.get_weights(), before)


@pytest.mark.parametrize(
    "stack, is_vectorized",
    [
        (lambda: [layers.SimpleRNN(2)], True),
        pytest.param(lambda: [layers.Masking(), layers.LSTM(2)], True, marks=SLOW),
        pytest.param(lambda: [layers.SimpleRNN(2, return_sequences=True), layers.GRU(2)], True, marks=SLOW),
        # Loops of TensorFlow: one case after the other.
        pytest.param(lambda: [layers.RNN(OwnCell(2))], False, marks=SLOW),
    ],
)
def test_rows_of_recurrent_networks_and_their_losses_are_right(stack, is_vectorized, float64, monkeypatch):
    model, data = recurrent(*stack())
    in_sequence, map_rows = [], loops.map_rows
    monkeypatch.setattr(loops, "map_rows", lambda *arguments: in_sequence.append(1) or map_rows(*arguments))

    def compute(o):
        return o.rows.gram(), o.rows.pull(o.rows.residuals), losses_of_candidates(o)

    gram, pulled, (losses, one_by_one) = numbers(model, data, compute)
    assert bool(in_sequence) != is_vectorized
    j = jacobian(lambda: model(data.x), values_of(model))
    assert_close(gram, 2 / 10 * np.einsum("iko,ikp->op", j, j), 1e-13)
    assert_close(pulled, loss_and_gradient(model, data)[1], 1e-13)
    np.testing.assert_allclose(losses, one_by_one, rtol=1e-13)


def test_rows_of_a_network_in_float32_are_its_own_in_float64():
    model = make_model()
    data = model_data(model, inputs().astype("float32"), CLASSES.astype("float32"))

    def compute(o):
        product, ones = o.product(GaussNewton(DoubleBackward())), tf.ones([o.num_weights])
        rows, matrix = o.rows, dense_matrix(product, o.num_weights, o.dtype)
        return rows.gram(), matrix, rows.plus_push(rows.residuals, tf.cast(ones, tf.float64)), rows.tangent_error(ones)

    gram, matrix, push, tangent_error = numbers(model, data, compute)
    assert gram.dtype == push.dtype == np.float64
    assert_close(gram, matrix, 1e-5)
    assert tangent_error < 1e-5


def everything(objective):
    """All that rows give, on vectors that are neither zero nor special; and how many cases a block has, and whether the Jacobian is kept."""
    rows, v = objective.rows, tf.sin(tf.range(27, dtype=tf.float64))
    second = rows.second_derivative(v)
    found = {
        "gram": rows.gram(),
        "residuals": rows.residuals,
        "pull": rows.pull(rows.plus_push(rows.residuals, v)),
        "second": second,
        "norm of second": rows.norm(second),
        "pull of second": rows.pull(second),
        "losses": objective.losses_at(tf.stack([0 * v, v, -3 * v])),
    }
    # Shapes are known: what is solved later asks for them.
    assert rows.jacobian is None or rows.jacobian.shape == (45, 27)
    kept = tf.zeros([0, 27], tf.float64) if rows.jacobian is None else rows.jacobian
    return found, kept, tf.constant(rows._parts._block), tf.constant(int(rows._parts._micro_batch.floats_per_case))


@pytest.fixture(scope="module")
def classifier():
    """A classifier, its cases, and everything in one micro-batch: of these cases, and where one is not finite."""
    with precision("float64"):
        model = make_model("softmax", "categorical_crossentropy")
        data = model_data(model, inputs(), CLASSES)
        spoiled = tf.where(tf.range(15)[:, None] == 4, tf.constant(np.nan, tf.float64), data.x)
        compute = objective_function(model, everything)
        whole, of_spoiled = compute(data), compute(data._replace(x=spoiled))
    assert len(whole[1]) == 45 and whole[2] > 15
    return model, data, whole, of_spoiled


def test_blocks_of_one_case_change_nothing(classifier, float64, monkeypatch):
    model, data, (expected, rows, _, num_floats), _ = classifier
    monkeypatch.setattr(room, "_BLOCK_FLOATS", 3 * max(27, int(num_floats)))
    found, same, block, _ = numbers(model, data, everything)
    assert block == 1
    assert_same(found, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(same, rows, rtol=1e-12, atol=1e-15)


def test_blocks_of_cases_of_unknown_number_a_jacobian_that_is_not_kept_and_no_xla_change_nothing(
    classifier, float64, monkeypatch
):
    model, data, (expected, _, _, num_floats), _ = classifier
    monkeypatch.setattr(room, "_BLOCK_FLOATS", 4 * 3 * max(27, int(num_floats)))
    monkeypatch.setattr(local_objective, "compiles_rows", lambda structure: False)
    unknown = [tf.TensorSpec([None, leaf.shape[1]], leaf.dtype) for leaf in data[:2]]
    compute = tf.function(
        lambda x, y: with_objective(model, data._replace(x=x, y=y), everything), input_signature=unknown
    )
    found, kept, block, _ = compute(data.x, data.y)
    assert len(kept) == 0 and block == 4
    assert_same(found, expected, rtol=1e-12, atol=1e-15)


def test_a_case_that_is_not_finite_spoils_no_row_but_its_own(classifier):
    _, _, (_, rows, *_), (found, spoiled, *_) = classifier
    others = np.repeat(np.arange(15) != 4, 3)
    np.testing.assert_allclose(spoiled[others], rows[others], rtol=1e-13, atol=1e-15)
    assert np.isnan(found["losses"][0])


def test_second_derivatives_of_classifiers_are_those_of_the_logits_weighted_by_the_hessian(classifier, float64):
    model, data, (found, *_), _ = classifier
    f_vv, p = second_derivative(model, inputs(), np.sin(np.arange(27.0))), model(data.x).numpy()
    # The Hessian in the logits, `diag(p) - pp'`, is the derivative of the probabilities.
    images = (p * f_vv - p * np.sum(p * f_vv, 1, keepdims=True)) / 15
    pulled = np.einsum("ikn,ik->n", jacobian(lambda: model(data.x), values_of(model)), f_vv) / 15
    np.testing.assert_allclose(found["pull of second"], pulled, rtol=1e-11, atol=1e-14)
    assert float(found["norm of second"]) ** 2 == pytest.approx(np.sum(f_vv * images), rel=1e-12)


def test_second_derivatives_of_least_squares_equal_those_by_hand_here_and_along_a_curve_elsewhere(float64):
    model = make_model()
    data = model_data(model, inputs(), CLASSES)
    slope, second, at = curve = np.random.default_rng(1).normal(size=(3, 27))

    def compute(objective):
        slope, second, at = (tf.constant(v) for v in curve)
        derivative = objective.rows.second_derivative
        return derivative(slope), derivative(slope, second, at)

    here, elsewhere = numbers(model, data, compute)
    # L is the root of 2 / (cases * outputs).
    expected = np.sqrt(2 / 45) * second_derivative(model, inputs(), slope)
    np.testing.assert_allclose(here, expected.ravel(), rtol=1e-12, atol=1e-14)
    model.set_weights(moved(model.get_weights(), at))
    expected = np.sqrt(2 / 45) * (
        second_derivative(model, inputs(), slope) + jacobian(lambda: model(data.x), values_of(model)) @ second
    )
    np.testing.assert_allclose(elsewhere, expected.ravel(), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_second_derivatives_of_recurrent_networks_are_those_of_differences(float64):
    model, data = recurrent(layers.SimpleRNN(2))
    start = model.get_weights()
    v, width = np.random.default_rng(1).normal(size=model.count_params()), 1e-4
    second = numbers(model, data, lambda objective: objective.rows.second_derivative(tf.constant(v)))
    outputs = []
    for step in (-width * v, 0 * v, width * v):
        model.set_weights(moved(start, step))
        outputs.append(model(data.x).numpy())
    expected = np.sqrt(2 / 10) * ((outputs[2] - 2 * outputs[1] + outputs[0]) / width**2).ravel()
    # The fourth derivative times the width's square, and the rounding over it.
    np.testing.assert_allclose(second, expected, atol=1e-6)


class GatheredFromParts(layers.Layer):
    """The entry of a concatenation of unlike functions of the weights that a case's number names."""

    def build(self, shape):
        self.b = self.add_weight(shape=(3,))

    def call(self, x):
        b = self.b.value
        parts = tf.concat([b[0] * tf.range(5.0, dtype=b.dtype) + b[1] ** 2, tf.stack([b[0], b[2]])], 0)
        return tf.gather(parts, tf.cast(x[:, 0], "int32"))[:, None]


def residual_of_one_feature():
    """Of a single case, Keras takes what is added for a bias with channels in front."""
    inputs = keras.Input((5, 1))
    return keras.Model(inputs, layers.Add()([inputs, layers.Dense(1)(inputs)]))


@pytest.mark.parametrize(
    "make, x",
    [
        (lambda: keras.Sequential([keras.Input((1,)), GatheredFromParts()]), np.arange(7.0)[:, None]),
        (residual_of_one_feature, np.sin(np.arange(35.0)).reshape(7, 5, 1)),
    ],
    ids=["gathered from a concatenation", "residual of one feature"],
)
def test_rows_that_tensorflow_does_not_vectorise_are_those_of_the_tape(make, x, float64):
    model = compiled(make())
    model.set_weights([np.linspace(0.5, -1.0, weight.size).reshape(weight.shape) for weight in model.get_weights()])
    y = model(x)
    f = model.objective(x, 0 * y)
    expected = np.sqrt(2 / y.numpy().size) * jacobian(lambda: model(x), values_of(model)).reshape(y.numpy().size, -1)
    np.testing.assert_allclose(f.jacobian(f.weights), expected, rtol=1e-13, atol=1e-15)
    v = tf.ones_like(f.weights)
    data = model_data(model, x, 0 * y)
    error, losses = numbers(model, data, lambda o: (o.rows.tangent_error(v), o.losses_at(tf.stack([0 * v, v]))))
    assert error < 1e-13
    model.set_weights(moved(model.get_weights(), np.ones(len(v))))
    np.testing.assert_allclose(losses, [np.mean(y**2), np.mean(model(x) ** 2)], rtol=1e-13)
