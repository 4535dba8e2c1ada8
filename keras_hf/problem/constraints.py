"""Bounds and norms of weights: `Box`, which constraints are bounds or norms, and the directions that these leave.

Absil, Mahony & Sepulchre (2008), *Optimization algorithms on matrix manifolds*, section 4.1, on steps in the tangent space.
"""

import math

import keras
import numpy as np
import tensorflow as tf

from keras_hf.common.checks import bound
from keras_hf.common.vectors import epsilon, pack, unpack

# A norm is at its bound within so many machine epsilons.
_AT_NORM = 100.0


@keras.saving.register_keras_serializable("keras_hf")
class Box(keras.constraints.Constraint):
    """Keeps every entry of a weight within bounds: `lower <= w <= upper`.

    The step itself respects the bounds of this constraint and of `keras.constraints.NonNeg`: entries at a bound, towards which the loss falls, are
    left out of the quadratic model (the projected Newton method of Bertsekas 1982), and what leaves the box on the way is projected. A minimum at a
    bound is reached as one inside.

    Args:
        lower: Float, minus infinity = no bound.
        upper: Float, infinity = no bound.

    Raises:
        ValueError: If a bound is not a number, or `lower` is not less than `upper`.

    References:
        Bertsekas (1982), *Projected Newton methods for optimization problems with simple constraints*.
    """

    def __init__(self, lower=-np.inf, upper=np.inf):
        self.lower, self.upper = bound("lower", lower), bound("upper", upper)
        if not self.lower < self.upper:
            raise ValueError(f"`lower` must be less than `upper`. Received: lower={lower}, upper={upper}.")

    def __call__(self, w):
        return keras.ops.clip(w, self.lower, self.upper)

    def get_config(self):
        """Returns the arguments, a dict."""
        return {"lower": self.lower, "upper": self.upper}


def bounds_of(constraint):
    """Returns the bounds of a constraint that is a box, two floats; else minus infinity and infinity."""
    if isinstance(constraint, Box):
        return constraint.lower, constraint.upper
    return (0.0 if type(constraint) is keras.constraints.NonNeg else -np.inf), np.inf


def norms_of(constraint):
    """Returns the axes of a constraint of Keras on norms, the least and the greatest norm; `None` for another."""
    kind = type(constraint)
    if kind is keras.constraints.UnitNorm:
        return constraint.axis, 1.0, 1.0
    if kind is keras.constraints.MaxNorm:
        return constraint.axis, 0.0, constraint.max_value
    # With another rate it is approached, not kept.
    if kind is keras.constraints.MinMaxNorm and constraint.rate == 1:
        return constraint.axis, constraint.min_value, constraint.max_value
    return None


def projected(constraint, value):
    """Returns the nearest value that satisfies a constraint."""
    if constraint is None or norms_of(constraint) is None:
        return value if constraint is None else constraint(value)
    # Keras' own adds 1e-7 to the divisor: projected again and again, a weight would shrink.
    axis, least, greatest = norms_of(constraint)
    norm = tf.sqrt(tf.reduce_sum(value**2, axis, keepdims=True))
    return value * tf.math.divide_no_nan(tf.clip_by_value(norm, least, greatest), norm)


def where_violated(constraint, value):
    """Returns the projection if it differs from the value by more than rounding."""
    # Unknown constraints may add a small number to a divisor, too.
    tolerance = 1e-5 if norms_of(constraint) is None else _AT_NORM * epsilon(value.dtype)
    nearest, size = projected(constraint, value), tf.reduce_max(tf.abs(value))
    return tf.where(tf.reduce_any(tf.abs(nearest - value) > tolerance * size), nearest, value)


class Tangent:
    """The projection of vectors on the directions that constraints leave; see `tangent_space`.

    Args:
        mask: Tensor `(n,)`, 0 for weights that stay at a bound, else 1.
        normals: Tensor `(n,)`, of every norm that stays its unit vector, else zero.
        groups: Integers `(n,)`, which weights have a norm together; all 0 without norms.
        multipliers: Tensor `(n,)`, the curvature >= 0 that norms which stay add along their tangents.
    """

    def __init__(self, mask, normals, groups, multipliers):
        self._mask, self._normals, self._groups, self.multipliers = mask, normals, groups, multipliers
        self.has_norms = bool(np.any(groups))

    def __call__(self, vectors):
        """Returns the projections of a vector `(n,)`, or of each row of `(k, n)`."""
        kept = vectors * tf.cast(self._mask, vectors.dtype)
        if not self.has_norms:
            return kept
        normals = tf.cast(self._normals, vectors.dtype)
        along = tf.math.unsorted_segment_sum(tf.transpose(kept * normals), self._groups, self._groups.max() + 1)
        return kept - tf.transpose(tf.gather(along, self._groups)) * normals


def tangent_space(constraints, values, gradient):
    """Returns the directions in which weights may move, a `Tangent`; `None` where no constraint is a bound or a norm.

    Entries at a bound, and norms at theirs, stay if the loss falls beyond; of `UnitNorm` all norms do. Where a norm stays, a step p along its sphere
    turns the gradient, too: the loss gains the curvature `-g'w / w'w` (left out where it is negative, as Gauss-Newton's matrix leaves out others).

    Args:
        constraints: List of constraints, or `None`s.
        values: List of tensors, the weights.
        gradient: Tensor `(n,)`.
    """
    if not any(norms_of(c) or np.isfinite(bounds_of(c)).any() for c in constraints):
        return None
    parts, num_groups = [], 1
    for constraint, value, slope in zip(constraints, values, unpack(gradient, values), strict=True):
        lower, upper = bounds_of(constraint)
        is_held = ((value <= lower) & (slope > 0)) | ((value >= upper) & (slope < 0))
        normal, groups, multiplier = tf.zeros_like(value), np.zeros(value.shape, np.int32), tf.zeros_like(value)
        if norms_of(constraint):
            axis, least, greatest = norms_of(constraint)
            squared = tf.reduce_sum(value**2, axis, keepdims=True)
            inward, norm = tf.reduce_sum(slope * value, axis, keepdims=True), tf.sqrt(squared)
            slack = _AT_NORM * epsilon(value.dtype)
            stays = ((norm >= greatest * (1 - slack)) & (inward < 0)) | ((norm <= least * (1 + slack)) & (inward > 0))
            stays = tf.cast(stays, value.dtype)
            normal = stays * tf.math.divide_no_nan(value, norm)
            multiplier += stays * tf.maximum(-tf.math.divide_no_nan(inward, squared), 0)
            groups = groups + num_groups + np.arange(math.prod(squared.shape), dtype=np.int32).reshape(squared.shape)
            num_groups = groups.max() + 1
        parts.append((tf.cast(~is_held, value.dtype), normal, groups, multiplier))
    mask, normals, groups, multipliers = zip(*parts, strict=True)
    mask, normals, multipliers = (pack(of_weights, gradient.dtype) for of_weights in (mask, normals, multipliers))
    return Tangent(mask, normals, np.concatenate([of_weight.ravel() for of_weight in groups]), multipliers)
