"""The example of NIST's problems: certified values are minima of our formulas on our data, and a fit through the program finds them."""

import csv

import numpy as np
import pytest

from examples import nist


@pytest.mark.parametrize("name", nist.FORMULAS)
def test_formula_and_data_have_the_certified_minimum_and_deviations(name):
    problem = nist.load(name)
    formula = lambda b: nist.FORMULAS[name](problem.x, b, np)[:, 0]  # noqa: E731
    steps = 1e-6 * np.abs(problem.values)
    columns = []
    for place, step in enumerate(steps):
        move = step * (np.arange(len(steps)) == place)
        columns.append((formula(problem.values + move) - formula(problem.values - move)) / (2 * step))
    jacobian, residuals = np.stack(columns, 1), formula(problem.values) - problem.y[:, 0]
    scales = np.linalg.norm(jacobian, axis=0)
    if name == "Lanczos1":
        # Ten digits of the parameters hide residuals of 1e-13.
        assert np.abs(residuals).max() < 1e-9
        return
    assert np.abs(jacobian.T @ residuals).max() < 1e-4 * np.linalg.norm(residuals) * scales.max()
    inverse = np.linalg.inv((jacobian / scales).T @ (jacobian / scales))
    variance = residuals @ residuals / (len(residuals) - len(steps))
    np.testing.assert_allclose(np.sqrt(variance * np.diag(inverse)) / scales, problem.deviations, rtol=0.02)
    assert problem.starts.shape == (2, len(steps)) and (problem.starts != 0).all()


def test_digits_are_those_of_the_worst_number():
    assert nist.digits(np.array([1.001, 2.0]), np.array([1.0, 2.0])) == pytest.approx(3, abs=1e-3)
    assert nist.digits(np.array([1.0]), np.array([1.0])) == 11
    assert nist.digits(np.array([np.nan]), np.array([1.0])) == 0


@pytest.mark.slow
def test_the_program_fits_writes_its_table_and_agrees_with_the_certificate(tmp_path):
    path = tmp_path / "nist.csv"
    nist.main(["--problems", "DanWood", "--num-updates", "60", "--csv", str(path)])
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["start"], row["method"]) for row in rows] == [
        ("1", "direct"), ("1", "curve_fit"), ("2", "direct"), ("2", "curve_fit")
    ]  # fmt: skip
    assert all(float(row["digits"]) >= 6 and float(row["digits_of_deviations"]) >= 4 for row in rows)
