"""Laplace's approximation: the distribution of weights around trained ones, and what predictions make of it."""

import logging
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_hf.common import checks, files, keras_private
from keras_hf.common.vectors import num_weights, pack
from keras_hf.posterior.evidence import most_probable, noise_variance
from keras_hf.posterior.gaussian import Dual, Kronecker, Primal, restored
from keras_hf.posterior.likelihood import Likelihood
from keras_hf.posterior.outputs import Outputs
from keras_hf.problem.capture import is_capturable, is_transposed, kernel_and_bias
from keras_hf.solvers.kronecker import factored_layers

_logger = logging.getLogger("keras_hf")

STRUCTURES = "full", "kronecker", "last_layer"
# An (n, n) matrix of float64 takes 200 MB there, its inverse ten seconds, and its eigenvalues a minute.
_MOST_WEIGHTS = 5000
# Numbers of a root of the curvature that is kept (512 MiB).
_KEPT_FLOATS = 2**26


class Prediction(NamedTuple):
    """A prediction of a network for regression, with what is not known of it; see `Laplace.predict`.

    Attributes:
        mean: Array, the outputs at the trained weights.
        std: Array of the same shape, standard deviations of the function: from the weights alone.
        observation_std: Array of the same shape, standard deviations of a new observation of unit weight: the noise, too.
        covariance: Array `(cases, k, k)`, that of the k outputs of the function.
    """

    mean: np.ndarray
    std: np.ndarray
    observation_std: np.ndarray
    covariance: np.ndarray


class ClassPrediction(NamedTuple):
    """A prediction of a classifier; see `Laplace.predict`.

    Attributes:
        probabilities: Array `(cases, k)`, of the classes, averaged over what is not known of the logits.
        logits: Array `(cases, k)`, at the trained weights.
        covariance: Array `(cases, k, k)`, of the logits.
    """

    probabilities: np.ndarray
    logits: np.ndarray
    covariance: np.ndarray


class Laplace:
    """The distribution of weights that the data leave open, around trained ones; `HFModel.laplace` makes it.

    A normal distribution whose inverse covariance is the second derivative of the negative log-posterior, with the Gauss-Newton matrix G in place of
    that of the likelihood:

        covariance = (G / noise^2 + diag prior_precision)^-1

    It belongs to the weights that it was made at: methods that need the network raise an error once they have changed.

    Attributes:
        structure: "full", "kronecker" or "last_layer".
        noise: Float, the standard deviation of an observation of unit weight; 1 for classifiers.
        prior_precision: Array `(n,)`, the prior's inverse variance of every weight, 0 where it has none.
        log_evidence: Float, the logarithm of the probability of the data with this prior and noise, by Laplace's method. It compares networks,
            priors and noise on the same data; larger is better. NaN where a weight has no prior, since it is not defined then.
        num_effective: Float, MacKay's gamma: how many of the weights the data determine.
        variables: The `keras.Variable`s whose weights are uncertain, in the order of flat vectors.

    References:
        MacKay (1992), *A practical Bayesian framework for backpropagation networks*; MacKay (1992), *The evidence framework applied to classification
        networks*; Ritter, Botev & Barber (2018), *A scalable Laplace approximation for neural networks*; Daxberger et al. (2021), *Laplace redux*.
    """

    def __init__(self, structure, variables, mean, distribution, likelihood, noise, prior_precision, numbers, outputs):
        self.structure, self.variables = structure, variables
        self.noise, self.prior_precision = noise, prior_precision
        self.log_evidence, self.num_effective = numbers
        self._mean, self._distribution = mean, distribution
        self._likelihood, self._outputs = likelihood, outputs

    @property
    def covariance(self):
        """The covariance of the weights, `(n, n)`. Memory: that of the matrix."""
        return self.noise**2 * self._distribution.covariance()

    def sample(self, num_samples, seed=None):
        """Draws weights.

        Args:
            num_samples: Integer >= 1.
            seed: Integer or `np.random.Generator`; `None` = another draw in every call.

        Returns:
            Array `(num_samples, n)`, flat vectors in the order of `variables`, each flattened row by row.
        """
        size = checks.count("num_samples", num_samples), self._distribution.num_normals
        normals = np.random.default_rng(seed).normal(size=size)
        return self._mean + self.noise * self._distribution.roots(normals)

    def predict(self, x, num_samples=None, seed=None):
        """Predicts with error bars: outputs are linear in the weights within a few standard deviations, so that their covariance is `J C J'`.

        For a `PINN`, `x` are points, and the prediction is of the solution.

        Cost: one gradient for each case and output, and n^2 multiplications for each (full); a sample costs no more.

        Args:
            x: Inputs, arrays, as in `HFModel.predict`.
            num_samples: For classifiers, how many samples of the logits probabilities are averaged over; `None` = the probit approximation (MacKay
                1992; Lu, Ie & Sha 2020), which needs none.
            seed: As in `sample`.

        Returns:
            A `Prediction`, or for a classifier a `ClassPrediction`.

        Raises:
            ValueError: If the weights have changed since, if `x` does not have the shape that the network takes, or if `num_samples` is given where
                the outputs themselves are predicted.
        """
        if self._likelihood.is_gaussian and num_samples is not None:
            raise ValueError(
                f"`num_samples` is for the probabilities of classifiers; outputs have a mean and a deviation. Received: num_samples={num_samples}."
            )
        self._require_same_weights()
        outputs = self._outputs.at_points
        tensors = outputs.tensors(x)
        shape = outputs.shape(tensors)
        means, covariances = [], []
        for _, values, jacobian in outputs.pieces(tensors, int(np.prod(shape[1:]))):
            means.append(values)
            covariances.append(self.noise**2 * self._distribution.forms(jacobian))
        mean, covariance = np.concatenate(means), np.concatenate(covariances)
        if self._likelihood.is_gaussian:
            std = np.sqrt(np.maximum(np.diagonal(covariance, axis1=1, axis2=2), 0)).reshape(shape)
            return Prediction(mean.reshape(shape), std, np.sqrt(std**2 + self.noise**2), covariance)
        if num_samples is None:
            probabilities = self._likelihood.probabilities(mean, covariance)
        else:
            rng = np.random.default_rng(seed)
            values, vectors = np.linalg.eigh(covariance)
            roots = vectors * np.sqrt(np.maximum(values, 0))[:, None]
            normals = rng.normal(size=(checks.count("num_samples", num_samples), *mean.shape))
            logits = mean + np.einsum("cij,scj->sci", roots, normals)
            probabilities = self._likelihood.squashed(logits).mean(0)
        return ClassPrediction(probabilities, mean, covariance)

    def _require_same_weights(self):
        now = pack([variable.value for variable in self.variables], tf.float64).numpy()
        if not np.array_equal(now, self._mean):
            raise ValueError(
                "This distribution is that around the weights it was made at, and they have changed since. Call `model.laplace` again, or give the "
                "model its weights of then."
            )

    def save(self, path):
        """Writes everything but the network to a file of NumPy arrays, in the format of `.npz`, which `load` reads. The network is saved by Keras.

        Plain arrays: they can be read without this package, and the network that they belong to has a format of its own.

        Args:
            path: String or path-like object, the file, whatever its name ends in; an old one is replaced by a complete one.
        """
        settings = {key: np.asarray(value) for key, value in self._likelihood._asdict().items()}
        arrays = {f"distribution_{key}": np.asarray(value) for key, value in self._distribution.arrays().items()}
        # Of a name NumPy would make another.
        with files.replacing(path) as new, open(new, "wb") as file:
            np.savez(
                file,
                structure=self.structure,
                mean=self._mean,
                noise=self.noise,
                prior_precision=self.prior_precision,
                numbers=[self.log_evidence, self.num_effective],
                places=[_place(variable, self._outputs.network) for variable in self.variables],
                **{f"likelihood_{key}": value for key, value in settings.items()},
                **arrays,
            )

    @classmethod
    def load(cls, path, network):
        """Reads a file that `save` has written.

        Args:
            path: String or path-like object.
            network: `keras.Model`, with the weights that it had then; the network, not the `HFModel`.

        Raises:
            ValueError: If it is another network, or has other weights.
        """
        with np.load(path) as file:
            arrays = dict(file)
        known, places = network.trainable_variables, arrays["places"]
        variables = [known[place] for place in places] if max(places) < len(known) else []
        if num_weights([variable.value for variable in variables]) != len(arrays["mean"]):
            raise ValueError(
                "The network must be the one that the distribution was made with. "
                f"Received: a network of {len(known)} trainable weights for a distribution of {len(arrays['mean'])} numbers in {len(places)} of them."
            )

        def part(name):
            return {key.removeprefix(name): value for key, value in arrays.items() if key.startswith(name)}

        likelihood = Likelihood(**{key: value.item() for key, value in part("likelihood_").items()})
        found = cls(
            str(arrays["structure"]),
            variables,
            arrays["mean"],
            restored(part("distribution_")),
            likelihood,
            float(arrays["noise"]),
            arrays["prior_precision"],
            arrays["numbers"].tolist(),
            Outputs(network, [variable.value for variable in variables], likelihood.outputs),
        )
        found._require_same_weights()
        return found


def laplace(model, data, likelihood, structure, noise, prior_precision):
    """Returns the `Laplace` of a compiled model at its weights; see `HFModel.laplace`.

    Args:
        model: `HFModel`.
        data: `Data`, tensors.
        likelihood: `Likelihood`.
        structure: One of `STRUCTURES`, or "auto".
        noise: Float > 0, or `None`.
        prior_precision: Float > 0, "evidence" or `None`.
    """
    noise, prior_precision = _checked(likelihood, structure, noise, prior_precision)
    traced = model.setup_for(data).structure
    if traced.batch_normalizations:
        names = ", ".join(layer.name for layer in traced.batch_normalizations)
        raise ValueError(
            f"`laplace` needs cases with outputs of their own. Received: a network with BatchNormalization, {names}. Take LayerNormalization, or "
            "`structure='last_layer'` of a network without it."
        )
    structure, variables, layers = _chosen(model, structure, traced.captured)
    values = [variable.value for variable in variables]
    outputs = Outputs(
        model.network, values, likelihood.outputs, traced.has_vectorizable_rows and not traced.nesting_ops
    )
    z = outputs.values(data.x)
    weights = _weights(data.sample_weight, z.shape, likelihood)
    curvature = _curvature(outputs, data.x, z, weights, likelihood, structure, variables, layers)
    mean = pack(values, tf.float64).numpy()

    # Everything is relative to unit noise, as the compiled loss is: the noise scales curvature and regularizers alike.
    last = np.shape(data.y)[-1] if np.ndim(data.y) > 2 else z.shape[1]
    decay = 0.0 if model.optimizer.weight_decay is None else float(model.optimizer.weight_decay.numpy())
    regularization = likelihood.num_values(z.shape, last) * (decay + _regularization(variables))
    if likelihood.is_gaussian:
        squares = np.sum(weights * (z - np.reshape(data.y, z.shape).astype("float64")) ** 2)
        count = np.count_nonzero(weights)
    variance = noise**2 if noise else None if likelihood.is_gaussian else 1.0
    squared_mean = np.sum(mean**2)
    if prior_precision is None and regularization.any():
        added = regularization
    elif prior_precision in (None, "evidence"):
        of_noise = {"squares": squares, "num_values": count} if likelihood.is_gaussian else {}
        ratio, variance = most_probable(curvature.spectrum, squared_mean, variance=variance, **of_noise)
        added = np.full(len(mean), ratio)
    else:
        variance = variance or noise_variance(curvature.spectrum, prior_precision, squares, count)
        added = np.full(len(mean), prior_precision * variance)
    try:
        distribution = curvature.factorized(added)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "The data and the prior must determine every weight. Received: weights without a regularizer that the data leave open, or values that "
            "are not finite. Leave `prior_precision` to evidence: `prior_precision='evidence'`."
        ) from error
    if variance is None:
        variance = squares / max(count - distribution.num_effective, 1.0)

    prior = distribution.diagonal
    log_prior = 0.5 * np.sum(np.log(prior)) if np.all(prior > 0) else np.nan
    log_prior -= 0.5 * np.sum(prior * mean**2) / variance
    if likelihood.is_gaussian:
        used = weights[weights > 0]
        log_likelihood = -0.5 * (squares / variance + np.sum(np.log(2 * np.pi * variance / used)))
    else:
        log_likelihood = likelihood.log_likelihood(z, data.y.numpy(), weights)
    log_evidence = log_likelihood + log_prior - 0.5 * distribution.log_determinant
    _logger.info("Laplace's approximation of '%s': %s, %d weights.", model.network.name, structure, len(mean))
    return Laplace(
        structure,
        variables,
        mean,
        distribution,
        likelihood,
        float(np.sqrt(variance)),
        added / variance,
        (float(log_evidence), float(distribution.num_effective)),
        outputs,
    )


def _place(variable, network):
    return next(place for place, known in enumerate(network.trainable_variables) if known is variable)


def _checked(likelihood, structure, noise, prior_precision):
    """Returns noise and prior precision; raises errors about wrong settings."""
    if noise is not None:
        if not likelihood.is_gaussian:
            raise ValueError(f"`noise` is that of regression; classes have none. Received: noise={noise}.")
        noise = checks.positive("noise", noise)
    if structure not in ("auto", *STRUCTURES):
        raise ValueError(
            f"`structure` must be 'auto' or one of {', '.join(map(repr, STRUCTURES))}. Received: structure={structure!r}."
        )
    if prior_precision not in (None, "evidence"):
        prior_precision = checks.positive("prior_precision", prior_precision)
    return noise, prior_precision


def _chosen(model, structure, captured):
    """Returns the structure that is taken, the variables that are uncertain and, of Kronecker factors, their layers."""
    variables = model.trainable_variables
    # The bias of a transposed convolution has no part in its factors.
    captured = [layer for layer in captured if is_capturable(layer) and not is_transposed(layer)]
    layers = factored_layers(captured, [variable.value for variable in variables])
    count = num_weights([variable.value for variable in variables])
    if structure == "auto":
        structure = "full" if count <= _MOST_WEIGHTS else "kronecker" if layers else "last_layer"
    if structure == "full" and count > _MOST_WEIGHTS:
        raise ValueError(
            f"`structure='full'` forms matrices of at most {_MOST_WEIGHTS} weights. Received: {count} trainable weights. Take 'kronecker' or "
            "'last_layer'."
        )
    if structure == "kronecker":
        if not layers:
            raise ValueError(
                "`structure='kronecker'` needs trained layers such as Dense and convolutions; see `KroneckerFactored`. Received: a network without "
                "any. Take 'last_layer'."
            )
        variables = [variable for layer in layers for variable in kernel_and_bias(layer)]
    if structure == "last_layer":
        last = [layer for layer in keras_private.all_layers(model.network) if layer.trainable_weights][-1]
        variables = last.trainable_variables
        if num_weights([variable.value for variable in variables]) > _MOST_WEIGHTS:
            raise ValueError(
                f"`structure='last_layer'` forms matrices of at most {_MOST_WEIGHTS} weights. Received: more in '{last.name}'. Take "
                "'kronecker'."
            )
    return structure, variables, layers


def _weights(sample_weight, shape, likelihood):
    """Returns the weight of every output, `(cases, k)`, or where classes exclude each other, of every case, `(cases,)`."""
    is_categorical = likelihood.kind == "categorical"
    weights = np.ones(1) if sample_weight is None else sample_weight.numpy().astype("float64")
    if np.any(weights < 0):
        raise ValueError(
            "`sample_weight` must not be negative: it divides the variance of the noise. Received: negative ones."
        )
    if is_categorical:
        return np.broadcast_to(weights.reshape(-1), shape[:1])
    # One for each value of the loss, which is a mean over the last axis of the targets.
    weights = np.broadcast_to(weights.reshape(weights.shape[0], -1), (shape[0], max(1, weights.size // shape[0])))
    return np.repeat(weights, shape[1] // weights.shape[1], axis=1)


def _regularization(variables):
    """Returns the second derivative of the regularizers, `(n,)`; raises an error about those that no normal prior is behind."""
    found = []
    for variable in variables:
        regularizer, strength = variable.regularizer, 0.0
        if regularizer is not None:
            if not isinstance(regularizer, (keras.regularizers.L2, keras.regularizers.L1L2)) or getattr(
                regularizer, "l1", 0
            ):
                raise ValueError(
                    f"`laplace` needs priors that are normal, regularizers L2. Received: {regularizer!r} of '{variable.path}'. Hand over "
                    "`prior_precision`, or leave it out."
                )
            strength = 2 * float(regularizer.l2)
        found.append(np.full(int(np.prod(variable.shape)), strength))
    return np.concatenate(found)


def _curvature(outputs, x, z, weights, likelihood, structure, variables, layers):
    """Returns the curvature at unit noise in its form: `gaussian.Primal`, `Dual` or `Kronecker`."""
    roots = likelihood.roots(z) * np.sqrt(weights.reshape(len(z), 1, -1))
    values = [variable.value for variable in variables]
    count, size = num_weights(values), z.shape[1]
    if structure == "kronecker":
        factors = outputs.moments(x, roots, layers)
        return Kronecker(factors)
    is_dual = z.size < count and z.size * count <= _KEPT_FLOATS
    rows, matrix = [], np.zeros((0 if is_dual else count,) * 2)
    for cases, _, jacobian in outputs.pieces(x, size):
        part = np.einsum("mji,mjn->min", roots[cases], jacobian).reshape(-1, count)
        if is_dual:
            rows.append(part)
        else:
            matrix += part.T @ part
    return Dual(np.concatenate(rows)) if is_dual else Primal(matrix)
