"""The prior precision and the noise that make the data most probable: MacKay's evidence, from eigenvalues alone."""

import numpy as np

# Steps of the fixed point, and the change at which it ends.
_MOST_STEPS, _TOLERANCE = 500, 1e-10
# The ratio of prior precision to curvature is kept within these, relative to the mean eigenvalue.
_LIMITS = 1e-12, 1e12


def most_probable(spectrum, squared_weights, squares=None, num_values=None, variance=None):
    """Returns what makes the data most probable while the weights stay where they are: floats, the prior precision and the variance of the noise.

    The fixed point of `precision = gamma / w'w` and `variance = squares / (num_values - gamma)`, with gamma the number of weights that the data
    determine. The precision is relative to unit noise, as the spectrum is: that of the weights is it over the variance.

    Args:
        spectrum: Array `(n,)`, the eigenvalues of the curvature at unit noise.
        squared_weights: Float, w'w.
        squares: Float, the weighted sum of squared residuals; needed unless `variance` is given.
        num_values: Float, how many residuals there are.
        variance: Float, that of the noise; `None` = to be found.

    References:
        MacKay (1992), *A practical Bayesian framework for backpropagation networks*, section 3.3.
    """
    mean, is_given = spectrum.mean(), variance is not None
    if not is_given:
        variance = squares / num_values
    if not (np.isfinite(mean) and mean > 0 and squared_weights > 0):
        return 1.0, variance
    limits = [limit * mean for limit in _LIMITS]
    precision = np.clip(variance * len(spectrum) / squared_weights, *limits)
    for _ in range(_MOST_STEPS):
        before, gamma = precision, effective(spectrum, precision)
        if not is_given:
            variance = squares / max(num_values - gamma, 1.0)
        precision = np.clip(variance * gamma / squared_weights, *limits)
        if abs(precision - before) <= _TOLERANCE * before:
            break
    return float(precision), float(variance)


def noise_variance(spectrum, precision, squares, num_values):
    """Returns the variance of the noise of greatest evidence at a given prior precision, that of the weights; see `most_probable`."""
    variance = squares / num_values
    for _ in range(_MOST_STEPS):
        before = variance
        variance = squares / max(num_values - effective(spectrum, precision * variance), 1.0)
        if abs(variance - before) <= _TOLERANCE * before:
            break
    return float(variance)


def effective(spectrum, precision):
    """Returns gamma, how many weights the data determine, a float; the precision is relative to unit noise."""
    return np.sum(spectrum / (spectrum + precision))
