"""The covariance of weights found by least squares, as `scipy.optimize.curve_fit` gives it."""

import warnings
from typing import NamedTuple

import keras
import numpy as np

from keras_hf.common.vectors import epsilon, vector_dtype

# An (n, n) matrix of float64 takes 200 MB there, and its singular values minutes.
_MOST_WEIGHTS = 5000


class ParameterCovariance(NamedTuple):
    """The covariance of trained weights; see `HFModel.parameter_covariance`.

    Attributes:
        matrix: Float64 `(n, n)`, in the order of flat vectors: that of `model.trainable_variables`, each flattened row by row.
        standard_errors: Dict, path of a weight -> float64 array of its shape, the roots of the diagonal.
    """

    matrix: np.ndarray
    standard_errors: dict


def parameter_covariance(model, x, y, sample_weight, absolute_sigma):
    """Returns the `ParameterCovariance` of a compiled model; see `HFModel.parameter_covariance`."""
    f, variables = model.objective(x, y, sample_weight), model.trainable_variables
    w = f.weights
    _require_few_weights(len(w))
    if regularized := [variable.path for variable in variables if variable.regularizer is not None]:
        raise ValueError(
            "`parameter_covariance` is that of least squares without regularizers, which bias the weights. "
            f"Received: regularizers of {', '.join(regularized)}. Leave them out."
        )
    residuals, jacobian = f.residuals(w), f.jacobian(w)
    is_empty = (residuals == 0) & ~jacobian.any(axis=1)
    num_residuals, variance = len(residuals), None
    if is_empty.any() or absolute_sigma:
        # Of outputs that exceed their targets by 1: what multiplies differences in the rows.
        targets = keras.tree.map_structure(lambda output: output - 1, model.predict(x, verbose=0))
        roots = model.objective(x, targets, sample_weight).residuals(w)
        num_residuals = np.count_nonzero(roots)
        if absolute_sigma:
            variance = residual_scale(roots, sample_weight)
    dtype = vector_dtype([variable.value for variable in variables]).as_numpy_dtype
    matrix = covariance(w, jacobian, residuals, variance, num_residuals, dtype)
    return ParameterCovariance(matrix, by_weight(np.diag(matrix), variables))


def _require_few_weights(num_weights):
    """Raises an error if there are too many weights for a dense matrix."""
    if num_weights > _MOST_WEIGHTS:
        raise ValueError(
            f"`parameter_covariance` forms a dense matrix, of at most {_MOST_WEIGHTS} weights. Received: {num_weights} trainable weights. "
            "Freeze layers (`layer.trainable = False`, then compile again), or take a smaller network."
        )


def residual_scale(roots, sample_weight):
    """Returns c, where the rows are `sqrt(c * sample_weight)` times differences of outputs and targets.

    Args:
        roots: Array `(rows,)`, the residuals of cases whose outputs exceed their targets by 1.
        sample_weight: Array that has one weight for each of as many entries, or `None`.

    Raises:
        ValueError: If there is no such number.
    """
    weights = np.ones(1) if sample_weight is None else np.asarray(sample_weight, "float64").reshape(-1)
    if len(roots) % len(weights) == 0:
        weights = np.repeat(weights, len(roots) // len(weights))
        scales = roots[weights > 0] ** 2 / weights[weights > 0]
        if len(scales) and scales.min() > (1 - 1e-3) * scales.max():
            return scales.mean()
    raise ValueError(
        "`absolute_sigma` needs residuals that are differences of outputs and targets with one weight for all, apart from sample weights. "
        "Received: other ones. Compile one output with the loss 'mse', without masks, or leave `absolute_sigma` out."
    )


def covariance(weights, jacobian, residuals, variance, num_residuals, dtype):
    """Returns the covariance `(n, n)`, infinite where it is not known, and warns there, and away from a minimum.

    Args:
        weights: Array `(n,)`.
        jacobian: Array `(rows, n)`.
        residuals: Array `(rows,)`.
        variance: Float, that of the residuals; `None` for their sum of squares by the degrees of freedom.
        num_residuals: Integer, the number of rows that count.
        dtype: Type that the rows were computed in.
    """
    num_weights = jacobian.shape[1]
    # Columns of one length: which weights the data determine does not depend on units.
    lengths = np.linalg.norm(jacobian, axis=0)
    lengths[lengths == 0] = 1
    triangle = np.linalg.qr(jacobian / lengths, mode="r")
    _, values, directions = np.linalg.svd(triangle)
    values = np.concatenate([values, np.zeros(num_weights - len(values))])
    kept = values > epsilon(dtype) * max(jacobian.shape) * values[0]
    rank = np.count_nonzero(kept)
    scaled = directions[kept] / values[kept, None]
    shift = scaled.T @ (scaled @ (jacobian.T @ residuals / lengths)) / lengths
    if variance is None and num_residuals <= num_weights:
        _warn(
            f"The covariance of {num_weights} weights needs more residuals than weights, not {num_residuals}. It is set to infinity. "
            "Hand over more cases, or hand over known variances: `sample_weight=1 / sigma**2, absolute_sigma=True`."
        )
        return np.full([num_weights, num_weights], np.inf)
    squares = np.sum(residuals**2)
    if variance is None:
        variance = squares / (num_residuals - num_weights)
    matrix = variance * (scaled.T @ scaled) / np.outer(lengths, lengths)
    if rank < num_weights:
        # What the data say nothing about: weights that a direction without curvature moves.
        is_free = np.linalg.norm(directions[~kept], axis=0) > np.sqrt(epsilon(dtype))
        matrix[is_free, :] = matrix[:, is_free] = np.inf
        _warn(
            f"The data determine {rank} combinations of {num_weights} weights: the Jacobian is rank-deficient. The covariance of the "
            f"{np.count_nonzero(is_free)} weights that are not determined is infinite. Take a model with fewer weights, or more and other cases."
        )
    elif np.sum((jacobian @ shift) ** 2) > 0.01 * squares and np.linalg.norm(shift) > 1e-4 * np.linalg.norm(weights):
        _warn(
            "The covariance is that of weights at a minimum of the loss, and these are not: a Gauss-Newton step would lower the loss by more "
            "than 1 %. Train on, to convergence."
        )
    return matrix


def by_weight(diagonal, variables):
    """Returns the roots of the diagonal, `(n,)`, as a dict: path of a weight -> array of its shape.

    Args:
        diagonal: Array `(n,)`.
        variables: List of `keras.Variable`.
    """
    paths = [variable.path for variable in variables]
    sizes = [int(np.prod(variable.shape)) for variable in variables]
    parts = np.split(np.sqrt(diagonal), np.cumsum(sizes)[:-1])
    # Layers of the same name in nested models have weights of the same path.
    names = [path if paths.count(path) == 1 else f"{path}_{paths[:i].count(path)}" for i, path in enumerate(paths)]
    return {name: part.reshape(variable.shape) for name, part, variable in zip(names, parts, variables, strict=True)}


def _warn(message):
    # The caller of `HFModel.parameter_covariance`.
    warnings.warn(message, stacklevel=5)
