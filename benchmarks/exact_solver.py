"""Where the exact solver pays: the error of Friedman's function after the same time by `DirectSolver` and by `ConjugateGradient`.

Networks 5-u-u-1 of tanh units from 100 to 30,000 weights, and from 300 to 30,000 cases, so that both forms of the system occur: `primal` (weights by
weights) and `dual` (rows by rows). `operations` are those that form the system, `2 rows weights min(rows, weights)`, by which `HessianFree()`
chooses. Conjugate gradients run with the defaults that they would have there. `loss` is that of all cases, `error` the root of the mean square error
at other points, without noise, and `least_error` the least of the run. Same weights and cases for both; the clock starts after the first update, and
stands still while errors are measured.

    python -m benchmarks.exact_solver --csv benchmarks/results/exact_solver.csv
    python -m benchmarks.exact_solver --sizes 6x300 20x3000 --precision float32 --noise 0.1 --seconds 10
"""

import argparse

import keras
import numpy as np

from benchmarks import rows as results
from benchmarks.clock import Clock
from examples.precision import precision
from examples.regression import friedman
from keras_hf import ConjugateGradient, DirectSolver, HessianFree, HFModel, LevenbergMarquardt

# Units of each of the two layers, and cases.
SIZES = ("6x300", "6x30000", "20x3000", "97x300", "30x10000", "50x10000", "97x3000", "170x300", "170x1000", "20x30000")
SOLVERS = {"DirectSolver": DirectSolver, "ConjugateGradient": ConjugateGradient}
NUM_TEST = 5000


def main():
    """Trains each network by both solvers, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="UNITSxCASES")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for each solver")
    parser.add_argument("--precision", choices=("float32", "float64"), default="float64")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="of the targets, as a part of their standard deviation"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = results.parse(parser, {"sizes": ["6x300", "20x300"], "seconds": 3.0})
    rows = []
    with precision(args.precision):
        for size in args.sizes:
            units, num_cases = (int(part) for part in size.split("x"))
            for solver in SOLVERS:
                row = measure(units, num_cases, solver, args.seconds, args.seed, args.noise)
                rows.append({"precision": args.precision, "noise": args.noise, **row})
                print(rows[-1], flush=True)
                if args.csv:
                    results.write(args.csv, rows)


def measure(units, num_cases, solver, seconds, seed, noise=0.0):
    """Trains one network by one solver and returns the row, a dict."""
    keras.utils.set_random_seed(seed)
    hidden = [keras.layers.Dense(units, "tanh") for _ in range(2)]
    network = keras.Sequential([keras.Input((5,)), *hidden, keras.layers.Dense(1)])
    rng = np.random.default_rng(seed)
    x, x_test = rng.random((num_cases, 5)), rng.random((NUM_TEST, 5))
    y, y_test = friedman(x), friedman(x_test)
    y = y + noise * y_test.std() * rng.normal(size=y.shape)

    def mean_square(x, y):
        return float(np.mean((network.predict(x, batch_size=10_000, verbose=0) - y) ** 2))

    clock = Clock(seconds, lambda: (mean_square(x, y), mean_square(x_test, y_test) ** 0.5))
    model = HFModel(network)
    model.compile(HessianFree(solver=SOLVERS[solver](), seed=seed), "mse")
    model.fit(x, y, epochs=10**9, callbacks=[LevenbergMarquardt(), clock], verbose=0)
    weights = network.count_params()
    # The last looks until a quarter of the time, or the first, and until the end.
    looks = {0.25: [look for look in clock.looks if look[0] <= 0.25 * seconds][-1], 1.0: clock.looks[-1]}
    return {
        "weights": weights,
        "cases": num_cases,
        "form": "primal" if num_cases >= weights else "dual",
        "operations": f"{2.0 * num_cases * weights * min(num_cases, weights):.1e}",
        "solver": solver,
        "updates": clock.num_updates,
        "seconds": f"{clock.seconds:.1f}",
        "loss_at_quarter": f"{looks[0.25][1]:.2e}",
        "loss": f"{looks[1.0][1]:.2e}",
        "error_at_quarter": f"{looks[0.25][2]:.2e}",
        "error": f"{looks[1.0][2]:.2e}",
        "least_error": f"{min(look[2] for look in clock.looks):.2e}",
    }


if __name__ == "__main__":
    main()
