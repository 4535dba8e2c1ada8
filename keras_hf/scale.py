"""The scale of the curvature, found in the first update: what the first damping is a share of, and what its limits are relative to.

A loss that is multiplied by a constant has its gradient and its curvature multiplied alike, and the same steps when the damping is multiplied, too.
"""

import numpy as np
import tensorflow as tf

from keras_hf.common.vectors import dot

# The first damping, as a share of the scale. Measured (benchmarks/first_damping.py): on shallow networks the loss after 30 updates differs little
# from 1e-4 to 1; on a deep autoencoder it is the smaller the larger the share, and what too small a start spoils stays spoiled.
_FIRST_SHARE = 0.1


def curvature_scale(gradient, along_gradient, weights):
    """Returns the curvature along the gradient, `g'Gg / g'g`, a scalar > 0; 0 where the gradient is zero or not finite.

    Where the loss has no curvature along it, the norm of the gradient over that of the weights, at which the first step is as long as the weights.

    Args:
        gradient: Tensor `(n,)`, g.
        along_gradient: Float64 scalar, g'Gg without damping.
        weights: Tensor `(n,)`.
    """
    squared = dot(gradient, gradient)
    rayleigh = tf.math.divide_no_nan(tf.abs(along_gradient), squared)
    length = tf.sqrt(dot(weights, weights))
    without = tf.sqrt(squared) / tf.where(length > 0, length, tf.ones_like(length)) / _FIRST_SHARE
    usable = tf.math.is_finite(rayleigh) & (rayleigh > 0)
    scale = tf.where(usable, rayleigh, without)
    return tf.cast(tf.where(tf.math.is_finite(scale) & (squared > 0), scale, tf.zeros_like(scale)), gradient.dtype)


def first_damping(scale):
    """Returns the damping of the first update, NaN where the scale is not known yet."""
    unknown = tf.constant(float("nan"), scale.dtype)
    return tf.where(scale > 0, tf.constant(_FIRST_SHARE, scale.dtype) * scale, unknown)


def damping_limits(scale, dtype):
    """Returns the least and the greatest damping that a rule may assign, Python floats: beyond them it has no effect that rounding leaves.

    Below the least, the damping is lost in the rounding of the curvature, and of what CG makes of it; above the greatest, steps are lost in that of
    the weights. Limits keep a run from which nothing can be learned (a loss that is not finite, say) from moving the damping so far that it takes
    hundreds of updates to come back.

    Args:
        scale: Float, of the curvature.
        dtype: String, name of the float type.
    """
    rounding = float(np.finfo(dtype).eps)
    largest = float(np.finfo(dtype).max) / 1e6  # factors of a rule and products with a vector must not overflow
    return rounding**2 * scale, min(scale / rounding**2, largest)
