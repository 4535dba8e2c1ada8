"""What convergence promises: a run at rounding is told apart from one whose damping is too large, and wakes where there is something to do."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import fit, normal, trainable

from keras_hf import DirectSolver, HessianFree, Identity
from keras_hf.method.convergence import Convergence, rounding_of


def number(value):
    return tf.constant(value, tf.float64)


ROUNDING = 0.01
NOTHING = (0.0, 0.0, 0.0, 0.0, 0.0)


def memory(count=0.0, gradient_norm=0.0, damping=0.0, losses=(3.0, 3.0)):
    return Convergence(number(count), number(losses), number(gradient_norm), number(damping))


def values(found):
    return tuple(float(value) for value in (found.count, *found.losses, found.gradient_norm, found.damping))


def after(before, at_rounding, fell=False, gradient_norm=1.0, damping=2.0, scale=8.0, loss=3.0):
    numbers = map(number, (loss, ROUNDING, gradient_norm, damping, scale))
    return before.after(tf.constant(at_rounding), tf.constant(fell), *numbers)


def test_five_updates_at_rounding_are_convergence():
    found = Convergence.unknown(tf.float64)
    assert values(found) == NOTHING
    for count in range(1, 6):
        assert not found.has_converged
        found = after(found, at_rounding=True, gradient_norm=1.0 / count, loss=10.0 + count % 3)
        assert found.count == count
    assert found.has_converged
    assert values(found) == (5.0, 10.0, 12.0, 1.0, 2.0)


def test_what_an_update_makes_of_the_memory():
    def result(at_rounding, **arguments):
        return values(after(memory(3.0, 1.0, 4.0), at_rounding, **arguments))

    assert result(False, loss=9.0) == (3.0, 3.0, 3.0, 1.0, 4.0)  # a step that was measured, and rejected
    assert result(False, fell=True) == NOTHING
    assert result(True, gradient_norm=0.5) == (4.0, 3.0, 3.0, 1.0, 2.0)
    assert result(True, gradient_norm=np.nan) == NOTHING
    # The damping is what makes the step short, unless nothing is known of the curvature.
    assert result(True, damping=2.0, scale=1.9) == (3.0, 3.0, 3.0, 1.0, 4.0)
    assert result(True, damping=2.0, scale=0.0) == (4.0, 3.0, 3.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("loss", "gradient_norm", "damping", "holds"),
    [
        (3.0, 1.0, 4.0, True),
        (3.0, 2.0, 4.0, True),
        (3.0, 2.1, 4.0, False),
        (3.0, 1.0, 4.1, False),
        (3.0, 1.0, 0.0, False),
        (3.0, np.nan, 4.0, False),
        (2.995, 1.0, 4.0, True),
        (3.205, 1.0, 4.0, True),
        (2.98, 1.0, 4.0, False),
        (3.22, 1.0, 4.0, False),
        (np.nan, 1.0, 4.0, False),
    ],
)
def test_convergence_ends_where_loss_gradient_or_damping_change(loss, gradient_norm, damping, holds):
    numbers = [*map(number, (loss, ROUNDING, gradient_norm, damping))]
    converged = memory(5.0, 1.0, 4.0, losses=(3.0, 3.2))
    assert converged.still_holds(*numbers) == holds
    assert not memory(4.0, 1.0, 4.0, losses=(3.0, 3.2)).still_holds(*numbers)
    # What woke the run starts a new count.
    count = after(converged, True, False, gradient_norm, damping, loss=loss).count
    assert count == (6 if holds else 0 if np.isnan(gradient_norm) else 1)


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


@pytest.mark.parametrize("of_weights", [True, False])
def test_a_run_wakes_for_weights_that_were_set_and_for_other_cases_whose_gradient_is_no_larger(of_weights):
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model = trainable(network, optimizer=HessianFree(solver=DirectSolver()))
    # The rounding of the first feature hides the gradient in the second.
    x = normal(300, 2, dtype="float32") * np.float32([1e5, 1.0])
    y = x @ np.float32([[0.7], [0.3]])
    with pytest.warns(UserWarning, match="converged to rounding"):
        assert fit(model, x, y, epochs=60)["converged"][-1]
    if of_weights:
        kernel = network.layers[0].kernel
        kernel.assign(kernel + [[0.0], [0.1]])
    else:
        y += 0.1 * x[:, 1:]
    history = fit(model, x, y, epochs=3)
    assert not any(history["converged"])
