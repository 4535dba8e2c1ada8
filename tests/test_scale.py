"""What the scale of the curvature promises: a run does not depend on the scale of its loss."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_hf import (
    ConjugateGradient,
    EmpiricalFisherDiagonal,
    GrowingBatch,
    HessianFree,
    HFModel,
    LevenbergMarquardt,
)
from keras_hf.scale import curvature_scale, damping_limits, first_damping, noise_damping


def vector(*values):
    return tf.constant(values, tf.float64)


def test_the_scale_is_the_curvature_along_the_gradient():
    assert curvature_scale(vector(3, 4), tf.constant(50.0, tf.float64), vector(1, 1)) == 2
    # That of a Hessian may be negative; it is a scale all the same.
    assert curvature_scale(vector(3, 4), tf.constant(-50.0, tf.float64), vector(1, 1)) == 2


def test_without_curvature_the_first_step_is_as_long_as_the_weights():
    scale = curvature_scale(vector(3, 4), tf.constant(0.0, tf.float64), vector(0, 2))
    np.testing.assert_allclose(5 / first_damping(scale), 2)


@pytest.mark.parametrize("gradient", [(0, 0), (np.nan, 1), (np.inf, 1)])
def test_nothing_is_found_without_a_gradient(gradient):
    scale = curvature_scale(vector(*gradient), tf.constant(np.nan, tf.float64), vector(1, 1))
    assert scale == 0 and np.isnan(first_damping(scale))


def test_limits_are_relative_to_the_scale():
    least, greatest = damping_limits(8.0, "float32")
    assert (least, greatest) == (8 * 2.0**-46, 8 * 2.0**46)
    # No factor of a rule may overflow.
    assert np.isfinite(np.float32(damping_limits(1e37, "float32")[1]) * np.float32(1e6))


def test_noise_damping_grows_with_the_root_of_the_number_of_weights():
    assert noise_damping(8.0, "float32", 16) == 8 * 4 * 2.0**-23


def run(loss_weight=1.0, damping=None, epochs=12, **parts):
    """Updates with a loss times `loss_weight`: the history and the model."""
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(2)])
    model = HFModel(network)
    parts = {"growing_batch": GrowingBatch(100), **parts}
    model.compile(optimizer=HessianFree(damping, seed=3, **parts), loss="mse", loss_weights=loss_weight)
    x = np.random.default_rng(0).normal(size=(400, 2)).astype("float32")
    history = model.fit(x, np.sin(2 * x), epochs=epochs, verbose=0, callbacks=[LevenbergMarquardt()]).history
    return history, model


@pytest.fixture(scope="module")
def as_it_is():
    return run()


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [-20, 20])
def test_a_loss_times_a_power_of_two_gives_the_same_run_bit_for_bit(exponent, as_it_is):
    history, model = run(2.0**exponent)
    for one, other in zip(as_it_is[1].get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    for key in ("reduction_ratio", "step_size", "cg_iterations", "num_cases"):
        assert history[key] == as_it_is[0][key]
    np.testing.assert_array_equal(history["damping"], 2.0**exponent * np.asarray(as_it_is[0]["damping"]))


def test_the_first_update_finds_the_damping_and_the_second_goes_on_from_it():
    history, model = run(epochs=2, solver=ConjugateGradient(EmpiricalFisherDiagonal()), growing_batch=None)
    scale = float(model.optimizer.curvature_scale)
    assert history["damping"][0] == pytest.approx(0.1 * scale, rel=1e-6)
    assert history["damping"][1] / history["damping"][0] == pytest.approx(
        1 / 2.5 if history["reduction_ratio"][0] > 0.9 else 1 if history["reduction_ratio"][0] >= 0.25 else 2.5
    )


@pytest.mark.slow
def test_a_damping_that_is_given_stays_what_it_is():
    history, model = run(damping=0.5, solver=ConjugateGradient(EmpiricalFisherDiagonal()))
    assert history["damping"][0] == 0.5 and float(model.optimizer.curvature_scale) > 0


@pytest.mark.slow
def test_a_first_batch_that_says_nothing_leaves_the_damping_to_be_found():
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model = HFModel(network)
    model.compile(optimizer=HessianFree(solver=ConjugateGradient(preconditioner=EmpiricalFisherDiagonal())), loss="mse")
    x = np.random.default_rng(0).normal(size=(300, 2)).astype("float32")
    with pytest.warns(UserWarning, match="300 of the 300 cases|250 of the 250 cases"):
        history = model.fit(x * np.nan, x[:, :1], epochs=2, verbose=0, callbacks=[LevenbergMarquardt()]).history
    assert np.isnan(history["damping"]).all() and float(model.optimizer.curvature_scale) == 0
    history = model.fit(x, x[:, :1] + 1, epochs=2, verbose=0, callbacks=[LevenbergMarquardt()]).history
    assert np.isfinite(history["damping"]).all() and history["loss"][1] < history["loss"][0]
