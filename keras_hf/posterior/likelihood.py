"""The compiled loss as the negative logarithm of a likelihood: what is known of the noise, and of the logits of a classifier.

A mean loss becomes a likelihood by what Keras divides it by. `num_values` is that number: the loss times it is the sum over cases.
"""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_hf.common import keras_private

_CURES = "MeanSquaredError, BinaryCrossentropy, CategoricalCrossentropy or SparseCategoricalCrossentropy"
_KINDS = {
    keras.losses.MeanSquaredError: "gaussian",
    keras.losses.BinaryCrossentropy: "bernoulli",
    keras.losses.CategoricalCrossentropy: "categorical",
    keras.losses.SparseCategoricalCrossentropy: "categorical",
}


class Likelihood(NamedTuple):
    """How targets are distributed around the outputs.

    Attributes:
        kind: "gaussian", of outputs; "bernoulli" or "categorical", of logits.
        from_logits: Whether the network's outputs are logits; else they are probabilities.
        is_sparse: Whether targets are the numbers of classes.
        is_sum: Whether the loss is a sum over cases, not a mean.
    """

    kind: str
    from_logits: bool
    is_sparse: bool
    is_sum: bool

    @property
    def is_gaussian(self):
        """Whether it has noise whose size is to be found."""
        return self.kind == "gaussian"

    def outputs(self, y_pred):
        """Returns outputs as a matrix of what the likelihood is of, `(cases, k)`; probabilities as their logits."""
        z = y_pred
        if not self.is_gaussian and not self.from_logits:
            z = keras_private.logits(y_pred)
            if z is None:
                z = tf.math.log(y_pred)
                z = z if self.kind == "categorical" else z - tf.math.log1p(-y_pred)
        return tf.reshape(z, [tf.shape(z)[0], z.shape[1:].num_elements()])

    def roots(self, z):
        """Returns L, `(cases, k, k)`, with LL' the second derivative of a case's negative log-likelihood at unit noise."""
        if self.is_gaussian:
            return np.broadcast_to(np.eye(z.shape[1]), (*z.shape, z.shape[1]))
        if self.kind == "bernoulli":
            p = _sigmoid(z)
            return np.sqrt(p * (1 - p))[:, :, None] * np.eye(z.shape[1])
        root = np.sqrt(softmax(z))
        return root[:, :, None] * (np.eye(z.shape[1]) - root[:, :, None] * root[:, None, :])

    def log_likelihood(self, z, y, weights):
        """Returns the logarithm of the likelihood of a classifier's targets, a float.

        Args:
            z: Array `(cases, k)`, logits.
            y: Targets, as in `fit`.
            weights: Array `(cases, k)` or, where classes exclude each other, `(cases,)`.
        """
        if self.kind == "bernoulli":
            y = np.reshape(y, z.shape)
            return -np.sum(weights * (np.logaddexp(0, z) - y * z))
        logs = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        if self.is_sparse:
            chosen = np.take_along_axis(logs, np.reshape(y, (-1, 1)).astype(int), 1)[:, 0]
        else:
            chosen = np.sum(np.reshape(y, z.shape) * logs, 1)
        return np.sum(weights * chosen)

    def probabilities(self, z, covariance):
        """Returns the mean probabilities of normally distributed logits, approximately: `(cases, k)`.

        Of two classes by the probit approximation (MacKay 1992), `sigmoid(z / sqrt(1 + pi/8 variance))`; of more from that of every pair (Lu, Ie &
        Sha 2020, *Mean-field approximation to Gaussian-softmax integral*), so that what all logits have in common does not count.

        Args:
            z: Array `(cases, k)`, the means.
            covariance: Array `(cases, k, k)`.
        """
        variance = np.diagonal(covariance, axis1=1, axis2=2)
        if self.kind == "bernoulli":
            return _sigmoid(z / np.sqrt(1 + np.pi / 8 * variance))
        of_pairs = np.maximum(variance[:, :, None] + variance[:, None, :] - 2 * covariance, 0)
        odds = (z[:, :, None] - z[:, None, :]) / np.sqrt(1 + np.pi / 8 * of_pairs)
        logs = -np.logaddexp.reduce(-odds, axis=2)
        return softmax(logs)

    def squashed(self, z):
        """Returns the probabilities of logits, arrays of the same shape."""
        return _sigmoid(z) if self.kind == "bernoulli" else softmax(z)

    def num_values(self, shape, last):
        """Returns by how much the compiled loss is to be multiplied to be a sum over cases of negative log-likelihoods at unit noise: a float.

        Args:
            shape: That of the outputs as a matrix, `(cases, k)`.
            last: Integer, the length of the outputs' last axis, over which a loss takes the mean.
        """
        size = last if self.is_sum else shape[0] * shape[1]
        return size / (shape[1] if self.kind == "categorical" else 2 if self.is_gaussian else 1)


def likelihood_of(model, method, is_whole=False):
    """Returns the `Likelihood` of a compiled model's loss.

    Args:
        model: `HFModel`.
        method: String, the name of what needs it, for errors.
        is_whole: Whether `compute_loss` is overridden.

    Raises:
        ValueError: If the model has several losses, or one without a likelihood.
    """
    losses = [loss for loss in keras.tree.flatten(model.loss) if loss is not None]
    num_outputs = len(keras.tree.flatten(getattr(model.network, "outputs", None) or [None]))
    if is_whole or len(losses) != 1 or num_outputs != 1:
        raise ValueError(
            f"`{method}` needs one output and one loss that is the logarithm of a likelihood: {_CURES}. "
            f"Received: loss={model.loss!r}."
        )
    loss = keras.losses.get(losses[0])
    if not isinstance(loss, keras.losses.Loss):
        loss = next((kind() for kind in _KINDS if kind().fn is loss), loss)
    kind = _KINDS.get(type(loss))
    settings = loss.get_config() if kind else {}
    reduction = settings.get("reduction")
    is_altered = settings.get("label_smoothing") or settings.get("ignore_class") is not None
    if kind is None or is_altered or reduction not in ("sum_over_batch_size", "mean", "sum"):
        raise ValueError(
            f"`{method}` needs a loss that is the logarithm of a likelihood: {_CURES}, without `label_smoothing` and `ignore_class`. "
            f"Received: loss={losses[0]!r}."
        )
    from_logits, is_sparse = bool(settings.get("from_logits")), type(loss) is keras.losses.SparseCategoricalCrossentropy
    return Likelihood(kind, from_logits, is_sparse, reduction == "sum")


def softmax(z):
    """Returns the softmax over the last axis."""
    shifted = np.exp(z - z.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def _sigmoid(z):
    return np.exp(-np.logaddexp(0, -z))
