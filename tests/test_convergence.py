"""What convergence promises: a run at rounding is told apart from one whose damping is too large, and wakes where there is something to do."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import fit, normal, trainable

from keras_hf import Identity
from keras_hf.convergence import Convergence, rounding_of


def number(value):
    return tf.constant(value, tf.float64)


def memory(count=0.0, gradient_norm=0.0, damping=0.0):
    return Convergence(number(count), number(gradient_norm), number(damping))


def after(before, at_rounding, fell=False, gradient_norm=1.0, damping=2.0, scale=8.0):
    return before.after(
        tf.constant(at_rounding), tf.constant(fell), number(gradient_norm), number(damping), number(scale)
    )


def test_five_updates_at_rounding_are_convergence():
    found = memory()
    for count in range(1, 6):
        assert not found.has_converged
        found = after(found, at_rounding=True, gradient_norm=1.0 / count)
        assert found.count == count
    assert found.has_converged
    assert found.gradient_norm == 1.0 and found.damping == 2.0


def test_what_an_update_makes_of_the_memory():
    assert after(memory(3.0, 1.0, 4.0), at_rounding=False) == (3.0, 1.0, 4.0)  # a step that was measured, and rejected
    assert after(memory(3.0, 1.0, 4.0), at_rounding=False, fell=True) == (0.0, 0.0, 0.0)
    assert after(memory(3.0, 1.0, 4.0), at_rounding=True, gradient_norm=0.5) == (4.0, 1.0, 2.0)
    assert after(memory(3.0, 1.0, 4.0), at_rounding=True, gradient_norm=np.nan) == (0.0, 0.0, 0.0)
    # The damping is what makes the step short, unless nothing is known of the curvature.
    assert after(memory(3.0, 1.0, 4.0), at_rounding=True, damping=2.0, scale=1.9) == (3.0, 1.0, 4.0)
    assert after(memory(3.0, 1.0, 4.0), at_rounding=True, damping=2.0, scale=0.0) == (4.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("gradient_norm", "damping", "holds"),
    [(1.0, 4.0, True), (2.0, 4.0, True), (2.1, 4.0, False), (1.0, 4.1, False), (1.0, 0.0, False), (np.nan, 4.0, False)],
)
def test_convergence_ends_where_gradient_or_damping_change(gradient_norm, damping, holds):
    converged = memory(5.0, 1.0, 4.0)
    assert converged.still_holds(number(gradient_norm), number(damping)) == holds
    assert not memory(4.0, 1.0, 4.0).still_holds(number(gradient_norm), number(damping))
    # What woke the run starts a new count.
    assert after(converged, True, False, gradient_norm, damping)[0] == (
        6 if holds else 0 if np.isnan(gradient_norm) else 1
    )


def test_rounding_of_a_loss_is_relative():
    assert rounding_of(number(-8.0), tf.float32) == 2.0**-20
    assert rounding_of(number(8.0), tf.float64) == 2.0**-49


def test_a_run_that_has_converged_says_so_once_goes_on_without_cg_and_wakes_for_other_cases():
    # A linear network on what no linear network fits.
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model = trainable(network, damping=None, preconditioner=Identity(), growing_batch=None)
    x = normal(300, 2, dtype="float32")
    with pytest.warns(UserWarning, match="Training has converged to rounding: no step.*float32") as warned:
        history = fit(model, x, np.sin(3 * x[:, :1]), epochs=150)
    assert len(warned) == 1
    flags = np.asarray(history["converged"])
    first = flags.argmax()
    assert 5 < first < 120 and flags[first:].all()
    assert not np.any(np.asarray(history["cg_iterations"])[first + 1 :])
    assert np.isfinite(history["damping"]).all()
    design, y = np.c_[x, np.ones(300)].astype("float64"), np.sin(3 * x[:, :1].astype("float64"))
    least = np.mean((design @ np.linalg.lstsq(design, y)[0] - y) ** 2)
    assert history["loss"][-1] == pytest.approx(least, rel=1e-6)

    history = fit(model, x, np.sin(x[:, :1]), epochs=2)
    assert not any(history["converged"]) and history["loss"][-1] < history["loss"][0]
    assert all(history["cg_iterations"])
