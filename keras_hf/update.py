"""One Hessian-free update, in the order of Martens (2010): gradient, the solver's path, the search along it, reduction ratio.

Knows a solver by what every solver promises, and no Keras.
"""

import functools
from typing import Any, NamedTuple

import tensorflow as tf

from keras_hf.common.vectors import dot
from keras_hf.convergence import Convergence, rounding_of
from keras_hf.scale import curvature_scale, first_damping
from keras_hf.solvers.solver import LocalModel


class UpdateState(NamedTuple):
    """All that lives between updates: a nest of tensors, handed in and handed back, which the optimizer saves.

    Attributes:
        damping: Scalar >= 0 of the weights' dtype; NaN = the first update finds it.
        scale: Scalar of the weights' dtype, the curvature's; 0 = the first update finds it. See `scale.curvature_scale`.
        convergence: `Convergence`, the memory of updates at rounding.
        solver: Nest of tensors, what the solver remembers.
        curvature: Dict of tensors, what the curvature remembers.
        growing_batch: Dict of tensors, what the growing batch remembers; an update hands it on as it came.
        statistics_cases: Scalar of the weights' dtype, how many cases the statistics of BatchNormalization stand for; handed on as it came.
    """

    damping: tf.Tensor
    scale: tf.Tensor
    convergence: Convergence
    solver: Any
    curvature: dict
    growing_batch: dict
    statistics_cases: tf.Tensor


class UpdateResult(NamedTuple):
    """What one update found; nothing is assigned yet.

    Attributes:
        step: Tensor `(n,)`, by which the weights move; zero where the step is rejected.
        step_size: float64 scalar, the share of the solver's candidate that the step is; 0 where it is rejected.
        loss: float64 scalar, before the update.
        gradient_norm: float64 scalar.
        damping: Scalar, the damping of this update; NaN where none can be found yet, since the gradient is zero or not finite.
        reduction_ratio: float64 scalar, actual over predicted reduction of the chunk's loss at the candidate, damping excluded from the prediction.
            Minus infinity where the chunk's loss rose or is not finite at the candidate. NaN where the update says nothing about the damping: the
            gradient is zero, loss or gradient are not finite at the start, or the change of the loss is too small to be told from rounding.
        actual_reduction: float64 scalar, what the loss falls by in the step.
        unseen: What `unseen` gave of the step; `None` without it.
        state: `UpdateState`, for the next update.
        network_states: List of tensors, the network's states after the pass at the start.
        product_error: float64 scalar, how far the products of the first piece are from `v'Gv = (Jv)'H(Jv)` and J from being the transpose of J',
            where that was checked; else 0.
        repeat_error: float64 scalar, by how much of itself the loss differed when computed again, where that was checked; else 0.
        logs: Dict of scalars, the solver's own.
        trace: Dict of tensors, how the step was found: `losses` `(k,)` of the candidates, `num_cuts`, `num_products`, and what the solver adds.
    """

    step: tf.Tensor
    step_size: tf.Tensor
    loss: tf.Tensor
    gradient_norm: tf.Tensor
    damping: tf.Tensor
    reduction_ratio: tf.Tensor
    actual_reduction: tf.Tensor
    unseen: Any
    state: UpdateState
    network_states: list
    product_error: tf.Tensor
    repeat_error: tf.Tensor
    logs: dict
    trace: dict


def hf_update(objective, curvature, solver, state, unseen=None, check=False):
    """Computes one update.

    The solver makes a path of candidates from the quadratic model `q(p) = g'p + p'(G + damping I)p / 2`, a search picks the step from it by the
    loss on all cases, and the reduction ratio says how well the model predicted. Cost: one gradient, what solver and search spend, and one product
    for the ratio; one product more in the update that finds the scale of the curvature. Where the run has converged to rounding, hardly more than
    the gradient.

    Args:
        objective: `objective.Objective`.
        curvature: `curvature.Curvature`.
        solver: `solver.Solver`.
        state: `UpdateState`.
        unseen: Callable `(n,) -> nest of tensors`, what a step does to cases that the update does not use, or `None`.
        check: Bool scalar, whether to compute the loss at the start a second time, and the chosen step's curvature another way, and to compare.
            Cost: about three gradients.

    Returns:
        An `UpdateResult`. Its step is rejected, too, where products or a repeated loss are off by more than rounding.

    References:
        Martens (2010), *Deep learning via Hessian-free optimization*, algorithm 2 and section 4.
    """
    at_start = objective.loss_and_gradient()
    gradient, gradient_norm = at_start.gradient, tf.sqrt(dot(at_start.gradient, at_start.gradient))
    curvature, curvature_state = curvature.prepared(objective, state.curvature)
    # One linearization, for everybody who needs products.
    linearize = functools.cache(lambda: solver.linearize(objective, curvature))
    scale, found_damping = _scale_and_damping(objective, linearize, gradient, state)
    # Where there is none, there is no step either.
    damping = tf.where(tf.math.is_nan(found_damping), tf.ones_like(found_damping), found_damping)
    norm = tf.cast(gradient_norm, damping.dtype)
    is_at_rest = state.convergence.still_holds(norm, damping)

    model = LocalModel(objective, linearize, tf.where(is_at_rest, tf.zeros_like(gradient), gradient))
    path = solver.solve(model, damping, state.solver)
    taken = path.search(objective.loss_at, path.candidates, at_start.loss, gradient)

    # The ratio is judged on the chunk, whose curvature the solver has seen, at step size 1, without the damping: Martens' released code.
    product = linearize()
    image = product(taken.candidate)
    predicted_reduction = -(dot(gradient, taken.candidate) + 0.5 * dot(taken.candidate, image))
    if objective.chunk_is_batch:
        actual_reduction = at_start.loss - taken.candidate_loss
    else:
        nothing = tf.zeros_like(taken.candidate)
        actual_reduction = objective.chunk_loss_at(nothing) - objective.chunk_loss_at(taken.candidate)
    rounding = rounding_of(at_start.loss, objective.dtype)
    is_at_rounding = (tf.abs(predicted_reduction) <= rounding) | (actual_reduction == 0)
    is_measured = tf.math.is_finite(at_start.loss) & tf.math.is_finite(gradient_norm) & ~is_at_rounding

    product_error, repeat_error = tf.cond(
        tf.convert_to_tensor(check),
        lambda: (_product_error(product, taken.candidate), _repeat_error(objective, at_start.loss)),
        lambda: (tf.zeros([], tf.float64), tf.zeros([], tf.float64)),
    )
    wrong = (product_error > objective.rounding) | (repeat_error > objective.rounding)
    step_size = tf.where(wrong, tf.zeros([], tf.float64), taken.step_size)
    accepted = step_size > 0
    step = tf.cast(step_size, taken.candidate.dtype) * taken.candidate
    # Not 0 times a candidate that is not finite.
    step = tf.where(accepted, step, tf.zeros_like(step))
    reduction = at_start.loss - taken.loss
    return UpdateResult(
        step=step,
        step_size=step_size,
        loss=at_start.loss,
        gradient_norm=gradient_norm,
        damping=found_damping,
        reduction_ratio=_reduction_ratio(actual_reduction, predicted_reduction, is_measured),
        actual_reduction=reduction,
        unseen=unseen(step) if unseen else None,
        state=state._replace(
            damping=found_damping,
            scale=scale,
            convergence=state.convergence.after(is_at_rounding, accepted & (reduction > rounding), norm, damping),
            solver=path.next_state(step),
            curvature=curvature_state,
        ),
        network_states=at_start.states,
        product_error=product_error,
        repeat_error=repeat_error,
        logs=path.logs(taken.row),
        trace={
            "losses": taken.losses,
            "num_cuts": taken.num_cuts,
            # One more for the ratio.
            "num_products": path.num_products + 1,
            **path.trace,
        },
    )


def _scale_and_damping(objective, linearize, gradient, state):
    """The scale of the curvature and the damping of this update: those of the state or, where it has none, found now; NaN if that cannot be."""
    # One after the other: a graph would run gradient and linearization at once, and hold the activations of both.
    with tf.control_dependencies([gradient]):
        product = linearize()
    scale = tf.cond(
        state.scale > 0,
        lambda: state.scale,
        lambda: curvature_scale(gradient, dot(gradient, product(gradient)), objective.start_vector),
    )
    return scale, tf.where(tf.math.is_nan(state.damping), first_damping(scale), state.damping)


def _product_error(product, step):
    """By how much the products contradict themselves; 0 for a curvature that is not made of a J."""
    errors = product.errors(step)
    return tf.zeros([], tf.float64) if errors is None else tf.reduce_max(errors)


def _repeat_error(objective, loss):
    """How much of itself the loss at the start differs by from a second one."""
    again = objective.loss_at(tf.zeros([objective.num_weights], objective.dtype))
    return tf.math.divide_no_nan(tf.abs(again - loss), tf.maximum(tf.abs(loss), tf.abs(again)))


def _reduction_ratio(actual, predicted, is_measured):
    """The quotient; minus infinity where the loss rose or is not finite, NaN where nothing was measured."""
    fell = actual >= 0
    ratio = tf.where(fell, actual / predicted, tf.constant(-float("inf"), tf.float64))
    return tf.where(is_measured, ratio, tf.constant(float("nan"), tf.float64))
