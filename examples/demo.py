"""Two acts: what exact steps do for a small problem, and what Hessian-free optimization does for a deep network.

    python -m examples.demo

takes about four minutes on two cores, 165 seconds of them training. In each act every method trains the same network from the same weights for the
same time; a table and a figure show what came out. Rates were tuned beforehand on seed 1; seed 0 is shown.

Act 1, small and exact: Poisson's equation on a square by a physics-informed network (`examples/pinn.py`), 15 seconds each. Ours is
`HessianFree(solver=DirectSolver())`, with nothing to set. L-BFGS is SciPy's with 50 pairs. Adam's learning rate falls along a cosine from 0.1, which
had the least loss of four:

    python -m examples.pinn --problem poisson --methods adam --rates 1e-2 3e-2 1e-1 3e-1 --seconds 15 --seed 1

ended at losses of 6.0e-4, 5.2e-4, 1.9e-4 and 4.7e-4.

Act 2, deep: the paper's kind of autoencoder, 784-100-50-25-12-6 and its mirror, on 10,000 synthetic curves (`examples/autoencoder.py`), 40 seconds
each, from the same sparse weights. On so many curves the test error falls along with the training error. Ours is `HessianFree()`, the defaults, with
nothing to set. Adam and Nesterov momentum have the best of three rates:

    python -m examples.autoencoder --method adam --learning-rate 3e-3 --seed 1

and so on ended at these training and test errors:

    rate    Adam           Nesterov momentum
    3e-3    2.39, 3.19     2.22, 2.80
    1e-2    1.36, 2.25     2.05, 2.71
    3e-2    2.83, 5.74     17.16, 17.12
"""

import argparse
from pathlib import Path

from examples import autoencoder, pinn

POISSON = "--problem poisson --methods hf adam lbfgs --rates 1e-1 --seconds 15"
CURVES = "--dataset curves --size demo --method hf adam nag --seconds 40 --interval 1.5"


def main(arguments=None):
    """Plays both acts.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs", "demo"), help="folder for what is written")
    args = parser.parse_args(arguments)
    print("Act 1, small and exact: Poisson's equation by a physics-informed network")
    pinn.main([*POISSON.split(), "--results", str(args.out)])
    print("\nAct 2, deep: an autoencoder of curves")
    autoencoder.main([*CURVES.split(), "--out", str(args.out / "autoencoder")])


if __name__ == "__main__":
    main()
