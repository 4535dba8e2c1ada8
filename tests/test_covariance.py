"""What `parameter_covariance` promises: the numbers of `scipy.optimize.curve_fit`, and infinity with a warning where there are none."""

import keras
import numpy as np
import pytest
from keras import layers
from problems import compiled
from scipy import optimize

from keras_hf import HFModel, ParameterCovariance, covariance

PARAMETERS = 2.0, 1.5, 0.5


class Decay(layers.Layer):
    """The formula `a exp(-b x) + c`, whose parameters are weights."""

    def build(self, shape):
        self.a, self.b, self.c = (
            self.add_weight(name=name, shape=(), initializer=keras.initializers.Constant(value))
            for name, value in zip("abc", PARAMETERS, strict=True)
        )

    def call(self, x):
        return self.a * keras.ops.exp(-self.b * x) + self.c


def formula(x, a, b, c):
    return a * np.exp(-b * x) + c


def decay(loss="mse", **arguments):
    return compiled(keras.Sequential([keras.Input((1,)), Decay()]), loss, **arguments)


def noisy(num_cases=40):
    rng = np.random.default_rng(0)
    x, sigma = np.linspace(0, 3, num_cases), rng.uniform(0.05, 0.2, num_cases)
    return x, formula(x, *PARAMETERS) + sigma * rng.normal(size=num_cases), sigma


def by_scipy(x, y, sigma=None, absolute_sigma=False):
    """Parameters and covariance by `curve_fit`, converged to rounding, so that the covariance is."""
    jac = lambda x, a, b, c: np.stack([np.exp(-b * x), -a * x * np.exp(-b * x), np.ones_like(x)], 1)  # noqa: E731
    return optimize.curve_fit(
        formula, x, y, PARAMETERS, sigma, absolute_sigma, jac=jac, xtol=1e-15, ftol=1e-15, gtol=1e-15
    )


def with_weights(model, w):
    for variable, value in zip(model.trainable_variables, w, strict=True):
        variable.assign(np.reshape(value, variable.shape))
    return model


CASES = {
    "plain": ("sum_over_batch_size", False, False),
    "weights": ("sum_over_batch_size", True, False),
    "absolute": ("sum_over_batch_size", False, True),
    "weights, absolute": ("sum", True, True),
    "mean by weights, absolute": ("mean_with_sample_weight", True, True),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name not in ("plain", "weights, absolute") else [])
        for name in CASES
    ],
)
def test_covariance_is_that_of_curve_fit(float64, name):
    reduction, is_weighted, absolute_sigma = CASES[name]
    x, y, sigma = noisy()
    sigma, sample_weight = (sigma, 1 / sigma**2) if is_weighted else (None, None)
    w, expected = by_scipy(x, y, sigma, absolute_sigma)
    model = with_weights(decay(keras.losses.MeanSquaredError(reduction)), w)
    found = model.parameter_covariance(x[:, None], y[:, None], sample_weight, absolute_sigma)
    np.testing.assert_allclose(found.matrix, expected, rtol=1e-6)
    assert isinstance(found, ParameterCovariance)


def test_standard_errors_have_the_paths_and_shapes_of_weights(float64):
    x = np.random.default_rng(1).normal(size=(30, 3))
    y = np.random.default_rng(2).normal(size=(30, 2))
    design = np.concatenate([x, np.ones([30, 1])], 1)
    w = np.linalg.lstsq(design, y)[0]
    model = with_weights(compiled(keras.Sequential([keras.Input((3,)), layers.Dense(2)])), [w[:3], w[3]])
    found = model.parameter_covariance(x, y)
    kernel, bias = model.trainable_variables
    assert list(found.standard_errors) == [kernel.path, bias.path]
    assert found.standard_errors[kernel.path].shape == (3, 2)
    np.testing.assert_allclose(found.standard_errors[bias.path], np.sqrt(np.diag(found.matrix)[6:]), rtol=1e-12)
    # Ordinary least squares: two targets with the same design, their residuals pooled.
    expected = np.linalg.inv(design.T @ design) * np.sum((y - design @ w) ** 2) / (60 - 8)
    np.testing.assert_allclose(found.matrix[:6:2, :6:2], expected[:3, :3], rtol=1e-9)
    np.testing.assert_allclose(found.matrix[6, 7], 0, atol=1e-15)


def test_weights_of_the_same_path_keep_an_entry_each():
    variables = [keras.Variable(np.zeros(shape), name="w") for shape in ((2,), (), (1, 2))]
    errors = covariance.by_weight(np.arange(5.0) ** 2, variables)
    assert {name: value.tolist() for name, value in errors.items()} == {"w_0": [0, 1], "w_1": 2, "w_2": [[3, 4]]}


@pytest.mark.parametrize("absolute_sigma", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_cases_of_weight_zero_do_not_count(float64, absolute_sigma):
    x, y, _ = noisy()
    w, expected = by_scipy(x, y, absolute_sigma=absolute_sigma)
    # Wild targets, so that they would be seen.
    x, y, weights = np.tile(x, 2)[:, None], np.concatenate([y, y + 100])[:, None], np.repeat([1.0, 0.0], len(x))
    found = with_weights(decay(), w).parameter_covariance(x, y, weights, absolute_sigma).matrix
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_case_that_says_nothing_counts_as_in_curve_fit(float64):
    # A line through the origin, one case at it.
    x = np.array([0.0, 1, 2, 3])
    y = np.array([0, 1.1, 1.9, 3.2])
    w, expected = optimize.curve_fit(lambda x, a: a * x, x, y)
    model = with_weights(compiled(keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])), w)
    np.testing.assert_allclose(model.parameter_covariance(x[:, None], y[:, None]).matrix, expected, rtol=1e-6)


class Redundant(Decay):
    def call(self, x):
        return (self.a * self.b) * x + self.c


def test_weights_that_the_data_do_not_determine_are_infinite(float64):
    x, y, _ = noisy()
    # That of a line's offset, but for the number of weights in the degrees of freedom.
    (slope, offset), line = optimize.curve_fit(lambda x, a, c: a * x + c, x, y)
    model = with_weights(compiled(keras.Sequential([keras.Input((1,)), Redundant()])), [slope / 2, 2, offset])
    message = "determine 2 combinations of 3 weights: the Jacobian is rank-deficient.*the 2 weights"
    with pytest.warns(UserWarning, match=message):
        matrix = model.parameter_covariance(x[:, None], y[:, None]).matrix
    assert np.isinf(matrix[:2]).all() and np.isinf(matrix[:, :2]).all()
    assert matrix[2, 2] == pytest.approx(line[1, 1] * 38 / 37, rel=1e-6)


@pytest.mark.parametrize(
    ("num_cases", "absolute_sigma", "message"),
    [(3, False, "needs more residuals than weights, not 3.*absolute_sigma=True"), (2, True, "rank-deficient")],
)
def test_too_few_cases_give_infinity(float64, num_cases, absolute_sigma, message):
    x, y, _ = noisy(3)
    with pytest.warns(UserWarning, match=message) as warned:
        found = decay().parameter_covariance(x[:num_cases, None], y[:num_cases, None], absolute_sigma=absolute_sigma)
    assert np.isinf(found.matrix).all() and np.isinf([*found.standard_errors.values()]).all()
    assert warned[0].filename == __file__


def test_units_of_weights_do_not_matter(float64):
    # Columns of the Jacobian whose lengths differ by 1e20.
    x = np.random.default_rng(1).normal(size=(30, 2))
    y = np.random.default_rng(2).normal(size=(30, 1))
    units = np.array([1e10, 1e-10])
    make = lambda: compiled(keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False)]))  # noqa: E731
    model, other = make(), make()
    w = np.linalg.lstsq(x, y)[0][:, 0]
    expected = with_weights(model, [w]).parameter_covariance(x, y).matrix / np.outer(units, units)
    found = with_weights(other, [w / units]).parameter_covariance(x * units, y).matrix
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_away_from_a_minimum_says_so(float64):
    x, y, _ = noisy()
    with pytest.warns(UserWarning, match="at a minimum of the loss, and these are not"):
        decay().parameter_covariance(x[:, None], y[:, None] + 1)


@pytest.mark.slow
def test_what_has_no_covariance_is_refused(float64):
    x, y, _ = noisy()
    x, y = x[:, None], y[:, None]
    with pytest.raises(ValueError, match="at most 5000 weights. Received: 6001 trainable weights. Freeze layers"):
        compiled(keras.Sequential([keras.Input((1,)), layers.Dense(2000), layers.Dense(1)])).parameter_covariance(x, y)
    with pytest.raises(ValueError, match="without regularizers.*Received: regularizers of .*r/kernel. Leave them out"):
        network = keras.Sequential([keras.Input((1,)), layers.Dense(1, kernel_regularizer="l2", name="r")])
        compiled(network).parameter_covariance(x, y)
    with pytest.raises(ValueError, match="half a sum of squares"):
        decay("binary_crossentropy").parameter_covariance(x, y)
    with pytest.raises(ValueError, match="`absolute_sigma` must be"):
        decay().parameter_covariance(x, y, absolute_sigma=1)
    inputs = keras.Input((1,))
    model = compiled(keras.Model(inputs, [Decay()(inputs), Decay()(inputs)]), ["mse", "mse"], loss_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="`absolute_sigma` needs residuals that are differences.*Compile one output"):
        model.parameter_covariance(x, [y, y], absolute_sigma=True)
    with pytest.raises(ValueError, match=r"You must call `compile\(\)`"):
        HFModel(keras.Sequential([keras.Input((1,)), Decay()])).parameter_covariance(x, y)
