"""Recurrent networks on problems with long-term dependencies: Hessian-free with and without structural damping, exact steps, first-order methods.

Run from the root of the repository:

    python -m examples.recurrent --problem memory-5 --length 50
    python -m examples.recurrent --problem addition --length 100 --methods hf hf-plain adam lstm --seconds 1800
    python -m examples.recurrent --problem addition --length 100 --methods
    python -m examples.recurrent --problem memory-5 --length 200 --methods hf --float64

`examples/recurrent_problems.py` holds the problems. Every update has fresh sequences; of `memory-5` all 32. Methods:

| method | network | update |
| --- | --- | --- |
| `hf` | `SimpleRNN` of tanh units | `HessianFree` with `StructuralDamping`, on `--cases` sequences, curvature on `--curvature-cases` of them |
| `hf-plain` | the same, from the same weights | without it |
| `exact` | the same, from the same weights | `HessianFree(solver=DirectSolver(order=1))`, on sequences with `--rows` outputs, at least 250 of them |
| `adam`, `sgd`, `nag` | the same, from the same weights | Adam and SGD, gradients clipped to norm 1; NAG as in Sutskever et al. (2013) |
| `lstm`, `gru` | of as many units, Keras' initial weights | Adam, gradients clipped to norm 1 |

First-order methods run once for each of `--rates`. `exact` is for problems with one output after the last step, and left out of the others. The
network has no biases, a trained first state, 15 connections into every unit, and a recurrent kernel of spectral radius 1.1. `--float64` is for
sequences so long that rounding decides the loss; names of its runs end in `-float64`.

A run ends when it has solved the problem (less than 1 % of 10,000 fresh sequences wrong; 1,000 are looked at until so few of these are), when the
time is up, or on `memory-5` when it has converged to rounding. It writes `PROBLEM-LENGTH/METHOD-seedSEED.csv` as it goes. The clock stands still
while errors are measured, and while the update is traced. All files of the problem and seed, those of earlier runs too, are tabled and drawn.
"""

import argparse
import math
from pathlib import Path

import keras
import matplotlib
import numpy as np
import tensorflow as tf

from examples import origins
from examples.baselines import NesterovMomentum, Recorder
from examples.precision import precision
from examples.recurrent_problems import PROBLEMS
from examples.tables import read_rows
from keras_hf import (
    ConjugateGradient,
    DirectSolver,
    HessianFree,
    HFModel,
    Identity,
    InitialState,
    LevenbergMarquardt,
    RelativeProgress,
    SparseNormal,
    StructuralDamping,
)

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

METHODS = ("hf", "hf-plain", "exact", "adam", "lstm", "gru", "sgd", "nag")
RESULTS = Path("runs", "recurrent")
HF_LOGS = "damping", "reduction_ratio", "cg_iterations", "step_size", "total_cg_iterations"
LABELS = {
    "hf": "Hessian-free (keras_hf)",
    "hf-plain": "the same without structural damping",
    "exact": "exact steps (keras_hf)",
    "adam": "Adam",
    "lstm": "an LSTM by Adam",
    "gru": "a GRU by Adam",
    "sgd": "SGD",
    "nag": "Nesterov momentum",
}
LOGS = {"hf": HF_LOGS, "hf-plain": HF_LOGS, "exact": ("damping", "reduction_ratio", "arc_step", "step_size")}
# Sequences in an update of a first-order method: those of Sutskever et al. (2013), and of Pascanu et al. (2013) for SGD.
BATCH_SIZES = {"adam": 100, "lstm": 100, "gru": 100, "sgd": 20, "nag": 100}
# Sequences of an exact step, at least: 125 say too little of the others.
FEWEST = 250
# The work between calls would otherwise be longer than a step of a small network.
STEPS_PER_EXECUTION = 10
NUM_TEST, NUM_LOOKED_AT, SOLVED = 10_000, 1000, 0.01
NUM_ROWS = 100


def main(arguments=None):
    """Trains with each method, prints a table and draws the figure.

    Args:
        arguments: List of strings, as on the command line; None takes those.

    Returns:
        Dict from the labels of the runs to what each reached, the last row of its file.
    """
    args = parse(arguments)
    folder = args.results / f"{args.problem}-{args.length}"
    folder.mkdir(parents=True, exist_ok=True)
    has_many_rows = PROBLEMS[args.problem](args.length).every_step
    for method in args.methods:
        if method == "exact" and has_many_rows:
            print(
                f"\n{args.problem}, T = {args.length}, exact: left out, since outputs of all steps are too many rows",
                flush=True,
            )
            continue
        for rate in [None] if method in LOGS else args.rates:
            name = (method if rate is None else f"{method}-{rate:g}") + ("-float64" if args.float64 else "")
            print(f"\n{args.problem}, T = {args.length}, {name}: at most {args.seconds:g} seconds", flush=True)
            path = folder / f"{name}-seed{args.seed}.csv"
            with precision("float64" if args.float64 else "float32"):
                train(args, method, rate, path)
            origins.note(path)
    runs = {path.stem.removesuffix(f"-seed{args.seed}"): path for path in sorted(folder.glob(f"*-seed{args.seed}.csv"))}
    print_table(runs)
    path = folder / f"seed{args.seed}.png"
    plot(f"{args.problem}, T = {args.length}", runs, path)
    print(f"\nFigure: {path}")
    return {label(name): read_rows(file)[-1] for name, file in runs.items()}


def parse(arguments):
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=PROBLEMS, default="memory-5")
    parser.add_argument("--length", type=int, default=50, help="T, the steps to be bridged")
    parser.add_argument("--methods", choices=METHODS, nargs="*", default=METHODS, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--seconds", type=float, default=600.0, help="of training, at most, for each method and rate")
    parser.add_argument("--updates", type=int, default=10**9, help="after which training ends even earlier")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sequences")
    parser.add_argument("--float64", action="store_true", help="compute in float64")
    parser.add_argument("--units", type=int, default=100)
    parser.add_argument("--cases", type=int, default=2000, help="sequences of a Hessian-free update")
    # Iterations and weight are those of the released code of 2011, which has 10,000 sequences, and 1,000 for products.
    parser.add_argument("--curvature-cases", type=int, default=300, help="those of them for products")
    parser.add_argument("--rows", type=int, default=1000, help="outputs of an update of exact steps")
    parser.add_argument("--iterations", type=int, default=300, help="of CG in an update, at most")
    parser.add_argument("--weight", type=float, default=0.03, help="of structural damping")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3], help="learning rates of first-order methods")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder; default: {RESULTS}")
    return parser.parse_args(arguments)


def train(args, method, rate, path):
    """Trains a network by a method until the problem is solved or the time is up.

    Args:
        args: What `parse` returns.
        method: String, one of `METHODS`.
        rate: Float, the learning rate; None for second-order methods.
        path: Path of the CSV file.

    Returns:
        The `SolvedRecorder`.
    """
    problem = PROBLEMS[args.problem](args.length)
    is_second_order = method in LOGS
    num_cases = {
        "hf": args.cases,
        "hf-plain": args.cases,
        "exact": max(args.rows // problem.num_outputs, FEWEST),
        **BATCH_SIZES,
    }
    stream, shape = sequences(problem, num_cases[method], args.seed)
    data = {"x": stream}
    cell = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU}.get(method)
    network = build_network(problem, shape, args.units, args.seed, cell)
    recorder = SolvedRecorder(problem, network, path, args.seconds, args.updates, args.seed, LOGS.get(method, ()))
    if is_second_order:
        model = HFModel(network)
        model.compile(second_order(args, method), problem.loss)
        callbacks = [LevenbergMarquardt(), recorder]
        if problem.all_cases is not None:
            # As arrays: `HFModel` takes a stream of so few cases for a mistake.
            data = dict(zip("xy", problem.all_cases, strict=True), batch_size=len(problem.all_cases[0]))
    else:
        model = network
        optimizer = first_order(method, rate)
        model.compile(optimizer, problem.loss, steps_per_execution=STEPS_PER_EXECUTION)
        recorder.begin(network.variables)

        def after_steps(batch, logs):
            network.stop_training = recorder.after_update(int(optimizer.iterations), logs)

        callbacks = [keras.callbacks.LambdaCallback(on_train_batch_end=after_steps)]
    model.fit(**data, steps_per_epoch=1000, epochs=10**9, shuffle=False, callbacks=callbacks, verbose=0)
    return recorder


def second_order(args, method):
    """Returns the `HessianFree` of a method."""
    if method == "exact":
        return HessianFree(solver=DirectSolver(order=1), growing_batch=None, seed=args.seed)
    solver = ConjugateGradient(
        preconditioner=Identity(),
        stopping=RelativeProgress(tolerance=1e-3),
        max_iterations=args.iterations,
        warm_start_decay=0.9,
    )
    return HessianFree(
        solver=solver,
        growing_batch=None,
        curvature_batch_size=args.curvature_cases,
        structural_damping=StructuralDamping(args.weight) if method == "hf" else None,
        seed=args.seed,
    )


def first_order(method, rate):
    """Returns the Keras optimizer of a first-order method."""
    if method == "nag":
        return NesterovMomentum(rate, max_momentum=0.995)
    return (keras.optimizers.SGD if method == "sgd" else keras.optimizers.Adam)(rate, clipnorm=1.0)


def sequences(problem, num_cases, seed):
    """Returns a stream of batches, and the shape of a sequence: all of a problem's sequences again and again, or so many fresh ones.

    Args:
        problem: A `recurrent_problems.Problem`.
        num_cases: Integer, of a batch.
        seed: Integer.
    """
    if problem.all_cases is not None:
        return tf.data.Dataset.from_tensors(problem.all_cases).repeat(), problem.all_cases[0].shape[1:]
    example = problem.draw(num_cases, np.random.default_rng(0))
    signature = tuple(tf.TensorSpec(part.shape, part.dtype) for part in example)

    def batches():
        rng = np.random.default_rng([seed, 1])
        while True:
            yield problem.draw(num_cases, rng)

    return tf.data.Dataset.from_generator(batches, output_signature=signature).prefetch(1), example[0].shape[1:]


def build_network(problem, shape, units=100, seed=0, cell=None, unroll=False):
    """Makes the network of a problem.

    Args:
        problem: A `recurrent_problems.Problem`.
        shape: Tuple of integers `(steps, inputs)`.
        units: Integer, of the recurrent layer.
        seed: Integer, of the weights.
        cell: Class of a recurrent layer, with Keras' initial weights; None gives the `SimpleRNN` of Hessian-free.
        unroll: Whether the recurrent layer is unrolled.

    Returns:
        A Keras model.
    """
    inputs = keras.Input(shape)
    keras.utils.set_random_seed(seed)
    if cell is not None:
        hidden = cell(units, return_sequences=problem.every_step)(inputs)
        return keras.Model(inputs, keras.layers.Dense(problem.num_outputs, problem.activation)(hidden))
    # As in the released code of 2011: 15 connections of variance 1/15, those of the inputs a quarter of that size.
    penalty, deviation = keras.regularizers.L2(1e-5), 15**-0.5
    layer = keras.layers.SimpleRNN(
        units,
        use_bias=False,
        kernel_initializer=SparseNormal(stddev=0.25 * deviation, seed=3 * seed),
        recurrent_initializer=SparseNormal(spectral_radius=1.1, seed=3 * seed + 1),
        kernel_regularizer=penalty,
        recurrent_regularizer=penalty,
        return_sequences=problem.every_step,
        unroll=unroll,
    )
    hidden = layer(inputs, initial_state=InitialState(units)(inputs))
    output = keras.layers.Dense(
        problem.num_outputs,
        problem.activation,
        use_bias=False,
        kernel_initializer=SparseNormal(stddev=deviation, seed=3 * seed + 2),
        kernel_regularizer=penalty,
    )
    return keras.Model(inputs, output(hidden))


class SolvedRecorder(Recorder):
    """Records what share of fresh sequences is wrong against time, and ends training when the problem is solved or the time is up.

    Args:
        problem: A `recurrent_problems.Problem`.
        network: Keras model, the one that is trained.
        path: Path of the CSV file.
        max_seconds: Float, the time of training.
        max_updates: Integer, the updates after which training ends even if time is left.
        seed: Integer, of the test sequences; training has others.
        log_names: Strings, training logs to put into each row.
    """

    def __init__(self, problem, network, path, max_seconds, max_updates, seed=0, log_names=()):
        super().__init__(network, None, None, path, max_seconds, max_updates, max_seconds / NUM_ROWS, log_names)
        self._problem, self._total_iterations = problem, 0
        drawn = problem.all_cases or problem.draw(NUM_TEST, np.random.default_rng([seed, 2]))
        self._x, self._y = drawn

    def totals(self, logs):
        self._total_iterations += int(logs.get("cg_iterations", 0))
        return {"total_cg_iterations": self._total_iterations}

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        # Where sequences are always the same: fresh ones go on with a run that has converged.
        if logs["converged"] and self._problem.all_cases is not None:
            self.finish(int(self.model.optimizer.iterations), {**logs, **self.totals({})})
            self.model.stop_training = True

    def errors(self):
        y_pred = self._predict(slice(NUM_LOOKED_AT))
        y = self._y[:NUM_LOOKED_AT]
        wrong = self._problem.is_wrong(y, y_pred)
        if wrong.mean() < SOLVED and len(self._y) > NUM_LOOKED_AT:
            rest = slice(NUM_LOOKED_AT, None)
            wrong = np.concatenate([wrong, self._problem.is_wrong(self._y[rest], self._predict(rest))])
        self.is_over |= bool(wrong.mean() < SOLVED)
        loss = keras.ops.mean(keras.losses.get(self._problem.loss)(y, y_pred))
        return {"loss": float(loss), "wrong": float(wrong.mean())}

    def _predict(self, cases):
        return np.concatenate([self.network.predict_on_batch(part) for part in _parts(self._x[cases], 1000)])


def _parts(array, size):
    return [array[start : start + size] for start in range(0, len(array), size)]


def print_table(runs):
    """Prints what each run reached, as Markdown.

    Args:
        runs: Dict from names to paths of CSV files.
    """
    print("\n| method | seconds | updates | loss | wrong |\n| --- | --- | --- | --- | --- |")
    for name, path in runs.items():
        row = read_rows(path)[-1]
        cells = f"{row['seconds']:.0f}", f"{row['update']:.0f}", f"{row['loss']:.3g}", f"{100 * row['wrong']:.3g} %"
        print(f"| {' | '.join([name, *cells])} |")


def label(name):
    """Returns the name of a run, `METHOD-RATE-float64`, as a figure says it."""
    method = max((method for method in METHODS if name.startswith(method)), key=len)
    rate = name.removeprefix(method).removesuffix("-float64").strip("-")
    parts = LABELS[method], f"rate {rate}" if rate else "", "float64" if name.endswith("-float64") else ""
    return ", ".join(filter(None, parts))


def plot(title, runs, path):
    """Draws loss and share of wrong sequences of every run against time.

    Args:
        title: String.
        runs: Dict from names to paths of CSV files.
        path: Path of the PNG file.
    """
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, file in runs.items():
        rows = read_rows(file)
        seconds = [row["seconds"] for row in rows]
        for axes, column in zip(panels, ("loss", "wrong"), strict=True):
            axes.plot(seconds, [row[column] if math.isfinite(row[column]) else None for row in rows], label=label(name))
    panels[0].set(title=f"{title}: loss", xlabel="seconds of training", yscale="log")
    panels[1].set(title="share of sequences that are wrong", xlabel="seconds of training", ylim=(-0.02, 1.02))
    panels[1].axhline(SOLVED, color="black", linewidth=0.5)
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[1].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
