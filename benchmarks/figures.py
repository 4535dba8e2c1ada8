"""Draws the comparisons with other libraries from the results that are in a folder.

    python -m benchmarks.figures benchmarks/results
    python -m benchmarks.figures runs/bench

Draws `peers_products.png`, `peers_fits.png` and `peers_minibatches.png`, each from the CSV file or the folder of runs of that name; what is not there
is not drawn.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks import rows as results

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
    for name, draw in FIGURES.items():
        runs = results.read_runs(folder / name) or results.read_runs(folder / f"{name}.csv")
        if runs:
            draw(runs).savefig(folder / f"{name}.png", dpi=120)
            print(folder / f"{name}.png")


def products(runs):
    """Returns a figure of bars: products in gradients and in milliseconds, for each network and number of cases."""
    rows = [row for rows in runs.values() for row in rows]
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


def _against_seconds(runs, column, label):
    """Returns a figure of errors against seconds, a panel for each problem and seed: of kfac-jax all settings."""
    courses = {}
    for (problem, method, seed), rows in runs.items():
        points = [(float(row["seconds"]), float(row[column])) for row in rows]
        courses.setdefault((problem, seed), {})[method] = [point for point in points if np.isfinite(point[1])]
    figure = Figure(figsize=(max(6.5 * len(courses), 8), 5), layout="constrained")
    panels = figure.subplots(1, len(courses), squeeze=False)[0]
    order = list(LABELS)
    for axes, ((problem, seed), of_problem) in zip(panels, courses.items(), strict=True):
        for method in sorted(of_problem, key=lambda name: [name.startswith(known) for known in order], reverse=True):
            name = next((LABELS[known] + method[len(known) :] for known in order if method.startswith(known)), method)
            axes.semilogy(*zip(*of_problem[method], strict=True), label=name)
        axes.set(title=f"{problem}, seed {seed}", xlabel="seconds of training", ylabel=label)
        axes.grid(alpha=0.3)
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


# Name -> what is drawn of the runs.
FIGURES = {
    "peers_products": products,
    "peers_fits": partial(_against_seconds, column="error", label="relative L2 error"),
    "peers_minibatches": partial(_against_seconds, column="train_error", label="squared error per case, training"),
}


if __name__ == "__main__":
    main()
