"""Small problems to the last digit, in float64: exact steps against SciPy, optimistix, jaxopt, self-scaled Broyden and L-BFGS, error against time.

- sinc: sin(10 x) / (10 x) at 2,000 points, by a network 1-20-1.
- poisson: Poisson's equation by a network 2-32-1, 900 + 120 points, as in `examples.pinn_problems`.

All start from the same weights and have the same seconds of training; compiling is not in them, and the clock stands still while errors are measured.
Peers get the residuals as one compiled function with the network's derivatives written out (`small_problems`); they find the Jacobian as they do by
default. Tolerances are zero: only the time ends a fit.

    make peers
    python -m benchmarks.peers.fits
    python -m benchmarks.gather runs/peers_fits benchmarks/results/peers_fits.csv

Each fit writes `OUT/PROBLEM/METHOD-seedSEED.csv`; the error is the relative L2 error at points that are not trained on.
"""

import argparse
from pathlib import Path

import keras
import numpy as np

from benchmarks import rows as results
from benchmarks.peers import handover
from examples import origins, pinn
from examples import pinn_problems as problems
from examples.regression import sinc
from keras_hf import HFModel

# Of `examples.pinn`: here, SciPy's trust-region least squares with our Jacobian, SciPy's L-BFGS.
METHODS = {"keras_hf": "hf", "scipy-trf": "least-squares", "scipy-lbfgs": "lbfgs"}
PEERS = {"jax": "fits_in_jax", "torch": "fits_in_torch"}


def sinc_problem():
    """sin(10 x) / (10 x) on [-1, 1]."""
    data = problems.Term(problems.value, lambda num, seed: np.linspace(-1, 1, num)[:, None], 2000, sinc)
    return problems.Problem(
        (20, 1), (-1.0,), (1.0,), {"data": data}, lambda x: keras.ops.convert_to_tensor(sinc(x.numpy()))
    )


PROBLEMS = {"sinc": sinc_problem, "poisson": problems.poisson}


def main(arguments=None):
    """Fits by ours and by SciPy, hands over, and has the peers fit.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=PROBLEMS, nargs="+", default=list(PROBLEMS))
    parser.add_argument("--seconds", type=float, default=15.0, help="of training, for each method")
    parser.add_argument("--seed", type=int, default=0, help="of weights and points")
    parser.add_argument("--methods", choices=METHODS, nargs="*", default=list(METHODS))
    parser.add_argument("--peers", choices=PEERS, nargs="*", default=list(PEERS))
    parser.add_argument("--out", type=Path, default=Path("runs", "peers_fits"), help="folder of the results")
    args = results.parse(parser, {"seconds": 3.0}, arguments)
    keras.config.set_floatx("float64")
    runs = []
    for name in args.problem:
        path = handover.FOLDER / f"{name}-seed{args.seed}.npz"
        hand_over(PROBLEMS[name](), path, args.seed)
        for method in args.methods:
            csv = args.out / name / f"{method}-seed{args.seed}.csv"
            csv.parent.mkdir(parents=True, exist_ok=True)
            _, recorder = pinn.run(PROBLEMS[name](), METHODS[method], None, csv, args.seed, args.seconds)
            origins.note(csv)
            print(name, method, recorder.rows[-1], flush=True)
        runs += [(peer, PEERS[peer], path, "--seconds", args.seconds, "--out", args.out) for peer in args.peers]
    handover.run_all(runs)


def hand_over(problem, path, seed):
    """Writes the weights of a seed, the points and what is given there, the loss, and test points; see `small_problems`."""
    network = problems.build(problem, seed)
    model = HFModel(network)
    model.compile(loss="mse")
    objective = model.objective(*problems.training_cases(problem, network, seed))
    points = problems.training_points(problem, seed)
    test_points, test_values = problems.test_cases(problem)
    arrays = dict.fromkeys(("equation_points", "source"), np.zeros((0, len(problem.low))))
    if "equation" in points:
        inner = points["equation"]
        arrays = {"equation_points": inner, "source": 2 * np.pi**2 * np.prod(np.sin(np.pi * inner), 1, keepdims=True)}
    given = points["data"] if "data" in points else (points["boundary"], np.zeros((len(points["boundary"]), 1)))
    handover.save(
        path,
        network.network.layers,
        **arrays,
        value_points=given[0],
        values=given[1],
        test_points=test_points,
        test_values=test_values,
        loss=objective.loss_at(objective.weights),
    )


if __name__ == "__main__":
    main()
