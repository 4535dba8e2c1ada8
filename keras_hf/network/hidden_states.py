"""Records the hidden states of recurrent layers at all time steps while the network runs, and says which layers allow it.

Keras' recurrent layers run their cell in `inner_loop`. While hidden states are recorded, it returns the outputs of all steps, of which the layer
takes the last one where it would have taken that alone.
"""

import contextlib
import math
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_hf.common.keras_private import takes_training
from keras_hf.common.replaced import replaced


class HiddenStates(NamedTuple):
    """A hidden state in one call of a recurrent layer.

    Attributes:
        values: Tensor `(cases, times, ...)`, in the order in which the cell computed them.
        mask: Bool tensor `(cases, times)`, false at the steps that the layer skips; `None` = no step.
    """

    values: tf.Tensor
    mask: tf.Tensor | None


class Calls(NamedTuple):
    """The calls of a recurrent layer while hidden states are recorded.

    Attributes:
        states: List of `HiddenStates`, those of all calls.
        number: List with an entry for every call.
    """

    states: list
    number: list


def recurrent_layers(layers):
    """Returns those layers, a list, whose hidden states can be recorded: `keras.layers.RNN` and what is derived of it."""
    return [layer for layer in layers if isinstance(layer, keras.layers.RNN)]


@contextlib.contextmanager
def recorded_hidden_states(layers):
    """Records the hidden states of recurrent layers while it is open, in the dict from layer to `Calls` that it gives.

    Args:
        layers: List of `keras.layers.RNN`.
    """
    calls = {layer: Calls([], []) for layer in layers}

    def call(layer):
        original = layer.call

        def counted(*args, **kwargs):
            calls[layer].number.append(None)
            return original(*args, **kwargs)

        return counted

    def inner_loop(layer):
        original = layer.inner_loop

        def recorded(sequences, initial_state, mask, training=False):
            cell = _Watched(layer.cell, training)
            own_cell = [(layer, "cell", cell)] if cell.has_more_than_outputs else []
            with replaced((layer, "return_sequences", True), *own_cell, *cell.replacements):
                last, outputs, states = original(sequences, initial_state, mask, training=training)
            if own_cell:
                last, _ = cell.divided(last, 1)
                outputs, hidden = cell.divided(outputs, 2)
            else:
                hidden = keras.tree.flatten(outputs)
            mask = _mask_of_steps(mask, layer.go_backwards)
            calls[layer].states.extend(HiddenStates(values, mask) for values in hidden)
            return last, outputs, states

        return recorded

    loops = [(layer, "inner_loop", inner_loop(layer)) for layer in layers]
    with replaced(*loops, *[(layer, "call", call(layer)) for layer in layers]):
        yield calls


def require_recordable(calls, graph):
    """Raises where hidden states of a network could not be recorded.

    Args:
        calls: Dict, recurrent layer -> `Calls` in one forward pass of the network.
        graph: The graph in which the network ran.

    Raises:
        ValueError: If there are none, or if a layer hides its own.
    """
    rule = "`StructuralDamping` damps changes of the hidden states of recurrent layers."
    for layer, (states, number) in calls.items():
        if number and not states:
            raise ValueError(
                f"{rule} Received: layer '{layer.name}', whose class {type(layer).__name__} has a `call` of its own, which does not show them. Write "
                "what it does in one step as a cell, and use `keras.layers.RNN(cell)`."
            )
        if any(state.values.graph is not graph or _is_vectorized(state.values) for state in states):
            raise ValueError(
                f"{rule} Received: layer '{layer.name}', which is called in a loop or a nested function, from which no hidden state can be taken. "
                "Call the layer itself; in `TimeDistributed`, give the input its length."
            )
    if not any(states for states, _ in calls.values()):
        raise ValueError(
            f"{rule} Received: a network without a layer of `keras.layers.RNN` (`SimpleRNN`, `GRU`, `LSTM`, or `RNN` of a cell of your own). "
            "Leave `structural_damping` out, or use such a layer."
        )


def _is_vectorized(tensor):
    """Whether a tensor is of a turn of `tf.vectorized_map`, which traces one turn into the graph around it, from a stand-in for the turn's number."""
    if not any(operation.type == "PlaceholderWithDefault" for operation in tensor.graph.get_operations()):
        return False
    seen, found = set(), [tensor.op]
    while found:
        operation = found.pop()
        if operation.type == "PlaceholderWithDefault":
            return True
        new = {source.op for source in operation.inputs} - seen
        seen |= new
        found += new
    return False


class _Watched:
    """A cell that gives its hidden states with its outputs, as one tensor: all that Keras' loop hands on from every step.

    Args:
        cell: The cell of a layer.
        training: Bool, the argument of the layer's call.
    """

    def __init__(self, cell, training):
        self._cell, self._found = cell, []
        self._outputs = self._shapes = None
        self._arguments = {"training": training} if isinstance(cell, keras.Layer) and takes_training(cell) else {}
        cells = cell.cells if isinstance(cell, keras.layers.StackedRNNCells) else []
        inner = [_Inner(of_stack, training, self._found) for of_stack in cells]
        self.replacements = [(cell, "cells", inner)] if inner else []
        self.has_more_than_outputs = bool(inner) or hasattr(cell, "hidden_states")

    def __call__(self, inputs, states, **_):
        self._found.clear()
        outputs, states = self._cell(inputs, states, **self._arguments)
        hidden = self._found if self.replacements else hidden_states_of(self._cell, outputs, states)
        leaves = [*keras.tree.flatten(outputs), *hidden]
        self._outputs, self._shapes = outputs, [leaf.shape[1:] for leaf in leaves]
        flat = [tf.reshape(leaf, [tf.shape(leaf)[0], math.prod(leaf.shape[1:])]) for leaf in leaves]
        return tf.concat([tf.cast(leaf, flat[0].dtype) for leaf in flat], 1), states

    def divided(self, joined, num_axes):
        """Returns outputs as the cell gave them, and the list of hidden states, from joined ones with so many axes before the features."""
        before = tf.shape(joined)[:num_axes]
        parts = tf.split(joined, [math.prod(shape) for shape in self._shapes], axis=num_axes)
        leaves = [
            tf.ensure_shape(tf.reshape(part, tf.concat([before, shape], 0)), [*joined.shape[:num_axes], *shape])
            for part, shape in zip(parts, self._shapes, strict=True)
        ]
        num_outputs = len(keras.tree.flatten(self._outputs))
        return keras.tree.pack_sequence_as(self._outputs, leaves[:num_outputs]), leaves[num_outputs:]

    def __getattr__(self, name):
        return getattr(self._cell, name)


class _Inner:
    """A cell of `keras.layers.StackedRNNCells` that adds its hidden states to a list."""

    def __init__(self, cell, training, found):
        self._cell, self._found = cell, found
        self._arguments = {"training": training} if isinstance(cell, keras.Layer) and takes_training(cell) else {}

    def __call__(self, inputs, states, **_):
        outputs, states = self._cell(inputs, states, **self._arguments)
        self._found.extend(hidden_states_of(self._cell, outputs, states))
        return outputs, states

    def __getattr__(self, name):
        return getattr(self._cell, name)


def hidden_states_of(cell, outputs, states):
    """Returns the hidden states of one step, a list: what the cell's own `hidden_states(outputs, states)` says, or else its outputs."""
    if hasattr(cell, "hidden_states"):
        return keras.tree.flatten(cell.hidden_states(outputs, states))
    return keras.tree.flatten(outputs)


def _mask_of_steps(mask, go_backwards):
    """A layer's mask as `(cases, times)`, in the order of its steps, or `None`."""
    mask = mask[0] if isinstance(mask, list | tuple) else mask
    if mask is None:
        return None
    mask = tf.cast(tf.reshape(mask, tf.shape(mask)[:2]), tf.bool)
    return tf.reverse(mask, [1]) if go_backwards else mask
