"""Keras' own callbacks on an `HFModel`: what they read, what they stop, what they write."""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_hf import (
    ConjugateGradient,
    ConstantDamping,
    EmpiricalFisherDiagonal,
    HessianFree,
    HFModel,
    LevenbergMarquardt,
)

X = np.random.default_rng(0).normal(size=(60, 3)).astype("float32")
Y = np.sin(2 * X[:, :2])
SCALARS = {"loss", "damping", "reduction_ratio", "cg_iterations", "step_size"}


def make(**arguments):
    model = HFModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(2)]))
    optimizer = HessianFree(
        0.1, solver=ConjugateGradient(preconditioner=EmpiricalFisherDiagonal()), growing_batch=None, seed=0
    )
    model.compile(optimizer=optimizer, loss="mse", **arguments)
    return model


@pytest.fixture(scope="module")
def model():
    """One model, traced once."""
    return make()


def fit(model, callbacks, epochs=3, x=X, **arguments):
    history = model.fit(x, Y, epochs=epochs, callbacks=[*callbacks, LevenbergMarquardt()], verbose=0, **arguments)
    return history.history


def test_a_csv_logger_writes_what_the_history_holds(model, tmp_path):
    history = fit(model, [keras.callbacks.CSVLogger(tmp_path / "log.csv")], validation_data=(X[:20], Y[:20]))
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"val_loss", *SCALARS} <= set(rows[0])
    for key, values in history.items():
        assert [float(row[key]) for row in rows] == pytest.approx(values)


def test_tensor_board_holds_the_scalars_of_updates(model, tmp_path):
    history = fit(model, [keras.callbacks.TensorBoard(tmp_path, update_freq="epoch", write_graph=False)])
    found = {}
    for path in (tmp_path / "train").iterdir():
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(float(tf.make_ndarray(value.tensor)))
    for key in SCALARS:
        assert found[f"epoch_{key}"] == pytest.approx(history[key], rel=1e-6)
    assert found["epoch_learning_rate"] == [1.0, 1.0, 1.0]


def test_early_stopping_brings_back_the_best_weights(model):
    best = []
    remember = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: best.append(model.get_weights()))
    # No loss is a hundred better than the first.
    stopping = keras.callbacks.EarlyStopping("loss", min_delta=100.0, patience=2, restore_best_weights=True)
    assert len(fit(model, [remember, stopping], epochs=9)["loss"]) == 3
    for one, other in zip(best[0], model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_training_ends_where_the_loss_is_no_number_and_the_weights_stay(model):
    before = model.get_weights()
    with pytest.warns(UserWarning, match="60 of the 60 cases"):
        history = fit(model, [keras.callbacks.TerminateOnNaN()], x=np.full_like(X, np.nan))
    assert len(history["loss"]) == 1 and np.isnan(history["loss"][0])
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_callback_that_lowers_the_learning_rate_is_told_that_there_is_none(model):
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=100.0)
    with pytest.warns(UserWarning, match="has no learning rate: it reads as 1. Received: learning_rate=0.5"):
        fit(model, [plateau])
    assert float(model.optimizer.learning_rate) == 1.0


def test_a_callback_of_ones_own_may_lower_the_damping_on_a_plateau(model):
    class Plateau(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.optimizer.damping.assign(0.5 * logs["damping"])

    model.optimizer.damping.assign(0.1)
    history = model.fit(X, Y, epochs=3, callbacks=[Plateau(), ConstantDamping()], verbose=0).history
    np.testing.assert_allclose(history["damping"], [0.1, 0.05, 0.025], rtol=1e-6)


def test_a_monitor_that_is_no_log_is_named(model):
    with pytest.raises(ValueError, match="monitor=val_los"):
        fit(model, [keras.callbacks.EarlyStopping("val_los")])
    with pytest.warns(UserWarning, match="`val_los` which is not available. Available metrics are: .*damping.*loss"):
        fit(model, [keras.callbacks.EarlyStopping("val_los", mode="min")])


@pytest.mark.slow
def test_several_updates_in_one_execution_are_those_of_one_each():
    data = tf.data.Dataset.from_tensors((np.tile(X, (5, 1)), np.tile(Y, (5, 1)))).repeat(4)
    several, single = make(steps_per_execution=2), make()
    several.set_weights(single.get_weights())
    for model in (several, single):
        model.fit(data, callbacks=[ConstantDamping()], verbose=0)
        assert int(model.optimizer.iterations) == 4
    for one, other in zip(several.get_weights(), single.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
