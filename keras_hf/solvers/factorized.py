"""Solves `(B'B + R + damping I) x = -(B'u + h)` exactly, in the primal form (n by n) or in the dual one (rows by rows).

B is a weighted Jacobian `(rows, n)`, R the second derivative of what concerns the weights alone. Knows matrices and vectors only. Golub & Van Loan
(2013), sections 5.3 and 6.1; Bjorck (1996), *Numerical methods for least squares problems*, section 6.6, on corrected seminormal equations;
Fukaya et al. (2020), *Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices*.
"""

import tensorflow as tf

from keras_hf.common.vectors import epsilon, row_gram

# Below this power of the rounding, relative to the trace of B'B, a damping leaves no digits of the step.
LEAST_DAMPING_POWER = 1.25
# A Gram matrix has a Cholesky factor in its float type if it is shifted by so many roundings of its trace.
_SHIFT = 10.0
# Where the damping is less than so many shifts, B'B alone gives too few digits of the step.
_LOST = 10.0
# TensorFlow solves a triangular system on one core: columns are cut into so many parts at most, of so many columns at least.
_MOST_PARTS, _FEWEST_COLUMNS = 16, 128


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
    transposed = None if rows.jacobian is None else lambda: tf.transpose(rows.jacobian)
    factors = _factors(product, added, damping, transposed)

    def apply(x):
        return damping * x if added is None else tf.linalg.matvec(added, x) + damping * x

    def solve(u, h=None):
        plus = (lambda x: x) if h is None else (lambda x: x + h)
        x = -_apply_inverse(factors, plus(rows.pull(u)))
        # Once more for what is left, through B itself: as accurate as if B had been factorized.
        return x - _apply_inverse(factors, plus(rows.pull(rows.plus_push(u, x)) + apply(x)))

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

    factors = _factors(row_gram(rooted), None, shift, lambda: rooted)

    def solve(u, h=None):
        right = u if h is None else u - tf.linalg.matvec(jacobian, inverse * h)
        z = _apply_inverse(factors, right)
        left = right - shift * z - tf.linalg.matvec(jacobian, tf.linalg.matvec(weighted, z, transpose_a=True))
        z += _apply_inverse(factors, left)
        x = -tf.linalg.matvec(weighted, z, transpose_a=True)
        return x if h is None else x - inverse * h

    return solve


def _factors(product, added, damping, root):
    """Lower factors E and F with `EF(EF)' = product + added + damping I`, where the product is `root() root()'`.

    F is the identity, and E Cholesky's factor. Where the damping is lost in the rounding of the Gram matrix, E is that of a shifted one, by which the
    root's rows become nearly orthogonal, and F, Cholesky's of what is left, makes the factorization exact, as a QR factorization would: without its
    many small steps.
    """
    rounding = epsilon(product.dtype)
    shift = _SHIFT * rounding * tf.linalg.trace(product)
    identity = tf.eye(tf.shape(product)[0], dtype=product.dtype)
    beside = product if added is None else product + added

    def once():
        return tf.linalg.cholesky(beside + damping * identity), identity

    if root is None:
        return once()

    def twice():
        first = tf.linalg.cholesky(beside + (damping + shift) * identity)
        orthogonal = _solved(first, root())
        left = row_gram(orthogonal) + damping * row_gram(_solved(first, identity))
        if added is not None:
            left += _solved(first, tf.transpose(_solved(first, added)))
        return first, tf.linalg.cholesky(left)

    return tf.cond(damping < _LOST * shift, twice, once)


def _solved(factor, right):
    """Returns `factor^-1 right`, of matrices, the columns divided among cores."""
    columns = right.shape[1]
    parts = _MOST_PARTS if columns is None else max(1, min(_MOST_PARTS, columns // _FEWEST_COLUMNS))
    ends = tf.shape(right)[1] * tf.range(parts + 1) // parts
    split = tf.split(right, ends[1:] - ends[:-1], 1, num=parts) if parts > 1 else [right]
    return tf.concat([tf.linalg.triangular_solve(factor, part) for part in split], 1)


def _apply_inverse(factors, vector):
    """Returns `(EF(EF)')^-1 vector`."""
    outer, inner = factors
    x = tf.linalg.cholesky_solve(inner, tf.linalg.triangular_solve(outer, vector[:, None]))
    return tf.linalg.triangular_solve(outer, x, adjoint=True)[:, 0]
