"""What one update promises: the paper's numbers, against dense solves."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import PROBLEMS, compiled, dense_matrix, inputs, make_model, model_data, update_state, with_objective

from keras_hf import (
    CGStop,
    ConjugateGradient,
    DoubleBackward,
    EmpiricalFisherDiagonal,
    GaussNewton,
    Hessian,
    Identity,
    ResidualTolerance,
)
from keras_hf.common.vectors import dot
from keras_hf.solvers.preconditioners import Preconditioner
from keras_hf.update import hf_update

pytestmark = pytest.mark.usefixtures("float64")


def update(objective, damping=0.3, warm_start=None, curvature=None, scale=1.0, **parts):
    parts = {
        "preconditioner": EmpiricalFisherDiagonal(),
        "stopping": ResidualTolerance(1e-13),
        "max_iterations": 400,
        "warm_start_decay": 0.95,
        **parts,
    }
    solver = ConjugateGradient(**parts)
    state = update_state(objective, solver, damping, scale)
    if warm_start is not None:
        state = state._replace(solver={**state.solver, "warm_start": warm_start})
    return hf_update(objective, curvature or GaussNewton(DoubleBackward()), solver, state)


def problem_data(name="mse", **arguments):
    model = make_model(PROBLEMS[name].activation, PROBLEMS[name].loss, **arguments)
    return model, model_data(model, inputs(), PROBLEMS[name].targets(np.random.default_rng(3)))


def linear_regression(regularizer=None):
    """A quadratic objective: a linear network under squared error."""
    dense = keras.layers.Dense(3, kernel_regularizer=regularizer)
    model = compiled(keras.Sequential([keras.Input((2,)), dense]))
    return model, model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)))


class ExactInverse(Preconditioner):
    """The inverse of the damped matrix itself."""

    def inverse(self, objective, linearize, damping, state):
        matrix = dense_matrix(linearize(), objective.num_weights)
        inverse = tf.linalg.inv(matrix + damping * tf.eye(objective.num_weights, dtype=tf.float64))
        return lambda residual: tf.linalg.matvec(inverse, residual), state


@pytest.mark.parametrize(
    "name", ["mse", pytest.param("binary from probabilities", marks=pytest.mark.slow), "categorical from probabilities"]
)
def test_cg_run_to_the_end_equals_the_dense_solve(name):
    model, data = problem_data(name)

    def compute(objective):
        matrix = dense_matrix(objective.product(GaussNewton(DoubleBackward())), objective.num_weights)
        gradient = objective.loss_and_gradient().gradient
        updates = [update(objective, preconditioner=each) for each in (EmpiricalFisherDiagonal(), Identity())]
        return matrix, gradient, [found.state.solver["warm_start"] for found in updates]

    matrix, gradient, solutions = with_objective(model, data, compute)
    expected = np.linalg.solve(matrix.numpy() + 0.3 * np.eye(27), -gradient.numpy())
    for solution in solutions:
        np.testing.assert_allclose(solution, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())


@pytest.mark.slow
def test_a_bound_on_the_kept_iterates_takes_the_same_step_from_the_last_of_them():
    model, data = problem_data()

    def compute(objective):
        bounds = (None, 100, 2)
        return [
            update(objective, max_iterations=12, stopping=ResidualTolerance(1e-300), max_kept_iterates=b)
            for b in bounds
        ]

    every, loose, tight = with_objective(model, data, compute)
    tf.nest.map_structure(np.testing.assert_array_equal, loose, every)
    assert every.trace["iterate_numbers"].numpy().tolist() == [5, 7, 9, 11, 12]
    assert tight.trace["iterate_numbers"].numpy().tolist() == [11, 12]
    assert every.logs["cg_step"] in (11, 12)
    np.testing.assert_array_equal(tight.step, every.step)


def test_exact_inverse_as_preconditioner_needs_one_iteration():
    model, data = problem_data()
    found = with_objective(
        model, data, lambda o: update(o, preconditioner=ExactInverse(), stopping=ResidualTolerance(1e-10))
    )
    assert found.logs["cg_iterations"] == 1


def test_reduction_ratio_is_one_on_a_quadratic_for_any_damping():
    model, data = linear_regression(keras.regularizers.L2(0.25))
    of_damping = tf.function(lambda damping: with_objective(model, data, lambda o: update(o, damping)))
    for damping in (0.0, 0.3, 30.0):
        found = of_damping(tf.constant(damping, tf.float64))
        np.testing.assert_allclose(found.reduction_ratio, 1, rtol=1e-10)
        assert found.step_size == 1


def test_reduction_ratio_of_short_steps_is_one_whatever_the_chunk():
    model, data = problem_data()
    of_damping = tf.function(
        lambda damping: with_objective(model, data, lambda o: update(o, damping), curvature_batch_size=3)
    )
    errors = [abs(float(of_damping(tf.constant(damping, tf.float64)).reduction_ratio) - 1) for damping in (1.0, 1e2)]
    # They differ by what the curvature of all cases has along a step whose length falls with the damping.
    assert errors[0] > 1e-3 and errors[1] < 0.02 * errors[0]


@pytest.mark.slow
def test_undamped_update_solves_least_squares():
    model, data = linear_regression()
    found = with_objective(model, data, lambda o: (o.candidate(update(o, damping=0.0).step), update(o, damping=0.0)))
    features = np.concatenate([data.x, np.ones((15, 1))], 1)
    expected = np.linalg.lstsq(features, data.y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(np.concatenate([found[0][0], found[0][1][None]]), expected, rtol=1e-8)


def test_a_zero_gradient_gives_a_zero_step_and_no_ratio():
    model, data = linear_regression()
    model.set_weights([np.zeros((2, 3)), np.zeros(3)])
    data = data._replace(y=tf.zeros_like(data.y))
    found = with_objective(model, data, update)
    assert (found.step.numpy() == 0).all() and np.isnan(found.reduction_ratio)
    assert found.logs["cg_stop"] == CGStop.CONVERGED and found.gradient_norm == 0 and found.logs["cg_iterations"] == 0


def test_negative_curvature_stops_cg_and_still_lowers_the_loss():
    model, data = problem_data("mse on sigmoid")
    found = with_objective(
        model, data, lambda o: update(o, damping=0.0, curvature=Hessian(DoubleBackward()), preconditioner=Identity())
    )
    assert found.logs["cg_stop"] == CGStop.NEGATIVE_CURVATURE
    after = with_objective(model, data, lambda o: o.loss_at(found.step))
    assert after < found.loss


@pytest.mark.slow
def test_an_uphill_warm_start_is_dropped():
    model, data = problem_data()

    def compute(objective):
        uphill = 1e3 * objective.loss_and_gradient().gradient
        return update(objective, warm_start=uphill, max_iterations=1), update(objective, max_iterations=1)

    warm, cold = with_objective(model, data, compute)
    np.testing.assert_array_equal(warm.step, cold.step)
    assert warm.step_size > 0


@pytest.mark.slow
def test_warm_start_continues_from_the_decayed_last_iterate():
    model, data = problem_data()
    limited = {"max_iterations": 6, "stopping": ResidualTolerance(1e-13)}
    first = with_objective(model, data, lambda o: update(o, **limited))
    # With the solution as start, undecayed, CG has nothing left to do.
    solved = with_objective(model, data, update)
    again = with_objective(
        model,
        data,
        lambda o: update(
            o, warm_start=solved.state.solver["warm_start"], warm_start_decay=1.0, stopping=ResidualTolerance(1e-8)
        ),
    )
    assert again.logs["cg_iterations"] <= 1
    assert first.logs["cg_iterations"] == 6


def test_numbers_that_are_not_finite_reject_the_step():
    model, data = problem_data()
    poisoned = data._replace(x=tf.tensor_scatter_nd_update(data.x, [[0, 0]], [np.nan]))
    found = with_objective(model, poisoned, update)
    assert found.step_size == 0 and np.isnan(found.reduction_ratio)
    assert (found.state.solver["warm_start"].numpy() == 0).all()
    assert np.isnan(found.loss)


class Shifted:
    """A linearization whose H is off by a multiple of the identity where its factors are asked for."""

    def __init__(self, linearized, shift):
        self._linearized, self._shift, self.added = linearized, shift, linearized.added

    def __call__(self, v, *more):
        return self._linearized(v, *more)

    def factors(self):
        tangents_of, hessian, pull_back = self._linearized.factors()
        return tangents_of, lambda u: [h + self._shift * t for h, t in zip(hessian(u), u, strict=True)], pull_back


class ShiftedGaussNewton(GaussNewton):
    def linearize(self, piece):
        return Shifted(super().linearize(piece), shift=1e-3)


def test_the_check_of_products_allows_for_what_is_rounding_beside_the_scale():
    model, data = problem_data()

    def errors(objective):
        product, v = objective.product(ShiftedGaussNewton(DoubleBackward())), objective.start_vector
        found = tf.stack([product.errors(v)[0], product.errors(v, 1e9)[0], product.errors(v, 1e13)[0]])
        return found, dot(v, v), dot(v, product(v))

    (alone, beside, far_beside), squares, form = with_objective(model, data, errors)
    # H is 2 / (number of outputs), so that the sides differ by the shift times the squared tangents.
    difference = 1e-3 * form * tf.size(data.y, tf.float64) / 2
    rounding, noise = 1e-3, 10 * 2.0**-52 * squares
    assert far_beside < rounding < alone
    for error, scale in ((beside, 1e9), (far_beside, 1e13)):
        np.testing.assert_allclose(1 / error - 1 / alone, scale * noise / rounding / difference, rtol=1e-6)


def test_the_check_of_products_runs_no_other_linearization():
    model, data = problem_data()
    calls, network = [], model.network.call
    object.__setattr__(model.network, "call", lambda *args, **kwargs: calls.append(1) or network(*args, **kwargs))

    def errors(objective):
        product = objective.product(GaussNewton(DoubleBackward()))
        before = len(calls)
        found = product.errors(tf.ones([objective.num_weights], tf.float64))
        assert before > 0 and len(calls) == before
        return found

    assert with_objective(model, data, errors).numpy().max() < 1e-12
