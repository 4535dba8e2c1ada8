"""Writes the tables of README.md and of the pages in docs that are made from `benchmarks/results`.

    python -m benchmarks.tables

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; what is between is replaced. `make tables` calls this; a test holds that
nothing changes when it is called.
"""

import functools
import re
from pathlib import Path

import numpy as np

from benchmarks import rows as results
from benchmarks.validation import chosen
from examples.recurrent import SOLVED

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def main():
    """Writes every table, and says which files changed."""
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(path.relative_to(ROOT))


def filled(text):
    """Returns a page with its tables as they follow from the files."""
    return _BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}\n{block[3]}", text)


def table(header, rows):
    """Returns a table in Markdown of lists of strings."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(name):
    """Returns the rows of a file of results, dicts of strings."""
    return results.read(RESULTS / name)


@functools.cache
def runs(name):
    """Returns the runs in a file of results: dict from (problem, method, seed) to rows."""
    return results.read_runs(RESULTS / name)


def number(value):
    """Returns a number with two digits, as it is written in tables."""
    value = float(value)
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}" if abs(value) >= 100 else f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


# The demo's acts.


def demo_poisson():
    """Act 1: updates, loss and error of each method."""
    names = {
        "Hessian-free, `DirectSolver`": "hf",
        "L-BFGS (SciPy)": "lbfgs",
        "Adam, rate 0.1 with cosine decay": "adam-0.1",
    }
    rows = []
    for name, stem in names.items():
        last = runs("demo.csv")["poisson", stem, "0"][-1]
        rows.append([name, f"{int(float(last['update'])):,}", number(last["loss"]), number(last["error"])])
    return table(
        ["Poisson's equation by a physics-informed network, 15 s", "updates", "loss", "relative L2 error"], rows
    )


def demo_memory():
    """Act 2: seconds, updates, loss and the share that is wrong."""
    names = {
        "Hessian-free, structural damping": "hf",
        "Adam, rate 3e-4": "adam-0.0003",
        "a GRU by Adam, rate 1e-2": "gru-0.01",
    }
    rows = []
    for name, stem in names.items():
        last = runs("demo.csv")["recurrent/memory-5-100", stem, "0"][-1]
        wrong = f"{100 * float(last['wrong']):.0f} %"
        rows.append(
            [name, f"{float(last['seconds']):.0f}", f"{int(float(last['update'])):,}", number(last["loss"]), wrong]
        )
    return table(["five bits kept for 100 steps, 30 s at most", "seconds", "updates", "loss", "wrong"], rows)


def demo_autoencoder():
    """Act 3: updates and both errors."""
    names = {"Hessian-free, defaults": "hf", "Adam, rate 1e-2 with cosine decay": "adam", "Nesterov momentum": "nag"}
    rows = []
    for name, stem in names.items():
        last = runs("demo.csv")["autoencoder", stem, ""][-1]
        errors = [f"{float(last[column]):.2f}" for column in ("train_error", "test_error")]
        rows.append([name, f"{int(float(last['update'])):,}", *errors])
    return table(["deep autoencoder of 10,000 synthetic curves, 20 s", "updates", "training error", "test error"], rows)


# What the package is for, one line each.


def problems():
    """Problem, what to write, one number beside the best other method."""
    equation = {stem: runs("demo.csv")["poisson", stem, "0"][-1] for stem in ("hf", "lbfgs")}
    curve = {stem: runs("peers_fits.csv")["sinc", stem, "0"][-1] for stem in ("keras_hf", *_OTHERS)}
    best = min(_OTHERS, key=lambda stem: float(curve[stem]["error"]))
    nist = {
        method: sum(float(row["digits"]) >= 6 for row in read("nist.csv") if row["method"] == method)
        for method in ("direct", "curve_fit")
    }
    num_fits = sum(row["method"] == "direct" for row in read("nist.csv"))
    classifier = {
        row["solver"]: row["seconds_to_0.1"]
        for row in read("classifier_solvers.csv")
        if (row["network"], row["cases"]) == ("convolutions", "60000")
    }
    memory = [(run[1], rows[-1]) for run, rows in runs("recurrent.csv").items() if run[0] == "addition-100"]
    exact = sorted(
        float(last["seconds"]) for method, last in memory if method == "exact" and float(last["wrong"]) < SOLVED
    )
    others = min(float(last["wrong"]) for method, last in memory if method in _FIRST_ORDER)
    rows = [
        [
            "a [physics-informed network](docs/physics-informed.md)",
            "`HessianFree()` in float64",
            f"Poisson's equation, error after 15 s: {number(equation['hf']['error'])}; L-BFGS {number(equation['lbfgs']['error'])}",
        ],
        [
            "a [curve, a surrogate](docs/regression.md)",
            "the same",
            f"sin(10 x) / (10 x), error after {float(curve['keras_hf']['seconds']):.0f} s: {number(curve['keras_hf']['error'])}; "
            f"{_OTHERS[best]} {number(curve[best]['error'])}",
        ],
        [
            "a [formula](docs/regression.md#a-formula) with parameters",
            "the same",
            f"NIST's certified problems, six digits: {nist['direct']} of {num_fits}; `curve_fit` {nist['curve_fit']}",
        ],
        [
            "[error bars](docs/error-bars.md) of a fit to noisy data",
            '`HessianFree(weight_decay="evidence")`, `model.laplace(x, y)`',
            _intervals(),
        ],
        [
            "a [recurrent network](docs/recurrent.md) that must remember",
            "`HessianFree(solver=DirectSolver(order=1), growing_batch=None)`",
            f"addition over 100 steps, {len(exact)} starts: solved after {exact[0]:.0f} to {exact[-1]:.0f} s; by Adam, an LSTM or a GRU "
            f"{100 * others:.0f} % wrong after 300 s",
        ],
        [
            "a [classifier](docs/which-solver.md#classifiers)",
            "`HessianFree()`",
            f"MNIST by convolutions, cross-entropy 0.1: {classifier['momentum']} s; Adam {classifier['adam']} s",
        ],
    ]
    return table(["your problem", "write", "measured"], rows)


_FIRST_ORDER = ("adam-0.001", "lstm-0.001", "gru-0.001", "adam-0.0001", "lstm-0.01", "gru-0.01")
_OTHERS = {
    "ssbroyden": "ssbroyden-optimistix",
    "optimistix-lm": "optimistix",
    "jaxopt-lm-cholesky": "jaxopt",
    "jaxopt-lm-qr": "jaxopt",
    "scipy-trf": "SciPy",
    "scipy-lbfgs": "SciPy's L-BFGS",
    "torch-lbfgs": "PyTorch's L-BFGS",
}


def _intervals():
    fits = read("error_bars.csv")
    shares = [float(row["observations_within"]) for row in fits]
    return f"95 % intervals hold {100 * np.mean(shares):.0f} % of new observations, the mean of {len(fits)} fits"


def nist():
    """How many fits of NIST's problems agree to six digits, and their deviations to four, by difficulty."""
    rows = []
    for method, name in (("direct", "`DirectSolver`"), ("curve_fit", "SciPy's `curve_fit`")):
        fits = [row for row in read("nist.csv") if row["method"] == method]
        six = sum(float(row["digits"]) >= 6 for row in fits)
        four = sum(float(row["digits_of_deviations"]) >= 4 for row in fits)
        median = np.median([float(row["digits"]) for row in fits])
        seconds = np.median([float(row["cpu_seconds"]) for row in fits])
        rows.append([name, f"{six} of {len(fits)}", f"{four}", f"{median:.1f}", f"{seconds:.2g}"])
    header = ["method", "parameters to six digits", "deviations to four", "median digits", "median CPU seconds"]
    return table(header, rows)


def mgh():
    """How many of the problems of Moré, Garbow and Hillstrom end at a published sum of squares, from either start."""
    rows = []
    for method, name in (("direct", "`HessianFree()`"), ("lm", "SciPy's `lm`, the paper's MINPACK")):
        fits = [row for row in read("mgh.csv") if row["method"] == method]
        ends = [[row for row in fits if row["scale"] == scale] for scale in ("1", "10")]
        counts = [
            f"{sum(row['solved'] == '1' for row in rows)} of {len(rows)}, {sum(row['least'] == '1' for row in rows)}"
            for rows in ends
        ]
        rows.append([name, *counts])
    return table(["method", "from the start: solved, the least", "from ten times it"], rows)


def outliers():
    """The error of formulas fitted to data with outliers, the mean over seeds."""
    fits = [row for row in read("least_squares.csv") if row["question"] == "outliers"]
    names = list(dict.fromkeys(row["problem"] for row in fits))
    rows = []
    for method in dict.fromkeys(row["method"] for row in fits):
        errors = [
            np.mean([float(row["error"]) for row in fits if (row["method"], row["problem"]) == (method, name)])
            for name in names
        ]
        rows.append([method, *(f"{error:.3f}" for error in errors)])
    return table(["method, loss", *names], rows)


def bounds():
    """How far losses within bounds lie above the least found, the worst over seeds, and the evaluations of the Jacobian."""
    fits = [row for row in read("least_squares.csv") if row["question"] == "bounds"]
    names = list(dict.fromkeys(row["problem"] for row in fits))
    rows = []
    for method in dict.fromkeys(row["method"] for row in fits):
        cells = []
        for name in names:
            of_name = [row for row in fits if (row["method"], row["problem"]) == (method, name)]
            excess = max(float(row["excess"]) for row in of_name)
            count = np.median([float(row["updates"]) for row in of_name])
            # Less than what the mean of some hundred squares is rounded by.
            cells.append(f"{'0' if excess < 1e-13 else number(excess)} ({count:.0f})")
        rows.append([method, *cells])
    return table(["method", *names], rows)


def error_bars():
    """Shares within the intervals, the mean over seeds."""
    fits = read("error_bars.csv")
    rows = []
    for name in dict.fromkeys(row["problem"] for row in fits):
        of_name = [row for row in fits if row["problem"] == name]
        mean = {
            column: np.mean([float(row[column]) for row in of_name]) for column in of_name[0] if column != "problem"
        }
        rows.append(
            [
                name,
                f"{100 * mean['observations_within']:.0f} %",
                f"{100 * mean['function_within']:.0f} %",
                f"{mean['noise_found']:.3f} ({mean['noise']:g})",
                f"{mean['num_effective']:.0f}",
            ]
        )
    header = ["function", "new observations within", "function within", "noise found (true)", "weights determined"]
    return table(header, rows)


def observed():
    """Shares within the intervals and the noise found, the mean over seeds, of data that are not all observed alike."""
    fits = read("observed.csv")
    truth = {"masked sequences": "0.2", "weights": "1", "two columns": "0.05, 0.5"}
    rows = []
    for name in dict.fromkeys(row["problem"] for row in fits):
        of_name = [row for row in fits if row["problem"] == name]
        # Of each column, where there are several.
        mean = lambda column: np.mean([[float(part) for part in row[column].split()] for row in of_name], 0)  # noqa: E731, B023
        percent = lambda column: ", ".join(f"{100 * share:.0f} %" for share in mean(column))  # noqa: E731, B023
        noise = ", ".join(f"{value:.3f}" for value in mean("noise_found"))
        rows.append(
            [
                name,
                percent("observations_within"),
                percent("function_within"),
                f"{noise} ({truth[name]})" if name in truth else "",
                f"{mean('num_effective')[0]:.0f}",
            ]
        )
    header = ["data", "new observations within", "function within", "noise found (true)", "weights determined"]
    return table(header, rows)


def _validation(dataset):
    """Returns label -> the test loss of the model kept by early stopping, and that at the end, medians over seeds."""
    found = {}
    for _, label, runs in chosen([row for row in _validations() if row["dataset"] == dataset]):
        losses = [
            [next(float(row["test"]) for row in run if row["event"] == event) for event in ("kept", "end")]
            for run in runs
        ]
        found[label] = np.median(losses, 0)
    return found


@functools.cache
def _validations():
    return read("validation.csv")


def validation():
    """Test losses of the model kept and of the last, by data set and method."""
    labels = {
        "`HessianFree()`": "`HessianFree()`",
        'with `weight_decay="evidence"`': '`weight_decay="evidence"`',
        "with a decay chosen by validation": "a decay chosen by validation",
        "Adam, rate chosen by validation": "Adam, rate chosen by validation",
        "AdamW, decay chosen by validation": "AdamW, decay chosen by validation",
    }
    rows = []
    for dataset, name in _SETS.items():
        medians = _validation(dataset)
        cells = [", ".join(number(loss) for loss in medians[label]) if label in medians else "" for label in labels]
        rows.append([name, *cells])
    return table(["data", *labels.values()], rows)


_SETS = {
    "regression": "8 inputs, 4,800 noisy cases, 64-64-1",
    "tanh": "60 noisy points, 50 units",
    "digits": "6,000 digits, 784-64-10",
    "diabetes": "diabetes, 10 inputs, 265 cases, 20-20-1",
    "wine": "wine, 12 inputs, 107 cases, 20-20-1",
    "rare": "20 inputs, 4 % positive, 4,000 cases",
    "text": "sentences of seven topics",
}


def keras_examples():
    """Losses, metrics and updates of examples of Keras by `HFModel` and by Adam."""
    runs = {(row["example"], row["method"]): row for row in read("keras_examples.csv")}

    def reached(name, method):
        loss, metric = (runs[name, method][column] for column in ("val_loss", "val_metric"))
        return number(loss) if metric == loss else f"{number(loss)} ({number(metric)})"

    rows = [
        [
            name.replace("_", " "),
            *(reached(name, method) for method in ("hf", "whole", "adam")),
            *(f"{int(runs[name, method]['updates']):,}" for method in ("hf", "adam")),
            f"{float(runs[name, 'hf']['first_update_seconds']):.0f}",
        ]
        for name in dict.fromkeys(example for example, _ in runs)
    ]
    methods = "the example's batches", "all cases in one batch", "Adam"
    return table(["example", *methods, "updates in its batches", "of Adam", "first update, s"], rows)


def small_batches():
    """Losses on other cases after three epochs by the cases of a batch, mean and largest over seeds."""
    losses = {}
    for row in read("small_batches.csv"):
        losses.setdefault((row["problem"], int(row["batch"]), row["rule"]), []).append(float(row["other_3"]))
    sizes = sorted({size for _, size, _ in losses})
    rows = [
        [name if rule == "optimism" else "", label, *(_mean_and_largest(losses[problem, size, rule]) for size in sizes)]
        for problem, name in _SMALL.items()
        for rule, label in (("optimism", "default"), ("adam", "Adam"))
    ]
    return table(["problem", "", *(f"{size:,}" for size in sizes)], rows)


def _mean_and_largest(values):
    return ", ".join(f"{value:.3g}" if value >= 1 else f"{value:.3f}" for value in (np.mean(values), max(values)))


_SMALL = {
    "digits": "MNIST's digits, 784-64-10",
    "convolutions": "the same, two convolutions with BatchNormalization",
    "regression": "regression on 8 inputs, noise of variance 0.09",
    "autoencoder": "autoencoder of the digits",
}


TABLES = {
    "keras-examples": keras_examples,
    "small-batches": small_batches,
    "demo-poisson": demo_poisson,
    "demo-memory": demo_memory,
    "demo-autoencoder": demo_autoencoder,
    "problems": problems,
    "nist": nist,
    "mgh": mgh,
    "outliers": outliers,
    "bounds": bounds,
    "error-bars": error_bars,
    "observed": observed,
    "validation": validation,
}


if __name__ == "__main__":
    main()
