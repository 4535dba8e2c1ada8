"""What is known and chosen of a compiled model before its updates, and how it opens the objective on given cases."""

import logging
import math
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_hf.common import checks
from keras_hf.common.cluster import replica_number
from keras_hf.common.vectors import num_weights
from keras_hf.differentiation.curvature import Curvature
from keras_hf.differentiation.jacobian import compiles_rows, most_of_same_rows
from keras_hf.network.fixed_network import FixedNetwork, Task
from keras_hf.network.second_derivatives import second_derivatives_explained
from keras_hf.network.structure import Structure, trace_structure
from keras_hf.problem import batching
from keras_hf.problem.case_range import CaseRange
from keras_hf.problem.local_objective import LocalCases
from keras_hf.problem.objective import Objective
from keras_hf.problem.replicas import across_replicas, of_each_replica
from keras_hf.solvers.solver import Solver
from keras_hf.training.compiled_model import require_numbers, task_of

# From here on memory counts, and updates are long beside the first.
_MANY_WEIGHTS = 100_000

_logger = logging.getLogger("keras_hf")


class Setup(NamedTuple):
    """A compiled model, prepared for updates on cases of certain types and shapes. Immutable.

    Attributes:
        task: `fixed_network.Task`.
        structure: `structure.Structure`.
        curvature: `curvature.Curvature`, fitted to the network: products are formed by its linearization.
        solver: `solvers.solver.Solver`, the one in use.
        growing_batch: `batching.GrowingBatch`, or `None`: an update uses its whole batch.
        chunk_size: Integer, the number of cases that products are formed on, over all replicas; `None` = by `chunk_share`.
        chunk_share: Float in (0, 1], the same as a share of the cases of an update.
        micro_batch_size: Integer, the number of cases in a micro-batch; `None` = by memory.
        most_cases: Integer, an upper bound of the number of cases of a batch, or `None` where none is known. Of rows on one replica, the most that
            are made alike.
        has_other_cases: Whether batches may have other cases than those before them.
        made_for: Settings of the optimizer, and types and shapes of a case, for which this is the setup; see `_what_counts`.
        programs: Dict, what is traced of passes; the one thing that grows.
    """

    task: Task
    structure: Structure
    curvature: Curvature
    solver: Solver
    growing_batch: Any
    chunk_size: Any
    chunk_share: float
    micro_batch_size: Any
    most_cases: Any
    has_other_cases: bool
    made_for: tuple
    programs: dict

    @property
    def linearization(self):
        """`linearization.Linearization`, or `None` where products are formed without one."""
        return self.curvature.linearization

    @property
    def gains_by_optimized_graphs(self):
        """Whether updates are faster once TensorFlow has optimised their graphs, which took 7 to 29 % of the first update.

        Without, later updates of the networks of benchmarks/first_update.py took 1.15 times as long with an LSTM and 1.07 with convolutions; on Dense
        layers, attention and Poisson's equation 0.98 to 1.02. One of a million weights with Kronecker factors held two vectors more.
        """
        is_large = num_weights(self.task.variables) > _MANY_WEIGHTS
        has_convolutions = any("Conv" in operation for operation in self.structure.layer_of_op)
        return is_large or has_convolutions or bool(self.structure.nesting_ops)

    @property
    def takes_any_number(self):
        """Whether TensorFlow is not told the number of cases, so that another needs no other trace.

        A part that grows changes it anyway. Rows take it untold, except where XLA compiles them for a number, and in loops of recurrent layers, which
        took twice as long.
        """
        if not self.solver.uses_all_cases:
            return self.growing_batch is not None
        return not (self.structure.nesting_ops or compiles_rows(self.structure))

    def serves(self, most_cases):
        """Whether what is traced with this setup is right for batches of at most so many cases, and made as it would be for twice as many.

        Args:
            most_cases: Integer; `None` = any number.
        """
        if most_cases is None or not self.solver.uses_all_cases:
            return (most_cases or math.inf) <= self.most_supported
        # For twice as many: numbers around a limit, as those of folds, must not trace anew in turn.
        most_of_as_many = _most_of_same_rows(2 * most_cases, self.structure, self.task) or math.inf
        return most_cases <= self.most_supported <= most_of_as_many

    @property
    def most_supported(self):
        """The number of cases up to which what is traced with this setup is right: infinity, unless a bound made it smaller."""
        if self.most_cases is None:
            return math.inf
        if self.solver.uses_all_cases:
            # By it, it was chosen how rows are made, and replicas have room for so many.
            return self.most_cases
        sizes = self._default_micro_batch_size(None), self.chunk_size or math.inf
        return sizes[0] if self.most_cases <= sizes[0] < sizes[1] else math.inf

    def is_for(self, optimizer, data):
        """Whether this is the setup for the settings that the optimizer has now, and for such cases."""
        return self.made_for == _what_counts(optimizer, data)

    def without_metrics(self):
        """Returns the setup for passes whose cases metrics do not count."""
        return self._replace(task=self.task._replace(update_metrics=lambda data, y_pred: None))

    def divided(self, cases, data, update_number):
        """Returns the `batching.MicroBatches` of an update's cases.

        Args:
            cases: `case_range.CaseRange`.
            data: `Data` that holds them.
            update_number: int32 scalar.
        """
        micro_batch_size, chunk_size, chunk_share = (
            self._default_micro_batch_size(data),
            self.chunk_size,
            self.chunk_share,
        )
        if "unknown" in self.structure.combinations:
            micro_batch_size, chunk_size, chunk_share = None, None, 1.0
        bounds = [bound for bound in (chunk_size, data.static_num_cases, self.most_supported) if bound is not None]
        # Unknown if the size of micro-batches depends on lengths at run time: products are then traced for several micro-batches.
        is_one = micro_batch_size is None or (not tf.is_tensor(micro_batch_size) and micro_batch_size >= min(bounds))
        if chunk_size is None and chunk_share < 1:
            chunk_size = batching.chunk_of(chunk_share, cases.num_cases)
        seed = tf.convert_to_tensor(self.task.seed)
        return batching.divide(cases, chunk_size, micro_batch_size, update_number, seed, is_one)

    def _default_micro_batch_size(self, data):
        """Returns `micro_batch_size`, or the size by memory: a tensor where lengths are unknown, or infinity without data."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        if data is None and self.structure.unknown_axes:
            return math.inf
        return self.structure.default_micro_batch_size(data, self.chunk_size)


def _what_counts(optimizer, data):
    """Returns a tuple of what a `Setup` depends on besides the model, of which parts are equal if they are the same object."""
    parts = optimizer.solver, optimizer.curvature, optimizer.growing_batch, optimizer.structural_damping
    cases = [
        None if leaf is None else (tf.as_dtype(leaf.dtype), tuple(leaf.shape[1:]))
        for leaf in keras.tree.flatten(tuple(data))
    ]
    return *parts, optimizer.curvature_batch_size, optimizer.micro_batch_size, *cases


def prepare(model, data, most_cases=None, structure=None, has_other_cases=True):
    """Traces a compiled and built model once, and chooses how products are formed. Choices are logged at INFO.

    Args:
        model: `HFModel`.
        data: `Data`, of which only types and shapes are used.
        most_cases: Integer, an upper bound of the number of cases of a batch, or `None`.
        structure: `structure.Structure` of the network on such data, if it is traced already.
        has_other_cases: See `Setup`.

    Returns:
        A `Setup`.

    Raises:
        ValueError: If there is no loss, if there are strings in place of numbers, if the network draws random numbers that cannot be held fixed, if
            solver or curvature are wrong for it, or if structural damping finds no hidden states.
    """
    optimizer = model.optimizer
    solver, curvature = optimizer.solver, optimizer.curvature
    task = task_of(model)
    require_numbers(model, data)
    structure = structure or traced_structure(task, data)
    checks.has_loss(structure.combinations or structure.has_added_loss)
    solver.require(structure)
    if most_cases is not None and solver.uses_all_cases and model.distribute_strategy.num_replicas_in_sync == 1:
        most_cases = _most_of_same_rows(most_cases, structure, task)
    fitted = curvature.fitted_to(structure)
    on_all = " on all cases" if solver.uses_all_cases else ""
    _logger.info("Steps for '%s': by %s%s.", model.network.name, type(solver).__name__, on_all)
    return Setup(
        task,
        structure,
        fitted,
        solver,
        None if solver.uses_all_cases else optimizer.growing_batch,
        optimizer.curvature_batch_size,
        solver.chunk_share,
        optimizer.micro_batch_size,
        most_cases,
        has_other_cases,
        _what_counts(optimizer, data),
        {},
    )


def _most_of_same_rows(num_cases, structure, task):
    """Returns `jacobian.most_of_same_rows`, or the same number where the trace does not know the number of outputs."""
    if structure.num_outputs is None:
        return num_cases
    return most_of_same_rows(num_cases, structure, num_weights(task.variables))


def traced_structure(task, data):
    """Returns `structure.trace_structure(task, data)`; an error about second derivatives names their cure."""
    with second_derivatives_explained({}):
        return trace_structure(task, data)


def with_objective(setup, data, function, cases=None, unseen=None, update_number=None):
    """Calls `function(objective)` with the objective on some cases, once for all replicas. Called in replica context.

    Args:
        setup: `Setup`.
        data: `Data`, this replica's cases of the objective.
        function: Callable; where there are unseen cases, their objective is its second argument.
        cases: `case_range.CaseRange`, which cases of the batch these are; `None` = all.
        unseen: `Data` and `CaseRange` of cases that the update does not use, or `None`.
        update_number: int32 scalar, the number of updates before this one, from which random numbers and chunks are drawn; `None` = those so far.

    Returns:
        What `function` returns, on every replica.
    """
    if cases is None:
        cases = CaseRange.of_batch(of_each_replica(data.num_cases), replica_number())
    if update_number is None:
        update_number = tf.cast(setup.task.num_updates.value, tf.int32)
    fixed = FixedNetwork(setup.task, setup.structure, update_number, setup.programs)
    local = [LocalCases(fixed, data, setup.divided(cases, data, update_number))]
    if unseen is not None:
        data, places = unseen
        whole = setup._replace(chunk_size=None, chunk_share=1.0)
        local.append(LocalCases(fixed, data, whole.divided(places, data, update_number)))

    def across(replicas, *local):
        first, *others = [Objective(replicas, cases, fixed, setup.most_cases) for cases in local]
        return function(first, *others)

    with second_derivatives_explained(setup.structure.layer_of_op):
        return across_replicas(across, *local)
