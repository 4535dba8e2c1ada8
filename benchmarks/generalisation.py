"""What makes deep autoencoders as good on other cases: weight decay and more, for Hessian-free and first-order methods alike.

    python -m benchmarks.generalisation --csv benchmarks/results/generalisation.csv
    python -m benchmarks.generalisation --csv benchmarks/results/generalisation.csv --table

Every method has the same grid of weight decays and starts from the same sparse weights. `hf` is `HessianFree()` with `ConjugateGradient`,
`hf-momentum` with `PreconditionedMomentum`; `nag` is Nesterov momentum with Sutskever's schedule, `adam` falls along a cosine; both with each rate of
two. Variants change one thing of `hf`:

    half       the growing part is half of the cases at most, so that the batches differ to the end
    short      10 CG iterations an update at most, in place of 25
    start      the decay pulls towards the first weights in place of zero
    evidence   `weight_decay="evidence"`

Rows are looks: squared errors per case of training and test, of the last weights and of an average over updates, and seconds of the processor,
without tracing and without the looks. Runs that the file already holds are kept.
"""

import argparse
import itertools
import tempfile
import time
from functools import partial
from pathlib import Path

import keras
import numpy as np

from benchmarks import rows as results
from benchmarks.time_to_error import PROBLEMS, Curve, load_curves, starting_network
from benchmarks.validation import Half
from examples.baselines import NesterovMomentum, fit_compiled
from keras_hf import ConjugateGradient, HessianFree, HFModel, PreconditionedMomentum

DECAYS = (0.0, 2e-5, 1e-4, 3e-4)
METHODS = ("hf", "hf-momentum", "nag", "adam")
VARIANTS = ("", "half", "short", "start", "evidence")
RATES = {"nag": (3e-3, 1e-2), "adam": (3e-3, 1e-2)}
# `ema_momentum`: averages over about a tenth of a run's updates.
AVERAGES = {"hf": 0.8, "hf-momentum": 0.95, "nag": 0.999, "adam": 0.999}
CASES = {
    "curves": PROBLEMS["small-curves"]._replace(load=partial(load_curves, 10_000), seconds=50.0),
    "full-curves": PROBLEMS["full-curves"],
    "mnist": PROBLEMS["mnist-autoencoder"]._replace(seconds=600.0),
}


class Towards(keras.regularizers.Regularizer):
    """The penalty `decay / 2 ||w - start||^2` of one variable."""

    def __init__(self, decay, start):
        self._decay, self._start = decay, start

    def __call__(self, value):
        return self._decay / 2 * keras.ops.sum(keras.ops.square(value - self._start))


class Looks(Curve):
    """Errors of the last weights and of averages, against seconds of the processor."""

    def clock(self):
        return time.process_time()

    def is_due(self, seconds):
        return seconds >= self.rows[-1]["seconds"] + self.max_seconds / 25

    def errors(self):
        last = self._errors()
        row = {"train_error": last["train_error"], "test_error": last["test_error"]}
        return {**row, **{f"averaged_{name}": error for name, error in (self._averaged() or row).items()}}

    def _averaged(self):
        if not self.rows:
            return None
        averaged = self._averaged_errors()
        return {name: averaged[name] for name in ("train_error", "test_error")}


def main(arguments=None):
    """Trains what the file lacks, or prints what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=CASES, default=["curves"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--decays", nargs="+", type=float, default=DECAYS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[""])
    parser.add_argument("--rates", nargs="+", type=float, help="of first-order methods; default: two each")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, help="of training; default: the problem's own")
    parser.add_argument(
        "--table", action="store_true", help="print the table of what the file holds, and train nothing"
    )
    quick = {"methods": ["hf", "nag"], "decays": [1e-4], "rates": [1e-2], "seconds": 3.0}
    args = results.parse(parser, quick, arguments)
    table = results.read(args.csv)
    if args.table:
        print(markdown(table))
        return
    for seed, problem, decay, method in itertools.product(args.seeds, args.problems, args.decays, args.methods):
        for setting in (args.rates or RATES[method]) if method in RATES else args.variants:
            run = {"problem": problem, "method": method, "setting": setting, "decay": decay, "seed": seed}
            run = {name: str(value) for name, value in run.items()}
            if any(run.items() <= row.items() for row in table):
                continue
            seconds = args.seconds or CASES[problem].seconds
            table += [{**run, **row} for row in train(CASES[problem], method, setting, decay, seed, seconds)]
            print(" ".join(f"{name}={value}" for name, value in table[-1].items()), flush=True)
            if args.csv:
                results.write(args.csv, table)


def train(problem, method, setting, decay, seed, seconds):
    """Trains once.

    Args:
        problem: `time_to_error.Problem`, an autoencoder.
        method: String, one of `METHODS`.
        setting: Float, the learning rate of a first-order method; or string, one of `VARIANTS`.
        decay: Float c of the penalty `c/2 ||w||^2`.
        seed: Integer, of cases, weights and batches.
        seconds: Float, of the processor.

    Returns:
        List of rows, dicts.
    """
    cases = problem.load(seed)
    network = starting_network(problem, 0.0, seed)
    for weights in network.trainable_variables if decay and setting != "evidence" else ():
        start = keras.ops.convert_to_numpy(weights)
        weights.regularizer = Towards(decay, start if setting == "start" else np.zeros_like(start))
    averages = {"use_ema": True, "ema_momentum": AVERAGES[method]}
    with tempfile.TemporaryDirectory() as folder:
        watch = Looks(problem, network, cases, Path(folder, "rows.csv"), seconds)
        if method in RATES:
            watch.optimizer = (NesterovMomentum if method == "nag" else keras.optimizers.Adam)(setting, **averages)
            data = cases.x_train, cases.y_train, 200
            fit_compiled(network, watch.optimizer, problem.loss, *data, watch, cosine_decay=method == "adam", seed=seed)
        else:
            solver = ConjugateGradient(**({"max_iterations": 10} if setting == "short" else {}))
            solver = PreconditionedMomentum() if method == "hf-momentum" else solver
            parts = {"growing_batch": Half()} if setting == "half" else {}
            evidence = "evidence" if setting == "evidence" else None
            watch.optimizer = HessianFree(solver=solver, seed=seed, weight_decay=evidence, **parts, **averages)
            model = HFModel(network)
            model.compile(watch.optimizer, problem.loss)
            model.fit(cases.x_train, cases.y_train, epochs=10**6, callbacks=[watch], verbose=0)
    names = ("update", "seconds", "train_error", "test_error", "averaged_train_error", "averaged_test_error")
    return [{name: f"{row[name]:.5g}" for name in names} for row in watch.rows]


def markdown(table):
    """Returns a table, a string: of each method and decay the errors at half of the time and at the end, and the least test error."""
    lines = [
        "| problem | method | setting | decay | half: train, test | end: train, test | averages: train, test | least test, after s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = ("problem", "method", "setting", "decay")
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in table):
        of_key = [row for row in table if tuple(row[name] for name in names) == key]
        runs = [[row for row in of_key if row["seed"] == seed] for seed in dict.fromkeys(row["seed"] for row in of_key)]
        cells = [
            ", ".join(_median(runs, pick, name) for name in pair)
            for pick, pair in (
                (_half, ("train_error", "test_error")),
                (_end, ("train_error", "test_error")),
                (_end, ("averaged_train_error", "averaged_test_error")),
                (_least, ("test_error", "seconds")),
            )
        ]
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines)


def _median(runs, pick, name):
    return f"{np.median([float(pick(run)[name]) for run in runs]):.3g}"


def _half(run):
    return next(row for row in run if 2 * float(row["seconds"]) >= float(run[-1]["seconds"]))


def _end(run):
    return run[-1]


def _least(run):
    return min(run, key=lambda row: float(row["test_error"]))


if __name__ == "__main__":
    main()
