"""What a file of updates promises: a line for every update, also of a run that goes on, and what the update cost."""

import itertools
import json
import math
import types

import keras
import numpy as np
import pytest
from problems import hessian_free
from training import fit, small_network

from keras_hf import ConstantDamping, EmpiricalFisherDiagonal, HFModel, LevenbergMarquardt, UpdateRecorder, read_updates
from keras_hf.callbacks import recorder
from keras_hf.callbacks.recorder import update_cost

X = np.random.default_rng(0).normal(size=(60, 3)).astype("float32")
Y = np.sin(2 * X[:, :2])


def make(**arguments):
    model = HFModel(small_network(2, num_inputs=3, units=6))
    optimizer = hessian_free(0.01, EmpiricalFisherDiagonal(), max_iterations=12, growing_batch=None, seed=0)
    model.compile(optimizer, "mse", **arguments)
    return model


def recorded(model, path, epochs=1, callbacks=(), x=X, **arguments):
    """Records some updates, and returns their history."""
    recorder = UpdateRecorder(path, **arguments)
    return fit(model, x, Y, epochs=epochs, callbacks=[recorder, *callbacks, LevenbergMarquardt()])


@pytest.fixture(scope="module", autouse=True)
def clock():
    """From one look at it to the next 7 seconds pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "time", types.SimpleNamespace(perf_counter=itertools.count(100.0, 7.0).__next__))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model after four updates, the file of its recorder, and its history."""
    path = tmp_path_factory.mktemp("recorder") / "updates.jsonl"
    model = make()
    return model, path, recorded(model, path, 4)


def numbers(path):
    """Those of the updates in a file."""
    return [record["update"] for record in read_updates(path)]


def test_a_line_holds_the_logs_of_its_update(run):
    _, path, history = run
    records = read_updates(path)
    assert numbers(path) == [1, 2, 3, 4]
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert [record["seconds"] for record in records] == [7.0, 14.0, 21.0, 28.0]
    # `loss` of an epoch is Keras' mean, which a file of updates has no use for.
    history = {**history, "loss": history["update_loss"]}
    for key, values in history.items():
        assert key == "update_loss" or [record[key] for record in records] == values


def test_the_trace_is_that_of_conjugate_gradients(run):
    _, path, _ = run
    for record in read_updates(path):
        trace = record["trace"]
        assert len(trace["course"]) == record["cg_iterations"] + 1
        # The quadratic falls in every iteration, but for rounding.
        assert np.all(np.diff(trace["course"]) <= 1e-6 * abs(trace["course"][-1]))
        assert trace["iterate_numbers"][-1] == record["cg_iterations"] and record["cg_step"] in trace["iterate_numbers"]
        assert record["step_size"] == pytest.approx(0.8 ** trace["num_cuts"])


def test_the_losses_are_those_that_backtracking_saw(run):
    _, path, _ = run
    for record, following in itertools.pairwise(read_updates(path)):
        trace = record["trace"]
        looked_at = [
            number for number, loss in zip(trace["iterate_numbers"], trace["losses"], strict=True) if loss is not None
        ]
        # From the last one back to the one before the chosen, or to the first.
        assert looked_at == trace["iterate_numbers"][-len(looked_at) :] and len(looked_at) >= 1
        chosen = trace["losses"][trace["iterate_numbers"].index(record["cg_step"])]
        assert chosen == min(loss for loss in trace["losses"] if loss is not None)
        if trace["num_cuts"] == 0:
            assert following["loss"] == pytest.approx(chosen, rel=1e-5)


def test_cost_of_an_update_is_of_its_products_on_the_chunk_and_the_losses_it_looked_at(run):
    trace = {"losses": [math.nan, 3.0, math.inf], "num_cuts": 1, "num_products": 5}
    assert update_cost(trace, 60) == pytest.approx(60 * (1 + 5 * 4 / 3 + 3 / 3))
    assert update_cost(trace, 60, curvature_batch_size=15) == pytest.approx(60 * (1 + 3 / 3) + 15 * 5 * 4 / 3)
    assert update_cost(trace, 60, curvature_batch_size=100) == update_cost(trace, 60, curvature_batch_size=60)
    model, path, _ = run
    first, *_, last = read_updates(path)
    assert update_cost(last["trace"], 60) == update_cost(model.last_trace, 60) == last["cost"]
    num_losses = sum(loss is not None for loss in first["trace"]["losses"]) + first["trace"]["num_cuts"]
    # Besides those of the iterations, a product for the start and one for the ratio.
    assert first["cost"] == pytest.approx(60 * (1 + 4 / 3 * (first["cg_iterations"] + 2) + num_losses / 3))


def test_a_run_that_goes_on_drops_the_lines_of_updates_made_again_and_another_fit_goes_on_with_the_file(run, tmp_path):
    model, path, _ = run
    lines = path.read_text().splitlines()
    resumed = tmp_path / "updates.jsonl"
    # A crash in the fourth update's line, after more updates than the file of weights knew.
    ahead = {**json.loads(lines[3]), "update": 5}
    resumed.write_text("\n".join([*lines[:3], lines[3], json.dumps(ahead), lines[3][:50]]))
    recorded(model, resumed, 2)
    records = read_updates(resumed)
    assert numbers(resumed) == [1, 2, 3, 4, 5, 6]
    assert [json.dumps(record) for record in records[:4]] == lines
    assert [record["seconds"] for record in records[3:]] == [28.0, 35.0, 42.0]
    # A new file, for both calls of `fit`.
    same = UpdateRecorder(resumed, append=False)
    for _ in range(2):
        fit(model, X, Y, callbacks=[same, ConstantDamping()])
    assert numbers(resumed) == [7, 8]


def test_another_recorder_goes_on_with_the_file_and_a_run_from_new_weights_replaces_it(run, tmp_path):
    path, (model, *_) = tmp_path / "u.jsonl", run
    before = int(model.optimizer.iterations.numpy())
    for _ in range(2):
        recorded(model, path)
    assert numbers(path) == [before + 1, before + 2]
    model.optimizer.iterations.assign(0)
    recorded(model, path)
    model.optimizer.iterations.assign(before + 3)
    assert numbers(path) == [1]


def test_a_callback_may_bring_back_the_run_after_the_recorder_has_begun(run, tmp_path):
    model, path, _ = run
    (tmp_path / "u.jsonl").write_text(path.read_text())

    class Restoring(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.optimizer.iterations.assign(2)

    before = model.optimizer.iterations.numpy()
    model.optimizer.iterations.assign(0)
    recorded(model, tmp_path / "u.jsonl", callbacks=[Restoring()])
    model.optimizer.iterations.assign(before)
    assert numbers(tmp_path / "u.jsonl") == [1, 2, 3]


def test_numbers_that_are_none_are_read_back(run, tmp_path):
    with pytest.warns(UserWarning, match="60 of the cases of the batch"):
        recorded(run[0], tmp_path / "u.jsonl", x=X * np.nan)
    (record,) = read_updates(tmp_path / "u.jsonl")
    assert math.isnan(record["loss"]) and record["step_size"] == 0


def test_models_that_it_cannot_record_are_refused(tmp_path):
    plain = small_network(2, num_inputs=3)
    plain.compile(loss="mse")
    with pytest.raises(ValueError, match="records the updates of an `HFModel`"):
        fit(plain, X, Y, callbacks=[UpdateRecorder(tmp_path / "u.jsonl")])
    with pytest.raises(ValueError, match="must see every update. Received: steps_per_execution=2"):
        recorded(make(steps_per_execution=2), tmp_path / "u.jsonl")


def test_a_file_of_something_else_is_refused(run, tmp_path):
    (tmp_path / "u.jsonl").write_text("loss,damping\n1,2\n")
    for read in (read_updates, lambda path: recorded(run[0], path)):
        with pytest.raises(ValueError, match="Line 1 of .*u.jsonl is no record of an update.*Received: 'loss,damping'"):
            read(tmp_path / "u.jsonl")
    assert (tmp_path / "u.jsonl").read_text() == "loss,damping\n1,2\n"
