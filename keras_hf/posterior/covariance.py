"""The covariance of weights found by least squares, as `scipy.optimize.curve_fit` gives it."""

import warnings
from typing import NamedTuple

import numpy as np

from keras_hf.common.vectors import epsilon, vector_dtype
from keras_hf.problem.observations import observations

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


def parameter_covariance(model, f, data, absolute_sigma):
    """Returns the `ParameterCovariance` of a compiled model; see `HFModel.parameter_covariance`.

    Args:
        model: `HFModel`.
        f: `LossFunction` of the cases.
        data: `Data`, tensors.
        absolute_sigma: Boolean.
    """
    w, variables = f.weights, model.trainable_variables
    _require_few_weights(len(w))
    regularized = [f"a regularizer of {variable.path}" for variable in variables if variable.regularizer is not None]
    if model.optimizer.weight_decay is not None and float(model.optimizer.weight_decay.numpy()) != 0:
        regularized.append(f"weight_decay={float(model.optimizer.weight_decay.numpy()):.3g}")
    if regularized:
        raise ValueError(
            "`parameter_covariance` is that of least squares without regularizers, which bias the weights. "
            f"Received: {', '.join(regularized)}. Leave them out, or ask for `laplace`, which takes them for a prior."
        )
    residuals, jacobian = f.residuals(w), f.jacobian(w)
    found = observations(model.setup_for(data).task, data, model.network(data.x, training=False))
    coefficients, weights, groups = (tensor.numpy().ravel() for tensor in found)
    is_observed = coefficients > 0
    rows = jacobian[is_observed], residuals[is_observed], groups[is_observed]
    variances = coefficients[is_observed] / weights[is_observed] if absolute_sigma else None
    dtype = vector_dtype([variable.value for variable in variables]).as_numpy_dtype
    matrix = covariance(w, *rows, variances, dtype)
    return ParameterCovariance(matrix, by_weight(np.diag(matrix), variables))


def _require_few_weights(num_weights):
    """Raises an error if there are too many weights for a dense matrix."""
    if num_weights > _MOST_WEIGHTS:
        raise ValueError(
            f"`parameter_covariance` forms a dense matrix, of at most {_MOST_WEIGHTS} weights. Received: {num_weights} trainable weights. "
            "Freeze layers (`layer.trainable = False`, then compile again), or take a smaller network."
        )


def covariance(weights, jacobian, residuals, groups, variances, dtype):
    """Returns the covariance `(n, n)`, infinite where it is not known, and warns there, and away from a minimum.

    Args:
        weights: Array `(n,)`.
        jacobian: Array `(rows, n)`.
        residuals: Array `(rows,)`.
        groups: Integers `(rows,)`, which rows have one variance.
        variances: Array `(rows,)`, those of the residuals; `None` = that of a group is the sum of its squares by its degrees of freedom.
        dtype: Type that the rows were computed in.
    """
    num_residuals, num_weights = jacobian.shape
    if variances is None and num_residuals <= num_weights:
        _warn(
            f"The covariance of {num_weights} weights needs more residuals than weights, not {num_residuals}. It is set to infinity. "
            "Hand over more cases, or hand over known variances: `sample_weight=1 / sigma**2, absolute_sigma=True`."
        )
        return np.full([num_weights, num_weights], np.inf)
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
    # An orthonormal basis of what the weights do to the residuals.
    basis = jacobian / lengths @ scaled.T
    if variances is None:
        variances = _variances_of_groups(basis, residuals, groups, num_weights - rank)[groups]
    is_one = variances.min() > (1 - 1e-6) * variances.max()
    middle = variances.mean() * np.eye(rank) if is_one else basis.T @ (variances[:, None] * basis)
    matrix = scaled.T @ middle @ scaled / np.outer(lengths, lengths)
    if rank < num_weights:
        # What the data say nothing about: weights that a direction without curvature moves.
        is_free = np.linalg.norm(directions[~kept], axis=0) > np.sqrt(epsilon(dtype))
        matrix[is_free, :] = matrix[:, is_free] = np.inf
        _warn(
            f"The data determine {rank} combinations of {num_weights} weights: the Jacobian is rank-deficient. The covariance of the "
            f"{np.count_nonzero(is_free)} weights that are not determined is infinite. Take a model with fewer weights, or more and other cases."
        )
    elif np.sum((jacobian @ shift) ** 2) > 0.01 * np.sum(residuals**2) and np.linalg.norm(
        shift
    ) > 1e-4 * np.linalg.norm(weights):
        _warn(
            "The covariance is that of weights at a minimum of the loss, and these are not: a Gauss-Newton step would lower the loss by more "
            "than 1 %. Train on, to convergence."
        )
    return matrix


def _variances_of_groups(basis, residuals, groups, num_open):
    """Returns the variance of every group's residuals, `(groups,)`: the sum of their squares by their number less the weights that they determine.

    A group with less than one degree of freedom, such as a condition at one point, has the variance of all residuals. Weights that the data leave
    open, `num_open`, are counted as well, as in `curve_fit`.
    """
    squares = np.bincount(groups, residuals**2)
    freedom = np.bincount(groups, 1 - np.sum(basis**2, 1) - num_open / len(groups))
    return np.where(freedom >= 1, squares / np.maximum(freedom, 1), squares.sum() / freedom.sum())


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
