"""The prior precision and the noise that make the data most probable at trained weights: MacKay's evidence."""

from typing import Any, NamedTuple

import numpy as np

# Steps of the fixed point, and the change at which it ends.
_MOST_STEPS, _TOLERANCE = 500, 1e-10
# The ratio of prior precision to curvature is kept within these, relative to the mean eigenvalue.
_LIMITS = 1e-12, 1e12
# The noise of a group is not taken to be less than this share of the largest variance: that of a condition which holds exactly.
_LEAST_NOISE = 1e-12


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


class GroupedFit(NamedTuple):
    """What `noise_of_groups` has found.

    Attributes:
        distribution: Of the weights, relative to `variance`; see `gaussian`.
        diagonal: Array `(n,)`, the prior's precision times `variance`.
        variances: Array `(groups,)`, those of the noise.
        variance: Float, that of the noise of all groups together.
    """

    distribution: Any
    diagonal: np.ndarray
    variances: np.ndarray
    variance: float


def noise_of_groups(parts, squares, num_values, prior, weights):
    """Finds the noise of groups of values that have each its own, the weights staying where they are: a `GroupedFit`.

    MacKay's fixed point for each group, `variance_g = squares_g / (num_values_g - gamma_g)`, with gamma_g the weights that its values determine
    beside those of the others, and `precision = gamma / w'w` with gamma their sum. Cost: a factorization in each of some tens of steps.

    Args:
        parts: List of the groups' curvatures at unit noise, all in one form of `gaussian`.
        squares: Array `(groups,)`, the weighted sums of squared residuals.
        num_values: Array `(groups,)`, how many values there are, each > 0.
        prior: Callable, the variance of all groups together -> the prior's precision times it, `(n,)`; `None` = by evidence.
        weights: Array `(n,)`.
    """
    form, sizes, gammas = type(parts[0]), np.array([part.trace for part in parts]), np.zeros(len(parts))

    def by_evidence(variance):
        mean, gamma = variance / variances @ sizes / len(weights), gammas.sum() or len(weights)
        ratio = variance * gamma / max(np.sum(weights**2), np.finfo("float64").tiny)
        return np.full(len(weights), np.clip(ratio, *(limit * mean for limit in _LIMITS)))

    for _ in range(_MOST_STEPS):
        variances = squares / np.maximum(num_values - gammas, 1.0)
        variances = np.maximum(variances, max(_LEAST_NOISE * variances.max(), np.finfo("float64").tiny))
        variance = squares.sum() / max(num_values.sum() - gammas.sum(), 1.0)
        diagonal = (prior or by_evidence)(variance)
        distribution = form.summed(parts, variance / variances).factorized(diagonal)
        before = gammas
        gammas = variance / variances * [distribution.trace_with(part) for part in parts]
        if np.all(np.abs(gammas - before) <= _TOLERANCE * num_values):
            break
    return GroupedFit(distribution, diagonal, variances, variance)


def effective(spectrum, precision):
    """Returns gamma, how many weights the data determine, a float; the precision is relative to unit noise."""
    return np.sum(spectrum / (spectrum + precision))
