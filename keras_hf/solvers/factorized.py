"""Solves `(B'B + R + damping I) x = -(B'u + h)` exactly, in the primal form (n by n) or in the dual one (rows by rows).

B is a weighted Jacobian `(rows, n)`, R the second derivative of what concerns the weights alone. Knows matrices and vectors only. Golub & Van Loan
(2013), sections 5.3 and 6.1; Bjorck (1996), *Numerical methods for least squares problems*, section 6.6, on corrected seminormal equations;
Fukaya et al. (2020), *Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices*.
"""

import numpy as np
import tensorflow as tf

from keras_hf.common.vectors import row_gram

# Below this power of the rounding, relative to the trace of B'B, a damping leaves no digits of the step.
LEAST_DAMPING_POWER = 1.25
# A Gram matrix has a Cholesky factor in its float type if it is shifted by so many roundings of its trace.
_SHIFT = 10.0
# Where the damping is less than so many shifts, B'B alone gives too few digits of the step.
_LOST = 10.0


def primal_solver(rows, product, damping, added=None):
    """Factorizes the n by n system.

    Args:
        rows: What B can do: `jacobian` (`(rows, n)` or `None`), `pull(u)` = B'u, `plus_push(u, v)` = u + Bv.
        product: Tensor `(n, n)`, B'B.
        damping: Scalar > 0.
        added: Tensor `(n, n)`, R, symmetric and positive semi-definite, or `None`.

    Returns:
        Callable `(u, h) -> x` of u `(rows,)` and h `(n,)` or `None`. Cost: n^3 / 3 once, then 4 n^2 and two products with B and B' per call. Where
        the damping is lost in the rounding of B'B, 3 rows n^2 more once.
    """
    identity = tf.eye(product.shape[0], dtype=product.dtype)
    beside = damping * identity if added is None else added + damping * identity

    transposed = None if rows.jacobian is None else lambda: tf.transpose(rows.jacobian)
    factor = _factor(product, beside, damping, transposed)

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
    # Without regularizers the share is 1, and no copy of the Jacobian is made.
    weighted = jacobian if added is None else jacobian * share
    rooted = jacobian if added is None else jacobian * tf.sqrt(share)
    identity = tf.eye(jacobian.shape[0], dtype=jacobian.dtype)

    factor = _factor(row_gram(rooted), shift * identity, shift, lambda: rooted)

    def solve(u, h=None):
        right = u if h is None else u - tf.linalg.matvec(jacobian, inverse * h)
        z = _apply_inverse(factor, right)
        left = right - shift * z - tf.linalg.matvec(jacobian, tf.linalg.matvec(weighted, z, transpose_a=True))
        z += _apply_inverse(factor, left)
        x = -tf.linalg.matvec(weighted, z, transpose_a=True)
        return x if h is None else x - inverse * h

    return solve


def _factor(product, beside, damping, root):
    """A lower factor F with `FF' = product + beside`, where the product is `root() root()'` and beside is at least the damping.

    Cholesky's. Where the damping is lost in the rounding of the Gram matrix, that of a shifted one serves to orthogonalize the root's rows nearly,
    and Cholesky's factor of what is left makes it exact, as a QR factorization would: without its many small steps.
    """
    rounding = float(np.finfo(product.dtype.as_numpy_dtype).eps)
    shift = _SHIFT * rounding * tf.linalg.trace(product)
    if root is None:
        return tf.linalg.cholesky(product + beside)
    identity = tf.eye(product.shape[0], dtype=product.dtype)

    def twice():
        first = tf.linalg.cholesky(product + beside + shift * identity)
        orthogonal = tf.linalg.triangular_solve(first, root())
        left = tf.linalg.triangular_solve(first, beside)
        left = tf.linalg.triangular_solve(first, tf.transpose(left))
        return tf.matmul(first, tf.linalg.cholesky(row_gram(orthogonal) + left))

    return tf.cond(damping < _LOST * shift, twice, lambda: tf.linalg.cholesky(product + beside))


def _apply_inverse(factor, vector):
    return tf.linalg.cholesky_solve(factor, vector[:, None])[:, 0]
