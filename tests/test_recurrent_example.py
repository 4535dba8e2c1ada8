"""What the example of recurrent networks promises: the same start for every method, files that tell the course, and toy problems solved."""

import keras
import numpy as np
import pytest

from examples import recurrent
from examples.recurrent_problems import PROBLEMS
from examples.tables import read_rows
from keras_hf import HessianFree, HFModel


def arguments(tmp_path, *more):
    return recurrent.parse(["--results", str(tmp_path), "--units", "20", *more])


def test_streams_have_fresh_sequences_in_every_batch_and_few_ones_again():
    data, shape = recurrent.sequences(PROBLEMS["addition"](20), 5, seed=0)
    batches = [x.numpy() for x, _ in data.take(2)]
    assert batches[0].shape == (5, *shape) and (batches[0] != batches[1]).any()
    data, shape = recurrent.sequences(PROBLEMS["memory-5"](4), 5, seed=0)
    one, other = (x.numpy() for x, _ in data.take(2))
    assert one.shape == (32, *shape)
    np.testing.assert_array_equal(one, other)


def test_test_sequences_are_none_of_training(tmp_path):
    problem = PROBLEMS["addition"](20)
    data, shape = recurrent.sequences(problem, 50, seed=0)
    network = recurrent.build_network(problem, shape, units=4)
    recorder = recurrent.SolvedRecorder(problem, network, tmp_path / "run.csv", 1.0, 1)
    (x, _) = next(iter(data))
    assert len(recorder._x) == 10_000
    assert not {row.tobytes() for row in recorder._x} & {row.tobytes() for row in x.numpy()}


@pytest.mark.parametrize("name, ends", [("memory-5", True), ("addition", False)])
def test_a_run_that_has_converged_ends_where_sequences_are_always_the_same(name, ends, tmp_path):
    problem = PROBLEMS[name](4)
    network = recurrent.build_network(problem, recurrent.sequences(problem, 5, seed=0)[1], units=4)
    recorder = recurrent.SolvedRecorder(problem, network, tmp_path / "run.csv", 60.0, 10, 0, recurrent.HF_LOGS)
    model = HFModel(network)
    model.compile(HessianFree(), problem.loss)
    recorder.set_model(model)
    recorder.on_train_begin()
    logs = dict.fromkeys(recurrent.HF_LOGS, 1.0) | {"cg_iterations": 5, "converged": 0}
    recorder.on_train_batch_end(0, logs)
    assert not model.stop_training
    model.optimizer.iterations.assign(2)
    recorder.on_train_batch_end(1, logs | {"converged": 1})
    assert model.stop_training == ends and len(recorder.rows) == 1 + ends
    assert not ends or recorder.rows[-1]["total_cg_iterations"] == 10


def test_a_run_that_ends_by_itself_has_one_row_of_its_last_update(tmp_path):
    problem = PROBLEMS["memory-5"](4)
    network = recurrent.build_network(problem, recurrent.sequences(problem, 5, seed=0)[1], units=4)
    recorder = recurrent.SolvedRecorder(problem, network, tmp_path / "run.csv", 60.0, 10)
    recorder.begin(network.variables)
    recorder.interval = 0.0
    recorder.after_update(1, {})
    recorder.finish(1, {})
    assert recorder.is_over and [row["update"] for row in read_rows(tmp_path / "run.csv")] == [0, 1]


def test_weights_are_sparse_and_of_the_spectral_radius():
    network = recurrent.build_network(PROBLEMS["memory-20"](5), (26, 7), units=60, seed=3)
    kernels = {weight.path: weight.numpy() for weight in network.trainable_weights}
    recurrent_kernel = next(value for path, value in kernels.items() if "recurrent_kernel" in path)
    assert ((recurrent_kernel != 0).sum(0) == 15).all()
    assert np.abs(np.linalg.eigvals(recurrent_kernel)).max() == pytest.approx(1.1, rel=1e-4)
    assert not any("bias" in path for path in kernels) and any("initial_state" in path for path in kernels)
    same = recurrent.build_network(PROBLEMS["memory-20"](5), (26, 7), units=60, seed=3)
    for one, other in zip(network.get_weights(), same.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("problem, method", [("memory-5", "hf"), ("addition", "exact")])
def test_a_toy_problem_is_solved_and_its_run_written(problem, method, tmp_path):
    recurrent.main(
        [
            "--results",
            str(tmp_path),
            "--problem",
            problem,
            "--length",
            "6",
            "--units",
            "30",
            "--methods",
            method,
            "--updates",
            "80",
        ]
    )
    rows = read_rows(tmp_path / f"{problem}-6" / f"{method}-seed0.csv")
    assert rows[0]["wrong"] > 0.5 and rows[-1]["wrong"] < 0.01
    (result,) = recurrent.read_results(tmp_path / "results.csv")
    assert result["method"] == method and result["solved"] == "1" and float(result["updates"]) == rows[-1]["update"]
    assert (tmp_path / f"{problem}-6" / "seed0.png").stat().st_size > 10_000


def test_exact_steps_are_left_out_where_every_step_has_outputs(tmp_path, capsys):
    options = "--problem", "permutation", "--length", "5", "--units", "4", "--updates", "1", "--methods", "exact", "sgd"
    recurrent.main(["--results", str(tmp_path), *options])
    assert "exact: left out" in capsys.readouterr().out
    (result,) = recurrent.read_results(tmp_path / "results.csv")
    assert result["method"] == "sgd-0.001"


def test_a_run_in_float64_has_a_name_of_its_own(tmp_path, monkeypatch):
    built, build = [], recurrent.build_network
    monkeypatch.setattr(recurrent, "build_network", lambda *args: built.append(build(*args)) or built[-1])
    options = "--problem addition --length 5 --units 4 --updates 1 --methods sgd --float64".split()
    recurrent.main(["--results", str(tmp_path), *options])
    assert {weight.dtype for weight in built[0].weights} == {"float64"} and keras.config.floatx() == "float32"
    (result,) = recurrent.read_results(tmp_path / "results.csv")
    assert result["method"] == "sgd-0.001-float64"
    assert (tmp_path / "addition-5" / "sgd-0.001-float64-seed0.csv").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:An update on")
@pytest.mark.parametrize("method", [method for method in recurrent.METHODS if method != "hf"])
def test_every_method_runs(method, tmp_path):
    args = arguments(
        tmp_path,
        "--problem",
        "temporal-order",
        "--length",
        "10",
        "--updates",
        "10",
        "--cases",
        "20",
        "--curvature-cases",
        "10",
    )
    rate = None if method in recurrent.LOGS else 1e-3
    recorder = recurrent.train(args, method, rate, tmp_path / "run.csv")
    assert recorder.rows[-1]["update"] == 10 and np.isfinite(recorder.rows[-1]["loss"])
