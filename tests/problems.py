"""Tiny shared problems, with dense oracles. For tests with the fixture `float64`: Keras computes losses in its `floatx`."""

import math
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_hf import ConjugateGradient, EmpiricalFisherDiagonal, HessianFree, HFModel
from keras_hf.common.loops import map_rows
from keras_hf.method.convergence import Convergence
from keras_hf.method.optimism import Optimism
from keras_hf.method.update import UpdateState
from keras_hf.network.fixed_network import Data
from keras_hf.training import setup

NUM_CASES = 15
KERAS = tuple(int(part) for part in keras.__version__.split(".")[:2])
# Means under a mask: Keras 3.12 adds 1e-7 to the number of valid entries.
MASK_ROUNDING = 1e-13 if KERAS >= (3, 13) else 1e-7


class Problem(NamedTuple):
    """A network of a few dozen weights on 15 cases.

    Attributes:
        activation: Of the output layer.
        loss: For `compile`, or a callable without arguments that makes it: a loss keeps the `floatx` it was made in.
        targets: Callable, random generator -> y.
        output_hessian: Callable `(z, y)` -> (cases, outputs, outputs), by hand: the second derivative of a case's loss in what the loss is cut at.
        cut: Callable `(z)` -> the tensor that the loss is cut at, from the pre-activation z of the output layer.
    """

    activation: str
    loss: object
    targets: Callable
    output_hessian: Callable
    cut: Callable = tf.identity


def _reals(rng):
    return rng.normal(size=(NUM_CASES, 3))


def _bits(rng):
    return rng.integers(0, 2, size=(NUM_CASES, 3)).astype("float64")


def _one_hot(rng):
    return np.eye(3)[rng.integers(0, 3, size=NUM_CASES)]


def _labels(rng):
    return rng.integers(0, 3, size=NUM_CASES)


def _bernoulli(z, y):
    p = tf.sigmoid(z)
    return tf.linalg.diag(p * (1 - p) / 3)


def _categorical(z, y):
    p = tf.nn.softmax(z)
    return tf.linalg.diag(p) - p[:, :, None] * p[:, None, :]


def _squares(z, y):
    return tf.eye(3, batch_shape=[NUM_CASES], dtype=tf.float64) * 2 / 3


PROBLEMS = {
    "mse": Problem("linear", "mse", _reals, _squares),
    "mse on sigmoid": Problem("sigmoid", "mse", _bits, _squares, tf.sigmoid),
    "binary from logits": Problem(
        "linear", lambda: keras.losses.BinaryCrossentropy(from_logits=True), _bits, _bernoulli
    ),
    "binary from probabilities": Problem("sigmoid", "binary_crossentropy", _bits, _bernoulli),
    "categorical from logits": Problem(
        "linear", lambda: keras.losses.CategoricalCrossentropy(from_logits=True), _one_hot, _categorical
    ),
    "categorical from probabilities": Problem("softmax", "categorical_crossentropy", _one_hot, _categorical),
    "sparse categorical": Problem("softmax", "sparse_categorical_crossentropy", _labels, _categorical),
}


def make_model(activation="linear", loss="mse", regularizer=None, **compile_arguments):
    """A compiled 2-4-3 network in float64."""
    layers = [
        keras.layers.Dense(4, "tanh", kernel_regularizer=regularizer),
        keras.layers.Dense(3, activation, bias_regularizer=regularizer),
    ]
    network = keras.Sequential([keras.Input((2,)), *layers])
    for weight in network.weights:
        weight.assign(np.random.default_rng(1).normal(size=weight.shape))
    return compiled(network, loss, **compile_arguments)


def compiled(network, loss="mse", **compile_arguments):
    """An `HFModel` of the network, compiled with parts that take half as long to trace as the default ones."""
    optimizer = HessianFree(
        solver=ConjugateGradient(preconditioner=EmpiricalFisherDiagonal()), growing_batch=None, seed=0
    )
    compile_arguments.setdefault("optimizer", optimizer)
    model = HFModel(network)
    loss = loss() if getattr(loss, "__name__", "") == "<lambda>" else loss
    model.compile(loss=loss, **compile_arguments)
    return model


def hessian_free(
    damping=None, preconditioner=None, stopping=None, max_iterations=25, warm_start_decay=0.7, **arguments
):
    """A `HessianFree` with a `ConjugateGradient`, from the arguments of both."""
    solver = ConjugateGradient(preconditioner, stopping, max_iterations, warm_start_decay)
    return HessianFree(damping, solver, **arguments)


def inputs():
    """The cases of all problems, (15, 2)."""
    return np.random.default_rng(2).normal(size=(NUM_CASES, 2))


def model_data(model, x, y, sample_weight=None):
    """Cases as tensors, after which the model is built."""
    to_tensor = lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf)  # noqa: E731
    data = Data(*keras.tree.map_structure(to_tensor, (x, y, sample_weight)))
    model._maybe_symbolic_build(data_batch=tuple(data))
    return data


def set_up(model, **settings):
    """Gives a model's optimizer settings that are fixed for users, before anything is traced."""
    vars(model.optimizer).update(settings)


def on_objective(model, data, function):
    """Calls `function(objective)` with the objective of the model's next update on these cases."""
    return setup.with_objective(model.setup_for(data), data, function)


def with_objective(model, data, function, curvature_batch_size=None, micro_batch_size=None, update_number=0):
    """Calls `function(objective)` with the objective of one update of the model, in one compiled function."""
    set_up(model, curvature_batch_size=curvature_batch_size, micro_batch_size=micro_batch_size)
    model.optimizer.iterations.assign(update_number)

    @tf.function(autograph=False)
    def compute():
        return on_objective(model, data, function)

    return compute()


def objective_function(model, function, run_eagerly=False):
    """A compiled `(data, *arguments, update_number=0) -> function(objective, *arguments)`: traced once, it serves for many updates of the model."""

    def compute(data, arguments):
        return on_objective(model, data, lambda objective: function(objective, *arguments))

    compiled_function = compute if run_eagerly else tf.function(compute, autograph=False)

    def of_update(data, *arguments, update_number=0):
        model.optimizer.iterations.assign(update_number)
        return compiled_function(data, arguments)

    return of_update


def sequential(*stack, shape=(2,)):
    """A network of some layers on cases of a shape."""
    return keras.Sequential([keras.Input(shape), *stack])


class Own(keras.Model):
    """A network that calls its layers as a function says: `function(x, *layers)`."""

    def __init__(self, function, *stack):
        super().__init__()
        self.function, self.stack = function, list(stack)

    def call(self, x):
        return self.function(x, *self.stack)


def values_of(model):
    """The trainable weights of a model or layer, a list of tensors."""
    return [variable.value for variable in model.trainable_variables]


def moved(weights, step):
    """A list of arrays, each plus its part of a vector `(n,)`."""
    parts = np.split(step, np.cumsum([weight.size for weight in weights])[:-1])
    return [weight + part.reshape(weight.shape) for weight, part in zip(weights, parts, strict=True)]


def dense_matrix(product, num_weights, dtype=tf.float64):
    """The matrix of a product on vectors."""
    return tf.transpose(map_rows(product, tf.eye(num_weights, dtype=dtype)))


def matrices(objective, curvatures):
    """The matrices `(k, n, n)` of the products of several curvatures."""
    products = [objective.product(curvature) for curvature in curvatures]
    together = lambda v: tf.stack([product(v) for product in products], -1)  # noqa: E731
    return dense_matrix(together, objective.num_weights, objective.dtype)


def derivatives(function, variables):
    """Value, gradient `(n,)` and Hessian `(n, n)` of a scalar function of variables, eagerly, by `GradientTape.jacobian`."""
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            value = function()
        gradients = inner.gradient(value, variables, unconnected_gradients="zero")
        gradient = flat([tf.convert_to_tensor(part) for part in gradients])
    rows = outer.jacobian(gradient, variables, experimental_use_pfor=False, unconnected_gradients="zero")
    return value.numpy(), gradient.numpy(), np.concatenate([row.numpy().reshape(len(gradient), -1) for row in rows], 1)


def loss_and_gradient(model, data):
    """Loss and gradient `(n,)` of the Keras loss, regularizers included, by `GradientTape`."""
    with tf.GradientTape() as tape:
        loss = model.compute_loss(data.x, data.y, model(data.x, training=True), data.sample_weight)
    return loss.numpy(), flat(tape.gradient(loss, [v.value for v in model.trainable_variables])).numpy()


def loss_derivatives(model, data):
    """Loss, gradient `(n,)` and Hessian `(n, n)` of the Keras loss, regularizers included."""

    def loss():
        return model.compute_loss(data.x, data.y, model(data.x, training=True), data.sample_weight)

    return derivatives(loss, [variable.value for variable in model.trainable_variables])


def flat(tensors):
    """Tensors as one vector."""
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)


def jacobian(function, variables):
    """Derivative of `function()` (cases, outputs) in the weights: (cases, outputs, n)."""
    with tf.GradientTape(persistent=True) as tape:
        value = function()
    parts = tape.jacobian(value, variables, experimental_use_pfor=False)
    return np.concatenate([part.numpy().reshape(*value.shape, -1) for part in parts], -1)


def second_derivative(model, x, v):
    """The second directional derivative of the outputs of the 2-4-3 network along v, by hand: `(cases, 3)`."""
    return derivative_along(model, x, [v])


def derivative_along(model, x, curve):
    """The next derivative at 0 of the outputs of the 2-4-3 network along a curve whose derivatives are given, by Taylor series: `(cases, 3)`."""
    k = len(curve) + 1
    series = [np.concatenate([w.ravel() for w in model.get_weights()])]
    series += [term / math.factorial(power) for power, term in enumerate(curve, 1)] + [np.zeros(27)]
    w, c, u = ([term[part] for term in series] for part in (slice(0, 8), slice(8, 12), slice(12, 24)))
    inner = [x @ w.reshape(2, 4) + c for w, c in zip(w, c, strict=True)]
    # tanh' = 1 - tanh^2, coefficient by coefficient.
    hidden, slope = [np.tanh(inner[0])], [1 - np.tanh(inner[0]) ** 2]
    for order in range(1, k + 1):
        hidden.append(sum(j * inner[j] * slope[order - j] for j in range(1, order + 1)) / order)
        slope.append(-sum(hidden[j] * hidden[order - j] for j in range(order + 1)))
    return math.factorial(k) * sum(hidden[j] @ u[k - j].reshape(4, 3) for j in range(k + 1))


def case_gradients(model, data):
    """The gradient of every case's loss without regularizers, `(cases, n)`, one case after the other."""
    variables = [variable.value for variable in model.trainable_variables]
    gradients = []
    for i in range(int(data.num_cases)):
        case = data.take(tf.constant([i]))
        with tf.GradientTape() as tape:
            loss = model._compile_loss(case.y, model(case.x, training=True), case.sample_weight)
        found = tape.gradient(loss, variables, unconnected_gradients="zero")
        gradients.append(flat([tf.convert_to_tensor(gradient) for gradient in found]).numpy())
    return np.stack(gradients)


def squared_case_gradients(model, data):
    """Mean over cases of the squared gradient of the case's loss without regularizers, `(n,)`."""
    return np.mean(case_gradients(model, data) ** 2, 0)


def update_state(objective, solver, damping=0.3, scale=0.0, curvature=None):
    """What an update of an objective goes on from at the start: an `UpdateState`."""
    number = lambda value: tf.convert_to_tensor(value, objective.dtype)  # noqa: E731
    return UpdateState(
        damping=number(damping),
        scale=number(scale),
        convergence=Convergence.unknown(objective.dtype),
        optimism=Optimism.unknown(),
        last_step=tf.zeros([objective.num_weights], objective.dtype),
        solver=solver.initial_state(objective.variables, []),
        curvature=curvature.initial_state(objective.variables, []) if curvature else {},
        growing_batch={},
        statistics_cases=number(0.0),
    )
