"""Chooses a step by the true loss: which iterate of CG, and its step size. Depends only on `loss_at(step)` and numbers.

Martens (2010), section 4.6, and Nocedal & Wright (2006), section 3.1; the constants are those of Martens' released code.
"""

from typing import NamedTuple

import tensorflow as tf

from keras_hf.common.vectors import dot, num_rows

# The constant of sufficient decrease, the factor of each cut, and the number of cuts after which the step is rejected.
_ARMIJO, _SHORTEN, _MAX_CUTS = 1e-2, 0.8, 60
# A rise of the loss by more than this many standard errors is not noise.
_STANDARD_ERRORS = 2.0


class Backtrack(NamedTuple):
    """The row of the chosen iterate, its loss (float64), and the losses `(k,)` of all iterates, NaN where not computed."""

    row: tf.Tensor
    loss: tf.Tensor
    losses: tf.Tensor


class LineSearch(NamedTuple):
    """The chosen step size (0 = rejected), the loss there (float64) and the number of cuts."""

    step_size: tf.Tensor
    loss: tf.Tensor
    num_cuts: tf.Tensor


class Taken(NamedTuple):
    """The step that a search chose from a path.

    Attributes:
        row: int32 scalar, the candidate's row.
        candidate: Tensor `(n,)`; the weights move by `step_size * candidate`.
        candidate_loss: float64 scalar, the loss at the candidate itself.
        step_size: float64 scalar, 0 = rejected.
        loss: float64 scalar, the loss at the new weights; the loss at the start if the step is rejected.
        losses: float64 `(k,)`, the losses of the candidates, NaN where not computed.
        num_cuts: int32 scalar, the number of times that the step was shortened.
        start_loss: float64 scalar, the loss at the start, of the same cases as the other losses.
    """

    row: tf.Tensor
    candidate: tf.Tensor
    candidate_loss: tf.Tensor
    step_size: tf.Tensor
    loss: tf.Tensor
    losses: tf.Tensor
    num_cuts: tf.Tensor
    start_loss: tf.Tensor


def _or_infinity(loss):
    """Replaces a loss that is not finite by infinity, so that it counts as a rise."""
    return tf.where(tf.math.is_finite(loss), loss, tf.constant(float("inf"), loss.dtype))


def backtrack(loss_at, iterates):
    """Walks back from the last iterate while the loss does not rise.

    Later iterates of CG fit the curvature of a subset of the data; the loss on all data shows which iterates went too far. Of two equal losses the
    earlier iterate wins. Cost: one loss per iterate tried, at least two if there are two or more.

    Args:
        loss_at: Callable `(n,) -> float64 scalar`, the loss after that step.
        iterates: Tensor `(k, n)` or `SeparateRows`, k >= 1, in the order of CG.

    Returns:
        A `Backtrack`.
    """
    last = num_rows(iterates) - 1
    infinity = tf.constant(float("inf"), tf.float64)

    def going(row, *_):
        return row >= 0

    def go_back(row, chosen, loss, losses):
        at_row = loss_at(iterates[row])
        earlier = _or_infinity(at_row)
        no_worse = earlier <= loss
        # The loss rose: -2 ends the loop.
        return (
            tf.where(no_worse, row - 1, -2),
            tf.where(no_worse, row, chosen),
            tf.where(no_worse, earlier, loss),
            tf.tensor_scatter_nd_update(losses, [[row]], [at_row]),
        )

    none = tf.fill([last + 1], tf.constant(float("nan"), tf.float64))
    start = (last, last + 1, infinity, none)
    _, row, loss, losses = tf.while_loop(going, go_back, start, parallel_iterations=1)
    return Backtrack(row, loss, losses)


def walk_back(loss_at, candidates, loss, gradient, slopes=None):
    """Searches a path of CG iterates: `backtrack` chooses one, `line_search` shortens it.

    Args:
        loss_at: Callable `(n,) -> float64 scalar`, the loss after that step.
        candidates: Tensor `(k, n)` or `SeparateRows`, k >= 1, in the order of CG.
        loss: float64 scalar, the loss at the start.
        gradient: Tensor `(n,)`, the gradient at the start.
        slopes: float64 `(k,)`, its inner products with the candidates, the same on all workers; `None` = computed here.

    Returns:
        A `Taken`.
    """
    chosen = backtrack(loss_at, candidates)
    candidate = candidates[chosen.row]
    slope = dot(gradient, candidate) if slopes is None else slopes[chosen.row]
    found = line_search(loss_at, candidate, loss, chosen.loss, slope)
    return Taken(chosen.row, candidate, chosen.loss, found.step_size, found.loss, chosen.losses, found.num_cuts, loss)


def least_loss(losses_at, loss_at, candidates, loss, gradient):
    """Searches a path by looking at all of its candidates at once: the one of least loss is taken, if it is less than the loss at the start.

    Args:
        losses_at: Callable `(k, n) -> float64 (k,)`, the losses after several steps.
        loss_at: Not used, as every search gets it.
        candidates: Tensor `(k, n)`, k >= 1.
        loss: float64 scalar, the loss at the start.
        gradient: Not used.

    Returns:
        A `Taken`.
    """
    del loss_at, gradient
    losses = losses_at(candidates)
    compared = _or_infinity(losses)
    row = tf.argmin(compared, output_type=tf.int32)
    accepted = tf.math.is_finite(loss) & (compared[row] < loss)
    return Taken(
        row,
        candidates[row],
        losses[row],
        tf.where(accepted, tf.ones([], tf.float64), 0.0),
        tf.where(accepted, losses[row], loss),
        losses,
        tf.constant(0),
        loss,
    )


def accept_unless_loss_rises(change_at, are_few, loss_at, candidates, loss, gradient):
    """Takes the only candidate of a path, unless the loss rises there.

    Few cases are all looked at, and the step is rejected if their loss rises or is not finite. Of many cases a share is: then the step is rejected if
    the mean change of the share's loss is not finite, exceeds twice its standard error, or exceeds the loss itself: where a few cases of a classifier
    that is sure of the others go wrong, the error is as large as the change.

    Args:
        change_at: Callable `(n,) -> Change`, the effect of a step on a share of the cases.
        are_few: Bool scalar, whether the cases of the update are few.
        loss_at: Callable `(n,) -> float64 scalar`, the loss of all cases of the update after that step.
        candidates: Tensor `(1, n)`.
        loss: float64 scalar, the loss at the start, of all cases of the update.
        gradient: Not used.

    Returns:
        A `Taken`, whose losses are those of the cases looked at.
    """
    del gradient
    candidate = candidates[0]
    before, after, error = tf.cond(
        are_few,
        lambda: (loss, loss_at(candidate), tf.zeros([], tf.float64)),
        lambda: tuple(change_at(candidate)),
    )
    rise = after - before
    most = tf.minimum(_STANDARD_ERRORS * error, tf.maximum(tf.abs(loss), tf.abs(before)))
    accepted = tf.math.is_finite(loss) & tf.math.is_finite(rise) & (rise <= most)
    return Taken(
        tf.constant(0),
        candidate,
        after,
        tf.where(accepted, tf.ones([], tf.float64), 0.0),
        tf.where(accepted, after, before),
        after[None],
        tf.constant(0),
        before,
    )


def coarse_to_fine(losses_at):
    """Returns a function of the candidates along a curve that computes the losses of every second one, and of the neighbours of the best of these.

    On a curve whose loss has one valley it finds the least loss of all, at about half of the cost.

    Args:
        losses_at: Callable `(k, n) -> float64 (k,)`, the losses after several steps.

    Returns:
        Callable `(k, n) -> float64 (k,)`, k static; NaN where no loss was computed.
    """

    def losses_of(candidates):
        num_candidates = candidates.shape[0]
        coarse = losses_at(candidates[::2])
        best = 2 * tf.argmin(_or_infinity(coarse), output_type=tf.int32)
        neighbours = tf.clip_by_value(best + [-1, 1], 0, num_candidates - 1)
        fine = losses_at(tf.gather(candidates, neighbours))
        rows = tf.concat([tf.range(0, num_candidates, 2), neighbours], 0)
        unknown = tf.fill([num_candidates], tf.constant(float("nan"), tf.float64))
        return tf.tensor_scatter_nd_update(unknown, rows[:, None], tf.concat([coarse, fine], 0))

    return losses_of


def line_search(loss_at, step, loss, loss_at_step, slope):
    """Shortens a step until the loss satisfies Armijo's condition.

    Takes the largest step size in 1, 0.8, 0.64, ... with `loss_at(step_size * step) <= loss + 0.01 * step_size * slope`. It is 0 (rejected) after 60
    cuts, if the loss at the start is not finite, or if the slope is not negative, because then the inequality would allow the loss to rise.
    Cost: one loss per cut.

    Args:
        loss_at: Callable `(n,) -> float64 scalar`, the loss after that step.
        step: Tensor `(n,)`.
        loss: float64 scalar, the loss at step size 0.
        loss_at_step: float64 scalar, the loss at step size 1.
        slope: float64 scalar, the inner product of the gradient and `step`.

    Returns:
        A `LineSearch`.
    """
    possible = tf.math.is_finite(loss) & (slope < 0)

    def too_high(step_size, loss_there):
        # Not `~(loss_there <= ...)`: TensorFlow's graph optimizer turns that into `>`, which differs for NaN.
        return _or_infinity(loss_there) > loss + _ARMIJO * step_size * slope

    def go_on(step_size, loss_there, num_cuts):
        return possible & too_high(step_size, loss_there) & (num_cuts < _MAX_CUTS)

    def cut(step_size, loss_there, num_cuts):
        step_size = _SHORTEN * step_size
        return step_size, loss_at(tf.cast(step_size, step.dtype) * step), num_cuts + 1

    one = tf.ones([], tf.float64)
    step_size, loss_there, num_cuts = tf.while_loop(
        go_on, cut, (one, loss_at_step, tf.constant(0)), parallel_iterations=1
    )
    accepted = possible & ~too_high(step_size, loss_there)
    return LineSearch(tf.where(accepted, step_size, 0.0), tf.where(accepted, loss_there, loss), num_cuts)
