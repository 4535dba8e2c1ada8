"""NIST's certified nonlinear regressions by `DirectSolver`, beside `scipy.optimize.curve_fit`: 27 formulas, each from two starts.

The Statistical Reference Datasets of the US National Institute of Standards and Technology give parameters and their standard deviations to eleven
digits. Of each fit: to how many digits the parameters and the standard deviations agree with them, the worst of each, at most 11.

    python -m examples.nist --csv benchmarks/results/nist.csv
    python -m examples.nist --problems MGH10 BoxBOD
"""

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from scipy.optimize import curve_fit

from examples import origins
from examples.precision import precision
from examples.tables import write_rows
from keras_hf import DirectSolver, HessianFree, HFModel

DATA = Path(__file__).with_name("nist.json")
MOST_DIGITS = 11


class Problem(NamedTuple):
    """A formula, what it is fitted to, and what NIST certifies.

    Attributes:
        x: Array `(N, d)`.
        y: Array `(N, 1)`.
        starts: Array `(2, n)`.
        values, deviations: Arrays `(n,)`, the certified parameters and their standard deviations.
    """

    x: np.ndarray
    y: np.ndarray
    starts: np.ndarray
    values: np.ndarray
    deviations: np.ndarray


class Fit(NamedTuple):
    """What a method found.

    Attributes:
        values, deviations: Arrays `(n,)`.
        num_updates: Integer, updates or evaluations of the formula.
        seconds: Float.
    """

    values: np.ndarray
    deviations: np.ndarray
    num_updates: int
    seconds: float


def _gaussians(x, b, m):
    return (
        b[0] * m.exp(-b[1] * x)
        + b[2] * m.exp(-((x - b[3]) ** 2) / b[4] ** 2)
        + b[5] * m.exp(-((x - b[6]) ** 2) / b[7] ** 2)
    )


def _cubics(x, b, m):
    return (b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3) / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def _exponentials(x, b, m):
    return b[0] * m.exp(-b[1] * x) + b[2] * m.exp(-b[3] * x) + b[4] * m.exp(-b[5] * x)


def _saturation(x, b, m):
    return b[0] * (1 - m.exp(-b[1] * x))


def _decay(x, b, m):
    return m.exp(-b[0] * x) / (b[1] + b[2] * x)


def _oscillation(x, b, m):
    def wave(period, cosine, sine):
        return cosine * m.cos(2 * math.pi * x / period) + sine * m.sin(2 * math.pi * x / period)

    return b[0] + wave(12.0, b[1], b[2]) + wave(b[3], b[4], b[5]) + wave(b[6], b[7], b[8])


# Functions of x, the list of parameters, and NumPy or `keras.ops`.
FORMULAS = {
    "Misra1a": _saturation,
    "Chwirut2": _decay,
    "Chwirut1": _decay,
    "Lanczos3": _exponentials,
    "Gauss1": _gaussians,
    "Gauss2": _gaussians,
    "DanWood": lambda x, b, m: b[0] * x ** b[1],
    "Misra1b": lambda x, b, m: b[0] * (1 - (1 + b[1] * x / 2) ** -2.0),
    "Kirby2": lambda x, b, m: (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2),
    "Hahn1": _cubics,
    "Nelson": lambda x, b, m: b[0] - b[1] * x[:, :1] * m.exp(-b[2] * x[:, 1:]),
    "MGH17": lambda x, b, m: b[0] + b[1] * m.exp(-x * b[3]) + b[2] * m.exp(-x * b[4]),
    "Lanczos1": _exponentials,
    "Lanczos2": _exponentials,
    "Gauss3": _gaussians,
    "Misra1c": lambda x, b, m: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda x, b, m: b[0] * b[1] * x / (1 + b[1] * x),
    "Roszman1": lambda x, b, m: b[0] - b[1] * x - m.arctan(b[2] / (x - b[3])) / math.pi,
    "ENSO": _oscillation,
    "MGH09": lambda x, b, m: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "Thurber": _cubics,
    "BoxBOD": _saturation,
    "Rat42": lambda x, b, m: b[0] / (1 + m.exp(b[1] - b[2] * x)),
    "MGH10": lambda x, b, m: b[0] * m.exp(b[1] / (x + b[2])),
    "Eckerle4": lambda x, b, m: b[0] / b[1] * m.exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
    "Rat43": lambda x, b, m: b[0] / (1 + m.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Bennett5": lambda x, b, m: b[0] * (b[1] + x) ** (-1 / b[2]),
}


def load(name):
    """Returns a `Problem` by its name."""
    problem = Problem(*(np.array(part, np.float64) for part in json.loads(DATA.read_text())[name]))
    # The formula of Nelson's data is that of their logarithm.
    return problem._replace(y=np.log(problem.y)) if name == "Nelson" else problem


class Formula(keras.layers.Layer):
    """A formula as a layer, each parameter a weight in units of its start: a damping is the same for all weights, so all are to be of a size.

    Args:
        formula: One of `FORMULAS`.
        start: Array `(n,)`, no zeros.
    """

    def __init__(self, formula, start):
        super().__init__()
        self.formula, self.start = formula, [float(value) for value in start]

    def build(self, shape):
        self.shares = [
            self.add_weight(name=f"b{number}", shape=(), initializer="ones") for number in range(1, len(self.start) + 1)
        ]

    def call(self, x):
        parameters = [share * value for share, value in zip(self.shares, self.start, strict=True)]
        return self.formula(x, parameters, keras.ops)


def by_direct_solver(name, problem, start, num_updates):
    """Fits by `DirectSolver`, with its defaults; returns a `Fit`."""
    model = HFModel(keras.Sequential([keras.Input(problem.x.shape[1:]), Formula(FORMULAS[name], start)]))
    model.compile(HessianFree(solver=DirectSolver()), loss="mse")
    stop = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: setattr(model, "stop_training", bool(logs["converged"]))
    )
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        history = model.fit(problem.x, problem.y, epochs=num_updates, callbacks=[stop], verbose=0)
        covariance = model.parameter_covariance(problem.x, problem.y)
    values = start * [float(variable.numpy()) for variable in model.trainable_variables]
    deviations = np.abs(start) * np.sqrt(np.diag(covariance.matrix))
    return Fit(values, deviations, len(history.epoch), time.process_time() - begun)


def by_curve_fit(name, problem, start, num_updates):
    """Fits by `scipy.optimize.curve_fit`, its differences instead of derivatives; returns a `Fit`."""
    num_calls = 0

    def formula(x, *b):
        nonlocal num_calls
        num_calls += 1
        return FORMULAS[name](x, b, np)[:, 0]

    begun = time.process_time()
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            values, matrix = curve_fit(formula, problem.x, problem.y[:, 0], start, maxfev=100 * num_updates)
    except RuntimeError:  # no end within so many calls
        values, matrix = np.full(len(start), np.nan), np.full([len(start)] * 2, np.nan)
    return Fit(values, np.sqrt(np.diag(matrix)), num_calls, time.process_time() - begun)


METHODS = {"direct": by_direct_solver, "curve_fit": by_curve_fit}


def digits(found, certified):
    """Returns to how many digits all numbers agree, a float within 0 and 11: the least of `-log10` of the relative errors."""
    with np.errstate(divide="ignore", invalid="ignore"):
        agreed = -np.log10(np.abs(found - certified) / np.abs(certified))
    return float(np.clip(np.nan_to_num(agreed, nan=0.0, posinf=MOST_DIGITS), 0, MOST_DIGITS).min())


def main(arguments=None):
    """Fits, prints a row for every fit, and writes them.

    Args:
        arguments: List of strings, as on the command line; `None` takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=FORMULAS, default=list(FORMULAS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--num-updates", type=int, default=500, help="at most")
    parser.add_argument("--csv", type=Path, help="where the table is to be written")
    args = parser.parse_args(arguments)
    table = []
    with precision("float64"):
        for name in args.problems:
            problem = load(name)
            for number, start in enumerate(problem.starts, 1):
                for method in args.methods:
                    keras.utils.clear_session()
                    fit = METHODS[method](name, problem, start, args.num_updates)
                    table.append(
                        {
                            "problem": name,
                            "start": number,
                            "method": method,
                            "digits": f"{digits(fit.values, problem.values):.1f}",
                            "digits_of_deviations": f"{digits(fit.deviations, problem.deviations):.1f}",
                            "updates": fit.num_updates,
                            "cpu_seconds": f"{fit.seconds:.2f}",
                        }
                    )
                    print(" ".join(f"{column}={value}" for column, value in table[-1].items()), flush=True)
                    if args.csv:
                        write_rows(args.csv, table)
                        origins.note(args.csv)


if __name__ == "__main__":
    main()
