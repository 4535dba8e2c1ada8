"""One Hessian-free update, in the order of Martens (2010): gradient, products, CG, backtracking, reduction ratio, line search."""

import functools
from typing import NamedTuple

import tensorflow as tf

from keras_hf.cg import CGStop, conjugate_gradient, dot
from keras_hf.search import backtrack, line_search


class UpdateTrace(NamedTuple):
    """How an update came by its step.

    Attributes:
        values: float64 `(num_iterations + 1,)`, CG's quadratic at every iterate, the start among them.
        iterate_numbers: int32 `(k,)`, the iterates that CG kept; the last one is the last.
        losses: float64 `(k,)`, the loss of these, over all cases; NaN where backtracking did not look.
        num_cuts: int32 scalar, how often the line search shortened the step.
    """

    values: tf.Tensor
    iterate_numbers: tf.Tensor
    losses: tf.Tensor
    num_cuts: tf.Tensor


class HFUpdate(NamedTuple):
    """What one update found; nothing is assigned yet.

    Attributes:
        step: Tensor `(n,)`, the chosen CG iterate; the weights move by `step_size * step`.
        step_size: float64 scalar, 0 where the step is rejected.
        loss: float64 scalar, before the update.
        gradient_norm: float64 scalar.
        reduction_ratio: float64 scalar, actual over predicted reduction of the chunk's loss at step size 1, damping excluded from the prediction.
            Minus infinity where the chunk's loss rose or is not finite, NaN where the gradient is zero.
        warm_start: Tensor `(n,)`, the last CG iterate, zero after a rejection.
        states: List of tensors, the network's states after the pass at the start.
        num_iterations: int32 scalar, CG iterations run.
        chosen_iteration: int32 scalar, number of the chosen iterate.
        reason: int32 scalar, a `CGStop`.
        product_error: float64 scalar, how far the products are from `v'Gv = (Jv)'H(Jv)` and J from being the transpose of J', where that was checked;
            else 0.
        repeat_error: float64 scalar, by how much of itself the loss differed when computed again, where that was checked; else 0.
        actual_reduction: float64 scalar, what the loss falls by at the step size chosen.
        unseen_reduction: float64 scalar, what the loss of unseen cases falls by there; NaN without them.
        preconditioner_state: Dict of tensors, the preconditioner's next state.
        trace: `UpdateTrace`, of the second solve where there were two.
    """

    step: tf.Tensor
    step_size: tf.Tensor
    loss: tf.Tensor
    gradient_norm: tf.Tensor
    reduction_ratio: tf.Tensor
    warm_start: tf.Tensor
    states: list
    num_iterations: tf.Tensor
    chosen_iteration: tf.Tensor
    reason: tf.Tensor
    product_error: tf.Tensor
    repeat_error: tf.Tensor
    actual_reduction: tf.Tensor
    unseen_reduction: tf.Tensor
    preconditioner_state: dict
    trace: UpdateTrace


class _Solution(NamedTuple):
    """A solve by CG and the iterate that backtracking chose from it."""

    step: tf.Tensor
    loss: tf.Tensor
    last: tf.Tensor
    num_iterations: tf.Tensor
    chosen_iteration: tf.Tensor
    reason: tf.Tensor
    values: tf.Tensor
    iterate_numbers: tf.Tensor
    losses: tf.Tensor


def hf_update(
    objective,
    damping,
    warm_start,
    curvature,
    preconditioner,
    stopping,
    max_cg_iterations,
    warm_start_decay,
    preconditioner_state=None,
    unseen_reduction=None,
    check=False,
):
    """Computes one update.

    Minimises `q(p) = g'p + p'(G + damping I)p / 2` by preconditioned CG from the decayed last solution, walks back over its iterates while the loss
    on all cases does not rise, and shortens the step until that loss falls enough. Cost: one gradient, the preconditioner, one product per CG
    iteration (two more for the start and the ratio), one loss per iterate looked at.

    Args:
        objective: `objective.Objective`.
        damping: Scalar >= 0, the coefficient of the identity, in the scale of the loss.
        warm_start: Tensor `(n,)`, the last CG iterate of the previous update.
        curvature: `curvature.Curvature`.
        preconditioner: `preconditioners.Preconditioner`.
        stopping: `stopping.StoppingRule`.
        max_cg_iterations: Integer.
        warm_start_decay: Float in [0, 1].
        preconditioner_state: Dict of tensors, what the preconditioner left in the update before; `None` for one that remembers nothing.
        unseen_reduction: Callable `(n,) -> float64 scalar`, what the loss of cases that the update does not use falls by in a step, or `None`.
        check: Bool scalar, whether to compute the loss at the start a second time, and the chosen step's curvature another way, and to compare.
            Cost: about three gradients.

    Returns:
        An `HFUpdate`. Its step is rejected, too, where products or a repeated loss are off by more than rounding.

    References:
        Martens (2010), *Deep learning via Hessian-free optimization*, algorithm 2 and section 4.
    """
    at_start = objective.loss_and_gradient()
    gradient = at_start.gradient
    # One linearization, made by whoever needs it first.
    linearize = functools.cache(lambda: objective.product(curvature))
    # One after the other: a graph would run the three passes at once, and hold the activations of all three.
    with tf.control_dependencies([gradient]):
        state = preconditioner_state or {}
        precondition, preconditioner_state = preconditioner.inverse(objective, linearize, damping, state)
    with tf.control_dependencies([precondition(gradient)]):
        product = linearize()

    def solve(start):
        result = conjugate_gradient(
            lambda v: product(v) + damping * v, -gradient, start, precondition, stopping, max_cg_iterations
        )
        chosen = backtrack(objective.loss_at, result.iterates)
        return _Solution(
            step=result.iterates[chosen.row],
            loss=chosen.loss,
            last=result.iterates[-1],
            num_iterations=result.num_iterations,
            chosen_iteration=result.iterate_numbers[chosen.row],
            reason=result.reason,
            values=result.course,
            iterate_numbers=result.iterate_numbers,
            losses=chosen.losses,
        )

    decay = tf.constant(warm_start_decay, warm_start.dtype)
    solution = _solve_again_from_zero(solve, decay * warm_start, gradient)
    step, slope = solution.step, dot(gradient, solution.step)

    # The ratio is judged on the chunk, whose curvature CG has seen, at step size 1, without the damping: Martens' released code.
    image = product(step)
    predicted_reduction = -(slope + 0.5 * dot(step, image))
    if objective.chunk_is_batch:
        actual_reduction = at_start.loss - solution.loss
    else:
        actual_reduction = objective.chunk_loss_at(tf.zeros_like(step)) - objective.chunk_loss_at(step)
    reduction_ratio = _reduction_ratio(actual_reduction, predicted_reduction, gradient)

    search = line_search(objective.loss_at, step, at_start.loss, solution.loss, slope)
    product_error, repeat_error = tf.cond(
        tf.convert_to_tensor(check),
        lambda: (_product_error(objective, curvature, step, image), _repeat_error(objective, at_start.loss)),
        lambda: (tf.zeros([], tf.float64), tf.zeros([], tf.float64)),
    )
    wrong = (product_error > objective.rounding) | (repeat_error > objective.rounding)
    step_size = tf.where(wrong, tf.zeros([], tf.float64), search.step_size)
    accepted, nothing = step_size > 0, tf.constant(float("nan"), tf.float64)
    return HFUpdate(
        step=step,
        step_size=step_size,
        loss=at_start.loss,
        gradient_norm=tf.sqrt(dot(gradient, gradient)),
        reduction_ratio=reduction_ratio,
        # The last iterate, not the chosen one: CG goes on from where it stopped.
        warm_start=tf.where(accepted, solution.last, tf.zeros_like(solution.last)),
        states=at_start.states,
        num_iterations=solution.num_iterations,
        chosen_iteration=solution.chosen_iteration,
        reason=solution.reason,
        product_error=product_error,
        repeat_error=repeat_error,
        actual_reduction=at_start.loss - search.loss,
        unseen_reduction=unseen_reduction(tf.cast(step_size, step.dtype) * step) if unseen_reduction else nothing,
        preconditioner_state=preconditioner_state,
        trace=UpdateTrace(solution.values, solution.iterate_numbers, solution.losses, search.num_cuts),
    )


def _product_error(objective, curvature, step, image):
    """By how much the products contradict themselves: in the identity `v'Gv = (Jv)'H(Jv)` or in `u'(Jv) = (J'u)'v`."""
    adjointness = objective.adjointness_error(curvature, step)
    identity = objective.product_error(curvature, step, image)
    return identity if adjointness is None else tf.maximum(identity, adjointness)


def _repeat_error(objective, loss):
    """How much of itself the loss at the start differs by from a second one."""
    again = objective.loss_at(tf.zeros([objective.num_weights], objective.dtype))
    return tf.math.divide_no_nan(tf.abs(again - loss), tf.maximum(tf.abs(loss), tf.abs(again)))


def _solve_again_from_zero(solve, start, gradient):
    """Solves from the warm start, and once more from zero where that gave no descent direction: its iterates are descent directions."""
    zero = tf.zeros_like(start)

    def useless(turn, solution):
        unmoved = (solution.num_iterations == 0) & (solution.reason != CGStop.CONVERGED)
        slope = dot(gradient, solution.step)
        # Not ~(slope < 0): TensorFlow's graph optimizer turns that into slope >= 0, which a slope that is no number is not.
        uphill = (slope >= 0) | tf.math.is_nan(slope)
        return (turn == 0) | ((turn == 1) & (unmoved | uphill) & tf.reduce_any(start != 0))

    def again(turn, solution):
        return turn + 1, solve(tf.where(turn == 0, start, zero))

    number, numbers = tf.zeros([], tf.float64), tf.zeros([0], tf.float64)
    none = tf.constant(0)
    nothing = _Solution(zero, number, zero, none, none, none, numbers, tf.zeros([0], tf.int32), numbers)
    shapes = tf.nest.map_structure(
        lambda tensor: tf.TensorShape([None]) if tensor.shape == [0] else tensor.shape, nothing
    )
    _, solution = tf.while_loop(
        useless, again, (none, nothing), shape_invariants=(none.shape, shapes), parallel_iterations=1
    )
    return solution


def _reduction_ratio(actual, predicted, gradient):
    """The quotient; minus infinity where the loss rose or is no number, NaN where there was nothing to reduce."""
    fell = actual >= 0
    ratio = tf.where(fell, actual / predicted, tf.constant(-float("inf"), tf.float64))
    stationary = tf.reduce_all(gradient == 0)
    return tf.where(stationary, tf.constant(float("nan"), tf.float64), ratio)
