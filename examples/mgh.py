"""The least squares problems of Moré, Garbow and Hillstrom (1981) by `DirectSolver`, beside SciPy's `lm`, which is their MINPACK.

Each from its standard start and from ten times that. A fit has solved a problem if its sum of squares is the least that is published, or that of a
stationary point that is known besides, to five digits; where that is zero, if it is below 1e-12.

    python -m examples.mgh --csv benchmarks/results/mgh.csv
    python -m examples.mgh --problems meyer jennrich-sampson

Moré, Garbow & Hillstrom (1981), *Testing unconstrained optimization software*.
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
from scipy.optimize import least_squares

from examples import origins
from examples.precision import precision
from examples.tables import write_rows
from keras_hf import HFModel


class Problem(NamedTuple):
    """Residuals as a formula of what each depends on and of the parameters.

    Attributes:
        residuals: Callable of `x`, the parameters `(n,)`, and NumPy or `keras.ops`, that returns `(N, 1)`.
        x: Array `(N, d)`, a row for each residual.
        start: Array `(n,)`.
        minima: Sums of squares at the minimum, and at other points where fits may end.
    """

    residuals: Callable
    x: np.ndarray
    start: np.ndarray
    minima: tuple


def _listed(residuals):
    """A formula that takes its residuals from a list of scalars, by rows of the identity."""
    return lambda x, b, m: sum(x[:, k : k + 1] * r for k, r in enumerate(residuals(b, m)))


def _column(*values):
    return np.stack([np.asarray(value, np.float64).reshape(-1) for value in values], 1)


def _scalars(residuals, num_residuals, start, *minima):
    return Problem(_listed(residuals), np.eye(num_residuals), np.asarray(start, np.float64), minima)


def _data(residuals, x, start, *minima):
    return Problem(residuals, x, np.asarray(start, np.float64), minima)


def _helical(b, m):
    angle = m.arctan(b[1] / b[0]) / (2 * math.pi) + 0.5 * (0.5 - 0.5 * m.sign(b[0]))
    return [10 * (b[2] - 10 * angle), 10 * (m.sqrt(b[0] ** 2 + b[1] ** 2) - 1), b[2]]


def _wood(b, m):
    return [
        10 * (b[1] - b[0] ** 2), 1 - b[0], math.sqrt(90) * (b[3] - b[2] ** 2), 1 - b[2],
        math.sqrt(10) * (b[1] + b[3] - 2), (b[1] - b[3]) / math.sqrt(10),
    ]  # fmt: skip


def _gulf(x, b, m):
    y = 25 + (-50 * m.log(x)) ** (2 / 3)
    return m.exp(-(m.exp(b[2] * m.log(m.abs(y - b[1]))) / b[0])) - x


def _osborne_2(x, b, m):
    t, y = x[:, :1], x[:, 1:]
    return y - (
        b[0] * m.exp(-t * b[4])
        + b[1] * m.exp(-((t - b[8]) ** 2) * b[5])
        + b[2] * m.exp(-((t - b[9]) ** 2) * b[6])
        + b[3] * m.exp(-((t - b[10]) ** 2) * b[7])
    )


def _polynomial(coefficients, t):
    """Horner's rule."""
    total = 0 * t
    for coefficient in reversed(coefficients):
        total = total * t + coefficient
    return total


def _watson(x, b, m):
    t, of_data, first, second = x[:, :1], x[:, 1:2], x[:, 2:3], x[:, 3:]
    n = b.shape[0]
    slope = _polynomial([k * b[k] for k in range(1, n)], t)
    value = _polynomial([b[k] for k in range(n)], t)
    return of_data * (slope - value**2 - 1) + first * b[0] + second * (b[1] - b[0] ** 2 - 1)


def _penalty_2(b, m):
    n = b.shape[0]
    y = [math.exp(i / 10) + math.exp((i - 1) / 10) for i in range(2, n + 1)]
    root = math.sqrt(1e-5)
    return [
        b[0] - 0.2,
        *(root * (m.exp(b[i] / 10) + m.exp(b[i - 1] / 10) - y[i - 1]) for i in range(1, n)),
        *(root * (m.exp(b[i] / 10) - math.exp(-0.1)) for i in range(1, n)),
        sum((n - i) * b[i] ** 2 for i in range(n)) - 1,
    ]


def _variably_dimensioned(b, m):
    n = b.shape[0]
    total = sum((i + 1) * (b[i] - 1) for i in range(n))
    return [*(b[i] - 1 for i in range(n)), total, total**2]


def _trigonometric(b, m):
    n = b.shape[0]
    cosines = sum(m.cos(b[i]) for i in range(n))
    return [n - cosines + (i + 1) * (1 - m.cos(b[i])) - m.sin(b[i]) for i in range(n)]


def _almost_linear(b, m):
    n = b.shape[0]
    total, product = sum(b[i] for i in range(n)), math.prod(b[i] for i in range(n))
    return [*(b[i] + total - (n + 1) for i in range(n - 1)), product - 1]


def _neighbours(b, i):
    n = b.shape[0]
    return b[i - 1] if i else 0.0, b[i + 1] if i < n - 1 else 0.0


def _boundary_value(b, m):
    h = 1 / (b.shape[0] + 1)
    return [2 * b[i] - sum(_neighbours(b, i)) + h**2 * (b[i] + (i + 1) * h + 1) ** 3 / 2 for i in range(b.shape[0])]


def _integral_equation(b, m):
    n = b.shape[0]
    h = 1 / (n + 1)
    t = [(i + 1) * h for i in range(n)]
    cubes = [(b[i] + t[i] + 1) ** 3 for i in range(n)]
    return [
        b[i]
        + h / 2 * (1 - t[i]) * sum(t[j] * cubes[j] for j in range(i + 1))
        + h / 2 * t[i] * sum(((1 - t[j]) * cubes[j] for j in range(i + 1, n)), 0.0)
        for i in range(n)
    ]


def _tridiagonal(b, m):
    return [(3 - 2 * b[i]) * b[i] - _neighbours(b, i)[0] - 2 * _neighbours(b, i)[1] + 1 for i in range(b.shape[0])]


def _banded(b, m):
    n = b.shape[0]
    near = lambda i: [j for j in range(max(0, i - 5), min(n, i + 2)) if j != i]  # noqa: E731
    return [b[i] * (2 + 5 * b[i] ** 2) + 1 - sum(b[j] * (1 + b[j]) for j in near(i)) for i in range(n)]


def _chebyquad(n):
    def residuals(b, m):
        before, now, means = [1.0] * n, [2 * b[j] - 1 for j in range(n)], []
        shifted = now
        for degree in range(1, n + 1):
            integral = 0.0 if degree % 2 else -1 / (degree**2 - 1)
            means.append(sum(now) / n - integral)
            before, now = now, [2 * s * t - r for s, t, r in zip(shifted, now, before, strict=True)]
        return means

    return residuals


def _linear(x, b, m):
    return x[:, :-1] @ m.reshape(b, (-1, 1)) + x[:, -1:]


def _linear_data(matrix):
    return np.concatenate([matrix, -np.ones((len(matrix), 1))], 1)


_BARD = [0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39]
_GAUSSIAN = [0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521, 0.3989]
_MEYER = [34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872]
_KOWALIK = [0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246]
_TIMES = [4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625]
_OSBORNE_1 = [
    0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685, 0.658, 0.628, 0.603,
    0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411, 0.406,
]  # fmt: skip
_OSBORNE_2 = [
    1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608, 0.655, 0.616, 0.606,
    0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423,
    0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668,
    0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098, 0.054,
]  # fmt: skip
_I = np.arange(1.0, 100)
_GAUSSIAN_TIMES = (8 - np.arange(1.0, 16)) / 2
_WATSON = np.concatenate([_column(_I[:29] / 29, np.ones(29), np.zeros(29), np.zeros(29)), [[0, 0, 1, 0], [0, 0, 0, 1]]])
_T10, _T13, _T20 = _I[:10] / 10, _I[:13] / 10, _I[:20] / 5
_INNER = np.arange(1, 11) / 11
_RANK_1 = np.outer(_I[:10], _I[:5])
_ZEROED = np.outer(np.concatenate([[0], _I[:8], [0]]), np.concatenate([[0], _I[1:4], [0]]))

PROBLEMS = {
    "rosenbrock": _scalars(lambda b, m: [10 * (b[1] - b[0] ** 2), 1 - b[0]], 2, [-1.2, 1], 0),
    "freudenstein-roth": _scalars(
        lambda b, m: [-13 + b[0] + ((5 - b[1]) * b[1] - 2) * b[1], -29 + b[0] + ((b[1] + 1) * b[1] - 14) * b[1]],
        2, [0.5, -2], 0, 48.98425,
    ),
    "powell-badly-scaled": _scalars(
        lambda b, m: [1e4 * b[0] * b[1] - 1, m.exp(-b[0]) + m.exp(-b[1]) - 1.0001], 2, [0, 1], 0
    ),
    "brown-badly-scaled": _scalars(lambda b, m: [b[0] - 1e6, b[1] - 2e-6, b[0] * b[1] - 2], 3, [1, 1], 0),
    "beale": _scalars(
        lambda b, m: [y - b[0] * (1 - b[1] ** k) for k, y in ((1, 1.5), (2, 2.25), (3, 2.625))], 3, [1, 1], 0
    ),
    "jennrich-sampson": _data(
        lambda x, b, m: 2 + 2 * x - (m.exp(x * b[0]) + m.exp(x * b[1])), _column(_I[:10]), [0.3, 0.4], 124.3622, 259.5802
    ),
    "helical-valley": _scalars(_helical, 3, [-1, 0, 0], 0),
    "bard": _data(
        lambda x, b, m: x[:, :1] - (b[0] + x[:, 1:2] / (b[1] * x[:, 2:3] + b[2] * x[:, 3:])),
        _column(_BARD, _I[:15], 16 - _I[:15], np.minimum(_I[:15], 16 - _I[:15])), [1, 1, 1], 8.214877e-3, 17.42869,
    ),
    "gaussian": _data(
        lambda x, b, m: b[0] * m.exp(-b[1] * (x[:, :1] - b[2]) ** 2 / 2) - x[:, 1:],
        _column(_GAUSSIAN_TIMES, _GAUSSIAN + _GAUSSIAN[-2::-1]), [0.4, 1, 0], 1.127933e-8,
    ),
    "meyer": _data(
        lambda x, b, m: b[0] * m.exp(b[1] / (x[:, :1] + b[2])) - x[:, 1:],
        _column(45 + 5 * _I[:16], _MEYER), [0.02, 4000, 250], 87.94586,
    ),
    "gulf": _data(_gulf, _column(_I[:99] / 100), [5, 2.5, 0.15], 0),
    "box": _data(
        lambda x, b, m: m.exp(-x * b[0]) - m.exp(-x * b[1]) - b[2] * (m.exp(-x) - m.exp(-10 * x)),
        _column(_T10), [0, 10, 20], 0,
    ),
    "powell-singular": _scalars(
        lambda b, m: [
            b[0] + 10 * b[1], math.sqrt(5) * (b[2] - b[3]), (b[1] - 2 * b[2]) ** 2, math.sqrt(10) * (b[0] - b[3]) ** 2
        ],
        4, [3, -1, 0, 1], 0,
    ),
    "wood": _scalars(_wood, 6, [-3, -1, -3, -1], 0),
    "kowalik-osborne": _data(
        lambda x, b, m: x[:, :1] - b[0] * (x[:, 1:] ** 2 + x[:, 1:] * b[1]) / (x[:, 1:] ** 2 + x[:, 1:] * b[2] + b[3]),
        _column(_KOWALIK, _TIMES), [0.25, 0.39, 0.415, 0.39], 3.075056e-4, 1.027343e-3,
    ),
    "brown-dennis": _data(
        lambda x, b, m: (b[0] + x * b[1] - m.exp(x)) ** 2 + (b[2] + b[3] * m.sin(x) - m.cos(x)) ** 2,
        _column(_T20), [25, 5, -5, -1], 85822.20,
    ),
    "osborne-1": _data(
        lambda x, b, m: x[:, 1:] - (b[0] + b[1] * m.exp(-x[:, :1] * b[3]) + b[2] * m.exp(-x[:, :1] * b[4])),
        _column(10 * (_I[:33] - 1), _OSBORNE_1), [0.5, 1.5, -1, 0.01, 0.02], 5.464895e-5,
    ),
    "biggs-exp6": _data(
        lambda x, b, m: b[2] * m.exp(-x * b[0]) - b[3] * m.exp(-x * b[1]) + b[5] * m.exp(-x * b[4])
        - (m.exp(-x) - 5 * m.exp(-10 * x) + 3 * m.exp(-4 * x)),
        _column(_T13), [1, 2, 1, 1, 1, 1], 0, 5.655650e-3,
    ),
    "osborne-2": _data(
        _osborne_2, _column((_I[:65] - 1) / 10, _OSBORNE_2),
        [1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5], 4.013774e-2,
    ),
    "watson-6": _data(_watson, _WATSON, [0] * 6, 2.287670e-3),
    "watson-9": _data(_watson, _WATSON, [0] * 9, 1.399760e-6),
    "watson-12": _data(_watson, _WATSON, [0] * 12, 4.722381e-10),
    "penalty-1": _scalars(
        lambda b, m: [*(math.sqrt(1e-5) * (b[i] - 1) for i in range(4)), sum(b[i] ** 2 for i in range(4)) - 0.25],
        5, [1, 2, 3, 4], 2.249978e-5,
    ),
    "penalty-2": _scalars(_penalty_2, 8, [0.5] * 4, 9.376293e-6),
    "variably-dimensioned": _scalars(_variably_dimensioned, 12, 1 - _I[:10] / 10, 0),
    "trigonometric": _scalars(_trigonometric, 10, [0.1] * 10, 0, 2.795056e-5),
    "brown-almost-linear": _scalars(_almost_linear, 10, [0.5] * 10, 0, 1),
    "boundary-value": _scalars(_boundary_value, 10, _INNER * (_INNER - 1), 0),
    "integral-equation": _scalars(_integral_equation, 10, _INNER * (_INNER - 1), 0),
    "broyden-tridiagonal": _scalars(_tridiagonal, 10, [-1] * 10, 0),
    "broyden-banded": _scalars(_banded, 10, [-1] * 10, 0),
    "linear": _data(_linear, _linear_data(np.eye(10, 5) - 0.2), [1] * 5, 5),
    "linear-rank-1": _data(_linear, _linear_data(_RANK_1), [1] * 5, 45 / 21),
    "linear-rank-1-zeros": _data(_linear, _linear_data(_ZEROED), [1] * 5, 124 / 34),
    "chebyquad-8": _scalars(_chebyquad(8), 8, _I[:8] / 9, 3.516874e-3),
    "chebyquad-9": _scalars(_chebyquad(9), 9, _I[:9] / 10, 0),
    "chebyquad-10": _scalars(_chebyquad(10), 10, _I[:10] / 11, 6.503955e-3, 4.772714e-3),
}  # fmt: skip


class Residuals(keras.layers.Layer):
    """The residuals of a problem as a layer, with one weight for all parameters.

    Args:
        problem: `Problem`.
        start: Array `(n,)`.
    """

    def __init__(self, problem, start):
        super().__init__()
        self.problem, self.start = problem, start

    def build(self, shape):
        self.b = self.add_weight(name="b", shape=self.start.shape, initializer=lambda shape, dtype: self.start)

    def call(self, x):
        return self.problem.residuals(x, self.b, keras.ops)


def by_direct_solver(problem, start, num_updates):
    """Fits by what `HessianFree()` chooses; returns the sum of squares and the number of updates."""
    model = HFModel(keras.Sequential([keras.Input(problem.x.shape[1:]), Residuals(problem, start)]))
    model.compile(loss="mse")
    stop = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: setattr(model, "stop_training", bool(logs["converged"]))
    )
    zeros = np.zeros((len(problem.x), 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        history = model.fit(problem.x, zeros, epochs=num_updates, callbacks=[stop], verbose=0)
    return sum_of_squares(problem, model.get_weights()[0]), len(history.epoch)


def by_lm(problem, start, num_updates):
    """Fits by SciPy's `least_squares(method="lm")`, its differences instead of derivatives; returns the same, with evaluations for updates."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        fit = least_squares(
            lambda b: problem.residuals(problem.x, b, np)[:, 0],
            start,
            method="lm",
            max_nfev=num_updates * (len(start) + 1),
            **dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15),
        )
    return 2 * fit.cost, fit.nfev


METHODS = {"direct": by_direct_solver, "lm": by_lm}


def sum_of_squares(problem, b):
    """Returns the sum of the squares of the residuals, a float."""
    with np.errstate(all="ignore"):
        return float(np.sum(problem.residuals(problem.x, np.asarray(b), np) ** 2))


def is_one_of(minima, squares):
    """Whether a sum of squares is one of some to five digits; below 1e-12 where that is zero."""
    return any(abs(squares - least) <= 1e-5 * least + (least == 0) * 1e-12 for least in minima)


def main(arguments=None):
    """Fits, prints a row for every fit, and writes them.

    Args:
        arguments: List of strings, as on the command line; `None` takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 10.0], help="by which starts are multiplied")
    parser.add_argument("--num-updates", type=int, default=500, help="at most")
    parser.add_argument("--csv", type=Path, help="where the table is to be written")
    args = parser.parse_args(arguments)
    table = []
    with precision("float64"):
        for name in args.problems:
            problem = PROBLEMS[name]
            for scale in args.scales if problem.start.any() else args.scales[:1]:
                for method in args.methods:
                    keras.utils.clear_session()
                    begun = time.process_time()
                    squares, num_updates = METHODS[method](problem, scale * problem.start, args.num_updates)
                    table.append(
                        {
                            "problem": name,
                            "scale": f"{scale:g}",
                            "method": method,
                            "sum_of_squares": f"{squares:.7g}",
                            "solved": int(is_one_of(problem.minima, squares)),
                            "least": int(is_one_of([min(problem.minima)], squares)),
                            "updates": num_updates,
                            "cpu_seconds": f"{time.process_time() - begun:.2f}",
                        }
                    )
                    print(" ".join(f"{column}={value}" for column, value in table[-1].items()), flush=True)
                    if args.csv:
                        write_rows(args.csv, table)
                        origins.note(args.csv)


if __name__ == "__main__":
    main()
