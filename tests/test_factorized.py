"""What exact solves promise: the step of the dense system, in both forms, also where the damping is lost in the rounding of B'B."""

from fractions import Fraction

import numpy as np
import pytest
import tensorflow as tf

from keras_hf.solvers import factorized as room
from keras_hf.solvers.factorized import LEAST_DAMPING_POWER, dual_solver, primal_solver

TALL, WIDE = (12, 5), (5, 12)
shapes = pytest.mark.parametrize("shape", [TALL, WIDE])


class Dense:
    """What a solver asks of rows, by a matrix."""

    def __init__(self, matrix, is_kept=True):
        self._matrix = tf.convert_to_tensor(matrix)
        self.jacobian = self._matrix if is_kept else None

    def gram(self):
        return tf.matmul(self._matrix, self._matrix, transpose_a=True)

    def pull(self, u):
        return tf.linalg.matvec(self._matrix, u, transpose_a=True)

    def plus_push(self, u, v):
        return u + tf.linalg.matvec(self._matrix, v)


def problem(shape, dtype="float64"):
    """B, u and h."""
    rng = np.random.default_rng(shape[0])
    return [rng.normal(size=size).astype(dtype) for size in (shape, shape[0], shape[1])]


def diagonal(size):
    """A diagonal R, some of it zero."""
    return np.where(np.arange(size) % 3 == 0, 0.0, np.linspace(0.5, 2.0, size))


def full(size):
    """A positive semi-definite R of less than full rank."""
    root = np.random.default_rng(9).normal(size=(size, size - 2))
    return root @ root.T


def exact_solve(b, u, damping, h=None, added=None):
    """The oracle, `-(B'B + R + damping I)^-1 (B'u + h)`, in rational numbers: nothing is rounded but the result."""
    n = b.shape[1]
    columns = [[Fraction(x) for x in column] for column in b.T.tolist()]
    beside = (damping * np.eye(n) if added is None else added + damping * np.eye(n)).tolist()
    right = np.zeros(n) if h is None else h
    product = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    u = [Fraction(x) for x in u.tolist()]
    system = [
        [product(columns[i], columns[j]) + Fraction(beside[i][j]) for j in range(n)]
        + [-product(columns[i], u) - Fraction(float(right[i]))]
        for i in range(n)
    ]
    for i in range(n):
        system[i] = [x / system[i][i] for x in system[i]]
        for k in set(range(n)) - {i}:
            system[k] = [x - system[k][i] * y for x, y in zip(system[k], system[i], strict=True)]
    return np.array([float(row[n]) for row in system])


def normal_equations(b, u, damping):
    """What the dense system gives in float64."""
    return -np.linalg.solve(b.T @ b + damping * np.eye(b.shape[1]), b.T @ u)


@tf.function(autograph=False)
def compiled_primal(b, u, damping, h, added, is_kept):
    rows = Dense(b, is_kept)
    return primal_solver(rows, rows.gram(), damping, added)(u, h)


@tf.function(autograph=False)
def compiled_dual(b, u, damping, h, added):
    return dual_solver(b, damping, added)(u, h)


def tensors(b, *others):
    return [None if x is None else tf.constant(x, b.dtype) for x in (b, *others)]


def primal(b, u, damping, h=None, added=None, is_kept=True):
    """The primal form's x, compiled as in an update."""
    return compiled_primal(*tensors(b, u, damping, h, added), is_kept).numpy()


def dual(b, u, damping, h=None, added=None):
    """The dual form's x; R is given as its diagonal."""
    return compiled_dual(*tensors(b, u, damping, h, added)).numpy()


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@shapes
@pytest.mark.parametrize("has_added", [False, True])
@pytest.mark.parametrize("has_h", [False, True])
def test_both_forms_give_the_step_of_the_dense_system(shape, has_added, has_h):
    b, u, h = problem(shape)
    h, added = h if has_h else None, diagonal(shape[1]) if has_added else None
    matrix = np.diag(added) if has_added else None
    for damping in (1e-6, 0.3, 1e6):
        expected = exact_solve(b, u, damping, h, matrix)
        assert relative(primal(b, u, damping, h, matrix), expected) < 1e-10
        # Of more rows than weights, or where h / damping cancels, what is left of 16 digits is less by the six of the damping.
        assert relative(dual(b, u, damping, h, added), expected) < (1e-10 if damping > 1e-6 else 1e-8)


def test_the_primal_form_takes_any_second_derivative_of_the_weights():
    b, u, h = problem(TALL)
    assert relative(primal(b, u, 0.01, h, full(5)), exact_solve(b, u, 0.01, h, full(5))) < 1e-12


@shapes
def test_rows_that_are_not_kept_give_the_same_step(shape):
    b, u, h = problem(shape)
    for added in (None, full(shape[1])):
        kept, formed_anew = (primal(b, u, 0.01, h, added, is_kept) for is_kept in (True, False))
        np.testing.assert_allclose(formed_anew, kept, rtol=1e-12)


def nearly_singular(shape):
    """B and u. Squared, the smallest singular value of B is as small as dampings that are lost."""
    rng, size = np.random.default_rng(0), min(shape)
    left, right = (np.linalg.qr(rng.normal(size=(length, size)))[0] for length in shape)
    b = left * np.logspace(0, -7.5, size) @ right.T
    return b, b @ rng.normal(size=shape[1])


@shapes
def test_a_damping_lost_in_the_gram_matrix_is_found_in_the_rows(shape):
    b, u = nearly_singular(shape)
    for share in (1e-15, 1e-17):
        exact = exact_solve(b, u, share)
        # Rounding times the condition number of B, 3e7, and times its square.
        for found in (primal(b, u, share), dual(b, u, share)):
            assert relative(found, exact) < 1e-7
        assert relative(normal_equations(b, u, share), exact) > 1e-4


@pytest.mark.parametrize("fewest_columns", [2, 128])
def test_regularizers_count_where_the_damping_is_lost_however_columns_are_divided(fewest_columns, monkeypatch):
    monkeypatch.setattr(room, "_FEWEST_COLUMNS", fewest_columns)
    b, u = nearly_singular(TALL)
    added = 1e-15 * full(5)
    exact = exact_solve(b, u, 1e-17, added=added)
    # Not compiled, since columns are divided when it is traced.
    found = compiled_primal.python_function(*tensors(b, u, 1e-17, None, added), True)
    assert relative(found.numpy(), exact) < 1e-7
    assert relative(exact_solve(b, u, 1e-17), exact) > 1e-2
    b, u = nearly_singular(WIDE)
    found = compiled_dual.python_function(*tensors(b, u, 1e-17, None, None))
    assert relative(found.numpy(), exact_solve(b, u, 1e-17)) < 1e-7


def test_extreme_dampings_lose_no_digits():
    b, u, h = problem(WIDE)
    least = np.finfo("float64").eps ** LEAST_DAMPING_POWER * np.sum(b**2)
    # Next to no damping: the shortest solution of Bx = -u; and nothing but damping.
    for damping, expected in ((least, -np.linalg.pinv(b) @ u), (1e290, -b.T @ u / 1e290)):
        assert relative(dual(b, u, damping), expected) < 1e-12
        assert np.isfinite(dual(b, u, damping, h * damping, diagonal(12))).all()


@pytest.mark.parametrize("solve", [primal, dual])
def test_float32_is_as_accurate_as_its_rounding(solve):
    b, u, _ = problem(TALL if solve is primal else WIDE, "float32")
    found = solve(b, u, 0.1)
    assert found.dtype == np.float32
    assert relative(found, exact_solve(b.astype("float64"), u, 0.1)) < 1e-5


def test_one_factorization_solves_for_several_right_sides():
    b, u, h = problem(TALL)
    damping = tf.constant(0.2, tf.float64)
    for solve in (primal_solver(Dense(b), Dense(b).gram(), damping), dual_solver(tf.constant(b), damping)):
        one, other = solve(tf.constant(u)), solve(tf.constant(u), tf.constant(h))
        assert relative(one.numpy(), exact_solve(b, u, 0.2)) < 1e-12
        assert relative(other.numpy(), exact_solve(b, u, 0.2, h)) < 1e-12
