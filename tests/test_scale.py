"""What the scale of the curvature promises: a run does not depend on the scale of its loss."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import assert_equal, fit, normal, renewed, small_network, trainable

from keras_hf import EmpiricalFisherDiagonal, GrowingBatch, KroneckerFactored
from keras_hf.method.scale import curvature_scale, damping_limits, first_damping


def vector(*values):
    return tf.constant(values, tf.float64)


def test_the_scale_is_the_curvature_along_the_gradient():
    assert curvature_scale(vector(3, 4), tf.constant(50.0, tf.float64), vector(1, 1), 0.1) == 2
    # That of a Hessian may be negative; it is a scale all the same.
    assert curvature_scale(vector(3, 4), tf.constant(-50.0, tf.float64), vector(1, 1), 0.1) == 2


def test_without_curvature_the_first_step_is_as_long_as_the_weights():
    scale = curvature_scale(vector(3, 4), tf.constant(0.0, tf.float64), vector(0, 2), 0.02)
    np.testing.assert_allclose(5 / first_damping(scale, 0.02), 2)


def test_nothing_is_found_without_a_gradient():
    for gradient in ((0, 0), (np.nan, 1), (np.inf, 1)):
        scale = curvature_scale(vector(*gradient), tf.constant(np.nan, tf.float64), vector(1, 1), 0.1)
        assert scale == 0 and np.isnan(first_damping(scale, 0.1))


def test_limits_are_relative_to_the_scale():
    least, greatest = damping_limits(8.0, "float32", 2.0**-46)
    assert (least, greatest) == (8 * 2.0**-46, 8 * 2.0**46)
    # No factor of a rule may overflow.
    assert np.isfinite(np.float32(damping_limits(1e37, "float32", 2.0**-46)[1]) * np.float32(1e6))


X = normal(400, 2, dtype="float32")


def grown(exponent):
    """The history of updates with a loss times a power of two on a growing batch, and the weights after them."""
    keras.utils.set_random_seed(0)
    settings = {"damping": None, "preconditioner": KroneckerFactored(interval=5), "growing_batch": GrowingBatch(100)}
    compile_arguments = {"loss_weights": 2.0**exponent}
    model = trainable(small_network(2, units=5), compile_arguments=compile_arguments, **settings)
    return fit(model, X, np.sin(2 * X), epochs=12), model.get_weights()


@pytest.mark.slow
def test_a_loss_times_a_power_of_two_gives_the_same_run_bit_for_bit():
    (history, weights), (other, other_weights) = grown(-20), grown(20)
    assert_equal(weights, other_weights)
    for key in ("reduction_ratio", "step_size", "cg_iterations", "num_cases"):
        assert history[key] == other[key]
    np.testing.assert_array_equal(other["damping"], 2.0**40 * np.asarray(history["damping"]))


def plain():
    """A model whose first update finds the damping."""
    settings = {"damping": None, "preconditioner": EmpiricalFisherDiagonal(), "growing_batch": None}
    return trainable(small_network(2, units=5), **settings)


def test_the_first_update_finds_the_damping_and_the_second_goes_on_from_it():
    model = renewed(plain)
    history = fit(model, X, np.sin(2 * X), epochs=2)
    scale = float(model.optimizer.curvature_scale)
    assert history["damping"][0] == pytest.approx(0.1 * scale, rel=1e-6)
    assert history["damping"][1] / history["damping"][0] == pytest.approx(
        1 / 2.5 if history["reduction_ratio"][0] > 0.9 else 1 if history["reduction_ratio"][0] >= 0.25 else 2.5
    )


def test_a_damping_that_is_given_stays_what_it_is():
    model = renewed(plain)
    model.optimizer.damping.assign(0.5)
    assert fit(model, X, np.sin(2 * X))["damping"] == [0.5]
    assert float(model.optimizer.curvature_scale) > 0


def test_a_first_batch_that_says_nothing_leaves_the_damping_to_be_found():
    model = renewed(plain)
    with pytest.warns(UserWarning, match="400 of the cases of the batch"):
        history = fit(model, X * np.nan, np.sin(2 * X), epochs=2)
    assert np.isnan(history["damping"]).all() and float(model.optimizer.curvature_scale) == 0
    history = fit(model, X, np.sin(2 * X), epochs=2)
    assert np.isfinite(history["damping"]).all() and history["loss"][1] < history["loss"][0]
