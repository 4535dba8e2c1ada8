"""What the public door to the objective promises: Keras' loss, its gradient and curvature as plain functions of one vector."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import compiled, hessian_free, inputs, loss_derivatives, make_model, model_data
from scipy import optimize

from keras_hf import EmpiricalFisherDiagonal, GaussNewton, Hessian, HFModel
from keras_hf.problem import jacobian


def targets(size=3):
    return np.random.default_rng(3).normal(size=(15, size))


def hessian_model(*middle, loss="mse", regularizer=None, **settings):
    """A compiled network of 2 inputs and 3 outputs, whose products are with the Hessian."""
    first = layers.Dense(4, "tanh", kernel_regularizer=regularizer)
    network = keras.Sequential([keras.Input((2,)), first, *middle, layers.Dense(3, bias_regularizer=regularizer)])
    settings = {"preconditioner": EmpiricalFisherDiagonal(), "growing_batch": None, "seed": 0, **settings}
    return compiled(network, loss, optimizer=hessian_free(curvature=Hessian(), **settings))


def at(model, x, y, sample_weight=None):
    """The loss function on these cases, and weights other than those of the model."""
    f = model.objective(x, y, sample_weight)
    return f, f.weights + 0.1 * np.sin(np.arange(len(f.weights)))


def matrix(f, w):
    return np.stack([f.product(w, v) for v in np.eye(len(w))])


def expected_at(model, w, x, y, sample_weight=None):
    """Loss, gradient and Hessian by Keras and `GradientTape`."""
    f, data = model.objective(x, y, sample_weight), model_data(model, x, y, sample_weight)
    before = f.weights
    f.assign(w)
    expected = loss_derivatives(model, data)
    f.assign(before)
    return expected


def every_value(model):
    model.metrics  # noqa: B018 - made when first asked for
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    return [variable.numpy() for variable in variables]


WEIGHTS = np.random.default_rng(4).uniform(size=15)
CASES = {
    "regularizers and weights": (lambda: hessian_model(regularizer=keras.regularizers.L2(0.1)), WEIGHTS),
    "sum and added losses": (
        lambda: hessian_model(layers.ActivityRegularization(l2=0.1), loss=keras.losses.MeanSquaredError("sum")),
        None,
    ),
    "batch normalization": (lambda: hessian_model(layers.BatchNormalization()), None),
    "pieces, whatever the chunk": (lambda: hessian_model(micro_batch_size=4, curvature_batch_size=5), WEIGHTS),
}


@pytest.mark.parametrize(("make", "sample_weight"), CASES.values(), ids=CASES.keys())
def test_loss_gradient_and_products_equal_those_of_keras_and_a_dense_matrix(float64, make, sample_weight):
    model = make()
    f, w = at(model, inputs(), targets(), sample_weight)
    loss, gradient, hessian = expected_at(model, w, inputs(), targets(), sample_weight)
    before = every_value(model)
    found, found_gradient = f.loss_and_gradient(w)
    assert found == pytest.approx(loss, rel=1e-12) and f.loss_at(w) == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(found_gradient, gradient, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(matrix(f, w), hessian, rtol=1e-9, atol=1e-10)
    assert isinstance(found, float) and found_gradient.dtype == np.float64 == f.product(w, w).dtype
    for value, now in zip(before, every_value(model), strict=True):
        np.testing.assert_array_equal(value, now)


def test_products_are_with_the_compiled_curvature(float64):
    # Of a linear network Gauss-Newton is the Hessian.
    model = compiled(keras.Sequential([keras.Input((2,)), layers.Dense(3, kernel_regularizer="l2")]))
    assert isinstance(model.optimizer.curvature, GaussNewton)
    f, w = at(model, inputs(), targets())
    np.testing.assert_allclose(matrix(f, w), expected_at(model, w, inputs(), targets())[2], rtol=1e-9, atol=1e-12)


def test_random_layers_draw_the_same_numbers_in_every_call(float64):
    model = hessian_model(layers.Dropout(0.5))
    f, w = at(model, inputs(), targets())
    loss, gradient = f.loss_and_gradient(w)
    assert f.loss_at(w) == pytest.approx(loss, rel=1e-12)
    v = np.cos(np.arange(len(w)))
    slope = (f.loss_at(w + 1e-5 * v) - f.loss_at(w - 1e-5 * v)) / 2e-5
    assert slope == pytest.approx(gradient @ v, rel=1e-6)
    curved = (f.loss_and_gradient(w + 1e-5 * v)[1] - f.loss_and_gradient(w - 1e-5 * v)[1]) / 2e-5
    np.testing.assert_allclose(f.product(w, v), curved, rtol=1e-6, atol=1e-8)
    # Whatever is trained in between; another function has other numbers.
    model.optimizer.iterations.assign(7)
    assert f.loss_at(w) == pytest.approx(loss, rel=1e-12)
    assert model.objective(inputs(), targets()).loss_at(w) != pytest.approx(loss, rel=1e-3)


class Counting(layers.Layer):
    """Counts how often Python calls it, as tracing does."""

    calls = 0

    def call(self, x):
        type(self).calls += 1
        return x


def test_each_function_is_traced_once():
    f, w = at(hessian_model(Counting()), inputs(), targets())
    calls = lambda: [f.loss_at(w), f.loss_and_gradient(list(w)), f.product(w, tf.constant(w)), f.assign(w)]  # noqa: E731
    calls()
    before = Counting.calls
    w = w + 1.0
    calls()
    assert Counting.calls == before


def test_results_of_a_float32_network_are_float64():
    f, w = at(make_model(), inputs(), targets())
    gradient = f.loss_and_gradient(w)[1]
    assert gradient.dtype == f.product(w, w).dtype == f.weights.dtype == np.float64
    f.assign(w)
    np.testing.assert_array_equal(f.weights, w.astype("float32"))


def test_two_functions_of_one_model_keep_their_cases_and_share_its_weights(float64):
    model = make_model()
    (f, w), g = at(model, inputs(), targets()), model.objective(inputs()[:5], targets()[:5])
    assert g.loss_at(w) == pytest.approx(expected_at(model, w, inputs()[:5], targets()[:5])[0], rel=1e-12)
    assert f.loss_at(w) == pytest.approx(expected_at(model, w, inputs(), targets())[0], rel=1e-12)
    g.assign(w)
    np.testing.assert_array_equal(f.weights, w)


def test_weights_are_taken_as_they_are_whatever_their_constraint(float64):
    network = keras.Sequential([keras.Input((2,)), layers.Dense(3, kernel_constraint="non_neg")])
    model = compiled(network)
    f, w = at(model, inputs(), targets())
    assert f.loss_at(-np.abs(w)) == pytest.approx(expected_at(model, -np.abs(w), inputs(), targets())[0], rel=1e-12)


def test_replicas_share_the_cases(float64):
    # A sum would tell if a case counted twice, or none.
    arguments = {"regularizer": "l2", "loss": keras.losses.MeanSquaredError("sum")}
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = hessian_model(**arguments)
    f, w = at(model, inputs(), targets())
    alone = hessian_model(**arguments).objective(inputs(), targets())
    loss, gradient = f.loss_and_gradient(w)
    expected, expected_gradient = alone.loss_and_gradient(w)
    assert loss == pytest.approx(expected, rel=1e-12) and f.loss_at(w) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(f.product(w, gradient), alone.product(w, gradient), rtol=1e-9, atol=1e-12)


def test_scipy_minimises_it(float64):
    # A quadratic: solvers of second order need few steps.
    model = compiled(keras.Sequential([keras.Input((2,)), layers.Dense(3, kernel_regularizer="l2")]))
    f, w = at(model, inputs(), targets())
    found = optimize.minimize(f.loss_and_gradient, w, jac=True, hessp=f.product, method="trust-ncg", tol=1e-8)
    assert found.success and found.nit < 20
    f.assign(found.x)
    assert np.linalg.norm(f.loss_and_gradient(f.weights)[1]) < 1e-8


class Finite(layers.Layer):
    def call(self, x):
        return tf.debugging.check_numerics(x, "not finite")


def test_weights_are_as_before_where_the_network_raises():
    f, w = at(hessian_model(Finite()), inputs(), targets())
    f.assign(w)
    before = f.weights
    with pytest.raises(tf.errors.InvalidArgumentError, match="not finite"):
        f.loss_and_gradient(w * np.nan)
    np.testing.assert_array_equal(f.weights, before)


def test_a_model_that_is_not_compiled_says_so():
    model = HFModel(keras.Sequential([keras.Input((2,)), layers.Dense(3)]))
    with pytest.raises(ValueError, match=r"You must call `compile\(\)`"):
        model.objective(inputs(), targets())


def test_cases_and_vectors_of_wrong_sizes_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="x of 15, y of 14"):
        model.objective(inputs(), targets()[1:])
    with pytest.raises(ValueError, match="`y` must hold what the loss 'mse' compares"):
        model.objective(inputs())
    f = model.objective(inputs(), targets())
    for call in (f.loss_at, f.loss_and_gradient, f.assign, lambda w: f.product(w, f.weights)):
        with pytest.raises(ValueError, match=r"`w` must be a vector of shape \(27,\).*Received: shape=\(26,\)"):
            call(f.weights[1:])
    with pytest.raises(ValueError, match=r"`v` must be a vector of shape \(27,\).*Received: shape=\(27, 1\)"):
        f.product(f.weights, f.weights[:, None])


# For losses that are half a sum of squares: residuals and their Jacobian.


def dense_residuals(model, w, x, y, sample_weight, l2):
    """Residuals of "mse" by NumPy, of a 2-4-3 network of tanh, and their Jacobian by central differences."""

    def residuals(w):
        a, b, c, d = np.split(w, [8, 12, 24])
        outputs = np.tanh(x @ a.reshape(2, 4) + b) @ c.reshape(4, 3) + d
        root = np.sqrt(2 * (np.ones(15) if sample_weight is None else sample_weight) / 45)
        rows = (root[:, None] * (outputs - y)).reshape(-1)
        return np.concatenate([rows, np.sqrt(2 * l2) * a, np.sqrt(2 * l2) * d]) if l2 else rows

    columns = [(residuals(w + 1e-5 * v) - residuals(w - 1e-5 * v)) / 2e-5 for v in np.eye(len(w))]
    return residuals(w), np.stack(columns, 1)


ZERO_WEIGHTS = np.where(np.arange(15) % 4, WEIGHTS, 0)
SQUARES = [
    pytest.param(None, 0, id="plain", marks=pytest.mark.slow),
    pytest.param(WEIGHTS, 0, id="weights", marks=pytest.mark.slow),
    pytest.param(ZERO_WEIGHTS, 0.125, id="regularizers, and weights of 0"),
]


@pytest.mark.parametrize(("sample_weight", "l2"), SQUARES)
def test_residuals_and_jacobian_equal_those_by_numpy(float64, sample_weight, l2):
    model = make_model(regularizer=keras.regularizers.L2(l2) if l2 else None)
    f, w = at(model, inputs(), targets(), sample_weight)
    residuals, jacobian = f.residuals(w), f.jacobian(w)
    expected, expected_jacobian = dense_residuals(model, w, inputs(), targets(), sample_weight, l2)
    np.testing.assert_allclose(residuals, expected, rtol=1e-12, atol=1e-14)
    # Central differences of second order: their error is 1e-10.
    np.testing.assert_allclose(jacobian, expected_jacobian, rtol=1e-8, atol=1e-9)
    loss, gradient = f.loss_and_gradient(w)
    assert residuals @ residuals / 2 == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(jacobian.T @ residuals, gradient, rtol=1e-9, atol=1e-13)
    assert residuals.dtype == jacobian.dtype == np.float64


def test_residuals_of_two_outputs_with_loss_weights(float64):
    x = keras.Input((2,))
    h = layers.Dense(3, "tanh")(x)
    network = keras.Model(x, [layers.Dense(1)(h), layers.Dense(2)(h)])
    model = compiled(network, ["mse", "mse"], loss_weights=[1.0, 0.1])
    f, w = at(model, inputs(), [targets(1), targets(2)])
    residuals = f.residuals(w)
    loss, gradient = f.loss_and_gradient(w)
    assert residuals.shape == (45,) and residuals @ residuals / 2 == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(f.jacobian(w).T @ residuals, gradient, rtol=1e-9, atol=1e-13)


def test_least_squares_finds_the_minimum(float64):
    # A linear network with L2: the minimum by the normal equations.
    model = compiled(keras.Sequential([keras.Input((2,)), layers.Dense(3, kernel_regularizer="l2", use_bias=False)]))
    f, w = at(model, inputs(), targets())
    x = inputs()
    expected = np.linalg.solve(x.T @ x / 45 + 0.01 * np.eye(2), x.T @ targets() / 45)
    for method in ("trf", "lm"):
        found = optimize.least_squares(f.residuals, w, f.jacobian, method=method, xtol=1e-12, ftol=1e-12, gtol=1e-12)
        np.testing.assert_allclose(found.x.reshape(2, 3), expected, rtol=1e-7)
        assert found.cost == pytest.approx(f.loss_at(found.x), rel=1e-12)


@pytest.mark.parametrize("floatx", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_a_perfect_fit_has_residuals_of_rounding(floatx, request):
    if floatx == "float64":
        request.getfixturevalue("float64")
    model = compiled(keras.Sequential([keras.Input((2,)), layers.Dense(20, "tanh"), layers.Dense(3)]))
    x = inputs().astype(floatx)
    f = model.objective(x, model(x).numpy())
    assert np.abs(f.residuals(f.weights)).max() < 10 * np.finfo(floatx).eps


def test_residuals_may_be_other_than_finite(float64):
    # `least_squares` takes a shorter step then.
    f, w = at(make_model(), inputs(), targets())
    assert f.loss_at(w * 1e200) == np.inf and np.abs(f.residuals(w * 1e200)).max() > 1e190
    assert np.isnan(f.residuals(w * np.nan)).all()


NO_SQUARES = {
    "binary_crossentropy": lambda: make_model("sigmoid", "binary_crossentropy"),
    "huber": lambda: make_model(loss=keras.losses.Huber(delta=0.1)),
    "log_cosh": lambda: make_model(loss="log_cosh"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "log_cosh" else []) for name in NO_SQUARES]
)
def test_losses_without_squares_have_no_residuals(float64, name):
    f, w = at(NO_SQUARES[name](), inputs(), (targets() > 0).astype("float64"))
    with pytest.raises(
        ValueError, match=r"half a sum of squares, such as 'mse'.*Received: a loss of .*`loss_and_gradient` and"
    ):
        f.residuals(w)


class Absolute(keras.regularizers.Regularizer):
    """Keras' own L1 is float32 in Keras 3.12."""

    def __call__(self, weights):
        return 0.1 * tf.reduce_sum(tf.abs(weights))


@pytest.mark.parametrize("method", ["residuals", "jacobian"])
def test_models_without_rows_have_no_residuals(float64, method):
    for model, message in (
        (hessian_model(layers.BatchNormalization()), "with BatchNormalization.*use LayerNormalization"),
        (hessian_model(layers.Dropout(0.5)), "with random layers, such as Dropout"),
        (hessian_model(layers.ActivityRegularization(l2=0.1)), "with losses added in `call`"),
        (make_model(regularizer=Absolute()), r"Received: regularizer=.*Use `keras.regularizers.L2`"),
    ):
        f = model.objective(inputs(), targets())
        with pytest.raises(ValueError, match=message):
            getattr(f, method)(f.weights)


def test_a_jacobian_that_is_too_large_says_so(float64, monkeypatch):
    monkeypatch.setattr(jacobian, "_KEPT_FLOATS", 45 * 27 - 1)
    f = make_model().objective(inputs(), targets())
    with pytest.raises(ValueError, match="formed up to 1 GiB.*Received: more, with 27 weights. Use fewer cases"):
        f.jacobian(f.weights)
    # Residuals need none.
    assert f.residuals(f.weights).shape == (45,)


def test_residuals_are_of_one_replica():
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = make_model()
    f = model.objective(inputs(), targets())
    with pytest.raises(ValueError, match="on one replica. Received: a strategy with 2"):
        f.residuals(f.weights)
