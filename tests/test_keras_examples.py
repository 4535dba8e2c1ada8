"""What `benchmarks/keras_examples.py` says of a run: its updates and seconds, and the epoch of the least validation loss."""

import types

import keras
import numpy as np
import pytest
from training import Clock

from benchmarks import keras_examples
from benchmarks.keras_examples import Example


def diverging(rng, num_cases):
    """Near the solution from the start; long steps lead away from it."""
    x = rng.normal(size=(num_cases, 2)).astype("float32")
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    cases = x, np.where(x[:, :1] > 0, 1e-3, -1e-3)
    return Example(network, {"loss": "mse", "metrics": ["mae"]}, cases, cases, {"batch_size": 4}, learning_rate=1.0)


def test_a_row_is_of_the_epoch_of_the_least_validation_loss_and_of_the_seconds_after_the_first_update(monkeypatch):
    clock = Clock(step=1.0)
    monkeypatch.setattr(keras_examples, "time", types.SimpleNamespace(process_time=clock.perf_counter))
    monkeypatch.setitem(keras_examples.EXAMPLES, "diverging", diverging)
    row = keras_examples.train("diverging", "adam", 1, 8, 3.0)
    assert (row["updates"], row["first_update_seconds"], row["cpu_seconds"]) == (5, "1.0", "5.0")

    keras.utils.set_random_seed(1)
    same = diverging(np.random.default_rng(1), 8)
    same.network.compile(keras.optimizers.Adam(1.0), **same.compiled)
    history = same.network.fit(*same.cases, epochs=3, validation_data=same.others, verbose=0, **same.fit).history
    best = int(np.argmin(history["val_loss"]))
    assert best < 2
    assert float(row["val_loss"]) == pytest.approx(history["val_loss"][best], rel=1e-3)
    assert float(row["val_metric"]) == pytest.approx(history["val_mae"][best], rel=1e-3)
