"""One Hessian-free update, in the order of Martens (2010): gradient, the solver's path, the search along it, reduction ratio.

Depends on the `Solver` interface only, not on Keras.
"""

import functools
from typing import Any, NamedTuple

import tensorflow as tf

from keras_hf.common.vectors import dot, epsilon
from keras_hf.method.convergence import Convergence, rounding_of
from keras_hf.method.optimism import Optimism
from keras_hf.method.scale import curvature_scale, first_damping
from keras_hf.solvers.solver import LocalModel


class UpdateState(NamedTuple):
    """The state between updates: a nest of tensors that an update takes and returns, and that the optimizer saves.

    Attributes:
        damping: Scalar >= 0 of the weights' dtype; NaN = the first update derives it.
        scale: Scalar of the weights' dtype, the scale of the curvature; 0 = the first update computes it. See `scale.curvature_scale`. It falls with
            the trace of the curvature, where that is known.
        convergence: `Convergence`, the record of updates at rounding.
        optimism: `Optimism`, what batches after the steps say of them; `hf_update` returns it unchanged.
        last_step: `(n,)`, the change of the weights in the last update, constraints included, zeros where it was rejected: for solvers, and for the
            next batch to judge.
        solver: Nest of tensors, the solver's state.
        curvature: Dict of tensors, the curvature's state.
        growing_batch: Dict of tensors, the growing batch's state; `hf_update` returns it unchanged.
        statistics_cases: Scalar of the weights' dtype, the number of cases behind the statistics of BatchNormalization; `hf_update` returns it
            unchanged.
    """

    damping: tf.Tensor
    scale: tf.Tensor
    convergence: Convergence
    optimism: Optimism
    last_step: tf.Tensor
    solver: Any
    curvature: dict
    growing_batch: dict
    statistics_cases: tf.Tensor


class UpdateResult(NamedTuple):
    """The result of one update, before anything is assigned.

    Attributes:
        step: Tensor `(n,)`, the change of the weights; zero if the step is rejected.
        step_size: float64 scalar, the step relative to the solver's candidate; 0 if it is rejected.
        loss: float64 scalar, before the update.
        gradient_norm: float64 scalar; of weights at a bound, beyond which the loss falls, the gradient does not count, nor of a norm that stays.
        damping: Scalar, the damping of this update; NaN if it cannot be derived yet, because the gradient is zero or not finite.
        reduction_ratio: float64 scalar, actual over predicted reduction of the loss at the candidate, damping excluded from the prediction. Minus
            infinity if the loss rose or is not finite there. NaN if the update gives no information about the damping: the gradient is zero, loss or
            gradient are not finite at the start, or the change of the loss cannot be distinguished from rounding.
        actual_reduction: float64 scalar, the decrease of the loss in the step.
        unseen: The result of `unseen(step)`; `None` without it.
        state: `UpdateState`, for the next update.
        network_states: List of tensors, the network's states after the forward pass at the start.
        logs: Dict of scalars, the solver's entries in the logs.
        trace: Dict of tensors, how the step was found: `losses` `(k,)` of the candidates, `num_cuts`, `num_products`, and the solver's entries.
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
    logs: dict
    trace: dict


class _Measured(NamedTuple):
    """How well the quadratic model predicted the loss of a step, and what of it rounding explains."""

    reduction_ratio: tf.Tensor
    squared_length: tf.Tensor
    is_at_rounding: tf.Tensor
    is_hidden: tf.Tensor
    num_products: tf.Tensor


def hf_update(objective, curvature, solver, state, unseen=None, decay=None, uses_all=True):
    """Computes one update.

    The solver computes a path of candidates from the quadratic model `q(p) = g'p + p'(G + damping I)p / 2`, a search picks the step from the path by
    the loss on all cases, and the reduction ratio measures how well the model predicted the loss. Cost: one gradient, the cost of solver and search,
    and one product for the ratio; one more product in the update that computes the scale of the curvature. Once the run has converged to rounding:
    little more than the gradient.

    Args:
        objective: `objective.Objective`.
        curvature: `curvature.Curvature`.
        solver: `solver.Solver`.
        state: `UpdateState`.
        unseen: Callable `(n,) -> nest of tensors`, the effect of a step on cases that the update does not use, or `None`.
        decay: Scalar, the weight decay where it is to be found by evidence: the logs then hold what is needed for that. `None` = nothing of it.
        uses_all: Boolean or bool scalar, whether the objective has all cases of the batch.

    Returns:
        An `UpdateResult`.

    References:
        Martens (2010), *Deep learning via Hessian-free optimization*, algorithm 2 and section 4.
    """
    at_start = objective.loss_and_gradient()
    # At a bound the gradient is that along it.
    tangent = objective.tangent_space(at_start.gradient)
    gradient = at_start.gradient if tangent is None else tangent(at_start.gradient)
    gradient_norm = tf.sqrt(objective.agreed(dot(gradient, gradient)))
    curvature, curvature_state = curvature.prepared(objective, state.curvature)
    # One linearization, shared by all that need products.
    linearize = functools.cache(lambda: solver.linearize(objective, curvature))
    shares = [tf.constant(share, tf.float64) for share in (solver.first_share, solver.first_share_of_part)]
    scale, found_damping = _scale_and_damping(objective, linearize, gradient, state, tf.where(uses_all, *shares))
    # Without a damping the gradient is zero or not finite, so that there is no step either; any number serves.
    damping = tf.where(tf.math.is_nan(found_damping), tf.ones_like(found_damping), found_damping)
    norm = tf.cast(gradient_norm, damping.dtype)
    rounding = rounding_of(at_start.loss, objective.dtype)
    is_at_rest = state.convergence.still_holds(at_start.loss, rounding, norm, damping)

    # The zero is a scalar, here and below: vectors of zeros become constants of the graph, which are never freed.
    gradient = tf.where(is_at_rest, tf.zeros([], gradient.dtype), gradient)
    model = LocalModel(objective, linearize, gradient, state.last_step, tangent)
    path = solver.solve(model, damping, state.solver)
    taken = path.search(objective.loss_at, path.candidates, at_start.loss, gradient)

    measured = _measured(objective, path, taken, linearize(), gradient, gradient_norm, at_start.loss, rounding)
    step_size = tf.where(measured.squared_length == 0, tf.zeros([], tf.float64), taken.step_size)
    accepted = step_size > 0
    step = tf.cast(step_size, taken.candidate.dtype) * taken.candidate
    # 0 times a candidate that is not finite would be NaN.
    step = objective.agreed(tf.where(accepted, step, tf.zeros([], step.dtype)))
    reduction = taken.start_loss - taken.loss
    return UpdateResult(
        step=step,
        step_size=step_size,
        loss=at_start.loss,
        gradient_norm=gradient_norm,
        damping=found_damping,
        reduction_ratio=measured.reduction_ratio,
        actual_reduction=reduction,
        unseen=unseen(step) if unseen else None,
        state=state._replace(
            damping=found_damping,
            scale=scale,
            convergence=state.convergence.after(
                measured.is_at_rounding,
                accepted & (reduction > rounding) & ~measured.is_hidden,
                at_start.loss,
                rounding,
                norm,
                damping,
                scale,
            ),
            last_step=tf.where(accepted, objective.change(step), tf.zeros([], step.dtype)),
            solver=path.next_state(step),
            curvature=curvature_state,
        ),
        network_states=at_start.states,
        logs={**path.logs(taken.row), **_evidence(objective, linearize, solver, decay, at_start.loss)},
        trace={
            "losses": taken.losses,
            "num_cuts": taken.num_cuts,
            "num_products": measured.num_products,
            **path.trace,
        },
    )


def _evidence(objective, linearize, solver, decay, loss):
    """Returns what weight decay follows from, a dict of float64 scalars; weights and values are counted in some updates, NaN in others."""
    if decay is None:
        return {}
    product, weights = linearize(), objective.start_vector
    squared = dot(weights, weights)
    is_due = objective.update_number % solver.evidence_interval == 0
    unknown = tf.constant(float("nan"), tf.float64)
    found, num_values, loss_multiplier = tf.cond(
        is_due,
        lambda: (solver.num_effective(objective, product, decay), *objective.observed()),
        lambda: (unknown, unknown, unknown),
    )
    decay = tf.cast(decay, tf.float64)
    squared, found, num_values, loss_multiplier = objective.agreed((squared, found, num_values, loss_multiplier))
    return {
        "weight_decay": decay,
        "num_effective": found,
        "num_values": num_values,
        "loss_multiplier": loss_multiplier,
        "squared_weights": squared,
        "data_loss": loss - decay * squared / 2,
    }


def _scale_and_damping(objective, linearize, gradient, state, first_share):
    """Returns the scale of the curvature and the damping: those of the state, or else computed now; the damping is NaN if that is impossible."""
    # In sequence: the graph would otherwise run gradient and linearization in parallel and hold the activations of both.
    with tf.control_dependencies([gradient]):
        product = linearize()
    scale = tf.cond(
        state.scale > 0,
        lambda: state.scale,
        lambda: curvature_scale(gradient, dot(gradient, product(gradient)), objective.start_vector, first_share),
    )
    if product.trace is not None:
        # Far off, curvature may be larger by twenty powers of ten than at the minimum: the limit of the damping would be above all that is left.
        trace = tf.cast(product.trace, scale.dtype)
        scale = tf.where(trace > 0, tf.minimum(scale, trace), scale)
    scale = objective.agreed(scale)
    return scale, tf.where(tf.math.is_nan(state.damping), first_damping(scale, first_share), state.damping)


def _measured(objective, path, taken, product, gradient, gradient_norm, loss, rounding):
    """Returns the `_Measured` of the step that the search has taken. Cost: one product, unless the path has made it."""
    # At step size 1 and without damping, as in Martens' released code, which has the loss of the chunk, though, and the gradient of all cases. Then
    # the ratio of short steps is not 1: where the gradients of cases cancel, it may stay small, and the damping rise for ever.
    model_step = taken.candidate if path.model_steps is None else path.model_steps[taken.row]
    if path.curvatures is None:
        along_step, num_products = dot(model_step, product(model_step)), path.num_products + 1
    else:
        along_step, num_products = path.curvatures[taken.row], path.num_products
    weights = objective.start_vector
    predicted_reduction, squared_length, squared_weights = objective.agreed(
        (
            -(dot(gradient, model_step) + 0.5 * along_step),
            dot(taken.candidate, taken.candidate),
            dot(weights, weights),
        )
    )
    actual_reduction = taken.start_loss - taken.candidate_loss
    is_at_rounding = (tf.abs(predicted_reduction) <= rounding) | (actual_reduction == 0)
    # If the rounding of the weights hides the step, the loss changes by whatever that rounding makes of it.
    step_rounding = epsilon(objective.dtype) ** 2 * squared_weights
    is_hidden = squared_length <= step_rounding
    is_at_rounding |= is_hidden
    is_known = tf.math.is_finite(loss) & tf.math.is_finite(gradient_norm) & ~is_at_rounding
    ratio = _reduction_ratio(actual_reduction, predicted_reduction, is_known)
    return _Measured(ratio, squared_length, is_at_rounding, is_hidden, num_products)


def _reduction_ratio(actual, predicted, is_known):
    """Returns actual over predicted; minus infinity if the loss rose or is not finite, NaN if it says nothing."""
    fell = actual >= 0
    ratio = tf.where(fell, actual / predicted, tf.constant(-float("inf"), tf.float64))
    return tf.where(is_known, ratio, tf.constant(float("nan"), tf.float64))
