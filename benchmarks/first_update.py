"""What the first call of `fit` costs, and what must not cost as much again: other cases, evaluation, a new `compile`.

Two networks on 1,500 cases, defaults: three small Dense layers, and an LSTM of 16 units over 30 steps; Adam on the same networks beside them.
Seconds of the clock, and of the processor, which others on the machine disturb less.

    python -m benchmarks.first_update --csv benchmarks/results/first_update.csv
"""

import argparse
import time

import keras
import numpy as np

from benchmarks import rows as results
from keras_hf import HessianFree, HFModel, LevenbergMarquardt


def dense():
    """Three small layers."""
    sizes = [(32, "tanh"), (16, "tanh"), (1, "linear")]
    return keras.Sequential([keras.Input((20,)), *[keras.layers.Dense(units, f) for units, f in sizes]])


def lstm():
    """A recurrent layer over 30 steps."""
    return keras.Sequential([keras.Input((30, 8)), keras.layers.LSTM(16), keras.layers.Dense(1)])


NETWORKS = {"dense": (dense, (20,)), "lstm": (lstm, (30, 8))}


def main():
    """Times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--cases", type=int, default=1500)
    args = results.parse(parser, {"networks": ["dense"]})
    rows = [
        {"network": network, "method": method, **row}
        for network in args.networks
        for method in ("hf", "adam")
        for row in measure(network, method, args.cases)
    ]
    if args.csv:
        results.write(args.csv, rows)


def measure(network, method, num_cases):
    """Times the calls of one model; returns rows of call, seconds and seconds of the processor, dicts."""
    build, shape = NETWORKS[network]
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(num_cases, *shape)).astype("float32")
    y = np.sin(x.reshape(num_cases, -1)[:, :1])
    model = HFModel(build()) if method == "hf" else build()
    callbacks = [LevenbergMarquardt()] if method == "hf" else []

    def compile_model():
        model.compile(optimizer=HessianFree(seed=0) if method == "hf" else "adam", loss="mse")

    def fit(fewer=0):
        model.fit(x[fewer:], y[fewer:], batch_size=num_cases - fewer, callbacks=callbacks, verbose=0)

    def recompiled():
        compile_model()
        fit()

    compile_model()
    calls = {
        "first fit": fit,
        "fit again": fit,
        "fit on 37 cases fewer": lambda: fit(37),
        "evaluate": lambda: model.evaluate(x, y, verbose=0),
        "compile and fit": recompiled,
    }
    rows = []
    for name, call in calls.items():
        start, cpu = time.perf_counter(), time.process_time()
        call()
        seconds, cpu_seconds = f"{time.perf_counter() - start:.2f}", f"{time.process_time() - cpu:.2f}"
        rows.append({"call": name, "seconds": seconds, "cpu_seconds": cpu_seconds})
        print(f"{network:6s} {method:5s} {name:22s} {seconds:>7s} s {cpu_seconds:>7s} s of the processor", flush=True)
    return rows


if __name__ == "__main__":
    main()
