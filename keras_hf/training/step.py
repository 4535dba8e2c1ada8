"""One update of a compiled model: which cases it uses, what it computes, what it assigns, and what it reports."""

import contextlib
import threading
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_hf.common import checks, keras_private
from keras_hf.common.cluster import replica_number
from keras_hf.common.part import if_finite
from keras_hf.method.update import hf_update
from keras_hf.network.fixed_network import Data
from keras_hf.problem import batching
from keras_hf.problem.case_range import CaseRange
from keras_hf.problem.replicas import of_each_replica
from keras_hf.training.setup import with_objective

_open = threading.local()


class StepReport(NamedTuple):
    """What an update says of itself: tensors, the same on all replicas.

    Attributes:
        logs: Dict of scalars, what Keras shows.
        reduction: float64 scalar, by how much the update lowered the loss of its cases.
        trace: Dict of tensors, how the step was found; see `update.UpdateResult`.
    """

    logs: dict
    reduction: tf.Tensor
    trace: dict


@contextlib.contextmanager
def reports():
    """Context that gives a list of the `StepReport`s of steps in it: Keras' `train_step`, which users override, returns logs alone."""
    before, _open.reports = getattr(_open, "reports", None), []
    try:
        yield _open.reports
    finally:
        _open.reports = before


def step(setup, optimizer, data):
    """Performs one update on a batch: assigns weights, states, and the optimizer's state. Called in replica context.

    Args:
        setup: `setup.Setup` for these data.
        optimizer: `HessianFree`, built.
        data: `Data`, this replica's part of the batch.

    Returns:
        A `StepReport`. A rejected step leaves the weights bit-equal.
    """
    if optimizer.finds_decay and setup.structure.has_added_loss:
        raise ValueError(
            "Weight decay by evidence needs a loss that is the logarithm of a likelihood alone. Received: a network that adds losses of its own "
            "(`add_loss` or `activity_regularizer`). Leave them out, or hand over a number: `HessianFree(weight_decay=1e-4)`."
        )
    growing, num_cases = setup.growing_batch, tf.reduce_sum(of_each_replica(data.num_cases))

    def update(objective, others=None):
        uses_all = tf.cast(objective.totals.num_cases, tf.int32) == num_cases
        result = hf_update(
            objective,
            setup.curvature,
            setup.solver,
            optimizer.state(),
            None if others is None else _trial_on(others),
            tf.convert_to_tensor(optimizer.weight_decay) if optimizer.finds_decay else None,
            uses_all,
        )
        if others is not None:
            turn = tf.stack([tf.convert_to_tensor(optimizer.seed), objective.update_number])
            grown = growing.next_state(
                result.state.growing_batch,
                tf.cast(objective.totals.num_cases, tf.int32),
                result.actual_reduction,
                result.unseen,
                num_cases,
                turn,
            )
            result = result._replace(state=result.state._replace(growing_batch=grown))
        result = _seen_by_others(setup, objective, result, optimizer.state(), uses_all)
        logs = _logs(setup, objective, result)
        if optimizer.finds_decay:
            # The decay is for the whole batch, of which a growing part is a sample.
            growth = tf.cast(num_cases, tf.float64) / tf.cast(objective.totals.num_cases, tf.float64)
            logs |= {key: growth * logs[key] for key in ("num_values", "loss_multiplier")}
        report = StepReport(logs, result.actual_reduction, result.trace)
        _apply(setup, optimizer, objective, result)
        return report

    report = on_update_cases(setup, optimizer, data, update)
    if getattr(_open, "reports", None) is not None:
        _open.reports.append(report)
    return report


def on_update_cases(setup, optimizer, data, function):
    """Calls `function(objective, objective of unseen cases)` with the cases that an update on a batch uses; without a growing batch only the first.

    Args:
        setup: As `step`, as are the next two.
        optimizer: See there.
        data: See there.
        function: See `setup.with_objective`.
    """
    with tf.control_dependencies(checks.equal_lengths(*data)):
        data = Data(*keras.tree.map_structure(lambda leaf: None if leaf is None else tf.identity(leaf), tuple(data)))
    cases, unseen = CaseRange.of_batch(of_each_replica(data.num_cases), replica_number()), None
    if setup.growing_batch is not None:
        state = optimizer.state().growing_batch
        cases, unseen = setup.growing_batch.select(state, cases.counts, cases.replica, setup.has_other_cases)
        unseen = unseen.first(batching.chunk_of(setup.chunk_share, unseen.num_cases))
        data, unseen = data.take(cases.indices()), (data.take(unseen.indices()), unseen)
    return with_objective(setup, data, function, cases, unseen)


def _trial_on(others):
    """Returns `step -> batching.Trial`, the effect of a step on the cases of another objective."""

    def trial(step):
        before, _ = others.loss_and_variation_at(tf.zeros_like(step))
        num_cases = tf.cast(others.totals.num_cases, tf.int32)
        return batching.Trial(num_cases, before, *others.loss_and_variation_at(step))

    return trial


def _seen_by_others(setup, objective, result, state, uses_all):
    """Returns the result with the `Optimism` that this batch's cases give, which the last step was not fitted to. Cost: one forward pass at most.

    Args:
        setup: `setup.Setup`.
        objective: `objective.Objective`, at the weights after the last step.
        result: `update.UpdateResult`.
        state: `update.UpdateState` before this update.
        uses_all: Bool scalar, whether this update uses all cases of its batch. Where it does not, the growing part answers for its steps.
    """
    optimism, reduction = state.optimism, result.actual_reduction
    is_comparable = setup.has_other_cases & uses_all & (result.step_size > 0) & tf.math.is_finite(reduction)
    if setup.has_other_cases:
        # In sequence: memory is that of one pass.
        with tf.control_dependencies([result.step]):
            before = tf.cond(
                optimism.reduction != 0,
                lambda: objective.loss_at(-state.last_step),
                lambda: tf.constant(float("nan"), tf.float64),
            )
        optimism = optimism.after(before, result.loss)
    reduction = tf.where(is_comparable, reduction, tf.zeros_like(reduction))
    return result._replace(state=result.state._replace(optimism=optimism._replace(reduction=reduction)))


def _apply(setup, optimizer, objective, result):
    """Assigns weights and states."""
    accepted, states = result.step_size > 0, setup.structure.states
    for variable, old, new in zip(
        setup.task.variables, objective.start(), objective.new_weights(result.step), strict=True
    ):
        variable.assign(tf.where(accepted, new, old))
    keras_private.average_weights(optimizer, optimizer.average_momentum())
    num_cases, num_before = objective.totals.num_cases, result.state.statistics_cases
    before = [tf.convert_to_tensor(state.value) for state in states]
    after = tf.cond(accepted, lambda: objective.next_states(result.network_states, num_before), lambda: before)
    for state, new in zip(states, after, strict=True):
        state.value.assign(new)
    # Halved after every update: old cases say less and less about new ones.
    next_cases = tf.maximum(num_cases, num_before / 2)
    # Kept after a rejected step too, since it describes the unchanged weights. Values that are not finite are not: they would outlast the cases
    # that caused them.
    before, after = optimizer.state(), result.state
    kept = {
        name: if_finite(getattr(after, name), getattr(before, name), objective.agreed)
        for name in ("solver", "curvature")
    }
    optimizer.assign_state(after._replace(statistics_cases=tf.where(accepted, next_cases, num_before), **kept))
    optimizer.iterations.value.assign_add(1)


def _logs(setup, objective, result):
    floating = {
        "update_loss": result.loss,
        "damping": result.damping,
        "reduction_ratio": result.reduction_ratio,
        "step_size": result.step_size,
        "gradient_norm": result.gradient_norm,
    }
    if setup.has_other_cases:
        floating["optimism"] = result.state.optimism.size
    whole = {"num_cases": objective.totals.num_cases, "converged": result.state.convergence.has_converged}
    return {
        **{key: tf.convert_to_tensor(value) for key, value in floating.items()},
        **{key: tf.cast(value, tf.int32) for key, value in whole.items()},
        **result.logs,
    }
