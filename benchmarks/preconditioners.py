"""What a preconditioner brings: CG iterations and seconds until a deep autoencoder's squared error is below 1.

The demo's network (784-100-50-25-12-6 and mirror) on 1,000 synthetic curves, by the recipe of 2010 but for the preconditioner and the limit of CG.
The same seed for all; one run after the other. Seconds are those of training: errors are computed in between. The first update, which traces and
compiles, is left out of the seconds, too.

    python -m benchmarks.preconditioners --csv benchmarks/results/preconditioners.csv
"""

import argparse
import time

import keras

from benchmarks import rows as results
from examples.autoencoder import SETTINGS, build_autoencoder, cross_entropy, squared_error
from examples.baselines import recipe
from examples.datasets import synthetic_curves
from keras_hf import EmpiricalFisherDiagonal, HFModel, KroneckerFactored

PRECONDITIONERS = {"EmpiricalFisherDiagonal": EmpiricalFisherDiagonal, "KroneckerFactored": KroneckerFactored}
FIELDS = ("preconditioner", "max_cg_iterations", "reached", "updates", "cg_iterations", "seconds", "train_error")
NUM_CASES, TARGET = 1000, 1.0


class UntilTarget(keras.callbacks.Callback):
    """Counts CG iterations and seconds, and stops at the target, or when time is up.

    Args:
        x: Array `(N, 784)`, the training images.
        seconds: Float, of training at most, tracing of the first update left out.
    """

    def __init__(self, x, seconds):
        super().__init__()
        self.x, self.limit = x, seconds
        self.updates = self.cg_iterations = 0
        self.seconds, self.error = 0.0, float("inf")

    def on_train_batch_begin(self, batch, logs=None):
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if self.updates:
            self.seconds += time.perf_counter() - self._start
        self.updates += 1
        self.cg_iterations += int(logs["cg_iterations"])
        self.error = float(keras.ops.mean(squared_error(self.x, self.model.network(self.x))))
        self.model.stop_training = self.error < TARGET or self.seconds > self.limit


def measure(preconditioner, max_cg_iterations, x, seconds, seed):
    """Trains once and returns a row of the table as a dict."""
    keras.utils.set_random_seed(seed)
    network = build_autoencoder(SETTINGS["curves", "demo"].widths, 2e-5, seed)
    model = HFModel(network)
    changes = {"preconditioner": preconditioner(), "max_iterations": max_cg_iterations}
    optimizer, damping_rule = recipe(solver=changes, seed=seed)
    model.compile(optimizer=optimizer, loss=cross_entropy)
    until = UntilTarget(x, seconds)
    model.fit(x, x, epochs=100_000, verbose=0, callbacks=[damping_rule, until])
    values = (until.error < TARGET, until.updates, until.cg_iterations, f"{until.seconds:.1f}", f"{until.error:.3f}")
    return dict(zip(FIELDS, (preconditioner.__name__, max_cg_iterations, *values), strict=True))


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0, help="of training in one run, at most")
    parser.add_argument("--max-cg-iterations", type=int, nargs="+", default=(250, 50))
    parser.add_argument("--preconditioner", choices=PRECONDITIONERS, nargs="+", default=tuple(PRECONDITIONERS))
    parser.add_argument("--seed", type=int, default=0)
    args = results.parse(parser, {"seconds": 6.0, "max_cg_iterations": (50,)})
    x = synthetic_curves(NUM_CASES, args.seed)
    rows = []
    for limit in args.max_cg_iterations:
        for name in args.preconditioner:
            rows.append(measure(PRECONDITIONERS[name], limit, x, args.seconds, args.seed))
            print(rows[-1], flush=True)
            if args.csv:
                results.write(args.csv, rows)


if __name__ == "__main__":
    main()
