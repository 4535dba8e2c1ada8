"""What physics-informed networks promise: exact derivatives, the loss of the formula, and updates that lower it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import dense_matrix, model_data, with_objective
from training import fit

from keras_hf import DirectSolver, DoubleBackward, GaussNewton, HessianFree, HFModel
from keras_hf.pinn import PINN, derivatives

# Systems of fewer rows than weights are solved to rounding in a few updates.
pytestmark = pytest.mark.filterwarnings("ignore:Training has converged")

POINTS = np.random.default_rng(0).uniform(0.2, 0.8, size=(7, 2))


# Derivatives.


def polynomials(p):
    """x^3 y^2 and x y^4."""
    x, y = p[:, :1], p[:, 1:2]
    return tf.concat([x**3 * y**2, x * y**4], 1)


X, Y = POINTS[:, 0], POINTS[:, 1]
EXACT = {
    "u": (X**3 * Y**2, X * Y**4),
    "u_x": (3 * X**2 * Y**2, Y**4),
    "u_y": (2 * X**3 * Y, 4 * X * Y**3),
    "u_xx": (6 * X * Y**2, 0 * X),
    "u_xy": (6 * X**2 * Y, 4 * Y**3),
    "u_yx": (6 * X**2 * Y, 4 * Y**3),
    "u_xyy": (6 * X**2, 12 * Y**2),
    "u_xxxy": (12 * Y, 0 * X),
    "u_yyyy": (0 * X, 24 * X),
}


@pytest.mark.parametrize(
    "mode, coordinates",
    [
        pytest.param(lambda f: f, "yx", id="eager"),
        pytest.param(tf.function(autograph=False), "xy", id="compiled", marks=pytest.mark.slow),
    ],
)
def test_derivatives_are_exact_to_any_order_and_letters_name_columns(mode, coordinates):
    columns = ["xy".index(letter) for letter in coordinates]
    function = lambda p: polynomials(tf.gather(p, columns, axis=1))  # noqa: E731
    found = mode(lambda p: derivatives(function, p, coordinates, *EXACT))(tf.constant(POINTS[:, columns]))
    for name, values in zip(EXACT, found, strict=True):
        np.testing.assert_allclose(values, np.stack(EXACT[name], 1), rtol=1e-13, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("name", ["u", "u_xy"])
def test_one_derivative_alone_is_the_tensor_itself(name):
    found = derivatives(polynomials, tf.constant(POINTS), "xy", name)
    np.testing.assert_allclose(found, np.stack(EXACT[name], 1), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["v", "v_x", "u_z", "u_", "u_x_y", "ux", "", "_x"])
def test_names_of_no_derivative_are_refused(name):
    with pytest.raises(ValueError, match=f"Derivatives are named 'u', 'u_x'.*coordinates='xy'. Received: '{name}'"):
        derivatives(polynomials, tf.constant(POINTS), "xy", name)


@pytest.mark.parametrize("coordinates", ["x", "xyz", "xx", ""])
def test_coordinates_that_do_not_fit_the_points_are_refused(coordinates):
    message = rf"one letter for each column.*Received: coordinates='{coordinates}', points of shape \(7, 2\)"
    with pytest.raises(ValueError, match=message):
        derivatives(polynomials, tf.constant(POINTS), coordinates, "u")


# The model.


def poisson(u, points):
    """A residual of one component."""
    u_xx, u_yy = derivatives(u, points, "xy", "u_xx", "u_yy")
    return u_xx + u_yy + 1.0


def gradient(u, points):
    """A residual of two components."""
    return tf.concat(derivatives(u, points, "xy", "u_x", "u_y"), 1)


def value(u, points):
    """A residual without an axis of components."""
    return u(points)[:, 0]


TERMS = {"equation": poisson, "slope": gradient, "data": value}
INNER, SIDE, SOME = POINTS[:4], POINTS[4:6] + 1, POINTS[6:] - 1
SLOPES, VALUES = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([0.5])
GIVEN = {"equation": INNER, "slope": (SIDE, SLOPES), "data": (SOME, VALUES)}
WEIGHTS = {"slope": 4.0, "data": 0.25}


def made(terms=TERMS, width=3, inputs=2, **arguments):
    keras.utils.set_random_seed(3)
    network = keras.Sequential([keras.Input((inputs,)), layers.Dense(width, "tanh"), layers.Dense(1)])
    pinn = PINN(network, terms, **arguments)
    model = HFModel(pinn)
    model.compile(HessianFree(solver=DirectSolver(order=1), seed=0), "mse")
    return pinn, model


def loss_by_formula(pinn, given):
    """The weighted sum of the terms' means of squares, each at its own points, of residuals minus what they are to be."""
    loss = 0.0
    for name, points in given.items():
        points, expected = points if isinstance(points, tuple) else (points, 0.0)
        residual = TERMS[name](pinn.solution, tf.constant(points)) - expected
        loss += WEIGHTS.get(name, 1.0) * np.mean(residual**2)
    return loss


@pytest.mark.slow
def test_fit_lowers_the_weighted_sum_of_the_terms_means_and_warns_of_a_solution_at_its_points_alone(float64):
    """Seven points do not say what is elsewhere."""
    pinn, model = made()
    x, y, sample_weight = pinn.cases(GIVEN, WEIGHTS)
    elsewhere = {"equation": INNER + 1, "slope": (SIDE + 1, SLOPES), "data": (SOME + 1, VALUES)}
    before = loss_by_formula(pinn, GIVEN)
    others = pinn.cases(elsewhere, WEIGHTS)
    with pytest.warns(UserWarning, match="far larger than at those trained on"):
        history = fit(model, x, y, sample_weight=sample_weight, epochs=80, validation_data=others)
    assert history["loss"][0] == pytest.approx(before, rel=1e-12)
    assert loss_by_formula(pinn, GIVEN) < 0.01 * before
    # What `evaluate` gives.
    assert history["val_loss"][-1] == pytest.approx(loss_by_formula(pinn, elsewhere), rel=1e-9)
    assert history["val_loss"][-1] > 100 * history["loss"][-1]


def test_cases_of_one_term_are_independent_of_the_others(float64):
    pinn, _ = made()
    x, y, _ = pinn.cases(GIVEN)
    together = pinn(x).numpy()
    np.testing.assert_allclose(together[:4, :1], poisson(pinn.solution, tf.constant(INNER)), rtol=1e-12)
    assert not together[:4, 1].any() and not together[6:, 1].any()
    others = pinn.cases(GIVEN | {"equation": INNER[:1], "data": POINTS[:5]})
    np.testing.assert_allclose(pinn(others[0]).numpy()[1:3], together[4:6], rtol=1e-12)
    np.testing.assert_array_equal(others[1][1:3], y[4:6])


def test_a_term_is_not_asked_where_it_has_no_value(float64):
    """Radial heat, whose equation has none on the axis, where a condition has its only point: loss, gradient and rows are those of own points."""
    terms = {
        "axis": lambda u, r: derivatives(u, r, "r", "u_r"),
        "equation": lambda u, r: derivatives(u, r, "r", "u_rr") + derivatives(u, r, "r", "u_r") / r + tf.math.log(r),
    }
    pinn, model = made(terms, inputs=1)
    points = {"axis": np.zeros((1, 1)), "equation": POINTS[:, :1]}
    x, y, sample_weight = pinn.cases(points)
    with tf.GradientTape() as tape:
        residuals = [terms[name](pinn.solution, tf.constant(where)) for name, where in points.items()]
        loss = tf.add_n([tf.reduce_mean(residual**2) for residual in residuals])
    f = model.objective(x, y, sample_weight)
    parts = tape.gradient(loss, [v.value for v in model.trainable_variables], unconnected_gradients="zero")
    gradient = np.concatenate([np.ravel(part) for part in parts])
    found, by_tapes = f.loss_and_gradient(f.weights)
    assert found == pytest.approx(float(loss), rel=1e-12)
    rows = f.jacobian(f.weights)
    for each in (by_tapes, rows.T @ f.residuals(f.weights)):
        np.testing.assert_allclose(each, gradient, rtol=0, atol=1e-12 * np.abs(gradient).max())


def test_rows_through_derivatives_of_the_network_equal_differences(float64):
    pinn, model = made({"equation": poisson, "data": value}, width=2)
    x, y, sample_weight = pinn.cases({"equation": INNER, "data": SOME})
    rows, matrix = with_objective(
        model,
        model_data(model, x, y, sample_weight),
        lambda o: (o.rows.jacobian, dense_matrix(o.product(GaussNewton(DoubleBackward())), o.num_weights)),
    )
    f = model.objective(x, y, sample_weight)
    w, width = f.weights, 1e-5

    def residuals_at(w):
        f.assign(w)
        return np.sqrt(2 / len(y) * sample_weight) * model(x).numpy()[:, 0]

    differences = [(residuals_at(w + v) - residuals_at(w - v)) / (2 * width) for v in width * np.eye(len(w))]
    # The third derivative times the width's square, and rounding over the width.
    rows = rows.numpy()
    np.testing.assert_allclose(rows.T, differences, rtol=0, atol=1e-8 * np.abs(rows).max())
    np.testing.assert_allclose(matrix, rows.T @ rows, rtol=0, atol=1e-13 * np.abs(matrix).max())


def test_residuals_may_use_gradients_of_graphs(float64):
    def by_graph(u, points):
        return tf.gradients(u(points), points)[0]

    keras.utils.set_random_seed(0)
    network = keras.Sequential([layers.Dense(3, "tanh"), layers.Dense(1)])  # without weights before the first call
    losses = []
    for residual in (by_graph, gradient):
        pinn = PINN(network, {"slope": residual})
        x, y, weights = pinn.cases({"slope": np.random.default_rng(0).normal(size=(5, 2))})
        model = HFModel(pinn)
        model.compile(optimizer=HessianFree(), loss="mse")
        losses.append(model.evaluate(x, y, sample_weight=weights, verbose=0))
    assert y.shape == (5, 2)
    np.testing.assert_allclose(*losses, rtol=1e-12)


def test_a_hard_constraint_and_features_make_the_solution(float64):
    features = lambda p: tf.concat([tf.sin(p), tf.cos(p)], 1)  # noqa: E731
    pinn, _ = made(inputs=4, features=features, transform=lambda p, u: p[:, :1] * (1 - p[:, :1]) * u)
    points = tf.constant(POINTS)
    expected = X[:, None] * (1 - X[:, None]) * pinn.network(features(points)).numpy()
    np.testing.assert_allclose(pinn.solution(POINTS), expected, rtol=1e-12)
    # Zero at 0 and 1, and periodic but for the factor.
    border = np.array([[0.0, 0.3], [1.0, 0.3]])
    assert not pinn.solution(border).numpy().any()
    x, *_ = pinn.cases(GIVEN)
    np.testing.assert_allclose(pinn(x).numpy()[:4, :1], poisson(pinn.solution, tf.constant(INNER)), rtol=1e-12)


@pytest.mark.slow
def test_an_unknown_coefficient_is_found_by_fit_on_points_that_are_drawn_anew(float64):
    rate = keras.Variable(0.2, dtype="float64", name="rate")
    decay = lambda u, p: derivatives(u, p, "t", "u_t") + rate * u(p)  # noqa: E731
    pinn, model = made({"equation": decay, "data": value}, width=6, inputs=1, external_trainable_variables=[rate])
    assert any(variable is rate for variable in model.trainable_variables)
    t, rng = np.linspace(0, 1, 15)[:, None], np.random.default_rng(0)
    data = t, np.exp(-1.5 * t[:, 0])
    batches = pinn.redrawn(lambda: {"equation": rng.uniform(size=(15, 1)), "data": data}, every=2)
    history = fit(model, batches, steps_per_epoch=1, epochs=80)
    assert history["loss"][-1] < 1e-8 and float(rate) == pytest.approx(1.5, abs=1e-3)
    assert history["num_cases"] == [30] * 80


@pytest.mark.parametrize("every", [1, 3])
def test_points_are_drawn_anew_in_every_so_many_updates(every, float64):
    pinn, _ = made()
    rng, drawn = np.random.default_rng(0), []

    def draw():
        drawn.append(rng.uniform(size=(5, 2)))
        return GIVEN | {"equation": drawn[-1]}

    batches = list(pinn.redrawn(draw, WEIGHTS, every).take(7))
    for number, (x, y, sample_weight) in enumerate(batches):
        np.testing.assert_array_equal(x["points"][:5], drawn[number // every])
        assert x["term"].shape == (8, 1) and y.shape == (8, 2) and sample_weight.shape == (8,)
    assert not np.array_equal(drawn[0], drawn[1])
    expected = pinn.cases(GIVEN | {"equation": drawn[0]}, WEIGHTS)
    for one, other in zip(keras.tree.flatten(batches[0]), keras.tree.flatten(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "given, weights, message",
    [
        ({"edge": INNER}, None, "by the names of terms: equation, slope, data. Received: 'edge'"),
        ({}, {"edge": 1.0}, "by the names of terms: equation, slope, data. Received: 'edge'"),
        ({"equation": X}, None, r"must be an array \(N, d\), N >= 1. Received: shape=\(7,\) for 'equation'"),
        ({"equation": POINTS[:0]}, None, r"must be an array \(N, d\), N >= 1. Received: shape=\(0, 2\) for 'equation'"),
        ({"data": POINTS[:, :1]}, None, r"columns as the solution has coordinates, 2. Received: .*'data': 1"),
        ({}, {"equation": 0}, r"`weights\['equation'\]` must be a finite number > 0"),
    ],
)
def test_points_and_weights_that_fit_no_term_are_refused(given, weights, message, float64):
    with pytest.raises(ValueError, match=message):
        made()[0].cases(GIVEN | given, weights)


def test_terms_without_points_are_refused_by_name(float64):
    with pytest.raises(ValueError, match="Every term needs points. Received: none for 'equation', 'data'"):
        made()[0].cases({"slope": GIVEN["slope"]})


def test_float32_is_warned_of():
    with pytest.warns(UserWarning, match=r'set_floatx\("float64"\).*computes in float32'):
        PINN(keras.Sequential([keras.Input((2,)), layers.Dense(1)]), {"data": value})


@pytest.mark.slow
def test_a_new_model_of_the_same_code_goes_on_bit_by_bit_before_it_has_seen_points(float64, tmp_path):
    pinn, model = made()
    x, y, sample_weight = pinn.cases(GIVEN, WEIGHTS)
    fit(model, x, y, sample_weight=sample_weight, epochs=2)
    model.save_weights(tmp_path / "run.weights.h5")
    expected = fit(model, x, y, sample_weight=sample_weight, epochs=2)
    _, other = made()
    other.load_weights(tmp_path / "run.weights.h5")
    found = fit(other, x, y, sample_weight=sample_weight, epochs=2)
    assert found["loss"] == expected["loss"] and found["damping"] == expected["damping"]


def test_points_by_residual_are_drawn_in_proportion_to_it_each_once_and_never_where_it_is_not_finite(float64):
    """Of a residual x: the mean of points drawn from it is that of the density (x / mean + c) / (1 + c)."""
    pinn, _ = made({"x": lambda u, p: p[:, 0] / tf.cast(p[:, 0] < 2, p.dtype), "data": value})
    x = np.linspace(0, 1, 20_000)
    candidates = np.stack([np.append(x, 3.0), np.zeros(20_001)], 1)
    for power, constant, mean in ((1, 0, 2 / 3), (2, 0, 3 / 4), (1, 1, (2 / 3 + 1 / 2) / 2), (0, 0, 1 / 2)):
        drawn = pinn.by_residual("x", candidates, 1_000, power, constant, seed=0)
        assert drawn.shape == (1_000, 2) and len(np.unique(drawn[:, 0])) == 1_000 and drawn.max() <= 1
        # A draw without replacement of a twentieth of all lowers the means a little; 1 / sqrt(12000) is their standard error at most.
        assert drawn[:, 0].mean() == pytest.approx(mean, abs=0.03)
    assert pinn.by_residual("x", candidates[-10:], 9, power=0.0, seed=0).max() <= 1
    zeros = np.zeros((3, 2))
    np.testing.assert_array_equal(pinn.by_residual("x", zeros, 3), zeros)
    with pytest.raises(ValueError, match="`name` must be that of a term: x, data. Received: 'y'"):
        pinn.by_residual("y", candidates, 10)
    with pytest.raises(ValueError, match="finite residual as points. Received: 20000 for num_points=20001"):
        pinn.by_residual("x", candidates, 20_001)


def test_points_by_residual_follow_the_weights_of_the_moment_within_a_dataset_too(float64):
    """Of a residual b x, with b a bias: evenly where b is 0, else never at x = 0."""
    pinn, _ = made({"equation": lambda u, p: u(p)[:, 0] * p[:, 0]})
    candidates = np.repeat([[0.0, 0.0], [1.0, 0.0]], [50, 5], 0)
    pinn.network.set_weights([np.zeros_like(w) for w in pinn.network.get_weights()])
    drawn = pinn.redrawn(lambda: {"equation": pinn.by_residual("equation", candidates, 5, constant=0, seed=0)})
    # Not drawn ahead.
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False
    batches = iter(drawn.with_options(options))
    assert 0 in next(batches)[0]["points"].numpy()[:, 0]
    pinn.network.layers[-1].bias.assign([2.0])
    for _ in range(2):
        np.testing.assert_array_equal(next(batches)[0]["points"][:, 0], np.ones(5))


def test_no_terms_and_updates_of_no_points_are_refused(float64):
    with pytest.raises(ValueError, match="`terms` must hold at least one residual. Received: none"):
        PINN(keras.Sequential([layers.Dense(1)]), {})
    with pytest.raises(ValueError, match="`every` must be an integer >= 1. Received: every=0"):
        made()[0].redrawn(lambda: GIVEN, every=0)


def test_a_file_of_functions_is_refused_with_what_can_be_saved(float64, tmp_path):
    pinn, model = made()
    model(pinn.cases(GIVEN)[0])
    with pytest.raises(NotImplementedError, match=r"terms of a `PINN` are functions.*pinn.network.save\("):
        pinn.get_config()
    with pytest.raises(NotImplementedError, match="which no file holds"):
        model.save(tmp_path / "run.keras")


@pytest.mark.slow
def test_points_by_residual_find_a_front_that_few_points_miss(float64):
    # The slope is over a range of 0.03: of forty points one or two lie in it, and a network that is flat there satisfies the others.
    def front(u, points):
        slope = derivatives(u, points, "x", "u_x")
        return (slope - 60 * (1 - tf.tanh(60 * (points - 0.3)) ** 2)) / 8

    def error(is_drawn):
        keras.utils.set_random_seed(1)
        rng = np.random.default_rng(1)
        network = keras.Sequential([keras.Input((1,)), layers.Dense(10, "tanh"), layers.Dense(1)])
        pinn = PINN(network, {"front": front, "start": lambda u, points: u(points) + 1})
        model = HFModel(pinn)
        model.compile(loss="mse")
        fixed = rng.uniform(-1, 1, (40, 1))

        def draw():
            points = pinn.by_residual("front", rng.uniform(-1, 1, (2000, 1)), 40, seed=rng) if is_drawn else fixed
            return {"front": points, "start": np.array([[-1.0]])}

        model.fit(pinn.redrawn(draw, every=20), steps_per_epoch=20, epochs=6, verbose=0)
        x = np.linspace(-1, 1, 2001)[:, None]
        return np.abs(pinn.solution(x) - np.tanh(60 * (x - 0.3))).max()

    assert error(is_drawn=True) < 1e-2 < 1 < error(is_drawn=False)
