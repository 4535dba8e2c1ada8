"""The loss for outliers: its values and its second derivative, and that a fit with one tenth of gross errors finds SciPy's parameters."""

import keras
import numpy as np
import pytest
from keras import layers
from scipy.optimize import least_squares

from keras_hf import Cauchy, DirectSolver, HessianFree, HFModel


def test_values_are_those_of_the_formula_and_near_zero_squares():
    y_true, y_pred = np.array([[0.0, 1.0], [2.0, -1.0]]), np.array([[3.0, 1.0], [2.5, 0.0]])
    per_case = Cauchy(scale=2.0, reduction=None)(y_true, y_pred)
    expected = np.mean(4 * np.log1p(np.array([[9 / 4, 0], [1 / 16, 1 / 4]])), 1)
    np.testing.assert_allclose(per_case, expected, rtol=1e-6)
    assert float(Cauchy(1.0)(np.zeros((1, 1)), np.full((1, 1), 1e-2))) == pytest.approx(1e-4, rel=1e-3)


def test_it_is_restored_from_its_configuration():
    loss = keras.losses.deserialize(keras.losses.serialize(Cauchy(0.3, reduction="sum", name="far")))
    assert (loss.scale, loss.reduction, loss.name) == (0.3, "sum", "far")


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), "1"])
def test_a_scale_that_is_not_positive_is_refused_by_name(scale):
    with pytest.raises(ValueError, match="`scale` must be a finite number > 0. Received: scale="):
        Cauchy(scale)


@pytest.mark.parametrize(
    "loss, scipy_loss, scale",
    [(Cauchy(0.3), "cauchy", 0.3), pytest.param(keras.losses.Huber(0.3), "huber", 0.3, marks=pytest.mark.slow)],
)
def test_a_line_with_gross_errors_has_the_parameters_that_scipy_finds(float64, loss, scipy_loss, scale):
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 60)[:, None]
    y = 2 * x + 1 + 0.1 * rng.normal(size=x.shape)
    y[::10] += 8
    model = HFModel(keras.Sequential([keras.Input((1,)), layers.Dense(1)]))
    model.compile(HessianFree(solver=DirectSolver()), loss=loss)
    model.fit(x, y, epochs=9, verbose=0)
    found = np.concatenate([weights.ravel() for weights in model.get_weights()])
    residuals = lambda w: w[0] * x[:, 0] + w[1] - y[:, 0]  # noqa: E731
    tolerances = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15)
    expected = least_squares(residuals, [1.0, 0.0], loss=scipy_loss, f_scale=scale, **tolerances).x
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(found, [2, 1], atol=0.15)
