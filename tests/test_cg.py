import numpy as np
import pytest
import tensorflow as tf
from training import assert_equal, assert_same

from keras_hf.common.vectors import dot
from keras_hf.solvers.cg import CGStop, conjugate_gradient, minimized
from keras_hf.solvers.stopping import RelativeProgress, ResidualTolerance, StoppingRule

# Preconditioners as callables (matrix, vector) -> M^-1 r. A new one stands here.
PRECONDITIONERS = {
    "none": None,
    "identity": lambda a, r: tf.identity(r),
    "jacobi": lambda a, r: r / tf.linalg.diag_part(a),
    "martens": lambda a, r: r / tf.linalg.diag_part(a) ** 0.75,
    "dense": lambda a, r: tf.linalg.matvec(tf.linalg.inv(a + 10 * tf.eye(len(a), dtype=a.dtype)), r),
    "inverse": lambda a, r: tf.linalg.matvec(tf.linalg.inv(a), r),
}
# Stopping rules, as strict as float64 can tell.
STOPPING_RULES = {"relative_progress": RelativeProgress(1e-16), "residual_tolerance": ResidualTolerance(1e-13)}

preconditioned = pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS.keys())


def compiled(solve):
    """Compiles as Keras compiles a train step, without AutoGraph."""
    return lambda *args, **kwargs: tf.function(lambda: solve(*args, **kwargs), autograph=False)()


class Unstoppable(StoppingRule):
    """Never stops."""

    def should_stop(self, iteration, value_at, residual_norm, b_norm):
        return tf.constant(False)


class Problem:
    """A dense system, CG on it, and the number of products that it took."""

    def __init__(self, a, b, dtype="float64"):
        self.a, self.b = tf.constant(a, dtype), tf.constant(b, dtype)
        self.num_products = tf.Variable(0)

    def product(self, x):
        self.num_products.assign_add(1)
        return tf.linalg.matvec(self.a, x)

    def solve(self, x0=None, preconditioner=None, stopping=None, max_iterations=None):
        precondition = None if preconditioner is None else lambda r: preconditioner(self.a, r)
        x0 = None if x0 is None else tf.constant(x0, self.b.dtype)
        return conjugate_gradient(self.product, self.b, x0, precondition, stopping, max_iterations)

    def quadratic(self, x):
        """The quadratic in float64 at every row of x."""
        a, b, x = (np.asarray(each, "float64") for each in (self.a, self.b, x))
        return 0.5 * np.einsum("...i,ij,...j", x, a, x) - x @ b


def random_problem(n=30, condition=1e3):
    """A random symmetric positive definite system with these extremes of the spectrum."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    # Uneven diagonal, so that diagonal preconditioners differ from the identity.
    scale = np.linspace(1, 2, n)
    a = scale[:, None] * (q * np.geomspace(1, condition, n)) @ q.T * scale
    return Problem((a + a.T) / 2, rng.normal(size=n))


def diagonal_problem(n, condition, dtype):
    """An ill-conditioned diagonal system whose small eigenvalues matter."""
    eigenvalues = np.geomspace(1 / condition, 1, n).astype(dtype)
    b = np.random.default_rng(0).normal(size=n) * np.sqrt(eigenvalues)
    return Problem(np.diag(eigenvalues), b, dtype)


def martens_grid(last):
    """The numbers ceil(5 * 1.3^j) up to the last iteration, and the last."""
    grid = [int(np.ceil(5 * 1.3**j)) for j in range(40)]
    return [number for number in grid if number < last] + [last]


NUM_PRODUCTS = tf.Variable(0)


def run(a, b, x0, inverse, num_good, bad):
    """CG with the inverse of a preconditioner, on products of which one entry is bad after so many that are good."""
    NUM_PRODUCTS.assign(0)

    def product(x):
        is_bad = (NUM_PRODUCTS.assign_add(1) > num_good) & (tf.range(tf.size(b)) == tf.size(b) - 1)
        return tf.where(is_bad, bad, tf.linalg.matvec(a, x))

    return conjugate_gradient(product, b, x0, lambda r: tf.linalg.matvec(inverse, r), Unstoppable())


MATRIX, VECTOR, NUMBER = (tf.TensorSpec([None] * rank, "float64") for rank in (2, 1, 0))
compiled_run = tf.function(run, [MATRIX, VECTOR, VECTOR, MATRIX, tf.TensorSpec([], "int32"), NUMBER], autograph=False)


def run_in_both_modes(problem, x0=None, inverse=None, num_good=10**6, bad=0.0):
    """Runs CG eagerly and compiled, and returns the result that is common to both."""
    # What is not finite is why: graph optimization rewrites comparisons, and `not (a < b)` is not `a >= b` for NaN.
    n = len(problem.b)
    x0, inverse = np.zeros(n) if x0 is None else x0, np.eye(n) if inverse is None else inverse
    numbers = [tf.constant(value, tf.float64) for value in (x0, inverse, bad)]
    arguments = problem.a, problem.b, *numbers[:2], tf.constant(num_good), numbers[2]
    eager, graph = run(*arguments), compiled_run(*arguments)
    assert (graph.reason, graph.num_iterations) == (eager.reason, eager.num_iterations)
    # Rounding: a graph may add in another order.
    assert_same(graph, eager, rtol=1e-14, atol=1e-14)
    return eager


def assert_ended(result, reason, num_iterations, iterates=None, rtol=0):
    """That a run ended so, with these iterates."""
    assert result.reason == reason
    assert result.num_iterations == num_iterations
    if iterates is not None:
        np.testing.assert_allclose(result.iterates, iterates, rtol=rtol)


@pytest.mark.parametrize(
    ("preconditioner", "stopping"),
    [
        *((name, "residual_tolerance") for name in PRECONDITIONERS),
        ("none", "relative_progress"),
        ("dense", "relative_progress"),
    ],
)
def test_runs_to_the_end_lower_the_quadratic_to_that_of_the_dense_solve(preconditioner, stopping):
    problem = random_problem()
    result = compiled(problem.solve)(
        np.ones(30), PRECONDITIONERS[preconditioner], STOPPING_RULES[stopping], max_iterations=200
    )
    assert result.reason in (CGStop.STOPPING_RULE, CGStop.CONVERGED)
    # Progress of 1e-16 is an error of 1e-8 in the norm of A, which the condition of 4e3 can stretch 60-fold.
    np.testing.assert_allclose(result.iterates[-1], np.linalg.solve(problem.a, problem.b), rtol=0, atol=1e-6)
    # Both ways lose digits of float64 only, at most the condition's 4e3 of them where x is large.
    np.testing.assert_allclose(result.values, problem.quadratic(result.iterates), rtol=1e-11)
    assert result.iterates.dtype == result.values.dtype == tf.float64
    # The course holds those that are not kept, too, and the start. In the end rounding decides.
    assert result.course.shape == (result.num_iterations + 1,)
    assert result.iterate_numbers.numpy().tolist() == martens_grid(int(result.num_iterations))
    np.testing.assert_array_equal(tf.gather(result.course, result.iterate_numbers), result.values)
    assert result.course[0].numpy() == pytest.approx(problem.quadratic(np.ones(30)), rel=1e-12)
    assert result.num_iterations >= 1 and (np.diff(result.course[:16]) <= 0).all()


def test_the_grid_is_that_of_martens_code():
    assert martens_grid(60) == [5, 7, 9, 11, 15, 19, 25, 32, 41, 54, 60]


def test_a_limit_of_iterations_is_kept_and_reported_and_its_last_iterate_is_kept():
    for last in (1, 4, 5, 6, 15):
        result = random_problem().solve(stopping=Unstoppable(), max_iterations=last)
        assert_ended(result, CGStop.MAX_ITERATIONS, last)
        assert result.iterate_numbers.numpy().tolist() == martens_grid(last)
        assert result.iterates.shape == (len(result.iterate_numbers), 30)
        assert result.values.shape == result.iterate_numbers.shape


def test_a_kept_iterate_is_what_a_run_of_so_many_iterations_ends_with():
    result = random_problem().solve(stopping=Unstoppable(), max_iterations=20)
    for number, iterate in zip(result.iterate_numbers.numpy(), result.iterates, strict=True):
        shorter = random_problem().solve(stopping=Unstoppable(), max_iterations=int(number))
        np.testing.assert_array_equal(shorter.iterates[-1], iterate)


# No iterate of the grid, one, and several more.
@pytest.mark.parametrize(
    ("last", "mode"),
    [(3, lambda solve: solve), (17, compiled), (32, lambda solve: solve)],
    ids=["3, eager", "17, compiled", "32, eager"],
)
def test_a_bound_keeps_the_last_of_the_kept_iterates_bit_for_bit(last, mode):
    problem, bounds = diagonal_problem(100, 1e8, "float64"), (1, 2, 4, 100)

    def solve():
        with_form = lambda v: (image := problem.product(v), dot(v, image))  # noqa: E731
        found = [
            minimized(with_form, problem.b, stopping=Unstoppable(), max_iterations=last, max_kept=max_kept)
            for max_kept in (None, *bounds)
        ]
        return [each._replace(iterates=each.iterates.matrix()) for each in found]

    every, *bounded = mode(solve)()
    assert every.iterate_numbers.numpy().tolist() == martens_grid(last)
    for max_kept, found in zip(bounds, bounded, strict=True):
        assert len(found.iterates) == min(max_kept, len(every.iterates))
        for name in ("iterates", "iterate_numbers", "values"):
            np.testing.assert_array_equal(getattr(found, name), getattr(every, name)[-max_kept:])
        np.testing.assert_array_equal(found.course, every.course)


def test_identity_preconditioner_equals_none():
    plain = random_problem().solve(max_iterations=20)
    assert_equal(random_problem().solve(preconditioner=PRECONDITIONERS["identity"], max_iterations=20), plain)


def test_exact_inverse_needs_one_iteration():
    problem = random_problem()
    result = problem.solve(preconditioner=PRECONDITIONERS["inverse"], stopping=ResidualTolerance(1e-10))
    assert result.num_iterations == 1
    # Rounding of the inverse, a condition of 4e3 times 1e-16.
    np.testing.assert_allclose(result.iterates[-1], np.linalg.solve(problem.a, problem.b), rtol=1e-10)


def test_k_distinct_eigenvalues_need_k_iterations():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 20)))[0]
    for eigenvalues in ([3.0], [1.0, 10.0], [1.0, 2.0, 50.0, 400.0]):
        problem = Problem((q * np.resize(eigenvalues, 20)) @ q.T, np.arange(1.0, 21.0))
        result = problem.solve(stopping=ResidualTolerance(1e-9))
        assert result.num_iterations == len(eigenvalues)
        # A residual of 1e-9 over the condition, at most 400.
        np.testing.assert_allclose(result.iterates[-1], np.linalg.solve(problem.a, problem.b), rtol=1e-6)


def test_preconditioned_run_equals_plain_run_in_scaled_variables():
    # With M = SS', CG on A is CG on S^-1 A S^-T, its iterates multiplied by S^-T.
    problem = random_problem()
    s = np.sqrt(np.diag(problem.a))
    scaled = Problem(problem.a / np.outer(s, s), problem.b / s)
    result = problem.solve(preconditioner=PRECONDITIONERS["jacobi"], stopping=Unstoppable(), max_iterations=9)
    plain = scaled.solve(stopping=Unstoppable(), max_iterations=9)
    # The same sums in another order: rounding, grown a little by each of 9 iterations.
    np.testing.assert_allclose(result.iterates, plain.iterates / s, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.values, plain.values, rtol=1e-12)


def test_start_at_the_solution_takes_no_iteration():
    # Whole numbers: the residual is exactly zero.
    problem = Problem([[2.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 4.0]], [4.0, 10.0, 14.0])
    result = problem.solve([1.0, 2.0, 3.0])
    assert_ended(result, CGStop.CONVERGED, 0, [[1.0, 2.0, 3.0]])
    assert result.iterate_numbers.numpy().tolist() == [0]
    # -b'x/2 at the solution.
    np.testing.assert_array_equal(result.values, [-(4 + 20 + 42) / 2])


def test_a_better_start_takes_fewer_iterations():
    problem = random_problem()
    near = np.linalg.solve(problem.a, problem.b) * (1 + 1e-6)
    stopping = ResidualTolerance(1e-5)
    from_near = problem.solve(near, stopping=stopping)
    assert from_near.num_iterations < problem.solve(stopping=stopping).num_iterations


@pytest.mark.parametrize("x0", [[0.0, 0.0], [1.0, -2.0], [np.nan, 1.0]])
def test_zero_right_side_gives_zero_from_any_start(x0):
    problem = Problem([[2.0, 0.0], [0.0, 3.0]], [0.0, 0.0])
    for result in (run_in_both_modes(problem, x0), problem.solve()):
        assert_ended(result, CGStop.CONVERGED, 0, [[0.0, 0.0]])
        np.testing.assert_array_equal(result.values, [0.0])


def test_negative_curvature_stops_at_the_iterate_so_far():
    # By hand: p = b has curvature 4 - 1 and r'r = 5, so x = 5/3 b; the next p = (20, 40)/9 has curvature (400 - 1600)/81.
    result = run_in_both_modes(Problem([[1.0, 0.0], [0.0, -1.0]], [2.0, 1.0]))
    assert_ended(result, CGStop.NEGATIVE_CURVATURE, 1, [[10 / 3, 5 / 3]], rtol=1e-15)
    # x'Ax/2 - b'x = (100 - 25)/18 - 25/3.
    np.testing.assert_allclose(result.values, [-25 / 6], rtol=1e-15)


@pytest.mark.parametrize("curvature", [-2.0, 0.0])
@preconditioned
def test_negative_curvature_at_once_gives_the_preconditioned_gradient_step(preconditioner, curvature):
    metric = tf.constant(np.diag([1.0, 4.0, 16.0]))
    problem = Problem(curvature * metric, [1.0, 2.0, 3.0])
    x0 = np.array([0.5, 0.0, 0.0])
    result = problem.solve(x0, None if preconditioner is None else lambda a, r: preconditioner(metric, r))
    residual = tf.constant([1.0 - 0.5 * curvature, 2.0, 3.0], tf.float64)
    expected = x0 + (residual if preconditioner is None else preconditioner(metric, residual))
    assert_ended(result, CGStop.NEGATIVE_CURVATURE, 1, [expected], rtol=1e-15)
    assert result.iterate_numbers.numpy().tolist() == [1]
    np.testing.assert_allclose(result.values, [problem.quadratic(expected)], rtol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("num_iterations", [0, 1, 6])
def test_a_product_that_is_not_finite_leaves_the_last_finite_iterate(num_iterations, bad):
    problem, expected = random_problem(), np.zeros(30)
    # The first product is at the start.
    result = run_in_both_modes(problem, num_good=1 + num_iterations, bad=bad)
    assert_ended(result, CGStop.BREAKDOWN, num_iterations)
    if num_iterations:
        expected = problem.solve(stopping=Unstoppable(), max_iterations=num_iterations).iterates[-1]
    np.testing.assert_allclose(result.iterates[-1], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "spoiled",
    [{"num_good": 0, "bad": np.nan}, *({"inverse": scale * np.eye(30)} for scale in (-1, 0, np.nan))],
    ids=["product", "inverse below 0", "inverse of 0", "inverse NaN"],
)
def test_a_start_whose_product_is_not_finite_or_a_preconditioner_not_positive_gives_the_start_back(spoiled):
    result = run_in_both_modes(random_problem(), np.arange(30.0), **spoiled)
    assert_ended(result, CGStop.BREAKDOWN, 0, [np.arange(30.0)])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_right_side_that_is_not_finite_breaks_down_at_once(bad):
    assert_ended(run_in_both_modes(Problem(np.eye(2), [bad, 1.0]), [3.0, 4.0]), CGStop.BREAKDOWN, 0)


def test_an_indefinite_preconditioner_breaks_down_where_it_shows():
    # By hand: r = (2, 1) has r'M^-1 r = 3, p = (2, -1) curvature 5, so x = 0.6 p; then r = (0.8, 1.6) has r'M^-1 r = -1.92.
    result = run_in_both_modes(Problem(np.eye(2), [2.0, 1.0]), inverse=np.diag([1.0, -1.0]))
    assert_ended(result, CGStop.BREAKDOWN, 1, [[1.2, -0.6]], rtol=1e-15)


def test_limit_of_iterations_is_ten_times_the_dimension_by_default():
    # Too ill-conditioned to be done in 10 n iterations of float32.
    result = compiled(diagonal_problem(12, 1e12, "float32").solve)(stopping=Unstoppable())
    assert_ended(result, CGStop.MAX_ITERATIONS, 120)


def test_a_tight_tolerance_is_reached_by_default_where_rounding_takes_more_than_n_iterations():
    eigenvalues = np.geomspace(1, 1e3, 50)
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 50)))[0]
    problem = Problem((q * eigenvalues) @ q.T, np.ones(50))
    result = compiled(problem.solve)(stopping=ResidualTolerance(1e-10))
    assert result.reason == CGStop.STOPPING_RULE and 50 < result.num_iterations < 500
    residual = problem.b - tf.linalg.matvec(problem.a, result.iterates[-1])
    assert tf.norm(residual) < 2e-10 * tf.norm(problem.b)


def test_each_iteration_costs_one_product_and_a_start_one_more():
    for x0, more in ((None, 0), (np.ones(30), 1)):
        problem = random_problem()
        result = problem.solve(x0, stopping=Unstoppable(), max_iterations=12)
        assert problem.num_products == result.num_iterations + more


def test_the_stopping_rule_stops_where_it_says():
    class AtSeven(StoppingRule):
        def should_stop(self, iteration, value_at, residual_norm, b_norm):
            return iteration == 7

    assert_ended(random_problem().solve(stopping=AtSeven()), CGStop.STOPPING_RULE, 7)


def test_the_stopping_rule_is_told_of_every_iterate():
    told = []

    class Recorder(StoppingRule):
        def should_stop(self, iteration, value_at, residual_norm, b_norm):
            told.append((int(iteration), [float(value_at(i)) for i in range(iteration + 1)], residual_norm, b_norm))
            return False

    problem = random_problem()
    problem.solve(np.ones(30), stopping=Recorder(), max_iterations=9)
    assert [iteration for iteration, *_ in told] == list(range(1, 10))
    for iteration, values, residual_norm, b_norm in told:
        x = problem.solve(np.ones(30), stopping=Unstoppable(), max_iterations=iteration).iterates[-1]
        # The rule gets the updated residual, which drifts from the true one by rounding.
        true_norm = np.linalg.norm(problem.b - tf.linalg.matvec(problem.a, x))
        assert float(residual_norm) == pytest.approx(true_norm, rel=1e-9)
        assert values[-1] == pytest.approx(problem.quadratic(x), rel=1e-11)
        assert values == told[-1][1][: iteration + 1]
        assert float(b_norm) == pytest.approx(np.linalg.norm(problem.b))


def test_relative_progress_is_the_default_rule():
    by_default = random_problem(condition=10).solve()
    explicit = random_problem(condition=10).solve(stopping=RelativeProgress())
    assert by_default.reason == CGStop.STOPPING_RULE
    assert by_default.num_iterations == explicit.num_iterations


@pytest.mark.parametrize("stopping", STOPPING_RULES.values(), ids=STOPPING_RULES.keys())
def test_compiled_and_eager_runs_agree_and_one_trace_serves_every_right_side(stopping):
    problem, x0, traces = random_problem(), np.linspace(-1, 1, 30), []

    @tf.function(input_signature=2 * [tf.TensorSpec([None], tf.float64)], autograph=False)
    def of_unknown_size(b, x0):
        traces.append(1)
        return conjugate_gradient(problem.product, b, x0, None, stopping, 15)

    graph = of_unknown_size(problem.b, tf.constant(x0))
    eager = problem.solve(x0, None, stopping, 15)
    np.testing.assert_array_equal(graph.iterate_numbers, eager.iterate_numbers)
    assert graph.reason == eager.reason
    # A graph may add in another order: rounding, which 15 iterations let grow.
    np.testing.assert_allclose(graph.iterates, eager.iterates, rtol=0, atol=1e-10)
    np.testing.assert_allclose(graph.values, eager.values, rtol=1e-10)
    # No iteration.
    assert len(of_unknown_size(tf.zeros_like(problem.b), tf.constant(x0)).iterates) == 1 < len(graph.iterates)
    assert len(traces) == 1


def test_float32_iterates_have_values_true_beyond_float32_digits():
    problem = diagonal_problem(400, 1e5, "float32")
    result = compiled(problem.solve)(stopping=ResidualTolerance(1e-6), max_iterations=400)
    assert result.iterates.dtype == tf.float32 and result.values.dtype == tf.float64
    # Sums of 400 float32 numbers alone would be off by about 20 roundings of 6e-8; rounded products summed in float64 by less than one.
    np.testing.assert_allclose(result.values, problem.quadratic(result.iterates), rtol=6e-8)


def test_float32_sees_relative_progress_of_a_ten_millionth():
    def num_iterations(dtype):
        problem = diagonal_problem(200, 1e3, dtype)
        # Ten iterations must win less than 10 * 1e-8 of the whole: a value in float32 has steps of 6e-8.
        result = compiled(problem.solve)(stopping=RelativeProgress(1e-8))
        assert result.reason == CGStop.STOPPING_RULE
        return result.num_iterations

    # Conjugacy is lost a little earlier in float32, so that it needs some more iterations; it neither stops at once nor runs on.
    single, double = int(num_iterations("float32")), int(num_iterations("float64"))
    assert double <= single <= 1.2 * double


def test_a_right_side_that_is_no_vector_and_a_limit_that_is_no_count_are_refused():
    for b in (np.ones((2, 2)), np.ones((2, 1)), np.float64(1.0)):
        with pytest.raises(ValueError, match=r"`b` must be a vector of shape \(n,\). Received: shape=\(.*reshape"):
            conjugate_gradient(tf.identity, b)
    for count in (0, -1, 2.5, True, "10"):
        with pytest.raises(ValueError, match=r"`max_iterations` must be an integer >= 1. Received: max_iterations="):
            conjugate_gradient(tf.identity, np.ones(2), max_iterations=count)
