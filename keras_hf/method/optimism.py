"""How much of what updates gain on their own cases is missing on other cases: what a batch is too small for. Works on numbers only.

A step is fitted to the cases of its batch, noise included, and lowers their loss more than that of others: the optimism of the training error (Efron,
2004). For least squares with noise it is 2 d / N of the loss, N being the number of cases and d the effective number of parameters of the step, which
falls as the damping rises. The reduction ratio does not show it, since both of its numbers are of the batch.

The next batch shows it: its loss is computed at the weights after the last step, as for any update, and once more at those before it.

What is missing there is measured twice: as a share of the loss, and as half of a share of what was gained. The first is small where most of the loss
is noise that no step takes away; the second reaches a half where steps gain nothing on the next batch, and exceeds it where they do harm.
"""

from typing import NamedTuple

import tensorflow as tf

# Of the mean before an update: single batches are noisy.
_DECAY = 0.9


class Optimism(NamedTuple):
    """What is known of the batches so far, kept between updates; float64 scalars.

    Attributes:
        reduction: The decrease of the loss that the last step made on its own batch; 0 where there is nothing to compare with the next one.
        total: Sum over batches of what such reductions exceed those on the next batch by, as a share of its loss; each batch counts 0.9 times as much
            as the one after it.
        weight: The sum of these weights.
        gained: Sum over the same batches of the reductions themselves, in the same way.
    """

    reduction: tf.Tensor
    total: tf.Tensor
    weight: tf.Tensor
    gained: tf.Tensor

    @classmethod
    def unknown(cls):
        """Before the first update."""
        return cls(*[tf.constant(0.0, tf.float64)] * 4)

    def after(self, before, now):
        """Returns the record after another batch was seen.

        Args:
            before: float64 scalar, the loss of that batch at the weights before the last step.
            now: float64 scalar, its loss at the present weights.
        """
        # As shares of the loss, so that batches count alike.
        gained = tf.math.divide_no_nan(self.reduction, before)
        share = tf.math.divide_no_nan(self.reduction - (before - now), before)
        # As much as the whole loss at most: one bad batch says no more than that.
        share = tf.where(tf.math.is_finite(now), tf.clip_by_value(share, -1.0, 1.0), tf.ones_like(share))
        is_measured = (self.reduction != 0) & tf.math.is_finite(before) & (before > 0)
        after = self._replace(
            total=_DECAY * self.total + share,
            weight=_DECAY * self.weight + 1,
            gained=_DECAY * self.gained + gained,
        )
        return tf.nest.map_structure(lambda new, old: tf.where(is_measured, new, old), after, self)

    @property
    def size(self):
        """The mean share of the loss, or half that of the gains if it is larger, in [-1, 1], a float64 scalar; NaN before it was measured."""
        unknown = tf.constant(float("nan"), tf.float64)
        of_loss = tf.math.divide_no_nan(self.total, self.weight)
        of_gains = tf.math.divide_no_nan(self.total, self.gained)
        found = tf.maximum(of_loss, tf.minimum(of_gains, 2.0) / 2)
        return tf.where(self.weight > 0, found, unknown)
