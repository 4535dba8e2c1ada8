"""Draws the comparisons with other libraries from the files of results that are in a folder.

    python -m benchmarks.figures benchmarks/results/peers
    python -m benchmarks.figures runs/bench

Writes `products.png`, `fits.png` and `minibatches.png` into the folder, each from the folder of that name; what is not there is not drawn.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from examples.tables import read_rows

LABELS = {
    "keras_hf": "keras_hf, DirectSolver",
    "scipy-trf": "SciPy, least_squares trf",
    "scipy-lbfgs": "SciPy, L-BFGS",
    "optimistix-lm": "optimistix, Levenberg-Marquardt",
    "jaxopt-lm-cholesky": "jaxopt, Levenberg-Marquardt, Cholesky",
    "jaxopt-lm-qr": "jaxopt, Levenberg-Marquardt, QR",
    "ssbroyden": "ssbroyden-optimistix",
    "torch-lbfgs": "PyTorch, L-BFGS",
    "hf-momentum": "keras_hf, PreconditionedMomentum",
    "kfac-jax": "kfac-jax",
    "nag": "Nesterov momentum",
}


def main(arguments=None):
    """Draws what there is.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    for name, draw in (("products", products), ("fits", fits), ("minibatches", minibatches)):
        # `make bench` names folders after modules.
        found = [path for path in (folder / name, folder / f"peers.{name}") if any(path.rglob("*.csv"))]
        if found:
            figure = draw(found[0])
            figure.savefig(folder / f"{name}.png", dpi=120)
            print(folder / f"{name}.png")


def products(folder):
    """Returns a figure of bars: products in gradients and in milliseconds, for each network and number of cases."""
    rows = [row for path in sorted(folder.glob("*.csv")) for row in _strings(path)]
    problems = list(dict.fromkeys((row["network"], row["cases"]) for row in rows))
    libraries = sorted({row["library"] for row in rows}, key=lambda name: (name != "keras_hf", name))
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    scales = (("gradients", 1, "product, in gradients of the same library"), ("product_seconds", 1e3, "product, ms"))
    for axes, (column, scale, label) in zip(panels, scales, strict=True):
        for number, library in enumerate(libraries):
            heights = {(row["network"], row["cases"]): row[column] for row in rows if row["library"] == library}
            places = np.arange(len(heights)) + (number - (len(libraries) - 1) / 2) / (len(libraries) + 1)
            values = [scale * float(heights[problem]) for problem in problems if problem in heights]
            axes.bar(places, values, 1 / (len(libraries) + 1), label=library)
        axes.set_xticks(range(len(problems)), [f"{network},\n{cases} cases" for network, cases in problems])
        axes.set_ylabel(label)
    panels[1].set_yscale("log")
    panels[0].legend()
    return figure


def fits(folder):
    """Returns a figure of errors against seconds, a panel for each problem and seed."""
    courses = {}
    for path in sorted(folder.glob("*-seed*.csv")):
        problem, method, seed = _parts(path)
        courses.setdefault((problem, seed), {})[method] = read_rows(path)
    return _against_seconds(courses, "error", "relative L2 error")


def minibatches(folder):
    """Returns a figure of training errors against seconds, a panel for each problem and seed: of kfac-jax all settings."""
    courses = {}
    for path in sorted(folder.glob("*/*-seed*.csv")):
        method, _, seed = path.stem.rpartition("-")
        courses.setdefault((path.parent.name, seed), {})[method] = read_rows(path)
    return _against_seconds(courses, "train_error", "squared error per case, training")


def _parts(path):
    """The problem, the method and the seed in the name of a file."""
    problem, _, rest = path.stem.partition("-")
    method, _, seed = rest.rpartition("-")
    return problem, method, seed


def _against_seconds(courses, column, label):
    figure = Figure(figsize=(max(6.5 * len(courses), 8), 5), layout="constrained")
    panels = figure.subplots(1, len(courses), squeeze=False)[0]
    order = list(LABELS)
    for axes, ((problem, seed), of_problem) in zip(panels, courses.items(), strict=True):
        for method in sorted(of_problem, key=lambda name: [name.startswith(known) for known in order], reverse=True):
            rows = [row for row in of_problem[method] if np.isfinite(row[column])]
            name = next((LABELS[known] + method[len(known) :] for known in order if method.startswith(known)), method)
            axes.semilogy([row["seconds"] for row in rows], [row[column] for row in rows], label=name)
        axes.set(title=f"{problem}, {seed}", xlabel="seconds of training", ylabel=label)
        axes.grid(alpha=0.3)
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _strings(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
