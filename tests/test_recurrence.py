"""What recurrent layers with linear derivatives promise: the same outputs, and the same products as with Keras' loops."""

import keras
import pytest
import tensorflow as tf
from keras import layers
from problems import flat, jacobian, values_of
from test_hidden_states import LENGTH, MASKED_INPUTS, Slow, inputs, network
from training import assert_same

from keras_hf import DoubleBackward, InitialState
from keras_hf.network.capture import recorded_uses
from keras_hf.network.hidden_states import recurrent_layers
from keras_hf.network.recurrence import linear_derivatives

pytestmark = pytest.mark.usefixtures("float64")

# Each with whether it waits for the whole suite.
LAYERS = {
    "SimpleRNN": (lambda: layers.SimpleRNN(3), False),
    "relu, sequences and their last state": (
        lambda: layers.SimpleRNN(3, "relu", return_sequences=True, return_state=True, use_bias=False),
        True,
    ),
    "GRU backwards": (lambda: layers.GRU(2, go_backwards=True, return_sequences=True, reset_after=False), True),
    "LSTM and its states": (lambda: layers.LSTM(2, return_state=True), False),
    "stacked cells": (lambda: layers.RNN([layers.SimpleRNNCell(2), layers.GRUCell(1)]), False),
    "both directions": (lambda: layers.Bidirectional(layers.SimpleRNN(2)), True),
    "other activation": (lambda: layers.SimpleRNN(2, "softmax"), True),
    "dropout": (lambda: layers.SimpleRNN(2, dropout=0.4, recurrent_dropout=0.4, seed=1), False),
    "unrolled": (lambda: layers.SimpleRNN(2, unroll=True), True),
    "own cell": (lambda: layers.RNN(Slow()), False),
}


def products(net, x):
    """Outputs, and the matrix J'J of all outputs by products as an update forms them."""
    variables = values_of(net)
    sizes = [variable.shape.num_elements() for variable in variables]
    recurrent = recurrent_layers(net._flatten_layers())
    seeds = [v for v in net.non_trainable_variables if "seed" in v.path]

    def forward():
        mapping = [(seed, seed.value) for seed in seeds]
        with keras.StatelessScope(state_mapping=mapping), linear_derivatives(recurrent):
            outputs = keras.tree.flatten(net(x, training=True))
        return outputs, None

    @tf.function(autograph=False)
    def compute():
        linearized = DoubleBackward().gauss_newton(forward, lambda outputs, rest: lambda u: u, variables)

        def column(v):
            parts = zip(tf.split(v, sizes), variables, strict=True)
            return flat(linearized([tf.reshape(part, variable.shape) for part, variable in parts]))

        return forward()[0], tf.map_fn(column, tf.eye(sum(sizes), dtype=tf.float64))

    return compute()


def assert_as_by_keras(found, net, x):
    """That outputs and J'J are those by first derivatives of Keras' own loops."""

    def outputs():
        # Every call draws the same random numbers.
        with keras.StatelessScope():
            return keras.tree.flatten(net(x, training=True))

    j = jacobian(lambda: flat(outputs()), values_of(net))
    assert_same([*found[0], found[1]], [*outputs(), j.T @ j], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=[pytest.mark.slow] if is_slow else [])
        for name, (make, is_slow) in LAYERS.items()
    ],
)
def test_outputs_and_products_are_those_of_keras(make):
    net = network(make())
    assert_as_by_keras(products(net, inputs()), net, inputs())


# Every pair of values once.
@pytest.mark.parametrize(
    "make, backwards, zero_output",
    [
        (layers.SimpleRNNCell, False, False),
        pytest.param(layers.SimpleRNNCell, True, True, marks=pytest.mark.slow),
        pytest.param(layers.LSTMCell, False, True, marks=pytest.mark.slow),
        (layers.LSTMCell, True, False),
    ],
)
def test_so_they_are_under_a_mask(make, backwards, zero_output):
    layer = layers.RNN(make(2), go_backwards=backwards, zero_output_for_mask=zero_output, return_sequences=backwards)
    net = network(layers.Masking(), layer)
    assert_as_by_keras(products(net, MASKED_INPUTS), net, MASKED_INPUTS)


def test_derivatives_go_through_layers_to_first_states_and_a_simple_recurrence_may_follow_any_other():
    x = keras.Input((LENGTH, 2))
    below = layers.SimpleRNN(2, return_sequences=True)(x, initial_state=InitialState(2, "ones")(x))
    first = layers.Dense(1)(x[:, 0])
    between = layers.GRU(1, return_sequences=True)(layers.Dense(1)(below), initial_state=first)
    net = keras.Model(x, layers.SimpleRNN(1)(between))
    assert_as_by_keras(products(net, inputs()), net, inputs())


@pytest.mark.parametrize("cell", [layers.SimpleRNNCell, layers.GRUCell])
def test_layers_behind_know_the_number_of_steps(cell):
    """Without it `keras.layers.TimeDistributed` takes the number of cases for it."""
    layer = layers.RNN(cell(2), return_sequences=True)
    by_row = layers.TimeDistributed(layers.Dense(1))
    net = keras.Sequential([keras.Input((LENGTH, 2)), layer, by_row])

    @tf.function(input_signature=[tf.TensorSpec([None, LENGTH, 2], tf.float64)], autograph=False)
    def compute(x):
        with linear_derivatives([layer]):
            linear = net(x)
        with recorded_uses([layer]):
            return linear, net(x)

    x = tf.tile(inputs(), [3, 1, 1])
    assert_same(compute(x), [net(x)] * 2, rtol=1e-12)


def test_lengths_may_be_known_at_run_time_only():
    net = network(layers.SimpleRNN(2), shape=(None, 2))
    traced = tf.function(lambda x: products(net, x), input_signature=[tf.TensorSpec([None, None, 2], tf.float64)])
    assert_as_by_keras(traced(inputs()), net, inputs())
