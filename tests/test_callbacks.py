"""Keras' own callbacks on an `HFModel`: what they read, what they stop, what they write."""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import assert_equal, assert_same, fit, renewed, small_network, trainable

from keras_hf import ConstantDamping, EmpiricalFisherDiagonal, LevenbergMarquardt

X = np.random.default_rng(0).normal(size=(60, 3)).astype("float32")
Y = np.sin(2 * X[:, :2])
SCALARS = {"loss", "damping", "reduction_ratio", "cg_iterations", "step_size"}


def make(steps_per_execution=1):
    return trainable(
        small_network(2, num_inputs=3, units=6),
        preconditioner=EmpiricalFisherDiagonal(),
        growing_batch=None,
        compile_arguments={"steps_per_execution": steps_per_execution},
    )


@pytest.fixture
def model():
    return renewed(make)


def fit_with(model, *callbacks, epochs=3, x=X, **arguments):
    return fit(model, x, Y, epochs=epochs, callbacks=[*callbacks, LevenbergMarquardt()], **arguments)


def test_a_csv_logger_and_tensor_board_write_what_the_history_holds(model, tmp_path):
    writers = [
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.TensorBoard(tmp_path, update_freq="epoch", write_graph=False),
    ]
    history = fit_with(model, *writers, validation_data=(X[:20], Y[:20]))
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"val_loss", *SCALARS} <= set(rows[0])
    for key, values in history.items():
        assert [float(row[key]) for row in rows] == pytest.approx(values)
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
    assert len(fit_with(model, remember, stopping, epochs=9)["loss"]) == 3
    assert_equal(best[0], model.get_weights())


def test_training_ends_where_the_loss_is_no_number_and_the_weights_stay(model):
    before = model.get_weights()
    with pytest.warns(UserWarning, match="60 of the cases of the batch"):
        history = fit_with(model, keras.callbacks.TerminateOnNaN(), x=np.full_like(X, np.nan))
    assert len(history["loss"]) == 1 and np.isnan(history["loss"][0])
    assert_equal(before, model.get_weights())


def test_a_callback_that_lowers_the_learning_rate_is_told_that_there_is_none(model):
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=100.0)
    with pytest.warns(UserWarning, match="has no learning rate: it reads as 1. Received: learning_rate=0.5"):
        fit_with(model, plateau)
    assert float(model.optimizer.learning_rate) == 1.0


def test_a_callback_of_ones_own_may_lower_the_damping_on_a_plateau(model):
    class Plateau(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.optimizer.damping.assign(0.5 * logs["damping"])

    history = fit(model, X, Y, epochs=3, callbacks=[Plateau(), ConstantDamping()])
    np.testing.assert_allclose(history["damping"], [0.1, 0.05, 0.025], rtol=1e-6)


def test_a_monitor_that_is_no_log_is_named(model):
    with pytest.raises(ValueError, match="monitor=val_los"):
        fit_with(model, keras.callbacks.EarlyStopping("val_los"))
    with pytest.warns(UserWarning, match="`val_los` which is not available. Available metrics are: .*damping.*loss"):
        fit_with(model, keras.callbacks.EarlyStopping("val_los", mode="min"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:An update on 60 cases")
def test_several_updates_in_one_execution_are_those_of_one_each(model):
    several = make(steps_per_execution=2)
    several.set_weights(model.get_weights())
    data = tf.data.Dataset.from_tensors((X, Y)).repeat(4)
    for each in (several, model):
        fit(each, data, callbacks=[ConstantDamping()])
        assert int(each.optimizer.iterations) == 4
    assert several.num_traces == 1
    assert_same(several.get_weights(), model.get_weights(), rtol=1e-7, atol=1e-6)
