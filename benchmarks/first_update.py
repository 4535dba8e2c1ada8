"""What the first update costs, in which everything is traced and compiled, and what must not cost as much again: other cases, a new `compile`.

Six kinds of networks by the defaults, each in a process of its own; Adam on the first of them beside. Seconds of the clock, and of the processor,
which others on the machine disturb less. The transformer is that of `classifier_solvers`; the equations are Poisson's on 2-16-1, and the steady
Navier-Stokes equations on 2-20-20-20-3, in float64 by `DirectSolver`.

    python -m benchmarks.first_update --csv benchmarks/results/first_update.csv
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
from keras import layers

from benchmarks import rows as results
from benchmarks.classifier_solvers import transformer
from keras_hf import HessianFree, HFModel, LevenbergMarquardt, pinn

CLASSES = "sparse_categorical_crossentropy"


def normal(*shape):
    """The same normal numbers in every run."""
    return np.random.default_rng(0).normal(size=shape)


def dense():
    """Three small layers."""
    stack = [layers.Dense(32, "tanh"), layers.Dense(16, "tanh"), layers.Dense(1)]
    return keras.Sequential([keras.Input((20,)), *stack]), normal(1000, 20), normal(1000, 1), "mse"


def convolutions():
    """Two convolutions, normalised, and dropout."""
    blocks = [
        layer
        for filters in (8, 16)
        for layer in (layers.Conv2D(filters, 3, strides=2), layers.BatchNormalization(), layers.ReLU())
    ]
    stack = [*blocks, layers.Flatten(), layers.Dropout(0.3), layers.Dense(10, "softmax")]
    return keras.Sequential([keras.Input((16, 16, 1)), *stack]), normal(1000, 16, 16, 1), np.arange(1000) % 10, CLASSES


def lstm():
    """Tokens, some of them masked, over 40 steps."""
    stack = [layers.Embedding(200, 16, mask_zero=True), layers.LSTM(16), layers.Dense(1)]
    tokens = np.random.default_rng(0).integers(0, 200, (1000, 40))
    return keras.Sequential([keras.Input((40,)), *stack]), tokens, normal(1000, 1), "mse"


def attention():
    """One encoder block."""
    network, _ = transformer(1)
    return network, normal(1000, 28, 28), np.arange(1000) % 10, CLASSES


def poisson():
    """Poisson's equation."""

    def residual(u, points):
        return sum(pinn.derivatives(u, points, "xy", "u_xx", "u_yy"))

    return _equations((16,), 1, {"equation": residual, "boundary": lambda u, points: u(points)}, (900, 120))


def navier_stokes():
    """Two components of the velocity, and the pressure."""

    def residual(u, points):
        value, x, y, xx, yy = pinn.derivatives(u, points, "xy", "u", "u_x", "u_y", "u_xx", "u_yy")
        (v, w), laplacian = (value[:, :1], value[:, 1:2]), 0.01 * (xx + yy)
        momentum = [
            v * x[:, i : i + 1] + w * y[:, i : i + 1] + p[:, 2:] - laplacian[:, i : i + 1] for i, p in enumerate((x, y))
        ]
        return keras.ops.concatenate([*momentum, x[:, :1] + y[:, 1:2]], 1)

    return _equations((20, 20, 20), 3, {"equation": residual, "boundary": lambda u, points: u(points)}, (1000, 200))


def _equations(units, num_outputs, terms, numbers):
    inputs = keras.Input((2,))
    hidden = inputs
    for width in units:
        hidden = layers.Dense(width, "tanh")(hidden)
    network = pinn.PINN(keras.Model(inputs, layers.Dense(num_outputs)(hidden)), terms)
    points = {name: normal(number, 2) for name, number in zip(terms, numbers, strict=True)}
    x, y, weights = network.cases(points)
    return network, x, y, weights, "mse"


NETWORKS = {f.__name__: f for f in (dense, convolutions, lstm, attention, poisson, navier_stokes)}
IN_FLOAT64 = {"poisson", "navier_stokes"}
LATER = 5


def main(arguments=None):
    """Measures each network in a process of its own, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--one", choices=["adam", *NETWORKS], help=argparse.SUPPRESS)
    args = results.parse(parser, {"networks": ["dense"]}, arguments)
    if args.one:
        results.write(args.csv, measure(args.one))
        return
    rows = []
    for name in ["adam", *args.networks]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.csv")
            words = [sys.executable, "-m", "benchmarks.first_update", "--one", name, "--csv", str(path)]
            subprocess.run(words, check=True)
            rows += csv.DictReader(path.read_text().splitlines())
        if args.csv:
            results.write(args.csv, rows)


def measure(name):
    """Times the calls of one model; returns rows of network, call, seconds and seconds of the processor, dicts."""
    is_adam = name == "adam"
    if name in IN_FLOAT64:
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(0)
    network, *data, loss = NETWORKS["dense" if is_adam else name]()
    model = network if is_adam else HFModel(network)

    def compiled():
        model.compile(optimizer="adam" if is_adam else HessianFree(seed=0), loss=loss)

    def fit(epochs=1):
        # Every epoch is one update.
        callbacks = [] if is_adam else [LevenbergMarquardt()]
        x, y, *weights = data
        arguments = {"sample_weight": weights[0]} if weights else {}
        model.fit(x, y, batch_size=len(y), epochs=epochs, callbacks=callbacks, verbose=0, **arguments)

    def recompiled():
        compiled()
        fit()

    compiled()
    calls = {"first update": fit, f"{LATER} more": lambda: fit(LATER), "compile, first update": recompiled}
    rows = []
    for call_name, call in calls.items():
        start, cpu = time.perf_counter(), time.process_time()
        call()
        seconds, cpu_seconds = f"{time.perf_counter() - start:.2f}", f"{time.process_time() - cpu:.2f}"
        rows.append({"network": name, "call": call_name, "seconds": seconds, "cpu_seconds": cpu_seconds})
        print(f"{name:14s} {call_name:22s} {seconds:>7s} s {cpu_seconds:>7s} s of the processor", flush=True)
    return rows


if __name__ == "__main__":
    main()
