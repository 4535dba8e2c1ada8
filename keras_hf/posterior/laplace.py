"""Laplace's approximation: the distribution of weights around trained ones, and what predictions make of it."""

import functools
import logging
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_hf.common import checks, files, keras_private
from keras_hf.common.replaced import replaced
from keras_hf.common.vectors import num_weights, pack
from keras_hf.network.capture import is_capturable, is_transposed, kernel_and_bias
from keras_hf.network.spectral_norm import UnitSpectralNorm
from keras_hf.posterior.evidence import GroupedFit, most_probable, noise_of_groups, noise_variance
from keras_hf.posterior.gaussian import Dual, Kronecker, Primal, restored
from keras_hf.posterior.likelihood import Likelihood
from keras_hf.posterior.outputs import Outputs
from keras_hf.problem.observations import observations
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
        observation_std: Array of the same shape, standard deviations of a new observation of unit weight: the noise, too. NaN for a `PINN` whose
            terms have each a noise of their own.
        covariance: Array `(cases, k, k)`, that of the k outputs of the function.
    """

    mean: np.ndarray
    std: np.ndarray
    observation_std: np.ndarray
    covariance: np.ndarray


class ClassPrediction(NamedTuple):
    """A prediction of a classifier; see `Laplace.predict`.

    Attributes:
        probabilities: Array shaped as the outputs, `(cases, ..., k)`, of the k classes, averaged over what is not known of the logits.
        logits: Array of the same shape, at the trained weights.
        covariance: Array `(cases, m, m)`, of all m logits of a case.
    """

    probabilities: np.ndarray
    logits: np.ndarray
    covariance: np.ndarray


class Laplace:
    """The distribution of weights that the data leave open, around trained ones; `HFModel.laplace` makes it.

    A normal distribution whose inverse covariance is the second derivative of the negative log-posterior, with the Gauss-Newton matrix G in place of
    that of the likelihood:

        covariance = (sum over columns of G / noise^2, plus diag prior_precision)^-1

    It belongs to the weights that it was made at: methods that need the network raise an error once they have changed.

    Attributes:
        structure: "full", "kronecker" or "last_layer".
        noise: Float, the standard deviation of an observation of unit weight; 1 for classifiers. Where it was found and there are several columns of
            outputs, or terms of a `PINN`, an array of that of each, NaN where none was observed.
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
        (self.noise, self._unit), self.prior_precision = noise, prior_precision
        self.log_evidence, self.num_effective = numbers
        self._mean, self._distribution = mean, distribution
        self._likelihood, self._outputs = likelihood, outputs

    @property
    def covariance(self):
        """The covariance of the weights, `(n, n)`. Memory: that of the matrix."""
        return self._unit**2 * self._distribution.covariance()

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
        return self._mean + self._unit * self._distribution.roots(normals)

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
            covariances.append(self._unit**2 * self._distribution.forms(jacobian))
        mean, covariance = np.concatenate(means), np.concatenate(covariances)
        if self._likelihood.is_gaussian:
            std = np.sqrt(np.maximum(np.diagonal(covariance, axis1=1, axis2=2), 0)).reshape(shape)
            # The terms of a `PINN` are not the outputs of its solution.
            noise = np.nan if np.ndim(self.noise) and outputs is not self._outputs else self.noise
            return Prediction(mean.reshape(shape), std, np.sqrt(std**2 + noise**2), covariance)
        mean = mean.reshape(len(mean), -1, shape[-1])
        if num_samples is None:
            of_positions = np.einsum("npipj->npij", covariance.reshape(*mean.shape, *mean.shape[1:]))
            probabilities = self._likelihood.probabilities(mean, of_positions)
        else:
            rng = np.random.default_rng(seed)
            values, vectors = np.linalg.eigh(covariance)
            roots = vectors * np.sqrt(np.maximum(values, 0))[:, None]
            normals = rng.normal(size=(checks.count("num_samples", num_samples), *covariance.shape[:2]))
            logits = mean + np.einsum("cij,scj->sci", roots, normals).reshape(-1, *mean.shape)
            probabilities = self._likelihood.squashed(logits).mean(0)
        return ClassPrediction(probabilities.reshape(shape), mean.reshape(shape), covariance)

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
                unit=self._unit,
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

        # Files of versions up to 0.3 say more of the likelihood, and have one noise.
        likelihood = Likelihood(*[arrays[f"likelihood_{name}"].item() for name in Likelihood._fields])
        noise = arrays["noise"].item() if arrays["noise"].ndim == 0 else arrays["noise"]
        found = cls(
            str(arrays["structure"]),
            variables,
            arrays["mean"],
            restored(part("distribution_")),
            likelihood,
            (noise, arrays.get("unit", arrays["noise"]).item()),
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
    setup = model.setup_for(data)
    _require_own_outputs(setup.structure)
    structure, variables, layers = _chosen(model, structure, setup.structure.captured, data.x)
    _require_determined(setup.task, variables)
    values = [variable.value for variable in variables]
    is_vectorizable = setup.structure.has_vectorizable_rows and not setup.structure.nesting_ops
    outputs = Outputs(model.network, values, likelihood.outputs, is_vectorizable)
    observed = _observed(outputs, setup.task, data, likelihood, is_one_noise=noise is not None)
    parts = _curvatures(outputs, data.x, observed, likelihood, structure, variables, layers)
    mean = pack(values, tf.float64).numpy()

    # Everything is relative to unit noise, as the compiled loss is: the noise scales curvature and regularizers alike.
    decay = 0.0 if model.optimizer.weight_decay is None else float(model.optimizer.weight_decay.numpy())
    regularization = observed.loss_multiplier * (decay + _regularization(variables))
    prior = None
    if prior_precision is None and regularization.any():
        prior = lambda variance: regularization  # noqa: E731
    elif prior_precision not in (None, "evidence"):
        prior = lambda variance: np.full(len(mean), prior_precision * variance)  # noqa: E731
    squares, num_values = observed.of_groups(likelihood, data.y)
    try:
        if len(parts) > 1:
            found = noise_of_groups(parts, squares, num_values, prior, mean)
        else:
            known = noise**2 if noise else None if likelihood.is_gaussian else 1.0
            found = _of_one_noise(parts[0], squares[0], num_values[0], prior, mean, known)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "The data and the prior must determine every weight. Received: weights without a regularizer that the data leave open, or values that "
            "are not finite. Leave `prior_precision` to evidence: `prior_precision='evidence'`."
        ) from error
    distribution, variance = found.distribution, found.variance
    log_prior = 0.5 * np.sum(np.log(distribution.diagonal)) if np.all(distribution.diagonal > 0) else np.nan
    log_prior -= 0.5 * np.sum(distribution.diagonal * mean**2) / variance
    if likelihood.is_gaussian:
        logs = num_values @ np.log(2 * np.pi * found.variances) - np.sum(np.log(observed.weights[observed.weights > 0]))
        log_likelihood = -0.5 * (squares @ (1 / found.variances) + logs)
    else:
        log_likelihood = likelihood.log_likelihood(observed.z, _only(data.y).numpy(), observed.weights)
    log_evidence = log_likelihood + log_prior - 0.5 * distribution.log_determinant
    _logger.info("Laplace's approximation of '%s': %s, %d weights.", model.network.name, structure, len(mean))
    return Laplace(
        structure,
        variables,
        mean,
        distribution,
        likelihood,
        (observed.noise(found.variances), float(np.sqrt(variance))),
        found.diagonal / variance,
        (float(log_evidence), float(distribution.num_effective)),
        outputs,
    )


def _of_one_noise(curvature, squares, num_values, prior, mean, variance):
    """Returns the `GroupedFit` of one group of values; `variance` is that of the noise, `None` where it is to be found."""
    squared_mean, spectrum = np.sum(mean**2), functools.cache(lambda: curvature.spectrum)
    if prior is None:
        ratio, variance = most_probable(spectrum(), squared_mean, squares, num_values, variance)
        diagonal = np.full(len(mean), ratio)
    elif variance is None and not np.array_equal(prior(1.0), prior(2.0)):
        # A precision of its own, not one relative to the noise.
        variance = noise_variance(spectrum(), prior(1.0)[0], squares, num_values)
        diagonal = prior(variance)
    else:
        diagonal = prior(variance)
    distribution = curvature.factorized(diagonal)
    if variance is None:
        variance = squares / max(num_values - distribution.num_effective, 1.0)
    return GroupedFit(distribution, diagonal, np.array([variance]), variance)


class _Observed(NamedTuple):
    """What cases say, float64 arrays `(cases, positions, k)`; see `observations.Observations`.

    Attributes:
        z: What the likelihood is of; see `Likelihood.outputs`.
        weights: Sample weights, 0 where nothing was observed; `(cases, positions, 1)` where classes exclude each other.
        groups: Integers from 0, shaped as the weights: which of the `known` groups a value belongs to.
        known: Integers, the groups of which something was observed; see `observations.Observations`.
        num_groups: Integer, how many there are with the others; 1 where all have one noise.
        loss_multiplier: Float, by what the loss is multiplied to be the negative log-likelihood at unit noise.
    """

    z: np.ndarray
    weights: np.ndarray
    groups: np.ndarray
    known: np.ndarray
    num_groups: int
    loss_multiplier: float

    def noise(self, variances):
        """Returns the standard deviations of the noise, a float or an array `(groups,)`, NaN where nothing was observed."""
        if self.num_groups == 1:
            return float(np.sqrt(variances[0]))
        found = np.full(self.num_groups, np.nan)
        found[self.known] = np.sqrt(variances)
        return found

    def of_groups(self, likelihood, y):
        """Returns the weighted sums of squared differences from the targets, and the numbers of values, arrays `(groups,)`."""
        num_values = np.bincount(self.groups[self.weights > 0])
        if not likelihood.is_gaussian:
            return np.zeros(1), num_values
        differences = self.z - np.reshape(_only(y), self.z.shape).astype("float64")
        squares = np.where(self.weights > 0, self.weights * differences**2, 0)
        return np.bincount(self.groups.ravel(), squares.ravel(), len(num_values)), num_values


def _observed(outputs, task, data, likelihood, is_one_noise):
    """Returns the `_Observed` of some cases."""
    y_pred = outputs.network(data.x, training=False)
    z = likelihood.outputs(y_pred).numpy().astype("float64")
    z = z.reshape(len(z), -1, z.shape[-1] if z.ndim > 1 else 1)
    found = observations(task, data, y_pred)
    weights, coefficients, groups = (
        tensor.numpy().reshape(*z.shape[:2], -1) for tensor in (found.weights, found.coefficients, found.groups)
    )
    if np.any(weights < 0):
        raise ValueError(
            "`sample_weight` must not be negative: it divides the variance of the noise. Received: negative ones."
        )
    is_there = weights > 0
    if not is_there.any():
        raise ValueError("`laplace` needs observations. Received: cases that are all masked or of weight 0.")
    if is_one_noise:
        groups = np.zeros_like(groups)
    known, numbers = np.unique(groups[is_there], return_inverse=True)
    of_known = np.zeros_like(groups)
    of_known[is_there] = numbers
    return _Observed(z, weights, of_known, known, groups.max() + 1, np.sum(weights) / np.sum(coefficients))


def _only(nest):
    """The one tensor of a nest."""
    (tensor,) = tf.nest.flatten(nest)
    return tensor


def _require_determined(task, variables):
    """Raises an error if the loss does not see the scale of uncertain weights, which only evaluation would."""
    normalized = [
        weight.path
        for weight, constraint in zip(task.weights, task.constraints, strict=True)
        if isinstance(constraint, UnitSpectralNorm) and any(weight is variable for variable in variables)
    ]
    if normalized:
        raise ValueError(
            "`laplace` needs weights that the loss determines; it does not see the scale of kernels within `SpectralNormalization`. Received: "
            f"{', '.join(normalized)}. Leave the layer out, or use `structure='last_layer'` with another last layer."
        )


def _require_own_outputs(structure):
    """Raises an error if cases have no outputs of their own, or the network adds losses."""
    if structure.batch_normalizations:
        names = ", ".join(layer.name for layer in structure.batch_normalizations)
        raise ValueError(
            f"`laplace` needs cases with outputs of their own. Received: a network with BatchNormalization, {names}. Take LayerNormalization, or "
            "`structure='last_layer'` of a network without it."
        )
    if structure.has_added_loss:
        raise ValueError(
            "`laplace` needs a loss that is the logarithm of a likelihood alone. Received: a network that adds losses of its own (`add_loss` or "
            "`activity_regularizer`). Leave them out."
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


def _chosen(model, structure, captured, x):
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
        last = _last_layer(model.network, x)
        variables = last.trainable_variables
        if num_weights([variable.value for variable in variables]) > _MOST_WEIGHTS:
            raise ValueError(
                f"`structure='last_layer'` forms matrices of at most {_MOST_WEIGHTS} weights. Received: more in '{last.name}'. Take "
                "'kronecker'."
            )
    return structure, variables, layers


def _last_layer(network, x):
    """Returns the layer through which all other weights act on the outputs of a network."""
    layers = [layer for layer in keras_private.all_layers(network) if layer.trainable_weights and layer is not network]
    x, called = tf.nest.map_structure(lambda tensor: tensor[:1], x), []

    def noted(layer):
        call = layer.call
        return lambda *args, **kwargs: called.append(layer) or call(*args, **kwargs)

    with replaced(*[(layer, "call", noted(layer)) for layer in layers]):
        network(x, training=False)
    for layer in reversed(called):
        call = layer.call
        cut = lambda *args, call=call, **kwargs: tf.nest.map_structure(tf.stop_gradient, call(*args, **kwargs))  # noqa: E731
        own = {id(variable) for variable in layer.trainable_variables}
        others = [variable.value for variable in network.trainable_variables if id(variable) not in own]
        # A block of layers that is the whole network says nothing.
        if not others and layer is not called[-1]:
            continue
        with tf.GradientTape() as tape, replaced((layer, "call", cut)):
            outputs = network(x, training=False)
        if all(gradient is None for gradient in tape.gradient(outputs, others)):
            return layer
    raise ValueError(
        "`structure='last_layer'` needs a layer through which all other weights act on the outputs. Received: a network without one. Take 'full' or "
        "'kronecker'."
    )


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


def _curvatures(outputs, x, observed, likelihood, structure, variables, layers):
    """Returns the curvature of every group of values at unit noise, all in one form: a list of `gaussian.Primal`, `Dual` or `Kronecker`."""
    z, weights = observed.z, observed.weights
    count, num_groups = num_weights([variable.value for variable in variables]), observed.groups.max() + 1
    if structure == "kronecker":
        return _kronecker(outputs, x, observed, likelihood, layers)
    roots = likelihood.roots(z) * np.sqrt(weights)[..., None, :]
    num_rows, size = z[0].size * len(z), z[0].size
    is_dual = num_rows < count and num_rows * count <= _KEPT_FLOATS
    if not is_dual and num_groups * count**2 > _KEPT_FLOATS:
        raise ValueError(
            f"The noise of {num_groups} columns or terms needs as many matrices of {count} weights. Received: more than 512 MiB. Hand over `noise`, "
            "or take `structure='last_layer'` or 'kronecker'."
        )
    rows, matrices = [[] for _ in range(num_groups)], np.zeros((num_groups, *[0 if is_dual else count] * 2))
    for cases, _, jacobian in outputs.pieces(x, size):
        part = jacobian.reshape(-1, *z.shape[1:], count)
        part = np.einsum("mtji,mtjn->mtin", roots[cases], part)
        groups = np.broadcast_to(observed.groups[cases], part.shape[:-1])
        is_there = np.broadcast_to(weights[cases], part.shape[:-1]) > 0
        for group in range(num_groups):
            own = part[is_there & (groups == group)]
            if is_dual:
                rows[group].append(own)
            else:
                matrices[group] += own.T @ own
    return [Dual(np.concatenate(own)) for own in rows] if is_dual else [Primal(matrix) for matrix in matrices]


def _kronecker(outputs, x, observed, likelihood, layers):
    """The same for "kronecker". The groups share the inputs' factor."""
    z, weights = observed.z, observed.weights
    roots = likelihood.roots(z)
    num_cases, num_positions, k = z.shape
    sums = []
    for group in range(observed.groups.max() + 1):
        own = roots * np.sqrt(np.where(observed.groups == group, weights, 0))[..., None, :]
        whole = np.zeros((num_cases, num_positions, k, num_positions, k))
        for position in range(num_positions):
            whole[:, position, :, position] = own[:, position]
        whole = whole.reshape(num_cases, num_positions * k, num_positions * k)
        sums.append(outputs.moments(x, whole[:, :, whole.any((0, 1))], layers))
    factors = [
        sum(of_group[layer][0] for of_group in sums) / max(sum(of_group[layer][2] for of_group in sums), 1)
        for layer in range(len(layers))
    ]
    return [Kronecker([(a, s) for a, (_, s, _) in zip(factors, of_group, strict=True)]) for of_group in sums]
