"""Derivatives through the operations of a graph are those of nested tapes, to rounding; where an operation has no rule, they are the tapes'."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from problems import model_data, with_objective

from keras_hf import DirectSolver, HessianFree, HFModel
from keras_hf.differentiation import taylor
from keras_hf.pinn import PINN, derivatives

POINTS = np.random.default_rng(0).uniform(0.2, 0.9, size=(5, 2))


def columns_up_to(order):
    return [index for size in range(order + 1) for index in itertools.combinations_with_replacement((0, 1), size)]


def by_tapes(u, points, order):
    """All derivatives up to an order, a dict, by one tape within another."""
    found = {(): u(points)}
    if order:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(points)
            lower = by_tapes(u, points, order - 1)
            columns = {index: tf.unstack(value, axis=1) for index, value in lower.items()}
        found = lower
        for index in [index for index in lower if len(index) == order - 1]:
            rows = [tape.gradient(column, points, unconnected_gradients="zero") for column in columns[index]]
            for letter in range(index[-1] if index else 0, 2):
                found[(*index, letter)] = tf.stack([row[:, letter] for row in rows], 1)
    return found


def assert_same_derivatives(u, order, points=POINTS):
    """To rounding, by order of the derivatives."""
    points = tf.constant(points)
    wanted = set(columns_up_to(order))
    found = tf.function(lambda p: taylor.partial_derivatives(u, p, wanted), autograph=False)(points)
    expected = by_tapes(u, points, order)
    assert found.keys() == expected.keys()
    for index, values in expected.items():
        size = np.abs(values).max()
        np.testing.assert_allclose(found[index], values, rtol=0, atol=3e-14 * size, err_msg=str(index))


def perceptron(activation, num_outputs=1):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((2,)), layers.Dense(3, activation), layers.Dense(3, activation), layers.Dense(num_outputs)]
    )


ACTIVATIONS = ["tanh", "sigmoid", "softplus", "gelu", "silu", "exponential", "elu", "relu", "log_sigmoid", "mish"]


@pytest.mark.parametrize("activation", [*ACTIVATIONS, ops.sin, ops.cos, ops.square])
def test_a_perceptron_of_every_activation_has_the_derivatives_of_tapes(float64, activation):
    assert_same_derivatives(perceptron(activation), 3)


def test_two_outputs_and_the_fourth_order(float64):
    assert_same_derivatives(perceptron("tanh", 2), 4)


def functional():
    """Gated branches, joined, normalised and scaled."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((2,))
    first, second = layers.Dense(3, "tanh")(inputs), layers.Dense(3, "sigmoid")(inputs)
    joined = layers.Concatenate()([layers.Add()([layers.Multiply()([first, second]), first]), inputs])
    scaled = layers.Rescaling(2.0, 0.5)(layers.Normalization(mean=[0.1] * 5, variance=[2.0] * 5)(joined))
    return keras.Model(inputs, layers.Dense(2)(scaled))


def branch_and_trunk():
    """DeepONet's: an inner product of two networks."""
    branch, trunk = perceptron("tanh", 3), perceptron(ops.sin, 3)
    return lambda p: tf.reduce_sum(branch(p) * trunk(p), 1, keepdims=True)


def broadcast_before_it_is_multiplied():
    """A column and a constant of three make what a matrix sums over, on either side."""
    kernel, ones = np.random.default_rng(0).normal(size=(3, 3)), np.ones((5, 3))
    return lambda p: (tf.sin(p[:, :1]) + ones) @ kernel + tf.transpose(kernel @ tf.transpose(p[:, 1:] ** 2 * ones))


def with_features_and_a_hard_constraint():
    network = perceptron("tanh")

    def u(p):
        x, y = p[:, :1], p[:, 1:]
        return tf.sin(3 * x) + x * (1 - y**2) * network(tf.concat([tf.cos(y), x], 1)) / (1 + x)

    return u


def of_all_points(p):
    """Operations that one meets in constraints and exact solutions."""
    x, y = p[:, 0], tf.unstack(p, axis=1)[1]
    columns = [
        tf.sqrt(x) * tf.math.log(y) + tf.math.rsqrt(x) * tf.math.log1p(y),
        tf.reduce_sum(p * p, 1) - tf.reduce_mean(p, 1) * tf.reduce_prod(1 - p**2, 1),
        tf.pow(x, 2.5) + tf.pow(y, 3) + tf.pow(x, 1.0) - y**0,
        tf.math.erf(x) * tf.math.erfc(y) + tf.math.expm1(x),
        tf.exp(-x) / y + tf.math.reciprocal(x) / 3,
        tf.math.tan(x) / tf.math.cosh(y) + tf.math.sinh(x) * tf.cos(y),
        tf.math.squared_difference(x, y) - tf.abs(x - y),
        tf.where(x > 0.5, x * y, 1.0 - y),
    ]
    return tf.reshape(tf.transpose(tf.stack(columns)), [-1, 4, 2])[:, :, 0]


def of_matrices(p):
    """Products of two matrices that both depend on the points, slices, and gathered, tiled, padded and split columns."""
    left = tf.stack([p, p**2], 1)
    right = tf.stack([tf.sin(p), tf.ones_like(p)], 1)
    first, second = tf.split(tf.matmul(left, right, transpose_b=True)[:, 0], 2, 1)
    padded = tf.pad(tf.gather(p, [1, 0], axis=1) * first, [[0, 0], [1, 0]])
    return padded + tf.tile(second, [1, 3]) + tf.broadcast_to(p[:1, :1], [5, 3]) * p[:, 1:]


def through_complex_numbers(p):
    x, y = (tf.cast(p[:, i : i + 1], tf.complex128) for i in (0, 1))
    wave = tf.exp(1j * x * y) + tf.complex(p[:, :1] ** 2, p[:, 1:]) * tf.math.conj(x)
    return tf.concat([tf.math.real(wave), tf.math.imag(wave), tf.abs(wave), tf.math.angle(wave)], 1)


def spectral(p):
    return tf.math.real(tf.signal.ifft(tf.signal.fft(tf.cast(p * p[:, ::-1], tf.complex128)) ** 2))


@pytest.mark.parametrize(
    "make",
    [
        functional,
        branch_and_trunk,
        broadcast_before_it_is_multiplied,
        with_features_and_a_hard_constraint,
        pytest.param(lambda: of_all_points, id="functions"),
        pytest.param(lambda: lambda p: p, id="points"),
        pytest.param(lambda: tf.ones_like, id="constant"),
        pytest.param(lambda: lambda p: p * tf.stop_gradient(p), id="stopped"),
    ],
)
def test_networks_and_functions_have_the_derivatives_of_tapes(float64, make):
    assert_same_derivatives(make(), 2)


@pytest.mark.parametrize("u", [through_complex_numbers, spectral])
def test_what_passes_through_complex_numbers_is_differentiated_by_tapes(float64, u):
    found = tf.function(lambda p: derivatives(u, p, "xy", "u_x", "u_xy"))(tf.constant(POINTS))
    expected = by_tapes(u, tf.constant(POINTS), 2)
    for values, index in zip(found, [(0,), (0, 1)], strict=True):
        np.testing.assert_allclose(values, expected[index], rtol=0, atol=1e-13)


KERNEL = np.random.default_rng(7).normal(size=(4, 3))


def as_complex(x):
    return tf.cast(x, tf.complex128)


# Functions of two tensors (N, k), of which the second has one column, row by row: operations with a rule ...
WITH_RULE = {
    "add": lambda x, y: tf.add_n([x + y, tf.sin(x)]),
    "subtract": lambda x, y: y - x,
    "multiply": lambda x, y: tf.sin(x) * y,
    "divide": lambda x, y: x / (1.5 + tf.sin(y)),
    "dense": lambda x, y: tf.nn.bias_add(x @ KERNEL[: x.shape[1]], KERNEL[0]),
    "matrices": lambda x, y: tf.matmul(x[:, None], tf.sin(x)[:, None], transpose_b=True)[:, 0] * y,
    "outer": lambda x, y: tf.reshape(tf.matmul(x[:, :2, None], tf.cos(y)[:, None]), [5, -1]),
    "concat": lambda x, y: tf.concat([x, y, tf.ones_like(y)], 1),
    "stack": lambda x, y: tf.reduce_mean(tf.stack([x, x * y], 1), 1),
    "unstack": lambda x, y: tf.stack(tf.unstack(x, axis=1)[::-1], 1),
    "strided slice": lambda x, y: x[:, None, ::-1, None][:, 0, :, 0],
    "gather": lambda x, y: tf.gather(x, [0, x.shape[1] - 1], axis=1),
    "pad": lambda x, y: tf.pad(x, [[0, 0], [1, 0]]) * y,
    "tile": lambda x, y: tf.tile(x[:, :2], [1, 2]) + y,
    "split": lambda x, y: tf.split(tf.concat([x, y], 1), [x.shape[1] - 1, 2], 1)[1],
    "broadcast": lambda x, y: tf.broadcast_to(y**2, tf.shape(x)) * x,
    "transpose": lambda x, y: tf.transpose(tf.transpose(x) * 2.0),
    "sum": lambda x, y: tf.reduce_sum(x, -1)[:, None] * y,
    "product": lambda x, y: tf.reduce_prod(tf.sin(x), 1, keepdims=True),
    "where": lambda x, y: tf.where(y > 0.3, x, tf.sin(x)),
    "squared difference": lambda x, y: tf.math.squared_difference(tf.sin(x), tf.cos(y)),
    "integers": lambda x, y: tf.cast(tf.cast(4 * x, tf.int32), tf.float64) * y,
    "booleans": lambda x, y: tf.cast(x > 0.2, tf.float64) + x * tf.cast(tf.shape(x)[1], x.dtype),
    "stopped": lambda x, y: x * tf.stop_gradient(y) + tf.sign(x) * y + tf.floor(3 * x),
    "sigmoid": lambda x, y: tf.nn.silu(x) + tf.math.softplus(y),
    "exponential": lambda x, y: tf.exp(-x * x) + tf.math.expm1(tf.sin(y)),
    "logarithm": lambda x, y: tf.math.log(1.5 + tf.sin(x)) + tf.math.log1p(y * y),
    "powers": lambda x, y: (1.5 + tf.sin(x)) ** 0.3 + tf.math.rsqrt(1.5 + tf.sin(y)) + tf.tanh(x) ** 3,
    "kinks": lambda x, y: tf.abs(x) * tf.nn.elu(y - 0.4) + tf.nn.relu(x - 0.3),
    "erf": lambda x, y: tf.math.erf(x) * tf.math.erfc(y),
}
# ... and without one, complex ones among them.
WITHOUT_RULE = {
    "exp of complex": lambda x, y: tf.math.real(tf.exp(1j * as_complex(x))) * y,
    "product of complex": lambda x, y: tf.math.imag(as_complex(x) * tf.math.conj(1j + as_complex(y))),
    "abs of complex": lambda x, y: tf.abs(tf.complex(x, y * tf.ones_like(x) + 1.5)),
    "fft": lambda x, y: tf.math.real(tf.signal.ifft(tf.signal.fft(as_complex(x)) ** 2)) * y,
    "cumsum": lambda x, y: tf.cumsum(x, 1) * y,
    "maximum": lambda x, y: tf.maximum(x, y),
}


def drawn(steps, rng):
    """A function `(N, 2) -> (N, 1)` of some operations, each on the result before and on a column of one of all results."""
    others = [rng.integers(number + 1) for number in range(len(steps))]

    def u(p):
        results = [p]
        for step, other in zip(steps, others, strict=True):
            operation = WITH_RULE.get(step) or WITHOUT_RULE[step]
            results.append(operation(results[-1][:, :4], results[other][:, -1:]))
        return tf.reduce_mean(results[-1], 1, keepdims=True) + tf.sin(results[len(steps) // 2][:, :1])

    return u


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_operations_in_a_random_order_have_the_derivatives_of_tapes(seed, float64, monkeypatch):
    """One operation without a rule sends the whole function to the tapes."""
    rng = np.random.default_rng(seed)
    programs = [(2, steps) for steps in np.split(rng.permutation(list(WITH_RULE))[:18], 3)]
    programs += [(1, [*rng.choice(list(WITH_RULE), 2), step]) for step in WITHOUT_RULE]
    functions = [(order, steps, drawn(steps, rng)) for order, steps in programs]
    points, names = tf.constant(POINTS), ["u", "u_x", "u_xy", "u_yy"]
    by_series, by_rules = [], taylor.partial_derivatives
    monkeypatch.setattr(taylor, "partial_derivatives", lambda *args: by_series.append(by_rules(*args)) or by_series[-1])
    compute = tf.function(
        lambda p: [derivatives(u, p, "xy", *names[: 2 * order]) for order, _, u in functions], autograph=False
    )
    values = compute(points)
    assert [found is not None for found in by_series] == [order == 2 for order, *_ in functions]
    for (order, steps, u), of_function in zip(functions, values, strict=True):
        expected = by_tapes(u, points, order)
        for found, index in zip(of_function, [(), (0,), (0, 1), (1, 1)], strict=False):
            size = max(1, np.abs(expected[index]).max())
            np.testing.assert_allclose(found, expected[index], rtol=0, atol=1e-12 * size, err_msg=f"{index} of {steps}")


def test_matrices_have_the_derivatives_of_tapes(float64):
    """Not row by row: the first point's column is in all rows, whose derivatives are then those of a sum."""
    points = tf.constant(np.repeat(POINTS[:1], 5, 0))
    wanted = set(columns_up_to(2))
    found = tf.function(lambda p: taylor.partial_derivatives(of_matrices, p, wanted), autograph=False)(points)
    alone = by_tapes(lambda p: of_matrices(tf.tile(p, [5, 1]))[:1], points[:1], 2)
    for index, values in alone.items():
        np.testing.assert_allclose(found[index], np.repeat(values, 5, 0), rtol=1e-12, atol=1e-13, err_msg=str(index))


def test_a_number_of_points_that_no_trace_knows(float64):
    network = perceptron("tanh", 2)
    compiled = tf.function(
        lambda p: derivatives(network, p, "xy", "u", "u_xx", "u_xy"),
        autograph=False,
        input_signature=[tf.TensorSpec([None, 2], "float64")],
    )
    for number in (1, 5):
        for found, expected in zip(
            compiled(tf.constant(POINTS[:number])),
            derivatives(network, tf.constant(POINTS[:number]), "xy", "u", "u_xx", "u_xy"),  # eagerly, by tapes
            strict=True,
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-14)


def test_derivatives_of_derivatives(float64):
    network = perceptron("tanh")
    nested = tf.function(
        lambda p: derivatives(lambda q: derivatives(network, q, "xy", "u_xx"), p, "xy", "u_xy"), autograph=False
    )(tf.constant(POINTS))
    at_once = tf.function(lambda p: derivatives(network, p, "xy", "u_xxxy"), autograph=False)(tf.constant(POINTS))
    np.testing.assert_allclose(nested, at_once, rtol=1e-10, atol=1e-14)


@tf.custom_gradient
def rounded(x):
    """Rounds, and is the identity for gradients."""
    return tf.round(x), lambda dy: dy


@pytest.mark.parametrize("without_rule", [tf.math.lgamma, rounded, lambda p: tf.cumsum(p, 1)])
def test_what_has_no_rule_is_differentiated_by_tapes(float64, without_rule):
    network = perceptron("tanh", 2)

    def u(p):
        return network(without_rule(p))

    names = ["u", "u_x", "u_xy", "u_yy"]
    compiled = tf.function(lambda p: derivatives(u, p, "xy", *names), autograph=False)(tf.constant(POINTS))
    expected = by_tapes(u, tf.constant(POINTS), 2)
    for found, index in zip(compiled, [(), (0,), (0, 1), (1, 1)], strict=True):
        np.testing.assert_allclose(found, expected[index], rtol=1e-11, atol=1e-13)


def residual(u, points):
    """Of first and of mixed and pure second derivatives, a product among them."""
    value, u_x, u_xy, u_yy = derivatives(u, points, "xy", "u", "u_x", "u_xy", "u_yy")
    return value * u_x + u_yy - u_xy


@pytest.mark.slow
def test_rows_and_the_second_derivative_of_the_arc_are_those_of_tapes(float64, monkeypatch):
    def computed():
        pinn = PINN(perceptron("tanh"), {"equation": residual, "data": lambda u, points: u(points)[:, 0]})
        x, y, weights = pinn.cases({"equation": POINTS, "data": POINTS[:3] + 1})
        model = HFModel(pinn)
        model.compile(HessianFree(solver=DirectSolver()), "mse")
        slope, second, at = np.random.default_rng(1).normal(size=(3, pinn.network.count_params()))
        return with_objective(
            model,
            model_data(model, x, y, weights),
            lambda o: (o.rows.jacobian, o.rows.second_derivative(*map(tf.constant, (slope, second, 0.1 * at)))),
        )

    found = computed()
    monkeypatch.setattr(taylor, "partial_derivatives", lambda *arguments: None)
    monkeypatch.setattr(taylor, "derivative_along", lambda *arguments: None)
    for by_series, by_tape in zip(found, computed(), strict=True):
        np.testing.assert_allclose(by_series, by_tape, rtol=0, atol=1e-13 * np.abs(by_tape).max())


def test_more_outputs_take_no_more_operations(float64):
    def num_operations(num_outputs):
        network = perceptron("tanh", num_outputs)
        compiled = tf.function(lambda p: derivatives(network, p, "xy", "u_xx", "u_yy"), autograph=False)
        return len(compiled.get_concrete_function(tf.TensorSpec([5, 2], "float64")).graph.get_operations())

    assert num_operations(1) == num_operations(3)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_along_a_curve_of_weights_the_derivative_is_that_in_its_parameter(order):
    rng = np.random.default_rng(0)
    start = [tf.constant(rng.normal(size=shape)) for shape in ((2, 3), (3,), (3, 1))]
    terms = [[tf.constant(rng.normal(size=part.shape)) for part in start] for _ in range(order)]
    x = tf.constant(POINTS)

    def function(weights):
        kernel, bias, last = weights
        return tf.tanh(x @ kernel + bias) @ last

    found = tf.function(lambda: taylor.derivative_along(function, start, *terms), autograph=False)()

    def weighted(t, num_derivatives):
        """A derivative of the sum of the outputs, each with a weight of its own, in the curve's parameter."""
        if not num_derivatives:
            powers = [t, t * t / 2, t * t * t / 6]
            moved = [
                w + sum(p * c for p, c in zip(powers, parts, strict=False))
                for w, *parts in zip(start, *terms, strict=True)
            ]
            return tf.reduce_sum(function(moved) * POINTS[:, :1])
        with tf.GradientTape() as tape:
            tape.watch(t)
            lower = weighted(t, num_derivatives - 1)
        return tape.gradient(lower, t)

    expected = weighted(tf.constant(0.0, "float64"), order)
    np.testing.assert_allclose(tf.reduce_sum(found * POINTS[:, :1]), expected, rtol=1e-12)
