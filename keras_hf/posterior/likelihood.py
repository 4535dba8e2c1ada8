"""The compiled loss as the negative logarithm of a likelihood: the distribution of targets around the outputs.

Outputs are arrays `(cases, positions, k)`: numbers, or the k logits of a label at each of several positions, such as time steps.
"""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_hf.common import keras_private
from keras_hf.problem.loss_terms import overrides_compute_loss
from keras_hf.problem.observations import kind_of, standard_loss

_CURES = "MeanSquaredError, BinaryCrossentropy, CategoricalCrossentropy or SparseCategoricalCrossentropy"


class Likelihood(NamedTuple):
    """How targets are distributed around the outputs.

    Attributes:
        kind: "gaussian", of outputs; "bernoulli" or "categorical", of logits.
        from_logits: Whether the network's outputs are logits; else they are probabilities.
        is_sparse: Whether targets are the numbers of classes.
    """

    kind: str
    from_logits: bool
    is_sparse: bool

    @property
    def is_gaussian(self):
        """Whether it has noise whose size is to be found."""
        return self.kind == "gaussian"

    def outputs(self, y_pred):
        """Returns what the likelihood is of, shaped as the outputs; probabilities as their logits.

        Args:
            y_pred: Nest of one tensor.
        """
        (y_pred,) = tf.nest.flatten(y_pred)
        z = y_pred
        if not self.is_gaussian and not self.from_logits:
            z = keras_private.logits(y_pred)
            if z is None:
                z = tf.math.log(y_pred)
                z = z if self.kind == "categorical" else z - tf.math.log1p(-y_pred)
        return z

    def roots(self, z):
        """Returns L, `(cases, positions, k, k)`, with LL' the second derivative of the negative log-likelihood at each position, at unit noise."""
        identity = np.eye(z.shape[-1])
        if self.is_gaussian:
            return np.broadcast_to(identity, (*z.shape, z.shape[-1]))
        if self.kind == "bernoulli":
            p = _sigmoid(z)
            return np.sqrt(p * (1 - p))[..., None] * identity
        root = np.sqrt(softmax(z))
        return root[..., None] * (identity - root[..., None] * root[..., None, :])

    def log_likelihood(self, z, y, weights):
        """Returns the logarithm of the likelihood of a classifier's targets, a float.

        Args:
            z: Array `(cases, positions, k)`, logits.
            y: Targets, as in `fit`.
            weights: Array of the shape of z or, where classes exclude each other, `(cases, positions, 1)`.
        """
        if self.kind == "bernoulli":
            found = np.reshape(y, z.shape) * z - np.logaddexp(0, z)
        else:
            logs = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
            if self.is_sparse:
                # Under a mask there may be any number.
                classes = np.where(weights > 0, np.reshape(y, (*z.shape[:-1], 1)), 0).astype(int)
                found = np.take_along_axis(logs, classes, -1)
            else:
                found = np.sum(np.reshape(y, z.shape) * logs, -1, keepdims=True)
        return np.sum(np.where(weights > 0, weights * found, 0))

    def probabilities(self, z, covariance):
        """Returns the mean probabilities of normally distributed logits, approximately: `(cases, positions, k)`.

        Of two classes by the probit approximation (MacKay 1992), `sigmoid(z / sqrt(1 + pi/8 variance))`; of more from that of every pair (Lu, Ie &
        Sha 2020, *Mean-field approximation to Gaussian-softmax integral*), so that what all logits have in common does not count.

        Args:
            z: Array `(cases, positions, k)`, the means.
            covariance: Array `(cases, positions, k, k)`.
        """
        variance = np.diagonal(covariance, axis1=-2, axis2=-1)
        if self.kind == "bernoulli":
            return _sigmoid(z / np.sqrt(1 + np.pi / 8 * variance))
        of_pairs = np.maximum(variance[..., None] + variance[..., None, :] - 2 * covariance, 0)
        odds = (z[..., None] - z[..., None, :]) / np.sqrt(1 + np.pi / 8 * of_pairs)
        logs = -np.logaddexp.reduce(-odds, axis=-1)
        return softmax(logs)

    def squashed(self, z):
        """Returns the probabilities of logits, arrays of the same shape."""
        return _sigmoid(z) if self.kind == "bernoulli" else softmax(z)


def likelihood_of(model, method):
    """Returns the `Likelihood` of a compiled model's loss.

    Args:
        model: `HFModel`.
        method: String, the name of what needs it, for errors.

    Raises:
        ValueError: If the model has several losses, or one without a likelihood.
    """
    losses = [loss for loss in keras.tree.flatten(model.loss) if loss is not None]
    num_outputs = len(keras.tree.flatten(getattr(model.network, "outputs", None) or [None]))
    if overrides_compute_loss(model) or len(losses) != 1 or num_outputs != 1:
        raise ValueError(
            f"`{method}` needs one output and one loss that is the logarithm of a likelihood: {_CURES}. "
            f"Received: loss={model.loss!r}{', and an overridden `compute_loss`' if overrides_compute_loss(model) else ''}."
        )
    loss = standard_loss(losses[0])
    kind, settings = kind_of(loss), loss.get_config() if kind_of(loss) else {}
    if settings.get("reduction") not in ("sum_over_batch_size", "mean", "sum"):
        raise ValueError(
            f"`{method}` needs a loss that is the logarithm of a likelihood: {_CURES}, without `label_smoothing` and `ignore_class`. "
            f"Received: loss={losses[0]!r}."
        )
    is_sparse = type(loss) is keras.losses.SparseCategoricalCrossentropy
    return Likelihood(kind, bool(settings.get("from_logits")), is_sparse)


def softmax(z):
    """Returns the softmax over the last axis."""
    shifted = np.exp(z - z.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def _sigmoid(z):
    return np.exp(-np.logaddexp(0, -z))
