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

from keras_hf import ConjugateGradient, DirectSolver, HessianFree, HFModel
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
    # Several micro-batches, and a rest.
    sizes = {"micro_batch_size": 4} if weight_decay else {}
    optimizer = HessianFree(solver=DirectSolver(), weight_decay=decay, growing_batch=None, damping=1.0, **sizes)
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


# The same data said in two ways.


def posterior(
    loss, x, y, weights=None, has_mask=False, reduction="sum_over_batch_size", loss_weight=1.0, noise=None, decay=0.1
):
    """The posterior at fixed weights, the prior being that of a decay, times the loss weight, beside a mean over cases."""
    kind, settings = LOSSES[loss]
    hidden, last = layers.Dense(UNITS, "tanh"), layers.Dense(3)
    shape = x.shape[1:]
    model = HFModel(keras.Sequential([keras.Input(shape), *([layers.Masking()] if has_mask else []), hidden, last]))
    decay = decay * loss_weight
    if reduction == "sum":
        # Of a mean over cases (and steps), as the loss weight makes it.
        loss_weight = loss_weight / np.prod(x.shape[:-1])
    model.compile(HessianFree(weight_decay=decay), kind(reduction=reduction, **settings), loss_weights=[loss_weight])
    model.build((None, *shape))
    rng = np.random.default_rng(5)
    model.set_weights([0.7 * rng.normal(size=weight.shape) for weight in model.get_weights()])
    return model.laplace(x, y, weights, noise=noise)


def without(loss, rng, x, y):
    weights = rng.uniform(0.5, 2, len(x)) * (rng.random(len(x)) < 0.7)
    there = weights > 0
    # Keras' mean is over all cases: beside it, a decay is so much larger.
    kept = posterior(loss, x[there], y[there], weights[there], decay=0.1 / there.mean())
    return posterior(loss, x, y, weights), kept


def masked(loss, rng, x, y):
    x, y = (np.reshape(array, (10, 3, *array.shape[1:])) for array in (x, y))
    there = np.arange(3) < rng.integers(1, 4, 10)[:, None]
    return posterior(loss, np.where(there[..., None], x, 0), y, has_mask=True), posterior(loss, x[there], y[there])


def steps(loss, rng, x, y):
    parts = np.reshape(x, (10, 3, *x.shape[1:])), np.reshape(y, (10, 3, *y.shape[1:]))
    return posterior(loss, *parts), posterior(loss, x, y)


def scaled(loss, rng, x, y):
    return posterior(loss, x, y, loss_weight=rng.uniform(0.1, 10)), posterior(loss, x, y)


def summed(loss, rng, x, y):
    return posterior(loss, x, y, reduction="sum"), posterior(loss, x, y)


def permuted(loss, rng, x, y):
    order = rng.permutation(len(x))
    return posterior(loss, x[order], y[order]), posterior(loss, x, y)


def doubled(loss, rng, x, y):
    # Weights repeat cases where the noise is known. The mean over twice as many cases is half as large.
    noise = 0.7 if loss == "mse" else None
    twice = posterior(loss, np.tile(x, (2, 1)), np.concatenate([y, y]), noise=noise, decay=0.05)
    return twice, posterior(loss, x, y, np.full(len(x), 2.0), noise=noise)


SAID_IN_TWO_WAYS = [
    pytest.param(
        way, loss, seed, marks=[] if (loss, seed) == ("mse", 0) and way in (masked, summed) else pytest.mark.slow
    )
    for way in (masked, steps, scaled, summed, permuted, doubled, without)
    for loss in LOSSES
    for seed in range(2)
]


@pytest.mark.parametrize(("way", "loss", "seed"), SAID_IN_TWO_WAYS)
def test_the_same_data_said_in_two_ways_have_the_same_posterior(way, loss, seed):
    rng = np.random.default_rng(seed)
    x, classes = rng.normal(size=(30, 2)), rng.integers(0, 3, 30)
    targets = {
        "mse": np.sin(2 * x[:, :1] + np.arange(3)) + [0.05, 0.2, 0.5] * rng.normal(size=(30, 3)),
        "sparse": classes,
    }
    one, other = way(loss, rng, x, targets.get(loss, np.eye(3)[classes]))
    np.testing.assert_allclose(one.covariance, other.covariance, rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(one.noise, other.noise, rtol=1e-7)
    assert one.num_effective == pytest.approx(other.num_effective, rel=1e-7)
    if way is not doubled or loss != "mse":
        # Two observations of the noise are not one of half its variance.
        assert one.log_evidence == pytest.approx(other.log_evidence, rel=1e-7)


# Covariances.


def sandwich(jacobian, weights, residuals, groups, absolute_sigma):
    """The covariance of weighted least squares where each group has its own noise, or where it is `1 / weights`."""
    bread = np.linalg.inv(jacobian.T @ (weights[:, None] * jacobian))
    is_there = weights > 0
    leverage = weights * np.einsum("ri,ij,rj->r", jacobian, bread, jacobian)
    variances = np.zeros(len(weights))
    for group in np.unique(groups[is_there]):
        own = is_there & (groups == group)
        variances[own] = np.sum((weights * residuals**2)[own]) / (np.count_nonzero(own) - leverage[own].sum())
    middle = weights * (1 if absolute_sigma else variances)
    return bread @ jacobian.T @ (middle[:, None] * jacobian) @ bread


@pytest.mark.filterwarnings("ignore:The covariance is that of weights at a minimum")
@pytest.mark.parametrize(
    "form", [form if form == "mask" else pytest.param(form, marks=pytest.mark.slow) for form in FORMS[:-1]]
)
def test_covariances_are_those_of_dense_matrices(form):
    given = case("mse", form)
    with tf.GradientTape(persistent=True) as tape:
        z = given.model.network(tf.constant(given.x), training=False)
    variables = [variable.value for variable in given.model.trainable_variables]
    parts = [tape.jacobian(z, variable, experimental_use_pfor=False).numpy() for variable in variables]
    jacobian = np.concatenate([part.reshape(np.size(z), -1) for part in parts], 1)
    residuals, groups = (z.numpy() - given.y).ravel(), np.arange(np.size(z)) % 3
    for absolute_sigma in (False, True):
        found = given.model.parameter_covariance(given.x, given.y, given.sample_weight, absolute_sigma)
        expected = sandwich(jacobian, given.weights.ravel(), residuals, groups, absolute_sigma)
        np.testing.assert_allclose(found.matrix, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The covariance is that of weights at a minimum")
def test_outputs_without_a_loss_are_not_observed_and_others_have_their_own_noise():
    inputs = keras.Input((2,))
    outputs = [layers.Dense(units, name=name)(inputs) for units, name in ((1, "first"), (2, "second"), (1, "third"))]
    model = HFModel(keras.Model(inputs, outputs))
    model.compile(loss=["mse", "mse", None], loss_weights=[1.0, 5.0, 0.0])
    x, y = normal(20, 2), [normal(20, 1, seed=1), 3 * normal(20, 2, seed=2), None]
    design = np.c_[x, np.ones(20)]
    with pytest.warns(UserWarning, match="The data determine 9 combinations of 12 weights"):
        found = model.parameter_covariance(x, y)
    residuals = [y[0] - model.network(x)[0], y[1] - model.network(x)[1]]
    for name, residual in zip(("first", "second"), residuals, strict=True):
        (errors,) = (found.standard_errors[v.path] for v in model.trainable_variables if f"{name}/kernel" in v.path)
        expected = np.diag(np.linalg.inv(design.T @ design))[:2, None] * np.sum(np.array(residual) ** 2, 0)
        assert errors.shape == expected.shape
        # Of 12 weights, three say nothing: each group of 20 has 3 that do and a share of these.
        np.testing.assert_allclose(errors**2, expected / (20 - 3 - 3 * 20 / 60), rtol=1e-8)


# Physics-informed networks.


def solved():
    network = keras.Sequential([keras.Input((1,)), layers.Dense(3, "tanh", trainable=False), layers.Dense(1)])

    def equation(u, p):
        value, slope = derivatives(u, p, "x", "u", "u_x")
        return tf.concat([slope + value, slope - 0.1 * value], 1)

    pinn = PINN(network, {"equation": equation, "data": lambda u, p: u(p)})
    model = HFModel(pinn)
    model.compile(loss="mse")
    points, rng = np.linspace(-1, 1, 30)[:, None], np.random.default_rng(0)
    targets = np.exp(-points) + 0.3 * rng.normal(size=points.shape)
    cases = pinn.cases({"equation": points[::2], "data": (points, targets)}, weights={"data": 2.0})
    model.build({"points": (None, 1), "term": (None, 1)})
    network.set_weights([2 * rng.normal(size=weight.shape) for weight in network.get_weights()])
    return model, cases, equation


@pytest.mark.filterwarnings("ignore:The covariance is that of weights at a minimum")
def test_components_that_a_term_does_not_have_are_not_observed():
    model, (x, y, weights), equation = solved()
    network, points = model.network.network, tf.constant(x["points"])
    variables = [variable.value for variable in model.trainable_variables]
    with tf.GradientTape(persistent=True) as tape:
        parts = tf.function(lambda: (equation(network, points[:15]), network(points[15:])), autograph=False)()
    rows, residuals = [], []
    for part in parts:
        jacobian = [
            tape.jacobian(part, v, experimental_use_pfor=False, unconnected_gradients="zero") for v in variables
        ]
        rows.append(np.concatenate([j.numpy().reshape(tf.size(part), -1) for j in jacobian], 1))
    residuals = np.concatenate([parts[0].numpy().ravel(), (parts[1] - y[15:, :1]).numpy().ravel()])
    jacobian, groups = np.concatenate(rows), np.repeat([0, 1], 30)
    found = model.parameter_covariance(x, y, weights)
    relative = np.repeat([1 / 30, 2 / 30], 30)
    np.testing.assert_allclose(found.matrix, sandwich(jacobian, relative, residuals, groups, False), rtol=1e-5)

    posterior = model.laplace(x, y, weights, prior_precision=2.0)
    assert posterior.noise.shape == (2,) and np.isnan(posterior.predict(np.zeros((1, 1))).observation_std).all()
    # The noise is that of unit weight.
    unit = np.repeat(np.array([weights[0], weights[15]]), 30)
    variances = (posterior.noise**2)[groups] / unit
    covariance = np.linalg.inv(jacobian.T @ (jacobian / variances[:, None]) + 2.0 * np.eye(4))
    np.testing.assert_allclose(posterior.covariance, covariance, rtol=1e-6)
    gammas = np.einsum("ri,ij,rj->r", jacobian, covariance, jacobian) / variances
    for group in range(2):
        own = groups == group
        expected = np.sum((unit * residuals**2)[own]) / (30 - gammas[own].sum())
        assert posterior.noise[group] ** 2 == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_evidence_runs_on_physics_informed_and_subclassed_networks():
    model, (x, y, weights), _ = solved()
    model.compile(HessianFree(solver=DirectSolver(), weight_decay="evidence"), loss="mse")
    history = model.fit(x, y, sample_weight=weights, epochs=12, verbose=0).history
    assert history["num_values"][0] == 60 and float(model.optimizer.weight_decay.numpy()) > 0

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.last, self.first = layers.Dense(1), layers.Dense(4, "tanh")

        def call(self, x):
            return self.last(self.first(x))

    model = HFModel(Subclassed())
    model.compile(HessianFree(solver=DirectSolver(), weight_decay="evidence"), loss="mse")
    x, y = normal(20, 5, 2), normal(20, 5, 1)
    history = model.fit(x, y, epochs=12, verbose=0).history
    assert history["num_values"][0] == 100
    posterior = model.laplace(x, y, structure="last_layer")
    assert [variable.path for variable in posterior.variables] == [v.path for v in model.network.last.weights]
    # Another length.
    assert posterior.predict(normal(3, 7, 2)).std.shape == (3, 7, 1)


# Doors.


class Adding(layers.Layer):
    def call(self, x):
        self.add_loss(0.1 * tf.reduce_mean(x**2))
        return x


class Overriding(HFModel):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return tf.reduce_mean((y - y_pred) ** 2)


def test_what_is_no_likelihood_alone_is_refused_at_the_start():
    x, y = normal(10, 2), normal(10, 1)
    optimizer = lambda: HessianFree(solver=ConjugateGradient(), weight_decay="evidence")  # noqa: E731
    stack = keras.Input((2,)), Adding(), layers.Dense(1)
    model = HFModel(keras.Sequential([*stack]))
    model.compile(optimizer(), "mse")
    with pytest.raises(ValueError, match="Weight decay by evidence needs a loss.*a network that adds losses"):
        model.fit(x, y, verbose=0)
    with pytest.raises(ValueError, match="`laplace` needs a loss.*a network that adds losses of its own"):
        model.laplace(x, y)
    model = HFModel(keras.Sequential([keras.Input((2,)), layers.Dense(1)]))
    model.compile(optimizer(), "mse", steps_per_execution=10)
    with pytest.raises(ValueError, match="Received: steps_per_execution=10. Compile with `steps_per_execution=1`"):
        model.fit(x, y, verbose=0)
    model = Overriding(keras.Sequential([keras.Input((2,)), layers.Dense(1)]))
    model.compile(optimizer(), "mse")
    with pytest.raises(ValueError, match="needs one output and one loss.*and an overridden `compute_loss`"):
        model.fit(x, y, verbose=0)
    with pytest.raises(ValueError, match="`laplace` needs observations. Received: cases that are all masked or of w"):
        model = HFModel(keras.Sequential([keras.Input((2,)), layers.Dense(1)]))
        model.compile(loss="mse")
        model.laplace(x, y, sample_weight=np.zeros(10))


def test_the_last_layer_is_that_through_which_the_others_act():
    inputs = keras.Input((2,))
    hidden, other = layers.Dense(3, "tanh")(inputs), layers.Dense(3)(inputs)
    x, y = normal(10, 2), normal(10, 3)
    model = HFModel(keras.Model(inputs, layers.Add()([hidden, other])))
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="needs a layer through which all other weights act"):
        model.laplace(x, y, structure="last_layer")
    last = layers.Dense(3)
    model = HFModel(keras.Model(inputs, layers.Activation("tanh")(last(hidden))))
    model.compile(loss="mse")
    assert model.laplace(x, y, structure="last_layer").variables == last.trainable_variables


@pytest.mark.slow
def test_outputs_with_a_name_and_points_of_another_type_are_taken():
    inputs = keras.Input((2,))
    x, y = normal(10, 2), {"u": normal(10, 1)}
    model = HFModel(keras.Model(inputs, {"u": layers.Dense(1)(inputs)}))
    model.compile(loss={"u": "mse"})
    posterior = model.laplace(x, y)
    assert posterior.predict(x).std.shape == (10, 1)
    plain = HFModel(keras.Model(inputs, model.network(inputs)["u"]))
    plain.compile(loss="mse")
    np.testing.assert_allclose(plain.laplace(x, y["u"]).covariance, posterior.covariance, rtol=1e-12)

    network = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    features = lambda p: tf.concat([tf.cos(p), tf.sin(p)], 1)  # noqa: E731
    pinn = PINN(network, {"data": lambda u, p: u(p)}, features=features)
    model = HFModel(pinn)
    model.compile(loss="mse")
    points = np.linspace(0, 1, 12)[:, None]
    posterior = model.laplace(*pinn.cases({"data": (points, points**2)}))
    single, double = (posterior.predict(points.astype(dtype)).std for dtype in ("float32", "float64"))
    np.testing.assert_allclose(single, double, rtol=1e-5)
