import numpy as np
import pytest
import tensorflow as tf

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
stopped = pytest.mark.parametrize("stopping", STOPPING_RULES.values(), ids=STOPPING_RULES.keys())


def compiled(solve):
    """Compiles as Keras compiles a train step, without AutoGraph."""
    return lambda *args, **kwargs: tf.function(lambda: solve(*args, **kwargs), autograph=False)()


# What is not finite is asked both ways: graph optimization rewrites comparisons, and `not (a < b)` is not `a >= b` for NaN.
modes = pytest.mark.parametrize("mode", [lambda solve: solve, compiled], ids=["eager", "compiled"])


class Unstoppable(StoppingRule):
    """Never stops, and keeps what it was told (in eager mode)."""

    def __init__(self):
        self.values, self.residual_norms, self.iterations, self.b_norms = [], [], [], []

    def should_stop(self, iteration, value_at, residual_norm, b_norm):
        if tf.executing_eagerly():
            self.iterations.append(int(iteration))
            self.values.append([float(value_at(i)) for i in range(iteration + 1)])
            self.residual_norms.append(float(residual_norm))
            self.b_norms.append(float(b_norm))
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


@stopped
@preconditioned
def test_solution_equals_the_dense_solve(preconditioner, stopping):
    problem = random_problem()
    result = compiled(problem.solve)(None, preconditioner, stopping, 200)
    assert result.reason in (CGStop.STOPPING_RULE, CGStop.CONVERGED)
    # Progress of 1e-16 is an error of 1e-8 in the norm of A, which the condition of 4e3 can stretch 60-fold.
    np.testing.assert_allclose(result.iterates[-1], np.linalg.solve(problem.a, problem.b), rtol=0, atol=1e-6)


@pytest.mark.slow
@preconditioned
def test_values_equal_the_quadratic_at_each_iterate(preconditioner):
    problem = random_problem()
    result = compiled(problem.solve)(np.ones(30), preconditioner, ResidualTolerance(1e-10), 200)
    assert result.values.dtype == tf.float64
    # Both ways lose digits of float64 only, at most the condition's 4e3 of them where x is large.
    np.testing.assert_allclose(result.values, problem.quadratic(result.iterates), rtol=1e-11)
    assert result.course.shape == (result.num_iterations + 1,)
    np.testing.assert_array_equal(tf.gather(result.course, result.iterate_numbers), result.values)


@preconditioned
def test_every_iteration_lowers_the_quadratic(preconditioner):
    recorder = Unstoppable()
    problem = random_problem()
    problem.solve(np.ones(30), preconditioner, recorder, 15)
    assert (np.diff(recorder.values[-1]) <= 0).all()
    assert recorder.values[-1][0] == pytest.approx(problem.quadratic(np.ones(30)), rel=1e-12)


@preconditioned
def test_kept_iterates_are_martens_grid_and_the_last(preconditioner):
    problem = random_problem()
    for last in (1, 4, 5, 6, 15):
        result = problem.solve(preconditioner=preconditioner, stopping=Unstoppable(), max_iterations=last)
        # The exact inverse is done after one iteration, and rounding does the rest.
        last = int(result.num_iterations)
        assert result.iterate_numbers.numpy().tolist() == martens_grid(last)
        assert result.iterates.shape == (len(result.iterate_numbers), 30)
        assert result.values.shape == result.iterate_numbers.shape


def test_kept_numbers_of_a_long_run_are_those_of_martens_code():
    result = diagonal_problem(100, 1e8, "float64").solve(stopping=Unstoppable(), max_iterations=60)
    assert result.iterate_numbers.numpy().tolist() == [5, 7, 9, 11, 15, 19, 25, 32, 41, 54, 60]


def test_a_kept_iterate_is_what_a_run_of_so_many_iterations_ends_with():
    result = random_problem().solve(stopping=Unstoppable(), max_iterations=20)
    for number, iterate in zip(result.iterate_numbers.numpy(), result.iterates, strict=True):
        shorter = random_problem().solve(stopping=Unstoppable(), max_iterations=int(number))
        np.testing.assert_array_equal(shorter.iterates[-1], iterate)


# No iterate of the grid, one, and several more.
@pytest.mark.parametrize(
    ("last", "mode"),
    [(3, compiled), (15, lambda solve: solve), (17, compiled), (60, lambda solve: solve)],
    ids=["3, compiled", "15, eager", "17, compiled", "60, eager"],
)
def test_a_bound_keeps_the_last_of_the_kept_iterates_bit_for_bit(last, mode):
    problem = diagonal_problem(100, 1e8, "float64")

    def solve(**bound):
        with_form = lambda v: (image := problem.product(v), dot(v, image))  # noqa: E731
        found = minimized(with_form, problem.b, stopping=Unstoppable(), max_iterations=last, **bound)
        return found._replace(iterates=found.iterates.matrix())

    every = mode(solve)()
    for max_kept in (1, 2, 4, 100):
        bounded = mode(solve)(max_kept=max_kept)
        assert len(bounded.iterates) == min(max_kept, len(every.iterates))
        for name in ("iterates", "iterate_numbers", "values"):
            np.testing.assert_array_equal(getattr(bounded, name), getattr(every, name)[-max_kept:])
        np.testing.assert_array_equal(bounded.course, every.course)


def test_identity_preconditioner_equals_none():
    plain = random_problem().solve()
    identity = random_problem().solve(preconditioner=PRECONDITIONERS["identity"])
    for a, b in zip(plain, identity, strict=True):
        np.testing.assert_array_equal(a, b)


def test_exact_inverse_needs_one_iteration():
    problem = random_problem()
    result = problem.solve(preconditioner=PRECONDITIONERS["inverse"], stopping=ResidualTolerance(1e-10))
    assert result.num_iterations == 1
    # Rounding of the inverse, a condition of 4e3 times 1e-16.
    np.testing.assert_allclose(result.iterates[-1], np.linalg.solve(problem.a, problem.b), rtol=1e-10)


@pytest.mark.parametrize("eigenvalues", [[3.0], [1.0, 10.0], [1.0, 2.0, 50.0, 400.0]])
def test_k_distinct_eigenvalues_need_k_iterations(eigenvalues):
    k = len(eigenvalues)
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 20)))[0]
    problem = Problem((q * np.resize(eigenvalues, 20)) @ q.T, np.arange(1.0, 21.0))
    result = problem.solve(stopping=ResidualTolerance(1e-9))
    assert result.num_iterations == k
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
    assert result.num_iterations == 0
    assert result.reason == CGStop.CONVERGED
    assert result.iterate_numbers.numpy().tolist() == [0]
    np.testing.assert_array_equal(result.iterates, [[1.0, 2.0, 3.0]])
    # -b'x/2 at the solution.
    np.testing.assert_array_equal(result.values, [-(4 + 20 + 42) / 2])


def test_a_better_start_takes_fewer_iterations():
    problem = random_problem()
    near = np.linalg.solve(problem.a, problem.b) * (1 + 1e-6)
    stopping = ResidualTolerance(1e-5)
    from_near = problem.solve(near, stopping=stopping)
    assert from_near.num_iterations < problem.solve(stopping=stopping).num_iterations


@modes
@pytest.mark.parametrize("x0", [None, [0.0, 0.0], [1.0, -2.0], [np.nan, 1.0]])
def test_zero_right_side_gives_zero_from_any_start(x0, mode):
    problem = Problem([[2.0, 0.0], [0.0, 3.0]], [0.0, 0.0])
    result = mode(problem.solve)(x0)
    assert result.num_iterations == 0
    assert result.reason == CGStop.CONVERGED
    np.testing.assert_array_equal(result.iterates, [[0.0, 0.0]])
    np.testing.assert_array_equal(result.values, [0.0])


@modes
def test_negative_curvature_stops_at_the_iterate_so_far(mode):
    # By hand: p = b has curvature 4 - 1 and r'r = 5, so x = 5/3 b; the next p = (20, 40)/9 has curvature (400 - 1600)/81.
    problem = Problem([[1.0, 0.0], [0.0, -1.0]], [2.0, 1.0])
    result = mode(problem.solve)()
    assert result.num_iterations == 1
    assert result.reason == CGStop.NEGATIVE_CURVATURE
    np.testing.assert_allclose(result.iterates, [[10 / 3, 5 / 3]], rtol=1e-15)
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
    assert result.reason == CGStop.NEGATIVE_CURVATURE
    assert result.iterate_numbers.numpy().tolist() == [1]
    np.testing.assert_allclose(result.iterates, [expected], rtol=1e-15)
    np.testing.assert_allclose(result.values, [problem.quadratic(expected)], rtol=1e-14)


@modes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("good_products", [0, 1, 6])
def test_a_product_that_is_not_finite_leaves_the_last_finite_iterate(good_products, bad, mode):
    problem = random_problem()

    def product(x):
        image = problem.product(x)
        # One spoiled entry is enough.
        return tf.where(
            (problem.num_products > good_products) & (tf.range(30) == 3), tf.constant(bad, tf.float64), image
        )

    result = mode(lambda: conjugate_gradient(product, problem.b, stopping=Unstoppable()))()
    assert result.reason == CGStop.BREAKDOWN
    assert result.num_iterations == good_products
    expected = np.zeros(30)
    if good_products:
        expected = random_problem().solve(stopping=Unstoppable(), max_iterations=good_products).iterates[-1]
    # Rounding: a graph may add in another order.
    np.testing.assert_allclose(result.iterates[-1], expected, rtol=0, atol=1e-14)


@modes
def test_a_start_where_the_product_is_not_finite_is_given_back(mode):
    problem = Problem([[np.nan, 0.0], [0.0, 1.0]], [1.0, 1.0])
    result = mode(problem.solve)([3.0, 4.0])
    assert result.reason == CGStop.BREAKDOWN
    assert result.num_iterations == 0
    np.testing.assert_array_equal(result.iterates, [[3.0, 4.0]])


@modes
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_right_side_that_is_not_finite_breaks_down_at_once(bad, mode):
    problem = Problem(np.eye(2), [bad, 1.0])
    result = mode(problem.solve)([3.0, 4.0])
    assert result.reason == CGStop.BREAKDOWN
    assert result.num_iterations == 0


@modes
@pytest.mark.parametrize("scale", [-1.0, 0.0, np.nan])
def test_a_preconditioner_that_is_not_positive_breaks_down_at_the_start(scale, mode):
    problem = random_problem()
    result = mode(problem.solve)(np.ones(30), lambda a, r: scale * r)
    assert result.reason == CGStop.BREAKDOWN
    assert result.num_iterations == 0
    np.testing.assert_array_equal(result.iterates, np.ones((1, 30)))


@modes
def test_an_indefinite_preconditioner_breaks_down_where_it_shows(mode):
    # By hand: r = (2, 1) has r'M^-1 r = 3, p = (2, -1) curvature 5, so x = 0.6 p; then r = (0.8, 1.6) has r'M^-1 r = -1.92.
    problem = Problem(np.eye(2), [2.0, 1.0])
    result = mode(problem.solve)(preconditioner=lambda a, r: r * [1.0, -1.0])
    assert result.reason == CGStop.BREAKDOWN
    assert result.num_iterations == 1
    np.testing.assert_allclose(result.iterates, [[1.2, -0.6]], rtol=1e-15)


@pytest.mark.parametrize("max_iterations", [1, 2, 10])
def test_limit_of_iterations_is_kept_and_reported(max_iterations):
    result = random_problem().solve(stopping=Unstoppable(), max_iterations=max_iterations)
    assert result.num_iterations == max_iterations
    assert result.reason == CGStop.MAX_ITERATIONS


def test_limit_of_iterations_is_ten_times_the_dimension_by_default():
    # Too ill-conditioned to be done in 10 n iterations of float32.
    result = diagonal_problem(12, 1e12, "float32").solve(stopping=Unstoppable())
    assert result.num_iterations == 120
    assert result.reason == CGStop.MAX_ITERATIONS


@modes
def test_a_tight_tolerance_is_reached_by_default_where_rounding_takes_more_than_n_iterations(mode):
    eigenvalues = np.geomspace(1, 1e3, 50)
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 50)))[0]
    problem = Problem((q * eigenvalues) @ q.T, np.ones(50))
    result = mode(problem.solve)(stopping=ResidualTolerance(1e-10))
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

    result = random_problem().solve(stopping=AtSeven())
    assert result.num_iterations == 7
    assert result.reason == CGStop.STOPPING_RULE


def test_the_stopping_rule_is_told_of_every_iterate():
    recorder = Unstoppable()
    problem = random_problem()
    problem.solve(np.ones(30), stopping=recorder, max_iterations=9)
    assert recorder.iterations == list(range(1, 10))
    for iteration in recorder.iterations:
        x = problem.solve(np.ones(30), stopping=Unstoppable(), max_iterations=iteration).iterates[-1]
        # The rule gets the updated residual, which drifts from the true one by rounding.
        true_norm = np.linalg.norm(problem.b - tf.linalg.matvec(problem.a, x))
        assert recorder.residual_norms[iteration - 1] == pytest.approx(true_norm, rel=1e-9)
        assert recorder.values[iteration - 1][-1] == pytest.approx(problem.quadratic(x), rel=1e-11)
    assert recorder.values[-1][:5] == recorder.values[3]
    assert recorder.b_norms == [pytest.approx(np.linalg.norm(problem.b))] * 9


def test_relative_progress_is_the_default_rule():
    by_default = diagonal_problem(100, 1e4, "float64").solve()
    explicit = diagonal_problem(100, 1e4, "float64").solve(stopping=RelativeProgress())
    assert by_default.reason == CGStop.STOPPING_RULE
    assert by_default.num_iterations == explicit.num_iterations


@stopped
def test_compiled_and_eager_runs_agree(stopping):
    problem, x0 = random_problem(), np.linspace(-1, 1, 30)

    @tf.function(input_signature=2 * [tf.TensorSpec([None], tf.float64)], autograph=False)
    def of_unknown_size(b, x0):
        return conjugate_gradient(problem.product, b, x0, None, stopping, 15)

    graph = of_unknown_size(problem.b, tf.constant(x0))
    eager = problem.solve(x0, None, stopping, 15)
    np.testing.assert_array_equal(graph.iterate_numbers, eager.iterate_numbers)
    assert graph.reason == eager.reason
    # A graph may add in another order: rounding, which 15 iterations let grow.
    np.testing.assert_allclose(graph.iterates, eager.iterates, rtol=0, atol=1e-10)
    np.testing.assert_allclose(graph.values, eager.values, rtol=1e-10)


def test_one_trace_serves_every_right_side():
    problem, traces = random_problem(), []

    @tf.function
    def solve(b):
        traces.append(1)
        return conjugate_gradient(problem.product, b).iterates

    counts = {len(solve(b)) for b in (problem.b, tf.zeros_like(problem.b), tf.linalg.matvec(problem.a, problem.b))}
    assert len(traces) == 1
    assert len(counts) > 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_iterates_have_the_dtype_of_the_right_side(dtype):
    result = diagonal_problem(10, 10, dtype).solve()
    assert result.iterates.dtype == dtype
    assert result.values.dtype == tf.float64


def test_float32_values_are_true_beyond_float32_digits():
    problem = diagonal_problem(400, 1e5, "float32")
    result = compiled(problem.solve)(stopping=ResidualTolerance(1e-6), max_iterations=400)
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


@pytest.mark.parametrize("b", [np.ones((2, 2)), np.ones((2, 1)), np.float64(1.0)])
def test_a_right_side_that_is_no_vector_is_refused(b):
    with pytest.raises(ValueError, match=r"`b` must be a vector of shape \(n,\). Received: shape=\(.*reshape"):
        conjugate_gradient(tf.identity, b)


@pytest.mark.parametrize("max_iterations", [0, -1, 2.5, True, "10"])
def test_a_limit_that_is_no_count_is_refused(max_iterations):
    with pytest.raises(ValueError, match=r"`max_iterations` must be an integer >= 1. Received: max_iterations="):
        conjugate_gradient(tf.identity, np.ones(2), max_iterations=max_iterations)
