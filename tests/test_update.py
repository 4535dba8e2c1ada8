"""What one update promises: the paper's numbers, against dense solves."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import (
    PROBLEMS,
    compiled,
    dense_matrix,
    inputs,
    make_model,
    model_data,
    objective_function,
    set_up,
    update_state,
    with_objective,
)

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
from keras_hf.method.update import hf_update
from keras_hf.solvers.preconditioners import Preconditioner

pytestmark = pytest.mark.usefixtures("float64")


class Limited(ResidualTolerance):
    """Stops at a tolerance, or after as many iterations as a variable says: one trace serves every limit."""

    limit = tf.Variable(400)

    def should_stop(self, iteration, value_at, residual_norm, b_norm):
        return super().should_stop(iteration, value_at, residual_norm, b_norm) | (iteration >= self.limit)


class ExactInverse(Preconditioner):
    """The inverse of the damped matrix itself."""

    def inverse(self, objective, linearize, damping, state):
        matrix = dense_matrix(linearize(), objective.num_weights)
        inverse = tf.linalg.inv(matrix + damping * tf.eye(objective.num_weights, dtype=tf.float64))
        return lambda residual: tf.linalg.matvec(inverse, residual), state


def problem_data(name="mse"):
    model = make_model(PROBLEMS[name].activation, PROBLEMS[name].loss)
    return model, model_data(model, inputs(), PROBLEMS[name].targets(np.random.default_rng(3)))


class Update:
    """Updates of one problem, compiled once for all data, dampings, warm starts and limits of iterations."""

    def __init__(self, model, data, curvature=None, curvature_batch_size=None, with_matrix=False, **parts):
        self.data, self._num_weights = data, model.count_params()
        curvature = curvature or GaussNewton(DoubleBackward())
        parts = {
            "preconditioner": EmpiricalFisherDiagonal(),
            "stopping": Limited(1e-13),
            "max_iterations": 400,
            **parts,
        }
        solver = ConjugateGradient(warm_start_decay=0.95, **parts)
        set_up(model, curvature_batch_size=curvature_batch_size)

        def compute(objective, damping, warm_start):
            state = update_state(objective, solver, damping, 1.0)
            state = state._replace(solver={**state.solver, "warm_start": warm_start})
            result = hf_update(objective, curvature, solver, state)
            matrix, gradient = None, None
            if with_matrix:
                matrix = dense_matrix(objective.product(curvature), objective.num_weights)
                gradient = objective.loss_and_gradient().gradient
            return result, matrix, gradient, objective.candidate(result.step), objective.loss_at(result.step)

        self._compute = objective_function(model, compute)

    def __call__(self, damping=0.3, data=None, warm_start=None, limit=400):
        """The result of an update; matrix of the curvature and gradient before it, if wanted; weights and loss after it."""
        Limited.limit.assign(limit)
        warm_start = np.zeros(self._num_weights) if warm_start is None else warm_start
        return self._compute(data or self.data, tf.constant(damping, tf.float64), tf.constant(warm_start, tf.float64))


@functools.cache
def squares():
    """Updates of squared errors, with the curvature of 3 of the 15 cases."""
    return Update(*problem_data(), curvature_batch_size=3, with_matrix=True)


@functools.cache
def linear_regression():
    """Updates of a quadratic objective: a linear network under squared error, with weight decay, and weights of zero."""
    dense = keras.layers.Dense(3, kernel_initializer="zeros", kernel_regularizer=keras.regularizers.L2(0.25))
    model = compiled(keras.Sequential([keras.Input((2,)), dense]))
    return Update(model, model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3))))


def assert_solved(result, matrix, gradient):
    """That the last iterate is the dense solution."""
    expected = np.linalg.solve(matrix.numpy() + 0.3 * np.eye(len(gradient)), -gradient.numpy())
    np.testing.assert_allclose(
        result.state.solver["warm_start"], expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max()
    )


def test_cg_run_to_the_end_equals_the_dense_solve():
    result, matrix, gradient, *_ = squares()()
    assert result.logs["cg_iterations"] > 1
    assert_solved(result, matrix, gradient)


def test_exact_inverse_as_preconditioner_solves_in_one_iteration():
    of_softmax = Update(
        *problem_data("categorical from probabilities"),
        preconditioner=ExactInverse(),
        stopping=ResidualTolerance(1e-10),
        with_matrix=True,
    )
    result, matrix, gradient, *_ = of_softmax()
    assert result.logs["cg_iterations"] == 1
    assert_solved(result, matrix, gradient)


@pytest.mark.slow
def test_a_bound_on_the_kept_iterates_takes_the_same_step_from_the_last_of_them():
    bounded = Update(*problem_data(), curvature_batch_size=3, max_iterations=12, max_kept_iterates=2)
    every, tight = squares()(1.0, limit=12)[0], bounded(1.0)[0]
    assert tight.logs["cg_stop"] == CGStop.MAX_ITERATIONS and tight.logs["cg_iterations"] == 12
    assert every.trace["iterate_numbers"].numpy().tolist() == [5, 7, 9, 11, 12]
    assert tight.trace["iterate_numbers"].numpy().tolist() == [11, 12]
    assert every.logs["cg_step"] in (11, 12)
    np.testing.assert_array_equal(tight.step, every.step)


def test_reduction_ratio_is_one_on_a_quadratic_for_any_damping():
    for damping in (0.0, 0.3, 30.0):
        result = linear_regression()(damping)[0]
        np.testing.assert_allclose(result.reduction_ratio, 1, rtol=1e-10)
        assert result.step_size == 1


def test_reduction_ratio_of_short_steps_is_one_whatever_the_chunk():
    errors = [abs(float(squares()(damping)[0].reduction_ratio) - 1) for damping in (1.0, 1e2)]
    # They differ by what the curvature of all cases has along a step whose length falls with the damping.
    assert errors[0] > 1e-3 and errors[1] < 0.02 * errors[0]


def test_undamped_update_solves_least_squares():
    kernel, bias = linear_regression()(damping=0.0)[3]
    data = linear_regression().data
    features = np.concatenate([data.x, np.ones((15, 1))], 1)
    # The mean over 45 errors, and decay of the kernel alone.
    system = features.T @ features / 45 + 0.25 * np.diag([1, 1, 0])
    expected = np.linalg.solve(system, features.T @ data.y.numpy() / 45)
    np.testing.assert_allclose(np.concatenate([kernel, bias[None]]), expected, rtol=1e-8)


def test_a_zero_gradient_gives_a_zero_step_and_no_ratio():
    data = linear_regression().data
    result = linear_regression()(data=data._replace(y=tf.zeros_like(data.y)))[0]
    assert (result.step.numpy() == 0).all() and np.isnan(result.reduction_ratio)
    assert result.logs["cg_stop"] == CGStop.CONVERGED and result.gradient_norm == 0
    assert result.logs["cg_iterations"] == 0


def test_negative_curvature_stops_cg_and_still_lowers_the_loss():
    of_hessian = Update(*problem_data("mse on sigmoid"), curvature=Hessian(DoubleBackward()), preconditioner=Identity())
    result, *_, loss_after = of_hessian(damping=0.0)
    assert result.logs["cg_stop"] == CGStop.NEGATIVE_CURVATURE
    assert loss_after < result.loss


def test_an_uphill_warm_start_is_dropped():
    cold, _, gradient, *_ = squares()(limit=1)
    warm = squares()(limit=1, warm_start=1e3 * gradient)[0]
    np.testing.assert_array_equal(warm.step, cold.step)
    assert warm.step_size > 0


def test_warm_start_continues_from_the_decayed_last_iterate():
    solution = squares()()[0].state.solver["warm_start"]
    # With the solution as start CG has nothing left to do.
    again = squares()(warm_start=solution / 0.95)[0]
    assert again.logs["cg_iterations"] <= 1
    assert squares()(limit=6)[0].logs["cg_iterations"] == 6


def test_numbers_that_are_not_finite_reject_the_step():
    data = squares().data
    poisoned = data._replace(x=tf.tensor_scatter_nd_update(data.x, [[0, 0]], [np.nan]))
    result = squares()(data=poisoned)[0]
    assert result.step_size == 0 and np.isnan(result.reduction_ratio)
    assert (result.state.solver["warm_start"].numpy() == 0).all()
    assert np.isnan(result.loss)


def test_the_check_of_products_runs_no_other_linearization():
    model, data = problem_data()
    calls, network = [], model.network.call
    object.__setattr__(model.network, "call", lambda *args, **kwargs: calls.append(1) or network(*args, **kwargs))

    def errors(objective):
        product = objective.product(GaussNewton(DoubleBackward()))
        before = len(calls)
        found = product.error(tf.ones([objective.num_weights], tf.float64))
        assert before > 0 and len(calls) == before
        return found

    assert float(with_objective(model, data, errors)) < 1e-12
