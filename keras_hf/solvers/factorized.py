"""Solves `(B'B + R + damping I) x = -(B'u + h)` exactly, in the primal form (n by n) or in the dual one (rows by rows).

B is a weighted Jacobian `(rows, n)`, R the second derivative of what concerns the weights alone. Knows matrices and vectors only. Golub & Van Loan
(2013), sections 5.3 and 6.1; Bjorck (1996), *Numerical methods for least squares problems*, section 6.6, on corrected seminormal equations.
"""

import numpy as np
import tensorflow as tf

# Below this share of the largest diagonal entry, times the rounding of the float type, a damping is lost in the rounding of B'B: B is factorized.
_LOST = 100.0


def primal_solver(rows, gram, damping, added=None):
    """Factorizes the n by n system.

    Args:
        rows: What B can do: `jacobian` (`(rows, n)` or `None`), `pull(u)` = B'u, `plus_push(u, v)` = u + Bv.
        gram: Tensor `(n, n)`, B'B.
        damping: Scalar > 0.
        added: Tensor `(n, n)`, R, symmetric and positive semi-definite, or `None`.

    Returns:
        Callable `(u, h) -> x` of u `(rows,)` and h `(n,)` or `None`. Cost: n^3 / 3 once, then 4 n^2 and two products with B and B' per call. Where
        the damping is lost in the rounding of B'B, 2 rows n^2 more once.
    """
    identity = tf.eye(gram.shape[0], dtype=gram.dtype)
    beside = damping * identity if added is None else added + damping * identity

    def tall():
        root = tf.sqrt(damping) * identity if added is None else tf.linalg.adjoint(tf.linalg.cholesky(beside))
        return tf.concat([rows.jacobian, root], 0)

    factor = _factor(gram + beside, tall if rows.jacobian is not None else None, gram, damping)

    def apply(x):
        return damping * x if added is None else tf.linalg.matvec(beside, x)

    def solve(u, h=None):
        plus = (lambda x: x) if h is None else (lambda x: x + h)
        x = -_apply_inverse(factor, plus(rows.pull(u)))
        # Once more for what is left, through B itself: as accurate as if B had been factorized.
        return x - _apply_inverse(factor, plus(rows.pull(rows.plus_push(u, x)) + apply(x)))

    return solve


def dual_solver(jacobian, damping, added=None):
    """Factorizes the rows by rows system: `x = -(d h + d B'(I + B d B')^-1 (u - B d h))` with `d = 1 / (damping + added)`.

    Args:
        jacobian: Tensor `(rows, n)`, B.
        damping: Scalar > 0.
        added: Tensor `(n,)`, the diagonal of R, >= 0, or `None`.

    Returns:
        Callable `(u, h) -> x`; see `primal_solver`. Cost: 2 n rows^2 and rows^3 / 3 once, then 4 n rows per call.
    """
    inverse = tf.reshape(1 / damping, [1]) if added is None else 1 / (damping + added)
    largest = tf.reduce_max(inverse)
    # Divided by the largest: then nothing overflows however small the damping is.
    share, shift = inverse / largest, 1 / largest
    weighted = jacobian * share
    gram = tf.matmul(weighted, jacobian, transpose_b=True)
    identity = tf.eye(jacobian.shape[0], dtype=gram.dtype)

    def tall():
        return tf.concat([tf.transpose(jacobian * tf.sqrt(share)), tf.sqrt(shift) * identity], 0)

    factor = _factor(gram + shift * identity, tall, gram, shift)

    def solve(u, h=None):
        right = u if h is None else u - tf.linalg.matvec(jacobian, inverse * h)
        z = _apply_inverse(factor, right)
        left = right - shift * z - tf.linalg.matvec(jacobian, tf.linalg.matvec(weighted, z, transpose_a=True))
        z += _apply_inverse(factor, left)
        x = -tf.linalg.matvec(weighted, z, transpose_a=True)
        return x if h is None else x - inverse * h

    return solve


def _factor(matrix, tall, gram, damping):
    """A lower factor F with FF' the matrix: Cholesky's or, where the damping is lost in the rounding of the Gram matrix, that of a tall one."""
    if tall is None:
        return tf.linalg.cholesky(matrix)
    rounding = float(np.finfo(gram.dtype.as_numpy_dtype).eps)
    lost = damping < _LOST * rounding * tf.reduce_max(tf.linalg.diag_part(gram))
    return tf.cond(
        lost,
        lambda: tf.linalg.adjoint(tf.linalg.qr(tall())[1]),
        lambda: tf.linalg.cholesky(matrix),
    )


def _apply_inverse(factor, vector):
    return tf.linalg.cholesky_solve(factor, vector[:, None])[:, 0]
