import functools
import itertools
import math
import types
from pathlib import Path

import keras
import numpy as np
import pytest
from problems import KERAS
from training import Clock

from benchmarks import __main__ as runner
from benchmarks import figures, gather, generalisation, levers, memory, nystrom, time_to_error
from benchmarks import rows as results
from benchmarks.time_to_error import GRIDS, METHODS, Cases, Curve, Problem
from examples import baselines, origins
from examples.autoencoder import squared_error
from examples.tables import read_rows, write_rows
from keras_hf import HFModel, Nystrom

ROOT = Path(runner.__file__).parent


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A second passes whenever a recorder looks at the clock: a run has the same updates on every machine."""
    monkeypatch.setattr(baselines, "time", Clock(step=1.0))


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
    dense = functools.partial(keras.layers.Dense, kernel_regularizer=keras.regularizers.L2(l2 / 2))
    return keras.Sequential([keras.Input((784,)), dense(3, "tanh"), dense(784)])


def tiny_classifier(l2=0.0, sparse=True):
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, "softmax")])


PROBLEM = Problem("autoencoder", tiny_cases, tiny_network, seconds=4.0, targets=(2, 1))
CLASSIFIER = Problem("classifier", tiny_digits, tiny_classifier, seconds=4.0, targets=(0.5,))


class MeanSquares(Problem):
    loss = staticmethod(squared_error)


SQUARES = MeanSquares(*PROBLEM)


def begun(tmp_path, problem=SQUARES):
    """A network and what records its errors."""
    network = problem.build()
    return network, Curve(problem, network, problem.load(0), tmp_path / "run.csv", problem.seconds)


def no_training(problem, setting, network, cases, recorder, seed, damping_rule=None):
    """A method that leaves the weights as they are."""
    recorder.begin(network.variables)
    updates = 0
    while not recorder.after_update(updates, {"cost": updates}):
        updates += 1


def write_run(folder, name, seconds, errors):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"0,{10 * time},{time},{error},{error}\n" for time, error in zip(seconds, errors, strict=True)]
    (folder / f"{name}.csv").write_text("update,cost,seconds,train_error,test_error\n" + "".join(lines))


@pytest.mark.parametrize("method", ["adam", "adam-glorot", "nag", "sgd", "gd", "momentum"])
def test_settings_of_first_order_methods_make_their_optimizers(method):
    settings = [setting for (name, _), settings in GRIDS.items() if name == method for setting in settings]
    assert settings
    for setting in settings:
        optimizer = METHODS[method].args[0](setting, None)
        assert float(optimizer.learning_rate) == pytest.approx(setting["learning_rate"])
        assert optimizer.use_ema == ("ema_momentum" in setting)
        if "adam" not in method:
            assert optimizer.momentum == setting.get("momentum", setting.get("max_momentum", 0))


@pytest.mark.skipif(KERAS < (3, 13), reason="Muon of Keras 3.12 fails on TensorFlow")
def test_muon_reduces_the_loss_and_its_rate_falls_along_a_cosine(tmp_path):
    network, recorder = begun(tmp_path, SQUARES._replace(seconds=40.0))
    METHODS["muon"](SQUARES, {"learning_rate": 1e-2, "batch_size": 20}, network, recorder.cases, recorder, 0)
    assert recorder.rows[-1]["train_loss"] < 0.8 * recorder.rows[0]["train_loss"]
    assert recorder.rows[-1]["cost"] > 0
    assert float(recorder.optimizer.learning_rate) < 5e-3


def test_errors_are_those_of_the_averaged_weights_where_a_setting_averages(tmp_path):
    setting = {"learning_rate": 1e-3, "max_momentum": 0.9, "batch_size": 10, "ema_momentum": 0.9}
    network, recorder = begun(tmp_path)
    METHODS["nag"](SQUARES, setting, network, recorder.cases, recorder, 0)

    def error():
        x = recorder.cases.x_train
        return float(np.mean(squared_error(x, network(x))))

    of_last = error()
    averages = recorder.optimizer._model_variables_moving_average
    for variable, average in zip(network.trainable_variables, averages, strict=True):
        variable.assign(average)
    assert recorder.rows[-1]["train_error"] == pytest.approx(error(), rel=1e-5)
    assert recorder.rows[-1]["train_error"] != pytest.approx(of_last, rel=1e-4)


def test_the_first_compiled_call_is_undone_and_training_ends_where_the_error_is_no_number(tmp_path):
    network, recorder = begun(tmp_path)
    weight = network.trainable_variables[0]
    before = weight.numpy()
    recorder.begin(network.variables)
    weight.assign(before + 1)
    assert not recorder.after_update(10, {})
    np.testing.assert_array_equal(weight.numpy(), before)
    assert recorder.rows[-1]["update"] == 0
    weight.assign(np.full((784, 3), np.nan))
    assert recorder.after_update(10, {})
    assert recorder.rows[-1]["seconds"] < SQUARES.seconds


def test_classifiers_are_measured_by_cross_entropy_and_error_rate(tmp_path):
    network, recorder = begun(tmp_path, CLASSIFIER)
    errors = recorder.errors()
    x, y, _, _ = tiny_digits(0)
    y_pred = network(x).numpy()
    assert errors["train_error"] == pytest.approx(-np.log(y_pred[np.arange(40), y]).mean(), rel=1e-5)
    assert errors["train_error_rate"] == np.mean(y_pred.argmax(axis=1) != y)


@pytest.mark.parametrize(("method", "setting"), [("hf", "start"), ("nag", 1e-4)])
def test_looks_hold_the_errors_of_the_last_weights_and_of_averages(method, setting, monkeypatch):
    seconds = Clock(step=0.1)
    monkeypatch.setattr(generalisation, "time", types.SimpleNamespace(process_time=seconds.perf_counter))
    rows = generalisation.train(PROBLEM, method, setting, 1e-4, 0, 2.0)
    first, last = rows[0], rows[-1]
    assert first["test_error"] == first["averaged_test_error"]
    assert first["train_error"] != last["train_error"]
    assert last["train_error"] != last["averaged_train_error"]
    assert float(last["seconds"]) >= 2.0
    table = [
        {"problem": "curves", "method": method, "setting": str(setting), "decay": "0", "seed": "0", **row}
        for row in rows
    ]
    *_, line = generalisation.markdown(table).splitlines()
    assert line.startswith(f"| curves | {method} | {setting} | 0 |")


def test_a_decay_pulls_towards_the_weights_it_is_given():
    assert float(generalisation.Towards(3.0, np.array([1.0, 2.0]))(np.array([2.0, 4.0]))) == 3.0 / 2 * 5


def test_a_target_is_reached_at_the_first_row_at_or_below_it():
    rows = [{"seconds": t, "train_error": error} for t, error in ((0, 5), (1.5, 2), (3, 1), (4, 1.5))]
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


def test_a_complete_run_is_not_made_again_and_a_partial_one_is(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "none", no_training)
    (tmp_path / "none-0-seed0.partial").write_text("update\n")
    path = time_to_error.run(tmp_path, SQUARES, "none", {}, 0, 0, 5.0)
    written = path.read_text()
    assert not path.with_suffix(".partial").exists()
    assert read_rows(path)[-1]["seconds"] >= 5.0
    monkeypatch.setitem(METHODS, "none", None)
    assert time_to_error.run(tmp_path, SQUARES, "none", {}, 0, 0, 5.0) == path
    assert path.read_text() == written


def test_ratios_take_the_fastest_of_the_others():
    seconds = {"hf": [2.0, 4.0, math.inf], "adam": [3.0, math.inf, 1.0], "nag": [4.0, math.inf, math.inf]}
    assert time_to_error.ratios_to("hf", seconds, ("adam", "nag", "muon")) == [1.5, math.inf, 0.0]
    assert time_to_error.ratios_to("hf", seconds, ("lbfgs",)) == []


def test_grids_are_small_and_cover_every_problem():
    for method in METHODS:
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
        recorder.on_train_batch_end(0, {"cg_iterations": 10, "update_loss": 1.0})
    assert [row["products"] for row in recorder.rows] == [14, 24, 38]


@pytest.mark.slow
def test_the_poisson_equation_is_trained_on(float64):
    first, *_, last = nystrom.measure(Nystrom(rank=4, interval=2), updates=4, every=1, seed=0, num_points=5)
    assert float(last["loss"]) < float(first["loss"])


@pytest.mark.parametrize("base", levers.BASES)
def test_levers_compile_and_differ_from_the_base_and_from_each_other(base, monkeypatch):
    fit, changes_of = levers.BASES[base]
    model, made = HFModel(tiny_network()), []

    def compile_only(optimizer, damping_rule, *rest):
        model.compile(optimizer, squared_error)
        parts = optimizer.solver, optimizer.curvature, optimizer.growing_batch, damping_rule
        made.append((*map(described, parts), optimizer._initial_damping, optimizer.curvature_batch_size))

    def no_run(path, problem, fit, arguments, seed, seconds, sparse):
        fit(problem, arguments, None, None, None, seed)
        made[-1] += sparse, arguments.get("l2")

    monkeypatch.setattr(time_to_error, "_fit_hessian_free", compile_only)
    monkeypatch.setattr(levers, "train", no_run)
    for name, change in changes_of(40).items():
        levers.run(Path(), SQUARES, fit, name, change, 0, 4.0)
    assert all(one != other for one, other in itertools.combinations(made, 2))


def described(value):
    """A part's class and settings, or a number as it is."""
    settings = getattr(value, "__dict__", None)
    return value if settings is None else (type(value), {key: described(part) for key, part in settings.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no backtracking", "Hessian by finite differences"])
def test_changes_of_the_recipe_train(name, tmp_path):
    change = levers.levers_of_recipe(40)[name]
    rows = read_rows(levers.run(tmp_path, SQUARES, levers.BASES["recipe"][0], name, change, seed=0, seconds=4.0))
    assert rows[-1]["train_error"] < rows[0]["train_error"]
    assert rows[-1]["cost"] > 0


def test_the_table_of_levers_has_every_run_and_none_is_made_twice(tmp_path, monkeypatch):
    runs = []

    def fit(*arguments, damping_rule):
        runs.append(damping_rule)
        no_training(*arguments)

    monkeypatch.setitem(levers.PROBLEMS, "small-curves", SQUARES)
    monkeypatch.setitem(levers.BASES, "defaults", (fit, levers.levers_of_defaults))
    names = ["defaults", "damping lowered above .75"]
    arguments = ["--problem", "small-curves", "--seconds", "4", "--out", str(tmp_path), "--lever", *names]
    for _ in range(2):
        levers.main(arguments)
        assert len(runs) == 2
    paths = sorted((tmp_path / "small-curves-defaults").glob("*.csv"))
    assert [path.name for path in paths] == [levers.path_of(tmp_path, name, 0).name for name in sorted(names)]
    lines = (tmp_path / "small-curves-defaults.csv").read_text().splitlines()
    assert lines[0].startswith("lever,seed,seconds_to_2,seconds_to_1,cost_to_2") and len(lines) == 3


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
        *(("cases", source, 10**6, 0, way) for source in ("arrays", "dataset") for way in memory.WAYS),
        *(("weights", "arrays", 256, size, way) for size in memory.WEIGHTS for way in memory.WAYS),
        *(("direct", "arrays", 10**3, 300, way) for way in memory.WAYS),
    ]
    count = functools.cache(lambda over, size: memory.build(over, size).count_params() if size <= 10**5 else size)
    keys = set()
    for over, source, cases, size, way in jobs:
        row = dict(zip(memory.COLUMNS, (over, source, cases, count(over, size), *memory.WAYS[way]), strict=False))
        keys.add(memory._key({name: "" if value is None else str(value) for name, value in row.items()}))
    assert len(keys) == len(jobs)


@pytest.mark.slow
def test_a_bound_on_the_kept_iterates_saves_their_memory_and_no_row_is_measured_twice(tmp_path, monkeypatch):
    # Which operations run at once moves a peak: with one thread it is always the same.
    for kind in ("INTRAOP", "INTEROP"):
        monkeypatch.setenv(f"TF_NUM_{kind}_THREADS", "1")
    measured, in_a_process = [], memory.in_a_process

    def measure(*job):
        measured.append(job)
        return {"peak": 1.0} if job[-1] == memory.GRADIENT else in_a_process(*job)

    monkeypatch.setattr(memory, "in_a_process", measure)
    path, ways = tmp_path / "memory.csv", ["double", "double, 2 kept"]
    arguments = ["--cases", "--direct", "--weights", "1000000", "--ways", *ways, "--csv", str(path)]
    for _ in range(2):
        memory.main(arguments)
        assert len(measured) == 3  # The gradient's is that of both.
    every, bounded = memory._read(path)
    assert (every["kept"], bounded["kept"]) == ("7", "2")
    # Five vectors of a million float32 less, but for what else is held where each run holds most: 3.9 have been seen.
    assert float(every["peak_mib"]) - float(bounded["peak_mib"]) > 3 * 4 * int(every["weights"]) / 2**20


def test_every_script_is_run_by_make_bench_and_has_a_quick_form():
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"__main__", "rows", "clock", "figures", "gather", "tables"}
    assert scripts == {name for name in runner.BENCHMARKS if "." not in name}
    commands = [runner.command(name, False, Path("out")) for name in runner.BENCHMARKS]
    assert all("--quick" in command or "quick" in command for command in commands)
    outputs = [command[-1] for command in commands]
    assert len(set(outputs)) == len(outputs) and all(Path(output).parent == Path("out") for output in outputs)


def test_a_benchmark_of_another_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        runner.main(["products"])
    assert "NAME must be one of first_update" in capsys.readouterr().err


PRODUCT = {"network": "small", "cases": 5, "library": "keras_hf", "gradients": 1.2, "product_seconds": 0.1}
COURSE = [{"seconds": t, "error": 1 / (1 + t), "train_error": 1 / (1 + t)} for t in range(3)]


@pytest.mark.parametrize("is_gathered", [False, True])
def test_comparisons_are_drawn_from_folders_of_runs_and_from_their_files(tmp_path, is_gathered):
    for name, rows in (
        ("peers_products/keras_hf", [PRODUCT]),
        ("peers_products/jax", [{**PRODUCT, "library": "JAX"}]),
        ("peers_fits/poisson/scipy-trf-seed0", COURSE),
        ("peers_minibatches/mnist-autoencoder/kfac-jax-0-seed0", COURSE),
    ):
        results.write(tmp_path / f"{name}.csv", rows)
    folder = tmp_path
    if is_gathered:
        folder = tmp_path / "results"
        for name in figures.FIGURES:
            gather.main([str(tmp_path / name), str(folder / f"{name}.csv")])
    figures.main([str(folder)])
    assert sorted(path.name for path in folder.glob("*.png")) == [f"{name}.png" for name in sorted(figures.FIGURES)]


def test_a_gathered_file_says_of_each_row_its_run_and_makes_the_folder_again(tmp_path):
    runs = tmp_path / "runs"
    for name, rows in {
        "memory/hf-seed0.csv": [{"update": 0, "damping": 1.0}, {"update": 1, "damping": 0.5}],
        "memory/adam-0.01-seed3.csv": [{"update": 5, "loss": math.nan}],
        "full/grid/sgd.csv": [{"update": 7, "loss": 2.5}],
    }.items():
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(runs / name, rows)
        origins.keep((runs / name).parent, {Path(name).name: [{"date": "2026-01-01", "command": name}]})
    files = sorted(path.relative_to(runs) for path in runs.rglob("*.*"))
    write_rows(runs / "memory.csv", [{"method": "a table of the runs, which is none of them"}])
    path = tmp_path / "results" / "question.csv"
    gather.main([str(runs), str(path)])
    assert path.read_text().splitlines() == [
        "problem,method,seed,update,loss,damping",
        "full/grid,sgd,,7,2.5,",
        "memory,adam-0.01,3,5,nan,",
        "memory,hf,0,0,,1.0",
        "memory,hf,0,1,,0.5",
    ]
    again = tmp_path / "again"
    gather.main([str(path), str(again)])
    assert sorted(path.relative_to(again) for path in again.rglob("*.*")) == files
    assert [(again / file).read_text() for file in files] == [(runs / file).read_text() for file in files]
    assert results.read_runs(path) == results.read_runs(runs)


def test_columns_that_no_run_needs_are_left_out(tmp_path):
    results.write(tmp_path / "products" / "jax.csv", [PRODUCT])
    gather.main([str(tmp_path / "products"), str(tmp_path / "products.csv")])
    assert (tmp_path / "products.csv").read_text().startswith("method,network,")
    assert [*results.read_runs(tmp_path / "products.csv")] == [("", "jax", "")]


def test_origins_that_differ_in_the_date_alone_become_one():
    first, second = {"date": "2026-01-02", "command": "a"}, {"date": "2026-01-01 to 2026-01-05", "command": "a"}
    runs = [("p", "adam", str(seed)) for seed in range(3)]
    one = {"date": "2026-01-01 to 2026-01-05", "command": "a"}
    assert gather.merged({runs[0]: [first], runs[1]: [second]}) == [one]
    assert gather.merged({runs[0]: [first], runs[2]: [{**first, "command": "b"}], runs[1]: [second]}) == [
        {**one, "runs": ["p/adam-seed0", "p/adam-seed1"]},
        {**first, "command": "b", "runs": ["p/adam-seed2"]},
    ]


def test_runs_without_origin_and_folders_without_runs_are_refused(tmp_path, capsys):
    (tmp_path / "p").mkdir()
    write_rows(tmp_path / "of-no-runs.csv", COURSE)
    for source in ("p", "missing", "of-no-runs.csv"):
        with pytest.raises(SystemExit):
            gather.main([str(tmp_path / source), str(tmp_path / "all.csv")])
        assert "SOURCE must hold runs" in capsys.readouterr().err
    write_rows(tmp_path / "p" / "adam-seed0.csv", COURSE)
    with pytest.raises(SystemExit, match="must have an origin in origins.json beside it. Received: .*adam-seed0.csv"):
        gather.main([str(tmp_path), str(tmp_path / "all.csv")])
