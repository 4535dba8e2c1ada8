"""Least squares to the end: three regressions by `DirectSolver`, beside `scipy.optimize.least_squares` with our residuals and Jacobian.

- sinc: sin(10 x) / (10 x) at 2,000 points, by a network of 20 units. Little keeps a fit from an error of 1e-6, but an optimizer that gets there.
- friedman: Friedman's first function of five variables without noise, at 10,000 points, by two layers of 20 units: a surrogate of a simulation.
- decay: the formula a exp(-b x) + c with noise, whose parameters are the weights of a Keras layer, with their standard errors.

All three in float64. Run from the root of the repository:

    python -m examples.regression --out runs/regression

Written into `--out`: `losses.png`, loss against seconds, and `runs.csv`, the table.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import curve_fit, least_squares

from examples import origins
from examples.precision import precision
from examples.tables import write_rows
from keras_hf import DirectSolver, HessianFree, HFModel, LevenbergMarquardt


class Cases(NamedTuple):
    """What is fitted, and what the fit is judged by.

    Attributes:
        x: Array `(N, d)`.
        y: Array `(N, 1)`.
        x_test: Array `(M, d)`, other points.
        y_test: Array `(M, 1)`, the function there, without noise.
    """

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class Regression(NamedTuple):
    """A function and the model that is fitted to it.

    Attributes:
        title: String.
        network: Callable that makes the Keras model, with other weights at every seed.
        cases: Callable `(num_cases, rng) -> Cases`.
        num_cases: Integer.
        num_updates: Integer, the most updates of `DirectSolver`, and evaluations of SciPy.
    """

    title: str
    network: Callable
    cases: Callable
    num_cases: int
    num_updates: int


class Run(NamedTuple):
    """One fit.

    Attributes:
        method: String.
        seconds: Float, tracing included.
        num_updates: Integer, updates or evaluations of the Jacobian.
        loss: Float, the mean square error that was reached.
        test_error: Float, the root of the mean square error at the test points.
        seconds_of, losses: Lists of floats, the loss in the course of the fit.
    """

    method: str
    seconds: float
    num_updates: int
    loss: float
    test_error: float
    seconds_of: list
    losses: list


@keras.saving.register_keras_serializable("examples")
class Decay(keras.layers.Layer):
    """The formula `a exp(-b x) + c` as a layer with three weights."""

    def build(self, shape):
        self.a, self.b, self.c = (
            self.add_weight(name=name, shape=(), initializer=keras.initializers.Constant(start))
            for name, start in (("a", 1.0), ("b", 1.0), ("c", 0.0))
        )

    def call(self, x):
        return decay(x, self.a, self.b, self.c, keras.ops.exp)


def decay(x, a, b, c, exp=np.exp):
    """Returns `a exp(-b x) + c`."""
    return a * exp(-b * x) + c


def sinc(x):
    """Returns `sin(10 x) / (10 x)`, 1 at 0."""
    return np.sinc(10 * x / np.pi)


def friedman(x):
    """Returns Friedman's first function of five columns, `(N, 1)`, divided by 25: between 0 and about 1."""
    a, b, c, d, e = np.split(x, 5, axis=1)
    return (10 * np.sin(np.pi * a * b) + 20 * (c - 0.5) ** 2 + 10 * d + 5 * e) / 25


def _layers(inputs, *units):
    hidden = [keras.layers.Dense(number, "tanh") for number in units]
    return keras.Sequential([keras.Input((inputs,)), *hidden, keras.layers.Dense(1)])


def _sinc_cases(num_cases, rng):
    x, x_test = np.linspace(-1, 1, num_cases)[:, None], rng.uniform(-1, 1, (1000, 1))
    return Cases(x, sinc(x), x_test, sinc(x_test))


def _friedman_cases(num_cases, rng):
    x, x_test = rng.random((num_cases, 5)), rng.random((5000, 5))
    return Cases(x, friedman(x), x_test, friedman(x_test))


def _decay_cases(num_cases, rng, true=(2.0, 1.5, 0.5), sigma=0.1):
    x, x_test = np.linspace(0, 4, num_cases)[:, None], np.linspace(0, 4, 1000)[:, None]
    return Cases(x, decay(x, *true) + sigma * rng.normal(size=x.shape), x_test, decay(x_test, *true))


REGRESSIONS = {
    "sinc": Regression("sin(10 x) / (10 x), 1-20-1", lambda: _layers(1, 20), _sinc_cases, 2000, 300),
    "friedman": Regression("Friedman's function, 5-20-20-1", lambda: _layers(5, 20, 20), _friedman_cases, 10_000, 1000),
    "decay": Regression(
        "a exp(-b x) + c", lambda: keras.Sequential([keras.Input((1,)), Decay()]), _decay_cases, 200, 30
    ),
}


class _Watch(keras.callbacks.Callback):
    """Records loss against seconds, and ends the run at a limit of updates, evaluations or seconds."""

    def __init__(self, num_updates, max_seconds):
        super().__init__()
        self.num_updates, self.max_seconds = num_updates, max_seconds
        self.start, self.seconds, self.losses = time.perf_counter(), [], []

    def note(self, loss):
        """Adds a loss and returns whether the run is to end."""
        self.seconds.append(time.perf_counter() - self.start)
        self.losses.append(loss)
        return len(self.losses) >= self.num_updates or self.seconds[-1] >= self.max_seconds

    def on_train_batch_end(self, batch, logs=None):
        if self.note(logs["update_loss"]) or logs["converged"]:
            self.model.stop_training = True


class _Ended(Exception):
    """The run has used up its time."""


def compiled(regression):
    """Returns the model of a `Regression`, an `HFModel`, compiled with `DirectSolver`."""
    model = HFModel(regression.network())
    model.compile(HessianFree(solver=DirectSolver()), loss="mse")
    return model


def by_direct_solver(model, cases, num_updates, max_seconds):
    """Fits by updates of `DirectSolver`, and returns a `Run`."""
    watch = _Watch(num_updates, max_seconds)
    with warnings.catch_warnings():
        # Where the run is meant to end.
        warnings.filterwarnings("ignore", "Training has converged to rounding")
        model.fit(cases.x, cases.y, epochs=num_updates, callbacks=[LevenbergMarquardt(), watch], verbose=0)
    return _run("DirectSolver", model, cases, watch, len(watch.losses))


def by_scipy(method, model, cases, num_updates, max_seconds):
    """Fits by `scipy.optimize.least_squares` with the model's residuals and Jacobian, and returns a `Run`.

    Args:
        method: String, "trf" or "lm".
        model: `HFModel`, which gets the best weights that were seen.
        cases: `Cases`.
        num_updates: Integer, the most evaluations of the residuals.
        max_seconds: Float, after which no evaluation starts.
    """
    f, watch, num_jacobians = model.objective(cases.x, cases.y), _Watch(math.inf, max_seconds), 0
    best = math.inf, f.weights

    def residuals(w):
        nonlocal best
        found = f.residuals(w)
        loss = found @ found / 2
        if loss < best[0]:
            best = loss, w.copy()
        if watch.note(loss):
            raise _Ended
        return found

    def jacobian(w):
        nonlocal num_jacobians
        num_jacobians += 1
        return f.jacobian(w)

    # To rounding, as far as SciPy takes it.
    tolerances = dict.fromkeys(("ftol", "xtol", "gtol"), 2.3e-16)
    try:
        least_squares(residuals, f.weights, jacobian, method=method, max_nfev=num_updates, **tolerances)
    except _Ended:
        pass
    f.assign(best[1])
    return _run(f"SciPy, {method}", model, cases, watch, num_jacobians)


METHODS = {
    "direct": by_direct_solver,
    "trf": lambda *args: by_scipy("trf", *args),
    "lm": lambda *args: by_scipy("lm", *args),
}


def _run(method, model, cases, watch, num_updates):
    seconds = time.perf_counter() - watch.start
    errors = [model.network(x).numpy() - y for x, y in ((cases.x, cases.y), (cases.x_test, cases.y_test))]
    loss, test_loss = (float(np.mean(error**2)) for error in errors)
    return Run(method, seconds, num_updates, loss, math.sqrt(test_loss), watch.seconds, watch.losses)


def fit_all(name, seed=0, num_cases=None, num_updates=None, max_seconds=60.0, methods=tuple(METHODS)):
    """Fits one of `REGRESSIONS` by every method, from the same weights.

    Returns:
        The list of `Run`s, the `Cases`, and the last model.
    """
    regression = REGRESSIONS[name]
    cases = regression.cases(num_cases or regression.num_cases, np.random.default_rng(seed))
    runs = []
    for method in methods:
        keras.utils.set_random_seed(seed)
        model = compiled(regression)
        runs.append(METHODS[method](model, cases, num_updates or regression.num_updates, max_seconds))
    return runs, cases, model


def parameters(model, cases):
    """Returns lines of text: the parameters of the decay with their standard errors, beside those by `curve_fit`."""
    errors = model.parameter_covariance(cases.x, cases.y).standard_errors
    values, matrix = curve_fit(decay, cases.x[:, 0], cases.y[:, 0], p0=(1.0, 1.0, 0.0))
    lines = []
    for variable, value, error in zip(model.trainable_variables, values, np.sqrt(np.diag(matrix)), strict=True):
        found = f"{float(variable.numpy()):.6f} +- {float(errors[variable.path]):.6f}"
        lines.append(f"{variable.name} = {found}   (curve_fit: {value:.6f} +- {error:.6f})")
    return lines


def plot(runs, path):
    """Draws loss against seconds.

    Args:
        runs: Dict, name of a regression -> list of `Run`s.
        path: Path of the PNG file.
    """
    figure = Figure(figsize=(5 * len(runs), 4), layout="constrained")
    for axes, (name, of_name) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        for run in of_name:
            axes.plot(run.seconds_of, np.minimum.accumulate(run.losses), label=run.method)
        axes.set(xlabel="seconds", ylabel="loss", yscale="log", title=REGRESSIONS[name].title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments=None):
    """Fits, prints the table and writes the files.

    Args:
        arguments: List of strings, as on the command line; `None` takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs", "regression"), help="folder of the figure and the table"
    )
    parser.add_argument("--only", nargs="+", choices=REGRESSIONS, default=list(REGRESSIONS), help="which regressions")
    parser.add_argument("--seed", type=int, default=0, help="of weights and cases")
    parser.add_argument(
        "--num-cases", type=int, help="instead of those of each regression; at least as many as weights, for lm"
    )
    parser.add_argument("--num-updates", type=int, help="instead of those of each regression")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="after which a fit ends")
    args = parser.parse_args(arguments)
    with precision("float64"):
        runs = _fit_and_print(args)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(runs, args.out / "losses.png")
    columns = Run._fields[:5]
    rows = [
        {"regression": name, **dict(zip(columns, run, strict=False))}
        for name, of_name in runs.items()
        for run in of_name
    ]
    write_rows(args.out / "runs.csv", rows)
    origins.note(args.out / "runs.csv")
    print(f"\nFiles: {args.out}")


def _fit_and_print(args):
    runs = {}
    for name in args.only:
        print(f"\n{REGRESSIONS[name].title}\n")
        print(f"{'method':<14} {'seconds':>8} {'updates':>8} {'loss':>10} {'test error':>11}")
        runs[name], cases, model = fit_all(name, args.seed, args.num_cases, args.num_updates, args.max_seconds)
        for run in runs[name]:
            print(f"{run.method:<14} {run.seconds:8.1f} {run.num_updates:8} {run.loss:10.2e} {run.test_error:11.2e}")
        if name == "decay":
            print("", *parameters(model, cases), sep="\n")
    return runs


if __name__ == "__main__":
    main()
