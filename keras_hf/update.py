"""One Hessian-free update, in the order of Martens (2010): gradient, products, CG, backtracking, reduction ratio, line search."""

import functools
from typing import NamedTuple

import tensorflow as tf

from keras_hf.cg import CGStop, conjugate_gradient, dot
from keras_hf.convergence import Convergence, rounding_of
from keras_hf.scale import curvature_scale, first_damping
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
        damping: Scalar, the damping of this update: the one handed in or, where that was NaN, the one found. NaN where none can be found yet, since
            the gradient is zero or not finite.
        scale: Scalar, the scale of the curvature; see `scale.curvature_scale`.
        reduction_ratio: float64 scalar, actual over predicted reduction of the chunk's loss at step size 1, damping excluded from the prediction.
            Minus infinity where the chunk's loss rose or is not finite at the step. NaN where the update says nothing about the damping: the gradient
            is zero, loss or gradient are not finite at the start, or the change of the loss is too small to be told from rounding.
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
        convergence: `Convergence`, the memory of updates at rounding.
        preconditioner_state: Dict of tensors, the preconditioner's next state.
        trace: `UpdateTrace`, of the second solve where there were two.
    """

    step: tf.Tensor
    step_size: tf.Tensor
    loss: tf.Tensor
    gradient_norm: tf.Tensor
    damping: tf.Tensor
    scale: tf.Tensor
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
    convergence: Convergence
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
    scale=None,
    convergence=None,
    unseen_reduction=None,
    check=False,
):
    """Computes one update.

    Minimises `q(p) = g'p + p'(G + damping I)p / 2` by preconditioned CG from the decayed last solution, walks back over its iterates while the loss
    on all cases does not rise, and shortens the step until that loss falls enough. Cost: one gradient, the preconditioner, one product per CG
    iteration (two more for the start and the ratio), one loss per iterate looked at. Where the run has converged to rounding, CG is left out. The
    update that finds the scale of the curvature pays for half a product more.

    Args:
        objective: `objective.Objective`.
        damping: Scalar >= 0, the coefficient of the identity, in the scale of the loss; NaN = a share of the curvature's scale.
        warm_start: Tensor `(n,)`, the last CG iterate of the previous update.
        curvature: `curvature.Curvature`.
        preconditioner: `preconditioners.Preconditioner`.
        stopping: `stopping.StoppingRule`.
        max_cg_iterations: Integer.
        warm_start_decay: Float in [0, 1].
        preconditioner_state: Dict of tensors, what the preconditioner left in the update before; `None` for one that remembers nothing.
        scale: Scalar, the scale of the curvature where it is known; 0 or `None` = to be found.
        convergence: `Convergence`, the memory of updates at rounding; `None` = none.
        unseen_reduction: Callable `(n,) -> float64 scalar`, what the loss of cases that the update does not use falls by in a step, or `None`.
        check: Bool scalar, whether to compute the loss at the start a second time, and the chosen step's curvature another way, and to compare.
            Cost: about three gradients.

    Returns:
        An `HFUpdate`. Its step is rejected, too, where products or a repeated loss are off by more than rounding.

    References:
        Martens (2010), *Deep learning via Hessian-free optimization*, algorithm 2 and section 4.
    """
    at_start = objective.loss_and_gradient()
    gradient, gradient_norm = at_start.gradient, tf.sqrt(dot(at_start.gradient, at_start.gradient))
    scale = tf.zeros([], gradient.dtype) if scale is None else scale
    with tf.control_dependencies([gradient]):
        scale = tf.cond(
            scale > 0,
            lambda: scale,
            lambda: curvature_scale(gradient, objective.curvature_along(curvature, gradient), objective.start_vector),
        )
    damping = tf.where(tf.math.is_nan(damping), first_damping(scale), damping)
    used_damping, damping = damping, tf.where(tf.math.is_nan(damping), tf.ones_like(damping), damping)
    if convergence is None:
        convergence = Convergence(*[tf.zeros_like(damping)] * 3)
    is_at_rest = convergence.still_holds(tf.cast(gradient_norm, damping.dtype), damping)
    # One linearization, made by whoever needs it first.
    linearize = functools.cache(lambda: objective.product(curvature))
    # One after the other: a graph would run the three passes at once, and hold the activations of all three.
    with tf.control_dependencies([gradient, damping]):
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
    solution = _solve_again_from_zero(solve, decay * warm_start, gradient, is_at_rest, at_start.loss)
    step, slope = solution.step, dot(gradient, solution.step)

    # The ratio is judged on the chunk, whose curvature CG has seen, at step size 1, without the damping: Martens' released code.
    image = product(step)
    predicted_reduction = -(slope + 0.5 * dot(step, image))
    if objective.chunk_is_batch:
        actual_reduction = at_start.loss - solution.loss
    else:
        actual_reduction = objective.chunk_loss_at(tf.zeros_like(step)) - objective.chunk_loss_at(step)
    rounding = rounding_of(at_start.loss, objective.dtype)
    is_at_rounding = (tf.abs(predicted_reduction) <= rounding) | (actual_reduction == 0)
    is_measured = tf.math.is_finite(at_start.loss) & tf.math.is_finite(gradient_norm) & ~is_at_rounding
    reduction_ratio = _reduction_ratio(actual_reduction, predicted_reduction, is_measured)

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
        gradient_norm=gradient_norm,
        damping=used_damping,
        scale=scale,
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
        convergence=convergence.after(
            is_at_rounding,
            fell=accepted & (at_start.loss - search.loss > rounding),
            gradient_norm=tf.cast(gradient_norm, damping.dtype),
            damping=damping,
        ),
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


def _solve_again_from_zero(solve, start, gradient, is_at_rest, loss):
    """Solves from the warm start, and once more from zero where that gave no descent direction: its iterates are descent directions.

    At rest, nothing is solved: the step is zero, and the loss that at the start.
    """
    zero = tf.zeros_like(start)

    def useless(turn, solution):
        unmoved = (solution.num_iterations == 0) & (solution.reason != CGStop.CONVERGED)
        slope = dot(gradient, solution.step)
        # Not ~(slope < 0): TensorFlow's graph optimizer turns that into slope >= 0, which a slope that is no number is not.
        uphill = (slope >= 0) | tf.math.is_nan(slope)
        return ((turn == 0) & ~is_at_rest) | ((turn == 1) & (unmoved | uphill) & tf.reduce_any(start != 0))

    def again(turn, solution):
        return turn + 1, solve(tf.where(turn == 0, start, zero))

    numbers, none = tf.zeros([0], tf.float64), tf.constant(0)
    converged = tf.constant(int(CGStop.CONVERGED))
    nothing = _Solution(zero, loss, zero, none, none, converged, numbers, tf.zeros([0], tf.int32), numbers)
    shapes = tf.nest.map_structure(
        lambda tensor: tf.TensorShape([None]) if tensor.shape == [0] else tensor.shape, nothing
    )
    _, solution = tf.while_loop(
        useless, again, (none, nothing), shape_invariants=(none.shape, shapes), parallel_iterations=1
    )
    return solution


def _reduction_ratio(actual, predicted, is_measured):
    """The quotient; minus infinity where the loss rose or is not finite, NaN where nothing was measured."""
    fell = actual >= 0
    ratio = tf.where(fell, actual / predicted, tf.constant(-float("inf"), tf.float64))
    return tf.where(is_measured, ratio, tf.constant(float("nan"), tf.float64))
