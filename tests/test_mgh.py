"""The example of the problems of 1981: SciPy ends at the published minima of our formulas, and a fit through the program does."""

import csv

import numpy as np
import pytest

from examples import mgh


@pytest.mark.parametrize("name", mgh.PROBLEMS)
def test_a_formula_has_the_published_minimum(name):
    problem = mgh.PROBLEMS[name]
    residuals = problem.residuals(problem.x, problem.start, np)
    assert residuals.shape == (len(problem.x), 1) and len(problem.x) >= len(problem.start)
    squares, _ = mgh.by_lm(problem, problem.start, 500)
    assert mgh.is_one_of(problem.minima, squares), squares


def test_a_sum_of_squares_counts_to_five_digits():
    assert mgh.is_one_of((1.0, 0), 1.000009) and mgh.is_one_of((1.0, 0), 1e-13)
    assert (
        not mgh.is_one_of((1.0, 0), 1.00002)
        and not mgh.is_one_of((1.0, 0), 1e-11)
        and not mgh.is_one_of((1.0,), np.nan)
    )


@pytest.mark.slow
def test_the_program_goes_on_where_curvature_is_larger_by_thirty_powers_of_ten_and_writes_its_table(tmp_path):
    path = tmp_path / "mgh.csv"
    mgh.main(["--problems", "jennrich-sampson", "--scales", "10", "--num-updates", "120", "--csv", str(path)])
    with open(path, newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows["direct"]["least"] == rows["lm"]["solved"] == "1"
    # Another stationary point: the second exponential is zero there.
    assert rows["lm"]["least"] == "0"
