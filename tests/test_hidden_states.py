"""What recorded hidden states promise: those of every step of every recurrent layer, and outputs as they are without recording."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import assert_same

from keras_hf.network.hidden_states import recorded_hidden_states, recurrent_layers, require_recordable

pytestmark = pytest.mark.usefixtures("float64")

NUM_CASES, LENGTH = 3, 4


@keras.saving.register_keras_serializable("tests")
class Slow(layers.Layer):
    """A cell whose output is a function of two states, of which it names one."""

    def __init__(self, units=2, **kwargs):
        super().__init__(**kwargs)
        self.units, self.state_size, self.output_size = units, [units, units], 1

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1] + self.units, self.units), name="kernel")
        self.built = True

    def call(self, inputs, states, training=False):
        fast = keras.ops.tanh(keras.ops.concatenate([inputs, states[0]], -1) @ self.kernel)
        slow = 0.7 * states[1] + 0.3 * fast
        return keras.ops.sum(slow, -1, keepdims=True), [fast, slow]

    def hidden_states(self, outputs, states):
        return [states[1]]


def steps(layer, x, mask=None):
    """The hidden states of a layer's steps on sequences, by a loop in Python: list of arrays (cases, times, units), one for each hidden state."""
    cells = layer.cell.cells if isinstance(layer.cell, layers.StackedRNNCells) else [layer.cell]
    sizes = [keras.tree.flatten(cell.state_size) for cell in cells]
    states = [[tf.zeros([len(x), size], x.dtype) for size in of_cell] for of_cell in sizes]
    found = []
    for time in range(x.shape[1])[:: -1 if layer.go_backwards else 1]:
        outputs, row = x[:, time], []
        for i, cell in enumerate(cells):
            outputs, new = cell(outputs, states[i])
            if mask is not None:
                new = [tf.where(mask[:, time, None], a, b) for a, b in zip(new, states[i], strict=True)]
            states[i] = new
            row.append(new[1] if isinstance(cell, Slow) else outputs)
        found.append(row)
    return [tf.stack(of_state, 1) for of_state in zip(*found, strict=True)]


def network(*made, shape=(LENGTH, 2)):
    return keras.Sequential([keras.Input(shape), *made])


def inputs():
    return tf.constant(np.random.default_rng(0).normal(size=(NUM_CASES, LENGTH, 2)))


MASK = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0]], bool)
MASKED_INPUTS = inputs() * MASK[:, :, None]
UNMASKED = {
    "SimpleRNN": lambda: layers.SimpleRNN(3),
    "sequences": lambda: layers.SimpleRNN(3, return_sequences=True),
    "unrolled": lambda: layers.SimpleRNN(3, unroll=True),
    "unrolled sequences": lambda: layers.SimpleRNN(3, unroll=True, return_sequences=True),
    "state": lambda: layers.SimpleRNN(3, return_state=True),
    "backwards": lambda: layers.SimpleRNN(3, go_backwards=True),
    "GRU": lambda: layers.GRU(3),
    "LSTM": lambda: layers.LSTM(3),
    "LSTM sequences": lambda: layers.LSTM(3, return_sequences=True),
    "stacked cells": lambda: layers.RNN([layers.GRUCell(2), layers.SimpleRNNCell(3)]),
    "stacked cells, unrolled": lambda: layers.RNN([layers.GRUCell(2), layers.LSTMCell(3)], unroll=True),
    "stacked cells, sequences": lambda: layers.RNN([layers.LSTMCell(2), layers.GRUCell(3)], return_sequences=True),
    "named": lambda: layers.RNN(Slow()),
    "named, unrolled sequences": lambda: layers.RNN(Slow(), return_sequences=True, unroll=True),
}


def record(net, x):
    """The outputs of a network and the states of its recurrent layers."""
    with recorded_hidden_states(recurrent_layers(net._flatten_layers())) as calls:
        outputs = net(x, training=True)
    return outputs, {layer: found.states for layer, found in calls.items()}


def assert_exact(one, other):
    assert_same(keras.tree.flatten(one), keras.tree.flatten(other), rtol=1e-12, atol=1e-12)


def assert_values(states, expected):
    assert_exact([state.values for state in states], expected)


@pytest.mark.parametrize("make", UNMASKED.values(), ids=UNMASKED)
def test_states_of_all_steps_are_found_and_outputs_stay(make):
    layer = make()
    net = network(layer)
    outputs, found = record(net, inputs())
    assert_exact(outputs, net(inputs()))
    assert_values(found[layer], steps(layer, inputs()))
    assert all(state.mask is None for state in found[layer])


# Every pair of values once; not all three flags: Keras then zeroes the outputs of other steps than those that were skipped.
@pytest.mark.parametrize(
    "cells, backwards, unroll, zero_output",
    [
        (lambda: layers.LSTMCell(3), False, False, True),
        (lambda: layers.LSTMCell(3), True, True, False),
        (lambda: layers.LSTMCell(3), True, False, True),
        (lambda: [layers.GRUCell(3), layers.SimpleRNNCell(3)], False, True, True),
        (lambda: [layers.GRUCell(3), layers.SimpleRNNCell(3)], True, False, False),
        (lambda: [layers.GRUCell(3), layers.SimpleRNNCell(3)], False, False, False),
    ],
)
def test_skipped_steps_are_known(cells, backwards, unroll, zero_output):
    layer = layers.RNN(cells(), go_backwards=backwards, unroll=unroll, zero_output_for_mask=zero_output)
    net = network(layers.Masking(), layer)
    outputs, found = record(net, MASKED_INPUTS)
    assert_exact(outputs, net(MASKED_INPUTS))
    mask = MASK[:, ::-1] if backwards else MASK
    for state, values in zip(found[layer], steps(layer, MASKED_INPUTS, MASK), strict=True):
        np.testing.assert_array_equal(state.mask, mask)
        np.testing.assert_allclose(state.values.numpy()[mask], values.numpy()[mask], rtol=1e-12)


def test_both_directions_and_all_layers_are_found():
    both, last = layers.Bidirectional(layers.GRU(2, return_sequences=True)), layers.LSTM(3)
    net = network(both, last)
    _, found = record(net, inputs())
    assert set(found) == {both.forward_layer, both.backward_layer, last}
    forward, backward = (steps(layer, inputs()) for layer in (both.forward_layer, both.backward_layer))
    assert_values(found[both.forward_layer], forward)
    assert_values(found[both.backward_layer], backward)
    between = tf.concat([*forward, *[tf.reverse(b, [1]) for b in backward]], -1)
    assert_values(found[last], steps(last, between))


def test_a_layer_called_twice_has_the_states_of_both_calls():
    layer = layers.SimpleRNN(2)
    x = keras.Input((LENGTH, 2))
    net = keras.Model(x, [layer(x), layer(2 * x)])
    _, found = record(net, inputs())
    values = [state.values for state in found[layer]]
    expected = [*steps(layer, inputs()), *steps(layer, 2 * inputs())]
    # In whatever order Keras made the calls.
    assert_exact(*(sorted(states, key=lambda state: float(state[0, 0, 0])) for states in (values, expected)))


def test_states_of_convolutional_layers_are_images():
    layer = layers.ConvLSTM1D(2, 3)
    net = network(layer, shape=(LENGTH, 6, 2))
    x = tf.constant(np.random.default_rng(0).normal(size=(NUM_CASES, LENGTH, 6, 2)))
    outputs, found = record(net, x)
    assert_exact(outputs, net(x))
    assert [state.values.shape for state in found[layer]] == [(NUM_CASES, LENGTH, 4, 2)]
    assert_exact(found[layer][0].values[:, -1], outputs)


def test_dropout_in_the_cell_is_that_of_training():
    layer = layers.RNN([layers.GRUCell(3, dropout=0.5, seed=1), layers.SimpleRNNCell(3, recurrent_dropout=0.5, seed=2)])
    net = network(layer)
    seeds = [cell.seed_generator.state for cell in layer.cell.cells]
    before = [seed.numpy() for seed in seeds]
    outputs, _ = record(net, inputs())
    for seed, value in zip(seeds, before, strict=True):
        seed.assign(value)
    assert_exact(outputs, net(inputs(), training=True))
    assert np.abs(outputs - net(inputs())).max() > 0.01


def test_recording_leaves_layers_as_they_were():
    layer = layers.RNN([layers.GRUCell(2), layers.SimpleRNNCell(3)])
    net = network(layer)
    before, cells = dict(vars(layer)), list(layer.cell.cells)
    record(net, inputs())
    assert {**vars(layer)} == before and layer.cell.cells == cells


# What is refused.


class OwnCall(layers.SimpleRNN):
    def call(self, sequences, initial_state=None, mask=None, training=False):
        return keras.ops.sum(sequences, 1) @ self.cell.kernel


class InLoop(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.looped = layers.SimpleRNN(2, name="looped")

    def call(self, x):
        return tf.map_fn(self.looped, tf.stack([x, 2 * x]))[0]


@pytest.mark.parametrize(
    "made, match",
    [
        (layers.Dense(2), "a network without a layer of `keras.layers.RNN`.*Leave `structural_damping` out"),
        (OwnCall(2, name="mine"), "layer 'mine', whose class OwnCall has a `call` of its own.*keras.layers.RNN"),
        (InLoop(name="loop"), "layer 'looped', which is called in a loop"),
        (
            layers.TimeDistributed(layers.SimpleRNN(2, name="inner")),
            "layer 'inner', which is called in a loop or a nested function.*in `TimeDistributed`, give the input its length",
        ),
    ],
    ids=["none", "own call", "in a loop", "vectorized"],
)
def test_layers_that_hide_their_states_are_refused_by_name(made, match):
    # Sequences of a number that is known only at run time: Keras vectorises over them.
    shape = (None, LENGTH, 2) if isinstance(made, layers.TimeDistributed) else (LENGTH, 2)
    net = network(made, shape=shape)
    graph = tf.__internal__.FuncGraph("test")
    with graph.as_default():
        with recorded_hidden_states(recurrent_layers(net._flatten_layers())) as calls:
            net(tf.compat.v1.placeholder("float64", [None, *shape]))
        with pytest.raises(ValueError, match=f"Received: {match}"):
            require_recordable(calls, graph)
