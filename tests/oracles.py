"""Dense oracles for the rows of `support.py`: Gauss-Newton matrices by another road than the package's."""

import keras
import numpy as np
import tensorflow as tf
from problems import compiled, derivatives, flat, jacobian, matrices, model_data, on_objective, set_up, with_objective

from keras_hf import GaussNewton
from keras_hf.common import keras_private
from keras_hf.differentiation.curvature import Curvature

NUM_CASES = 4


def prepare(row):
    """Makes the model of a row, with weights that are neither zero nor symmetric, and the data."""
    keras.utils.set_random_seed(1234)
    rng = np.random.default_rng(5)
    x = row.x(rng) if callable(row.x) else rng.normal(size=(NUM_CASES, *row.x)).astype(row.floatx)
    x = keras.tree.map_structure(tf.convert_to_tensor, x)
    inputs = keras.tree.map_structure(lambda leaf: keras.Input(leaf.shape[1:], dtype=leaf.dtype.name), x)
    outputs = row.network(inputs)
    network = outputs if isinstance(outputs, keras.Model) else keras.Model(inputs, outputs)
    y = row.y(rng) if row.y else keras.tree.map_structure(lambda output: rng.normal(size=output.shape), network(x))
    model = compiled(network, row.loss)
    data = model_data(model, x, y, row.sample_weight and row.sample_weight(rng))
    for weight in network.trainable_weights:
        weight.assign(rng.normal(scale=0.7, size=weight.shape))
    return model, data


def traced_matrices(model, data, curvatures):
    """The matrices of the products of some curvatures, from one function that was traced for any number of cases, as `fit` traces it."""

    def of(objective):
        return matrices(objective, [curvature.fitted_to(model.setup.structure) for curvature in curvatures])

    # One micro-batch: what is linearized is the same in every further micro-batch.
    set_up(model, curvature_batch_size=NUM_CASES, micro_batch_size=NUM_CASES, curvature=GaussNewton())
    compute = tf.function(lambda cases: on_objective(model, cases, of), autograph=False)
    spec = tf.nest.map_structure(
        lambda leaf: None if leaf is None else tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype), data
    )
    return compute.get_concrete_function(spec)(data).numpy()


def is_rejected(model, data, curvature):
    """Whether an update sees that products are wrong, by that of the gradient."""
    set_up(model, curvature=curvature)

    def error(objective):
        gradient = objective.loss_and_gradient().gradient
        return objective.product(model.setup.curvature).error(gradient) > objective.rounding

    return bool(with_objective(model, data, error))


class DenseJacobian(Curvature):
    """The oracle for networks that draw random numbers: `J'HJ` of the mean squared error, J by `GradientTape.jacobian` of the micro-batch itself."""

    def fitted_to(self, structure):
        return self

    def linearize(self, micro_batch):
        with tf.GradientTape(persistent=True) as tape:
            output = flat(micro_batch.forward().outputs)
        j = tape.jacobian(output, micro_batch.variables, experimental_use_pfor=False, unconnected_gradients="zero")

        def product(v):
            tangent = tf.add_n([tf.tensordot(part, u, u.shape.rank) for part, u in zip(j, v, strict=True)])
            upstream = 2 * tangent / tf.cast(tf.size(tangent), tangent.dtype)
            return [tf.tensordot(upstream, part, 1) for part in j]

        return product


def oracle(row, model, data):
    """The dense matrix of a row, `(n, n)`: first derivatives by `GradientTape.jacobian`, eagerly.

    Nothing that the pass would change is changed: batch statistics and the like stay as the package finds them.
    """

    def added_losses():
        with keras.StatelessScope(collect_losses=True) as scope:
            model(data.x, training=True)
        return scope.losses

    j = first_derivative(row, model, data)
    matrix = j.T @ loss_hessian(row, model, data) @ j
    if not added_losses():
        return matrix
    return matrix + derivatives(lambda: tf.add_n(added_losses()), values(model))[2]


def values(model):
    """The trainable variables, as TensorFlow has them."""
    return [variable.value for variable in model.trainable_variables]


def cut_at(row, model, data):
    """The tensors that a row's loss is cut at."""
    with keras.StatelessScope(), keras_private.complete_derivatives():
        if not row.through_logits:
            return keras.tree.flatten(model(data.x, training=True))
        activation = model.network.layers[-1]
        logits = keras.Model(model.network.inputs, activation.input)(data.x)
        return [activation(logits), logits] if row.through_logits == "both" else [logits]


def first_derivative(row, model, data):
    """The derivative in the weights of the tensor that a row's loss is cut at, made flat."""
    return jacobian(lambda: flat(cut_at(row, model, data)), values(model))


def loss_hessian(row, model, data):
    """The second derivative of a row's loss in the tensor that it is cut at, made flat."""
    if callable(row.loss):
        loss, cut = loss_at(row, model, data)
        cut = tf.Variable(cut)
        return derivatives(lambda: loss(cut), [cut])[2]
    # Means of squares, one an output.
    losses, sizes = keras.tree.flatten(row.loss), [int(tf.size(cut)) for cut in cut_at(row, model, data)]
    return np.diag(np.repeat([2 / size if loss else 0 for size, loss in zip(sizes, losses, strict=True)], sizes))


def loss_at(row, model, data):
    """The Keras loss as a function, eagerly, of the tensor that it is cut at, or of two in a stack; and that tensor."""
    cuts, loss = cut_at(row, model, data), row.loss()
    # Not Keras' activations, from whose outputs its losses find the logits.
    activation = {"sigmoid": tf.sigmoid, "softmax": tf.nn.softmax}.get(row.through_logits, tf.identity)

    def of(cut):
        y_pred = activation(cut[0])
        y_pred._keras_mask = getattr(cuts[0], "_keras_mask", None)
        if row.through_logits == "both":
            y_pred._keras_logits = cut[1]
        if isinstance(loss, keras.losses.Loss):
            return loss(data.y, y_pred, data.sample_weight)
        return tf.reduce_mean(loss(data.y, y_pred))

    return of, tf.stack(cuts)
