"""What time steps of recurrent layers promise: the layer's own results, and rows and gradients that make the gradient of every case."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_hf.network.capture import matrix_shape, moments_of_cases, recorded_uses
from keras_hf.network.time_steps import has_time_steps, weights_by_rows

pytestmark = pytest.mark.usefixtures("float64")

RECURRENT = {
    "SimpleRNN": lambda: layers.SimpleRNN(3),
    "SimpleRNN without bias, all outputs": lambda: layers.SimpleRNN(3, use_bias=False, return_sequences=True),
    "LSTM backwards": lambda: layers.LSTM(2, go_backwards=True),
    "LSTM with states": lambda: layers.LSTM(2, return_state=True),
    "GRU": lambda: layers.GRU(2),
    "GRU without bias, zeros under the mask": lambda: layers.RNN(
        layers.GRUCell(2, use_bias=False), zero_output_for_mask=True
    ),
}


def sequences():
    x = np.random.default_rng(3).normal(size=(4, 5, 3))
    mask = np.ones((4, 5), bool)
    mask[0, 3:] = mask[1, 1] = False
    return tf.constant(x), tf.constant(mask)


def made(name):
    layer = RECURRENT[name]()
    x, mask = sequences()
    layer(x)
    generator = np.random.default_rng(4)
    layer.set_weights([generator.normal(size=weight.shape) for weight in layer.get_weights()])
    return layer, x, mask


def value_of_cases(layer, x, mask):
    """A number for each case that depends on all that the layer returns."""
    outputs = keras.tree.flatten(layer(x, mask=mask))
    return tf.add_n([tf.reduce_sum(tf.sin(output), list(range(1, len(output.shape)))) for output in outputs])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
def test_recorded_layer_computes_what_the_layer_does(name, masked):
    layer, x, mask = made(name)
    mask = mask if masked else None
    expected = keras.tree.flatten(layer(x, mask=mask))
    with recorded_uses([layer]):
        found = keras.tree.flatten(layer(x, mask=mask))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", RECURRENT)
def test_moments_are_those_of_the_gradient_of_every_case(name):
    layer, x, mask = made(name)
    weights = [weight.value for weight in weights_by_rows(layer)]
    with tf.GradientTape() as tape, recorded_uses([layer], tape) as uses:
        values = value_of_cases(layer, x, mask)
    [use] = uses[layer]
    a, s, total = moments_of_cases(layer, [(use.inputs, tape.gradient(values, use.preactivation))])

    with tf.GradientTape(persistent=True) as tape:
        values = value_of_cases(layer, x, mask)
    rows, units = matrix_shape(layer)
    by_case = [tf.reshape(part, [4, -1, units]) for part in tape.jacobian(values, weights, experimental_use_pfor=False)]
    g = np.concatenate(by_case, 1)
    assert g.shape[1] == rows
    np.testing.assert_allclose(a, np.einsum("nij,nkj->ik", g, g), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(s, np.einsum("nij,nik->jk", g, g), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(total, (g**2).sum(), rtol=1e-9)


@pytest.mark.parametrize(
    "layer",
    [
        layers.GRU(2, reset_after=False),
        layers.LSTM(2, dropout=0.5),
        layers.SimpleRNN(2, unroll=True),
        layers.RNN([layers.SimpleRNNCell(2), layers.SimpleRNNCell(2)]),
        layers.Dense(2),
    ],
    ids=["reset before the product", "dropout", "unrolled", "stacked cells", "no recurrent layer"],
)
def test_other_layers_have_no_time_steps(layer):
    assert not has_time_steps(layer)
