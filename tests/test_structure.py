"""What one trace of the network tells."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import KERAS, compiled, dense_matrix, flat, inputs, make_model, model_data, with_objective

from examples.autoencoder import cross_entropy
from keras_hf import DoubleBackward, GaussNewton
from keras_hf.problem.fixed_network import Data


def structure_of(network, loss, x, y, x_shape=None):
    """The structure traced on cases whose number is not known."""
    model = compiled(network, loss)
    model._maybe_symbolic_build(data_batch=(x, y))
    found = []
    shapes = [[None, *tensor.shape[1:]] for tensor in (x, y)]
    specs = [tf.TensorSpec(x_shape or shapes[0], x.dtype), tf.TensorSpec(shapes[1], y.dtype)]
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
    assert (
        structure.default_piece_size(Data(tf.zeros([4, 5]), tf.zeros([4, 3]), None))
        == 2**31 // structure.bytes_per_case
    )


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


@pytest.mark.parametrize("name", NETWORKS_OF_SEQUENCES)
def test_memory_per_case_is_the_same_whether_lengths_are_known_beforehand_or_not(name):
    network = NETWORKS_OF_SEQUENCES[name]()
    unknown = sequence_structure(network)
    known = sequence_structure(network, 50).bytes_of(sequences(50))
    assert isinstance(known, int)
    # Convolutions lose a place at each end; reshapes to an unknown length hide others.
    np.testing.assert_allclose(int(unknown.bytes_of(sequences(50))), known, rtol=0.15)


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
    structure = sequence_structure(attention())
    short, long = (int(structure.bytes_of(sequences(length))) for length in (1000, 2000))
    assert 3.5 * short < long < 4 * short


@pytest.mark.parametrize("name", NETWORKS_OF_SEQUENCES)
def test_a_piece_of_long_sequences_keeps_within_the_bound(name):
    data = sequences(1000)
    structure = sequence_structure(NETWORKS_OF_SEQUENCES[name]())
    size = int(structure.default_piece_size(data))
    assert size * int(structure.bytes_of(data)) <= 2**31 < (size + 1) * int(structure.bytes_of(data))
    assert int(structure.default_piece_size(data, 3)) == 3


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


def test_a_batch_of_known_length_is_sized_like_any_other():
    network = keras.Sequential([keras.Input((5,)), layers.Dense(7, "tanh"), layers.Dense(3)])
    model = compiled(network)
    x, y = tf.zeros([4, 5]), tf.zeros([4, 3])
    model._maybe_symbolic_build(data_batch=(x, y))
    assert model._task(Data(x, y, None))[1].bytes_per_case == structure_of(network, "mse", x, y).bytes_per_case > 100


# Losses by the question whether their second derivative is diagonal: activation of the output layer, loss, targets. As callables: a loss keeps the
# `floatx` it was made in.

FEW = 4


def bits(rng):
    return rng.integers(0, 2, size=(FEW, 3)).astype("float64")


def reals(rng):
    return rng.normal(size=(FEW, 3))


def one_hot(rng):
    return np.eye(3)[rng.integers(0, 3, size=FEW)]


def labels(rng):
    return rng.integers(0, 3, size=FEW)


def signs(rng):
    return 2 * bits(rng) - 1


def shares(rng):
    return rng.dirichlet(np.ones(3), size=FEW)


def probabilities_of_no_layer(z):
    """Logistic, without logits that Keras could find."""
    return 1 / (1 + tf.exp(-z))


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


K = keras.losses
DIAGONAL = {
    "mse": ("linear", K.MeanSquaredError, reals),
    "mse on sigmoid": ("sigmoid", K.MeanSquaredError, bits),
    "mse on softmax": ("softmax", K.MeanSquaredError, one_hot),
    "summed mse": ("linear", lambda: K.MeanSquaredError(reduction="sum"), reals),
    "weighted mean of mse": ("linear", lambda: K.MeanSquaredError(reduction="mean_with_sample_weight"), reals),
    "msle": ("exponential", K.MeanSquaredLogarithmicError, shares),
    "huber": ("linear", lambda: K.Huber(0.7), reals),
    "log-cosh": ("linear", K.LogCosh, reals),
    "squared hinge": ("linear", K.SquaredHinge, signs),
    "poisson": ("exponential", K.Poisson, bits),
    "Kullback-Leibler": ("softmax", K.KLDivergence, shares),
    "binary from logits": ("linear", lambda: K.BinaryCrossentropy(from_logits=True), bits),
    "binary by logits": ("sigmoid", K.BinaryCrossentropy, bits),
    "binary from probabilities": (probabilities_of_no_layer, K.BinaryCrossentropy, bits),
    "smoothed binary": ("sigmoid", lambda: K.BinaryCrossentropy(label_smoothing=0.1), bits),
    "of the autoencoder": ("sigmoid", lambda: cross_entropy, bits),
    "focal from probabilities": (probabilities_of_no_layer, K.BinaryFocalCrossentropy, bits),
    "quartic": ("linear", lambda: quartic, reals),
    "of switched entries": ("linear", lambda: of_switched_entries, reals),
}
COUPLED = {
    "categorical by logits": ("softmax", K.CategoricalCrossentropy, one_hot),
    "categorical from logits": ("linear", lambda: K.CategoricalCrossentropy(from_logits=True), one_hot),
    "categorical from probabilities": (probabilities_of_no_layer, K.CategoricalCrossentropy, one_hot),
    "sparse categorical by logits": ("softmax", K.SparseCategoricalCrossentropy, labels),
    "sparse categorical from logits": (
        "linear",
        lambda: K.SparseCategoricalCrossentropy(from_logits=True),
        labels,
    ),
    "cosine": ("linear", K.CosineSimilarity, reals),
    "binary focal": ("sigmoid", K.BinaryFocalCrossentropy, bits),
    "categorical focal": ("softmax", K.CategoricalFocalCrossentropy, one_hot),
    "dice": ("sigmoid", K.Dice, bits),
    "tversky": ("sigmoid", K.Tversky, bits),
    "smoothness": ("linear", lambda: smoothness, reals),
    "relative error": ("linear", lambda: relative_error, reals),
    "with a spectrum": ("linear", lambda: with_spectrum, reals),
    "with a loop": ("linear", lambda: with_loop, reals),
    "product of outputs": ("linear", lambda: product_of_outputs, reals),
    "across cases": ("linear", lambda: across_cases, reals),
    "in a function": ("linear", lambda: tf.function(smoothness), reals),
}


# Losses like another one of the tables; all of Keras' are in the table of docs/support.md, too.
ALIKE = {
    *(
        "mse on softmax",
        "summed mse",
        "msle",
        "log-cosh",
        "squared hinge",
        "Kullback-Leibler",
        "binary from logits",
        "smoothed binary",
    ),
    *(
        "sparse categorical by logits",
        "sparse categorical from logits",
        "categorical focal",
        "dice",
        "tversky",
        "with a loop",
    ),
}


def of(table):
    """The names of a table; those of losses like another one are slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in table]


def model_and_data(activation, loss, targets, sample_weight=None):
    model = make_model(activation, loss())
    return model, model_data(model, inputs()[:FEW], targets(np.random.default_rng(3)), sample_weight)


def dense_derivatives(model, structure, data):
    """J and H of all entries of what the loss is cut at, `(entries, n)` and `(entries, entries)`, by `GradientTape.jacobian`."""
    variables = [variable.value for variable in model.trainable_variables]
    with tf.GradientTape(persistent=True) as forward:
        y_pred = model(data.x, training=True)
        outputs = structure.cut(y_pred)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(outputs)
        with tf.GradientTape() as inner:
            inner.watch(outputs)
            loss = model._compile_loss(data.y, y_pred, data.sample_weight)
        gradient = flat(inner.gradient(loss, outputs))

    def matrix(tape, target, sources):
        rows = tape.jacobian(target, sources, unconnected_gradients="zero", experimental_use_pfor=False)
        return np.concatenate([row.numpy().reshape(target.shape.num_elements(), -1) for row in rows], 1)

    j = np.concatenate([matrix(forward, output, variables) for output in outputs])
    return j, matrix(outer, gradient, outputs)


def assert_product_is_dense(model, structure, data):
    """Returns H."""
    j, h = dense_derivatives(model, structure, data)
    product = with_objective(
        model,
        data,
        lambda objective: dense_matrix(objective.product(GaussNewton(DoubleBackward())), objective.num_weights),
    )
    np.testing.assert_allclose(product, j.T @ h @ j, rtol=1e-9, atol=1e-12)
    return h


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", of(DIAGONAL))
def test_products_of_a_loss_of_single_entries_take_a_diagonal_hessian(name):
    model, data = model_and_data(*DIAGONAL[name])
    structure = model._task(data)[1]
    assert structure.is_entrywise
    h = assert_product_is_dense(model, structure, data)
    np.testing.assert_array_equal(h[~np.eye(len(h), dtype=bool)], 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:The loss of a batch cannot be put together")
@pytest.mark.parametrize("name", of(COUPLED))
def test_products_of_a_loss_that_couples_entries_take_all_of_the_hessian(name):
    model, data = model_and_data(*COUPLED[name])
    structure = model._task(data)[1]
    assert not structure.is_entrywise
    h = assert_product_is_dense(model, structure, data)
    assert np.abs(h[~np.eye(len(h), dtype=bool)]).max() > 1e-4


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["mse", "binary by logits", "weighted mean of mse", "huber"])
def test_weights_of_cases_leave_the_hessian_diagonal(name):
    model, data = model_and_data(*DIAGONAL[name], sample_weight=np.linspace(0, 2, FEW))
    structure = model._task(data)[1]
    assert structure.is_entrywise
    assert_product_is_dense(model, structure, data)
