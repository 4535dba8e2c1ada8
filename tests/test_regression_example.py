"""What the regressions promise: functions as published, the same start for every method, and fits that end at the minimum."""

import csv

import numpy as np
import pytest

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


@pytest.mark.slow
def test_methods_find_the_same_parameters_and_curve_fits_errors(float64):
    runs, cases, model = regression.fit_all("decay", num_cases=60, num_updates=30)
    assert [run.method for run in runs] == ["DirectSolver", "SciPy, trf", "SciPy, lm"]
    # The loss is flat at the minimum: it tells nothing below the square of that.
    assert max(run.loss for run in runs) == pytest.approx(min(run.loss for run in runs), rel=1e-12)
    assert all(run.seconds >= run.seconds_of[-1] and len(run.losses) >= run.num_updates > 0 for run in runs)
    for line in regression.parameters(model, cases):
        name, found, expected = line.replace("(", "=").replace("curve_fit:", "").rstrip(")").split("=")
        values, others = ([float(number) for number in text.split("+-")] for text in (found, expected))
        assert name.strip() in "abc" and values == pytest.approx(others, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_runs_start_at_the_given_weights_and_end_at_their_limits(float64, method):
    (run,), cases, _ = regression.fit_all("decay", num_cases=30, num_updates=4, methods=[method])
    assert run.losses[0] == pytest.approx(np.mean((np.exp(-cases.x) - cases.y) ** 2), rel=1e-12)
    assert run.num_updates <= len(run.losses) <= 4 and run.loss < run.losses[0]
    (run,), _, _ = regression.fit_all("decay", num_cases=30, max_seconds=0.0, methods=[method])
    assert len(run.losses) == 1


@pytest.mark.slow
def test_everything_runs_and_is_written(tmp_path, capsys):
    regression.main(["--out", str(tmp_path), "--only", "sinc", "decay", "--num-cases", "70", "--num-updates", "8"])
    output = capsys.readouterr().out
    assert output.count("DirectSolver") == output.count("SciPy, trf") == output.count("SciPy, lm") == 2
    assert "curve_fit" in output
    with open(tmp_path / "runs.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["regression"] for row in rows] == ["sinc"] * 3 + ["decay"] * 3
    assert all(float(row["loss"]) > 0 and float(row["test_error"]) > 0 for row in rows)
    assert (tmp_path / "losses.png").stat().st_size > 10_000
