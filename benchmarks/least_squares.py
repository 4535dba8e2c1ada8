"""Outliers and bounds beside SciPy's `least_squares`: the same formula, start and data, in float64.

- outliers: three formulas at 200 points, a tenth of which are off by 1 to 5: the squared error, Huber's and Cauchy's loss with `DirectSolver`, and
  SciPy's `soft_l1`, `huber` and `cauchy`. The error is that of the formula at the points, against the truth.
- bounds: five formulas whose least squares lie outside the bounds: `Box` with `DirectSolver`, SciPy's `trf` and `dogbox`. The excess is how far the
  loss lies above the least that any method found, relative to it.

    python -m benchmarks.least_squares --csv benchmarks/results/least_squares.csv
"""

import argparse
import warnings
from typing import NamedTuple

import keras
import numpy as np
from scipy.optimize import least_squares

from benchmarks import rows as results
from examples.precision import precision
from keras_hf import Box, Cauchy, DirectSolver, HessianFree, HFModel

INFINITY = np.inf
LINE, UNIT = np.linspace(0, 4, 200)[:, None], np.linspace(0, 1, 100)[:, None]
TOLERANCES = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15)
SIZE_OF_NOISE, SCALE = 0.1, 0.2


class Problem(NamedTuple):
    """A formula to be fitted.

    Attributes:
        formula: Callable `(x, list of parameters, NumPy or keras.ops) -> (N, 1)`.
        start: List of floats.
        x: Array `(N, 1)`.
        true: Callable `x -> (N, 1)`, what the data are made of.
        bounds: List of pairs, those of each parameter; `None` without.
    """

    formula: object
    start: list
    x: np.ndarray
    true: object
    bounds: list | None = None


def _peak(x, b, m):
    return b[0] * m.exp(-(((x - b[1]) / b[2]) ** 2)) + b[3]


def _growth(x, b, m):
    return b[0] / (1 + m.exp(-b[1] * (x - b[2])))


def _decay(x, b, m):
    return b[0] * m.exp(-b[1] * x) + b[2]


OUTLIERS = {
    "decay": Problem(_decay, [1.0, 1.0, 0.0], LINE, lambda x: 2 * np.exp(-1.5 * x) + 0.5),
    "peak": Problem(_peak, [1.0, 1.5, 1.0, 0.0], LINE, lambda x: 1.5 * np.exp(-(((x - 2) / 0.9) ** 2)) + 0.3),
    "growth": Problem(_growth, [1.0, 1.0, 1.0], LINE, lambda x: 1.3 / (1 + np.exp(-4 * (x - 2)))),
}
BOUNDS = {
    "decay": OUTLIERS["decay"]._replace(bounds=[(0, 1.8), (0, INFINITY), (-INFINITY, INFINITY)]),
    "peak": OUTLIERS["peak"]._replace(
        bounds=[(0, INFINITY), (0, 1.8), (0.2, 0.6), (0, INFINITY)],
        true=lambda x: 1.5 * np.exp(-(((x - 2) / 0.9) ** 2)) - 0.1,
    ),
    "growth": OUTLIERS["growth"]._replace(bounds=[(0, 1), (0, 3), (0, 4)]),
    "two decays": Problem(
        lambda x, b, m: b[0] * m.exp(-b[1] * x) + b[2] * m.exp(-b[3] * x),
        [1.0, 1.0, 1.0, 0.1],
        LINE,
        lambda x: 2 * np.exp(-1.5 * x) - 0.3 * np.exp(-0.2 * x),
        [(0, INFINITY)] * 4,
    ),
    "polynomial": Problem(
        lambda x, b, m: b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3 + b[4] * x**4,
        [1.0] * 5,
        UNIT,
        lambda x: np.cos(3 * x),
        [(0, INFINITY)] * 5,
    ),
}
LOSSES = {"squares": "mse", "Huber": keras.losses.Huber(SCALE), "Cauchy": Cauchy(SCALE)}


class Formula(keras.layers.Layer):
    """A formula as a layer, each parameter a weight, within its bounds.

    Args:
        problem: `Problem`.
    """

    def __init__(self, problem):
        super().__init__()
        self.problem = problem

    def build(self, shape):
        problem = self.problem
        boxes = [Box(*pair) for pair in problem.bounds] if problem.bounds else [None] * len(problem.start)
        self.parameters = [
            self.add_weight(
                name=f"b{number}", shape=(), initializer=keras.initializers.Constant(value), constraint=boxes[number]
            )
            for number, value in enumerate(problem.start)
        ]

    def call(self, x):
        return self.problem.formula(x, self.parameters, keras.ops)


def main():
    """Fits, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of the data")
    parser.add_argument("--updates", type=int, default=100, help="at most")
    parser.add_argument("--only", nargs="+", choices=("outliers", "bounds"), default=["outliers", "bounds"])
    args = results.parse(parser, {"seeds": [1], "updates": 5, "only": ["bounds"]})
    table = []
    with precision("float64"):
        for kind in args.only:
            for seed in args.seeds:
                for found in {"outliers": with_outliers, "bounds": within_bounds}[kind](seed, args.updates):
                    table.append({"question": kind, "seed": seed, **found})
                    print(" ".join(f"{column}={value}" for column, value in table[-1].items()), flush=True)
                if args.csv:
                    results.write(args.csv, table)


def with_outliers(seed, num_updates):
    """Fits data with outliers by every loss; yields rows."""
    for name, problem in OUTLIERS.items():
        rng = np.random.default_rng(seed)
        x, true = problem.x, problem.true(problem.x)
        y = true + SIZE_OF_NOISE * rng.normal(size=x.shape)
        off = rng.random(len(x)) < 0.1
        y[off] += rng.choice([-1, 1], size=(off.sum(), 1)) * rng.uniform(1, 5, (off.sum(), 1))

        def row(method, parameters, num_updates, problem=problem, true=true, name=name):
            error = problem.formula(problem.x, parameters, np) - true
            return {
                "problem": name,
                "method": method,
                "error": f"{np.sqrt(np.mean(error**2)):.4f}",
                "excess": "",
                "updates": num_updates,
            }

        for loss in LOSSES:
            yield row(f"DirectSolver, {loss}", *by_direct_solver(problem, y, LOSSES[loss], num_updates))
        for loss in ("linear", "soft_l1", "huber", "cauchy"):
            found = least_squares(
                lambda b, problem=problem, y=y: (problem.formula(problem.x, b, np) - y)[:, 0],
                problem.start, loss=loss, f_scale=SCALE, **TOLERANCES,
            )  # fmt: skip
            yield row(f"SciPy, {loss}", found.x, found.njev)


def within_bounds(seed, num_updates):
    """Fits formulas within bounds; returns rows."""
    table = []
    for name, problem in BOUNDS.items():
        rng = np.random.default_rng(seed)
        y = problem.true(problem.x) + 0.05 * rng.normal(size=problem.x.shape)
        found = {"DirectSolver": by_direct_solver(problem, y, "mse", num_updates)}
        lower, upper = np.array(problem.bounds).T
        for method in ("trf", "dogbox"):
            fit = least_squares(
                lambda b, problem=problem, y=y: (problem.formula(problem.x, b, np) - y)[:, 0],
                np.clip(problem.start, lower, upper), bounds=(lower, upper), method=method, max_nfev=1000, **TOLERANCES,
            )  # fmt: skip
            found[f"SciPy, {method}"] = fit.x, fit.njev
        losses = {
            method: np.mean((problem.formula(problem.x, values, np) - y) ** 2) for method, (values, _) in found.items()
        }
        least = min(losses.values())
        for method, (_, count) in found.items():
            excess = f"{losses[method] / least - 1:.1e}"
            table.append({"problem": name, "method": method, "error": "", "excess": excess, "updates": count})
    return table


def by_direct_solver(problem, y, loss, num_updates):
    """Fits by `DirectSolver`; returns the parameters and how many updates it took to be within rounding of its last loss."""
    model = HFModel(keras.Sequential([keras.Input((1,)), Formula(problem)]))
    model.compile(HessianFree(solver=DirectSolver()), loss=loss)
    stop = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: setattr(model, "stop_training", bool(logs["converged"]))
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Training has converged to rounding")
        losses = np.array(model.fit(problem.x, y, epochs=num_updates, callbacks=[stop], verbose=0).history["loss"])
    count = int(np.argmax(losses <= losses.min() * (1 + 1e-12)))
    return [float(variable.numpy()) for variable in model.trainable_variables], count


if __name__ == "__main__":
    main()
