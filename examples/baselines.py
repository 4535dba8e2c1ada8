"""A fair race with first-order methods: the settings they run with, and the clock that every method runs against."""

import csv
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import ops

STEPS_PER_EXECUTION = 10  # Keras' own work between calls would otherwise double the time of a step of a small network.


class NesterovMomentum(keras.optimizers.SGD):
    """Nesterov's accelerated gradient with the momentum schedule of Sutskever et al. (2013), section 3.

    At update t the momentum is `min(1 - 1 / (2 * (t // 250 + 1)), max_momentum)`: it begins at 1/2, since the first
    gradients are so large that a momentum of 0.99 would carry all units into saturation.

    Args:
        learning_rate: Float.
        max_momentum: Float in [0, 1), reached after `125 / (1 - max_momentum)` updates.
    """

    def __init__(self, learning_rate, max_momentum=0.99):
        super().__init__(learning_rate, momentum=max_momentum, nesterov=True)

    def update_step(self, gradient, variable, learning_rate):
        ramp = 1 - 0.5 / (ops.cast(self.iterations // 250, variable.dtype) + 1)
        momentum = ops.minimum(ramp, self.momentum)
        velocity = self.momentums[self._get_variable_index(variable)]
        self.assign(velocity, momentum * velocity - learning_rate * gradient)
        self.assign_add(variable, momentum * velocity - learning_rate * gradient)


class Baseline(NamedTuple):
    """A first-order method with its settings.

    Attributes:
        optimizer: Callable that makes the Keras optimizer from a learning rate.
        learning_rates: Dict, the learning rate for the sizes "demo" and "full".
        batch_size: Integer, cases in an update; None for all.
        cosine_decay: Boolean, whether the learning rate falls to zero along a cosine over the time given.
        sparse: Boolean, whether it starts from the sparse weights, as Hessian-free does, or from Keras' default ones.
    """

    optimizer: Callable
    learning_rates: dict
    batch_size: int | None = 200
    cosine_decay: bool = False
    sparse: bool = True


# Learning rates for a loss summed over pixels and averaged over cases. Those of the demo are the best by training error
# of a grid in factors of three, on 1,000 curves of another seed and in about the demo's time; "full" is fixed beforehand.
BASELINES = {
    "gd": Baseline(keras.optimizers.SGD, {"demo": 3e-2, "full": 3e-2}, batch_size=None),
    "adam": Baseline(keras.optimizers.Adam, {"demo": 1e-2, "full": 1e-3}, cosine_decay=True),
    "nag": Baseline(NesterovMomentum, {"demo": 1e-2, "full": 1e-2}),
    "adam-glorot": Baseline(keras.optimizers.Adam, {"demo": 1e-2, "full": 1e-3}, cosine_decay=True, sparse=False),
}


def fit_baseline(baseline, size, network, x, recorder, **compile_arguments):
    """Trains an autoencoder with a first-order method until `recorder` ends it.

    Args:
        baseline: A `Baseline`.
        size: String, "demo" or "full".
        network: Keras model that maps `(N, d)` to `(N, d)`.
        x: Array `(N, d)`, the training cases.
        recorder: A `Recorder`.
        **compile_arguments: Loss and metrics, as `keras.Model.compile` takes them.
    """
    if baseline.batch_size is None or baseline.batch_size >= len(x):
        batches = tf.data.Dataset.from_tensors((x, x)).repeat()
    else:
        cases = tf.data.Dataset.range(len(x)).shuffle(len(x)).repeat().batch(baseline.batch_size)
        batches = cases.map(lambda cases: (tf.gather(x, cases),) * 2).prefetch(2)
    steps = min(STEPS_PER_EXECUTION, recorder.max_updates)
    network.compile(
        optimizer=baseline.optimizer(baseline.learning_rates[size]),
        steps_per_execution=steps,
        jit_compile=True,  # Up to twice as fast here.
        **compile_arguments,
    )
    network.fit(
        batches,
        steps_per_epoch=50 * steps,
        epochs=recorder.max_updates,
        shuffle=False,
        callbacks=[recorder, CosineDecay(recorder)] if baseline.cosine_decay else [recorder],
    )


class Recorder(keras.callbacks.Callback):
    """Records the error of an autoencoder against time, and ends its training when the time is up.

    The clock starts after the first call of the compiled training step, so that tracing and compiling aren't timed (nor
    the update, or ten of them, in this call), and stands still while errors are measured. Each row is written to a CSV
    file at once, so that a run that is cut short leaves its trace.

    Args:
        network: Keras model that maps `(N, d)` to `(N, d)`, the one that is trained.
        x_train: Array `(N, d)`, the cases of `train_error`.
        x_test: Array `(M, d)`, the cases of `test_error`.
        path: Path of the CSV file.
        max_seconds: Float, the time of training.
        max_updates: Integer, the updates after which training ends even if time is left.
        interval: Float, seconds of training between two rows; 0 gives a row for every update.
        log_names: Strings, training logs to put into each row, as they are at its update.

    Attributes:
        rows: List of dicts, one for each row of the file.
    """

    def __init__(self, network, x_train, x_test, path, max_seconds, max_updates, interval=0.0, log_names=()):
        super().__init__()
        self.network = network
        self.x_train = x_train
        self.x_test = x_test
        self.path = path
        self.max_seconds = max_seconds
        self.max_updates = max_updates
        self.interval = interval
        self.log_names = log_names
        self.rows = []
        self._start = None

    @property
    def seconds(self):
        """Seconds of training so far."""
        return 0.0 if self._start is None else time.perf_counter() - self._start

    def on_train_begin(self, logs=None):
        self._record(0, {})

    def on_train_batch_end(self, batch, logs=None):
        if self._start is None:
            self._start = time.perf_counter()
        updates = int(self.model.optimizer.iterations)
        seconds = self.seconds
        self.model.stop_training = seconds >= self.max_seconds or updates >= self.max_updates
        if self.model.stop_training or seconds >= self.rows[-1]["seconds"] + self.interval:
            self._record(updates, logs)
            self._start += self.seconds - seconds

    def _record(self, updates, logs):
        row = {
            "update": updates,
            **{name: logs.get(name, math.nan) for name in self.log_names},
            "seconds": round(self.seconds, 3),
            "train_error": reconstruction_error(self.network, self.x_train),
            "test_error": reconstruction_error(self.network, self.x_test),
        }
        with open(self.path, "a" if self.rows else "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            if not self.rows:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)


class CosineDecay(keras.callbacks.Callback):
    """Lets the learning rate fall to zero along a cosine over time, since the number of steps isn't known beforehand.

    Args:
        recorder: The `Recorder` whose clock counts.
    """

    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def on_train_begin(self, logs=None):
        self.initial = float(self.model.optimizer.learning_rate)

    def on_train_batch_begin(self, batch, logs=None):
        done = min(self.recorder.seconds / self.recorder.max_seconds, 1.0)
        self.model.optimizer.learning_rate = self.initial * 0.5 * (1 + math.cos(math.pi * done))


def reconstruction_error(network, x, batch_size=5000):
    """Returns the squared error of reconstructions, summed over outputs and averaged over cases.

    Args:
        network: Keras model that maps `(N, d)` to `(N, d)`.
        x: Array `(N, d)`.
        batch_size: Integer, cases reconstructed at a time.

    Returns:
        Float, accumulated in float64.
    """
    parts = (x[start : start + batch_size] for start in range(0, len(x), batch_size))
    sums = (np.sum(np.square(ops.convert_to_numpy(network(part)) - part), dtype="float64") for part in parts)
    return float(sum(sums)) / len(x)
