"""What `parameter_covariance` promises: the numbers of `scipy.optimize.curve_fit`, and infinity with a warning where there are none."""

import keras
import numpy as np
import pytest
from keras import layers
from problems import compiled
from scipy import optimize

from keras_hf import HessianFree, HFModel, ParameterCovariance
from keras_hf.posterior import covariance

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


def jacobian(x, a, b, c):
    return np.stack([np.exp(-b * x), -a * x * np.exp(-b * x), np.ones_like(x)], 1)


def decay(loss="mse", **arguments):
    return compiled(keras.Sequential([keras.Input((1,)), Decay()]), loss, **arguments)


def noisy(num_cases=40):
    rng = np.random.default_rng(0)
    x, sigma = np.linspace(0, 3, num_cases), rng.uniform(0.05, 0.2, num_cases)
    return x, formula(x, *PARAMETERS) + sigma * rng.normal(size=num_cases), sigma


def by_scipy(x, y, sigma=None, absolute_sigma=False):
    """Parameters and covariance by `curve_fit`, converged to rounding, so that the covariance is."""
    return optimize.curve_fit(
        formula, x, y, PARAMETERS, sigma, absolute_sigma, jac=jacobian, xtol=1e-15, ftol=1e-15, gtol=1e-15
    )


def with_weights(model, w):
    for variable, value in zip(model.trainable_variables, w, strict=True):
        variable.assign(np.reshape(value, variable.shape))
    return model


# Reduction of the loss, whether cases have weights, and `absolute_sigma`.
CASES = {
    "plain": ("sum_over_batch_size", False, False),
    "weights": ("sum_over_batch_size", True, False),
    "absolute": ("sum_over_batch_size", False, True),
    "weights, absolute": ("sum", True, True),
    "mean by weights, absolute": ("mean_with_sample_weight", True, True),
}


@pytest.mark.parametrize(
    "name", [name if name.startswith("weights") else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_covariance_is_that_of_curve_fit_without_cases_of_weight_zero(float64, name):
    reduction, is_weighted, absolute_sigma = CASES[name]
    x, y, sigma = noisy()
    w, expected = by_scipy(x, y, sigma if is_weighted else None, absolute_sigma)
    sample_weight = None
    if is_weighted:
        # Wild targets, so that they would be seen.
        x, y, sample_weight = np.tile(x, 2), np.concatenate([y, y + 100]), np.concatenate([1 / sigma**2, 0 * sigma])
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
    # Ordinary least squares: two targets with the same design, each with its own noise.
    squares = np.sum((y - design @ w) ** 2, 0)
    for column in range(2):
        expected = np.linalg.inv(design.T @ design) * squares[column] / (30 - 4)
        np.testing.assert_allclose(found.matrix[column:6:2, column:6:2], expected[:3, :3], rtol=1e-9)
    np.testing.assert_allclose(found.matrix[6, 7], 0, atol=1e-15)


def test_units_do_not_matter_and_a_case_that_says_nothing_counts_as_in_curve_fit(float64):
    x, y = np.random.default_rng(1).normal(size=(30, 2)), np.random.default_rng(2).normal(size=30)
    # A plane through the origin, and one case at it.
    x[0], y[0] = 0, 0
    w, expected = optimize.curve_fit(lambda x, *w: x @ w, x, y, (1, 1))
    # Columns of the Jacobian whose lengths differ by 1e20.
    units = np.array([1e10, 1e-10])
    network = keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False)])
    model = with_weights(compiled(network), [w / units])
    found = model.parameter_covariance(x * units, y[:, None]).matrix * np.outer(units, units)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_weights_of_the_same_path_keep_an_entry_each():
    variables = [keras.Variable(np.zeros(shape), name="w") for shape in ((2,), (), (1, 2))]
    errors = covariance.by_weight(np.arange(5.0) ** 2, variables)
    assert {name: value.tolist() for name, value in errors.items()} == {"w_0": [0, 1], "w_1": 2, "w_2": [[3, 4]]}


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


def test_too_few_cases_give_infinity(float64):
    x, y, _ = noisy(3)
    message = "needs more residuals than weights, not 3.*absolute_sigma=True"
    with pytest.warns(UserWarning, match=message) as warned:
        found = decay().parameter_covariance(x[:, None], y[:, None])
    assert np.isinf(found.matrix).all() and np.isinf([*found.standard_errors.values()]).all()
    assert warned[0].filename == __file__
    # Also where the variance is known, and fewer residuals than weights.
    rows = jacobian(x[:2], *PARAMETERS)
    with pytest.warns(UserWarning, match="determine 2 combinations of 3 weights.*rank-deficient"):
        matrix = covariance.covariance(np.array(PARAMETERS), rows, np.ones(2), np.zeros(2, int), np.ones(2), "float64")
    assert np.isinf(matrix).all()


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
    with pytest.raises(ValueError, match="without regularizers.*Received: a regularizer of .*r/kernel. Leave them out"):
        network = keras.Sequential([keras.Input((1,)), layers.Dense(1, kernel_regularizer="l2", name="r")])
        compiled(network).parameter_covariance(x, y)
    with pytest.raises(ValueError, match="half a sum of squares"):
        decay("binary_crossentropy").parameter_covariance(x, y)
    with pytest.raises(ValueError, match="`absolute_sigma` must be"):
        decay().parameter_covariance(x, y, absolute_sigma=1)
    with pytest.raises(ValueError, match="without regularizers.*Received: weight_decay=0.1. Leave them out"):
        model = HFModel(keras.Sequential([keras.Input((1,)), Decay()]))
        model.compile(HessianFree(weight_decay=0.1), "mse")
        model.parameter_covariance(x, y)
    with pytest.raises(ValueError, match=r"You must call `compile\(\)`"):
        HFModel(keras.Sequential([keras.Input((1,)), Decay()])).parameter_covariance(x, y)
