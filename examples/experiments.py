"""The experiments of Martens (2010) on deep autoencoders: starts, methods and penalties on three data sets, in one table.

A run trains the full network of a data set (`examples/autoencoder.py`) from sparse random weights or from pretrained
ones (`examples/pretraining.py`), by one method, for a given time. Run from the root of the repository:

    python -m examples.experiments run --dataset mnist --row rand-hf pt-ncg pt-hf --l2 0 2e-5 --seconds 600
    python -m examples.experiments table --dataset mnist

A run writes DATASET/ROW-l2-L2-seedSEED.csv as it goes, and about once a minute its state: the same command goes on with
what was cut short, makes no run again whose time is over, and with more `--seconds` goes on with those that are. `table`
prints training and test error of each run where the test error was least, as the paper chose, and at the end, and draws
errors against time and cost. Where some runs are longer than others, `table --seconds 300` compares all at one time, and
`table --cost 500` at one cost.
"""

import argparse
import itertools
import math
import time
from pathlib import Path

import keras
import matplotlib
import numpy as np

from examples.autoencoder import SETTINGS, build_autoencoder, load_images, parse, train
from examples.pretraining import pretrained
from examples.tables import read_rows

matplotlib.use("Agg")
from matplotlib import pyplot, ticker  # noqa: E402

RESULTS = Path("runs", "experiments")
PRETRAINING_EPOCHS = {"curves": 20, "mnist": 10, "faces": 5}
# A row's method, and whether it starts from pretrained weights.
ROWS = {
    "rand-hf": ("hf", False),
    "rand-recipe": ("recipe", False),
    "rand-ncg": ("ncg", False),
    "rand-lbfgs": ("lbfgs", False),
    "pt-ncg": ("ncg", True),
    "pt-hf": ("hf", True),
    "pt-nag": ("nag", True),
    "nag": ("nag", False),
    "sgd": ("sgd", False),
}
# Options of the example, by data set and method: the best of the grids in `benchmarks/time_to_error.py` or, of faces and of
# plain descent, the best after 45 seconds of rates in factors of three (docs/experiments.md).
OPTIONS = {
    ("curves", "hf"): "--damping 4.5",
    ("curves", "nag"): "--learning-rate 1e-2",
    ("curves", "sgd"): "--learning-rate 1e-1",
    ("mnist", "hf"): "--damping 45",
    ("mnist", "nag"): "--learning-rate 1e-2",
    ("mnist", "sgd"): "--learning-rate 3e-2",
    ("faces", "hf"): "--damping 45",
    ("faces", "nag"): "--learning-rate 1e-3",
    ("faces", "sgd"): "--learning-rate 1e-3",
}
# Seconds of training between two rows: errors on all cases take up to half a minute.
INTERVALS = {"curves": 10.0, "mnist": 25.0, "faces": 60.0}
# Training and test error where the test error is least, and training error in the end, Martens' talk; of curves there is none,
# for these are others. With the penalty and without.
PUBLISHED = {
    ("mnist", "pt-ncg", False): (2.31, 2.72, math.nan),
    ("mnist", "rand-hf", False): (1.64, 2.78, 1.4),
    ("mnist", "pt-hf", False): (1.63, 2.46, math.nan),
    ("mnist", "pt-ncg", True): (2.07, 2.61, math.nan),
    ("mnist", "rand-hf", True): (1.75, 2.55, math.nan),
    ("mnist", "pt-hf", True): (1.60, 2.28, math.nan),
    ("faces", "pt-ncg", False): (math.nan, 124, math.nan),
    ("faces", "rand-hf", False): (55.4, 139, 12.9),
    ("faces", "rand-hf", True): (60.6, 122, math.nan),
}


def run(args, row, l2, seed):
    """Trains once, unless its time is over: goes on with what was cut short.

    Args:
        args: The command line's options.
        row: String, one of `ROWS`.
        l2: Float c of the penalty `c/2 ||w||^2`.
        seed: Integer, of images, weights and batches.

    Returns:
        Path of the CSV file.
    """
    method, starts_pretrained = ROWS[row]
    path = args.out / args.dataset / f"{row}-l2-{l2:g}-seed{seed}.csv"
    if path.exists() and read_rows(path)[-1]["seconds"] >= args.seconds:
        return path
    options = parse(
        f"--dataset {args.dataset} --size full --l2 {l2} --seed {seed} --seconds {args.seconds}"
        f" --interval {INTERVALS[args.dataset]} {OPTIONS.get((args.dataset, method), '')} {args.options}".split()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    x_train, x_test = load_images(options)
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    setting = options.setting
    network = build_autoencoder(setting.widths, l2, seed, True, setting.num_pixels, setting.is_real)
    if starts_pretrained:
        network.set_weights(pretrained_weights(args, network, x_train, seed))
    train(options, method, network, x_train, x_test, path, path.with_suffix(".npz"))
    return path


def pretrained_weights(args, network, x, seed):
    """Returns the weights of pretraining, a list of arrays: those of an earlier run, or else new ones, with a line on them in a file."""
    epochs = PRETRAINING_EPOCHS[args.dataset]
    path = args.out / args.dataset / f"pretrained-{epochs}-seed{seed}.npz"
    if not path.exists():
        start = time.perf_counter()
        weights = pretrained(network, x, epochs, seed).get_weights()
        seconds = time.perf_counter() - start
        np.savez(path, *weights)
        path.with_suffix(".txt").write_text(f"{epochs} epochs for each layer took {seconds:.0f} seconds\n")
    with np.load(path) as arrays:
        return [arrays[name] for name in arrays.files]


def all_runs(folder):
    """Returns the runs of a data set, cut short or not: dict from (row, l2, seed) to the CSV file's rows."""
    runs = {}
    for path in sorted(folder.glob("*-seed*.csv")):
        row, _, rest = path.stem.rpartition("-l2-")
        l2, _, seed = rest.rpartition("-seed")
        runs[row, float(l2), int(seed)] = read_rows(path)
    order = list(ROWS)
    return dict(sorted(runs.items(), key=lambda item: (item[0][1], order.index(item[0][0]), item[0][2])))


def within(rows, seconds, cost):
    """Returns a run's rows of so much training at most: the first one, of the start, always is."""
    return [row for row in rows if row["seconds"] <= seconds and row["cost"] <= cost]


def summary(rows):
    """Returns what a run came to: the row of least test error and the last one."""
    return min(rows, key=lambda row: row["test_error"]), rows[-1]


def print_table(dataset, runs):
    """Prints a row for each run, as Markdown, with what is published of it.

    Args:
        dataset: String.
        runs: Dict from (row, l2, seed) to the CSV file's rows.
    """
    print("| start and method | L2 | seed | seconds | cost | best: train, test | end: train, test | published |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (row, l2, seed), rows in runs.items():
        best, end = summary(rows)
        errors = [f"{at['train_error']:.4g}, {at['test_error']:.4g}" for at in (best, end)]
        published = PUBLISHED.get((dataset, row, l2 > 0), ())
        numbers = ", ".join("-" if math.isnan(number) else f"{number:g}" for number in published)
        cells = (row, f"{l2:g}", seed, f"{end['seconds']:.0f}", f"{end['cost']:,.0f}", *errors, numbers)
        print(f"| {' | '.join(map(str, cells))} |")


def plot(curves, path, measure="squared error per case", targets=()):
    """Draws errors against time and against cost, test errors dotted.

    Args:
        curves: List of pairs of a name and a run's rows, dicts with `seconds`, `cost`, `train_error` and `test_error`. Runs
            of one name have one colour. The first row, the start, is left out.
        path: Path of the PNG file.
        measure: String, what the errors are.
        targets: Tuple of floats, errors to mark.
    """
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    lines, names = {}, list(dict.fromkeys(name for name, _ in curves))
    for name, rows in curves:
        place = names.index(name)
        color = pyplot.get_cmap("tab20")(2 * place % 20 + place // 10)  # Pale ones, which are every second, last.
        for axes, abscissa in zip(panels, ("seconds", "cost"), strict=True):
            later = rows[1:]  # The start is ten or a hundred times as high as what there is to see.
            at = [row[abscissa] for row in later]
            (lines[name],) = axes.semilogy(at, [row["train_error"] for row in later], color=color)
            axes.semilogy(at, [row["test_error"] for row in later], color=color, linestyle=":", linewidth=1)
    for axes in panels:
        for target in targets:
            axes.axhline(target, color="gray", linewidth=0.5, zorder=0)
        axes.grid(alpha=0.3)
        axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    panels[0].set(xlabel="seconds of training", ylabel=measure, title="training (lines) and test (dotted)")
    panels[1].set(xlabel="cost in gradients of the training set", xscale="log")
    figure.legend(lines.values(), lines, loc="outside right center")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments=None):
    """Runs, or prints the table.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running, table = commands.add_parser("run"), commands.add_parser("table")
    for command in (running, table):
        command.add_argument("--dataset", choices={dataset for dataset, _ in SETTINGS}, required=True)
        command.add_argument("--out", type=Path, default=RESULTS, help=f"folder; default: {RESULTS}")
    running.add_argument("--row", choices=ROWS, nargs="+", required=True)
    running.add_argument("--l2", type=float, nargs="+", default=[0.0])
    running.add_argument("--seed", type=int, nargs="+", default=[0])
    running.add_argument("--seconds", type=float, required=True, help="of training, for each run")
    running.add_argument("--options", default="", help="more of the example's options, in quotes")
    table.add_argument("--seconds", type=float, default=math.inf, help="of training, that count; default: all")
    table.add_argument("--cost", type=float, default=math.inf, help="in gradients, that counts; default: all")
    args = parser.parse_args(arguments)
    if args.command == "run":
        for row, l2, seed in itertools.product(args.row, args.l2, args.seed):
            print(f"\n{args.dataset} {row} l2 {l2:g} seed {seed}", flush=True)
            best, end = summary(read_rows(run(args, row, l2, seed)))
            print(f"best {best['train_error']:.4f} {best['test_error']:.4f} end {end['train_error']:.4f}", flush=True)
    else:
        runs = all_runs(args.out / args.dataset)
        print_table(args.dataset, {run: within(rows, args.seconds, args.cost) for run, rows in runs.items()})
        curves = [(f"{row}{'*' if l2 else ''}", rows) for (row, l2, _), rows in runs.items()]
        plot(curves, args.out / f"{args.dataset}.png")


if __name__ == "__main__":
    main()
