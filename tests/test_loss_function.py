"""What the public door to the objective promises: Keras' loss, its gradient and curvature as plain functions of one vector."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import compiled, hessian_free, inputs, loss_and_gradient, loss_derivatives, make_model, model_data
from scipy import optimize
from training import assert_equal, normal

from keras_hf import EmpiricalFisherDiagonal, GaussNewton, Hessian, HFModel
from keras_hf.differentiation import jacobian


def targets(size=3):
    return normal(15, size, seed=3)


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
    "regularizers and weights, in micro-batches, whatever the chunk": (
        lambda: hessian_model(regularizer=keras.regularizers.L2(0.1), micro_batch_size=4, curvature_batch_size=5),
        WEIGHTS,
    ),
    "sum, added losses and batch normalization": (
        lambda: hessian_model(
            layers.BatchNormalization(),
            layers.ActivityRegularization(l2=0.1),
            loss=keras.losses.MeanSquaredError("sum"),
        ),
        None,
    ),
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
    assert_equal(every_value(model), before)


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


class Watched(layers.Layer):
    """Counts how often Python calls it, as tracing does, and raises an error for numbers that are not finite."""

    calls = 0

    def call(self, x):
        type(self).calls += 1
        return tf.debugging.check_numerics(x, "not finite")


def test_results_of_a_float32_network_are_float64_and_each_function_is_traced_once():
    f, w = at(hessian_model(Watched()), inputs(), targets())

    def results():
        return [f.loss_and_gradient(list(w))[1], f.product(w, tf.constant(w)), f.loss_at(w)]

    gradient, product, _ = results()
    assert gradient.dtype == product.dtype == f.weights.dtype == np.float64
    f.assign(w)
    np.testing.assert_array_equal(f.weights, w.astype("float32"))
    before = Watched.calls
    w = w + 1.0
    results()
    assert Watched.calls == before
    # Where the network raises, weights are as before.
    with pytest.raises(tf.errors.InvalidArgumentError, match="not finite"):
        f.loss_and_gradient(w * np.nan)
    np.testing.assert_array_equal(f.weights, (w - 1.0).astype("float32"))


def test_two_functions_of_one_model_keep_their_cases_and_share_its_weights_whatever_their_constraint(float64):
    model = compiled(keras.Sequential([keras.Input((2,)), layers.Dense(3, kernel_constraint="non_neg")]))
    (f, w), g = at(model, inputs(), targets()), model.objective(inputs()[:5], targets()[:5])
    w = -np.abs(w)
    assert g.loss_at(w) == pytest.approx(expected_at(model, w, inputs()[:5], targets()[:5])[0], rel=1e-12)
    assert f.loss_at(w) == pytest.approx(expected_at(model, w, inputs(), targets())[0], rel=1e-12)
    g.assign(w)
    np.testing.assert_array_equal(f.weights, w)


def test_replicas_share_the_cases_but_residuals_are_of_one(float64):
    # A sum would tell if a case counted twice, or none.
    arguments = {"regularizer": "l2", "loss": keras.losses.MeanSquaredError("sum")}
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = hessian_model(**arguments)
    f, w = at(model, inputs(), targets())
    expected, expected_gradient, hessian = expected_at(hessian_model(**arguments), w, inputs(), targets())
    loss, gradient = f.loss_and_gradient(w)
    assert loss == pytest.approx(expected, rel=1e-12) and f.loss_at(w) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(f.product(w, gradient), hessian @ gradient, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="on one replica. Received: a strategy with 2"):
        f.residuals(w)


@functools.cache
def linear():
    """The model, function and other weights of a linear network with L2: a quadratic, of which Gauss-Newton is the Hessian."""
    model = compiled(keras.Sequential([keras.Input((2,)), layers.Dense(3, kernel_regularizer="l2")]))
    return model, *at(model, inputs(), targets())


def test_products_are_with_the_compiled_curvature(float64):
    model, f, w = linear()
    assert isinstance(model.optimizer.curvature, GaussNewton)
    np.testing.assert_allclose(matrix(f, w), expected_at(model, w, inputs(), targets())[2], rtol=1e-9, atol=1e-12)


def test_scipy_minimises_it(float64):
    # Of a quadratic solvers of second order need few steps.
    _, f, w = linear()
    found = optimize.minimize(f.loss_and_gradient, w, jac=True, hessp=f.product, method="trust-ncg", tol=1e-8)
    assert found.success and found.nit < 20
    assert np.linalg.norm(f.loss_and_gradient(found.x)[1]) < 1e-8


def test_least_squares_finds_the_minimum(float64):
    _, f, w = linear()
    # By the normal equations.
    x = np.concatenate([inputs(), np.ones((15, 1))], 1)
    expected = np.linalg.solve(x.T @ x / 45 + np.diag([0.01, 0.01, 0]), x.T @ targets() / 45)
    for method in ("trf", "lm"):
        found = optimize.least_squares(f.residuals, w, f.jacobian, method=method, xtol=1e-12, ftol=1e-12, gtol=1e-12)
        np.testing.assert_allclose(found.x.reshape(3, 3), expected, rtol=1e-7)
        assert found.cost == pytest.approx(f.loss_at(found.x), rel=1e-12)


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


def dense_residuals(w, x, y, sample_weight, l2):
    """Residuals of "mse" by NumPy, of a 2-4-3 network of tanh, and their Jacobian by central differences."""

    def residuals(w):
        a, b, c, d = np.split(w, [8, 12, 24])
        outputs = np.tanh(x @ a.reshape(2, 4) + b) @ c.reshape(4, 3) + d
        rows = np.sqrt(2 * sample_weight / 45)[:, None] * (outputs - y)
        return np.concatenate([rows.reshape(-1), np.sqrt(2 * l2) * a, np.sqrt(2 * l2) * d])

    columns = [(residuals(w + 1e-5 * v) - residuals(w - 1e-5 * v)) / 2e-5 for v in np.eye(len(w))]
    return residuals(w), np.stack(columns, 1)


def test_residuals_and_jacobian_equal_those_by_numpy(float64):
    model, sample_weight = make_model(regularizer=keras.regularizers.L2(0.125)), np.where(np.arange(15) % 4, WEIGHTS, 0)
    f, w = at(model, inputs(), targets(), sample_weight)
    residuals, jacobian = f.residuals(w), f.jacobian(w)
    expected, expected_jacobian = dense_residuals(w, inputs(), targets(), sample_weight, 0.125)
    np.testing.assert_allclose(residuals, expected, rtol=1e-12, atol=1e-14)
    # Central differences of second order: their error is 1e-10.
    np.testing.assert_allclose(jacobian, expected_jacobian, rtol=1e-8, atol=1e-9)
    loss, gradient = f.loss_and_gradient(w)
    assert residuals @ residuals / 2 == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(jacobian.T @ residuals, gradient, rtol=1e-9, atol=1e-13)
    assert residuals.dtype == jacobian.dtype == np.float64
    # They may be other than finite: `least_squares` takes a shorter step then.
    assert np.abs(f.residuals(w * 1e200)).max() > 1e190
    assert np.isnan(f.residuals(w * np.nan)).any()


def test_residuals_of_two_outputs_with_loss_weights(float64):
    x = keras.Input((2,))
    h = layers.Dense(3, "tanh")(x)
    network = keras.Model(x, [layers.Dense(1)(h), layers.Dense(2)(h)])
    model = compiled(network, ["mse", "mse"], loss_weights=[1.0, 0.1])
    y = [targets(1), targets(2)]
    f = model.objective(inputs(), y)
    residuals = f.residuals(f.weights)
    loss, gradient = loss_and_gradient(model, model_data(model, inputs(), y))
    assert residuals.shape == (45,) and residuals @ residuals / 2 == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(f.jacobian(f.weights).T @ residuals, gradient, rtol=1e-9, atol=1e-13)


def test_a_perfect_fit_has_residuals_of_rounding():
    model, x = make_model(), inputs().astype("float32")
    f = model.objective(x, model(x).numpy())
    assert np.abs(f.residuals(f.weights)).max() < 10 * np.finfo("float32").eps


@pytest.mark.parametrize(
    ("activation", "loss"),
    [
        ("sigmoid", "binary_crossentropy"),
        pytest.param("linear", keras.losses.Huber(delta=0.1), marks=pytest.mark.slow, id="huber"),
    ],
)
def test_losses_without_squares_have_no_residuals(float64, activation, loss):
    f, w = at(make_model(activation, loss), inputs(), (targets() > 0).astype("float64"))
    with pytest.raises(
        ValueError, match=r"half a sum of squares, such as 'mse'.*Received: a loss of .*`loss_and_gradient` and"
    ):
        f.residuals(w)


class Absolute(keras.regularizers.Regularizer):
    """Keras' own L1 is float32 in Keras 3.12."""

    def __call__(self, weights):
        return 0.1 * tf.reduce_sum(tf.abs(weights))


def test_models_without_rows_have_no_residuals_and_no_jacobian(float64):
    for model, message in (
        (hessian_model(layers.BatchNormalization()), "with BatchNormalization.*use LayerNormalization"),
        (hessian_model(layers.Dropout(0.5)), "with random layers, such as Dropout"),
        (hessian_model(layers.ActivityRegularization(l2=0.1)), "with losses added in `call`"),
        (make_model(regularizer=Absolute()), r"Received: regularizer=.*Use `keras.regularizers.L2`"),
    ):
        f = model.objective(inputs(), targets())
        for function in (f.residuals, f.jacobian):
            with pytest.raises(ValueError, match=message):
                function(f.weights)


def test_a_jacobian_that_is_too_large_says_so(float64, monkeypatch):
    monkeypatch.setattr(jacobian, "_KEPT_FLOATS", 45 * 27 - 1)
    f = make_model().objective(inputs(), targets())
    with pytest.raises(ValueError, match="formed up to 1 GiB.*Received: more, with 27 weights. Use fewer cases"):
        f.jacobian(f.weights)
    # Residuals need none.
    assert f.residuals(f.weights).shape == (45,)
