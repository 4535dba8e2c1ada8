import json
import math

import keras
import numpy as np
import pytest

from keras_hf import (
    ConjugateGradient,
    ConstantDamping,
    EmpiricalFisherDiagonal,
    HessianFree,
    HFModel,
    LevenbergMarquardt,
    UpdateRecorder,
    read_updates,
)
from keras_hf.recorder import update_cost

X = np.random.default_rng(0).normal(size=(60, 3)).astype("float32")
Y = np.sin(2 * X[:, :2])


def make(**arguments):
    model = HFModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(2)]))
    solver = ConjugateGradient(EmpiricalFisherDiagonal(), max_iterations=12)
    optimizer = HessianFree(0.01, solver, growing_batch=None, seed=0)
    model.compile(optimizer=optimizer, loss="mse", **arguments)
    return model


def fit(model, recorder, epochs):
    return model.fit(X, Y, epochs=epochs, callbacks=[recorder, LevenbergMarquardt()], verbose=0).history


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model after four updates, the file of its recorder, and its history."""
    path = tmp_path_factory.mktemp("recorder") / "updates.jsonl"
    model = make()
    return model, path, fit(model, UpdateRecorder(path), 4)


def test_a_line_holds_the_logs_of_its_update(run):
    _, path, history = run
    records = read_updates(path)
    assert [record["update"] for record in records] == [1, 2, 3, 4]
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert np.all(np.diff([record["seconds"] for record in records]) > 0)
    for key, values in history.items():
        assert [record[key] for record in records] == values


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
    records = read_updates(path)
    for record, following in zip(records, records[1:], strict=False):
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


def test_cost_counts_passes_over_cases(run):
    record = read_updates(run[1])[0]
    num_losses = sum(loss is not None for loss in record["trace"]["losses"]) + record["trace"]["num_cuts"]
    # Besides those of the iterations, a product for the start and one for the ratio.
    expected = 60 * (1 + 4 / 3 * (record["cg_iterations"] + 2) + num_losses / 3)
    assert record["cost"] == pytest.approx(expected)


def test_cost_of_an_update_is_of_its_products_on_the_chunk_and_the_losses_it_looked_at(run):
    trace = {"losses": [math.nan, 3.0, math.inf], "num_cuts": 1, "num_products": 5}
    assert update_cost(trace, 60) == pytest.approx(60 * (1 + 5 * 4 / 3 + 3 / 3))
    assert update_cost(trace, 60, curvature_batch_size=15) == pytest.approx(60 * (1 + 3 / 3) + 15 * 5 * 4 / 3)
    assert update_cost(trace, 60, curvature_batch_size=100) == update_cost(trace, 60, curvature_batch_size=60)
    model, path, _ = run
    last = read_updates(path)[-1]
    assert update_cost(last["trace"], 60) == update_cost(model.last_trace, 60) == last["cost"]


def test_a_resumed_run_drops_the_lines_of_updates_made_again(run, tmp_path):
    model, path, _ = run
    lines = path.read_text().splitlines()
    resumed = tmp_path / "updates.jsonl"
    # A crash in the fourth update's line, after more updates than the file of weights knew.
    ahead = {**json.loads(lines[3]), "update": 5}
    resumed.write_text("\n".join([*lines[:3], lines[3], json.dumps(ahead), lines[3][:50]]))
    fit(model, UpdateRecorder(resumed, append=True), 2)
    records = read_updates(resumed)
    assert [record["update"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [json.dumps(record) for record in records[:4]] == lines
    assert records[4]["seconds"] > records[3]["seconds"]
    fit(model, UpdateRecorder(resumed), 1)
    assert [record["update"] for record in read_updates(resumed)] == [7]


def test_a_callback_may_bring_back_the_run_after_the_recorder_has_begun(run, tmp_path):
    model, path, _ = run
    (tmp_path / "u.jsonl").write_text(path.read_text())

    class Restoring(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.optimizer.iterations.assign(2)

    before = model.optimizer.iterations.numpy()
    callbacks = [UpdateRecorder(tmp_path / "u.jsonl", append=True), Restoring(), ConstantDamping()]
    model.optimizer.iterations.assign(0)
    model.fit(X, Y, callbacks=callbacks, verbose=0)
    model.optimizer.iterations.assign(before)
    assert [record["update"] for record in read_updates(tmp_path / "u.jsonl")] == [1, 2, 3]


def test_another_fit_goes_on_with_the_file(run, tmp_path):
    (model, *_), recorder = run, UpdateRecorder(tmp_path / "updates.jsonl")
    before = int(model.optimizer.iterations.numpy())
    fit(model, recorder, 1)
    fit(model, recorder, 1)
    assert [record["update"] for record in read_updates(recorder.path)] == [before + 1, before + 2]


def test_numbers_that_are_none_are_read_back(run, tmp_path):
    model, *_ = run
    with pytest.warns(UserWarning, match="60 of the 60 cases"):
        model.fit(X * np.nan, Y, callbacks=[UpdateRecorder(tmp_path / "u.jsonl"), ConstantDamping()], verbose=0)
    (record,) = read_updates(tmp_path / "u.jsonl")
    assert math.isnan(record["loss"]) and record["step_size"] == 0


def test_models_that_it_cannot_record_are_refused(tmp_path):
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    plain.compile(loss="mse")
    with pytest.raises(ValueError, match="records the updates of an `HFModel`"):
        plain.fit(X, Y, callbacks=[UpdateRecorder(tmp_path / "u.jsonl")], verbose=0)
    with pytest.raises(ValueError, match="must see every update. Received: steps_per_execution=2"):
        make(steps_per_execution=2).fit(
            X, Y, callbacks=[UpdateRecorder(tmp_path / "u.jsonl"), ConstantDamping()], verbose=0
        )


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "u.jsonl").write_text("loss,damping\n1,2\n")
    with pytest.raises(ValueError, match="Line 1 of .*u.jsonl is no record of an update.*Received: 'loss,damping'"):
        read_updates(tmp_path / "u.jsonl")
