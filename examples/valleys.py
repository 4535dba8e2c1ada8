"""Two valleys of two variables, and how methods go down them: what makes gradient descent slow, in pictures.

Rosenbrock's function has a bent valley, across which it curves 2,500 times as much as along it, at the minimum: a step
that is short enough for the walls gets nowhere along the bottom. In the flat valley gradient and curvature are both tiny along one
direction, as they are for the weights of the first layers of a deep network: whoever divides the one by the other, as
Newton's method and Hessian-free optimization do, sees that the way is long, and goes it. Run from the root of the
repository:

    python -m examples.valleys --out runs/valleys

Written into `--out`: for each valley a picture of the paths, and of the height above the minimum against updates.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from keras_hf import conjugate_gradient

FLATNESS = 1e-4


class Valley(NamedTuple):
    """A function of two variables with its derivatives, and how it is gone down and shown.

    Attributes:
        title: String.
        value: Callable on x and y, scalars or arrays of one shape.
        gradient: Callable `(2,) -> (2,)`.
        hessian: Callable `(2,) -> (2, 2)`.
        start: Pair of floats.
        minimum: Pair of floats, where the value is 0.
        learning_rate: Float, about as much as gradient descent can stand at the steepest place on its way.
        num_steps: Integer, the steps of gradient descent and momentum.
        window: Pairs of floats, the part of x and y that is shown.
    """

    title: str
    value: Callable
    gradient: Callable
    hessian: Callable
    start: tuple
    minimum: tuple
    learning_rate: float
    num_steps: int
    window: tuple


ROSENBROCK = Valley(
    title="Rosenbrock: (1 - x)² + 100 (y - x²)²",
    value=lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2,
    gradient=lambda w: np.array([2 * (w[0] - 1) - 400 * w[0] * (w[1] - w[0] ** 2), 200 * (w[1] - w[0] ** 2)]),
    hessian=lambda w: np.array([[2 - 400 * (w[1] - 3 * w[0] ** 2), -400 * w[0]], [-400 * w[0], 200.0]]),
    start=(-1.2, 1.0),
    minimum=(1.0, 1.0),
    learning_rate=1e-3,
    num_steps=2000,
    window=((-1.7, 1.5), (-0.6, 2.0)),
)
FLAT = Valley(
    title=f"Flat valley: (x² + {FLATNESS:g} y²) / 2",
    value=lambda x, y: (x**2 + FLATNESS * y**2) / 2,
    gradient=lambda w: np.array([w[0], FLATNESS * w[1]]),
    hessian=lambda w: np.diag([1.0, FLATNESS]),
    start=(0.8, 1.0),
    minimum=(0.0, 0.0),
    learning_rate=1.0,
    num_steps=2000,
    window=((-1.0, 1.0), (-0.3, 1.2)),
)
VALLEYS = {"rosenbrock": ROSENBROCK, "flat": FLAT}


def gradient_descent(valley, num_steps=None, momentum=0.0):
    """Goes down by steps along the gradient, of which `momentum` is kept in each step.

    Args:
        valley: A `Valley`.
        num_steps: Integer; `None` for the valley's own.
        momentum: Float in [0, 1).

    Returns:
        Array `(num_steps + 1, 2)`, the path.
    """
    path, step = [np.array(valley.start)], np.zeros(2)
    for _ in range(num_steps or valley.num_steps):
        step = momentum * step - valley.learning_rate * valley.gradient(path[-1])
        path.append(path[-1] + step)
    return np.array(path)


def hessian_free(valley, num_updates=40, damping=1.0):
    """Goes down by minimising damped quadratic models with conjugate gradients, which see products with the Hessian alone.

    The damping follows how well the model predicted the fall, as in Levenberg and Marquardt's method: Martens (2010),
    section 4.1. A step that leads upwards isn't taken.

    Args:
        valley: A `Valley`.
        num_updates: Integer.
        damping: Float, the first one.

    Returns:
        Array `(num_updates + 1, 2)`, the path.
    """
    path = [np.array(valley.start)]
    for _ in range(num_updates):
        w = path[-1]
        gradient, hessian = valley.gradient(w), valley.hessian(w)
        damped = tf.constant(hessian + damping * np.eye(2))
        result = conjugate_gradient(lambda v, a=damped: tf.linalg.matvec(a, v), tf.constant(-gradient))
        step = result.iterates[-1].numpy()
        predicted_reduction = -(gradient @ step + step @ hessian @ step / 2)
        actual_reduction = valley.value(*w) - valley.value(*(w + step))
        if actual_reduction < 0.25 * predicted_reduction:
            damping *= 3 / 2
        elif actual_reduction > 0.75 * predicted_reduction:
            damping *= 2 / 3
        path.append(w + step if actual_reduction > 0 else w)
    return np.array(path)


def all_paths(valley):
    """Returns a dict from each method's name to its path down a valley."""
    return {
        "gradient descent": gradient_descent(valley),
        "momentum 0.9": gradient_descent(valley, momentum=0.9),
        "Hessian-free": hessian_free(valley),
    }


def plot(valley, paths, path):
    """Draws paths down a valley, and their height above its minimum.

    Args:
        valley: A `Valley`.
        paths: Dict from each method's name to its path, `(num_steps + 1, 2)`.
        path: Path of the PNG file.
    """
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    ground, heights = figure.subplots(1, 2)
    x, y = np.meshgrid(*(np.linspace(*limits, 300) for limits in valley.window))
    z = valley.value(x, y)
    levels = np.geomspace(1e-4 * z.max(), z.max(), 16)
    ground.contour(x, y, z, levels, norm=LogNorm(), cmap="Greys_r", linewidths=0.7)
    for name, steps in paths.items():
        few = {"marker": "o", "markersize": 4, "zorder": 3} if len(steps) < 100 else {"linewidth": 0.8}
        (line,) = ground.plot(*steps.T, label=name, **few)
        ground.plot(*steps[-1], "x", color=line.get_color(), markersize=10, markeredgewidth=3, zorder=4)
        heights.semilogy(valley.value(*steps.T))
    ground.plot([], [], "kx", markersize=10, markeredgewidth=3, label="where it ends", linestyle="none")
    ground.plot(*valley.start, "ks", markersize=6, label="start", linestyle="none", zorder=4)
    ground.plot(*valley.minimum, "k*", markersize=14, label="minimum", linestyle="none", zorder=5)
    ground.set(xlabel="x", ylabel="y", xlim=valley.window[0], ylim=valley.window[1], title=valley.title)
    heights.set(xlabel="updates", ylabel="height above the minimum", xscale="symlog", ylim=(1e-12, None))
    heights.grid(alpha=0.3)
    figure.legend(*ground.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    """Draws both valleys.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs", "valleys"), help="folder of the pictures")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, valley in VALLEYS.items():
        paths = all_paths(valley)
        plot(valley, paths, args.out / f"{name}.png")
        print(f"\n{valley.title}\n")
        for method, steps in paths.items():
            end, height = "({:.3f}, {:.3f})".format(*steps[-1]), valley.value(*steps[-1])
            print(f"{method:<18} {len(steps) - 1:>6,} updates, ends at {end}, {height:.1e} above the minimum")
    print(f"\nPictures: {args.out}")


if __name__ == "__main__":
    main()
