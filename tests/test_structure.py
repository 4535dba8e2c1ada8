"""What one trace of the network tells."""

import keras
import pytest
import tensorflow as tf
from keras import layers
from problems import compiled

from keras_hf.objective import Data


def structure_of(network, loss, x, y):
    """The structure traced on cases whose number is not known."""
    model = compiled(network, loss)
    model._maybe_symbolic_build(data_batch=(x, y))
    found = []
    specs = [tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype) for tensor in (x, y)]
    trace = tf.function(lambda x, y: found.append(model._task(Data(x, y, None))[1]), autograph=False)
    trace.get_concrete_function(*specs)
    return found[0]


@pytest.mark.parametrize(
    ("activation", "loss", "cut"),
    [
        ("sigmoid", "binary_crossentropy", "logits"),
        ("softmax", "categorical_crossentropy", "logits"),
        ("softmax", "mse", "output"),
        ("sigmoid", "binary_focal_crossentropy", "both"),
        ("linear", "mse", "output"),
        ("linear", keras.losses.BinaryCrossentropy(from_logits=True), "output"),
    ],
)
def test_the_cut_is_at_the_logits_where_the_loss_goes_through_them(activation, loss, cut):
    network = keras.Sequential([keras.Input((2,)), layers.Dense(3, activation)])
    assert structure_of(network, loss, tf.zeros([4, 2]), tf.zeros([4, 3])).cuts == (cut,)


def test_memory_per_case_counts_forward_and_loss_twice():
    network = keras.Sequential([keras.Input((5,)), layers.Dense(7, "tanh"), layers.Dense(3)])
    structure = structure_of(network, "mse", tf.zeros([4, 5]), tf.zeros([4, 3]))
    # Input 5; product, bias and tanh of 7; product and bias of 3; of the loss the target, difference and square of 3 each, and their mean.
    assert structure.bytes_per_case == 2 * 4 * (5 + 3 * 7 + 2 * 3 + 3 * 3 + 1)
    assert structure.default_piece_size == 2**31 // structure.bytes_per_case


def test_states_are_those_that_a_pass_changes():
    frozen, moving = layers.BatchNormalization(trainable=False), layers.BatchNormalization()
    network = keras.Sequential([keras.Input((5,)), frozen, moving, layers.Dense(3)])
    structure = structure_of(network, "mse", tf.zeros([4, 5]), tf.zeros([4, 3]))
    assert [id(state) for state in structure.states] == [id(moving.moving_mean), id(moving.moving_variance)]
    assert structure.batch_normalizations == [moving]


def test_a_batch_of_known_length_is_sized_like_any_other():
    network = keras.Sequential([keras.Input((5,)), layers.Dense(7, "tanh"), layers.Dense(3)])
    model = compiled(network)
    x, y = tf.zeros([4, 5]), tf.zeros([4, 3])
    model._maybe_symbolic_build(data_batch=(x, y))
    assert model._task(Data(x, y, None))[1].bytes_per_case == structure_of(network, "mse", x, y).bytes_per_case > 100
