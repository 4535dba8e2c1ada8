"""What `benchmarks/validation.py` says of a run: the model that validation finds best, the one that early stopping keeps, and a table of them."""

import types

import keras
import numpy as np
import pytest
from training import Clock

from benchmarks import validation
from benchmarks.validation import Problem


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A second passes whenever the processor's clock is read."""
    seconds = Clock(step=1.0)
    monkeypatch.setattr(validation, "time", types.SimpleNamespace(process_time=seconds.perf_counter))


def line(seed):
    """A straight line with noise, a network of two weights."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 1))
    y = 2 * x + 0.5 * rng.normal(size=x.shape)
    return Problem(
        lambda: validation.dense(1, (1, None)), "mse", validation.split(x, y, 30, 15), validation.squares, scale=100.0
    )


def rows_of(monkeypatch, method, seconds=5.5, **arguments):
    monkeypatch.setitem(validation.PROBLEMS, "line", line)
    return validation.train("line", method, 1, seconds, **arguments)


def only(rows, event):
    (row,) = (row for row in rows if row["event"] == event)
    return row


@pytest.mark.parametrize("method", ["hf evidence", "adam 0.01"])
def test_a_run_ends_with_the_best_model_the_one_kept_and_the_last(monkeypatch, method):
    rows = rows_of(monkeypatch, method)
    looks = [row for row in rows if row["event"] == "look"]
    best, kept, end = rows[-3:]
    assert [row["event"] for row in (best, kept, end)] == ["best", "kept", "end"]
    assert all(float(best["validation"]) <= float(row["validation"]) for row in (*looks, kept, end))
    # The first epoch does not count.
    assert (looks[0]["seconds"], end["seconds"]) == ("0", "6")
    assert {key: looks[-1][key] for key in ("updates", "test")} == {key: end[key] for key in ("updates", "test")}
    assert np.isfinite(float(end["decay"])) == (method == "hf evidence")


def test_decays_of_the_grid_are_divided_by_the_scale(monkeypatch):
    found = []
    compile_model = validation.HFModel.compile
    monkeypatch.setattr(
        validation.HFModel,
        "compile",
        lambda self, optimizer, *rest: (found.append(optimizer.weight_decay), compile_model(self, optimizer, *rest)),
    )
    rows_of(monkeypatch, "hf 0.01", seconds=0.5)
    assert found == [pytest.approx(1e-4)]


def test_early_stopping_keeps_the_best_model_before_ten_looks_without_a_better_one():
    losses = [3.0, 1.0, *[2.0] * 10, 0.5]
    network = validation.dense(1, (1, None))
    watch = validation.Watch(line(0), network, 1e9)
    watch.set_model(network)
    monkeypatched = iter(losses)
    watch._filled = lambda row, weights: {**row, "weight": float(weights[0][0, 0])}
    for number, _ in enumerate(losses):
        network.layers[0].kernel.assign([[number]])
        watch._losses = lambda part: (next(monkeypatched), 0.0)
        watch.on_train_batch_end(0, {"num_cases": 30})
        watch.on_epoch_end(number)
    best, kept, end = watch.rows()[-3:]
    assert (best["weight"], kept["weight"], end["weight"]) == (12, 1, 12)
    assert (best["updates"], kept["updates"]) == (13, 12)


def row(method, event, seed=1, **values):
    values = {"validation": 1.0, "test": 1.0, "error": 1.0, "seconds": 1.0, **values}
    return {
        "dataset": "line",
        "method": method,
        "seed": str(seed),
        "event": event,
        **{k: str(v) for k, v in values.items()},
    }


def test_validation_chooses_among_a_grid_on_each_seed():
    table = [
        row(method, event, seed, validation=validation_loss, test=test)
        for method, seed, validation_loss, test in (
            ("hf 0.001", 1, 0.5, 7.0),
            ("hf 0.01", 1, 0.4, 5.0),
            ("hf 0.001", 2, 0.2, 3.0),
            ("hf 0.01", 2, 0.3, 9.0),
        )
        for event in ("best", "kept", "end")
    ]
    assert validation.best_of(table, "line", 1, ["hf 0.001", "hf 0.01"]) == "hf 0.01"
    assert validation.best_of(table, "line", 1, ["adam 0.01"]) is None
    text = validation.markdown(table)
    assert "| line | with a decay chosen by validation | 0.3, 1 | 4, 1 | 4 | 1, 1 |" in text
    looks = [row("hf 0.01", "look", seconds=seconds, test=5.0 / seconds) for seconds in (1.0, 2.0)]
    (panel,) = validation.draw([*looks, *table]).axes
    np.testing.assert_array_equal(panel.lines[0].get_xydata(), [[1, 5], [2, 2.5]])


def test_pairs_in_the_wrong_order_are_counted():
    y, z = np.array([[0], [1], [0], [1]]), np.array([[0.1], [0.3], [0.4], [0.9]])
    # One of four pairs of a positive and a negative case.
    assert validation.misranked(y, z) == pytest.approx(0.25)
    assert validation.misclassified(y, np.hstack([1 - z, z])) == pytest.approx(0.25)


def test_parts_are_standardized_by_that_for_training():
    x = np.random.default_rng(0).normal(3, 5, size=(50, 2))
    (training, same), *_, (_, test) = validation.split(x, x, 30, 10, of_targets=False)
    np.testing.assert_allclose(training.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(training.std(0), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.concatenate([same, test]), np.concatenate([x[:30], x[40:]]))


@pytest.mark.parametrize("name", ["regression", "tanh", "rare", "text"])
def test_data_sets_are_the_same_for_a_seed_and_their_parts_have_no_case_in_common(name):
    one, other = validation.PROBLEMS[name](3), validation.PROBLEMS[name](3)
    for part, same in zip(one.parts, other.parts, strict=True):
        np.testing.assert_array_equal(part[0], same[0])
        assert len(part[0]) == len(part[1]) and np.isfinite(part[0]).all()
    network = one.build()
    assert isinstance(network, keras.Model) and np.isfinite(
        one.error(one.parts[2][1], network.predict(one.parts[2][0], verbose=0))
    )
