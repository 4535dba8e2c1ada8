import math
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import KERAS

from benchmarks import __main__ as runner
from benchmarks import figures, levers, memory, nystrom, time_to_error
from benchmarks import rows as results
from benchmarks.time_to_error import Cases, Curve, Problem
from examples import baselines
from examples.autoencoder import squared_error
from examples.tables import read_rows
from keras_hf import HFModel, Nystrom, UpdateRecorder, read_updates

ROOT = Path(runner.__file__).parent
NEEDS_MUON = pytest.mark.skipif(KERAS < (3, 13), reason="Muon of Keras 3.12 fails on TensorFlow")


def tiny_cases(seed):
    rng = np.random.default_rng(seed)
    images = rng.random((60, 784)).astype("float32") ** 8
    return Cases(images[:40], images[:40], images[40:], images[40:])


def tiny_digits(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(60, 6)).astype("float32"), rng.integers(0, 3, 60).astype("int32")
    return Cases(x[:40], y[:40], x[40:], y[40:])


def tiny_network(l2=0.01, sparse=True):
    del sparse
    penalty = keras.regularizers.L2(l2 / 2)
    dense = keras.layers.Dense
    return keras.Sequential(
        [keras.Input((784,)), dense(3, "tanh", kernel_regularizer=penalty), dense(784, kernel_regularizer=penalty)]
    )


def tiny_classifier(l2, sparse):
    del l2, sparse
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, "softmax")])


PROBLEM = Problem("autoencoder", tiny_cases, tiny_network, seconds=0.3, targets=(2, 1))
CLASSIFIER = Problem("classifier", tiny_digits, tiny_classifier, seconds=0.3, targets=(0.5,))


class MeanSquares(Problem):
    loss = staticmethod(squared_error)


SQUARES = MeanSquares(*PROBLEM)


def curve(problem, network, path, seconds=0.3):
    return Curve(problem, network, problem.load(0), path, seconds)


def write_run(folder, name, seconds, errors):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{update},{10 * time},{time},{error},{error}"
        for update, (time, error) in enumerate(zip(seconds, errors, strict=True))
    ]
    (folder / f"{name}.csv").write_text("\n".join(["update,cost,seconds,train_error,test_error", *lines, ""]))


def test_gradient_for_scipy_equals_that_of_the_tape():
    cases, network = tiny_cases(0), tiny_network()
    function = baselines.LossAndGradient(network, squared_error, cases.x_train, cases.y_train, piece_size=15)
    vector = function.vector() + 0.01  # Biases that aren't zero.
    value, gradient = function(vector)
    with tf.GradientTape() as tape:
        expected = tf.reduce_mean(squared_error(cases.y_train, network(cases.x_train))) + sum(network.losses)
    gradients = tape.gradient(expected, network.trainable_variables)
    assert value == pytest.approx(float(expected), rel=1e-5)  # Float32 sums in another order.
    flat = np.concatenate([part.numpy().ravel() for part in gradients])
    np.testing.assert_allclose(gradient, flat, rtol=1e-4, atol=1e-5 * np.abs(flat).max())
    np.testing.assert_allclose(function.vector(), vector, rtol=1e-6)


@NEEDS_MUON
def test_muon_and_lbfgs_reduce_the_loss(tmp_path):
    for method, setting in (
        ("muon", {"learning_rate": 1e-2, "batch_size": 20}),
        ("lbfgs", {"max_corrections": 5}),
    ):
        network = tiny_network()
        recorder = curve(SQUARES, network, tmp_path / f"{method}.csv")
        time_to_error.METHODS[method](SQUARES, setting, network, recorder.cases, recorder, 0)
        assert recorder.rows[-1]["train_loss"] < 0.8 * recorder.rows[0]["train_loss"]


def test_errors_are_those_of_the_averaged_weights_where_a_setting_averages(tmp_path):
    setting = {"learning_rate": 1e-3, "max_momentum": 0.9, "batch_size": 10, "ema_momentum": 0.9}
    network = tiny_network()
    recorder = curve(SQUARES, network, tmp_path / "nag.csv")
    time_to_error.METHODS["nag"](SQUARES, setting, network, recorder.cases, recorder, 0)

    def error():
        x = recorder.cases.x_train
        return float(np.mean(squared_error(x, network(x))))

    of_last = error()
    averages = recorder.optimizer._model_variables_moving_average
    for variable, average in zip(network.trainable_variables, averages, strict=True):
        variable.assign(average)
    assert recorder.rows[-1]["train_error"] == pytest.approx(error(), rel=1e-5)
    assert recorder.rows[-1]["train_error"] != pytest.approx(of_last, rel=1e-4)


@NEEDS_MUON
def test_muon_leaves_the_last_layer_to_adam_without_weight_decay():
    network = tiny_network()
    optimizer = baselines.muon(0.1, network)
    optimizer.build(network.trainable_variables)
    by_adam = [velocity is not None for velocity in optimizer.adam_velocities]
    assert by_adam == [False, True, True, True]  # kernel, bias, kernel, bias
    before = network.get_weights()
    optimizer.apply([tf.zeros(weight.shape) for weight in before])
    for a, b in zip(before, network.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_epoch_holds_every_case_once():
    batches = baselines._batches_of_cases(50, 5, np.random.default_rng(0))
    for _ in range(2):
        assert sorted(next(batches).numpy().ravel()) == list(range(50))


def test_compiled_steps_are_those_of_keras():
    cases = tiny_cases(0)
    network = tiny_network()
    weights = network.get_weights()
    steps = baselines._compiled_steps(
        network, _built(keras.optimizers.Adam(1e-2), network), squared_error, tf.constant(cases.x_train), cases.y_train
    )
    batches = np.arange(40).reshape(10, 4).astype("int32")
    steps(tf.constant(batches))
    ours = network.get_weights()
    network.set_weights(weights)
    network.compile(keras.optimizers.Adam(1e-2), loss=squared_error)
    network.fit(cases.x_train, cases.y_train, batch_size=4, shuffle=False, verbose=0)
    for a, b in zip(ours, network.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def _built(optimizer, network):
    optimizer.build(network.trainable_variables)
    return optimizer


def test_the_first_compiled_call_is_undone(tmp_path):
    network = tiny_network()
    recorder = curve(SQUARES, network, tmp_path / "run.csv")
    weight = network.trainable_variables[0]
    before = weight.numpy()
    recorder.begin(network.variables)
    weight.assign(before + 1)
    assert not recorder.after_update(10, {})
    np.testing.assert_array_equal(weight.numpy(), before)
    assert recorder.rows[-1]["update"] == 0


def test_training_ends_where_the_error_is_no_number(tmp_path):
    network = tiny_network()
    recorder = curve(SQUARES, network, tmp_path / "run.csv", seconds=0.0)
    recorder.max_seconds = math.inf
    recorder.begin(network.variables)
    recorder.after_update(10, {})
    network.trainable_variables[0].assign(np.full((784, 3), np.nan))
    recorder.is_due = lambda seconds: True
    assert recorder.after_update(10, {})


def test_classifiers_are_measured_by_cross_entropy_and_error_rate(tmp_path):
    network = tiny_classifier(0, True)
    errors = curve(CLASSIFIER, network, tmp_path / "run.csv").errors()
    x, y, _, _ = tiny_digits(0)
    y_pred = network(x).numpy()
    assert errors["train_error"] == pytest.approx(-np.log(y_pred[np.arange(40), y]).mean(), rel=1e-5)
    assert errors["train_error_rate"] == np.mean(y_pred.argmax(axis=1) != y)


@pytest.mark.slow
def test_cost_of_hessian_free_is_that_of_the_updates_recorded(tmp_path):
    network = tiny_network()
    recorder = baselines.Recorder(
        network,
        *tiny_cases(0)[::2],
        tmp_path / "run.csv",
        max_seconds=math.inf,
        max_updates=3,
        log_names=("cost", "total_cg_iterations"),
    )
    optimizer, damping_rule = baselines.recipe(1.0, curvature_batch_size=10, seed=0)
    model = HFModel(network)
    model.compile(optimizer=optimizer, loss=squared_error)
    callbacks = [UpdateRecorder(tmp_path / "updates.jsonl"), damping_rule, recorder]
    model.fit(recorder.x_train, recorder.x_train, epochs=3, verbose=0, callbacks=callbacks)
    updates = read_updates(tmp_path / "updates.jsonl")
    costs = [update["cost"] / 40 for update in updates]
    np.testing.assert_allclose([row["cost"] for row in recorder.rows], [0, *np.cumsum(costs)])
    iterations = [update["cg_iterations"] for update in updates]
    assert [row["total_cg_iterations"] for row in recorder.rows] == [0, *np.cumsum(iterations)]


def test_a_target_is_reached_at_the_first_row_at_or_below_it(tmp_path):
    write_run(tmp_path, "adam-0-seed0", (0, 1.5, 3, 4), (5, 2, 1, 1.5))
    rows = read_rows(tmp_path / "adam-0-seed0.csv")
    assert [time_to_error.until(rows, target) for target in (6, 2, 1.9, 0.5)] == [0, 1.5, 3, math.inf]


def test_the_best_setting_has_the_least_training_error_in_the_end(tmp_path):
    for number, final in enumerate((3.0, 1.0, 2.0, math.nan)):
        write_run(tmp_path, f"adam-{number}-seed0", (0, 1), (0.5, final))
    write_run(tmp_path, "adam-1-seed1", (0, 1), (9, 9))
    assert time_to_error.best_setting(tmp_path, "adam", 4) == 1
    best = time_to_error.of_best_settings(time_to_error.complete_runs(tmp_path))
    assert list(best) == [("adam", 1, 0), ("adam", 1, 1)]
    with pytest.raises(FileNotFoundError, match="adam-4-seed0.csv is missing"):
        time_to_error.best_setting(tmp_path, "adam", 5)


def test_a_complete_run_is_not_made_again_and_a_partial_one_is(tmp_path):
    setting = {"learning_rate": 1e-2, "batch_size": 20}
    (tmp_path / "adam-0-seed0.partial").write_text("update\n")
    path = time_to_error.run(tmp_path, SQUARES, "adam", setting, 0, 0, 0.2)
    written = path.read_text()
    assert not path.with_suffix(".partial").exists()
    assert time_to_error.run(tmp_path, SQUARES, "adam", setting, 0, 0, 0.2) == path
    assert path.read_text() == written
    assert read_rows(path)[-1]["seconds"] >= 0.2


def test_ratios_take_the_fastest_of_the_others():
    seconds = {"hf": [2.0, 4.0, math.inf], "adam": [3.0, math.inf, 1.0], "nag": [4.0, math.inf, math.inf]}
    assert time_to_error.ratios_to("hf", seconds, ("adam", "nag", "muon")) == [1.5, math.inf, 0.0]
    assert time_to_error.ratios_to("hf", seconds, ("lbfgs",)) == []


def test_grids_are_small_and_cover_every_problem():
    for method in time_to_error.METHODS:
        assert len(time_to_error.grid("small-curves", time_to_error.PROBLEMS["small-curves"], method)) <= 6
    for name, problem in time_to_error.PROBLEMS.items():
        for method in ("hf", "recipe", "adam", "nag", "muon", "lbfgs"):
            assert 1 <= len(time_to_error.grid(name, problem, method)) <= 6


def test_the_table_holds_every_run_and_marks_the_best(tmp_path, capsys):
    folder = tmp_path / "small-curves"
    write_run(folder, "adam-0-seed0", (0, 1), (9, 3))
    write_run(folder, "adam-1-seed0", (0, 1), (9, 2))
    write_run(folder, "hf-0-seed0", (0, 0.5), (9, 1))
    time_to_error.main(f"table --problem small-curves --out {tmp_path}".split())
    text = (tmp_path / "small-curves.csv").read_bytes().decode()
    assert "\r" not in text
    header, *rows = [line.split(",") for line in text.splitlines()]
    column = dict(zip(header, zip(*rows, strict=True), strict=True))
    assert (column["method"], column["best"]) == (("adam", "adam", "hf"), ("0", "1", "1"))
    assert column["seconds_to_2"] == ("inf", "1.0", "0.5")
    assert column["cost_to_2"] == ("inf", "10.0", "5.0")
    assert (tmp_path / "small-curves.png").stat().st_size > 0
    assert "best first-order / hf          2.00     2.00        -        -" in capsys.readouterr().out


def test_the_poisson_network_returns_the_laplacian_inside_and_the_solution_elsewhere(float64):
    network = nystrom.Poisson(num_units=5)
    x = np.random.default_rng(0).random((4, 3)).round(1)
    x[:, 2] = [1, 0, 1, 0]
    found = network(x).numpy()[:, 0]
    (kernel, bias), output = network.hidden.get_weights(), network.solution.kernel.numpy()[:, 0]
    t = np.tanh(x[:, :2] @ kernel + bias)
    # The second derivative of tanh is -2 tanh (1 - tanh^2).
    laplacian = (-2 * t * (1 - t**2) * (kernel**2).sum(0)) @ output
    np.testing.assert_allclose(found, np.where(x[:, 2] == 1, -laplacian, t @ output), rtol=1e-10)


def test_cases_of_the_poisson_equation_are_those_of_its_solution():
    x, y, weight = nystrom.cases(8)
    inner = x[:, 2] == 1
    assert inner.sum() == 36 and len(x) == 64
    np.testing.assert_allclose(y[~inner, 0], nystrom.exact(x[~inner, :2])[:, 0], atol=1e-15)
    h = 1e-4
    around = [nystrom.exact(x[inner, :2] + step) for step in ([h, 0], [-h, 0], [0, h], [0, -h])]
    laplacian = (sum(around) - 4 * nystrom.exact(x[inner, :2])) / h**2
    np.testing.assert_allclose(y[inner], -laplacian, rtol=1e-5)
    assert weight[inner].sum() == pytest.approx(64) and weight[~inner].sum() == pytest.approx(64)


def test_products_of_sketches_count(float64):
    recorder = nystrom.Recorder(Nystrom(rank=4, interval=2), every=1)
    model, _ = nystrom.compiled(Nystrom(rank=4, interval=2), seed=0)
    recorder.set_model(model)
    recorder.model.network.build((None, 3))
    for _ in range(3):
        recorder.on_train_batch_end(0, {"cg_iterations": 10, "loss": 1.0})
    assert [row["products"] for row in recorder.rows] == [14, 24, 38]


@pytest.mark.slow
def test_the_poisson_equation_is_trained_on(float64):
    first, *_, last = nystrom.measure(Nystrom(rank=4, interval=2), updates=4, every=1, seed=0, num_points=5)
    assert float(last["loss"]) < float(first["loss"])


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("sgd", {"learning_rate": 1e-3, "batch_size": 10}),
        ("momentum", {"learning_rate": 1e-3, "momentum": 0.9, "batch_size": 40}),
        ("ncg", {}),
        ("trust-region", {"initial_radius": 0.1}),
        pytest.param("standard", {"damping": 1.0}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_methods_before_the_recipe_reduce_the_error(method, setting, tmp_path):
    rows = read_rows(time_to_error.run(tmp_path, SQUARES, method, setting, 0, 0, 0.3))
    assert rows[-1]["train_error"] < rows[0]["train_error"]
    assert rows[-1]["cost"] > 0


@pytest.mark.slow
def test_levers_change_one_thing_each(tmp_path, monkeypatch):
    monkeypatch.setitem(levers.PROBLEMS, "small-curves", SQUARES)
    names = ["defaults", "damping lowered above .75"]
    arguments = ["--problem", "small-curves", "--seconds", "0.2", "--out", str(tmp_path), "--lever", *names]
    levers.main(arguments)
    paths = sorted((tmp_path / "small-curves-defaults").glob("*.csv"))
    assert [path.name for path in paths] == [levers.path_of(tmp_path, name, 0).name for name in sorted(names)]
    written = [path.stat().st_mtime_ns for path in paths]
    levers.main(arguments)
    assert [path.stat().st_mtime_ns for path in paths] == written
    lines = (tmp_path / "small-curves-defaults.csv").read_text().splitlines()
    assert lines[0].startswith("lever,seed,seconds_to_2,seconds_to_1,cost_to_2") and len(lines) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", levers.levers_of_recipe(40))
def test_every_change_of_the_recipe_trains(name, tmp_path):
    change = levers.levers_of_recipe(40)[name]
    path = levers.run(tmp_path, SQUARES, levers.BASES["recipe"][0], name, change, seed=0, seconds=0.2)
    rows = read_rows(path)
    assert rows[-1]["train_error"] < rows[0]["train_error"]


def test_a_lever_that_did_not_reach_a_target_says_so():
    rows = [
        {"seconds": t, "cost": 3 * t, "train_error": 4 - t, "test_error": 0, "update": t, "total_cg_iterations": 0}
        for t in range(3)
    ]
    found = levers.row("defaults", 0, rows, (3, 1))
    assert (found["seconds_to_3"], found["cost_to_3"]) == (1, 3)
    assert math.isinf(found["seconds_to_1"]) and math.isinf(found["cost_to_1"])


def test_jobs_of_the_memory_are_told_apart_by_their_rows():
    jobs = [
        (over, source, cases, size, way)
        for over, source, cases, sizes in (
            ("cases", "arrays", 10**6, (0,)),
            ("cases", "dataset", 10**6, (0,)),
            ("weights", "arrays", 256, memory.WEIGHTS),
            ("direct", "arrays", 10**3, (300,)),
        )
        for size in sizes
        for way in memory.WAYS
    ]
    keys = set()
    for over, source, cases, size, way in jobs:
        weights = memory.build(over, size).count_params() if size <= 10**5 else size
        row = dict(zip(memory.COLUMNS, (over, source, cases, weights, *memory.WAYS[way]), strict=False))
        keys.add(memory._key({name: "" if value is None else str(value) for name, value in row.items()}))
    assert len(keys) == len(jobs)


@pytest.mark.slow
def test_a_bound_on_the_kept_iterates_saves_their_memory_and_no_row_is_measured_twice(tmp_path):
    path = tmp_path / "memory.csv"
    arguments = [
        "--cases",
        "--direct",
        "--weights",
        "1000000",
        "--ways",
        "double",
        "double, 2 kept",
        "--csv",
        str(path),
    ]
    memory.main(arguments)
    every, bounded = memory._read(path)
    assert (every["kept"], bounded["kept"]) == ("7", "2")
    # Five vectors of a million float32 less. Which operations run at once moves either peak: on a busy machine one pair differed by three.
    assert float(every["peak_mib"]) - float(bounded["peak_mib"]) > 2 * 4 * int(every["weights"]) / 2**20
    written = path.stat().st_mtime_ns
    memory.main(arguments)
    assert path.stat().st_mtime_ns == written


def test_every_script_is_run_by_make_bench_and_has_a_quick_form():
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"__main__", "rows", "clock", "figures"}
    assert scripts == {name for name in runner.BENCHMARKS if "." not in name}
    commands = [runner.command(name, False, Path("out")) for name in runner.BENCHMARKS]
    assert all("--quick" in command or "quick" in command for command in commands)
    outputs = [command[-1] for command in commands]
    assert len(set(outputs)) == len(outputs) and all(Path(output).parent == Path("out") for output in outputs)


def test_a_benchmark_of_another_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        runner.main(["products"])
    assert "NAME must be one of first_update" in capsys.readouterr().err


def test_comparisons_are_drawn_from_their_files(tmp_path):
    row = {"network": "small", "cases": 5, "library": "keras_hf", "gradients": 1.2, "product_seconds": 0.1}
    course = [{"seconds": t, "error": 1 / (1 + t), "train_error": 1 / (1 + t)} for t in range(3)]
    for folder, name, rows in (
        ("peers.products", "keras_hf", [row]),
        ("peers.products", "jax", [{**row, "library": "JAX"}]),
        ("peers.fits", "poisson-scipy-trf-seed0", course),
        ("peers.minibatches/mnist-autoencoder", "kfac-jax-0-seed0", course),
    ):
        results.write(tmp_path / folder / f"{name}.csv", rows)
    figures.main([str(tmp_path)])
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["fits.png", "minibatches.png", "products.png"]
