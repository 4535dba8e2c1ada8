"""What the Nystrom preconditioner brings on a physics-informed network: the error of a solution, the products it took.

Poisson's equation on the unit square, solution sin(pi x) sin(pi y), by a network of 2-32-1 tanh units in float64: the
mean of squared residuals at 30 by 30 inner points and that of squared errors at 124 boundary points. The same weights
for all, and the recipe of 2010 but for the preconditioner. Products are those of CG's iterations and of sketches; the
error is relative, in the L2 norm, at 101 by 101 points.

    python -m benchmarks.nystrom --csv benchmarks/results/nystrom.csv
"""

import argparse

import keras
import numpy as np
import tensorflow as tf

from benchmarks import rows as results
from examples.baselines import recipe
from keras_hf import EmpiricalFisherDiagonal, HFModel, Identity, Nystrom

PRECONDITIONERS = {
    "Identity": Identity(),
    "EmpiricalFisherDiagonal": EmpiricalFisherDiagonal(),
    "Nystrom": Nystrom(rank=60, interval=10),
}
FIELDS = ("preconditioner", "update", "products", "loss", "relative_error")


class Poisson(keras.Model):
    """Minus the Laplacian of a solution at inner points, the solution itself at others: `(N, 3)` -> `(N, 1)`.

    A row of the input is x, y and 1 for an inner point, 0 for another.

    Args:
        num_units: Integer, of the hidden layer.
    """

    def __init__(self, num_units=32):
        super().__init__()
        self.hidden, self.solution = keras.layers.Dense(num_units, "tanh"), keras.layers.Dense(1)

    def build(self, input_shape):
        self.hidden.build((None, 2))
        self.solution.build((None, self.hidden.units))

    def solve(self, points):
        """Gives the solution, `(N, 2) -> (N, 1)`."""
        return self.solution(self.hidden(points))

    def call(self, x):
        points, is_inner = x[:, :2], x[:, 2:]
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(points)
            with tf.GradientTape() as inner:
                inner.watch(points)
                u = self.solve(points)
            slopes = tf.unstack(inner.gradient(u, points), axis=1)
        laplacian = sum(outer.gradient(slope, points)[:, i] for i, slope in enumerate(slopes))
        return is_inner * -laplacian[:, None] + (1 - is_inner) * u


def exact(points):
    """The solution, `(N, 2) -> (N, 1)`."""
    return np.prod(np.sin(np.pi * points), axis=1, keepdims=True)


def grid(num_points):
    """Points `(num_points^2, 2)` of a grid on the closed unit square."""
    axis = np.linspace(0, 1, num_points)
    return np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)


def cases(num_points=32):
    """Returns inputs `(N, 3)`, targets `(N, 1)` and weights `(N,)` that make each kind's mean count once."""
    points = grid(num_points)
    is_inner = ((points > 0) & (points < 1)).all(1, keepdims=True)
    y = np.where(is_inner, 2 * np.pi**2 * exact(points), 0.0)
    weight = np.where(is_inner, 1 / is_inner.sum(), 1 / (~is_inner).sum())[:, 0]
    return np.concatenate([points, is_inner], 1), y, len(points) * weight


class Recorder(keras.callbacks.Callback):
    """Makes a row of the table every `every` updates.

    Args:
        preconditioner: The `Preconditioner` in use.
        every: Integer.
    """

    def __init__(self, preconditioner, every):
        super().__init__()
        self.preconditioner, self.every = preconditioner, every
        self.rows, self.updates, self.products = [], 0, 0
        self.points = grid(101)

    def on_train_batch_end(self, batch, logs=None):
        self.products += int(logs["cg_iterations"])
        if isinstance(self.preconditioner, Nystrom) and self.updates % self.preconditioner.interval == 0:
            self.products += min(self.preconditioner.rank, self.model.network.count_params())
        self.updates += 1
        if self.updates % self.every == 0:
            found = self.model.network.solve(tf.constant(self.points)).numpy()
            error = np.linalg.norm(found - exact(self.points)) / np.linalg.norm(exact(self.points))
            values = (self.updates, self.products, f"{logs['update_loss']:.3e}", f"{error:.3e}")
            self.rows.append(dict(zip(FIELDS, (type(self.preconditioner).__name__, *values), strict=True)))
            print(self.rows[-1], flush=True)


def compiled(preconditioner, seed):
    """Returns the `HFModel` of a run and its damping rule: the recipe of 2010 but for the preconditioner."""
    keras.utils.set_random_seed(seed)
    model = HFModel(Poisson())
    optimizer, damping_rule = recipe(1.0, {"preconditioner": preconditioner}, seed=seed)
    model.compile(optimizer=optimizer, loss="mse")
    return model, damping_rule


def measure(preconditioner, updates, every, seed, num_points=32):
    """Trains once and returns the rows of the table as dicts. Wants float64 as Keras' `floatx`."""
    model, damping_rule = compiled(preconditioner, seed)
    x, y, weight = cases(num_points)
    recorder = Recorder(preconditioner, every)
    callbacks = [damping_rule, recorder]
    model.fit(x, y, sample_weight=weight, epochs=updates, shuffle=False, verbose=0, callbacks=callbacks)
    return recorder.rows


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--every", type=int, default=50, help="updates between rows")
    parser.add_argument("--preconditioner", choices=PRECONDITIONERS, nargs="+", default=tuple(PRECONDITIONERS))
    parser.add_argument("--seed", type=int, default=0)
    args = results.parse(parser, {"updates": 60, "every": 20})
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    rows = []
    for name in args.preconditioner:
        rows += measure(PRECONDITIONERS[name], args.updates, args.every, args.seed)
        if args.csv and rows:
            results.write(args.csv, rows)


if __name__ == "__main__":
    main()
