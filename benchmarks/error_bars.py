"""Error bars that hold: how often new observations, and the function, lie in the 95 % intervals of Laplace's approximation.

Ten functions of one or two variables, each with 100 noisy cases, fitted by a network of 20 tanh units in float64: 150 updates of `DirectSolver` with
the weight decay found by evidence, then `HFModel.laplace`. The intervals are 1.96 standard deviations on either side; 2,000 new points.

    python -m benchmarks.error_bars --csv benchmarks/results/error_bars.csv --figure docs/images/error-bars.png

Data of other kinds, of which not all is observed alike: masked sequences, labels of steps (the interval is that of the difference of two logits),
weights that are inverse variances, and columns of different noise.

    python -m benchmarks.error_bars --problems "masked sequences" "labels of steps" "weights" "two columns" --seeds $(seq 20) \
        --csv benchmarks/results/observed.csv
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
KINDS = "masked sequences", "labels of steps", "weights", "two columns"


def main():
    """Fits, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=[*PROBLEMS, *KINDS], default=list(PROBLEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of weights and cases")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--figure", type=Path, help="of the first problem and seed, where it is to be written")
    args = results.parse(parser, {"problems": ["line"], "seeds": [1], "updates": 10})
    table = []
    with precision("float64"):
        for name in args.problems:
            for seed in args.seeds:
                posterior, row = fitted(name, seed, args) if name in PROBLEMS else fitted_kind(name, seed, args)
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
    """Fits one problem; returns its `Laplace` and a row of results."""
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


def fitted_kind(name, seed, args):
    """Fits data of another kind, as many cases or sequences; returns its `Laplace` and a row of results."""
    rng = np.random.default_rng(seed)
    has_steps, is_classes = name in ("masked sequences", "labels of steps"), name == "labels of steps"
    shape = (5, 1) if has_steps else (1,)
    x, x_new = (rng.uniform(-1, 1, (count, *shape)) for count in (args.cases, NUM_NEW // (5 if has_steps else 1)))
    truth = lambda x: (  # noqa: E731
        np.concatenate([np.sin(3 * x), np.cos(2 * x)], -1)
        if name == "two columns"
        else np.sin(3 * x) * (2 if is_classes else 1)
    )
    sigma, sample_weight = {"two columns": np.array([0.05, 0.5])}.get(name, 0.2), None
    if name == "masked sequences":
        x *= np.arange(5)[:, None] < rng.integers(1, 6, (args.cases, 1, 1))
    if name == "weights":
        sigma = rng.uniform(0.05, 0.5, (args.cases, 1))
        sample_weight = 1 / sigma[:, 0] ** 2
    y = truth(x) + sigma * rng.normal(size=truth(x).shape)
    if is_classes:
        y = (rng.random(x.shape) < 1 / (1 + np.exp(-truth(x))))[..., 0].astype("int32")
    keras.utils.set_random_seed(seed)
    stack = [*([layers.Masking()] if name == "masked sequences" else []), layers.Dense(12, "tanh")]
    model = HFModel(
        keras.Sequential([keras.Input(shape), *stack, layers.Dense(2 if is_classes else truth(x).shape[-1])])
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if is_classes else "mse"
    model.compile(HessianFree(solver=DirectSolver(), weight_decay="evidence"), loss=loss)
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Training has converged to rounding")
        model.fit(x, y, sample_weight=sample_weight, epochs=args.updates, verbose=0)
    posterior, row = model.laplace(x, y, sample_weight, structure="full"), {"problem": name, "seed": seed}
    found, true = posterior.predict(x_new), truth(x_new)
    if is_classes:
        # The variance of the difference of two logits, step by step.
        mean = found.logits[..., 1:] - found.logits[..., :1]
        c = np.einsum("npipj->npij", found.covariance.reshape(len(x_new), 5, 2, 5, 2))
        std = np.sqrt(c[..., 0, 0] + c[..., 1, 1] - 2 * c[..., 0, 1])[..., None]
    else:
        mean, std = found.mean, found.std
        at_new = rng.uniform(0.05, 0.5, true.shape) if name == "weights" else sigma
        y_new = true + at_new * rng.normal(size=true.shape)
        # The noise is that of unit weight.
        of_one = np.sqrt(std**2 + (posterior.noise * (at_new if name == "weights" else 1)) ** 2)
        row["observations_within"] = " ".join(
            f"{share:.3f}" for share in np.mean(np.abs(y_new - mean) < 1.96 * of_one, (0, *range(1, true.ndim - 1)))
        )
    row.setdefault("observations_within", "")
    return posterior, row | {
        "function_within": f"{np.mean(np.abs(true - mean) < 1.96 * std):.3f}",
        "noise_found": " ".join(f"{noise:.3f}" for noise in np.atleast_1d(posterior.noise)),
        "num_effective": f"{posterior.num_effective:.1f}",
        "cpu_seconds": f"{time.process_time() - begun:.1f}",
    }


def draw(name, seed, args, posterior):
    """Draws the first problem, also where there are no cases."""
    x = np.linspace(-1.8, 1.8, 200)[:, None]
    plots.plot_prediction(x, posterior.predict(x), cases_of(name, seed, args.cases), PROBLEMS[name][0](x), args.figure)


if __name__ == "__main__":
    main()
