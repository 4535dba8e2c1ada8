"""What recurrent layers with linear derivatives promise: the same outputs, and the same products as with Keras' loops."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from test_hidden_states import LENGTH, MASK, Slow, inputs, network

from keras_hf import DoubleBackward, InitialState
from keras_hf.problem.hidden_states import recurrent_layers
from keras_hf.problem.recurrence import linear_derivatives

pytestmark = pytest.mark.usefixtures("float64")

LAYERS = {
    "SimpleRNN": lambda: layers.SimpleRNN(3),
    "relu, sequences": lambda: layers.SimpleRNN(3, "relu", return_sequences=True, use_bias=False),
    "backwards": lambda: layers.GRU(2, go_backwards=True, return_sequences=True),
    "GRU before": lambda: layers.GRU(2, reset_after=False),
    "states, too": lambda: layers.SimpleRNN(2, return_state=True, return_sequences=True),
    "LSTM and its states": lambda: layers.LSTM(2, return_state=True),
    "stacked cells": lambda: layers.RNN([layers.SimpleRNNCell(2), layers.GRUCell(2)]),
    "both directions": lambda: layers.Bidirectional(layers.SimpleRNN(2)),
    "other activation": lambda: layers.SimpleRNN(2, "softmax"),
    "dropout": lambda: layers.GRU(2, dropout=0.4, recurrent_dropout=0.4, seed=1),
    "unrolled": lambda: layers.SimpleRNN(2, unroll=True),
    "own cell": lambda: layers.RNN(Slow()),
}


def products(net, x, linear, jit_compile=False):
    """Outputs, and the matrix J'J of all outputs by products as an update forms them."""
    variables = [variable.value for variable in net.trainable_variables]
    sizes = [variable.shape.num_elements() for variable in variables]
    recurrent = recurrent_layers(net._flatten_layers())
    seeds = [v for v in net.non_trainable_variables if "seed" in v.path]

    def forward():
        mapping = [(seed, seed.value) for seed in seeds]
        with keras.StatelessScope(state_mapping=mapping), linear_derivatives(recurrent if linear else []):
            outputs = keras.tree.flatten(net(x, training=True))
        return outputs, None

    @tf.function(autograph=False)
    def compute():
        linearization = DoubleBackward(jit_compile)
        linearization._keeps_under_jit = False
        linearized = linearization.gauss_newton(forward, lambda outputs, rest: lambda u: u, variables)

        def column(v):
            parts = [
                tf.reshape(part, variable.shape) for part, variable in zip(tf.split(v, sizes), variables, strict=True)
            ]
            return tf.concat([tf.reshape(part, [-1]) for part in linearized(parts)], 0)

        return forward()[0], tf.map_fn(column, tf.eye(sum(sizes), dtype=tf.float64))

    return compute()


def jacobian_products(net, x):
    """The same by first derivatives of Keras' own loops."""
    variables = [variable.value for variable in net.trainable_variables]
    with tf.GradientTape(persistent=True) as tape, keras.StatelessScope():
        outputs = keras.tree.flatten(net(x, training=True))
        flat = tf.concat([tf.reshape(output, [-1]) for output in outputs], 0)
    parts = tape.jacobian(flat, variables, experimental_use_pfor=False, unconnected_gradients="zero")
    j = np.concatenate([part.numpy().reshape(len(flat), -1) for part in parts], 1)
    return outputs, j.T @ j


def assert_same(one, other):
    for a, b in zip(keras.tree.flatten(one), keras.tree.flatten(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


QUICK = {"SimpleRNN", "backwards", "LSTM and its states", "stacked cells", "dropout", "own cell"}


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=name, marks=[] if name in QUICK else [pytest.mark.slow]) for name, make in LAYERS.items()],
)
def test_outputs_and_products_are_those_of_keras(make):
    net = network(make())
    assert_same(products(net, inputs(), linear=True), jacobian_products(net, inputs()))


# Every pair of values once in the quick suite.
@pytest.mark.parametrize(
    "make, backwards, zero_output",
    [
        (layers.SimpleRNNCell, False, False),
        pytest.param(layers.SimpleRNNCell, False, True, marks=pytest.mark.slow),
        pytest.param(layers.SimpleRNNCell, True, False, marks=pytest.mark.slow),
        (layers.SimpleRNNCell, True, True),
        pytest.param(layers.LSTMCell, False, False, marks=pytest.mark.slow),
        (layers.LSTMCell, False, True),
        (layers.LSTMCell, True, False),
        pytest.param(layers.LSTMCell, True, True, marks=pytest.mark.slow),
    ],
)
def test_so_they_are_under_a_mask(make, backwards, zero_output):
    layer = layers.RNN(make(2), go_backwards=backwards, zero_output_for_mask=zero_output, return_sequences=backwards)
    net = network(layers.Masking(), layer)
    x = tf.where(MASK[:, :, None], inputs(), tf.zeros([], tf.float64))
    assert_same(products(net, x, linear=True), jacobian_products(net, x))


def test_derivatives_go_through_layers_and_to_first_states():
    x = keras.Input((LENGTH, 2))
    below = layers.SimpleRNN(2, return_sequences=True)(x, initial_state=InitialState(2, "ones")(x))
    above = layers.GRU(2)(layers.Dense(2)(below), initial_state=layers.Dense(2)(x[:, 0]))
    net = keras.Model(x, above)
    assert_same(products(net, inputs(), linear=True), jacobian_products(net, inputs()))


def test_a_simple_recurrence_may_follow_any_other():
    net = network(layers.Bidirectional(layers.GRU(2, return_sequences=True)), layers.SimpleRNN(2))
    assert_same(products(net, inputs(), linear=True), jacobian_products(net, inputs()))


def test_under_xla_they_are_the_same():
    net = network(layers.SimpleRNN(3))
    assert_same(products(net, inputs(), linear=True, jit_compile=True), jacobian_products(net, inputs()))


def test_lengths_may_be_known_at_run_time_only():
    net = network(layers.SimpleRNN(2), shape=(None, 2))
    traced = tf.function(
        lambda x: products(net, x, linear=True), input_signature=[tf.TensorSpec([None, None, 2], tf.float64)]
    )
    assert_same(traced(inputs()), jacobian_products(net, inputs()))
