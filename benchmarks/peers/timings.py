"""The timings of `benchmarks.peers.products` as every library takes them. Needs nothing but Python."""

import argparse
import time
from pathlib import Path

from benchmarks import rows as results
from benchmarks.peers import handover

# Products per timing.
REPEATS = 10


def main(measure, arguments=None):
    """Has a peer timed on every file on the command line, and writes its table.

    Args:
        measure: Callable `(layers, arrays, rounds)` that yields, for each of the peer's ways, its name, the seconds of a gradient and of a product,
            and the relative difference of the product from ours. `layers` and `arrays` are what `handover.load` returns.
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(arguments)
    rows = []
    for path in args.files:
        layers, arrays = handover.load(path)
        for values in measure(layers, arrays, args.rounds):
            rows.append(row(path.stem.partition("-")[0], len(arrays["x"]), len(arrays["v"]), *values))
            print(rows[-1], flush=True)
    results.write(args.csv, rows)


def seconds_of(run):
    """Returns the seconds that a function without arguments takes, which waits for its result."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def row(name, num_cases, num_weights, library, gradient, product, difference):
    """Returns a row of the table, a dict, of seconds and a relative difference."""
    return {
        "network": name,
        "cases": num_cases,
        "weights": num_weights,
        "library": library,
        "gradient_seconds": f"{gradient:.5f}",
        "product_seconds": f"{product:.5f}",
        "gradients": f"{product / gradient:.3f}",
        "difference": f"{difference:.1e}",
    }
