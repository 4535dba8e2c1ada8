"""What preconditioners promise: symmetric positive definite inverses, and squares of the gradients of single cases."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import (
    PROBLEMS,
    compiled,
    dense_matrix,
    inputs,
    make_model,
    model_data,
    squared_case_gradients,
    with_objective,
)

from keras_hf import DoubleBackward, EmpiricalFisherDiagonal, GaussNewton, Identity, KroneckerFactored, Nystrom

pytestmark = pytest.mark.usefixtures("float64")

PRECONDITIONERS = [
    Identity(),
    EmpiricalFisherDiagonal(),
    EmpiricalFisherDiagonal(exponent=1.0),
    KroneckerFactored(num_cases=10),
    KroneckerFactored(interval=2),
    Nystrom(rank=8),
    Nystrom(rank=60, interval=1),
]
EXACT = {"rtol": 1e-10, "atol": 1e-13}


def inverse_matrix(preconditioner, model, data, damping):
    variables = [variable.value for variable in model.trainable_variables]
    state = preconditioner.initial_state(variables, model.network._flatten_layers())

    def compute(objective):
        linearize = lambda: objective.product(GaussNewton(DoubleBackward()))  # noqa: E731
        precondition, _ = preconditioner.inverse(objective, linearize, tf.constant(damping, tf.float64), state)
        return dense_matrix(precondition, objective.num_weights)

    return with_objective(model, data, compute).numpy()


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS, ids=lambda part: type(part).__name__)
def test_inverse_is_symmetric_positive_definite(preconditioner):
    model = make_model()
    data = model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)))
    inverse = inverse_matrix(preconditioner, model, data, damping=0.1)
    np.testing.assert_allclose(inverse, inverse.T, **EXACT)
    assert np.linalg.eigvalsh(inverse).min() > 0


def test_fisher_diagonal_is_squares_plus_damping_plus_regularization_to_the_exponent():
    model = make_model(regularizer=keras.regularizers.L2(0.25))
    data = model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)))
    regularization = np.array([0.5] * 8 + [0.0] * 16 + [0.5] * 3)
    expected = (squared_case_gradients(model, data) + 0.1 + regularization) ** 0.75
    found = np.diag(inverse_matrix(EmpiricalFisherDiagonal(), model, data, damping=0.1))
    np.testing.assert_allclose(1 / found, expected, **EXACT)


def test_fisher_diagonal_is_one_where_it_would_be_zero():
    network = keras.Sequential([keras.Input((2,)), layers.Dense(3, "relu", bias_initializer="ones"), layers.Dense(1)])
    network.layers[0].bias.assign([-100.0, 1.0, 1.0])  # a dead unit: no case has a gradient there
    model = compiled(network)
    data = model_data(model, inputs(), np.ones((15, 1)))
    found = np.diag(inverse_matrix(EmpiricalFisherDiagonal(), model, data, damping=0.0))
    assert found[0] == found[3] == 1.0
    assert np.isfinite(found).all()


class Twice(keras.Model):
    """Calls one layer twice."""

    def __init__(self):
        super().__init__()
        self.shared, self.output_layer = layers.Dense(2, "tanh"), layers.Dense(1)

    def build(self, input_shape):
        self.shared.build(input_shape)
        self.output_layer.build(input_shape)

    def call(self, x):
        return self.output_layer(self.shared(self.shared(x)))


class Tied(keras.Model):
    """Reads a layer's kernel outside of its call."""

    def __init__(self):
        super().__init__()
        self.shared = layers.Dense(3, "tanh")

    def build(self, input_shape):
        self.shared.build(input_shape)

    def call(self, x):
        return tf.matmul(self.shared(x), tf.transpose(tf.convert_to_tensor(self.shared.kernel)))


class SharedEmbedding(keras.Model):
    """Embeds two sequences, of words and of the words before, with one kernel."""

    def __init__(self):
        super().__init__()
        self.shared, self.output_layer = layers.Embedding(4, 2, mask_zero=True), layers.Dense(1)

    def call(self, x):
        return self.output_layer(self.shared(x) + keras.ops.tanh(self.shared(keras.ops.roll(x, 1, 1))))


class TiedEmbedding(keras.Model):
    """Reads words in and out with one kernel."""

    def __init__(self):
        super().__init__()
        self.shared = layers.Embedding(4, 2)

    def build(self, input_shape):
        self.shared.build()

    def call(self, x):
        return keras.ops.matmul(keras.ops.tanh(self.shared(x)), keras.ops.transpose(self.shared.embeddings))


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


class Derivative(keras.Model):
    """Returns the derivative of its layers in its input: their kernels are used outside of their calls, too."""

    def __init__(self):
        super().__init__()
        self.hidden, self.output_layer = layers.Dense(3, "tanh"), layers.Dense(1)

    def build(self, input_shape):
        self.hidden.build(input_shape)
        self.output_layer.build((None, 3))

    def call(self, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = self.output_layer(self.hidden(x))
        return tape.gradient(y, x)


def sequential(shape, *stack):
    return lambda: keras.Sequential([keras.Input(shape), *(make() for make in stack)])


# Name: network, shape of x, shape of y, number of layers whose squares come from inputs and pre-activation gradients.
NETWORKS = {
    "Dense": (
        sequential((2,), lambda: layers.Dense(3, "tanh"), lambda: layers.Dense(1, use_bias=False)),
        (7, 2),
        (7, 1),
        2,
    ),
    "Dense on sequences": (
        sequential((4, 2), lambda: layers.Dense(3, "tanh"), lambda: layers.Dense(1)),
        (7, 4, 2),
        (7, 4, 1),
        2,
    ),
    "Conv2D": (
        sequential(
            (5, 4, 2),
            lambda: layers.Conv2D(3, (3, 2), strides=(2, 1), padding="same", activation="tanh"),
            lambda: layers.Conv2D(2, 2, dilation_rate=2, padding="same"),
            layers.Flatten,
            lambda: layers.Dense(1),
        ),
        (7, 5, 4, 2),
        (7, 1),
        3,
    ),
    "Conv1D": (
        sequential(
            (6, 2),
            lambda: layers.Conv1D(3, 3, padding="causal", dilation_rate=2, activation="tanh"),
            lambda: layers.Conv1D(1, 2, strides=2),
        ),
        (7, 6, 2),
        (7, 3, 1),
        2,
    ),
    "Conv3D": (
        sequential(
            (3, 4, 3, 2), lambda: layers.Conv3D(2, (1, 3, 2), strides=(1, 2, 2), padding="same", activation="tanh")
        ),
        (4, 3, 4, 3, 2),
        (4, 3, 2, 2, 2),
        1,
    ),
    "a layer used twice": (Twice, (7, 2), (7, 1), 2),
    "tied weights": (Tied, (7, 2), (7, 2), 0),
    "a derivative": (Derivative, (7, 2), (7, 2), 0),
    "normalization": (sequential((2,), lambda: layers.Dense(3), layers.LayerNormalization), (7, 2), (7, 3), 1),
    "embedding": (
        sequential((3,), lambda: layers.Embedding(4, 2), layers.Flatten, lambda: layers.Dense(1)),
        None,
        (7, 1),
        2,
    ),
    "embedding of masked tokens, used twice": (SharedEmbedding, None, (7, 3, 1), 2),
    "embedding whose kernel is read elsewhere": (TiedEmbedding, None, (7, 3, 4), 0),
    "EinsumDense": (
        sequential(
            (4, 2, 3),
            lambda: layers.EinsumDense("...bc,bcde->...de", (2, 2), "tanh", bias_axes="de"),
            lambda: layers.EinsumDense("abcd,cde->abe", (None, 1)),
        ),
        (7, 4, 2, 3),
        (7, 4, 1),
        2,
    ),
    "attention": (attention, (7, 4, 3), (7, 4, 3), 4),
    "EinsumDense on vectors": (
        sequential((3,), lambda: layers.EinsumDense("ab,bcd->acd", (2, 2), bias_axes="cd")),
        (7, 3),
        (7, 2, 2),
        1,
    ),
    "EinsumDense that is no Dense layer": (
        sequential(
            (4, 3),
            lambda: layers.EinsumDense("abc,bcd->abd", (4, 3)),
            lambda: layers.EinsumDense("abc,cd->abd", (4, 2), bias_axes="bd"),
            lambda: layers.EinsumDense("abc,cd->adb", (2, 4)),
        ),
        (7, 4, 3),
        (7, 2, 4),
        0,
    ),
    "Dense in a loop": (sequential((2, 2), lambda: layers.RNN(Cell()), lambda: layers.Dense(1)), (7, 2, 2), (7, 1), 1),
    "recurrent": (sequential((2, 2), lambda: layers.SimpleRNN(2)), (7, 2, 2), (7, 2), 0),
}


# In one piece, which is the easier case, some in the quick suite.
@pytest.mark.parametrize(
    ("name", "micro_batch_size"),
    [
        pytest.param(
            name, size, marks=[] if size or name in ("Dense", "embedding", "recurrent") else [pytest.mark.slow]
        )
        for name in NETWORKS
        for size in (None, 3)
    ],
)
def test_squared_gradients_equal_the_sum_over_single_cases(name, micro_batch_size):
    make, x_shape, y_shape, num_captured = NETWORKS[name]
    rng = np.random.default_rng(5)
    x = rng.integers(0, 4, size=(7, 3)) if x_shape is None else rng.normal(size=x_shape)
    model = compiled(make())
    data = model_data(model, x, rng.normal(size=y_shape))
    assert len(model._task(data)[1].captured) == num_captured
    found = with_objective(
        model, data, lambda objective: objective.squared_gradients(), micro_batch_size=micro_batch_size
    )
    np.testing.assert_allclose(found, squared_case_gradients(model, data), **EXACT)


def test_squared_gradients_follow_sample_weights():
    model = make_model()
    weight = np.linspace(0, 2, 15)
    data = model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)), weight)
    found = with_objective(model, data, lambda objective: objective.squared_gradients())
    np.testing.assert_allclose(found, squared_case_gradients(model, data), **EXACT)


def test_under_batch_normalization_the_statistics_count_as_constants():
    normalization = layers.BatchNormalization(momentum=0.5)
    model = compiled(keras.Sequential([keras.Input((2,)), layers.Dense(3), normalization, layers.Dense(1)]))
    x, y = inputs(), np.random.default_rng(3).normal(size=(15, 1))
    data = model_data(model, x, y)
    found = with_objective(model, data, lambda objective: objective.squared_gradients())
    before = normalization.moving_mean.numpy()
    # The oracle: the same network in inference mode, its moving statistics those of the batch.
    hidden = model.network.layers[0](x)
    normalization.moving_mean.assign(tf.reduce_mean(hidden, 0))
    normalization.moving_variance.assign(tf.math.reduce_variance(hidden, 0))
    normalization.trainable = False
    gamma_and_beta = compiled(model.network)
    normalization.trainable = True
    call = normalization.call
    normalization.call = lambda x, training=None, mask=None: call(x, training=False)
    np.testing.assert_allclose(found, squared_case_gradients(gamma_and_beta, data), rtol=1e-9, atol=1e-12)
    assert (before == 0).all()


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "half"])
def test_a_bad_exponent_is_refused(value):
    with pytest.raises(ValueError, match="`exponent` must be a finite number > 0. Received: exponent="):
        EmpiricalFisherDiagonal(exponent=value)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS, ids=lambda part: type(part).__name__)
def test_config_round_trip(preconditioner):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(preconditioner))
    assert type(again) is type(preconditioner)
    assert again.get_config() == preconditioner.get_config()
