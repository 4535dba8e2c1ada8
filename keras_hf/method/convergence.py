"""Detects convergence to rounding: no step changes the loss by more than its float type can resolve. Works on numbers only.

A step whose predicted reduction is below the rounding of the loss, or that leaves the loss exactly unchanged, cannot be judged by the reduction ratio
or the line search. One such update may be due to a damping that is too large, and each is while the damping exceeds the curvature. Several others,
without a measurable decrease between them although the damping fell, mean that the loss cannot be lowered further in this float type.
"""

from typing import NamedTuple

import tensorflow as tf

from keras_hf.common.vectors import epsilon

# Updates at rounding, without a measurable decrease between them, after which the run has converged.
_PATIENCE = 5
# A gradient larger than those at rounding by this factor belongs to other cases or other weights: the run continues.
_WAKE_FACTOR = 2.0


class Convergence(NamedTuple):
    """The record of updates at rounding, kept between updates; scalars of the weights' dtype, but for the losses.

    Attributes:
        count: Number of updates at rounding since the last measurable decrease of the loss.
        losses: float64 `(2,)`, the least and the greatest loss before these updates, zeros without any.
        gradient_norm: The largest gradient norm of these updates.
        damping: The damping of the last of them.
    """

    count: tf.Tensor
    losses: tf.Tensor
    gradient_norm: tf.Tensor
    damping: tf.Tensor

    @classmethod
    def unknown(cls, dtype):
        """The record before the first update."""
        zero = tf.zeros([], dtype)
        return cls(zero, tf.zeros([2], tf.float64), zero, zero)

    def still_holds(self, loss, rounding, gradient_norm, damping):
        """Whether the run has converged and an update would change nothing, a bool scalar.

        Other cases, and weights that were set, have another loss, whatever their gradient.

        Args:
            loss: float64 scalar, before the update.
            rounding: float64 scalar, that of the loss.
            gradient_norm: Scalar of the weights' dtype.
            damping: Scalar of the weights' dtype, the damping of the update.
        """
        same = (loss >= self.losses[0] - rounding) & (loss <= self.losses[1] + rounding)
        same &= (damping == self.damping) & (gradient_norm <= _WAKE_FACTOR * self.gradient_norm)
        return (self.count >= _PATIENCE) & same

    def after(self, is_at_rounding, fell, loss, rounding, gradient_norm, damping, scale):
        """Returns the record after an update.

        Args:
            is_at_rounding: Bool scalar, whether the effect of the update's step was too small to be measured.
            fell: Bool scalar, whether the update lowered the loss by more than its rounding.
            loss: float64 scalar, before the update.
            rounding: float64 scalar, that of the loss.
            gradient_norm: Scalar of the weights' dtype.
            damping: Scalar of the weights' dtype, the damping of the update.
            scale: Scalar of the weights' dtype, that of the curvature; 0 where it is not known.
        """
        woken = (self.count >= _PATIENCE) & ~self.still_holds(loss, rounding, gradient_norm, damping)
        reset = fell | woken | ~tf.math.is_finite(gradient_norm)
        unknown = self.unknown(damping.dtype)
        before = tf.nest.map_structure(lambda new, old: tf.where(reset, new, old), unknown, self)
        losses = tf.where(before.count == 0, loss, before.losses)
        losses = tf.stack([tf.minimum(losses[0], loss), tf.maximum(losses[1], loss)])
        now = Convergence(before.count + 1, losses, tf.maximum(before.gradient_norm, gradient_norm), damping)
        is_free = (damping <= scale) | (scale == 0)
        counts = is_at_rounding & is_free & ~fell & tf.math.is_finite(gradient_norm)
        return tf.nest.map_structure(lambda new, old: tf.where(counts, new, old), now, before)

    @property
    def has_converged(self):
        """Whether enough updates in a row were at rounding, a bool scalar."""
        return self.count >= _PATIENCE


def rounding_of(loss, dtype):
    """Returns the change of a mean loss below which it cannot be distinguished from rounding, a float64 scalar.

    Args:
        loss: float64 scalar.
        dtype: Float type in which the losses of the cases are computed.
    """
    return epsilon(dtype) * tf.abs(loss)
