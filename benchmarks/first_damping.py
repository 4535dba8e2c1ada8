"""Where the damping should start, as a share of the curvature along the first gradient: the loss after 5, 10 and 30 updates for nine shares.

Six problems whose losses differ in scale and form: a regression on five inputs, with targets as they are, in millions and in millionths; a curve
(sinc); a classifier on synthetic classes; the demo's deep autoencoder on synthetic curves. The same weights and seed for all shares of a problem,
defaults elsewhere but for the growing batch, which would draw other cases.

    python -m benchmarks.first_damping --csv benchmarks/results/first_damping.csv
"""

import argparse

import keras
import numpy as np

from benchmarks import rows as results
from examples.autoencoder import SETTINGS, build_autoencoder, cross_entropy
from examples.datasets import synthetic_curves
from keras_hf import HessianFree, HFModel, LevenbergMarquardt

SHARES = (1.0, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
UPDATES = (5, 10, 30)
FIELDS = ("problem", "share", "scale", *(f"loss_after_{number}" for number in UPDATES), "damping_after_30", "rejected")


def dense_network(num_inputs, *layers):
    """A network of Dense layers given as `(units, activation)`."""
    return keras.Sequential([keras.Input((num_inputs,)), *[keras.layers.Dense(*layer) for layer in layers]])


def regression(factor):
    """A smooth function of five inputs, times a factor: the targets, not the loss, have another scale."""
    x = np.random.default_rng(0).normal(size=(2000, 5)).astype("float32")
    network = dense_network(5, (32, "tanh"), (32, "tanh"), (1, "linear"))
    return network, "mse", x, factor * (3 + np.sin(x.sum(1, keepdims=True)))


def sinc():
    """The curve sin(10 x) / (10 x)."""
    x = np.linspace(-1, 1, 500, dtype="float32")[:, None]
    return dense_network(1, (20, "tanh"), (1, "linear")), "mse", x, np.sinc(10 * x / np.pi)


def classes():
    """Four classes told apart by signs."""
    x = np.random.default_rng(0).normal(size=(2000, 5)).astype("float32")
    labels = (x[:, 0] * x[:, 1] > 0) + 2 * (x[:, 2] > 0)
    network = dense_network(5, (64, "relu"), (64, "relu"), (4, "softmax"))
    return network, "sparse_categorical_crossentropy", x, labels


def autoencoder():
    """The demo's deep autoencoder."""
    x = synthetic_curves(1000, 0)
    return build_autoencoder(SETTINGS["curves", "demo"].widths, 2e-5, 0), cross_entropy, x, x


PROBLEMS = {
    "regression": lambda: regression(1.0),
    "regression, targets in millions": lambda: regression(1e6),
    "regression, targets in millionths": lambda: regression(1e-6),
    "sinc": sinc,
    "classes": classes,
    "autoencoder": autoencoder,
}


def measure(problem, shares):
    """Trains from every share of the scale, all from the same weights, and yields a row of the table as a dict for each."""
    keras.utils.set_random_seed(0)
    network, loss, x, y = PROBLEMS[problem]()
    model = HFModel(network)
    model.compile(optimizer=HessianFree(growing_batch=None, seed=0), loss=loss)
    variables = [*model.variables, *model.optimizer.variables]
    start = [variable.numpy() for variable in variables]

    def train(epochs):
        return model.fit(x, y, epochs=epochs, verbose=0, callbacks=[LevenbergMarquardt()]).history

    train(1)
    scale = float(model.optimizer.curvature_scale)
    for share in shares:
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        model.optimizer.damping.assign(share * scale)
        history = train(max(UPDATES) + 1)  # The loss in the logs is that before the update.
        losses = {f"loss_after_{number}": f"{history['loss'][number]:.4g}" for number in UPDATES}
        rejected = sum(size == 0 for size in history["step_size"])
        damping = f"{history['damping'][-1]:.3g}"
        yield dict(zip(FIELDS, (problem, share, f"{scale:.4g}", *losses.values(), damping, rejected), strict=True))


def main():
    """Trains, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", nargs="*", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--share", nargs="*", type=float, default=SHARES)
    arguments = results.parse(parser, {"problem": ["regression", "sinc"], "share": (1.0, 1e-2, 1e-4)})
    rows = []
    for problem in arguments.problem:
        for row in measure(problem, arguments.share):
            rows.append(row)
            print(*row.values(), sep=",", flush=True)
            if arguments.csv:
                results.write(arguments.csv, rows)


if __name__ == "__main__":
    main()
