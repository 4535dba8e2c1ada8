"""What the compiled loss says was observed: posteriors, evidence and covariances against dense NumPy, and data said in two ways.

The oracles get the data as elementary values, a weight and a group for each, and share no code with the package but the network.
"""

from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import normal

from keras_hf import DirectSolver, HessianFree, HFModel
from keras_hf.pinn import PINN, derivatives

pytestmark = pytest.mark.usefixtures("float64")

NUM_CASES, STEPS, UNITS = 14, 3, 4
LOSSES = {
    "mse": (keras.losses.MeanSquaredError, {}),
    "binary": (keras.losses.BinaryCrossentropy, {"from_logits": True}),
    "categorical": (keras.losses.CategoricalCrossentropy, {"from_logits": True}),
    "sparse": (keras.losses.SparseCategoricalCrossentropy, {"from_logits": True}),
}
FORMS = "plain", "mask", "weights of 0", "weights", "loss weight", "sum", "heads", "frozen", "decay"
CELLS = [(loss, form) for loss in LOSSES for form in FORMS]
# One of each kind in the fast run.
FAST = [("mse", "mask"), ("mse", "decay"), ("sparse", "mask"), ("categorical", "sum"), ("binary", "weights of 0")]


class Case(NamedTuple):
    """A compiled model, its data, and what an oracle needs: weights of values `(cases, positions, 1 or k)`, and the loss times which is the sum."""

    model: HFModel
    x: np.ndarray
    y: np.ndarray
    sample_weight: object
    weights: np.ndarray
    multiplier: float


def case(loss, form, weight_decay=None):
    kind, settings = LOSSES[loss]
    has_steps, k, rng = form in ("mask", "heads"), 3, np.random.default_rng(len(form))
    shape = (STEPS, 2) if has_steps else (2,)
    x = rng.normal(size=(NUM_CASES, *shape))
    is_there = np.ones(x.shape[:-1])
    if form == "mask":
        is_there[::2, -1] = 0
        x *= is_there[..., None]
    classes = rng.integers(0, k, x.shape[:-1])
    y = {"mse": np.sin(x[..., :1] + np.arange(k)) + [0.05, 0.2, 0.5] * rng.normal(size=(*classes.shape, k))}.get(
        loss, classes if loss == "sparse" else np.eye(k)[classes]
    )
    first, *stack = layers.Dense(UNITS, "tanh"), layers.Dense(k)
    stack = [*([layers.Masking()] if form == "mask" else []), first, *stack]
    first.trainable = form != "frozen"
    model = HFModel(keras.Sequential([keras.Input(shape), *stack]))
    loss_weight = 2.5 if form == "loss weight" else None
    reduction = "sum" if form == "sum" else "sum_over_batch_size"
    decay = weight_decay or (0.03 if form == "decay" else None)
    optimizer = HessianFree(solver=DirectSolver(), weight_decay=decay, growing_batch=None, damping=1.0)
    model.compile(optimizer, kind(reduction=reduction, **settings), loss_weights=loss_weight and [loss_weight])
    model.build((None, *shape))
    model.set_weights([0.7 * rng.normal(size=weight.shape) for weight in model.get_weights()])
    sample_weight = None
    if form.startswith("weights"):
        sample_weight = rng.uniform(0.5, 2, NUM_CASES)
        sample_weight[:3] *= form == "weights"
    weights = is_there.reshape(NUM_CASES, -1, 1)
    count = weights.sum()
    if sample_weight is not None:
        weights = weights * sample_weight[:, None, None]
    if loss in ("mse", "binary"):
        weights = np.repeat(weights, k, -1)
    multiplier = 1.0 if form == "sum" else count
    # A mean over the last axis; half a square.
    multiplier *= {"mse": k / 2, "binary": k}.get(loss, 1.0)
    return Case(model, x, y, sample_weight, weights, multiplier / (loss_weight or 1.0))


# Oracles.


class Oracle:
    """Dense matrices of a network of two Dense layers, `columns` those of the weights that are uncertain."""

    def __init__(self, loss, given, kind="full"):
        model, x = given.model, tf.constant(given.x)
        self.is_gaussian, self.weights, self.loss = loss == "mse", given.weights, loss
        with tf.GradientTape(persistent=True) as tape:
            z = tf.reshape(model.network(x, training=False), [NUM_CASES, *given.weights.shape[1:2], -1])
        variables = model.trainable_variables if kind == "full" else model.trainable_variables[-2:]
        parts = [tape.jacobian(z, variable.value, experimental_use_pfor=False) for variable in variables]
        jacobian = np.concatenate([part.numpy().reshape(*z.shape, -1) for part in parts], -1)
        self.mean = np.concatenate([variable.numpy().ravel() for variable in variables])
        self.z, k = z.numpy(), z.shape[-1]
        roots = np.stack([_root(loss, each) for each in self.z.reshape(-1, k)]).reshape(*self.z.shape, k)
        self.roots = roots * np.sqrt(np.broadcast_to(given.weights, self.z.shape))[..., None, :]
        rows = np.einsum("npji,npjw->npiw", self.roots, jacobian)
        # The groups are columns, where there is noise.
        count = k if self.is_gaussian else 1
        self.parts = [rows[:, :, g::count].reshape(-1, rows.shape[-1]) for g in range(count)]
        self.parts = [part.T @ part for part in self.parts]
        self._sums(given, count)

    def _sums(self, given, count):
        self.squares = self.counts = None
        if self.is_gaussian:
            differences = self.weights * (self.z - given.y.reshape(self.z.shape)) ** 2
            self.squares = np.array([differences[..., g].sum() for g in range(count)])
            self.counts = np.array([np.count_nonzero(self.weights[..., g]) for g in range(count)])

    def posterior(self, prior, noise=None):
        """Covariance, variances of the noise and gamma; the prior is a precision, "evidence", or that of the loss, `(number,)`."""
        variances = np.ones(len(self.parts)) if self.squares is None else self.squares / self.counts
        variances = np.full(len(self.parts), noise**2) if noise else variances
        gammas, precision, pooled = np.zeros(len(self.parts)), 1.0, 1.0
        for _ in range(400):
            curvature = sum(part / variance for part, variance in zip(self.parts, variances, strict=True))
            if self.squares is not None and noise is None:
                pooled = self.squares.sum() / (self.counts.sum() - gammas.sum())
            elif noise:
                pooled = noise**2
            if prior == "evidence":
                precision = (gammas.sum() or len(self.mean)) / np.sum(self.mean**2)
            else:
                precision = prior[0] / pooled if isinstance(prior, tuple) else prior
            covariance = np.linalg.inv(curvature + precision * np.eye(len(curvature)))
            pairs = zip(self.parts, variances, strict=True)
            gammas = np.array([np.trace(part @ covariance) / variance for part, variance in pairs])
            if self.squares is not None and noise is None:
                variances = self.squares / (self.counts - gammas)
        return covariance, variances, gammas.sum()


def _root(loss, z):
    if loss == "mse":
        return np.eye(len(z))
    if loss == "binary":
        p = 1 / (1 + np.exp(-z))
        return np.diag(np.sqrt(p * (1 - p)))
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    return np.diag(np.sqrt(p)) - np.outer(p, np.sqrt(p))


class KroneckerOracle(Oracle):
    """One product a layer: the mean of aa' over positions and columns that count, times the sum of dd'."""

    def __init__(self, loss, given):
        super().__init__(loss, given)
        first, last = (layer for layer in given.model.network.layers if layer.weights)
        inputs = given.x.reshape(*self.z.shape[:2], -1)
        hidden = np.tanh(inputs @ first.kernel.numpy() + first.bias.numpy())
        of_last = np.swapaxes(self.roots, 2, 3)
        of_first = (of_last @ last.kernel.numpy().T) * (1 - hidden**2)[:, :, None]
        pairs = [(hidden, of_last)] if not first.trainable else [(inputs, of_first), (hidden, of_last)]
        size, count = len(self.mean), len(self.parts)
        self.parts, place = [np.zeros((size, size)) for _ in range(count)], 0
        for a, d in pairs:
            a = np.concatenate([a, np.ones((*a.shape[:2], 1))], -1)
            is_there = d.any(-1)
            moment = np.einsum("npc,npi,npj->ij", is_there, a, a) / is_there.sum()
            n = a.shape[-1] * d.shape[-1]
            for group in range(count):
                own = d[:, :, group::count].reshape(-1, d.shape[-1])
                self.parts[group][place : place + n, place : place + n] = np.kron(moment, own.T @ own)
            place += n


@pytest.mark.parametrize(
    "cell", [cell if cell in FAST else pytest.param(cell, marks=pytest.mark.slow) for cell in CELLS], ids="-".join
)
def test_posteriors_are_those_of_dense_matrices(cell):
    loss, form = cell
    given = case(loss, form)
    priors = {"prior_precision": [3.0, "evidence"], "noise": [None, 0.4] if loss == "mse" else [None]}
    for structure in ("full", "last_layer", "kronecker"):
        oracle = KroneckerOracle(loss, given) if structure == "kronecker" else Oracle(loss, given, structure)
        for noise in priors["noise"]:
            for prior in [None] if form == "decay" else priors["prior_precision"]:
                found = given.model.laplace(
                    given.x, given.y, given.sample_weight, structure=structure, noise=noise, prior_precision=prior
                )
                expected = (given.multiplier * 0.03,) if prior is None else prior
                covariance, variances, gamma = oracle.posterior(expected, noise)
                np.testing.assert_allclose(found.covariance, covariance, rtol=1e-6, atol=1e-9)
                assert found.num_effective == pytest.approx(gamma, rel=1e-7)
                np.testing.assert_allclose(found.noise, np.sqrt(variances) if np.ndim(found.noise) else noise or 1)
                assert np.ndim(found.noise) == (loss == "mse" and noise is None)


@pytest.mark.parametrize(
    "cell", [cell if cell in FAST else pytest.param(cell, marks=pytest.mark.slow) for cell in CELLS], ids="-".join
)
def test_evidence_counts_what_was_observed(cell):
    loss, form = cell
    if form == "decay":
        return
    given = case(loss, form, weight_decay="evidence")
    weights, decay = given.model.get_weights(), 0.02
    given.model.build((None, *given.x.shape[1:]))
    given.model._build_optimizer()
    given.model.optimizer.weight_decay.assign(decay)
    oracle = Oracle(loss, given)
    total = sum(oracle.parts) / given.multiplier
    logs = given.model.fit(given.x, given.y, sample_weight=given.sample_weight, epochs=1, verbose=0).history
    logs = {key: value[0] for key, value in logs.items()}
    gamma = np.trace(np.linalg.solve(total + decay * np.eye(len(total)), total))
    assert logs["num_effective"] == pytest.approx(gamma, rel=1e-7)
    number = np.count_nonzero(np.broadcast_to(given.weights, (*given.weights.shape[:2], given.weights.shape[2])))
    assert logs["num_values"] == number
    assert loss == "mse" or logs["loss_multiplier"] == pytest.approx(given.multiplier, rel=1e-7)
    squared = sum(np.sum(w**2) for w, own in zip(weights, given.model.weights, strict=True) if own.trainable)
    if loss == "mse":
        expected = 2 * gamma * logs["data_loss"] / (squared * (number - gamma))
    else:
        expected = gamma / (squared * given.multiplier)
    changed = np.clip(expected, decay / 3, 3 * decay)
    share = gamma / (number if loss == "mse" else given.multiplier)
    if share > 0.5 and expected < decay:
        changed = decay
    assert float(given.model.optimizer.weight_decay.numpy()) == pytest.approx(changed, rel=1e-6)
