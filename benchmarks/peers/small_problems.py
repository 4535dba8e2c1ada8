"""The problems of `benchmarks.peers.fits` for peers: residuals by the array functions of a library, and the course of a fit as a table.

A problem is what `fits.hand_over` writes: a network with one hidden layer of tanh units, points at which its Laplacian is to be minus a source, and
points at which its value is given. Derivatives of the network are written out, which is faster than differentiating twice by a library.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np

from benchmarks import rows as results
from benchmarks.peers import handover

NUM_ROWS = 60
MAX_COUNT = 10_000  # Updates in one call.


def residuals(functions, weights, layers, problem):
    """Returns the residuals `(N,)`, the sum of whose squares is the loss.

    Args:
        functions: `jax.numpy`, `torch` or `numpy`.
        weights: Array `(n,)` of that library.
        layers: List of two `handover.Layer`s.
        problem: Dict of arrays of that library: `equation_points` `(N1, d)` and `source` `(N1, 1)`, `value_points` `(N2, d)` and `values` `(N2, 1)`.
    """
    (kernel, bias), (output, _) = handover.split(weights, layers)
    parts = []
    if len(problem["equation_points"]):
        t = functions.tanh(problem["equation_points"] @ kernel + bias)
        # The second derivative of tanh is -2 tanh (1 - tanh^2).
        laplacian = (-2 * t * (1 - t * t)) @ (output * (kernel * kernel).sum(0)[:, None])
        parts.append((laplacian + problem["source"]) / math.sqrt(len(t)))
    error = solution(functions, weights, layers, problem["value_points"]) - problem["values"]
    return functions.concatenate([*parts, error / math.sqrt(len(error))])[:, 0]


def solution(functions, weights, layers, points):
    """Returns the network's outputs at points, `(N, d)` -> `(N, 1)`."""
    (kernel, bias), (output, output_bias) = handover.split(weights, layers)
    return functions.tanh(points @ kernel + bias) @ output + output_bias


def main(fits, arguments=None):
    """Runs a peer's methods on the problem of a file, and writes `OUT/PROBLEM-METHOD-seedSEED.csv` for each.

    Args:
        fits: Callable `(layers, problem) -> dict` from a method's name to a function `(count) -> weights`: `count` more updates, and the weights
            after them, an array `(n,)` of NumPy. Before it is called the weights are those handed over. What it compiles for its first calls, it has
            compiled already.
        arguments: List of strings, as on the command line; None takes those.

    Raises:
        ValueError: If the loss at the start is not that which was handed over.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, required=True, help="of each method")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    layers, problem = handover.load(args.file)
    start = handover.flat(layers)
    loss, expected = np.square(residuals(np, start, layers, problem)).sum(), float(problem["loss"])
    if not math.isclose(loss, expected, rel_tol=1e-9):
        raise ValueError(
            f"The loss at the start must be that of the file. Received: {loss!r}, and in the file {expected!r}."
        )
    name, _, seed = args.file.stem.rpartition("-")
    for method, advance in fits(layers, problem).items():
        rows = course(advance, start, lambda weights: errors(weights, layers, problem), args.seconds)
        print(name, method, rows[-1], flush=True)
        results.write(args.out / name / f"{method}-{seed}.csv", rows)


def errors(weights, layers, problem):
    """Returns what a row holds besides updates and seconds: the loss, and the relative L2 error at the test points."""
    loss = float(np.square(residuals(np, weights, layers, problem)).sum())
    error = solution(np, weights, layers, problem["test_points"]) - problem["test_values"]
    return {"loss": loss, "error": float(np.linalg.norm(error) / np.linalg.norm(problem["test_values"]))}


def course(advance, start, errors, max_seconds):
    """Returns the rows of a fit, dicts of `update`, `seconds`, `loss` and `error`; the clock stands still while errors are measured.

    Updates are called for in numbers that take a fraction of the time between two rows. A fit ends where the loss is no number, too.

    Args:
        advance: Callable `count -> weights`; see `main`.
        start: Array `(n,)`, the weights at the start.
        errors: Callable `weights -> dict`.
        max_seconds: Float.
    """
    rows = [{"update": 0, "seconds": 0.0, **errors(start)}]
    updates, seconds, count, interval = 0, 0.0, 1, max_seconds / NUM_ROWS
    while seconds < max_seconds and math.isfinite(rows[-1]["loss"]):
        began = time.perf_counter()
        weights = advance(count)
        taken = time.perf_counter() - began
        updates, seconds = updates + count, seconds + taken
        if seconds >= rows[-1]["seconds"] + interval or seconds >= max_seconds:
            rows.append({"update": updates, "seconds": round(seconds, 3), **errors(weights)})
        if taken < interval / 4:
            count = min(2 * count, MAX_COUNT)
        elif taken > interval and count > 1:
            count //= 2
    return rows
