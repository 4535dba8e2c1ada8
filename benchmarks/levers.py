"""What each part of Hessian-free optimization is worth: the defaults of the package, and the defaults but for one part.

Every run has the same time, cases and weights. Besides seconds there is the cost until each target, in gradients over
the training set (see `time_to_error`), which does not depend on the machine, but leaves out the work that is no pass
over cases.

    python -m benchmarks.levers --problem small-curves --seed 0 1

A run whose file is complete is not made again. The table is written and printed from all runs so far.
"""

import argparse
import csv
import itertools
import math
from functools import partial
from pathlib import Path

from benchmarks.time_to_error import PROBLEMS, fit_hessian_free, read, train
from keras_hf import (
    EmpiricalFisherDiagonal,
    GrowingBatch,
    Identity,
    KroneckerFactored,
    LevenbergMarquardt,
    RelativeProgress,
)

RESULTS = Path("benchmarks", "results", "levers")
SECONDS = {"small-curves": 30.0, "full-curves": 120.0}


def levers(num_cases):
    """Returns what is changed, one thing at a time.

    Dict from a name to arguments of `HessianFree` and to others that are none of its own: `damping_rule`, `l2`, `sparse`.

    Args:
        num_cases: Integer, cases of the problem.
    """
    return {
        "defaults": {},
        **{f"diagonal ^{power:g}": {"preconditioner": EmpiricalFisherDiagonal(power)} for power in (0.5, 0.75, 1.0)},
        "no preconditioner": {"preconditioner": Identity()},
        "factors in every update": {"preconditioner": KroneckerFactored(interval=1)},
        "factors every 20 updates": {"preconditioner": KroneckerFactored(interval=20)},
        "factors from 250 cases": {"preconditioner": KroneckerFactored(250, interval=5)},
        "all cases from the start": {"growing_batch": None},
        "from 500 cases": {"growing_batch": GrowingBatch(initial_size=500)},
        "grown at the first miss": {"growing_batch": GrowingBatch(patience=1)},
        "grown below a share of .5": {"growing_batch": GrowingBatch(share=0.5)},
        **{
            f"all cases, chunks of N/{part}": {"growing_batch": None, "curvature_batch_size": num_cases // part}
            for part in (2, 4, 8)
        },
        **{f"at most {most} iterations": {"max_cg_iterations": most} for most in (10, 15, 50, 250)},
        **{f"tolerance {rate:g}": {"stopping": RelativeProgress(tolerance=rate)} for rate in (5e-4, 5e-3, 2e-2)},
        **{f"warm start x {decay:g}": {"warm_start_decay": decay} for decay in (0.0, 0.5, 0.9, 0.95, 1.0)},
        "damping factor 1.5": {"damping_rule": LevenbergMarquardt(factor=1.5)},
        "damping factor 4": {"damping_rule": LevenbergMarquardt(factor=4)},
        "damping in every fifth update": {"damping_rule": LevenbergMarquardt(interval=5)},
        "damping lowered above .75": {"damping_rule": LevenbergMarquardt(high=0.75)},
        "damping from a tenth": {"damping": 4.5},
        "damping searched for": {"damping_rule": LevenbergMarquardt(calibrate=True)},
        **{f"L2 {l2:g}": {"l2": l2} for l2 in (1e-5, 0.0)},
        "Glorot's weights": {"sparse": False},
    }


def run(folder, problem, name, change, seed, seconds):
    """Trains once, unless that has been done; returns the path of the file."""
    path = folder / f"{file_name(name)}-seed{seed}.csv"
    own = {key: value for key, value in change.items() if key not in ("damping_rule", "sparse")}
    fit = partial(fit_hessian_free, damping_rule=change.get("damping_rule"))
    train(path, problem, fit, own, seed, seconds, change.get("sparse", True))
    return path


def file_name(name):
    """Returns a name that files may have."""
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)


def row(name, seed, rows, targets):
    """Returns what a run reached, a dict: seconds and cost until each target, infinity where not reached, and the end."""
    until = {target: next((row for row in rows if row["train_error"] <= target), None) for target in targets}
    return {
        "lever": name,
        "seed": seed,
        **{f"seconds_to_{target:g}": at["seconds"] if at else math.inf for target, at in until.items()},
        **{f"cost_to_{target:g}": at["cost"] if at else math.inf for target, at in until.items()},
        **{key: rows[-1][key] for key in ("update", "total_cg_iterations", "train_error", "test_error")},
    }


def main(arguments=None):
    """Runs what is missing, prints and writes the table.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=SECONDS, required=True)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--lever", nargs="+", help="names; default: all")
    parser.add_argument("--seconds", type=float, help="instead of the problem's own, to try things out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    problem, folder = PROBLEMS[args.problem], args.out / args.problem
    changes = levers(len(problem.load(0).x_train))
    table = []
    for seed, (name, change) in itertools.product(args.seed, changes.items()):
        if not args.lever or name in args.lever:
            path = run(folder, problem, name, change, seed, args.seconds or SECONDS[args.problem])
            table.append(row(name, seed, read(path), problem.targets))
            print("  ".join(f"{key} {value}" for key, value in table[-1].items()), flush=True)
    with open(args.out / f"{args.problem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
