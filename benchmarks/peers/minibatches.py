"""A deep autoencoder on minibatches: `PreconditionedMomentum` against K-FAC as kfac-jax has it, and momentum, training error against time.

The problems of `benchmarks.time_to_error`, by default MNIST's autoencoder 784-1000-500-250-30 and mirror with sigmoid units on 60,000 cases: the same
weights at the start (sparse), cases, loss, and seconds of training for all. Ours has its one setting. kfac-jax has a grid
(`minibatches_in_jax.GRID`), which `--setting` picks from; momentum has the setting that was best in its grid.

    make peers
    python -m benchmarks.peers.minibatches
    python -m benchmarks.gather runs/peers_minibatches benchmarks/results/peers_minibatches.csv

MNIST is read as the examples read it. A run whose file is complete is not made again.
"""

import argparse
from pathlib import Path

from benchmarks import rows as results
from benchmarks import time_to_error
from benchmarks.peers import handover

# Numbers of settings in `time_to_error.GRIDS`.
METHODS = {"hf-momentum": 0, "nag": 1}


def main(arguments=None):
    """Trains by ours and by momentum, hands over, and has kfac-jax train.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    autoencoders = [name for name, problem in time_to_error.PROBLEMS.items() if problem.kind == "autoencoder"]
    parser.add_argument("--problem", choices=autoencoders, default="mnist-autoencoder")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training, for each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", choices=METHODS, nargs="*", default=list(METHODS))
    parser.add_argument("--setting", type=int, nargs="*", default=[0], help="of kfac-jax")
    parser.add_argument("--out", type=Path, default=Path("runs", "peers_minibatches"), help="folder of the results")
    args = results.parse(parser, {"problem": "small-curves", "seconds": 10.0}, arguments)
    problem, folder = time_to_error.PROBLEMS[args.problem], args.out / args.problem
    for method in args.methods:
        number = METHODS[method]
        setting = time_to_error.grid(args.problem, problem, method)[number]
        path = time_to_error.run(folder, problem, method, setting, number, args.seed, args.seconds)
        print(path, flush=True)
    if args.setting:
        path = handover.FOLDER / f"{args.problem}-seed{args.seed}.npz"
        hand_over(problem, path, args.seed)
        options = ["--seed", args.seed, "--seconds", args.seconds, "--out", folder]
        handover.run_all([("kfac", "minibatches_in_jax", path, "--setting", *args.setting, *options)])


def hand_over(problem, path, seed):
    """Writes the weights and the cases that runs of a seed begin with.

    Args:
        problem: A `time_to_error.Problem` whose networks are `keras.Sequential` of `Dense` layers, and whose targets are the inputs.
        path: Path of the NPZ file.
        seed: Integer.
    """
    cases = problem.load(seed)
    network = time_to_error.starting_network(problem, problem.l2, seed)
    handover.save(path, network.layers, x_train=cases.x_train, x_test=cases.x_test)


if __name__ == "__main__":
    main()
