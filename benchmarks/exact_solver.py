"""Where the exact solver pays: the error of Friedman's function after the same time by `DirectSolver` and by `ConjugateGradient`, in float64.

Networks 5-u-u-1 of tanh units from 100 to 30,000 weights, and from 300 to 30,000 cases, so that both forms of the system occur: `primal` (weights by
weights) and `dual` (rows by rows). `operations` are those that form the system, `2 rows weights min(rows, weights)`, by which `HessianFree()`
chooses. Conjugate gradients run with the defaults that they would have there. `loss` is that of all cases, `error` the root of the mean square error
at other points. Same weights and cases for both; the clock starts after the first update, and stands still while errors are measured.

    python -m benchmarks.exact_solver --csv benchmarks/results/exact_solver.csv
    python -m benchmarks.exact_solver --sizes 10x300 70x3000 --seconds 60
"""

import argparse
import time

import keras
import numpy as np

from benchmarks import rows as results
from examples.pinn import float64
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
    parser.add_argument("--seed", type=int, default=0)
    args = results.parse(parser, {"sizes": ["6x300", "20x300"], "seconds": 3.0})
    rows = []
    with float64():
        for size in args.sizes:
            units, num_cases = (int(part) for part in size.split("x"))
            for solver in SOLVERS:
                rows.append(measure(units, num_cases, solver, args.seconds, args.seed))
                print(rows[-1], flush=True)
                if args.csv:
                    results.write(args.csv, rows)


def measure(units, num_cases, solver, seconds, seed):
    """Trains one network by one solver and returns the row, a dict."""
    keras.utils.set_random_seed(seed)
    hidden = [keras.layers.Dense(units, "tanh") for _ in range(2)]
    network = keras.Sequential([keras.Input((5,)), *hidden, keras.layers.Dense(1)])
    rng = np.random.default_rng(seed)
    x, x_test = rng.random((num_cases, 5)), rng.random((NUM_TEST, 5))
    clock = Clock(network, (x, friedman(x)), (x_test, friedman(x_test)), seconds)
    model = HFModel(network)
    model.compile(HessianFree(solver=SOLVERS[solver](), seed=seed), "mse")
    model.fit(x, friedman(x), epochs=10**9, callbacks=[LevenbergMarquardt(), clock], verbose=0)
    weights = network.count_params()
    looks = {part: clock.look_at(part * seconds) for part in (0.25, 1.0)}
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
    }


class Clock(keras.callbacks.Callback):
    """Looks at loss and error, ever more rarely, and ends training when its time is over or it has converged.

    `looks` are tuples of seconds, mean square error of the cases, and root of that of the test cases.
    """

    def __init__(self, network, cases, test_cases, max_seconds):
        super().__init__()
        self.network, self.cases, self.test_cases, self.max_seconds = network, cases, test_cases, max_seconds
        self.num_updates, self.seconds, self.looks = 0, 0.0, []

    def on_train_batch_begin(self, batch, logs=None):
        self._begun_at = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.num_updates += 1
        if self.num_updates > 1:
            self.seconds += time.perf_counter() - self._begun_at
        is_over = self.seconds > self.max_seconds or bool(logs["converged"])
        if is_over or not self.looks or self.seconds > 1.1 * self.looks[-1][0] + 0.1:
            mean_squares = [self._mean_square(*cases) for cases in (self.cases, self.test_cases)]
            self.looks.append((self.seconds, mean_squares[0], mean_squares[1] ** 0.5))
        self.model.stop_training = is_over

    def look_at(self, seconds):
        """Returns the last look up to a time, or the first."""
        return [look for look in self.looks if look[0] <= seconds * 1.1][-1]

    def _mean_square(self, x, y):
        return float(np.mean((self.network.predict(x, batch_size=10_000, verbose=0) - y) ** 2))


if __name__ == "__main__":
    main()
