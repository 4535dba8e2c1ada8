"""Poisson's equation as a script of DeepXDE has it, with a Dirichlet, a Neumann and a periodic condition, trained by both libraries.

    pip install ".[deepxde]"
    python -m examples.deepxde_adapter --seconds 20 --out runs/deepxde

DeepXDE's own course, Adam and then L-BFGS, and `HessianFree` begin with the same weights.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from examples import origins  # noqa: E402
from examples.tables import write_rows  # noqa: E402
from keras_hf import HFModel  # noqa: E402
from keras_hf.deepxde import as_pinn, dde  # noqa: E402


def solution(x):
    """The solution of the example, `cos(2 pi x) sin(pi y / 2)`: 0 at y = 0, slope 0 at y = 1, periodic in x."""
    return np.cos(2 * np.pi * x[:, :1]) * np.sin(0.5 * np.pi * x[:, 1:])


def problem():
    """The Poisson equation on the unit square, as a script of DeepXDE has it."""
    geom = dde.geometry.Rectangle([0, 0], [1, 1])

    def pde(x, u):
        laplacian = dde.grad.hessian(u, x, i=0, j=0) + dde.grad.hessian(u, x, i=1, j=1)
        return laplacian + 4.25 * np.pi**2 * tf.cos(2 * np.pi * x[:, :1]) * tf.sin(0.5 * np.pi * x[:, 1:])

    is_at = lambda column, value: lambda x, on: on and dde.utils.isclose(x[column], value)  # noqa: E731
    conditions = [
        dde.icbc.DirichletBC(geom, lambda x: np.zeros((len(x), 1)), is_at(1, 0)),
        dde.icbc.NeumannBC(geom, lambda x: np.zeros((len(x), 1)), is_at(1, 1)),
        dde.icbc.PeriodicBC(geom, 0, is_at(0, 0)),
        dde.icbc.PeriodicBC(geom, 0, is_at(0, 0), derivative_order=1),
    ]
    return dde.data.PDE(geom, pde, conditions, num_domain=900, num_boundary=120, solution=solution)


def by_deepxde(data, network, seconds):
    """DeepXDE's usual course: half of the time Adam, then L-BFGS, 100 iterations at a time until the time is up."""
    model, start = dde.Model(data, network), time.perf_counter()
    model.compile("adam", lr=1e-3)
    half = dde.callbacks.Timer(seconds / 2 / 60)
    model.train(iterations=10**9, display_every=10**9, callbacks=[half], verbose=0)
    dde.optimizers.set_LBFGS_options(maxiter=100)
    while time.perf_counter() < start + seconds:
        model.compile("L-BFGS")
        model.train(display_every=10**9, verbose=0)


def by_hessian_free(data, network, seconds):
    """The same loss by `HessianFree`, with its defaults."""
    start = time.perf_counter()
    pinn, (points, targets, weights) = as_pinn(data, network)
    model = HFModel(pinn)
    model.compile(loss="mse")

    def stop(epoch, logs):
        model.stop_training = time.perf_counter() >= start + seconds

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=stop)]
    model.fit(points, targets, sample_weight=weights, epochs=10**9, callbacks=callbacks, verbose=0)


METHODS = {"deepxde": by_deepxde, "keras_hf": by_hessian_free}


def main(arguments=None):
    """Trains by both libraries from the same weights, and prints the relative errors."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of training, tracing included, for each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/deepxde"))
    options = parser.parse_args(arguments)

    dde.config.set_default_float("float64")
    keras.config.set_dtype_policy("float64")
    test = dde.geometry.Rectangle([0, 0], [1, 1]).uniform_points(10_000)
    rows = []
    for method, train in METHODS.items():
        keras.utils.set_random_seed(options.seed)
        data, network = problem(), dde.nn.FNN([2, 32, 1], "tanh", "Glorot normal")
        start = time.perf_counter()
        train(data, network, options.seconds)
        seconds = time.perf_counter() - start
        error = float(dde.metrics.l2_relative_error(solution(test), np.asarray(network(test))))
        rows.append({"method": method, "seed": options.seed, "seconds": seconds, "error": error})
        print(f"{method}: relative error {error:.1e} after {seconds:.0f} s", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(options.out / "errors.csv", rows)
    origins.note(options.out / "errors.csv")


if __name__ == "__main__":
    main()
