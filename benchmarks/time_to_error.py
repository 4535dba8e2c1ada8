"""How long Hessian-free optimization and other methods need until given training errors, on the clock.

Every method trains the same network on the same cases and the same loss, from weights of the same seed (autoencoders
from sparse ones, but for `adam-glorot`), for the same time. What a method may be told is a small grid, `GRIDS`; each of
its settings runs once on seed 0, for the problem's time or, of the long problems, for a part of it, and the one with
the least training error in the end goes on to the comparison. No method is charged for tracing and compiling: what the
first compiled call did to weights and state is undone, and the clock starts. It stands still while errors are measured.

    python -m benchmarks.time_to_error run --problem small-curves --method adam --grid --seed 0
    python -m benchmarks.time_to_error run --problem small-curves --method adam --best --seed 0 1 2
    python -m benchmarks.time_to_error table --problem small-curves
    python -m benchmarks.time_to_error quick

Each run writes a CSV file of its own, PROBLEM/METHOD-SETTING-seedSEED.csv, and a run whose file is complete is not made
again: calls that were cut short can be repeated. Shorter runs of a grid lie in PROBLEM/grid. `train_error` and
`test_error` are squared errors per case (autoencoders) or cross-entropies without penalty (classifiers), of averaged
weights where the setting has `ema_momentum`; `cost` is the passes over the training set in gradients, of Hessian-free
updates as `keras_hf.callbacks.recorder.update_cost` counts them. `table` writes the seconds until the first row at or below each
target, and a figure. `quick` runs three methods for six seconds each, and then `table`.

`benchmarks/results/time_to_error.csv` and `minibatches.csv` hold the runs behind tables and figures
(`benchmarks.gather` makes folders of them), whose cost has another formula (docs/faster.md), and
`time_to_error_settings.csv` the table's rows of the settings that lost.
"""

import argparse
import itertools
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from keras import ops

from benchmarks import rows as results
from examples import origins
from examples.autoencoder import SETTINGS, build_autoencoder, cross_entropy, squared_error
from examples.baselines import (
    NesterovMomentum,
    Recorder,
    fit_compiled,
    fit_lbfgs,
    fit_nonlinear_cg,
    fit_trust_region,
    muon,
    recipe,
    solver_but_for,
    standard_hessian_free,
)
from examples.datasets import mnist, synthetic_curves
from examples.experiments import plot
from examples.tables import read_rows
from keras_hf import (
    ConjugateGradient,
    GrowingBatch,
    HessianFree,
    HFModel,
    LevenbergMarquardt,
    PreconditionedMomentum,
)

matplotlib.use("Agg")

RESULTS = Path("runs", "time_to_error")
TRIALS = Path("runs", "time_to_error_trials")  # Of runs that did not get the whole time.
MICRO_BATCH_SIZE = 5000
FIRST_ORDER = ("adam", "nag", "muon", "adam-glorot", "sgd", "gd", "momentum")


class Cases(NamedTuple):
    """Training and test cases: arrays `(N, ...)` and `(M, ...)` of inputs and of targets."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class Problem(NamedTuple):
    """What is trained, for how long, and what counts as reached.

    Attributes:
        kind: String, "autoencoder" or "classifier", which decides loss and measure.
        load: Callable `seed -> Cases`.
        build: Callable `(l2, sparse) -> network`, Keras model with weights of Keras' global seed.
        seconds: Float, the time of each run.
        targets: Tuple of floats, training errors, falling.
        l2: Float c of the penalty `c/2 ||w||^2`, where a setting has none of its own.
        recipe_curvature_cases: Integer, the cases of the recipe's products; None for all.
        grid_seconds: Float, the time of each setting of a grid; None for that of the comparison.
    """

    kind: str
    load: Callable
    build: Callable
    seconds: float
    targets: tuple
    l2: float = 0.0
    recipe_curvature_cases: int | None = None
    grid_seconds: float | None = None

    @property
    def loss(self):
        """The loss of each case: callable `(y_true, y_pred) -> (N,)`."""
        return cross_entropy if self.kind == "autoencoder" else keras.losses.sparse_categorical_crossentropy

    @property
    def damping(self):
        """Where Hessian-free starts unless told otherwise."""
        return 45.0 if self.kind == "autoencoder" else 1.0


def load_curves(num_cases, seed):
    """Returns `Cases` of synthetic curves, at most 10,000 of them for testing."""
    images = synthetic_curves(num_cases + min(num_cases, 10_000), seed)
    x_train, x_test = images[:num_cases], images[num_cases:]
    return Cases(x_train, x_train, x_test, x_test)


def load_mnist_images(seed):
    """Returns `Cases` whose targets are the images."""
    del seed
    x_train, x_test = mnist()
    return Cases(x_train, x_train, x_test, x_test)


def load_mnist_digits(shape, seed):
    """Returns `Cases` of images, each of the given shape, and digits."""
    del seed
    images = [part.reshape(-1, *shape) for part in mnist()]
    y_train, y_test = _mnist_labels()
    return Cases(images[0], y_train, images[1], y_test)


def _mnist_labels():
    """Returns the digits of the training and of the test images, from where `mnist` has those."""
    path = Path(os.environ.get("KERAS_HF_DATA", ""), "mnist.npz")
    if "KERAS_HF_DATA" in os.environ and path.exists():
        with np.load(path) as arrays:
            labels = arrays["y_train"], arrays["y_test"]
    else:
        (_, y_train), (_, y_test) = keras.datasets.mnist.load_data()
        labels = y_train, y_test
    return [part.astype("int32") for part in labels]


def deep_autoencoder(widths, l2, sparse):
    """Builds an autoencoder with weights of Keras' global seed."""
    return build_autoencoder(widths, l2, keras.random.randint((), 0, 2**31 - 1).numpy().item(), sparse)


def multilayer_perceptron(l2, sparse):
    """Builds a classifier 784-500-300-10, whose weights are dense whatever `sparse`."""
    del sparse
    dense = partial(keras.layers.Dense, **_penalties(l2))
    hidden = [dense(units, "relu", kernel_initializer="he_normal") for units in (500, 300)]
    return keras.Sequential([keras.Input((784,)), *hidden, dense(10, "softmax")])


def convolutional_network(l2, sparse):
    """Builds a small convolutional classifier, whose weights are dense whatever `sparse`."""
    del sparse
    dense = partial(keras.layers.Dense, **_penalties(l2))
    convolution = partial(
        keras.layers.Conv2D, strides=2, activation="relu", kernel_initializer="he_normal", **_penalties(l2)
    )
    layers = [convolution(8, 3), convolution(16, 3), keras.layers.Flatten(), dense(10, "softmax")]
    return keras.Sequential([keras.Input((28, 28, 1)), *layers])


def _penalties(l2):
    return {f"{weights}_regularizer": keras.regularizers.L2(l2 / 2) if l2 else None for weights in ("kernel", "bias")}


PROBLEMS = {
    "small-curves": Problem(
        "autoencoder",
        partial(load_curves, 2_000),
        partial(deep_autoencoder, SETTINGS["curves", "demo"].widths),
        seconds=60.0,
        targets=(4, 2, 1, 0.5),
        l2=1e-6,
    ),
    "full-curves": Problem(
        "autoencoder",
        partial(load_curves, 20_000),
        partial(deep_autoencoder, SETTINGS["curves", "full"].widths),
        seconds=240.0,
        targets=(5, 4, 2, 1, 0.5, 0.25, 0.15),
        l2=1e-6,
        recipe_curvature_cases=SETTINGS["curves", "full"].curvature_batch_size,
        grid_seconds=80.0,
    ),
    "mnist-autoencoder": Problem(
        "autoencoder",
        load_mnist_images,
        partial(deep_autoencoder, SETTINGS["mnist", "full"].widths),
        seconds=240.0,
        targets=(4, 3, 2, 1.5),
        l2=1e-6,
        recipe_curvature_cases=SETTINGS["mnist", "full"].curvature_batch_size,
        grid_seconds=60.0,
    ),
    "mnist-mlp": Problem(
        "classifier",
        partial(load_mnist_digits, (784,)),
        multilayer_perceptron,
        seconds=30.0,
        targets=(0.1, 0.03, 0.01, 0.001),
        recipe_curvature_cases=7_500,
    ),
    "mnist-cnn": Problem(
        "classifier",
        partial(load_mnist_digits, (28, 28, 1)),
        convolutional_network,
        seconds=30.0,
        targets=(0.2, 0.1, 0.05, 0.02),
        recipe_curvature_cases=7_500,
    ),
}


def fit_hessian_free(problem, setting, network, cases, recorder, seed, damping_rule=None):
    """Trains by Hessian-free optimization with the package's defaults, but for what the setting says."""
    arguments = {name: value for name, value in setting.items() if name not in SHARED}
    if "initial_size" in arguments:
        arguments["growing_batch"] = GrowingBatch(initial_size=arguments.pop("initial_size"))
    solver = solver_but_for(arguments.pop("solver", {}), ConjugateGradient())
    optimizer = HessianFree(**{"damping": problem.damping, **arguments}, solver=solver, seed=seed)
    _fit_hessian_free(optimizer, damping_rule or LevenbergMarquardt(), problem, network, cases, recorder)


def fit_momentum(problem, setting, network, cases, recorder, seed):
    """Trains by preconditioned momentum on growing minibatches, with the package's defaults but for what the setting says."""
    solver = PreconditionedMomentum()
    growth = solver.growing_batch().get_config()
    growth["rate"] = setting.get("rate", growth["rate"])
    optimizer = HessianFree(
        damping=setting["damping"],
        solver=solver,
        growing_batch=GrowingBatch(**growth),
        seed=seed,
        **_averaging(setting),
    )
    _fit_hessian_free(optimizer, LevenbergMarquardt(), problem, network, cases, recorder)


def fit_recipe(problem, setting, network, cases, recorder, seed, damping_rule=None):
    """Trains by the recipe of Martens (2010), whatever the package's defaults are, but for what the setting says."""
    arguments = {name: value for name, value in setting.items() if name not in SHARED}
    arguments = {"damping": problem.damping, "curvature_batch_size": problem.recipe_curvature_cases, **arguments}
    optimizer, rule = recipe(**arguments, seed=seed)
    _fit_hessian_free(optimizer, damping_rule or rule, problem, network, cases, recorder)


def _fit_hessian_free(optimizer, damping_rule, problem, network, cases, recorder):
    model = HFModel(network)
    model.compile(optimizer=optimizer, loss=problem.loss)
    recorder.optimizer = optimizer
    model.fit(cases.x_train, cases.y_train, epochs=10**6, verbose=0, callbacks=[damping_rule, recorder])


def fit_first_order(make_optimizer, cosine_decay, problem, setting, network, cases, recorder, seed):
    """Trains by an optimizer of Keras, made from a setting and a network."""
    recorder.optimizer = make_optimizer(setting, network)
    fit_compiled(
        network,
        recorder.optimizer,
        problem.loss,
        cases.x_train,
        cases.y_train,
        setting["batch_size"],
        recorder,
        cosine_decay=cosine_decay,
        seed=seed,
    )


def fit_standard(problem, setting, network, cases, recorder, seed):
    """Trains by standard Hessian-free optimization, from which the recipe sets out."""
    optimizer, damping_rule = standard_hessian_free(setting["damping"], seed=seed)
    _fit_hessian_free(optimizer, damping_rule, problem, network, cases, recorder)


def fit_all_at_once(fit, problem, setting, network, cases, recorder, seed):
    """Trains by a method of scipy, on all cases in every update."""
    del seed
    fit(network, problem.loss, cases.x_train, cases.y_train, recorder, **setting)


def _averaging(setting):
    """Returns Keras' arguments for averages of the weights, a dict: none without `ema_momentum` in the setting."""
    return {"use_ema": True, "ema_momentum": setting["ema_momentum"]} if "ema_momentum" in setting else {}


def _adam(setting, network):
    del network
    return keras.optimizers.Adam(setting["learning_rate"])


def _nag(setting, network):
    del network
    return NesterovMomentum(setting["learning_rate"], setting["max_momentum"], **_averaging(setting))


def _descent(setting, network):
    del network
    return keras.optimizers.SGD(setting["learning_rate"], setting.get("momentum", 0.0))


METHODS = {
    "hf": fit_hessian_free,
    "hf-momentum": fit_momentum,
    "recipe": fit_recipe,
    "adam": partial(fit_first_order, _adam, True),
    "nag": partial(fit_first_order, _nag, False),
    "muon": partial(fit_first_order, lambda setting, network: muon(setting["learning_rate"], network), True),
    "lbfgs": partial(fit_all_at_once, fit_lbfgs),
    "adam-glorot": partial(fit_first_order, _adam, True),
    "sgd": partial(fit_first_order, _descent, False),
    "gd": partial(fit_first_order, _descent, False),
    "momentum": partial(fit_first_order, _descent, False),
    "ncg": partial(fit_all_at_once, fit_nonlinear_cg),
    "trust-region": partial(fit_all_at_once, fit_trust_region),
    "standard": fit_standard,
}


def _product(**choices):
    """Returns a dict for each combination of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


# The settings of `quick`.
QUICK = {"hf": 1, "adam": 2, "muon": 2}
SHARED = ("l2",)  # What any setting may hold besides its method's own arguments.
# By method and kind of problem or, before that, by method and problem. The number of a setting is its place: append. Learning rates are for a
# loss summed over pixels (autoencoders) and averaged over cases.
GRIDS = {
    ("hf", "autoencoder"): _product(damping=(45.0, 4.5)),
    ("hf", "mnist-autoencoder"): [
        *_product(damping=(45.0, 4.5)),
        *_product(damping=(45.0,), initial_size=(1000,)),
    ],
    ("hf", "classifier"): _product(damping=(1.0, 0.1)),
    ("hf-momentum", "autoencoder"): [
        {"damping": 10.0, "l2": 1e-6},
        *_product(damping=(10.0,), l2=(1e-6, 2e-5), rate=(3e-3,), ema_momentum=(0.95,)),
        {"damping": 10.0, "l2": 1e-6, "rate": 6e-3},
        {"damping": 10.0, "l2": 1e-6, "rate": 1.5e-3, "ema_momentum": 0.98},
        {"damping": 10.0, "l2": 2e-5, "rate": 3e-3},
    ],
    ("hf-momentum", "classifier"): [
        *_product(damping=(1.0, 0.1)),
        {"damping": 0.1, "rate": 6e-3},
    ],
    ("recipe", "autoencoder"): [{}],
    ("recipe", "classifier"): [{}],
    ("adam", "autoencoder"): _product(learning_rate=(3e-4, 1e-3, 3e-3, 1e-2), batch_size=(200,)),
    ("adam", "small-curves"): [
        *_product(learning_rate=(3e-4, 1e-3, 3e-3, 1e-2), batch_size=(200,)),
        {"learning_rate": 1e-2, "batch_size": 100},
        {"learning_rate": 1e-2, "batch_size": 500},
    ],
    ("adam", "full-curves"): _product(learning_rate=(1e-3, 3e-3), batch_size=(200,)),
    ("adam", "mnist-autoencoder"): _product(learning_rate=(1e-3, 3e-3), batch_size=(200,)),
    ("adam", "classifier"): _product(learning_rate=(1e-3, 3e-3), batch_size=(200,)),
    ("nag", "autoencoder"): [
        *_product(learning_rate=(3e-3, 1e-2), max_momentum=(0.9, 0.99, 0.995), batch_size=(200,)),
    ],
    ("nag", "full-curves"): [
        {"learning_rate": 1e-2, "max_momentum": 0.99, "batch_size": 200},
        *_product(learning_rate=(3e-3, 1e-2), max_momentum=(0.995,), batch_size=(200,)),
    ],
    ("nag", "mnist-autoencoder"): [
        *_product(learning_rate=(3e-3, 1e-2), max_momentum=(0.99,), batch_size=(200,)),
        {"learning_rate": 1e-2, "max_momentum": 0.99, "batch_size": 200, "ema_momentum": 0.999},
    ],
    ("nag", "classifier"): _product(learning_rate=(3e-2, 1e-1, 3e-1), max_momentum=(0.9,), batch_size=(200,)),
    ("muon", "autoencoder"): _product(learning_rate=(1e-3, 3e-3, 1e-2, 3e-2), batch_size=(200,)),
    ("muon", "full-curves"): _product(learning_rate=(3e-3, 1e-2, 3e-2), batch_size=(200,)),
    ("muon", "mnist-autoencoder"): _product(learning_rate=(3e-3, 1e-2), batch_size=(200,)),
    ("muon", "classifier"): _product(learning_rate=(1e-3, 3e-3, 1e-2), batch_size=(200,)),
    ("lbfgs", "small-curves"): _product(max_corrections=(10, 30, 100)),
    ("lbfgs", "autoencoder"): _product(max_corrections=(10,)),
    ("lbfgs", "classifier"): _product(max_corrections=(10,)),
    ("sgd", "small-curves"): _product(learning_rate=(1e-2, 3e-2, 1e-1), batch_size=(200,)),
    ("gd", "small-curves"): _product(learning_rate=(3e-2, 1e-1, 3e-1), batch_size=(2000,)),
    ("momentum", "small-curves"): _product(learning_rate=(1e-2, 3e-2, 1e-1), momentum=(0.9,), batch_size=(2000,)),
    ("ncg", "small-curves"): [{}],
    ("trust-region", "small-curves"): _product(initial_radius=(1.0,)),
    ("standard", "small-curves"): _product(damping=(45.0, 4.5)),
    ("adam-glorot", "autoencoder"): _product(learning_rate=(1e-3, 3e-3), batch_size=(200,)),
}


def grid(name, problem, method):
    """Returns the settings of a method on a problem: a list of dicts."""
    settings = GRIDS.get((method, name)) or GRIDS.get((method, problem.kind))
    if settings is None:
        raise SystemExit(f"No grid of '{method}' is set for this problem. Received: problem={name}.")
    return settings


class Curve(Recorder):
    """Records the errors of a method against time.

    Rows lie 10 % of the time so far apart, at least 1/200 and at most 1/40 of the whole: about 60, and dense enough
    early on to tell how fast the first targets are reached. Training also ends where the error is no number.

    Args:
        problem: A `Problem`.
        network: Keras model, the one that is trained.
        cases: `Cases`.
        path: Path of the CSV file.
        max_seconds: Float, the time of training.

    Attributes:
        optimizer: The Keras optimizer, or None. Where it averages the weights, errors are those of the averages.
    """

    def __init__(self, problem, network, cases, path, max_seconds):
        names = ("num_cases", "total_cg_iterations", "cost")
        super().__init__(network, cases.x_train, cases.x_test, path, max_seconds, math.inf, log_names=names)
        self.cases = cases
        self.optimizer = None
        self._values = _values_of_cases(problem, network)

    def begin(self, variables):
        self._before = [(variable, ops.convert_to_numpy(variable)) for variable in variables]
        super().begin(variables)

    def after_update(self, updates, logs):
        if self._start is None:
            for variable, value in self._before:
                variable.assign(value)
            self._total_cg_iterations, self._cost = 0, 0.0
            return super().after_update(0, {})
        stop = super().after_update(updates, {"total_cg_iterations": 0, **logs})
        self.is_over = stop or not math.isfinite(self.rows[-1]["train_error"])
        return self.is_over

    def is_due(self, seconds):
        last = self.rows[-1]["seconds"]
        return seconds >= last + min(max(0.1 * last, self.max_seconds / 200), self.max_seconds / 40)

    def errors(self):
        # Before the first update there are no averages.
        if not (self.rows and getattr(self.optimizer, "use_ema", False)):
            return self._errors()
        return self._averaged_errors()

    def _averaged_errors(self):
        swap = keras.callbacks.SwapEMAWeights()
        # Keras 3.12 reads the weights of the model.
        swap.set_model(SimpleNamespace(optimizer=self.optimizer, trainable_variables=self.network.trainable_variables))
        swap.on_test_begin()
        try:
            return self._errors()
        finally:
            swap.on_test_end()

    def _errors(self):
        train = self._means(self.cases.x_train, self.cases.y_train)
        test = self._means(self.cases.x_test, self.cases.y_test)
        rates = {
            f"{part}_error_rate": means["rate"] for part, means in (("train", train), ("test", test)) if "rate" in means
        }
        penalty = float(sum(self.network.losses))
        return {
            "train_error": train["error"],
            "test_error": test["error"],
            "train_loss": train["loss"] + penalty,
            **rates,
        }

    def _means(self, x, y):
        sums = {}
        for start in range(0, len(x), MICRO_BATCH_SIZE):
            micro_batch = slice(start, start + MICRO_BATCH_SIZE)
            for name, values in self._values(x[micro_batch], y[micro_batch]).items():
                sums[name] = sums.get(name, 0.0) + np.sum(values, dtype="float64")
        return {name: float(total) / len(x) for name, total in sums.items()}


def _values_of_cases(problem, network):
    """Returns a function that maps cases to a dict of arrays `(N,)`: `error`, `loss` and, of classifiers, `rate`."""

    @tf.function(reduce_retracing=True)
    def values(x, y):
        y_pred = network(x, training=False)
        loss = problem.loss(y, y_pred)
        if problem.kind == "autoencoder":
            return {"error": squared_error(y, y_pred), "loss": loss}
        wrong = tf.cast(y, tf.int64) != tf.argmax(y_pred, axis=-1)
        return {"error": loss, "loss": loss, "rate": tf.cast(wrong, loss.dtype)}

    return lambda x, y: {name: value.numpy() for name, value in values(tf.constant(x), tf.constant(y)).items()}


def run(folder, problem, method, setting, number, seed, seconds):
    """Trains once by a method, unless that has been done: writes METHOD-SETTING-seedSEED.csv.

    Args:
        folder: Path for the file.
        problem: A `Problem`.
        method: String, one of `METHODS`.
        setting: Dict of the method's arguments.
        number: Integer, the setting's place in the grid.
        seed: Integer, of cases, weights and batches.
        seconds: Float, the time of training.

    Returns:
        Path of the file.
    """
    path = folder / f"{method}-{number}-seed{seed}.csv"
    train(path, problem, METHODS[method], setting, seed, seconds, sparse=method != "adam-glorot")
    return path


def train(path, problem, fit, setting, seed, seconds, sparse=True):
    """Trains once, unless there is the file: writes it, as `.partial` until it is complete.

    Args:
        path: Path of the CSV file.
        problem: A `Problem`.
        fit: Callable `(problem, setting, network, cases, recorder, seed)`, as in `METHODS`.
        setting: Dict of its arguments.
        seed: Integer, of cases, weights and batches.
        seconds: Float, the time of training.
        sparse: Boolean, whether weights start sparse.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    cases = problem.load(seed)
    network = starting_network(problem, setting.get("l2", problem.l2), seed, sparse)
    recorder = Curve(problem, network, cases, partial_path, seconds)
    fit(problem, setting, network, cases, recorder, seed)
    partial_path.rename(path)
    origins.note(path)


def starting_network(problem, l2, seed, sparse=True):
    """Builds a problem's network with the weights that every run of a seed starts from.

    Args:
        problem: A `Problem`.
        l2: Float c of the penalty `c/2 ||w||^2`.
        seed: Integer, which also becomes Keras' global seed.
        sparse: Boolean, whether weights start sparse.
    """
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    return problem.build(l2, sparse)


def until(rows, target, measure="seconds"):
    """Returns the seconds, or the cost, of the first row whose training error is at or below `target`; infinity if there is none."""
    return next((row[measure] for row in rows if row["train_error"] <= target), math.inf)


def until_each(rows, targets):
    """Returns `until` for each target, a dict: of seconds, `seconds_to_TARGET`, and of cost, `cost_to_TARGET`."""
    return {
        f"{measure}_to_{target:g}": until(rows, target, measure)
        for measure in ("seconds", "cost")
        for target in targets
    }


def best_setting(folder, method, num_settings):
    """Returns the number of the setting with the least training error at the end of its run on seed 0.

    Args:
        folder: Path of the runs.
        method: String, one of `METHODS`.
        num_settings: Integer, the settings of the grid.

    Raises:
        FileNotFoundError: If a run is missing.
    """
    if num_settings == 1:
        return 0
    finals = []
    for number in range(num_settings):
        path = folder / f"{method}-{number}-seed0.csv"
        if not path.exists():
            raise FileNotFoundError(
                f"The grid of '{method}' is incomplete: {path} is missing. Run it with --grid --seed 0."
            )
        final = read_rows(path)[-1]["train_error"]
        finals.append(final if math.isfinite(final) else math.inf)
    return int(np.argmin(finals))


def complete_runs(folder):
    """Returns the complete runs of a problem: dict from (method, number of the setting, seed) to rows."""
    runs = {}
    for path in sorted(folder.glob("*-seed*.csv")):
        method, number, seed = re.fullmatch(r"(.+)-(\d+)-seed(\d+)", path.stem).groups()
        runs[method, int(number), int(seed)] = read_rows(path)
    return runs


def of_best_settings(runs):
    """Returns those runs that have their method's best setting among the runs of seed 0.

    Args:
        runs: Dict from (method, number of the setting, seed) to rows.
    """
    finals = {}
    for (method, number, seed), rows in runs.items():
        if seed == 0 and math.isfinite(rows[-1]["train_error"]):
            finals.setdefault(method, []).append((rows[-1]["train_error"], number))
    best = {method: min(pairs)[1] for method, pairs in finals.items()}
    return {key: rows for key, rows in runs.items() if best.get(key[0]) == key[1]}


def median_seconds(runs, targets):
    """Returns a dict from method to its seconds until each target, a list: medians over its runs, infinity where not reached."""
    methods = dict.fromkeys(key[0] for key in runs)
    return {
        method: [_median([until(rows, target) for key, rows in runs.items() if key[0] == method]) for target in targets]
        for method in methods
    }


def _median(values):
    """The lower of the two in the middle would flatter, and their mean is infinity where one is: the upper one."""
    return sorted(values)[len(values) // 2]


def write_table(name, problem, runs, path):
    """Writes a row for each run: the seconds until each target, and where it ended.

    Args:
        name: String, the problem's name.
        problem: A `Problem`.
        runs: Dict from (method, number of the setting, seed) to rows.
        path: Path of the CSV file.
    """
    best = of_best_settings(runs)
    table = []
    for (method, number, seed), rows in runs.items():
        setting, last = grid(name, problem, method)[number], rows[-1]
        table.append(
            {
                "method": method,
                "setting": number,
                "seed": seed,
                "best": int((method, number, seed) in best),
                "arguments": " ".join(f"{argument}={value:g}" for argument, value in setting.items()),
                **until_each(rows, problem.targets),
                **{column: last[column] for column in last if column != "num_cases"},
            }
        )
    results.write(path, table)


def print_table(problem, runs):
    """Prints what each method's best setting reached, medians over seeds, and how others' times compare with those of `hf`.

    Args:
        problem: A `Problem`.
        runs: Dict from (method, number of the setting, seed) to rows, best settings only.
    """
    seconds = median_seconds(runs, problem.targets)
    targets = "".join(f"{f'to {target:g}':>9}" for target in problem.targets)
    print(f"{'method':<12}{'setting':>8}{'seeds':>6}{targets}{'train':>10}{'test':>10}")
    for method, times in seconds.items():
        of_method = {key: rows for key, rows in runs.items() if key[0] == method}
        errors = "".join(
            f"{_median([rows[-1][name] for rows in of_method.values()]):>10.4f}"
            for name in ("train_error", "test_error")
        )
        print(f"{method:<12}{next(iter(of_method))[1]:>8}{len(of_method):>6}{_in_columns(times)}{errors}")
    comparisons = (("first-order", FIRST_ORDER), ("lbfgs", ("lbfgs",)), ("recipe", ("recipe",)))
    for ours, (label, others) in itertools.product(("hf", "hf-momentum"), comparisons):
        ratios = ratios_to(ours, seconds, others) if ours in seconds else []
        if ratios:
            label = f"best {label}" if len(others) > 1 else label
            print(f"{f'{label} / {ours}':<26}{_in_columns(ratios, '.2f')}")


def ratios_to(ours, seconds, others):
    """Returns for each target the least time of other methods over that of ours; infinity where only ours got there, NaN where it did not.

    Args:
        ours: String, a method.
        seconds: Dict from method to its seconds until each target, a list.
        others: Strings, methods; those that did not run are left out.
    """
    times = [seconds[method] for method in others if method in seconds]
    if not times:
        return []
    least = [min(column) for column in zip(*times, strict=True)]
    return [
        other / own if math.isfinite(own) else (math.nan if math.isinf(other) else 0.0)
        for other, own in zip(least, seconds[ours], strict=True)
    ]


def _in_columns(values, form=".1f"):
    return "".join(f"{f'{value:{form}}' if math.isfinite(value) else '-':>9}" for value in values)


def run_command(args):
    """Trains as the command line says, one run after the other."""
    problem = PROBLEMS[args.problem]
    folder = args.out / args.problem
    grids, seconds = folder, problem.seconds
    if problem.grid_seconds:
        grids = folder / "grid"
    if args.grid:
        folder, seconds = grids, problem.grid_seconds or seconds
    for method in args.method:
        settings = grid(args.problem, problem, method)
        if args.setting is not None:
            numbers = args.setting
        else:
            numbers = range(len(settings)) if args.grid else [best_setting(grids, method, len(settings))]
        for number, seed in itertools.product(numbers, args.seed):
            print(f"{args.problem} {method} {number} {settings[number]} seed {seed}", flush=True)
            path = run(folder, problem, method, settings[number], number, seed, args.seconds or seconds)
            last = read_rows(path)[-1]
            print(
                f"  train {last['train_error']:.4f} test {last['test_error']:.4f} updates {last['update']:.0f}",
                flush=True,
            )


def table_command(args):
    """Writes and prints what the runs so far say."""
    problem = PROBLEMS[args.problem]
    runs = complete_runs(args.out / args.problem)
    if not runs:
        raise SystemExit(f"No complete run in {args.out / args.problem}.")
    best = of_best_settings(runs)
    write_table(args.problem, problem, runs, args.out / f"{args.problem}.csv")
    measure = "squared error per case" if problem.kind == "autoencoder" else "cross-entropy"
    curves = [(method, rows) for (method, _, _), rows in best.items()]
    plot(curves, args.out / f"{args.problem}.png", measure, problem.targets)
    print_table(problem, best)


def quick_command(args):
    """Runs some methods on small curves, each with the setting that was its best there, and writes the table."""
    args.problem, args.seed, args.grid = "small-curves", [0], False
    for method, number in QUICK.items():
        args.method, args.setting = [method], [number]
        run_command(args)
    table_command(args)


def parse(arguments):
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running, table, quick = (commands.add_parser(name) for name in ("run", "table", "quick"))
    quick.set_defaults(seconds=6.0)
    for command in (running, table):
        command.add_argument("--problem", choices=PROBLEMS, required=True)
    for command in (running, table, quick):
        command.add_argument("--out", type=Path, help=f"folder; default: {RESULTS}, or {TRIALS} with --seconds")
        command.add_argument("--seconds", type=float, help="instead of the problem's own, to try things out")
    running.add_argument("--method", choices=METHODS, nargs="+", required=True)
    running.add_argument("--seed", type=int, nargs="+", default=[0])
    which = running.add_mutually_exclusive_group(required=True)
    which.add_argument("--grid", action="store_true", help="every setting of the grid")
    which.add_argument("--best", action="store_true", help="the best setting of the grid by its runs on seed 0")
    which.add_argument("--setting", type=int, nargs="+", help="settings by number")
    args = parser.parse_args(arguments)
    args.out = args.out or (TRIALS if args.seconds else RESULTS)
    return args


def main(arguments=None):
    """Runs, or writes the table.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    args = parse(arguments)
    {"run": run_command, "table": table_command, "quick": quick_command}[args.command](args)


if __name__ == "__main__":
    main()
