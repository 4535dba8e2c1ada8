"""What the example of recurrent networks promises: the same start for every method, files that tell the course, and toy problems solved."""

import math

import keras
import numpy as np
import pytest
from training import Clock, assert_equal

from examples import baselines, origins, recurrent
from examples.recurrent_problems import PROBLEMS
from examples.tables import read_rows
from keras_hf import DirectSolver, HessianFree, HFModel


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A second passes whenever a recorder looks at the clock: a run has the same updates on every machine."""
    monkeypatch.setattr(baselines, "time", Clock(step=1.0))


def run(tmp_path, options):
    """Runs the program on its options; returns the name of the one run, and its rows."""
    recurrent.main(["--results", str(tmp_path), *options.split()])
    (path,) = tmp_path.glob("*/*.csv")
    return path.stem, read_rows(path)


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


def recorder_of(name, tmp_path, *arguments):
    """A recorder of a tiny network that ends nothing by time, and the problem."""
    problem = PROBLEMS[name](4)
    network = recurrent.build_network(problem, recurrent.sequences(problem, 5, seed=0)[1], units=4)
    return problem, recurrent.SolvedRecorder(problem, network, tmp_path / "run.csv", math.inf, 10, *arguments)


@pytest.mark.parametrize("name, ends", [("memory-5", True), ("addition", False)])
def test_a_run_that_has_converged_ends_where_sequences_are_always_the_same(name, ends, tmp_path):
    problem, recorder = recorder_of(name, tmp_path, 0, recurrent.HF_LOGS)
    model = HFModel(recorder.network)
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
    _, recorder = recorder_of("memory-5", tmp_path)
    recorder.begin(recorder.network.variables)
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
    assert_equal(network.get_weights(), same.get_weights())


@pytest.mark.slow
@pytest.mark.parametrize("problem, method", [("memory-5", "hf"), ("addition", "exact")])
def test_a_toy_problem_is_solved_and_its_run_written(problem, method, tmp_path):
    options = f"--problem {problem} --length 6 --units 30 --methods {method} --updates 80 --seconds 200"
    name, rows = run(tmp_path, options)
    assert name == f"{method}-seed0" and rows[0]["wrong"] > 0.5 and rows[-1]["wrong"] < 0.01
    assert (tmp_path / f"{problem}-6" / "seed0.png").stat().st_size > 10_000


def test_exact_steps_are_left_out_where_every_step_has_outputs_and_runs_in_float64_have_names_of_their_own(
    tmp_path, monkeypatch, capsys
):
    built, build = [], recurrent.build_network
    monkeypatch.setattr(recurrent, "build_network", lambda *args: built.append(build(*args)) or built[-1])
    options = "--problem permutation --length 5 --units 4 --updates 1 --methods exact sgd --float64"
    name, _ = run(tmp_path, options)
    assert name == "sgd-0.001-float64-seed0"
    assert [*origins.read(tmp_path / "permutation-5")] == [f"{name}.csv"]
    assert "exact: left out" in capsys.readouterr().out
    assert {weight.dtype for weight in built[0].weights} == {"float64"} and keras.config.floatx() == "float32"


def test_methods_have_the_networks_and_updates_that_they_are_named_after(tmp_path, monkeypatch):
    trained = {}

    def no_training(model, **arguments):
        optimizer = model.optimizer
        layers = model.network.layers if isinstance(model, HFModel) else model.layers
        trained[method] = type(layers[-2]), type(optimizer), getattr(optimizer, "structural_damping", None)

    for kind in (keras.Model, HFModel):
        monkeypatch.setattr(kind, "fit", no_training)
    monkeypatch.setattr(recurrent.SolvedRecorder, "errors", lambda self: {})
    args = recurrent.parse("--problem temporal-order --length 10 --units 20 --weight 0.5".split())
    for method in recurrent.METHODS:
        recurrent.train(args, method, None if method in recurrent.LOGS else 1e-3, tmp_path / f"{method}.csv")
    assert trained["hf"][2].weight == 0.5
    plain, adam = keras.layers.SimpleRNN, keras.optimizers.Adam
    assert {method: found[:2] for method, found in trained.items()} == {
        **dict.fromkeys(["hf", "hf-plain", "exact"], (plain, HessianFree)),
        "adam": (plain, adam),
        "lstm": (keras.layers.LSTM, adam),
        "gru": (keras.layers.GRU, adam),
        "sgd": (plain, keras.optimizers.SGD),
        "nag": (plain, baselines.NesterovMomentum),
    }
    assert trained["hf-plain"][2] is trained["exact"][2] is None
    assert isinstance(recurrent.second_order(args, "exact").solver, DirectSolver)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:An update on")
@pytest.mark.parametrize("method, name", [("hf-plain", "hf-plain"), ("lstm", "lstm-0.001")])
def test_methods_make_their_updates(method, name, tmp_path):
    options = "--problem temporal-order --length 10 --units 20 --updates 10 --cases 20 --curvature-cases 10"
    run_name, rows = run(tmp_path, f"{options} --methods {method} --seconds 1000")
    assert run_name == f"{name}-seed0" and rows[-1]["update"] == 10 and np.isfinite(rows[-1]["loss"])


def test_figures_name_runs_in_words():
    names = "hf", "hf-plain", "adam-0.0003", "gru-1e-05-float64"
    found = [recurrent.label(name) for name in names]
    assert found == [
        "Hessian-free (keras_hf)",
        "the same without structural damping",
        "Adam, rate 0.0003",
        "a GRU by Adam, rate 1e-05, float64",
    ]
