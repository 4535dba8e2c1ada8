"""What the comparisons with other libraries promise: the same weights, cases and losses for all, and files that say what they were made with."""

import argparse
import math
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import Clock, assert_equal

from benchmarks import rows as results
from benchmarks import time_to_error
from benchmarks.peers import fits, handover, minibatches, small_problems, timings
from examples import origins
from examples import pinn_problems as problems
from examples.tables import read_rows
from keras_hf import HFModel


def test_results_say_what_they_were_made_with(tmp_path):
    path = tmp_path / "folder" / "times.csv"
    results.write(path, [{"seconds": 1.5}, {"seconds": 2.0}])
    assert read_rows(path) == [{"seconds": 1.5}, {"seconds": 2.0}]
    (made,) = origins.read(path.parent)["times.csv"]
    assert made["versions"]["tensorflow"] == tf.__version__ and made["versions"]["numpy"] == np.__version__
    assert made["cores"] >= 1 and made["date"][:2] == "20" and made["command"].startswith("python ")
    assert set(made["versions"]) <= set(origins.LIBRARIES)


def test_rows_that_a_program_goes_on_from_keep_their_origin(tmp_path, monkeypatch):
    path, rows = tmp_path / "times.csv", [{"seconds": number} for number in range(7)]
    clock = iter(range(7))
    made = {"command": "python one.py"}
    monkeypatch.setattr(origins, "made_with", lambda: {"date": f"2026-01-0{next(clock)}", **made})
    results.write(path, rows[:2])
    assert origins.read(tmp_path)["times.csv"] == [{"date": "2026-01-00", **made}]
    results.write(path, rows[:3])
    one = {"date": "2026-01-00 to 2026-01-01", **made, "rows": "1-3"}
    assert origins.read(tmp_path)["times.csv"] == [one]
    made = {"command": "python other.py"}
    for num_rows in (5, 6):
        results.write(path, results.read(path) + rows[len(results.read(path)) : num_rows])
    other = {"date": "2026-01-02 to 2026-01-03", **made, "rows": "4-6"}
    assert origins.read(tmp_path)["times.csv"] == [one, other]
    results.write(path, rows[1:])  # Other rows: as many as before, and then more.
    results.write(path, rows[:1] * 7)
    assert origins.read(tmp_path)["times.csv"] == [{"date": "2026-01-05", **made}]


def test_an_origin_leaves_those_of_other_files_as_they_are(tmp_path):
    origins.keep(tmp_path, {"b.csv": [{"date": "1"}], "c.csv": [{"date": "2"}]})
    origins.keep(tmp_path, {"a.csv": [{"date": "3"}], "b.csv": [{"date": "4"}]})
    assert [*origins.read(tmp_path).items()] == [
        ("a.csv", [{"date": "3"}]),
        ("b.csv", [{"date": "4"}]),
        ("c.csv", [{"date": "2"}]),
    ]


def test_quick_changes_defaults_and_the_command_line_wins():
    def parsed(*arguments):
        parser = argparse.ArgumentParser()
        parser.add_argument("--cases", type=int, default=5000)
        parser.add_argument("--rounds", type=int, default=7)
        found = results.parse(parser, {"cases": 10, "rounds": 1}, arguments)
        return found.cases, found.rounds, found.csv

    assert parsed() == (5000, 7, None)
    assert parsed("--quick", "--csv", "a.csv") == (10, 1, "a.csv")
    assert parsed("--rounds", "3", "--quick") == (10, 3, None)


def test_a_network_is_handed_over_as_it_is(tmp_path):
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(2)])
    path = tmp_path / "folder" / "network.npz"
    handover.save(path, network.layers, x=np.ones((5, 3)), loss="squares")
    layers, arrays = handover.load(path)
    assert [layer.activation for layer in layers] == ["tanh", "linear"]
    assert sorted(arrays) == ["loss", "x"] and str(arrays["loss"]) == "squares"
    vector = handover.flat(layers)
    np.testing.assert_array_equal(vector, np.concatenate([weight.ravel() for weight in network.get_weights()]))
    parts = [array for pair in handover.split(vector, layers) for array in pair]
    assert_equal(parts, network.get_weights())


def test_a_peer_that_is_not_installed_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(handover, "ENVIRONMENTS", tmp_path)
    handover.run_all([("jax", "products_in_jax")])
    assert "`make peers` makes it" in capsys.readouterr().out


def test_a_peer_that_fails_is_named_once_the_others_have_run(tmp_path, monkeypatch):
    monkeypatch.setattr(handover, "ENVIRONMENTS", tmp_path)
    for environment, status in {"jax": 3, "torch": 0}.items():
        python = tmp_path / environment / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\necho $2 >> {tmp_path}/ran\nexit {status}\n")
        python.chmod(0o755)
    with pytest.raises(SystemExit, match="Failed: fits_in_jax."):
        handover.run_all([("jax", "fits_in_jax", 1), ("torch", "fits_in_torch")])
    assert (tmp_path / "ran").read_text().split() == ["benchmarks.peers.fits_in_jax", "benchmarks.peers.fits_in_torch"]


def test_what_peers_import_needs_no_tensorflow():
    modules = "benchmarks.rows, benchmarks.peers.handover, benchmarks.peers.small_problems, benchmarks.peers.timings"
    program = f"import sys; sys.modules.update(tensorflow=None, keras=None); import {modules}"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", fits.PROBLEMS)
def test_residuals_of_peers_are_ours(float64, tmp_path, name):
    problem, path = fits.PROBLEMS[name](), tmp_path / f"{name}-seed3.npz"
    fits.hand_over(problem, path, seed=3)
    layers, arrays = handover.load(path)
    network = problems.build(problem, 3)
    model = HFModel(network)
    model.compile(loss="mse")
    objective = model.objective(*problems.training_cases(problem, network, 3))
    weights = handover.flat(layers)
    np.testing.assert_array_equal(weights, objective.weights)
    ours = objective.residuals(weights)  # Half the sum of their squares is the loss.
    found = small_problems.residuals(np, weights, layers, arrays)
    np.testing.assert_allclose(np.sort(np.abs(found)), np.sort(np.abs(ours)) / math.sqrt(2), rtol=1e-9, atol=1e-15)
    assert (found**2).sum() == pytest.approx(float(arrays["loss"]), rel=1e-12)
    solution = small_problems.solution(np, weights, layers, arrays["test_points"])
    np.testing.assert_allclose(solution, network.solution(arrays["test_points"]).numpy(), atol=1e-12)


def test_a_fit_from_other_weights_is_refused(tmp_path):
    layer = keras.layers.Dense(1, "tanh")
    layer.build((None, 1))
    path = tmp_path / "sinc-seed0.npz"
    points = np.ones((2, 1))
    arrays = dict.fromkeys(("equation_points", "source"), np.zeros((0, 1)))
    handover.save(path, [layer, layer], **arrays, value_points=points, values=points, loss=-1.0)
    with pytest.raises(ValueError, match="loss at the start must be that of the file. Received"):
        small_problems.main(None, [str(path), "--seconds", "1", "--out", str(tmp_path)])


def test_the_course_of_a_fit_calls_for_updates_that_take_a_fraction_of_the_time_between_rows(monkeypatch):
    monkeypatch.setattr(small_problems, "time", clock := Clock())
    made = []

    def advance(count):
        # Of the second between two rows, a hundredth each; later a fifth.
        clock.now += count * (0.01 if clock.now < 30 else 0.2)
        made.append(count)
        return float(sum(made))

    rows = small_problems.course(advance, 0.0, lambda weights: {"loss": 1.0, "error": weights}, max_seconds=60.0)
    assert rows[0] == {"update": 0, "seconds": 0.0, "loss": 1.0, "error": 0.0}
    assert rows[-1]["seconds"] >= 60 and rows[-1]["update"] == sum(made) == rows[-1]["error"]
    assert made[:6] == [1, 2, 4, 8, 16, 32] and max(made) == 32 and made[-1] == 4
    ended = small_problems.course(advance, 0.0, lambda weights: {"loss": math.nan}, max_seconds=1.0)
    assert len(ended) == 1


def test_timings_of_every_file_are_in_one_table(tmp_path):
    layer = keras.layers.Dense(1)
    layer.build((None, 1))
    paths = [tmp_path / f"small-{cases}.npz" for cases in (2, 3)]
    for path, cases in zip(paths, (2, 3), strict=True):
        handover.save(path, [layer], x=np.ones((cases, 1)), v=np.ones(2))
    measure = lambda layers, arrays, rounds: [("A", 2.0, 3.0, 1e-7)]  # noqa: E731
    timings.main(measure, [*map(str, paths), "--csv", str(tmp_path / "a.csv")])
    header, *lines = (tmp_path / "a.csv").read_text().splitlines()
    assert header == "network,cases,weights,library,gradient_seconds,product_seconds,gradients,difference"
    assert lines == ["small,2,2,A,2.00000,3.00000,1.500,1.0e-07", "small,3,2,A,2.00000,3.00000,1.500,1.0e-07"]


def test_kfac_starts_from_the_weights_of_our_runs(tmp_path):
    problem = time_to_error.PROBLEMS["small-curves"]._replace(load=lambda seed: time_to_error.load_curves(20, seed))
    found = {}

    def fit(problem, setting, network, cases, recorder, seed):
        found["weights"], found["x_train"] = network.get_weights(), cases.x_train
        recorder.begin(network.variables)

    time_to_error.train(tmp_path / "run.csv", problem, fit, {"l2": 0.5}, 3, 0.1)
    minibatches.hand_over(problem, tmp_path / "start.npz", 3)
    layers, arrays = handover.load(tmp_path / "start.npz")
    np.testing.assert_array_equal(arrays["x_train"], found["x_train"])
    np.testing.assert_array_equal(handover.flat(layers), np.concatenate([w.ravel() for w in found["weights"]]))
