"""What the compiled loss says was observed: which values, how much each counts, and which share their noise.

An elementary value is a number of an output for squared errors and binary cross-entropies, a label for the other cross-entropies, whose classes
exclude each other. Mask, sample weight, class weight, loss weight, reduction and the mean over the last axis end in one number, by which the negative
logarithm of the value's likelihood at unit noise counts in the loss. Where it is 0, nothing was observed.
"""

import inspect
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_hf.common.vectors import dense

_KINDS = {
    keras.losses.MeanSquaredError: "gaussian",
    keras.losses.BinaryCrossentropy: "bernoulli",
    keras.losses.CategoricalCrossentropy: "categorical",
    keras.losses.SparseCategoricalCrossentropy: "categorical",
}


def standard_loss(loss):
    """Returns what `compile` takes as the loss of an output, or a term's loss, as one of Keras' losses that are likelihoods, or as it is.

    Args:
        loss: String, function or `keras.losses.Loss`; one that stands for the user's has that as its `__wrapped__`.
    """
    loss = inspect.unwrap(keras.losses.get(loss))
    if type(loss) in _KINDS:
        return loss
    # What Keras makes of a function: the class that its own losses are made of.
    is_of_function = type(loss) is keras.losses.MeanSquaredError.__mro__[1]
    function = inspect.unwrap(loss.fn) if is_of_function else loss
    return next((kind() for kind in _KINDS if kind().fn is function), loss)


def kind_of(loss):
    """Returns the distribution that a loss is the likelihood of: "gaussian", "bernoulli", "categorical", or `None`; see `standard_loss`."""
    loss = standard_loss(loss)
    settings = loss.get_config() if type(loss) in _KINDS else {}
    is_altered = settings.get("label_smoothing") or settings.get("ignore_class") is not None
    return None if is_altered else _KINDS.get(type(loss))


class Observations(NamedTuple):
    """The elementary values of some cases, `(cases, values)` each.

    Attributes:
        coefficients: Float64 tensor, what a value's negative log-likelihood at unit noise, half its squared error or the cross-entropy, is multiplied
            by in the loss; 0 = not observed.
        weights: Float64 tensor, the sample weight behind it, class weight included; 0 = not observed.
        groups: int32 tensor, the number of the group that shares its noise: a column of an output, a term of a `PINN`. Labels have no noise, and are
            one group.
    """

    coefficients: tf.Tensor
    weights: tf.Tensor
    groups: tf.Tensor


def observations(task, data, y_pred):
    """Returns the `Observations` of some cases, those of several outputs side by side; an output without a loss has none.

    Args:
        task: `fixed_network.Task`. Of losses that are no likelihood, values are taken for numbers with squared errors.
        data: `fixed_network.Data`, the cases.
        y_pred: Nest of tensors, the predictions for them.
    """
    terms, groups = task.loss_terms(data, y_pred), task.groups and task.groups(data.x)
    found, first = [], 0
    for output in tf.nest.flatten(y_pred):
        # A whole loss, of which nothing is known, is that of all outputs.
        term = next((term for term in terms if term.y_pred is output or term.loss is None), None)
        if term is not None:
            one = _of_output(term, output, groups)
            found.append(one._replace(groups=one.groups + first))
            first += output.shape[-1] or 0
    return Observations(*[tf.concat(parts, 1) for parts in zip(*found, strict=True)])


def _of_output(term, output, groups):
    kind = kind_of(term.loss)
    if groups is None:
        has_noise = kind not in ("bernoulli", "categorical") and output.shape.rank > 1
        groups = tf.broadcast_to(tf.range(tf.shape(output)[-1]) if has_noise else 0, tf.shape(output))
    counts, weights = (tf.cast(values, tf.float64) for values in term.counts())
    if kind == "categorical":
        return Observations(*map(_as_rows, (counts, weights, tf.zeros(tf.shape(counts), tf.int32))))
    weights = _spread(weights, output)
    if kind is None:
        coefficients = tf.cast(_second_derivative(term, output), tf.float64)
    else:
        size = tf.cast(tf.shape(output)[-1], tf.float64)
        coefficients = _spread(counts, output) * (2 if kind == "gaussian" else 1) / size
    is_there = (groups >= 0) & (coefficients != 0)
    none = tf.zeros([], tf.float64)
    coefficients, weights = (tf.where(is_there, values, none) for values in (coefficients, weights))
    return Observations(*map(_as_rows, (coefficients, weights, tf.maximum(groups, 0))))


def _second_derivative(term, output):
    """The row sums of the second derivative of a term in its predictions: of squared errors, the diagonal."""
    with tf.GradientTape() as outer:
        outer.watch(output)
        with tf.GradientTape() as inner:
            inner.watch(output)
            value = term.value()
        gradients = dense([inner.gradient(value, output)], [output])
    return dense([outer.gradient(gradients[0], output)], [output])[0]


def _spread(values, output):
    """Values of the first axes of an output as an array of its shape."""
    shape = tf.concat([tf.shape(values), tf.ones([output.shape.rank - values.shape.rank], tf.int32)], 0)
    return tf.broadcast_to(tf.reshape(values, shape), tf.shape(output))


def _as_rows(values):
    return tf.reshape(values, [tf.shape(values)[0], -1])
