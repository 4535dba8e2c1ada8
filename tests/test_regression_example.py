"""What the regressions promise: functions as published, the same start for every method, and fits that end at the minimum."""

import csv
import math

import numpy as np
import pytest
from training import renewed

from examples import regression
from examples.regression import METHODS, REGRESSIONS


def test_functions_have_the_values_of_their_formulas():
    x = np.array([[0.0], [0.05], [-0.3]])
    np.testing.assert_allclose(regression.sinc(x)[1:], np.sin(10 * x[1:]) / (10 * x[1:]), rtol=1e-14)
    assert regression.sinc(x)[0] == 1
    # Friedman (1991), of (0.5, 1, 0, 1, 1): 10 sin(pi / 2) + 20 / 4 + 10 + 5 = 30, and that of (0, 0, 0.5, 0, 0): 0.
    cases = np.array([[0.5, 1, 0, 1, 1], [0, 0, 0.5, 0, 0]])
    np.testing.assert_allclose(regression.friedman(cases), [[30 / 25], [0]], atol=1e-15)


@pytest.mark.parametrize("name", REGRESSIONS)
def test_cases_have_other_points_to_test_with(name):
    cases = REGRESSIONS[name].cases(30, np.random.default_rng(0))
    assert cases.x.shape[0] == cases.y.shape[0] == 30 and cases.y.shape[1] == 1
    assert cases.x_test.shape[1] == cases.x.shape[1] and len(cases.x_test) == len(cases.y_test) >= 1000
    assert not np.isin(cases.x_test[1:-1, 0], cases.x[:, 0]).any()


@pytest.fixture
def traced_once(monkeypatch):
    """The program's models, each of them made once and renewed: the update on so many cases is traced once, too."""
    compiled = regression.compiled
    monkeypatch.setattr(regression, "compiled", lambda of: renewed(compiled, of))


def fit_decay(num_updates, methods=tuple(METHODS), max_seconds=math.inf):
    return regression.fit_all("decay", 0, 70, num_updates, max_seconds, methods)


@pytest.mark.slow
def test_methods_find_the_same_parameters_and_curve_fits_errors_from_the_same_start(float64, traced_once):
    runs, cases, model = fit_decay(30)
    assert [run.method for run in runs] == ["DirectSolver", "SciPy, trf", "SciPy, lm"]
    # The loss is flat at the minimum: it tells nothing below the square of that.
    assert max(run.loss for run in runs) == pytest.approx(min(run.loss for run in runs), rel=1e-12)
    start = np.mean((np.exp(-cases.x) - cases.y) ** 2)
    for run in runs:
        assert run.losses[0] == pytest.approx(start, rel=1e-12) and run.loss < run.losses[0]
        assert run.seconds >= run.seconds_of[-1] and len(run.losses) >= run.num_updates > 0
    for line in regression.parameters(model, cases):
        name, found, expected = line.replace("(", "=").replace("curve_fit:", "").rstrip(")").split("=")
        values, others = ([float(number) for number in text.split("+-")] for text in (found, expected))
        assert name.strip() in "abc" and values == pytest.approx(others, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["direct", "trf"])
def test_runs_end_at_their_limits(float64, traced_once, method):
    (run,), _, _ = fit_decay(4, [method])
    assert run.num_updates <= len(run.losses) <= 4
    (run,), _, _ = fit_decay(30, [method], max_seconds=0.0)
    assert len(run.losses) == 1


@pytest.mark.slow
def test_everything_runs_and_is_written(traced_once, tmp_path, capsys):
    options = "--only sinc decay --num-cases 70 --num-updates 8 --max-seconds inf"
    regression.main(["--out", str(tmp_path), *options.split()])
    output = capsys.readouterr().out
    assert output.count("DirectSolver") == output.count("SciPy, trf") == output.count("SciPy, lm") == 2
    assert "curve_fit" in output
    with open(tmp_path / "runs.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["regression"] for row in rows] == ["sinc"] * 3 + ["decay"] * 3
    assert all(float(row["loss"]) > 0 and float(row["test_error"]) > 0 for row in rows)
    assert (tmp_path / "losses.png").stat().st_size > 10_000
