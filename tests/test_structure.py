"""What one trace of the network tells."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from oracles import loss_hessian, prepare
from problems import KERAS, compiled
from support import DOUBLE, RIGHT, ROWS, measure, on_loss

from examples.autoencoder import cross_entropy
from keras_hf.network.fixed_network import Data


def structure_of(network, loss, x, y, x_shape=None):
    """The structure traced on cases whose number is not known."""
    model = compiled(network, loss)
    model._maybe_symbolic_build(data_batch=(x, y))
    found = []
    shapes = [[None, *tensor.shape[1:]] for tensor in (x, y)]
    specs = [tf.TensorSpec(x_shape or shapes[0], x.dtype), tf.TensorSpec(shapes[1], y.dtype)]
    trace = tf.function(lambda x, y: found.append(model.setup_for(Data(x, y, None)).structure), autograph=False)
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


def test_memory_per_case_counts_forward_and_loss_twice_whether_the_length_of_the_batch_is_known_or_not():
    network = keras.Sequential([keras.Input((5,)), layers.Dense(7, "tanh"), layers.Dense(3)])
    data = Data(tf.zeros([4, 5]), tf.zeros([4, 3]), None)
    structure = structure_of(network, "mse", data.x, data.y)
    # Input 5; product, bias and tanh of 7; product and bias of 3; of the loss the target, difference and square of 3 each, and their mean.
    assert structure.bytes_per_case == 2 * 4 * (5 + 3 * 7 + 2 * 3 + 3 * 3 + 1)
    assert structure.default_micro_batch_size(data) == 2**31 // structure.bytes_per_case
    model = compiled(network)
    model._maybe_symbolic_build(data_batch=data[:2])
    assert model.setup_for(data).structure.bytes_per_case == structure.bytes_per_case


def network_of_sequences(*between):
    """A network of sequences of any length."""
    return keras.Sequential([keras.Input((None, 6)), *between, layers.Dense(1)])


def sequences(length):
    return Data(tf.zeros([2, length, 6]), tf.zeros([2, 1]), None)


def sequence_structure(network, length=None):
    """The structure traced on sequences of a length that is known beforehand, or not."""
    data = sequences(length or 4)
    return structure_of(network, "mse", data.x, data.y, [None, length, 6])


def attention():
    tokens = keras.Input((None, 6))
    attended = layers.MultiHeadAttention(2, 3)(tokens, tokens)
    return keras.Model(tokens, layers.Dense(1)(layers.GlobalAveragePooling1D()(attended)))


NETWORKS_OF_SEQUENCES = {
    "LSTM": lambda: network_of_sequences(layers.LSTM(5)),
    "convolution": lambda: network_of_sequences(layers.Conv1D(5, 3, activation="tanh"), layers.GlobalMaxPooling1D()),
    "attention": attention,
    "loop over cases": lambda: network_of_sequences(
        layers.Lambda(lambda x: tf.map_fn(lambda case: tf.tanh(case)[-1], x), output_shape=(6,))
    ),
    "function": lambda: network_of_sequences(
        layers.Lambda(tf.function(lambda x: tf.tanh(x)[:, -1]), output_shape=(6,))
    ),
}


@functools.cache
def structure_of_any_length(name):
    return sequence_structure(NETWORKS_OF_SEQUENCES[name]())


@pytest.mark.parametrize("name", NETWORKS_OF_SEQUENCES)
def test_memory_per_case_is_the_same_whether_lengths_are_known_beforehand_or_not(name):
    known = sequence_structure(NETWORKS_OF_SEQUENCES[name](), 50).bytes_of(sequences(50))
    assert isinstance(known, int)
    # Convolutions lose a place at each end; reshapes to an unknown length hide others.
    np.testing.assert_allclose(int(structure_of_any_length(name).bytes_of(sequences(50))), known, rtol=0.15)


@pytest.mark.parametrize("name", NETWORKS_OF_SEQUENCES)
def test_a_micro_batch_of_long_sequences_keeps_within_the_bound(name):
    structure, data = structure_of_any_length(name), sequences(1000)
    size = int(structure.default_micro_batch_size(data))
    assert size * int(structure.bytes_of(data)) <= 2**31 < (size + 1) * int(structure.bytes_of(data))
    assert int(structure.default_micro_batch_size(data, 3)) == 3


def test_memory_of_a_dense_layer_on_sequences_counts_every_place():
    def of(units):
        network = network_of_sequences(layers.Dense(units), layers.GlobalAveragePooling1D())
        return sequence_structure(network, 9).bytes_per_case

    # At 9 places the product, which Keras forms with places among the cases, its reshape and the bias; and the mean over places.
    # Keras 3.12 has no reshape.
    assert of(107) - of(7) == 2 * 4 * 100 * (9 * (3 if KERAS >= (3, 13) else 2) + 1)


def test_memory_of_a_loss_that_reshapes_counts_every_class():
    def of(classes):
        network = keras.Sequential([keras.Input((5,)), layers.Dense(classes, "softmax")])
        return structure_of(
            network, "categorical_crossentropy", tf.zeros([4, 5]), tf.zeros([4, classes])
        ).bytes_per_case

    # Product, bias, softmax and target; of the loss, in shapes that the trace does not know, logits, targets and the gradient.
    assert of(107) - of(7) == 2 * 4 * 100 * 7


def test_memory_of_a_recurrent_layer_grows_with_every_step():
    short, long = (
        sequence_structure(network_of_sequences(layers.LSTM(5)), length).bytes_per_case for length in (10, 110)
    )
    # An input of 6, gates of 4 * 5 in five ways, nine vectors of 5, of which loops keep four times the bytes; the sequence itself and its transpose.
    assert long - short == 100 * (16 * (6 + 5 * 4 * 5 + 9 * 5) + 8 * 2 * 6)


def test_memory_of_attention_grows_with_the_square_of_the_length():
    structure = structure_of_any_length("attention")
    short, long = (int(structure.bytes_of(sequences(length))) for length in (1000, 2000))
    assert 3.5 * short < long < 4 * short


def test_memory_of_a_loop_of_known_turns_is_that_of_its_turns():
    def loop(turns):
        body = lambda i, total: (i + 1, total + tf.tanh(total))  # noqa: E731
        of = layers.Lambda(lambda x: tf.while_loop(lambda i, _: i < turns, body, (0, x))[1])
        network = keras.Sequential([keras.Input((5,)), of, layers.Dense(1)])
        return structure_of(network, "mse", tf.zeros([4, 5]), tf.zeros([4, 1])).bytes_per_case

    assert loop(13) - loop(3) == 10 * 16 * 2 * 5


def test_states_are_those_that_a_pass_changes():
    frozen, moving = layers.BatchNormalization(trainable=False), layers.BatchNormalization()
    network = keras.Sequential([keras.Input((5,)), frozen, moving, layers.Dense(3)])
    structure = structure_of(network, "mse", tf.zeros([4, 5]), tf.zeros([4, 3]))
    assert [id(state) for state in structure.states] == [id(moving.moving_mean), id(moving.moving_variance)]
    assert structure.batch_normalizations == [moving]


# Losses of users by the question whether their second derivative is diagonal.


def smoothness(y, y_pred):
    return tf.reduce_mean((y - y_pred) ** 2, -1) + tf.reduce_mean((y_pred[:, 1:] - y_pred[:, :-1]) ** 2, -1)


def relative_error(y, y_pred):
    return tf.reduce_sum((y - y_pred) ** 2, -1) / (1 + tf.reduce_sum(y_pred**2, -1))


def with_spectrum(y, y_pred):
    spectrum = tf.abs(tf.signal.fft(tf.cast(y_pred - y, tf.complex128)))
    return tf.reduce_mean((y - y_pred) ** 2, -1) + tf.reduce_sum(tf.math.log(1 + spectrum**2), -1)


def with_loop(y, y_pred):
    def total(entries):
        return tf.while_loop(lambda i, _: i < 3, lambda i, s: (i + 1, s + entries[i]), (0, tf.zeros([], y_pred.dtype)))

    sums = tf.map_fn(lambda entries: total(entries)[1], y_pred)
    return tf.reduce_mean((y - y_pred) ** 2, -1) + sums**2


def product_of_outputs(y, y_pred):
    return tf.reduce_prod(1 + (y - y_pred) ** 2, -1)


def across_cases(y, y_pred):
    return tf.reduce_mean((y - y_pred) ** 2, -1) * tf.reduce_mean((y - y_pred) ** 2)


def quartic(y, y_pred):
    return tf.reduce_sum((y - y_pred) ** 4 + tf.where(y_pred > y, tf.exp(y_pred), y_pred**2), -1)


def of_switched_entries(y, y_pred):
    """Each entry on its own, though a truth value that couples them switches it."""
    largest = tf.reduce_max(y_pred, -1, keepdims=True)
    return tf.reduce_sum(tf.cast(tf.where(y_pred >= largest, 2, 1), y.dtype) * (y - y_pred) ** 2, -1)


def of_user(loss, targets="reals", *arguments, **fields):
    """The row of a loss that is not one of Keras'."""
    return on_loss(f"Loss, {loss.__name__}", targets, *arguments, loss=lambda: loss, **fields)


OF_USERS = {
    row.name: row
    for row in (
        of_user(cross_entropy, "bits", "sigmoid", through_logits="sigmoid"),
        of_user(quartic),
        of_user(with_spectrum),
        of_user(across_cases, warning="cannot be put together"),
        on_loss("Loss, in a function", "reals", loss=lambda: tf.function(smoothness)),
        *(
            of_user(loss, is_slow=True)
            for loss in (of_switched_entries, smoothness, relative_error, product_of_outputs, with_loop)
        ),
    )
}
# Every entry of the output has a loss of its own, whatever the weights of cases.
DIAGONAL = [
    *("MeanSquaredError", "MeanSquaredError, on sigmoid", "Huber", "Poisson", "Loss, quartic"),
    *("MeanSquaredError, mean_with_sample_weight", "MeanSquaredError, mean_with_sample_weight, weighted"),
    *("MeanSquaredError, sum_over_batch_size, weighted", "Loss, of_switched_entries", "Loss, cross_entropy"),
    *("BinaryCrossentropy, from sigmoid", "BinaryCrossentropy, from other outputs"),
    "BinaryFocalCrossentropy, from other outputs",
]
COUPLED = [
    *("CategoricalCrossentropy, from softmax", "CategoricalCrossentropy, from logits", "CosineSimilarity"),
    *("CategoricalCrossentropy, from other outputs", "BinaryFocalCrossentropy, from sigmoid"),
    *("Loss, smoothness", "Loss, relative_error", "Loss, with_spectrum", "Loss, product_of_outputs"),
    "Loss, across_cases",
]
# Losses like another one.
DIAGONAL_TOO = [
    *("MeanSquaredError, sum", "MeanSquaredLogarithmicError", "LogCosh", "SquaredHinge", "KLDivergence"),
    *("BinaryCrossentropy, from logits", "BinaryCrossentropy, label_smoothing, from sigmoid"),
]
COUPLED_TOO = [
    *("SparseCategoricalCrossentropy, from softmax", "SparseCategoricalCrossentropy, from logits", "Dice", "Tversky"),
    *("CategoricalFocalCrossentropy, from softmax", "Loss, in a function", "Loss, with_loop"),
]


def some_slow(names, slow_names):
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in slow_names)]


def entrywise_and_hessian(name):
    """Whether the structure takes the second derivative of a row's loss for diagonal, and that derivative."""
    row = (ROWS | OF_USERS)[name]
    model, data = prepare(row)
    return model.setup_for(data).structure.is_entrywise, loss_hessian(row, model, data)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", some_slow(DIAGONAL, DIAGONAL_TOO))
def test_the_hessian_of_a_loss_of_single_entries_counts_as_diagonal(name):
    is_entrywise, h = entrywise_and_hessian(name)
    assert is_entrywise
    np.testing.assert_array_equal(h[~np.eye(len(h), dtype=bool)], 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:The loss of a batch cannot be put together")
@pytest.mark.parametrize("name", some_slow(COUPLED, COUPLED_TOO))
def test_the_hessian_of_a_loss_that_couples_entries_does_not_count_as_diagonal(name):
    is_entrywise, h = entrywise_and_hessian(name)
    assert not is_entrywise
    assert np.abs(h[~np.eye(len(h), dtype=bool)]).max() > 1e-4


# Those of Keras' losses are in the table of docs/support.md.
@pytest.mark.filterwarnings("ignore:The loss of a batch cannot be put together")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * row.is_slow) for name, row in OF_USERS.items()]
)
def test_products_of_losses_of_users_are_right(name):
    found, _ = measure(OF_USERS[name], [DOUBLE])
    assert found[DOUBLE][0] == RIGHT, found
