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
    make_model,
    model_data,
    second_derivative,
    with_objective,
)
from support import LOSSES, ROWS

from examples.precision import precision
from keras_hf import DoubleBackward, GaussNewton
from keras_hf.problem import jacobian as room

# Losses in which the cases of a batch are not apart, and one without a second derivative.
TOGETHER = {"Dice", "Tversky", "Loss, a function, scalar", "Circle", "Circle, a class with one case", "CTC"}
# One of each kind: a diagonal second derivative and one between outputs, through logits or not, weighted, masked, indefinite, without curvature.
QUICK = {
    "BinaryCrossentropy, from logits",
    "CategoricalCrossentropy, from softmax",
    "BinaryFocalCrossentropy, from sigmoid",
    "MeanSquaredError, mean_with_sample_weight, weighted",
    "MeanSquaredError, sum_over_batch_size, masked",
    "MeanAbsoluteError",
    "Poisson",
    "CosineSimilarity",
    "Loss, a function, (N, T)",
}
# Losses of which a case may have a slope where it has no curvature, or curvature of the other sign.
WITH_REST = {
    "CategoricalCrossentropy, from other outputs",
    "BinaryFocalCrossentropy, from sigmoid",
    "BinaryFocalCrossentropy, label_smoothing, from sigmoid",
    "CategoricalFocalCrossentropy, from softmax",
    "CategoricalFocalCrossentropy, label_smoothing, from softmax",
    "SparseCategoricalCrossentropy, ignore_class, from softmax",
    "Huber",
    "Poisson",
    "CosineSimilarity",
    "Dice, axis",
    "MeanAbsoluteError",
    "MeanAbsolutePercentageError",
    "Hinge",
    "CategoricalHinge",
}
NAMES = [
    pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow])
    for n in sorted({row.name for row in LOSSES} - TOGETHER)
]
pytestmark = pytest.mark.filterwarnings("ignore:.*(no curvature|no second derivative)")


def numbers(model, data, function):
    """What a function of an objective returns, as arrays."""
    return tf.nest.map_structure(lambda x: x.numpy(), with_objective(model, data, function))


@pytest.mark.parametrize("name", NAMES)
def test_rows_give_gauss_newton_matrix_and_gradient_of_every_loss(name):
    row = ROWS[name]
    with precision(row.floatx):
        model, data = prepare(row)
        gram, pulled, gradient = numbers(
            model,
            data,
            lambda o: (o.rows.gram(), o.rows.pull(o.rows.residuals), o.loss_and_gradient().gradient),
        )
        j, hessian = first_derivative(row, model, data), loss_hessian(row, model, data)
        loss, cut = loss_at(row, model, data)
        cut = tf.Variable(cut)
        with tf.GradientTape() as tape:
            value = loss(cut)
        slope = tf.reshape(tape.gradient(value, cut), [-1]).numpy()
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    positive = vectors[:, values > 1e-12 * np.abs(values).max()]
    # Of a loss that is not convex, its convex part.
    expected = j.T @ positive @ (positive.T @ hessian @ positive) @ positive.T @ j
    np.testing.assert_allclose(gram, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    size = np.abs(gradient).max()
    np.testing.assert_allclose(pulled, j.T @ positive @ (positive.T @ slope), rtol=0, atol=1e-12 * size)
    assert (np.abs(pulled - gradient).max() > 0.05 * size) == (name in WITH_REST)
    if name not in WITH_REST:
        np.testing.assert_allclose(pulled, gradient, rtol=0, atol=1e-12 * size)


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


def weighted_sum():
    """A regression with a loss that is summed, and weighted."""
    model = make_model(loss=lambda: keras.losses.MeanSquaredError(reduction="sum"))
    rng = np.random.default_rng(0)
    return model, model_data(model, inputs(), rng.normal(size=(15, 3)), rng.uniform(0.5, 2, 15))


def regularized():
    """A classifier with regularizers and a constraint."""
    stack = [
        layers.Dense(4, "tanh", kernel_regularizer=keras.regularizers.L2(0.1)),
        layers.Dense(3, kernel_constraint=keras.constraints.MaxNorm(0.5)),
    ]
    loss = lambda: keras.losses.CategoricalCrossentropy(from_logits=True)  # noqa: E731
    model = compiled(keras.Sequential([keras.Input((2,)), *stack]), loss)
    return model, model_data(model, inputs(), np.eye(3)[np.arange(15) % 3])


class OwnCell(layers.LSTMCell):
    """A cell that is not Keras' own, so that its derivatives are TensorFlow's."""


def recurrent(*stack):
    """A recurrent network on sequences of different lengths, with two outputs."""
    model = compiled(keras.Sequential([keras.Input((3, 2)), *stack, layers.Dense(2)]))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3, 2))
    x[1, 2] = 0
    return model, model_data(model, x, rng.normal(size=(5, 2)))


def products_and_rows(objective):
    """The matrix of products, that of rows, and the gradient by both, without regularizers."""
    rows, gradient = objective.rows, objective.loss_and_gradient().gradient
    added = objective.regularization_matrix()
    matrix = dense_matrix(objective.product(GaussNewton(DoubleBackward())), objective.num_weights)
    rest = gradient - rows.pull(rows.residuals)
    return matrix, rows.gram() + (0 if added is None else added), rest, gradient


@pytest.mark.parametrize("problem", [two_outputs, pytest.param(weighted_sum, marks=pytest.mark.slow)])
def test_rows_agree_with_products_on_any_network(problem, float64):
    matrix, gram, rest, gradient = numbers(*problem(), products_and_rows)
    np.testing.assert_allclose(gram, matrix, rtol=0, atol=1e-13 * np.abs(matrix).max())
    np.testing.assert_allclose(rest, 0 * rest, atol=1e-13 * np.abs(gradient).max())


def test_what_rows_leave_over_is_the_regularizers(float64):
    model, data = regularized()
    matrix, gram, rest, gradient = numbers(model, data, products_and_rows)
    np.testing.assert_allclose(gram, matrix, rtol=0, atol=1e-13 * np.abs(matrix).max())
    kernel = model.trainable_variables[0].numpy().ravel()
    expected = np.concatenate([0.2 * kernel, np.zeros(len(rest) - len(kernel))])
    np.testing.assert_allclose(rest, expected, atol=1e-14)


def test_rows_in_float32_are_those_of_float32():
    model, data = model_of(float_type="float32")
    gram, matrix, push, tangent_error = numbers(
        model,
        data,
        lambda o: (
            o.rows.gram(),
            tf.transpose(tf.map_fn(o.product(GaussNewton(DoubleBackward())), tf.eye(o.num_weights))),
            o.rows.plus_push(o.rows.residuals, tf.ones([o.num_weights])),
            o.rows.tangent_error(tf.ones([o.num_weights])),
        ),
    )
    assert gram.dtype == push.dtype == np.float32
    np.testing.assert_allclose(gram, matrix, rtol=0, atol=1e-5 * np.abs(matrix).max())
    assert tangent_error < 1e-5


def model_of(activation="linear", loss="mse", float_type="float64"):
    """A 2-4-3 network and cases, in a float type."""
    network = keras.Sequential([keras.Input((2,)), layers.Dense(4, "tanh"), layers.Dense(3, activation)])
    model = compiled(network, loss)
    rng = np.random.default_rng(0)
    for weight in network.weights:
        weight.assign(rng.normal(size=weight.shape))
    return model, model_data(model, inputs().astype(float_type), np.eye(3)[np.arange(15) % 3].astype(float_type))


def everything(objective):
    """All that rows give, on vectors that are neither zero nor special; and how many cases a block has, and whether the Jacobian is kept."""
    rows, v = objective.rows, tf.sin(tf.range(objective.num_weights, dtype=tf.float64))
    found = {
        "gram": rows.gram(),
        "residuals": rows.residuals,
        "pull": rows.pull(rows.plus_push(rows.residuals, v)),
        "pull of second": rows.pull(rows.second_derivative(v)),
        "second": rows.second_derivative(v),
        "losses": objective.losses_at(tf.stack([0 * v, v, -3 * v])),
    }
    # Shapes are known: what is solved later asks for them.
    assert rows.jacobian is None or rows.jacobian.shape == (45, 27)
    return found, tf.constant(rows._parts._block), tf.constant(rows.jacobian is not None)


@pytest.fixture(scope="module")
def whole():
    """A classifier, its cases, and everything in one piece."""
    with precision("float64"):
        model, data = model_of("softmax", "categorical_crossentropy")
        found, block, is_kept = numbers(model, data, everything)
    assert is_kept and block > 15
    return model, data, found


def assert_same(found, expected):
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, atol=1e-15, err_msg=name)


@pytest.mark.parametrize("cases, is_kept", [(1, True), pytest.param(4, False, marks=pytest.mark.slow)])
def test_blocks_change_nothing(cases, is_kept, whole, float64, monkeypatch):
    model, data, expected = whole
    num_floats = numbers(model, data, lambda o: tf.constant(int(o.rows._parts._piece.floats_per_case)))
    monkeypatch.setattr(room, "_BLOCK_FLOATS", cases * 3 * max(27, num_floats))
    if not is_kept:
        monkeypatch.setattr(room, "_KEPT_FLOATS", 0)
    found, block, was_kept = numbers(model, data, everything)
    assert (block, was_kept) == (cases, is_kept)
    assert_same(found, expected)


def test_a_number_of_cases_that_is_not_known_changes_nothing(whole, float64):
    model, data, expected = whole

    @tf.function(
        autograph=False, input_signature=[tf.TensorSpec([None, leaf.shape[1]], leaf.dtype) for leaf in data[:2]]
    )
    def compute(x, y):
        return model._with_objective(data._replace(x=x, y=y), lambda objective, structure: everything(objective))

    found, _, is_kept = compute(data.x, data.y)
    assert not is_kept
    assert_same(found, expected)


@pytest.mark.parametrize("problem", [pytest.param(two_outputs, marks=pytest.mark.slow), regularized])
def test_losses_of_several_candidates_are_those_of_each(problem, float64):
    model, data = problem()
    before = [weight.copy() for weight in model.get_weights()]

    def compute(objective):
        rng = np.random.default_rng(0)
        steps = tf.constant(rng.normal(size=(4, objective.num_weights)))
        return objective.losses_at(steps), tf.map_fn(objective.loss_at, steps)

    together, one_by_one = numbers(model, data, compute)
    assert together.dtype == np.float64
    np.testing.assert_allclose(together, one_by_one, rtol=1e-13)
    for weight, old in zip(model.get_weights(), before, strict=True):
        if problem is not regularized:  # whose start is projected
            np.testing.assert_array_equal(weight, old)


def test_second_derivatives_of_least_squares_equal_those_by_hand(float64):
    model, data = model_of()
    v = np.random.default_rng(1).normal(size=27)
    second = numbers(model, data, lambda objective: objective.rows.second_derivative(tf.constant(v)))
    # L is the root of 2 / (cases * outputs).
    expected = np.sqrt(2 / 45) * second_derivative(model, inputs(), v)
    np.testing.assert_allclose(second, expected.ravel(), rtol=1e-12, atol=1e-14)


def test_second_derivatives_along_a_curve_elsewhere_equal_those_by_hand(float64):
    model, data = model_of()
    slope, second, at = np.random.default_rng(1).normal(size=(3, 27))
    found = numbers(model, data, lambda o: o.rows.second_derivative(*map(tf.constant, (slope, second, at))))
    start = model.get_weights()
    parts = np.split(at, np.cumsum([weight.size for weight in start])[:-1])
    model.set_weights([w + part.reshape(w.shape) for w, part in zip(start, parts, strict=True)])
    j = jacobian(lambda: model(data.x), [variable.value for variable in model.trainable_variables])
    expected = np.sqrt(2 / 45) * (second_derivative(model, inputs(), slope) + j @ second)
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-12, atol=1e-13)


def test_second_derivatives_of_classifiers_are_those_of_the_logits_weighted_by_the_hessian(float64):
    model, data = model_of(loss=lambda: keras.losses.CategoricalCrossentropy(from_logits=True))
    v = np.random.default_rng(1).normal(size=27)
    pulled, norm = numbers(
        model,
        data,
        lambda o: (
            o.rows.pull(o.rows.second_derivative(tf.constant(v))),
            o.rows.norm(o.rows.second_derivative(tf.constant(v))),
        ),
    )
    f_vv, p = second_derivative(model, inputs(), v), tf.nn.softmax(model(data.x)).numpy()
    images = (p * f_vv - p * np.sum(p * f_vv, 1, keepdims=True)) / 15
    j = jacobian(lambda: model(data.x), [variable.value for variable in model.trainable_variables])
    np.testing.assert_allclose(pulled, np.einsum("ikn,ik->n", j, images), rtol=1e-11, atol=1e-14)
    assert norm**2 == pytest.approx(np.sum(f_vv * images), rel=1e-12)


@pytest.mark.parametrize(
    "stack, is_vectorized",
    [
        (lambda: [layers.SimpleRNN(2)], True),
        pytest.param(lambda: [layers.Masking(), layers.LSTM(2)], True, marks=pytest.mark.slow),
        pytest.param(lambda: [layers.SimpleRNN(2, return_sequences=True), layers.GRU(2)], True, marks=pytest.mark.slow),
        # Loops of TensorFlow: one case after the other.
        pytest.param(lambda: [layers.RNN(OwnCell(2))], False, marks=pytest.mark.slow),
    ],
)
def test_rows_of_recurrent_networks_are_those_of_products(stack, is_vectorized, float64):
    model, data = recurrent(*stack())
    steps = np.random.default_rng(1).normal(size=(3, model.count_params()))

    def compute(objective):
        one_by_one = tf.stack([objective.loss_at(tf.constant(step)) for step in steps])
        is_found = tf.constant(objective.rows._parts._piece.has_vectorizable_rows)
        return products_and_rows(objective), objective.losses_at(tf.constant(steps)), one_by_one, is_found

    (matrix, gram, rest, gradient), losses, one_by_one, is_found = numbers(model, data, compute)
    assert is_found == is_vectorized
    np.testing.assert_allclose(gram, matrix, rtol=0, atol=1e-13 * np.abs(matrix).max())
    np.testing.assert_allclose(rest, 0 * rest, atol=1e-13 * np.abs(gradient).max())
    np.testing.assert_allclose(losses, one_by_one, rtol=1e-13)


@pytest.mark.slow
def test_second_derivatives_of_recurrent_networks_are_those_of_differences(float64):
    model, data = recurrent(layers.SimpleRNN(2))
    start = model.get_weights()
    places = np.cumsum([0, *(weight.size for weight in start)])
    v, width = np.random.default_rng(1).normal(size=places[-1]), 1e-4
    second = numbers(model, data, lambda objective: objective.rows.second_derivative(tf.constant(v)))
    outputs = []
    for step in (-width * v, 0 * v, width * v):
        model.set_weights([w + step[i:j].reshape(w.shape) for w, i, j in zip(start, places, places[1:], strict=False)])
        outputs.append(model(data.x).numpy())
    expected = np.sqrt(2 / 10) * ((outputs[2] - 2 * outputs[1] + outputs[0]) / width**2).ravel()
    # The fourth derivative times the width's square, and the rounding over it.
    np.testing.assert_allclose(second, expected, atol=1e-6)


def test_rows_and_forward_derivatives_agree(float64):
    error, scale = numbers(
        *two_outputs(),
        lambda o: (o.rows.tangent_error(tf.ones([o.num_weights], tf.float64)), o.rows.norm(o.rows.residuals)),
    )
    assert error < 1e-14 and scale > 0


def test_a_case_that_is_not_finite_spoils_no_second_derivative_but_its_own(float64):
    model, data = model_of("softmax", "categorical_crossentropy")
    whole = numbers(model, data, lambda o: tf.stack(tf.split(o.rows.jacobian, 15)))
    spoiled = data._replace(x=tf.where(tf.range(15)[:, None] == 4, tf.constant(np.nan, tf.float64), data.x))
    rows, loss = numbers(
        model, spoiled, lambda o: (tf.stack(tf.split(o.rows.jacobian, 15)), o.losses_at(tf.zeros([1, 27], tf.float64)))
    )
    others = np.arange(15) != 4
    np.testing.assert_allclose(rows[others], whole[others], rtol=1e-13, atol=1e-15)
    assert np.isnan(loss)
