"""Where the cases of a batch are: its order over all replicas, and each replica's share of any range of it.

Whatever chooses cases (the growing part, the curvature chunk, the cases of a preconditioner) chooses ranges of the order of all of them, so that the
choice does not depend on the number of replicas, and every replica has its share of every range.
"""

from typing import NamedTuple

import tensorflow as tf


class CaseRange(NamedTuple):
    """A range of a batch's cases, as one replica sees it.

    Attributes:
        counts: int32 `(replicas,)`, the number of cases of the batch that each replica holds.
        replica: int32 scalar or integer, the index of this replica.
        start: int32 scalar, the position in the batch of the range's first case. After the last case the batch starts again.
        num_cases: int32 scalar, the number of cases of the range, over all replicas.
    """

    counts: tf.Tensor
    replica: tf.Tensor
    start: tf.Tensor
    num_cases: tf.Tensor

    @classmethod
    def of_batch(cls, counts, replica=0):
        """The range of all cases."""
        counts = tf.convert_to_tensor(counts)
        return cls(counts, replica, tf.constant(0), tf.reduce_sum(counts))

    def first(self, num_cases):
        """The range of the first `num_cases` of this one."""
        return self._replace(num_cases=num_cases)

    def up_to(self, place):
        """Returns how many of the range's first `place` cases are on this replica, an int32 scalar."""
        return self._share(self.start + place) - self._share(self.start)

    @property
    def num_local(self):
        """The number of the range's cases on this replica, an int32 scalar."""
        return self.up_to(self.num_cases)

    def indices(self):
        """Returns the range's cases on this replica: their positions among the cases that it holds, int32 `(num_local,)`."""
        places = tf.range(self._share(self.start), self._share(self.start + self.num_cases))
        return places % tf.maximum(self.counts[self.replica], 1)

    def numbers(self, indices):
        """Returns the positions in the range of this replica's cases, of which `indices` are the positions among those of the range that it has."""
        if self.counts.shape[0] == 1:
            return indices
        # One table for all: the case at which the share of this replica reaches a number is the one that it has there.
        reached = self._share(self.start + tf.range(self.num_cases + 1)) - self._share(self.start)
        return tf.searchsorted(reached, indices + 1) - 1

    def _share(self, place):
        return share(place, self.counts, self.replica)


def share(place, counts, replica=0):
    """Returns how many of the first `place` cases of a batch are on one replica, int32.

    The cases of a replica are spread evenly over the batch. Shares never decrease as `place` grows, they add up to `place`, and a replica without
    cases has none. So cases `share(a)` to `share(b)` of every replica are `b - a` cases of the batch. After its last case the batch starts again.

    Args:
        place: int32 scalar, `(k,)` or integer, positions in the batch.
        counts: int32 `(replicas,)`, the number of cases that each replica holds.
        replica: int32 scalar or integer, the index of the replica.
    """
    if counts.shape[0] == 1:
        return tf.convert_to_tensor(place)
    return shares(place, counts)[replica]


def shares(place, counts):
    """Returns `share` of all replicas, int32 `(replicas,)` or `(replicas, k)`."""
    left, num_cases, found = tf.cast(place, tf.int64), tf.cast(tf.reduce_sum(counts), tf.int64), []
    # Each replica in turn takes its share of what is left: shares rounded independently would not add up.
    for held in tf.unstack(tf.cast(counts, tf.int64)):
        found.append((2 * left * held + num_cases) // tf.maximum(2 * num_cases, 1))  # to the nearest
        left, num_cases = left - found[-1], num_cases - held
    return tf.cast(tf.stack(found), tf.int32)


def by_replica(num_cases, num_replicas):
    """Returns the order in which a batch must be divided into equal parts, one after the other, so that each replica gets its share of any range.

    Args:
        num_cases: int32 scalar.
        num_replicas: Integer.

    Returns:
        int32 `(num_cases,)`: first the places of the first replica's cases, in order.
    """
    counts = parts_of_replicas(num_cases, num_replicas)
    taken = shares(tf.range(num_cases + 1), counts)
    owners = tf.argmax(taken[:, 1:] - taken[:, :-1], output_type=tf.int32)
    return tf.argsort(owners, stable=True)


def parts_of_replicas(num_cases, num_replicas):
    """Returns how TensorFlow divides a batch, of a size that it is not told, among replicas: int32 `(replicas,)`, full ones first."""
    full = (num_cases + num_replicas - 1) // num_replicas
    return tf.clip_by_value(num_cases - full * tf.range(num_replicas), 0, full)
