"""What preconditioners promise: symmetric positive definite inverses, and squares of the gradients of single cases."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import (
    PROBLEMS,
    Own,
    compiled,
    dense_matrix,
    inputs,
    make_model,
    model_data,
    sequential,
    squared_case_gradients,
    values_of,
    with_objective,
)

from keras_hf import DoubleBackward, EmpiricalFisherDiagonal, GaussNewton, Identity, KroneckerFactored, Nystrom

pytestmark = pytest.mark.usefixtures("float64")

PRECONDITIONERS = [
    Identity(),
    EmpiricalFisherDiagonal(exponent=1.0),
    KroneckerFactored(num_cases=10, interval=2, decay=0.5),
    Nystrom(rank=8),
    Nystrom(rank=60, interval=1),
]
over_preconditioners = pytest.mark.parametrize("preconditioner", PRECONDITIONERS, ids=lambda part: type(part).__name__)
EXACT = {"rtol": 1e-10, "atol": 1e-13}


def inverse_matrix(preconditioner, model, data, damping):
    state = preconditioner.initial_state(values_of(model), model.network._flatten_layers())

    def compute(objective):
        linearize = lambda: objective.product(GaussNewton(DoubleBackward()))  # noqa: E731
        precondition, _ = preconditioner.inverse(objective, linearize, tf.constant(damping, tf.float64), state)
        return dense_matrix(precondition, objective.num_weights)

    return with_objective(model, data, compute).numpy()


@over_preconditioners
def test_inverse_is_symmetric_positive_definite(preconditioner):
    model = make_model()
    data = model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)))
    inverse = inverse_matrix(preconditioner, model, data, damping=0.1)
    np.testing.assert_allclose(inverse, inverse.T, **EXACT)
    assert np.linalg.eigvalsh(inverse).min() > 0


@over_preconditioners
def test_config_round_trip(preconditioner):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(preconditioner))
    assert type(again) is type(preconditioner)
    assert again.get_config() == preconditioner.get_config()


def test_fisher_diagonal_is_weighted_squares_plus_damping_plus_regularization_to_the_exponent():
    model = make_model(regularizer=keras.regularizers.L2(0.25))
    targets = PROBLEMS["mse"].targets(np.random.default_rng(3))
    data = model_data(model, inputs(), targets, np.linspace(0, 2, 15))
    regularization = np.array([0.5] * 8 + [0.0] * 16 + [0.5] * 3)
    expected = (squared_case_gradients(model, data) + 0.1 + regularization) ** 0.75
    found = inverse_matrix(EmpiricalFisherDiagonal(), model, data, damping=0.1)
    np.testing.assert_allclose(found, np.diag(1 / expected), **EXACT)


def test_fisher_diagonal_is_one_where_it_would_be_zero():
    network = sequential(layers.Dense(3, "relu", bias_initializer="ones"), layers.Dense(1))
    network.layers[0].bias.assign([-100.0, 1.0, 1.0])  # a dead unit: no case has a gradient there
    model = compiled(network)
    data = model_data(model, inputs(), np.ones((15, 1)))
    found = np.diag(inverse_matrix(EmpiricalFisherDiagonal(), model, data, damping=0.0))
    assert found[0] == found[3] == 1.0
    assert np.isfinite(found).all()


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "half"])
def test_a_bad_exponent_is_refused(value):
    with pytest.raises(ValueError, match="`exponent` must be a finite number > 0. Received: exponent="):
        EmpiricalFisherDiagonal(exponent=value)


# Squared gradients of cases.


def twice(x, shared, last):
    """Calls one layer twice."""
    return last(shared(shared(x)))


def tied(x, shared):
    """Reads a layer's kernel outside of its call."""
    return tf.matmul(shared(x), tf.transpose(tf.convert_to_tensor(shared.kernel)))


def derivative(x, hidden, last):
    """The derivative of layers in their input: their kernels are used outside of their calls, too."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = last(hidden(x))
    return tape.gradient(y, x)


def embedded_twice(x, shared, last):
    """Embeds two sequences, of words and of the words before, with one kernel."""
    return last(shared(x) + keras.ops.tanh(shared(keras.ops.roll(x, 1, 1))))


def read_out(x, shared):
    """Reads words in and out with one kernel."""
    return keras.ops.matmul(keras.ops.tanh(shared(x)), keras.ops.transpose(shared.embeddings))


class Cell(layers.Layer):
    """A recurrent cell of Dense."""

    def __init__(self):
        super().__init__()
        self.state_size = self.output_size = 2
        self.dense = layers.Dense(2, "tanh")

    def build(self, input_shape):
        self.dense.build((None, input_shape[-1] + 2))

    def call(self, x, states):
        h = self.dense(keras.ops.concatenate([x, states[0]], -1))
        return h, [h]


def attention():
    x = keras.Input((4, 3))
    return keras.Model(x, layers.MultiHeadAttention(2, 3)(x, x))


# Name: network, or its layers; shape of a case, none for tokens; number of layers whose squares come from inputs and pre-activation gradients.
NETWORKS = {
    "Dense": (lambda: [layers.Dense(3, "tanh"), layers.Dense(1, use_bias=False)], (2,), 2),
    "Dense on sequences": (lambda: [layers.Dense(3, "tanh"), layers.Dense(1)], (4, 2), 2),
    "Conv2D": (
        lambda: [
            layers.Conv2D(3, (3, 2), strides=(2, 1), padding="same", activation="tanh"),
            layers.Conv2D(2, 2, dilation_rate=2, padding="same"),
            layers.Flatten(),
            layers.Dense(1),
        ],
        (5, 4, 2),
        3,
    ),
    "Conv1D": (
        lambda: [
            layers.Conv1D(3, 3, padding="causal", dilation_rate=2, activation="tanh"),
            layers.Conv1D(1, 2, strides=2),
        ],
        (6, 2),
        2,
    ),
    "Conv3D": (
        lambda: [layers.Conv3D(2, (1, 3, 2), strides=(1, 2, 2), padding="same", activation="tanh")],
        (3, 4, 3, 2),
        1,
    ),
    "Conv2DTranspose": (
        lambda: [
            layers.Conv2DTranspose(3, (3, 2), strides=(2, 1), padding="same", activation="tanh"),
            layers.Conv2DTranspose(2, 2, use_bias=False, activation="tanh"),
            layers.Conv2DTranspose(1, (3, 2), strides=(3, 2), padding="same", output_padding=1),
        ],
        (2, 3, 2),
        3,
    ),
    "Conv1DTranspose": (lambda: [layers.Conv1DTranspose(2, 3, strides=3, padding="same")], (2, 2), 1),
    "a layer used twice": (lambda: Own(twice, layers.Dense(2, "tanh"), layers.Dense(1)), (2,), 2),
    "tied weights": (lambda: Own(tied, layers.Dense(3, "tanh")), (2,), 0),
    "a derivative": (lambda: Own(derivative, layers.Dense(3, "tanh"), layers.Dense(1)), (2,), 0),
    "normalization": (lambda: [layers.Dense(3), layers.LayerNormalization()], (2,), 1),
    "embedding of masked tokens, used twice": (
        lambda: Own(embedded_twice, layers.Embedding(4, 2, mask_zero=True), layers.Dense(1)),
        None,
        2,
    ),
    "embedding whose kernel is read elsewhere": (lambda: Own(read_out, layers.Embedding(4, 2)), None, 0),
    "EinsumDense": (
        lambda: [
            layers.EinsumDense("...bc,bcde->...de", (2, 2), "tanh", bias_axes="de"),
            layers.EinsumDense("abcd,cde->abe", (None, 1)),
        ],
        (4, 2, 3),
        2,
    ),
    "attention": (attention, (4, 3), 4),
    "EinsumDense on vectors": (lambda: [layers.EinsumDense("ab,bcd->acd", (2, 2), bias_axes="cd")], (3,), 1),
    "EinsumDense that is no Dense layer": (
        lambda: [
            layers.EinsumDense("abc,bcd->abd", (4, 3)),
            layers.EinsumDense("abc,cd->abd", (4, 2), bias_axes="bd"),
            layers.EinsumDense("abc,cd->adb", (2, 4)),
        ],
        (4, 3),
        0,
    ),
    "Dense in a loop": (lambda: [layers.RNN(Cell()), layers.Dense(1)], (2, 2), 1),
    "recurrent": (lambda: [layers.SimpleRNN(2)], (2, 2), 1),
}


# Networks whose weights are captured, and those where squares are found in blocks of cases, in one micro-batch too, which is the easier case.
@pytest.mark.parametrize(
    ("name", "micro_batch_size"), [*((name, 3) for name in NETWORKS), ("Dense", None), ("recurrent", None)]
)
def test_squared_gradients_equal_the_sum_over_single_cases(name, micro_batch_size):
    make, shape, num_captured = NETWORKS[name]
    rng, network = np.random.default_rng(5), make()
    x = rng.integers(0, 4, size=(5, 3)) if shape is None else rng.normal(size=(5, *shape))
    model = compiled(keras.Sequential(network) if isinstance(network, list) else network)
    data = model_data(model, x, rng.normal(size=model.network(x).shape))
    assert len(model.setup_for(data).structure.captured) == num_captured
    found = with_objective(
        model, data, lambda objective: objective.squared_gradients(), micro_batch_size=micro_batch_size
    )
    np.testing.assert_allclose(found, squared_case_gradients(model, data), **EXACT)


def test_under_batch_normalization_the_statistics_count_as_constants():
    normalization = layers.BatchNormalization(momentum=0.5)
    model = compiled(sequential(layers.Dense(3), normalization, layers.Dense(1)))
    x, y = inputs(), np.random.default_rng(3).normal(size=(15, 1))
    data = model_data(model, x, y)
    found = with_objective(model, data, lambda objective: objective.squared_gradients())
    assert (normalization.moving_mean.numpy() == 0).all()
    # The oracle: the same network in inference mode, its moving statistics those of the batch.
    hidden = model.network.layers[0](x)
    normalization.moving_mean.assign(tf.reduce_mean(hidden, 0))
    normalization.moving_variance.assign(tf.math.reduce_variance(hidden, 0))
    call = normalization.call
    normalization.call = lambda x, training=None, mask=None: call(x, training=False)
    np.testing.assert_allclose(found, squared_case_gradients(model, data), rtol=1e-9, atol=1e-12)
