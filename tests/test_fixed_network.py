"""What layers that change a state in the forward pass must do: in an update every pass is one function, and the state changes once after it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import KERAS, compiled, hessian_free, inputs, model_data, objective_function, sequential
from training import assert_equal, fit, normal

from keras_hf import DoubleBackward, GaussNewton, Identity
from keras_hf.common.loops import map_rows

pytestmark = pytest.mark.usefixtures("float64")

SpectralNormalization = layers.SpectralNormalization
TARGETS = normal(15, 1, seed=3)


class Stateful(layers.Layer):
    """Changes its state by `function(state, x)`, and then puts out `x` times the state."""

    def __init__(self, function, start=1.0):
        super().__init__()
        self.function, self.start = function, start

    def build(self, shape):
        self.state = self.add_weight(shape=(shape[-1],), initializer=keras.initializers.Constant(self.start))
        self.state.trainable = False

    def call(self, x):
        self.state.assign(self.function(self.state.value, x))
        return x * self.state


def once_set(state, x):
    """A scale that the first cases set."""
    return keras.ops.cond(keras.ops.all(state == 0), lambda: 1 / keras.ops.std(x, 0), lambda: state)


def twice(layer):
    """Calls a layer that keeps the number of outputs two times."""

    def network():
        x, shared = keras.Input((2,)), layer()
        return keras.Model(x, layers.Dense(1)(shared(shared(layers.Dense(4)(x)))))

    return network


def hidden(*stack, shape=(2,)):
    return lambda: sequential(*[make() for make in stack], layers.Dense(1), shape=shape)


def stateful_rnn():
    x = keras.Input(batch_shape=(15, 3, 2))
    return keras.Model(x, layers.Dense(1)(layers.SimpleRNN(2, stateful=True, unroll=True)(x)))


# A network whose layers change a state in the forward pass, by what changes it.
NETWORKS = {
    "spectral norm": hidden(lambda: SpectralNormalization(layers.Dense(4, "tanh"), power_iterations=2)),
    "spectral norm of a convolution": hidden(
        lambda: layers.Reshape((2, 1)), lambda: SpectralNormalization(layers.Conv1D(3, 2)), layers.Flatten
    ),
    "spectral norm, twice": twice(lambda: SpectralNormalization(layers.Dense(4, "tanh"))),
    "spectral norm, frozen": hidden(
        lambda: layers.Dense(3), lambda: SpectralNormalization(layers.Dense(4, "tanh", trainable=False))
    ),
    "batch statistics": hidden(lambda: layers.Dense(3), layers.BatchNormalization),
    "renormalization": hidden(lambda: layers.Dense(3), lambda: layers.BatchNormalization(renorm=True)),
    "a count": hidden(lambda: layers.Dense(3), lambda: Stateful(lambda state, x: state + 1)),
    "a moving mean": hidden(lambda: Stateful(lambda state, x: 0.9 * state + 0.1 * keras.ops.mean(x, 0))),
    "a scale set by the first cases": hidden(lambda: layers.Dense(3), lambda: Stateful(once_set, 0.0)),
    "a stateful recurrent layer": stateful_rnn,
    "random numbers": hidden(lambda: layers.Dense(3), lambda: layers.GaussianNoise(0.5), lambda: layers.Dropout(0.3)),
}
if KERAS < (3, 14):
    del NETWORKS["renormalization"]


def cells(names, *quick):
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


def problem(name):
    """A model and its cases."""
    keras.utils.set_random_seed(4)
    model = compiled(NETWORKS[name](), optimizer=hessian_free(seed=0, growing_batch=None, preconditioner=Identity()))
    x = inputs() if len(model.network.input_shape) == 2 else normal(15, 3, 2)
    return model, model_data(model, x, TARGETS)


def states_of(model):
    """The variables that the forward pass may change, random numbers apart."""
    network = model.network
    stateful = [layer for layer in network.layers if getattr(layer, "stateful", False)]
    states = [*network.non_trainable_variables, *(state for layer in stateful for state in layer.states)]
    return [state for state in states if "seed" not in state.path]


def arrays(variables):
    return [variable.numpy() for variable in variables]


@pytest.mark.parametrize("name", cells(NETWORKS, "spectral norm", "a moving mean"))
def test_gradient_and_products_are_those_of_the_loss_that_steps_are_judged_by_and_no_pass_changes_a_state(name):
    model, data = problem(name)
    before = arrays(states_of(model))

    def found(objective):
        at_start, product = objective.loss_and_gradient(), objective.product(GaussNewton(DoubleBackward()))
        u, v = (tf.random.stateless_normal([objective.num_weights], [seed, 1], dtype=tf.float64) for seed in (0, 1))
        wide, narrow = ((objective.loss_at(h * v) - objective.loss_at(-h * v)) / (2 * h) for h in (2e-4, 1e-4))
        slopes = tf.tensordot(at_start.gradient, v, 1), (4 * narrow - wide) / 3
        of_u, of_v = map_rows(product, tf.stack([u, v]))[0], product(v)
        losses = at_start.loss, objective.loss(), objective.loss_at(0 * v)
        return losses, slopes, (tf.tensordot(u, of_v, 1), tf.tensordot(v, of_u, 1)), product.error(v)

    losses, slopes, forms, error = objective_function(model, found)(data)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-12)
    np.testing.assert_allclose(*slopes, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(*forms, rtol=1e-9, atol=1e-12)
    assert error < 1e-9
    assert_equal(before, arrays(states_of(model)))


# The statistics of BatchNormalization are those at the new weights; seeds are the optimizer's.
@pytest.mark.parametrize(
    "name", cells([name for name in NETWORKS if name not in ("batch statistics", "random numbers")], "a count")
)
def test_a_state_changes_once_after_an_update_and_not_where_the_step_is_rejected(name):
    model, (x, y, _) = problem(name)
    states, before = states_of(model), arrays(states_of(model))
    with pytest.warns(UserWarning, match="not finite"):
        assert fit(model, x, y * np.nan)["step_size"] == [0]
    assert_equal(before, arrays(states))
    with keras.StatelessScope() as scope:
        model.network(x, training=True)
    values = [scope.get_current_value(state) for state in states]
    expected = [old if new is None else new for old, new in zip(before, values, strict=True)]
    assert fit(model, x, y)["step_size"][0] > 0
    assert any(not np.array_equal(old, new) for old, new in zip(before, expected, strict=True))
    np.testing.assert_allclose(
        np.concatenate([*map(np.ravel, arrays(states))]), np.concatenate([*map(np.ravel, expected)]), rtol=1e-12
    )


def test_evaluation_has_the_spectral_norm_that_training_ended_with():
    model, (x, y, _) = problem("spectral norm")
    layer = model.network.layers[0]
    u = layer.vector_u.numpy()
    fit(model, x, y)
    layer.vector_u.assign(u)
    loss = float(keras.losses.MeanSquaredError()(y, model.network(x, training=True)))
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), loss, rtol=1e-6)


def test_regularizers_see_the_kernel_that_spectral_normalization_leaves():
    network = sequential(SpectralNormalization(layers.Dense(4, kernel_regularizer="l2")), layers.Dense(1))
    model = compiled(network)
    data = model_data(model, inputs(), TARGETS)
    gradient = objective_function(model, lambda objective: objective.loss_and_gradient().gradient)(data).numpy()
    kernel = network.layers[0].kernel.numpy().ravel()
    # Its scale makes no difference.
    assert abs(kernel @ gradient[: kernel.size]) < 1e-12 * np.linalg.norm(gradient)


class Clipping(layers.Dense):
    """Keeps its weights small, as the networks of Wasserstein distances do."""

    def call(self, x):
        self.kernel.assign(keras.ops.clip(self.kernel, -0.1, 0.1))
        return super().call(x)


def float8():
    layer = layers.Dense(3)
    layer.build((None, 2))
    layer.quantize("float8")
    return layer


@pytest.mark.parametrize(
    ("make_layer", "message"),
    [
        (lambda: Clipping(3, name="clip"), "must not assign trainable weights in `call`.*clip/kernel.*`constraint`"),
        (
            lambda: SpectralNormalization(layers.Dense(3, kernel_constraint="non_neg")),
            "must have no constraint.*Leave it",
        ),
        (float8, "whose gradient is to be its next value.*quantize the trained network"),
    ],
)
def test_layers_that_change_trainable_weights_are_refused(make_layer, message):
    with pytest.raises(ValueError, match=message):
        fit(compiled(sequential(make_layer(), layers.Dense(1))), inputs(), TARGETS)
