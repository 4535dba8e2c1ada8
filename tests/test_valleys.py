"""What the valleys promise: right derivatives, and paths that end where they should."""

import functools

import numpy as np
import pytest

from examples import valleys
from examples.valleys import FLAT, FLATNESS, ROSENBROCK, VALLEYS

hessian_free = functools.cache(valleys.hessian_free)


@pytest.mark.parametrize("name", VALLEYS)
def test_derivatives_are_those_of_the_value(name):
    valley, h = VALLEYS[name], 1e-4
    for w in np.random.default_rng(0).normal(size=(5, 2)):
        ahead, behind = w + h * np.eye(2), w - h * np.eye(2)
        slopes = (valley.value(*ahead.T) - valley.value(*behind.T)) / (2 * h)
        np.testing.assert_allclose(valley.gradient(w), slopes, rtol=1e-5, atol=1e-4)
        bends = [(valley.gradient(a) - valley.gradient(b)) / (2 * h) for a, b in zip(ahead, behind, strict=True)]
        np.testing.assert_allclose(valley.hessian(w), bends, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(valley.gradient(np.array(valley.minimum)), 0)
    assert valley.value(*valley.minimum) == 0


@pytest.mark.parametrize("name", VALLEYS)
def test_hessian_free_reaches_the_minimum_and_never_rises(name):
    valley = VALLEYS[name]
    path = hessian_free(valley)
    np.testing.assert_allclose(path[-1], valley.minimum, atol=1e-5)
    assert np.diff(valley.value(*path.T)).max() <= 0


def test_gradient_descent_gets_nowhere_along_the_flat_valley():
    path = valleys.gradient_descent(FLAT)
    steps = len(path) - 1
    # Each step takes the same share of either coordinate.
    np.testing.assert_allclose(path[-1, 0], 0.8 * (1 - FLAT.learning_rate) ** steps, atol=1e-12)
    np.testing.assert_allclose(path[-1, 1], (1 - FLAT.learning_rate * FLATNESS) ** steps, rtol=1e-9)
    assert path[-1, 1] > 0.7


def test_methods_of_first_order_reach_rosenbrocks_minimum_late():
    descent = valleys.gradient_descent(ROSENBROCK, 60_000)
    momentum = valleys.gradient_descent(ROSENBROCK, 6_000, momentum=0.9)
    for path in (descent, momentum):
        np.testing.assert_allclose(path[-1], ROSENBROCK.minimum, atol=1e-4)
    late, earlier = (np.argmax(ROSENBROCK.value(*path.T) < 1e-3) for path in (descent, momentum))
    newton = np.argmax(ROSENBROCK.value(*hessian_free(ROSENBROCK).T) < 1e-3)
    assert newton < earlier / 10 < late / 10


def test_pictures_are_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(valleys, "hessian_free", hessian_free)
    valleys.main(["--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"rosenbrock.png", "flat.png"}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    assert capsys.readouterr().out.count("Hessian-free") == 2
