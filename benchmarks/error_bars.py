"""Error bars that hold: how often new observations, and the function, lie in the 95 % intervals of Laplace's approximation.

Ten functions of one or two variables, each with 100 noisy cases, fitted by a network of 20 tanh units in float64: 150 updates of `DirectSolver` with
the weight decay found by evidence, then `HFModel.laplace`. The intervals are 1.96 standard deviations on either side; 2,000 new points.

    python -m benchmarks.error_bars --csv benchmarks/results/error_bars.csv --figure docs/images/error-bars.png
"""

import argparse
import time
import warnings
from pathlib import Path

import keras
import numpy as np
from keras import layers

from benchmarks import rows as results
from examples.precision import precision
from keras_hf import DirectSolver, HessianFree, HFModel, plots

# Functions of x, `(N, d)`, with their number of variables and the standard deviation of the noise.
PROBLEMS = {
    "damped sine": (lambda x: np.sin(4 * x) * np.exp(-x), 1, 0.2),
    "sinc": (lambda x: np.sinc(2 * x), 1, 0.1),
    "cubic": (lambda x: x**3 - x, 1, 0.1),
    "bump": (lambda x: np.exp(-8 * x**2), 1, 0.05),
    "logistic": (lambda x: 1 / (1 + np.exp(-5 * x)), 1, 0.05),
    "line": (lambda x: 0.5 * x + 0.2, 1, 0.3),
    "kink": (np.abs, 1, 0.05),
    "product": (lambda x: x[:, :1] * x[:, 1:], 2, 0.1),
    "wave": (lambda x: np.sin(2 * x[:, :1] + x[:, 1:]), 2, 0.1),
    "ridge": (lambda x: np.tanh(3 * x[:, :1] - x[:, 1:] ** 2), 2, 0.2),
}
NUM_NEW = 2000


def main():
    """Fits, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of weights and cases")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--figure", type=Path, help="of the first problem and seed, where it is to be written")
    args = results.parse(parser, {"problems": ["line"], "seeds": [1], "updates": 10})
    table = []
    with precision("float64"):
        for name in args.problems:
            for seed in args.seeds:
                model, posterior, row = fitted(name, seed, args)
                table.append(row)
                print(" ".join(f"{column}={value}" for column, value in row.items()), flush=True)
                if args.csv:
                    results.write(args.csv, table)
                if args.figure and len(table) == 1:
                    draw(name, seed, args, posterior)


def cases_of(name, seed, num_cases):
    """Returns inputs `(N, d)` in [-1, 1] and noisy targets `(N, 1)`."""
    function, num_inputs, noise = PROBLEMS[name]
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (num_cases, num_inputs))
    return x, function(x) + noise * rng.normal(size=(num_cases, 1))


def fitted(name, seed, args):
    """Fits one problem; returns the model, its `Laplace` and a row of results."""
    function, num_inputs, noise = PROBLEMS[name]
    x, y = cases_of(name, seed, args.cases)
    keras.utils.set_random_seed(seed)
    model = HFModel(keras.Sequential([keras.Input((num_inputs,)), layers.Dense(20, "tanh"), layers.Dense(1)]))
    model.compile(HessianFree(solver=DirectSolver(), weight_decay="evidence"), loss="mse")
    begun = time.process_time()
    with warnings.catch_warnings():
        # Where it ends.
        warnings.filterwarnings("ignore", "Training has converged to rounding")
        model.fit(x, y, epochs=args.updates, verbose=0)
    posterior = model.laplace(x, y)
    rng = np.random.default_rng(1000 + seed)
    x_new = rng.uniform(-1, 1, (NUM_NEW, num_inputs))
    true = function(x_new)
    y_new = true + noise * rng.normal(size=true.shape)
    found = posterior.predict(x_new)
    return (
        model,
        posterior,
        {
            "problem": name,
            "seed": seed,
            "observations_within": f"{np.mean(np.abs(y_new - found.mean) < 1.96 * found.observation_std):.3f}",
            "function_within": f"{np.mean(np.abs(true - found.mean) < 1.96 * found.std):.3f}",
            "error": f"{np.sqrt(np.mean((found.mean - true) ** 2)):.4f}",
            "mean_std": f"{found.std.mean():.4f}",
            "noise": noise,
            "noise_found": f"{posterior.noise:.4f}",
            "num_effective": f"{posterior.num_effective:.1f}",
            "cpu_seconds": f"{time.process_time() - begun:.1f}",
        },
    )


def draw(name, seed, args, posterior):
    """Draws the first problem, also where there are no cases."""
    x = np.linspace(-1.8, 1.8, 200)[:, None]
    plots.plot_prediction(x, posterior.predict(x), cases_of(name, seed, args.cases), PROBLEMS[name][0](x), args.figure)


if __name__ == "__main__":
    main()
