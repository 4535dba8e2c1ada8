"""Which cases an update uses: the part of the batch, the curvature chunk, and the micro-batches in which they are processed.

Martens (2010), section 4.3: the gradient on all cases of the batch, products on a chunk of them. The batch is read as a ring that starts at the
chunk, so that the chunk is the first `chunk_size` cases and a union of whole micro-batches. Gradient, products, backtracking and line search then use
the same micro-batches, with the same random numbers and batch statistics in each.
"""

import math
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_hf.common.checks import count, finite, positive
from keras_hf.common.part import Part
from keras_hf.problem.case_range import CaseRange

# Twice as many still fit in an int32.
_LARGEST_SIZE = 2**29
# The ratio of a step is measured on the cases of a chunk.
_FEWEST_IN_CHUNK = 64


class MicroBatches(NamedTuple):
    """How the cases of one replica are divided: int32 scalars, where nothing else is said.

    Attributes:
        cases: `case_range.CaseRange`, the cases of the update.
        chunk_place: The position of the chunk's first case in the range.
        num_cases: Cases on this replica.
        chunk_start: The first of them that is in the curvature chunk.
        chunk_size: How many of them are in the chunk.
        micro_batch_size: Cases in a micro-batch; the last micro-batch of the chunk and the last of the rest may be smaller.
        chunk_is_one: Whether the chunk is one micro-batch for every batch that may come, a Python bool: then no loop over its
            micro-batches is traced.
    """

    cases: CaseRange
    chunk_place: tf.Tensor
    num_cases: tf.Tensor
    chunk_start: tf.Tensor
    chunk_size: tf.Tensor
    micro_batch_size: tf.Tensor
    chunk_is_one: bool = False

    @property
    def num_in_chunk(self):
        """Micro-batches in the chunk; they come first."""
        return _ceil_div(self.chunk_size, self.micro_batch_size)

    @property
    def num_in_batch(self):
        """Micro-batches in the batch."""
        return self.num_in_chunk + _ceil_div(self.num_cases - self.chunk_size, self.micro_batch_size)

    def indices(self, number):
        """Returns the positions in the batch, int32 `(cases,)`, of the cases of micro-batch `number`."""
        past_chunk = tf.maximum(number - self.num_in_chunk, 0)
        in_chunk = number < self.num_in_chunk
        start = tf.where(in_chunk, number * self.micro_batch_size, self.chunk_size + past_chunk * self.micro_batch_size)
        stop = tf.minimum(start + self.micro_batch_size, tf.where(in_chunk, self.chunk_size, self.num_cases))
        return self._around(start, stop)

    def chunk_indices(self):
        """Returns the positions in the batch, int32 `(chunk_size,)`, of the chunk's cases."""
        return self._around(0, self.chunk_size)

    def share_of_first(self, num_cases):
        """Returns how many of the first `num_cases` of the range, counted around from the chunk's first, are on this replica: an int32 scalar."""
        end = self.chunk_place + tf.minimum(num_cases, self.cases.num_cases)
        past = tf.maximum(end - self.cases.num_cases, 0)
        return self.cases.up_to(end - past) + self.cases.up_to(past) - self.chunk_start

    def _around(self, start, stop):
        return (self.chunk_start + tf.range(start, stop)) % tf.maximum(self.num_cases, 1)


class Selection(NamedTuple):
    """The cases of one update.

    Attributes:
        used: `case_range.CaseRange`, the cases that the update uses.
        unseen: `case_range.CaseRange`, as many cases after them; none if the update uses all.
    """

    used: CaseRange
    unseen: CaseRange


class Trial(NamedTuple):
    """The effect of an update on cases that it does not use.

    Attributes:
        num_cases: int32 scalar, the number of these cases, over all replicas.
        loss_before: float64 scalar, their loss before the update.
        loss_after: float64 scalar, their loss after it.
        variation: float64 scalar, the squared coefficient of variation (variance over squared mean) of the contributions of these cases to the loss
            after the update, weights included.
    """

    num_cases: tf.Tensor
    loss_before: tf.Tensor
    loss_after: tf.Tensor
    variation: tf.Tensor


@keras.saving.register_keras_serializable("keras_hf")
class GrowingBatch(Part):
    """Uses a part of the batch for each update, and enlarges it when updates generalise too little to unseen cases.

    While the error is large, redundant data do not need thousands of cases. Gradient, products, backtracking and line search of an update use the
    same cases: the first `initial_size` of the batch, in the next update those after them, and so on around the batch. A round is as many updates as
    visit the whole batch. Each round begins at a position drawn from the optimizer's seed, so that every case of each of several batches is used in
    turn.

    After each update its effect on the next cases, as many and unseen, is measured. It is a miss if their loss fell by less than `share` of the
    reduction on the cases used. After `patience` misses in a row the part is doubled. Where cases are noisy (rare classes, unequal weights), the
    first miss is enough: the part is then doubled until the standard error of its mean loss, weights included, is no more than `noise` of that mean.
    Where the part would be more than half of the batch, it is the whole batch. It never shrinks, not even between `fit` calls. With `rate` it grows
    besides by that fraction of itself in every update, whatever the misses: steps that are small and many need more cases before single ones miss.

    Loss and metrics in the logs are those of the cases used; `num_cases` is their number. Cases must not be ordered by label: `fit` permutes arrays
    once, or with `shuffle=False` takes the cases of a part evenly from all over the batch. Cost: the loss of as many cases again, twice.

    Args:
        initial_size: Integer >= 1, the number of cases of the first update, over all replicas.
        share: Float in [0, 1]. With 0 the part grows only where the loss of unseen cases rises.
        patience: Integer >= 1, the number of misses in a row after which the part is doubled.
        noise: Float > 0, the relative standard error of the mean loss above which one miss is enough. A large number leaves `patience` alone to
            decide.
        rate: Float >= 0, the growth in every update: 0.008 doubles the part in 87 updates.
        min_batch_size: Integer >= 1. Where there are several batches, those of fewer cases are used whole.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        Byrd, Chin, Nocedal & Wu (2012), *Sample size selection in optimization methods for machine learning*, choose the size by a variance over
        cases. To use the variance of the loss, and only after a miss, is our own choice, as is the rest of the rule. Martens & Grosse (2015),
        *Optimizing neural networks with Kronecker-factored approximate curvature*, grow by a constant rate.
    """

    def __init__(self, initial_size=250, share=0.3, patience=3, noise=0.125, rate=0.0, min_batch_size=1):
        self.initial_size = count("initial_size", initial_size)
        self.share = finite("share", share, 0, 1)
        self.patience = count("patience", patience)
        self.noise = positive("noise", noise)
        self.rate = finite("rate", rate, 0)
        self.min_batch_size = count("min_batch_size", min_batch_size)

    def initial_state(self, variables, layers):
        del variables, layers
        return {
            "size": tf.constant(min(self.initial_size, _LARGEST_SIZE)),
            "start": tf.constant(0),
            "misses": tf.constant(0),
        }

    def select(self, state, counts, replica=0, is_divided=True):
        """Returns the `Selection` of this update on one replica.

        Whether all cases are used, and how many, depends only on numbers that are the same on all replicas.

        Args:
            state: Dict, the state.
            counts: int32 `(replicas,)`, the number of cases that each replica holds.
            replica: int32 scalar or integer, the index of this replica.
            is_divided: Whether the batch is one of several.
        """
        batch, size, start = CaseRange.of_batch(counts, replica), state["size"], state["start"]
        uses_all = (2 * size > batch.num_cases) | (is_divided & (batch.num_cases < self.min_batch_size))
        size = tf.where(uses_all, batch.num_cases, size)
        # From the first case where all are used: that order is the same in every update, and so are the chunks.
        start = tf.where(uses_all, 0, start)
        used = batch._replace(start=start, num_cases=size)
        return Selection(used, used._replace(start=start + size, num_cases=tf.where(uses_all, 0, size)))

    def next_state(self, state, num_used, seen_reduction, trial, num_cases, turn):
        """Returns the state after an update.

        Args:
            state: Dict, the state before it.
            num_used: int32 scalar, the number of cases that the update used, over all replicas.
            seen_reduction: float64 scalar, the reduction of their loss.
            trial: `Trial`, the effect of the update on unseen cases.
            num_cases: int32 scalar, the number of cases in the batch, over all replicas.
            turn: int32 `(2,)`, the optimizer's seed and the number of updates before this one.
        """
        # A loss that was not finite before the step says nothing about it, nor does a rejected step. A loss that the step made not finite does.
        judged = (seen_reduction > 0) & (trial.num_cases > 0) & tf.math.is_finite(trial.loss_before)
        generalises = trial.loss_before - trial.loss_after >= self.share * seen_reduction
        missed = judged & ~generalises
        misses = tf.where(judged, tf.where(generalises, 0, state["misses"] + 1), state["misses"])
        doublings = tf.where(misses >= self.patience, 1, 0)
        doublings = tf.maximum(doublings, tf.where(missed, self._doublings(state["size"], trial.variation), 0))
        size = tf.minimum(state["size"], _LARGEST_SIZE // 2**doublings) * 2**doublings
        if self.rate:
            grown = tf.cast(tf.math.ceil(tf.cast(size, tf.float64) * (1 + self.rate)), tf.int32)
            # Not beyond what there is: another `fit` may have more cases.
            size = tf.where(2 * size > num_cases, size, grown)
        return {
            "size": size,
            # In the batch of all replicas.
            "start": (state["start"] + num_used + _jump(num_used, num_cases, turn)) % _LARGEST_SIZE,
            "misses": tf.where(doublings > 0, 0, misses),
        }

    def _doublings(self, size, variation):
        """How often to double the part until the standard error of its mean loss is no more than `noise` of the mean, int32 scalar."""
        wanted = variation / self.noise**2 / tf.cast(size, tf.float64)
        wanted = tf.where(tf.math.is_finite(wanted), tf.clip_by_value(wanted, 1.0, float(_LARGEST_SIZE)), 1.0)
        # Less than rounding, so that a power of two is one.
        return tf.cast(tf.math.ceil(tf.math.log(wanted) / math.log(2.0) - 1e-9), tf.int32)


def _jump(size, num_cases, turn):
    """Returns the number of cases between a part and the next: 0, except after the last part of a round.

    Without jumps each of several batches would always contribute the same part, as with a plain counter. If the batch is three parts or more, the
    part after a jump shares no case with the part before; if it is two, a jump may lead to the same part.
    """
    size = tf.maximum(size, 1)
    end = tf.where(3 * size <= num_cases, num_cases - 2 * size + 1, tf.maximum(num_cases, 1))
    drawn = tf.random.stateless_uniform([], tf.stack([turn[0], -2 - turn[1]]), 0, end, tf.int32)
    ends_round = (turn[1] + 1) % tf.maximum(_ceil_div(num_cases, size), 1) == 0
    # Where all cases are used, they are in every update.
    return tf.where(ends_round & (size < num_cases), drawn, 0)


def share_of(share, num_cases):
    """Returns the cases that make up a share, a float in (0, 1], of an int32 scalar of cases: rounded up, an int32 scalar."""
    return tf.cast(tf.math.ceil(share * tf.cast(num_cases, tf.float64)), tf.int32)


def chunk_of(share, num_cases):
    """Returns the cases of a chunk that is a share of an int32 scalar of cases, at least 64 if there are as many: fewer say too little of a step."""
    return tf.minimum(num_cases, tf.maximum(share_of(share, num_cases), _FEWEST_IN_CHUNK))


def order(num_cases, seed, number=-1):
    """Returns an order of cases, int32 `(num_cases,)`, drawn from two int32 scalars.

    Args:
        num_cases: int32 scalar.
        seed: The optimizer's seed.
        number: The number of updates before the first batch of this order; -1 for a batch that holds all cases, whose order stays.
    """
    seeds = tf.stack([tf.cast(seed, tf.int32), tf.cast(number, tf.int32)])
    return tf.random.experimental.stateless_shuffle(tf.range(num_cases), seed=seeds)


def spread(num_cases):
    """Returns an order in which every run of places has cases from all over the batch, int32 `(num_cases,)`.

    Cases are sorted by the fractions of multiples of the golden ratio: those of a run are at one of three distances from each other.
    """
    multiples = tf.cast(tf.range(num_cases), tf.float64) * ((1 + math.sqrt(5)) / 2)
    return tf.argsort(multiples % 1.0, stable=True)


def divide(cases, curvature_batch_size, micro_batch_size, update_number, seed, chunk_is_one=False):
    """Chooses the chunk of an update and divides one replica's cases into micro-batches.

    There are `ceil(num_cases / curvature_batch_size)` contiguous chunks; the last is shifted back so that it is full. Each round of that many updates
    visits all of them, in an order drawn from `(seed, round)`. With a plain counter, each of several batches would always get the same chunk.

    Args:
        cases: `case_range.CaseRange`, the cases of the update.
        curvature_batch_size: int32 scalar or integer, the number of cases wanted in the chunk, over all replicas, or `None` for all.
        micro_batch_size: Integer or int32 scalar, the number of cases in a micro-batch; `None` for one micro-batch for the chunk and one for the
            rest.
        update_number: int32 scalar, the number of updates before this one.
        seed: int32 scalar or integer.
        chunk_is_one: See `MicroBatches`.

    Returns:
        A `MicroBatches`.
    """
    num_cases = cases.num_cases
    if curvature_batch_size is None:
        place, size = tf.constant(0), num_cases
    else:
        size = tf.minimum(curvature_batch_size, num_cases)
        num_chunks = tf.maximum(_ceil_div(num_cases, tf.maximum(size, 1)), 1)
        turn = tf.stack([tf.cast(seed, tf.int32), update_number // num_chunks])
        turns = tf.random.experimental.stateless_shuffle(tf.range(num_chunks), seed=turn)
        place = tf.minimum(turns[update_number % num_chunks] * size, num_cases - size)
    start, num_local = cases.up_to(place), cases.num_local
    at_most = tf.maximum(num_local, 1)
    micro_batch_size = at_most if micro_batch_size is None else tf.minimum(micro_batch_size, at_most)
    return MicroBatches(
        cases, place, num_local, start, cases.up_to(place + size) - start, micro_batch_size, chunk_is_one
    )


def _ceil_div(a, b):
    return (a + b - 1) // b
