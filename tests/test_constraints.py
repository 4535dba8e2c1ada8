"""Bounds and norms: what a box is, and that a least squares problem with them is solved to rounding, its minimum at the bound or within."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import constraints, layers
from scipy.optimize import brentq, least_squares, lsq_linear, nnls

from keras_hf import Box, ConjugateGradient, DirectSolver, HessianFree, HFModel, PreconditionedMomentum
from keras_hf.problem.constraints import bounds_of, projected, tangent_space


def test_a_box_clips_and_is_restored_from_its_configuration():
    box = keras.constraints.deserialize(keras.constraints.serialize(Box(-1, np.inf)))
    np.testing.assert_array_equal(box(np.array([-3.0, 0.5, 7.0])), [-1, 0.5, 7])
    assert bounds_of(box) == (-1, np.inf)


def test_boxes_are_known_by_their_bounds_and_other_constraints_have_none():
    assert bounds_of(keras.constraints.NonNeg()) == (0, np.inf)
    assert bounds_of(Box(upper=2)) == (-np.inf, 2)
    for other in (None, keras.constraints.MinMaxNorm(), keras.constraints.UnitNorm()):
        assert bounds_of(other) == (-np.inf, np.inf)


@pytest.mark.parametrize("bounds", [(1, 1), (2, 1), (float("nan"), 1), ("0", 1), (0, True)])
def test_bounds_that_are_not_numbers_in_their_order_are_refused_by_name(bounds):
    with pytest.raises(ValueError, match="`(lower|upper)` must be .*Received: "):
        Box(*bounds)


def linear(num_cases, num_inputs, constraint, l2=0.0, seed=0, solver=None):
    """A linear model with bounds on its weights, and cases of which many would have weights outside."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(num_cases, num_inputs)), rng.normal(size=(num_cases, 1))
    dense = layers.Dense(
        1, use_bias=False, kernel_constraint=constraint, kernel_regularizer=keras.regularizers.L2(l2) if l2 else None
    )
    model = HFModel(keras.Sequential([keras.Input((num_inputs,)), dense]))
    model.compile(HessianFree(solver=solver or DirectSolver(), growing_batch=None), loss="mse")
    return model, x, y


def weights_after(model, x, y, epochs):
    model.fit(x, y, epochs=epochs, verbose=0)
    return model.get_weights()[0][:, 0]


@pytest.mark.filterwarnings("ignore:Training has converged to rounding")
@pytest.mark.parametrize("solver", [DirectSolver(), ConjugateGradient()], ids=["direct", "cg"])
def test_nonnegative_least_squares_is_solved_to_rounding(float64, solver):
    model, x, y = linear(30, 8, "non_neg", solver=solver)
    expected, _ = nnls(x, y[:, 0])
    assert 2 <= (expected == 0).sum() <= 6
    np.testing.assert_allclose(weights_after(model, x, y, 25), expected, rtol=1e-9, atol=1e-12)


def least_on_sphere(x, y, norm):
    """The least squares solution of a given norm: that of the ridge, below no eigenvalue, which has it."""
    values, vectors = np.linalg.eigh(x.T @ x)
    right = vectors.T @ x.T @ y
    found = brentq(lambda ridge: np.linalg.norm(right / (values + ridge)) - norm, -values[0] + 1e-9, 1e6, xtol=1e-14)
    return vectors @ (right / (values + found))


@pytest.mark.filterwarnings("ignore:Training has converged to rounding")
@pytest.mark.parametrize(
    ("solver", "constraint", "norm"),
    [
        (DirectSolver(), constraints.MaxNorm(0.3), 0.3),
        (ConjugateGradient(), constraints.MaxNorm(0.3), 0.3),
        (ConjugateGradient(), constraints.UnitNorm(), 1.0),
        (PreconditionedMomentum(), constraints.MinMaxNorm(0.2, 0.3), 0.3),
    ],
    ids=["direct", "cg", "unit", "momentum"],
)
def test_least_squares_on_a_sphere_are_solved_where_the_step_keeps_to_its_tangent(float64, solver, constraint, norm):
    model, x, y = linear(30, 8, constraint, solver=solver)
    found = weights_after(model, x, y, 60)
    np.testing.assert_allclose(np.linalg.norm(found), norm, rtol=1e-12)
    np.testing.assert_allclose(found, least_on_sphere(x, y[:, 0], norm), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("constraint", "place"),
    [(constraints.UnitNorm(0), 0), (constraints.MaxNorm(2.0, [0, 1]), [0, 1]), (constraints.MinMaxNorm(1, 2), 0)],
    ids=["unit", "max", "minmax"],
)
def test_the_tangent_space_is_that_of_the_norms_at_their_bounds(float64, constraint, place):
    rng = np.random.default_rng(0)
    value, slope = (tf.constant(rng.normal(size=(3, 2))) for _ in range(2))
    value = projected(constraint, value * 100)
    np.testing.assert_allclose(value, np.asarray(constraint(value)), rtol=1e-6)
    slope = slope if isinstance(constraint, constraints.UnitNorm) else -tf.abs(slope) * tf.sign(value)
    tangent = tangent_space(
        [None, constraint], [tf.ones([1], tf.float64), value], tf.concat([[1.0], tf.reshape(slope, [-1])], 0)
    )
    rows = tangent(tf.eye(7, dtype=tf.float64)).numpy()
    np.testing.assert_allclose(rows, rows.T, atol=1e-15)
    np.testing.assert_allclose(rows @ rows, rows, atol=1e-15)
    v = rng.normal(size=7)
    along = tangent(tf.constant(v)).numpy()
    np.testing.assert_allclose(along, rows @ v, atol=1e-15)
    np.testing.assert_allclose(
        np.sum(along[1:].reshape(3, 2) * value.numpy(), tuple(np.atleast_1d(place))), 0, atol=1e-14
    )
    # Where the loss falls inwards a norm is free, but for `UnitNorm`.
    free = tangent_space(
        [None, constraint], [tf.ones([1], tf.float64), value], tf.concat([[1.0], tf.reshape(value, [-1])], 0)
    )
    assert (np.linalg.matrix_rank(free(tf.eye(7, dtype=tf.float64))) == 7) != isinstance(
        constraint, constraints.UnitNorm
    )


def test_a_box_with_fewer_cases_than_weights_and_a_penalty_is_solved_to_rounding(float64):
    # Of the dual system. The penalty as rows of the least squares problem: that of Keras is not halved.
    model, x, y = linear(6, 10, Box(-0.1, 0.2), l2=0.05)
    rows = np.concatenate([x, np.sqrt(0.05 * len(x)) * np.eye(10)])
    expected = lsq_linear(rows, np.concatenate([y[:, 0], np.zeros(10)]), (-0.1, 0.2), tol=1e-14).x
    found = weights_after(model, x, y, 10)
    held = np.isclose(found, -0.1) | np.isclose(found, 0.2)
    assert 2 <= held.sum() <= 8
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


class Decay(layers.Layer):
    """`a exp(-b x)`, with the amplitude at most 1.8."""

    def build(self, shape):
        self.a = self.add_weight(name="a", shape=(), initializer="ones", constraint=Box(0, 1.8))
        self.b = self.add_weight(name="b", shape=(), initializer="ones", constraint="non_neg")

    def call(self, x):
        return self.a * keras.ops.exp(-self.b * x)


@pytest.mark.slow
def test_a_formula_ends_at_its_bound_where_scipy_does_and_the_gradient_along_it_vanishes(float64):
    x = np.linspace(0, 4, 50)[:, None]
    y = 2 * np.exp(-1.5 * x) + 0.05 * np.random.default_rng(0).normal(size=x.shape)
    model = HFModel(keras.Sequential([keras.Input((1,)), Decay()]))
    model.compile(HessianFree(solver=DirectSolver()), loss="mse")
    logs = model.fit(x, y, epochs=9, verbose=0).history
    tolerances = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15)
    f = model.objective(x, y)
    expected = least_squares(f.residuals, [1.0, 1.0], f.jacobian, bounds=([0, 0], [1.8, np.inf]), **tolerances).x
    np.testing.assert_allclose(f.weights, expected, rtol=1e-8)
    assert f.weights[0] == 1.8 and abs(f.loss_and_gradient(f.weights)[1][0]) > 1e-2
    assert logs["gradient_norm"][-1] < 1e-8
