import contextlib
import csv
import math
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

from examples import autoencoder, baselines, experiments, pinn, runs_to_read
from examples.tables import read_rows
from keras_hf import read_updates


def tiny_network():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])


def recorder(network, path, **limits):
    x = np.random.default_rng(0).normal(size=(30, 4)).astype("float32")
    return baselines.Recorder(network, x, x[:10], path, **{"max_seconds": 60.0, "max_updates": 40, **limits})


@pytest.mark.parametrize(("dataset", "num_weights"), [("curves", 842_340), ("mnist", 2_837_314), ("faces", 7_537_655)])
def test_full_networks_have_the_published_number_of_weights(dataset, num_weights):
    setting = autoencoder.SETTINGS[dataset, "full"]
    network = autoencoder.build_autoencoder(setting.widths, l2=0.0, seed=0, num_pixels=setting.num_pixels)
    assert network.count_params() == num_weights


def test_only_the_code_layer_is_linear():
    network = autoencoder.build_autoencoder((5, 4, 3), l2=0.0, seed=0)
    layers = [(layer.units, layer.activation.__name__) for layer in network.layers]
    assert layers == [(5, "sigmoid"), (4, "sigmoid"), (3, "linear"), (4, "sigmoid"), (5, "sigmoid"), (784, "sigmoid")]


def test_outputs_of_real_numbers_are_linear_too():
    network = autoencoder.build_autoencoder((5, 3), l2=0.0, seed=0, num_pixels=25, linear_output=True)
    layers = [(layer.units, layer.activation.__name__) for layer in network.layers]
    assert layers == [(5, "sigmoid"), (3, "linear"), (5, "sigmoid"), (25, "linear")]


def test_a_seed_fixes_the_weights_and_layers_differ():
    first, same, other = (
        autoencoder.build_autoencoder((20, 20, 20), l2=0.0, seed=seed).get_weights() for seed in (0, 0, 1)
    )
    for a, b in zip(first, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(first[0] != other[0])
    assert np.any(first[2] != first[4])


def test_penalty_is_half_the_squared_norm_of_all_weights():
    network = autoencoder.build_autoencoder((5, 3), l2=0.1, seed=0)
    for layer in network.layers:
        layer.bias.assign(keras.ops.ones_like(layer.bias))
    norm = sum(np.square(weights).sum() for weights in network.get_weights())
    assert float(sum(network.losses)) == pytest.approx(0.05 * norm, rel=1e-6)


def test_losses_sum_over_pixels():
    rng = np.random.default_rng(0)
    y_true, y_pred = rng.uniform(0.1, 0.9, (2, 3, 784))
    entropy = -(y_true * np.log(y_pred) + (1 - y_true) * np.log(1 - y_pred)).sum(axis=1)
    np.testing.assert_allclose(autoencoder.cross_entropy(y_true, y_pred), entropy, rtol=1e-5)
    np.testing.assert_allclose(autoencoder.squared_error(y_true, y_pred), ((y_true - y_pred) ** 2).sum(axis=1))


def test_reconstruction_error_is_the_same_in_parts():
    network, x = tiny_network(), np.random.default_rng(0).normal(size=(30, 4)).astype("float32")
    expected = np.square(x @ network.layers[0].kernel.numpy() - x).sum(axis=1).mean()
    for batch_size in (7, 100):
        assert baselines.reconstruction_error(network, x, batch_size) == pytest.approx(expected, rel=1e-5)


def test_nesterov_momentum_follows_its_schedule():
    weight = keras.Variable(1.0)
    optimizer = baselines.NesterovMomentum(0.1, max_momentum=0.7)
    optimizer.build([weight])
    expected, velocity = 1.0, 0.0
    for update, momentum in ((0, 0.5), (249, 0.5), (250, 0.7), (750, 0.7)):  # 1 - 1/4 and 1 - 1/8 are above 0.7.
        optimizer.iterations.assign(update)
        gradient = 2 * float(weight.numpy())
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [weight])
        velocity = momentum * velocity - 0.1 * gradient
        expected += momentum * velocity - 0.1 * gradient
        assert float(weight.numpy()) == pytest.approx(expected, rel=1e-5)


def fit_baseline(name, network, record):
    """Trains by a baseline with its settings for the demo; returns the optimizer."""
    baseline, x = baselines.BASELINES[name], record.x_train
    optimizer = baseline.optimizer(baseline.learning_rates["demo"])
    baselines.fit_compiled(
        network, optimizer, keras.losses.mean_squared_error, x, x, baseline.batch_size, record, baseline.cosine_decay
    )
    return optimizer


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_every_baseline_learns_and_ends_after_its_updates(name, tmp_path):
    network = tiny_network()
    record = recorder(network, tmp_path / "run.csv")
    fit_baseline(name, network, record)
    assert record.rows[0]["update"] == 0
    assert record.rows[-1]["update"] == 40
    assert record.rows[-1]["train_error"] < record.rows[0]["train_error"]


def test_every_method_has_a_label():
    assert {*autoencoder.METHODS, *pinn.METHODS} == set(baselines.LABELS)


@pytest.mark.parametrize(("max_seconds", "end"), [(4.0, "2/4"), (math.inf, "40/40")])
def test_a_bar_goes_over_the_seconds_or_where_they_have_no_end_over_the_updates(max_seconds, end, tmp_path, capsys):
    network = tiny_network()
    with mock.patch.object(baselines.time, "perf_counter", return_value=0.0) as clock:
        record = recorder(network, tmp_path / "run.csv", max_seconds=max_seconds)
        record.begin([])
        for update, clock.return_value in ((10, 0.0), (40, 2.0)):
            record.after_update(update, {})
    last = capsys.readouterr().out.split("\r")[-1]
    assert end in last and last.endswith(
        f" - update: 40 - train_error: {record.rows[-1]['train_error']:.3g}"
        f" - test_error: {record.rows[-1]['test_error']:.3g}\n"
    )


def test_training_ends_when_the_time_is_up(tmp_path):
    network = tiny_network()
    record = recorder(network, tmp_path / "run.csv", max_seconds=0.2, max_updates=10**6)
    optimizer = fit_baseline("adam", network, record)
    assert 0.2 <= record.rows[-1]["seconds"] < 2
    # The cosine has come down with the time.
    assert float(optimizer.learning_rate) < 1e-3


def test_the_file_holds_the_rows(tmp_path):
    network = tiny_network()
    record = recorder(network, tmp_path / "run.csv", interval=0.01)
    fit_baseline("nag", network, record)
    assert read_rows(record.path) == record.rows


def test_cost_of_steps_on_batches_is_their_share_of_the_cases(tmp_path):
    network = tiny_network()
    record = recorder(network, tmp_path / "run.csv", log_names=("cost",))
    fit_baseline("nag", network, record)
    assert [row["cost"] for row in record.rows] == pytest.approx([row["update"] for row in record.rows])


def test_a_run_whose_file_was_removed_starts_anew(tmp_path):
    network, paths = tiny_network(), {"path": tmp_path / "run.csv", "state_path": tmp_path / "run.npz"}
    first = recorder(network, **paths)
    first.begin(network.trainable_variables)
    first.after_update(40, {})
    network.trainable_variables[0].assign_add(tf.ones([4, 4]))
    assert [row["update"] for row in first.rows] == [0, 40]
    again = recorder(network, **paths)
    again.begin(network.trainable_variables)
    assert [row["update"] for row in again.rows] == [0, 40]
    assert again.errors()["train_error"] == first.rows[-1]["train_error"]
    paths["path"].unlink()
    anew = recorder(network, **paths)
    anew.begin(network.trainable_variables)
    assert [row["update"] for row in anew.rows] == [0]


def test_the_clock_leaves_the_first_update_out_at_the_start_and_not_where_a_run_goes_on(tmp_path):
    network, paths = tiny_network(), {"path": tmp_path / "run.csv", "state_path": tmp_path / "run.npz"}
    with mock.patch.object(baselines.time, "perf_counter", return_value=0.0) as clock:
        first = recorder(network, **paths, max_seconds=5.0)
        first.begin(network.trainable_variables)
        for update, clock.return_value in ((1, 100.0), (2, 107.0)):
            first.after_update(update, {})
        again = recorder(network, **paths, max_seconds=11.0)
        clock.return_value = 1000.0
        again.begin(network.trainable_variables)
        for update, clock.return_value in ((3, 1003.0), (4, 1006.0)):
            again.after_update(update, {})
    assert again.rows == read_rows(paths["path"])
    assert b"\r" not in paths["path"].read_bytes()
    assert [(row["update"], row["seconds"]) for row in again.rows] == [(0, 0), (1, 0), (2, 7), (3, 10), (4, 13)]


class Stopped(Exception):
    pass


def train_tiny(method, updates, path, state_path=None, stop_after=None):
    """Trains, and breaks off after so many updates; returns the recorder."""
    keras.utils.set_random_seed(0)
    options = f"--dataset faces --method {method} --seconds 1000 --interval 0 --updates {updates} --damping 1"
    args = autoencoder.parse(options.split())
    layers = keras.layers.Dense(2, "tanh"), keras.layers.Dense(4)
    network = keras.Sequential([keras.Input((4,)), *layers])
    x = np.random.default_rng(0).random((20, 4), "float32")
    with contextlib.ExitStack() as stack:
        if stop_after is not None:
            stack.enter_context(pytest.raises(Stopped))
            stack.enter_context(mock.patch.object(baselines.Recorder, "after_update", _stop_after(stop_after)))
        return autoencoder.train(args, method, network, x, x, path, state_path)


def _stop_after(num_updates):
    after_update = baselines.Recorder.after_update

    def stopping(self, updates, logs):
        after_update(self, updates, logs)
        if updates >= num_updates:
            raise Stopped
        return self.is_over

    return stopping


@pytest.mark.slow
@pytest.mark.parametrize(("method", "updates"), [("hf", 8), ("recipe", 8), ("gd", 60), ("ncg", 8)])
def test_a_run_that_was_cut_short_goes_on_where_its_state_was_kept(method, updates, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines.Recorder, "STATE_INTERVAL", 0.0)
    paths = tmp_path / "run.csv", tmp_path / "run.npz"
    train_tiny(method, updates, *paths, stop_after=updates // 2)
    before = paths[0].read_text()
    whole = train_tiny(method, updates, *paths).rows
    assert paths[0].read_text().startswith(before)
    assert [row["update"] for row in whole] == sorted({row["update"] for row in whole})
    assert whole[-1]["update"] == updates
    for name in ("seconds", "cost"):
        course = [row[name] for row in whole]
        assert course == sorted(course)
    if method != "ncg":  # It has forgotten its last direction.
        straight = train_tiny(method, updates, tmp_path / "straight.csv").rows
        assert whole[-1]["train_error"] == pytest.approx(straight[-1]["train_error"], rel=1e-5)
        assert whole[-1]["cost"] == pytest.approx(straight[-1]["cost"])


@pytest.mark.slow
def test_experiments_are_made_once_go_on_and_are_tabled(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(autoencoder.SETTINGS, ("curves", "full"), autoencoder.Setting((8, 3), 50, None))
    monkeypatch.setitem(experiments.INTERVALS, "curves", 0.1)
    folders = f"--out {tmp_path / 'results'} --states {tmp_path / 'states'}"
    rows = "rand-hf pt-ncg nag"
    command = f"run --dataset curves --row {rows} --l2 0 2e-5 {folders} --seconds"
    experiments.main([*command.split(), "0.3"])
    paths = sorted((tmp_path / "results" / "curves").glob("*.csv"))
    assert len(paths) == 6
    first = [path.read_text() for path in paths]
    experiments.main([*command.split(), "0.3"])
    assert [path.read_text() for path in paths] == first
    experiments.main([*command.split(), "0.6"])
    assert all(path.read_text().startswith(text) for path, text in zip(paths, first, strict=True))
    assert all(read_rows(path)[-1]["seconds"] >= 0.6 for path in paths)
    # Both start where the machines have come to.
    starts = {path.stem: read_rows(path)[0]["train_error"] for path in paths}
    assert starts["pt-ncg-l2-0-seed0"] == starts["pt-ncg-l2-2e-05-seed0"] != starts["rand-hf-l2-0-seed0"]
    capsys.readouterr()
    experiments.main(f"table --dataset curves --out {tmp_path / 'results'}".split())
    table = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[:2] for line in table] == [
        [f"| {row}", l2] for l2 in ("0", "2e-05") for row in ("rand-hf", "pt-ncg", "nag")
    ]
    assert (tmp_path / "results" / "curves.png").stat().st_size > 0
    for limit in ("--seconds 0", "--cost 0"):
        experiments.main(f"table --dataset curves --out {tmp_path / 'results'} {limit}".split())
        table = capsys.readouterr().out.splitlines()[2:]
        assert [line.split(" | ")[6].split(", ")[0] for line in table] == [
            f"{starts[f'{row}-l2-{l2}-seed0']:.4g}" for l2 in ("0", "2e-05") for row in ("rand-hf", "pt-ncg", "nag")
        ]


@pytest.mark.slow
def test_the_example_writes_its_table_figures_and_trace(tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    arguments = f"--method hf adam --num-cases 50 --seconds 30 --updates 3 --out {tmp_path} --trace {trace}"
    autoencoder.main(arguments.split())
    printed = capsys.readouterr().out
    assert [line.split(" | ")[:3:2] for line in printed.splitlines()[-4:-2]] == [
        ["| Hessian-free (keras_hf)", "3"],
        ["| Adam", "10"],
    ]
    assert "Epoch" not in printed and " - update: 3 - train_error: " in printed
    for name in ("errors.png", "reconstructions.png", "adam.csv"):
        assert (tmp_path / name).stat().st_size > 0
    with open(trace, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["update"] for row in rows] == ["0", "1", "2", "3"]
    assert math.isnan(float(rows[0]["cg_iterations"]))
    iterations = [float(row["cg_iterations"]) for row in rows[1:]]
    assert [float(row["total_cg_iterations"]) for row in rows[1:]] == list(np.cumsum(iterations))
    errors = [float(row["train_error"]) for row in rows]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
def test_runs_to_read_are_recorded_tabled_and_drawn(tmp_path, capsys):
    arguments = f"--run small-batches --updates 2 --out {tmp_path} --images {tmp_path}"
    runs_to_read.main(arguments.split())
    updates = read_updates(tmp_path / "small-batches.jsonl")
    assert [update["num_cases"] for update in updates] == [20, 20]
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 |")]
    assert row.split(" | ")[1] == f"{updates[0]['loss']:.3g}"
    assert (tmp_path / "small-batches.png").stat().st_size > 0


@pytest.mark.slow
def test_other_methods_start_from_the_same_pretrained_weights(tmp_path, capsys):
    methods = ("standard", "lbfgs", "ncg", "trust-region", "momentum")
    arguments = f"--method {' '.join(methods)} --num-cases 50 --seconds 60 --updates 3 --pretrain 2 --out {tmp_path}"
    autoencoder.main(arguments.split())
    table = capsys.readouterr().out.splitlines()[-7:-2]
    assert [line.split(" | ")[0] for line in table] == [f"| {baselines.LABELS[method]}" for method in methods]
    starts = set()
    for method in methods:
        with open(tmp_path / f"{method}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        starts.add(rows[0]["train_error"])
        assert float(rows[-1]["train_error"]) < float(rows[0]["train_error"])
    assert len(starts) == 1


@pytest.mark.slow
def test_faces_are_reconstructed_by_squared_error(tmp_path, data_dir):
    faces = data_dir / "olivettifaces.mat"
    autoencoder.main(f"--dataset faces --data {faces} --num-cases 250 --method hf --updates 3 --out {tmp_path}".split())
    with open(tmp_path / "hf.csv", newline="") as file:
        errors = [float(row["train_error"]) for row in csv.DictReader(file)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 625  # The mean patch's.
