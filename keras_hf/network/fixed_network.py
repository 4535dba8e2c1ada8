"""The network and its loss in one update: one fixed function of weights and cases.

Within an update, every call on a micro-batch uses the same random numbers, batch statistics are those of the micro-batch, and no state is changed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_hf.common import checks
from keras_hf.common.cluster import replica_number
from keras_hf.common.vectors import vector_dtype
from keras_hf.network.batch_statistics import Statistics, constant_statistics, own_statistics
from keras_hf.network.hidden_states import recorded_hidden_states, recurrent_layers
from keras_hf.network.recurrence import linear_derivatives


class Task(NamedTuple):
    """The compiled Keras model as plain functions.

    Attributes:
        network: Callable `x -> y_pred`, the network in training mode.
        loss_terms: Callable `(data, y_pred) -> list of loss_terms.LossTerm`, the compiled loss without regularizers and added losses; no terms if
            the model has only added losses.
        regularizers: List of `(tf.Variable, callable variable -> scalar)`, the losses that depend on one weight alone.
        update_metrics: Callable `(data, y_pred)`, called once per micro-batch with its outputs before the update.
        variables: List of `tf.Variable`, the trainable weights.
        weights: List of `keras.Variable`, the same as Keras knows them.
        constraints: List, the constraint of every variable, a callable that projects a value, or `None`.
        states: List of `keras.Variable`, the non-trainable values that Keras saves, except seeds.
        seeds: List of `keras.Variable`, the states of the network's seed generators.
        seed: int32 scalar `keras.Variable`, the optimizer's seed.
        num_updates: Integer scalar `keras.Variable`, the number of updates so far.
        layers: List of `keras.Layer`, all layers of the network.
        structural_damping: `structural_damping.StructuralDamping`, or `None`.
        groups: Callable `x -> int32 tensor` shaped as a prediction, of every value the number of the group that shares its noise, negative where
            there is no value; `None` = columns.
        solves_equations: Whether outputs are residuals of differential equations, whose passes are many small operations.
    """

    network: Callable
    loss_terms: Callable
    regularizers: list
    update_metrics: Callable
    variables: list
    weights: list
    constraints: list
    states: list
    seeds: list
    seed: keras.Variable
    num_updates: keras.Variable
    layers: list
    structural_damping: Any = None
    groups: Callable | None = None
    solves_equations: bool = False


class Data(NamedTuple):
    """Cases as Keras passes them: nests of tensors whose first axis is the case, or `None`."""

    x: Any
    y: Any
    sample_weight: Any

    def tensors(self):
        """Returns the same cases as tensors, or raises if some are sparse or ragged."""

        def to_tensor(leaf):
            checks.dense(leaf)
            return None if leaf is None else tf.convert_to_tensor(leaf)

        return Data(*keras.tree.map_structure(to_tensor, tuple(self)))

    def take(self, indices):
        """Returns the cases at `indices`, int32 `(k,)`."""
        return Data(
            *keras.tree.map_structure(lambda leaf: None if leaf is None else tf.gather(leaf, indices), tuple(self))
        )

    @property
    def num_cases(self):
        """Number of cases, an int32 scalar."""
        return tf.shape(self._first_leaf)[0]

    def num_nonfinite_cases(self):
        """Returns the number of cases with a value that is not finite in inputs, targets or weights: an int32 scalar."""
        leaves = [leaf for leaf in keras.tree.flatten(tuple(self)) if leaf is not None and leaf.dtype.is_floating]
        bad = tf.zeros([self.num_cases], tf.bool)
        for leaf in leaves:
            bad |= tf.reduce_any(~tf.math.is_finite(leaf), tf.range(1, tf.rank(leaf)))
        return tf.reduce_sum(tf.cast(bad, tf.int32))

    @property
    def static_num_cases(self):
        """Number of cases if it is known at tracing, else `None`."""
        return self._first_leaf.shape[0]

    @property
    def _first_leaf(self):
        return next(leaf for leaf in keras.tree.flatten(self.x) if leaf is not None)


class Evaluation(NamedTuple):
    """One forward pass on one micro-batch.

    Attributes:
        data: `Data`, the micro-batch's cases.
        y_pred: The network's outputs, as Keras returns them.
        outputs: List of tensors, the tensors at which the loss is cut from the network: logits or entries of `y_pred`.
        added_loss: Scalar, the sum of the losses added in `call` and by activity regularizers, or `None`.
        states: List of tensors, the values of `Structure.states` after the pass; for BatchNormalization the statistics of its inputs, not the moving
            averages of these.
        hidden: List of `hidden_states.HiddenStates`, if they were asked for.
    """

    data: Data
    y_pred: Any
    outputs: list
    added_loss: Any
    states: list
    hidden: list | tuple = ()


class FixedNetwork:
    """The network as one fixed function in an update, on one replica.

    Args:
        task: `Task`.
        structure: `structure.Structure` of the traced network.
        update_number: int32 scalar, from which the random numbers of an update are derived.
        programs: Dict, what is traced of passes so far; see `jacobian.LocalRows`.

    Attributes:
        task, structure, update_number, programs: As above.
        dtype: The dtype of flat vectors.
    """

    def __init__(self, task, structure, update_number, programs=None):
        self.task, self.structure, self.update_number, self.programs = task, structure, update_number, programs
        self.dtype = vector_dtype(task.variables)

    def evaluate(self, data, number, statistics=(), measured=None, weights=None, for_products=False):
        """Runs the network on a micro-batch.

        Args:
            data: `Data`, the micro-batch's cases.
            number: int32 scalar, the micro-batch's number, on which its random numbers depend.
            statistics: Pairs of a moving statistic of BatchNormalization and the constant that replaces the micro-batch's own.
            measured: List of BatchNormalization layers whose statistics on the micro-batch are returned among the states; by default
                `measured_normalizations`.
            weights: List of tensors, the values of the trainable weights in this pass; `None` = those that they have.
            for_products: Whether Gauss-Newton products are to be formed from the pass: recurrent layers then have the derivatives of `recurrence`,
                and the hidden states of `structure.hidden_layers` are recorded.

        Returns:
            An `Evaluation`.
        """
        measured = self.structure.measured_normalizations if measured is None else measured
        frozen = constant_statistics(self.structure.batch_normalizations) if statistics else own_statistics(measured)
        values = [*statistics, *(zip(self.task.weights, weights, strict=True) if weights is not None else ())]
        recurrent, recorded = recurrent_layers(self.task.layers), self.structure.hidden_layers
        derivatives = linear_derivatives(recurrent if for_products else [])
        recording = recorded_hidden_states(recorded if for_products else [])
        with self.fixed_state(number, values) as scope, frozen, derivatives, recording as calls:
            y_pred = self.task.network(data.x)
        hidden = [state for states, _ in calls.values() for state in states]
        states = [scope.get_current_value(state) for state in self.structure.states]
        added = tf.add_n([tf.cast(loss, self.dtype) for loss in scope.losses]) if scope.losses else None
        return Evaluation(data, y_pred, self.structure.cut(y_pred), added, states, hidden)

    def batch_statistics(self, data, number):
        """Returns the statistics of BatchNormalization layers on a micro-batch, as pairs of a moving statistic and a tensor. Cost: one pass."""
        layers = self.structure.batch_normalizations
        if not layers:
            return []
        states = self.evaluate(data, number, measured=layers).states
        moving = {id(v) for layer in layers for v in (layer.moving_mean, layer.moving_variance)}
        return [(state, new) for state, new in zip(self.structure.states, states, strict=True) if id(state) in moving]

    def statistics(self, num_cases, states):
        """Returns the `Statistics` of `num_cases` from the states of an `Evaluation`."""
        means, variances = (
            [tf.cast(states[place], self.dtype) for place in places]
            for places in list(zip(*self.structure.statistics, strict=True)) or [[], []]
        )
        return Statistics(tf.cast(num_cases, self.dtype), means, variances)

    def no_statistics(self):
        """Returns the `Statistics` of zero cases."""
        return self.statistics(0, [tf.zeros(state.shape, self.dtype) for state in self.structure.states])

    def fixed_state(self, number, values=()):
        """Returns a scope in which micro-batch `number` gets the same random numbers in every call of an update, and no state is changed.

        The state of a seed generator is a seed and a counter of its calls, which Keras does not save. The optimizer's seed, which is saved, replaces
        the seed, shifted by the update's number and by the generator's position in the network, times multipliers (Knuth's and another) that separate
        neighbouring seeds. The numbers of the micro-batch and the replica are the counter's upper bits, which leaves 2^12 calls within one pass.
        """
        if not self.task.seeds:
            return keras.StatelessScope(state_mapping=list(values), collect_losses=True)
        place = tf.cast(number, tf.int64) * 2**12 + tf.cast(replica_number(), tf.int64) * 2**28
        first = tf.cast(self.task.seed.value, tf.int64) + tf.cast(self.update_number, tf.int64) * 2654435761
        mapping = [
            (state, tf.cast(tf.stack([first + rank * 2246822519, place]), state.value.dtype))
            for rank, state in enumerate(self.task.seeds)
        ]
        return keras.StatelessScope(state_mapping=[*mapping, *values], collect_losses=True)
