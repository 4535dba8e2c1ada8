"""When a run is at rounding: no step changes the loss by more than its float type can tell. Knows numbers only.

A step that is predicted to lower the loss by less than the rounding of the loss, or that leaves the loss exactly as it was, tells nothing: neither
the reduction ratio nor the line search can judge it. One such update may be due to a damping that is too large. Several, without a measurable
decrease between them while the damping came down, mean that there is nothing left to gain in this float type.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

# Updates at rounding, without a measurable decrease between them, after which the run has converged.
_PATIENCE = 5
# A gradient that is larger by this factor than those at rounding belongs to other cases or other weights: the run goes on.
_WAKE_FACTOR = 2.0


class Convergence(NamedTuple):
    """What is remembered between updates; scalars of the weights' dtype.

    Attributes:
        count: Updates at rounding since the loss last fell measurably.
        gradient_norm: The largest norm of the gradient among them.
        damping: The damping of the last of them.
    """

    count: tf.Tensor
    gradient_norm: tf.Tensor
    damping: tf.Tensor

    def still_holds(self, gradient_norm, damping):
        """Whether the run had converged and an update of this gradient norm and damping would find nothing new, a bool scalar."""
        same = (damping == self.damping) & (gradient_norm <= _WAKE_FACTOR * self.gradient_norm)
        return (self.count >= _PATIENCE) & same

    def after(self, is_at_rounding, fell, gradient_norm, damping):
        """Returns the memory after an update.

        Args:
            is_at_rounding: Bool scalar, whether the update's step was too small to be measured.
            fell: Bool scalar, whether the update lowered the loss by more than its rounding.
            gradient_norm: Scalar of the weights' dtype.
            damping: Scalar of the weights' dtype, that of the update.
        """
        woken = (self.count >= _PATIENCE) & ~self.still_holds(gradient_norm, damping)
        reset = fell | woken | ~tf.math.is_finite(gradient_norm)
        before = tf.nest.map_structure(lambda value: tf.where(reset, tf.zeros_like(value), value), self)
        now = Convergence(before.count + 1, tf.maximum(before.gradient_norm, gradient_norm), damping)
        counts = is_at_rounding & ~fell & tf.math.is_finite(gradient_norm)
        return tf.nest.map_structure(lambda new, old: tf.where(counts, new, old), now, before)

    @property
    def has_converged(self):
        """Whether enough updates in a row were at rounding, a bool scalar."""
        return self.count >= _PATIENCE


def rounding_of(loss, dtype):
    """What a change of a mean loss must exceed to be told from rounding: float64 scalar.

    Args:
        loss: float64 scalar.
        dtype: Float type that the losses of the cases are computed in.
    """
    return float(np.finfo(dtype.as_numpy_dtype).eps) * tf.abs(loss)
