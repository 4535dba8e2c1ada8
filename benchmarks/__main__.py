"""Runs benchmarks one after the other, each in a process of its own, and draws the figures: `make bench`.

    python -m benchmarks                   # the quick form of all
    python -m benchmarks product_cost peers.products
    python -m benchmarks --full            # as each one's own defaults are: hours

Results go to `--out`: a CSV file, or a folder of runs, for each benchmark; `origins.json` in each folder says what they were made with. What a
benchmark prints is in `NAME.log`. Peers run in the environments that `make peers` makes; those that are missing are left out.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

# Name of the module -> the question that it answers, and where its results go: a file, or a folder.
BENCHMARKS = {
    "first_update": ("What does the first update cost?", "file"),
    "product_cost": ("What does a product cost, and what else is in an update?", "file"),
    "linearization_choice": ("Is the default linearization the fastest?", "file"),
    "preconditioners": ("What does a preconditioner bring?", "file"),
    "nystrom": ("What does the Nystrom preconditioner bring?", "file"),
    "memory": ("What does an update hold in memory?", "file"),
    "scaling": ("What does a second worker bring?", "file"),
    "recurrent_cost": ("What does a product of a recurrent network cost?", "file"),
    "first_damping": ("Where should the damping start?", "file"),
    "small_batches": ("What damping do small batches bear?", "file"),
    "keras_examples": ("Which examples of Keras train as they are?", "file"),
    "validation": ("Which model generalises best, and is validation needed?", "file"),
    "generalisation": ("What lowers the error of deep autoencoders on other cases?", "file"),
    "classifier_solvers": ("Which solver trains classifiers soonest?", "file"),
    "exact_solver": ("Where does the exact solver pay?", "file"),
    "least_squares": ("Outliers and bounds: SciPy?", "file"),
    "error_bars": ("Do the error bars hold?", "file"),
    "levers": ("What is each part worth?", "folder"),
    "time_to_error": ("How long until given errors?", "folder"),
    "peers.products": ("Products: JAX and PyTorch?", "folder"),
    "peers.fits": ("Small problems: SciPy, optimistix, jaxopt, SSBroyden, PyTorch?", "folder"),
    "peers.minibatches": ("Minibatches: kfac-jax?", "folder"),
}


def main(arguments=None):
    """Runs what the command line names, prints a line for each, and ends with 1 if one failed.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--full", action="store_true", help="not the quick forms")
    parser.add_argument("--out", type=Path, default=Path("runs", "bench"), help="folder of the results")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"NAME must be one of {', '.join(BENCHMARKS)}. Received: {', '.join(unknown)}.")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in args.names or BENCHMARKS if not run(name, args.full, args.out)]
    subprocess.run([sys.executable, "-m", "benchmarks.figures", str(args.out)], check=True)
    print(f"\nResults and figures: {args.out}")
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}.")


def run(name, full, out):
    """Runs a benchmark, prints its time, and returns whether it succeeded."""
    question, _ = BENCHMARKS[name]
    log = out / f"{name}.log"
    print(f"{name:22} {question}", end="", flush=True)
    start = time.perf_counter()
    with open(log, "w") as file:
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(command(name, full, out), stdout=file, stderr=subprocess.STDOUT, env=environment)
    ending = "" if done.returncode == 0 else f"  failed: see {log}"
    print(f"  {time.perf_counter() - start:.0f} s{ending}", flush=True)
    return done.returncode == 0


def command(name, full, out):
    """Returns the command line of a benchmark, a list of strings."""
    result = out / name.replace(".", "_")
    if name == "time_to_error":
        words = ["quick", "--out", str(result)]
        if full:
            raise SystemExit("time_to_error has no full form in one call: see its docstring.")
    elif BENCHMARKS[name][1] == "folder":
        words = ["--out", str(result)]
    else:
        words = ["--csv", f"{result}.csv"]
    quick = [] if full or name == "time_to_error" else ["--quick"]
    return [sys.executable, "-m", f"benchmarks.{name}", *quick, *words]


if __name__ == "__main__":
    main()
