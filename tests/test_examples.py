import math
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import Clock, assert_equal

from examples import autoencoder, baselines, experiments, pinn, runs_to_read
from examples.tables import read_rows
from keras_hf import read_updates


@pytest.fixture
def clock(monkeypatch):
    """The clock that ends runs, which stands still unless a test moves it."""
    monkeypatch.setattr(baselines, "time", clock := Clock())
    return clock


@pytest.fixture
def toys(monkeypatch):
    """Networks and data in a size that no test waits for."""
    for size in ("demo", "full"):
        monkeypatch.setitem(autoencoder.SETTINGS, ("curves", size), autoencoder.Setting((8, 3), 50, None))
    faces = autoencoder.Setting((8, 3), 250, None, num_pixels=625, is_real=True)
    monkeypatch.setitem(autoencoder.SETTINGS, ("faces", "demo"), faces)


def tiny_network():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])


def recorder(network, path, **limits):
    x = np.random.default_rng(0).normal(size=(30, 4)).astype("float32")
    return baselines.Recorder(network, x, x[:10], path, **{"max_seconds": math.inf, "max_updates": 40, **limits})


@pytest.mark.parametrize(("dataset", "num_weights"), [("curves", 842_340), ("mnist", 2_837_314), ("faces", 7_537_655)])
def test_full_networks_have_the_published_number_of_weights(dataset, num_weights):
    setting = autoencoder.SETTINGS[dataset, "full"]
    network = autoencoder.build_autoencoder(setting.widths, 0.0, 0, sparse=False, num_pixels=setting.num_pixels)
    assert network.count_params() == num_weights


@pytest.mark.parametrize(("linear_output", "last"), [(False, "sigmoid"), (True, "linear")])
def test_only_the_code_layer_is_linear_and_of_real_numbers_the_outputs(linear_output, last):
    network = autoencoder.build_autoencoder((5, 4, 3), 0.0, seed=0, num_pixels=25, linear_output=linear_output)
    layers = [(layer.units, layer.activation.__name__) for layer in network.layers]
    assert layers == [(5, "sigmoid"), (4, "sigmoid"), (3, "linear"), (4, "sigmoid"), (5, "sigmoid"), (25, last)]


def test_a_seed_fixes_the_weights_and_layers_differ():
    first, same, other = (
        autoencoder.build_autoencoder((20, 20, 20), l2=0.0, seed=seed).get_weights() for seed in (0, 0, 1)
    )
    assert_equal(first, same)
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


# Of Adam the learning rate falls with the time: 12 seconds, of which a call of ten steps takes two.
@pytest.mark.parametrize(
    ("name", "limits", "updates"),
    [("sgd", {}, 40), ("nag", {}, 40), ("adam", {"max_seconds": 12.0, "max_updates": 10**6}, 70)],
)
def test_baselines_learn_until_their_updates_or_their_time_is_over(name, limits, updates, clock, tmp_path):
    baseline, network, clock.step = baselines.BASELINES[name], tiny_network(), 1.0
    record = recorder(network, tmp_path / "run.csv", log_names=("cost",), **limits)
    rate, x = baseline.learning_rates["demo"], record.x_train
    optimizer, loss = baseline.optimizer(rate), keras.losses.mean_squared_error
    baselines.fit_compiled(network, optimizer, loss, x, x, baseline.batch_size, record, baseline.cosine_decay)
    assert [record.rows[place]["update"] for place in (0, -1)] == [0, updates]
    assert record.rows[-1]["train_error"] < record.rows[0]["train_error"]
    assert read_rows(record.path) == record.rows
    # All cases in every update: 200 are more than there are.
    assert [row["cost"] for row in record.rows] == pytest.approx([row["update"] for row in record.rows])
    assert (float(optimizer.learning_rate) < 0.1 * rate) == baseline.cosine_decay


def test_every_method_has_a_label():
    assert {*autoencoder.METHODS, *pinn.METHODS} == set(baselines.LABELS)


@pytest.mark.parametrize(("max_seconds", "end"), [(4.0, "2/4"), (math.inf, "40/40")])
def test_a_bar_goes_over_the_seconds_or_where_they_have_no_end_over_the_updates(
    max_seconds, end, clock, tmp_path, capsys
):
    record = recorder(tiny_network(), tmp_path / "run.csv", max_seconds=max_seconds)
    record.begin([])
    for update, clock.now in ((10, 0.0), (40, 2.0)):
        record.after_update(update, {})
    last, row = capsys.readouterr().out.split("\r")[-1].rstrip(), record.rows[-1]
    numbers = f"train_error: {row['train_error']:.3g} - test_error: {row['test_error']:.3g}"
    assert end in last and last.endswith(f" - update: 40 - {numbers}")


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


def test_the_clock_leaves_the_first_update_out_at_the_start_and_not_where_a_run_goes_on(clock, tmp_path):
    network, paths = tiny_network(), {"path": tmp_path / "run.csv", "state_path": tmp_path / "run.npz"}
    first = recorder(network, **paths, max_seconds=5.0)
    first.begin(network.trainable_variables)
    for update, clock.now in ((1, 100.0), (2, 107.0)):
        first.after_update(update, {})
    again = recorder(network, **paths, max_seconds=11.0)
    clock.now = 1000.0
    again.begin(network.trainable_variables)
    for update, clock.now in ((3, 1003.0), (4, 1006.0)):
        again.after_update(update, {})
    assert again.rows == read_rows(paths["path"])
    assert b"\r" not in paths["path"].read_bytes()
    assert [(row["update"], row["seconds"]) for row in again.rows] == [(0, 0), (1, 0), (2, 7), (3, 10), (4, 13)]


def train_tiny(method, updates, *paths):
    keras.utils.set_random_seed(0)
    options = f"--dataset faces --method {method} --seconds inf --interval 0 --updates {updates} --damping 1"
    layers = keras.layers.Dense(2, "tanh"), keras.layers.Dense(4)
    network = keras.Sequential([keras.Input((4,)), *layers])
    x = np.random.default_rng(0).random((20, 4), "float32")
    return autoencoder.train(autoencoder.parse(options.split()), method, network, x, x, *paths).rows


@pytest.mark.slow
@pytest.mark.parametrize(("method", "updates"), [("hf", 6), ("gd", 60), ("ncg", 8)])
def test_a_run_that_was_cut_short_goes_on_where_its_state_was_kept(method, updates, clock, tmp_path, monkeypatch):
    clock.step = 1.0
    monkeypatch.setattr(baselines.Recorder, "STATE_INTERVAL", 0.0)
    whole, cut_short = ([tmp_path / f"{name}.{kind}" for kind in ("csv", "npz")] for name in ("whole", "cut-short"))
    after_update = baselines.Recorder.after_update

    def copying(self, updates_so_far, logs):
        is_over = after_update(self, updates_so_far, logs)
        if updates_so_far == updates // 2:
            for path, copy in zip(whole, cut_short, strict=True):
                shutil.copy(path, copy)
        return is_over

    with monkeypatch.context() as patches:
        patches.setattr(baselines.Recorder, "after_update", copying)
        straight = train_tiny(method, updates, *whole)
    before = cut_short[0].read_text()
    rows = train_tiny(method, updates, *cut_short)
    assert cut_short[0].read_text().startswith(before) and 2 < len(before.splitlines()) < len(rows)
    assert [row["update"] for row in rows] == sorted({row["update"] for row in rows})
    assert rows[-1]["update"] == straight[-1]["update"] == updates
    for name in ("seconds", "cost"):
        course = [row[name] for row in rows]
        assert course == sorted(course)
    if method != "ncg":  # It has forgotten its last direction.
        assert rows[-1]["train_error"] == pytest.approx(straight[-1]["train_error"], rel=1e-5)
        assert rows[-1]["cost"] == pytest.approx(straight[-1]["cost"])


def test_experiments_give_the_example_options_that_it_has():
    for (dataset, method), options in experiments.OPTIONS.items():
        args = autoencoder.parse(f"--dataset {dataset} --method {method} {options}".split())
        assert (args.damping if method == "hf" else args.learning_rate) > 0


@pytest.mark.slow
def test_experiments_are_made_once_go_on_and_are_tabled(toys, clock, tmp_path, capsys, monkeypatch):
    clock.step = 1.0
    monkeypatch.setitem(experiments.INTERVALS, "curves", 0.1)
    folders = f"--out {tmp_path / 'results'}"
    rows = [(row, l2) for l2 in ("0", "2e-05") for row in ("pt-ncg", "nag")]
    command = f"run --dataset curves --row pt-ncg nag --l2 0 2e-5 {folders} --seconds"
    experiments.main([*command.split(), "3"])
    paths = sorted((tmp_path / "results" / "curves").glob("*.csv"))
    assert len(paths) == 4
    first = [path.read_text() for path in paths]
    experiments.main([*command.split(), "3"])
    assert [path.read_text() for path in paths] == first
    experiments.main([*command.split(), "6"])
    assert all(path.read_text().startswith(text) for path, text in zip(paths, first, strict=True))
    assert all(read_rows(path)[-1]["seconds"] >= 6 for path in paths)
    # Both start where the machines have come to.
    starts = {path.stem: read_rows(path)[0]["train_error"] for path in paths}
    assert starts["pt-ncg-l2-0-seed0"] == starts["pt-ncg-l2-2e-05-seed0"] != starts["nag-l2-0-seed0"]

    def table(limit=""):
        capsys.readouterr()
        experiments.main(f"table --dataset curves --out {tmp_path / 'results'} {limit}".split())
        return [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]

    assert [line[:2] for line in table()] == [[f"| {row}", l2] for row, l2 in rows]
    assert (tmp_path / "results" / "curves.png").stat().st_size > 0
    for limit in ("--seconds 0", "--cost 0"):
        of_start = [f"{starts[f'{row}-l2-{l2}-seed0']:.4g}" for row, l2 in rows]
        assert [line[6].split(", ")[0] for line in table(limit)] == of_start


@pytest.mark.slow
def test_the_example_writes_its_table_figures_and_trace(toys, tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    autoencoder.main(f"--method hf adam --seconds inf --updates 3 --out {tmp_path} --trace {trace}".split())
    printed = capsys.readouterr().out
    assert [line.split(" | ")[:3:2] for line in printed.splitlines()[-4:-2]] == [
        ["| Hessian-free (keras_hf)", "3"],
        ["| Adam", "10"],
    ]
    assert "Epoch" not in printed and " - update: 3 - train_error: " in printed
    for name in ("errors.png", "reconstructions.png", "adam.csv"):
        assert (tmp_path / name).stat().st_size > 0
    rows = read_rows(trace)
    assert [row["update"] for row in rows] == [0, 1, 2, 3]
    assert math.isnan(rows[0]["cg_iterations"])
    iterations = [row["cg_iterations"] for row in rows[1:]]
    assert [row["total_cg_iterations"] for row in rows[1:]] == list(np.cumsum(iterations))
    errors = [row["train_error"] for row in rows]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
def test_runs_to_read_are_recorded_tabled_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs_to_read, "WIDTHS", (8, 3))
    monkeypatch.setattr(runs_to_read, "NUM_CASES", 60)
    runs_to_read.main(f"--run small-batches --updates 2 --out {tmp_path} --images {tmp_path}".split())
    updates = read_updates(tmp_path / "small-batches.jsonl")
    assert [update["num_cases"] for update in updates] == [20, 20]
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 |")]
    assert row.split(" | ")[1] == f"{updates[0]['loss']:.3g}"
    assert (tmp_path / "small-batches.png").stat().st_size > 0


@pytest.mark.slow
def test_other_methods_start_from_the_same_pretrained_weights(toys, tmp_path, capsys):
    methods = ("recipe", "standard", "trust-region", "momentum")
    arguments = f"--method {' '.join(methods)} --seconds inf --updates 3 --pretrain 2 --out {tmp_path}"
    autoencoder.main(arguments.split())
    table = capsys.readouterr().out.splitlines()[-6:-2]
    assert [line.split(" | ")[0] for line in table] == [f"| {baselines.LABELS[method]}" for method in methods]
    courses = [[row["train_error"] for row in read_rows(tmp_path / f"{method}.csv")] for method in methods]
    assert all(course[-1] < course[0] for course in courses)
    assert len({course[0] for course in courses}) == 1


@pytest.mark.slow
def test_faces_are_reconstructed_by_squared_error(toys, tmp_path, data_dir):
    options = f"--dataset faces --data {data_dir / 'olivettifaces.mat'} --method lbfgs --l2 0 --interval 0"
    autoencoder.main(f"{options} --seconds inf --updates 10 --out {tmp_path}".split())
    errors = [row["train_error"] for row in read_rows(tmp_path / "lbfgs.csv")]
    assert len(errors) == 11 and errors == sorted(errors, reverse=True)
    assert errors[-1] < 625  # The mean patch's.
