"""A run that is kept in every way after three updates, and goes on; also as a script, in a process of its own."""

import os
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import training
from training import renewed, small_network

from keras_hf import ConjugateGradient, GrowingBatch, HessianFree, HFModel, KroneckerFactored

WAYS = ["run", "weights", "checkpoint", "backup"]
X = np.random.default_rng(0).normal(size=(120, 3)).astype("float32")
Y = np.sin(2 * X[:, :2])


def make():
    """A model whose random parts draw their own seeds: nothing but what is saved can bring them back."""
    model = HFModel(small_network(2, keras.layers.Dropout(0.1), num_inputs=3, units=6))
    optimizer = HessianFree(
        solver=ConjugateGradient(preconditioner=KroneckerFactored(50, interval=2)),
        growing_batch=GrowingBatch(40),
        curvature_batch_size=30,
    )
    model.compile(optimizer=optimizer, loss="mse")
    return model


def fit(model, epochs, callbacks=()):
    """Trains from a damping that the first update finds. The rule stands last: `fit` has to call it first."""
    return training.fit(model, X, Y, epochs=epochs, shuffle=True, callbacks=[*callbacks, training.LevenbergMarquardt()])


class Crash(keras.callbacks.Callback):
    """Ends training before the fourth update."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 3:
            raise KeyboardInterrupt


def three_updates(folder, model):
    """Makes three updates, kept in every way."""
    saving = keras.callbacks.ModelCheckpoint(f"{folder}/best.keras", save_freq=1)
    try:
        fit(model, 6, [keras.callbacks.BackupAndRestore(f"{folder}/backup"), saving, Crash()])
    except KeyboardInterrupt:
        pass
    model.save(f"{folder}/run.keras")
    model.save_weights(f"{folder}/run.weights.h5")
    tf.train.Checkpoint(model=model).write(f"{folder}/checkpoint")


def spoiled():
    """A model of `make` of which no number is what it was, traced once."""
    model = renewed(make)
    for variable in [*model.variables, *model.optimizer.variables]:
        variable.assign(1 - np.asarray(variable))
    return model


def three_more(folder, way):
    """Goes on where the first three updates ended, and returns the model."""
    model = keras.models.load_model(f"{folder}/run.keras") if way == "run" else spoiled()
    if way == "backup":
        fit(model, 6, [keras.callbacks.BackupAndRestore(f"{folder}/backup", delete_checkpoint=False)])
        return model
    if way == "weights":
        model.load_weights(f"{folder}/run.weights.h5")
    if way == "checkpoint":
        tf.train.Checkpoint(model=model).read(f"{folder}/checkpoint").assert_existing_objects_matched()
    fit(model, 3)
    return model


def values(model):
    """All that training goes on from."""
    return [np.asarray(variable) for variable in [*model.weights, *model.optimizer.variables]]


if __name__ == "__main__":
    source, target = sys.argv[1:]
    # As in conftest.py: it changes the last bits.
    tf.config.optimizer.set_experimental_options(
        {"disable_meta_optimizer": not os.environ.get("KERAS_HF_OPTIMIZE_GRAPHS")}
    )
    for way in WAYS:
        np.savez(Path(target, f"{way}.npz"), *values(three_more(source, way)))
