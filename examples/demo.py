"""Three acts: exact steps for a small problem, memory for a recurrent network, and the talk's deep autoencoder.

    python -m examples.demo

takes about four minutes on two cores, three of them training. In each act every method trains from the same weights for the same time; a table and a
figure show what came out. Rates were tuned beforehand on seed 1; seed 0 is shown.

Act 1, small and exact: Poisson's equation on a square by a physics-informed network (`examples/pinn.py`), 15 seconds each. Ours is
`HessianFree(solver=DirectSolver())`, with nothing to set. L-BFGS is SciPy's with 50 pairs. Adam's learning rate falls along a cosine from 0.1, which
had the least loss of four:

    python -m examples.pinn --problem poisson --methods adam --rates 1e-2 3e-2 1e-1 3e-1 --seconds 15 --seed 1

ended at losses of 6.0e-4, 5.2e-4, 1.9e-4 and 4.7e-4.

Act 2, memory: five bits are to be kept for a hundred steps (`examples/recurrent.py`), at most 30 seconds each; a run ends when less than 1 % of the
sequences are wrong. Ours trains 100 plain tanh units by `HessianFree` with structural damping, Adam the same network, and a GRU of as many units by
Adam at a rate of 1e-2. Of three rates for the plain network none solved seed 1:

    python -m examples.recurrent --length 100 --methods adam --rates 3e-4 1e-3 3e-3 --seconds 60 --seed 1

left 69 %, 97 % and 97 % wrong. (At 1e-3 Adam solves seed 0 after 24 seconds, and none of three other seeds in 60.)

Act 3, deep: the paper's kind of autoencoder, 784-100-50-25-12-6 and its mirror, on 10,000 synthetic curves (`examples/autoencoder.py`), 20 seconds
each, from the same sparse weights. On so many curves the test error falls along with the training error. Ours is `HessianFree()`, the defaults, with
nothing to set. Adam and Nesterov momentum have the best of three rates:

    python -m examples.autoencoder --method adam --learning-rate 3e-3 --seed 1

and so on ended, after 40 seconds, at these training and test errors:

    rate    Adam           Nesterov momentum
    3e-3    2.39, 3.19     2.22, 2.80
    1e-2    1.36, 2.25     2.05, 2.71
    3e-2    2.83, 5.74     17.16, 17.12
"""

import argparse
from pathlib import Path

from examples import autoencoder, pinn, recurrent

POISSON = "--problem poisson --methods hf adam lbfgs --rates 1e-1 --seconds 15"
MEMORY = "--problem memory-5 --length 100 --methods hf adam --rates 3e-4 --seconds 30"
GATED = "--problem memory-5 --length 100 --methods gru --rates 1e-2 --seconds 30"
CURVES = "--dataset curves --size demo --method hf adam nag --seconds 20 --interval 1"
# How the labels of ours begin.
OURS = "Hessian-free"


def standing(runs, column, form):
    """Returns a sentence that compares ours with the others by a number, of which less is better.

    Args:
        runs: Dict from labels to dicts of numbers.
        column: String, the name of the number.
        form: Callable from one of those dicts to how a sentence shows the number, a string. Of those shown alike none is ahead.
    """
    ours = next(label for label in runs if label.startswith(OURS))
    found = {"ahead of": [], "level with": [], "behind": []}
    for label, run in runs.items():
        if label != ours:
            is_level = form(run) == form(runs[ours])
            kind = "level with" if is_level else "behind" if run[column] < runs[ours][column] else "ahead of"
            found[kind].append(f"{label} ({form(run)})")
    compared = (f"{kind} {' and '.join(labels)}" for kind, labels in found.items() if labels)
    return f"{form(runs[ours])} by {ours}: {', '.join(compared)}."


def main(arguments=None):
    """Plays the three acts.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs", "demo"), help="folder for what is written")
    args = parser.parse_args(arguments)
    print("Act 1, small and exact: Poisson's equation by a physics-informed network")
    runs = pinn.main([*POISSON.split(), "--results", str(args.out)])
    print("\nRelative error " + standing(runs, "error", lambda run: f"{run['error']:.1e}"))
    print("\nAct 2, memory: a recurrent network keeps five bits for a hundred steps")
    for arguments in (MEMORY, GATED):
        runs = recurrent.main([*arguments.split(), "--results", str(args.out / "recurrent")])
    print("\nWrong sequences " + standing(runs, "wrong", lambda run: f"{run['wrong']:.0%}"))
    print("\nAct 3, deep: an autoencoder of curves")
    runs = autoencoder.main([*CURVES.split(), "--out", str(args.out / "autoencoder")])
    print("\nTraining error " + standing(runs, "train_error", lambda run: f"{run['train_error']:.2f}"))
    print("Test error " + standing(runs, "test_error", lambda run: f"{run['test_error']:.2f}"))
    print("Trained longer, momentum's test error falls below that of ours, which overfits sooner: docs/experiments.md.")


if __name__ == "__main__":
    main()
