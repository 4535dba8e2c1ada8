"""Statistics of BatchNormalization's inputs: joined over micro-batches and replicas, and carried over from one update to the next."""

import contextlib
import itertools
from typing import NamedTuple

import tensorflow as tf

from keras_hf.common.replaced import replaced


class Statistics(NamedTuple):
    """Of the inputs of BatchNormalization layers: the number of cases, and lists of means and variances, in the type of flat vectors."""

    num_cases: tf.Tensor
    means: list
    variances: list

    def joined(self, other):
        """Returns those of both together; updates as in Chan, Golub & LeVeque (1983) cancel no digits."""
        num_cases = self.num_cases + other.num_cases
        share = tf.math.divide_no_nan(other.num_cases, num_cases)
        moves = [new - old for old, new in zip(self.means, other.means, strict=True)]
        return Statistics(
            num_cases,
            [mean + share * move for mean, move in zip(self.means, moves, strict=True)],
            [
                (1 - share) * old + share * new + share * (1 - share) * move**2
                for old, new, move in zip(self.variances, other.variances, moves, strict=True)
            ],
        )


def over_replicas(replicas, statistics, all_cases):
    """Joins the `Statistics` of all replicas.

    Args:
        replicas: `replicas.Replicas`.
        statistics: The `Statistics` of every replica, as `replicas` holds them.
        all_cases: Scalar, the cases of all replicas.

    Returns:
        Lists of means and of variances.
    """
    share = lambda local: tf.math.divide_no_nan(local.num_cases, all_cases)  # noqa: E731
    means = replicas.sum(lambda local: [share(local) * mean for mean in local.means], statistics)
    variances = replicas.sum(
        lambda local, means: [
            share(local) * (variance + (own - mean) ** 2)
            for variance, own, mean in zip(local.variances, local.means, means, strict=True)
        ],
        statistics,
        means,
    )
    return means, variances


def carried_over(old, start, end, fresh, is_variance):
    """Returns the statistic that the network keeps after an update.

    Args:
        old: Tensor, the one that it had, of more cases.
        start: Tensor, that of the update's cases before the step.
        end: Tensor, that of the same cases after it.
        fresh: Scalar, the share that `end` has in it; the rest is `old`, moved by what the step changed.
        is_variance: Whether it stays positive.
    """
    moved = old + end - start
    if is_variance:
        # What falls does so in proportion: variances stay positive.
        moved = tf.where(end < start, old * tf.math.divide_no_nan(end, start), moved)
    value = tf.where(fresh < 1, fresh * end + (1 - fresh) * moved, end)
    return tf.where(tf.reduce_all(tf.math.is_finite(value)), value, old)


@contextlib.contextmanager
def constant_statistics(layers):
    """Context in which these BatchNormalization layers use their moving statistics in training mode, too."""

    def call(layer):
        original = layer.call
        return lambda inputs, training=None, mask=None: original(inputs, training=False, mask=mask)

    with replaced(*[(layer, "call", call(layer)) for layer in layers]):
        yield


@contextlib.contextmanager
def own_statistics(layers):
    """Context in which these BatchNormalization layers assign the statistics of their inputs instead of moving averages.

    A layer that is called several times assigns the mean over its calls, which is what its moving averages tend to.
    """

    def call(layer):
        original, calls = layer.call, itertools.count()

        def counted(*args, **kwargs):
            number = next(calls)
            layer.momentum = number / (number + 1)
            return original(*args, **kwargs)

        return counted

    momenta = [(layer, "momentum", layer.momentum) for layer in layers]  # to be restored
    with replaced(*momenta, *[(layer, "call", call(layer)) for layer in layers]):
        yield
