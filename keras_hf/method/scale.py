"""The scale of the curvature, computed in the first update: the first damping is a fraction of it, and the limits of the damping are relative to it.

Multiplying the loss by a constant multiplies its gradient and its curvature alike; the steps are the same if the damping is multiplied too.
"""

import numpy as np
import tensorflow as tf

from keras_hf.common.vectors import dot, epsilon


def curvature_scale(gradient, along_gradient, weights, first_share):
    """Returns the curvature along the gradient, `g'Gg / g'g`, a scalar > 0; 0 where the gradient is zero or not finite.

    If the loss has no curvature along the gradient, the scale follows from the norm of the gradient over that of the weights, so that the first step
    is as long as the weights.

    Args:
        gradient: Tensor `(n,)`, g.
        along_gradient: Float64 scalar, g'Gg without damping.
        weights: Tensor `(n,)`.
        first_share: Scalar, the first damping as a share of the scale.
    """
    squared = dot(gradient, gradient)
    rayleigh = tf.math.divide_no_nan(tf.abs(along_gradient), squared)
    length = tf.sqrt(dot(weights, weights))
    without = tf.sqrt(squared) / tf.where(length > 0, length, tf.ones_like(length)) / tf.cast(first_share, length.dtype)
    usable = tf.math.is_finite(rayleigh) & (rayleigh > 0)
    scale = tf.where(usable, rayleigh, without)
    return tf.cast(tf.where(tf.math.is_finite(scale) & (squared > 0), scale, tf.zeros_like(scale)), gradient.dtype)


def first_damping(scale, first_share):
    """Returns the damping of the first update, a share of the scale; NaN if the scale is not known yet."""
    unknown = tf.constant(float("nan"), scale.dtype)
    return tf.where(scale > 0, tf.cast(first_share, scale.dtype) * scale, unknown)


def damping_limits(scale, dtype, least_share):
    """Returns the least and the greatest damping that a rule may assign, as Python floats.

    Below the least, the damping is lost in the rounding of the curvature and of CG; above the greatest, steps are lost in that of the weights. The
    limits keep a run without usable information (a loss that is not finite, for example) from moving the damping so far that it takes hundreds of
    updates to return.

    Args:
        scale: Float, of the curvature.
        dtype: String, name of the float type.
        least_share: Float, the least damping relative to the scale; see `Solver.least_damping`.
    """
    rounding = epsilon(dtype)
    largest = float(np.finfo(dtype).max) / 1e6  # factors of a rule and products with a vector must not overflow
    return least_share * scale, min(scale / rounding**2, largest)
