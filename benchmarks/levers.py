"""What each part of Hessian-free optimization is worth: the package's defaults, and the defaults but for one part; or the recipe.

The recipe is that of Martens (2010), see `examples.baselines.recipe`. Every run has the same time, cases and weights.
Besides seconds there is the cost until each target, in gradients over the training set (see `time_to_error`), which does
not depend on the machine, but leaves out the work that is no pass over cases.

    python -m benchmarks.levers --problem small-curves --seed 0 1
    python -m benchmarks.levers --problem small-curves --base recipe --seed 0 1

A run whose file is complete is not made again. The table is written from all runs so far. In `benchmarks/results`,
`levers_recipe.csv` holds the runs of the recipe, `levers_defaults.csv` the table of the defaults; they had one core each,
two of them side by side (`taskset -c 0 python -m ...`).
"""

import argparse
import itertools
from functools import partial
from pathlib import Path

from benchmarks import rows as results
from benchmarks.time_to_error import PROBLEMS, fit_hessian_free, fit_recipe, train, until_each
from examples.baselines import LastIterate
from examples.tables import read_rows
from keras_hf import (
    ConstantDamping,
    EmpiricalFisher,
    EmpiricalFisherDiagonal,
    FiniteDifferenceHessian,
    GrowingBatch,
    Hessian,
    Identity,
    KroneckerFactored,
    LevenbergMarquardt,
    RelativeProgress,
    ResidualTolerance,
    recipe_of_2010,
)

RESULTS = Path("runs", "levers")
SECONDS = {
    ("small-curves", "defaults"): 40.0,
    ("full-curves", "defaults"): 120.0,
    ("small-curves", "recipe"): 100.0,
}


def levers_of_defaults(num_cases):
    """Returns what is changed in the package's defaults, one thing at a time.

    Dict from a name to arguments of `HessianFree` (of its solver, a dict: what differs from the base's) and to others that are none of its own:
    `damping_rule`, `l2`, `sparse`.

    Args:
        num_cases: Integer, cases of the problem.
    """
    return {
        "defaults": {},
        **{
            f"diagonal ^{power:g}": {"solver": {"preconditioner": EmpiricalFisherDiagonal(power)}}
            for power in (0.5, 0.75, 1.0)
        },
        "no preconditioner": {"solver": {"preconditioner": Identity()}},
        "factors in every update": {"solver": {"preconditioner": KroneckerFactored(interval=1)}},
        "factors every 20 updates": {"solver": {"preconditioner": KroneckerFactored(interval=20)}},
        "factors from 250 cases": {"solver": {"preconditioner": KroneckerFactored(250, interval=5)}},
        "all cases from the start": {"growing_batch": None},
        "from 500 cases": {"growing_batch": GrowingBatch(initial_size=500)},
        "grown at the first miss": {"growing_batch": GrowingBatch(patience=1)},
        "grown below a share of .5": {"growing_batch": GrowingBatch(share=0.5)},
        **{
            f"all cases, chunks of N/{part}": {"growing_batch": None, "curvature_batch_size": num_cases // part}
            for part in (2, 4, 8)
        },
        **{f"at most {most} iterations": {"solver": {"max_iterations": most}} for most in (10, 15, 50, 250)},
        **{
            f"tolerance {rate:g}": {"solver": {"stopping": RelativeProgress(tolerance=rate)}}
            for rate in (5e-4, 5e-3, 2e-2)
        },
        **{f"warm start x {decay:g}": {"solver": {"warm_start_decay": decay}} for decay in (0.0, 0.5, 0.9, 0.95, 1.0)},
        "damping factor 1.5": {"damping_rule": LevenbergMarquardt(factor=1.5)},
        "damping factor 4": {"damping_rule": LevenbergMarquardt(factor=4)},
        "damping in every fifth update": {"damping_rule": LevenbergMarquardt(interval=5)},
        "damping lowered above .75": {"damping_rule": LevenbergMarquardt(high=0.75)},
        "damping from a tenth": {"damping": 4.5},
        **{f"L2 {l2:g}": {"l2": l2} for l2 in (1e-5, 0.0)},
        "Glorot's weights": {"sparse": False},
    }


def levers_of_recipe(num_cases):
    """Returns what is changed in the recipe, one thing at a time, as `levers_of_defaults` does."""
    return {
        "recipe": {},
        "Hessian": {"curvature": Hessian()},
        "Hessian by finite differences": {"curvature": FiniteDifferenceHessian()},
        "empirical Fisher": {"curvature": EmpiricalFisher()},
        "CG stops by its residual": {"solver": {"stopping": ResidualTolerance()}},
        **{f"always {most} iterations": {"solver": {"stopping": NEVER, "max_iterations": most}} for most in (50, 250)},
        "no preconditioner": {"solver": {"preconditioner": Identity()}},
        "Kronecker factors": {"solver": {"preconditioner": KroneckerFactored(interval=5)}},
        "no warm start": {"solver": {"warm_start_decay": 0.0}},
        "no backtracking": {"solver": LastIterate(**vars(recipe_of_2010()))},
        **{
            f"constant damping {damping:g}": {"damping": damping, "damping_rule": ConstantDamping()}
            for damping in (45.0, 4.5, 0.45)
        },
        "products on a quarter": {"curvature_batch_size": num_cases // 4},
        "growing sets": {"growing_batch": GrowingBatch()},
        "Glorot's weights": {"sparse": False},
    }


NEVER = RelativeProgress(tolerance=1e-12)
BASES = {"defaults": (fit_hessian_free, levers_of_defaults), "recipe": (fit_recipe, levers_of_recipe)}
MAX_SEEDS = 10
QUICK = {
    "lever": ["defaults", "no preconditioner"],
    "seconds": 4.0,
    "out": Path("runs", "bench", "levers"),
}
NO_ARGUMENTS = ("damping_rule", "sparse")  # Of `HessianFree`.


def run(folder, problem, fit, name, change, seed, seconds):
    """Trains once, unless that has been done; returns the path of the file."""
    path = path_of(folder, name, seed)
    arguments = {key: value for key, value in change.items() if key not in NO_ARGUMENTS}
    fit = partial(fit, damping_rule=change.get("damping_rule"))
    train(path, problem, fit, arguments, seed, seconds, change.get("sparse", True))
    return path


def path_of(folder, name, seed):
    """Returns the path of a run's file, in whose name a lever's has only what files may have."""
    name = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
    return folder / f"{name}-seed{seed}.csv"


def row(name, seed, rows, targets):
    """Returns what a run reached, a dict: seconds and cost until each target, infinity where not reached, and the end."""
    return {
        "lever": name,
        "seed": seed,
        **until_each(rows, targets),
        **{key: rows[-1][key] for key in ("update", "total_cg_iterations", "train_error", "test_error")},
    }


def main(arguments=None):
    """Runs what is missing, prints and writes the table.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices={problem for problem, _ in SECONDS}, default="small-curves")
    parser.add_argument("--base", choices=BASES, default="defaults", help="what is changed")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], choices=range(MAX_SEEDS), metavar="SEED")
    parser.add_argument("--lever", nargs="+", help="names; default: all")
    parser.add_argument("--seconds", type=float, help="instead of the problem's own, to try things out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = results.parse(parser, QUICK, arguments)
    seconds = args.seconds or SECONDS.get((args.problem, args.base))
    if seconds is None:
        parser.error(f"Give --seconds: none are set for {args.base} on {args.problem}.")
    problem, folder = PROBLEMS[args.problem], args.out / f"{args.problem}-{args.base}"
    fit, changes_of = BASES[args.base]
    changes = changes_of(len(problem.load(0).x_train))
    for seed, (name, change) in itertools.product(args.seed, changes.items()):
        if not args.lever or name in args.lever:
            path = run(folder, problem, fit, name, change, seed, seconds)
            found = row(name, seed, read_rows(path), problem.targets)
            print("  ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    table = [
        row(name, seed, read_rows(path), problem.targets)
        for name in changes
        for seed in range(MAX_SEEDS)
        if (path := path_of(folder, name, seed)).exists()
    ]
    results.write(args.csv or folder.with_suffix(".csv"), table)


if __name__ == "__main__":
    main()
