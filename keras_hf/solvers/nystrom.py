"""Randomized Nystrom preconditioner: the largest eigenvalues of the curvature, from a sketch of it.

Frangella, Tropp & Udell (2021): algorithm 2.1 for the sketch `Y = G Omega`, equation 5.3 for the preconditioner. Two steps differ. First, the paper
takes a Cholesky factor of the core `Omega'Y`; here its eigenvalues determine the shift that makes it definite, so the factorisation cannot fail.
Second, tall matrices are orthonormalised through their Gram matrix, twice: TensorFlow's `qr` takes six times as long on a CPU, and leaves errors of
4e-4 in float32 with a million rows.
"""

import math

import keras
import tensorflow as tf

from keras_hf.common.checks import count
from keras_hf.common.vectors import epsilon, num_weights, vector_dtype
from keras_hf.solvers.preconditioners import Preconditioner, due, never_made


@keras.saving.register_keras_serializable("keras_hf")
class Nystrom(Preconditioner):
    """Nystrom preconditioner: `M = U (L + damping I) U' / (l + damping) + (I - UU')`.

    U `(n, rank)` and L hold approximate eigenvectors of the curvature and their eigenvalues; l is the smallest of L. Along U the preconditioner
    divides by the large eigenvalues; the rest is unchanged. It needs only products with random directions, so it works for any network, such as
    physics-informed and recurrent ones, which have no Kronecker factors. With a few hundred weights, `rank` can be half of them
    (`benchmarks/nystrom.py`). With many, it pays if few eigenvalues stand out.

    The sketched curvature is the one that CG uses: that of the chunk, with regularizers and added losses. If it is not positive semi-definite, it is
    shifted until it is, and L holds what exceeds the shift. M is always positive definite: a damping below the rounding of the largest eigenvalue is
    replaced by that rounding. A sketch that is not finite is discarded: the previous sketch or `M = I` is used, and the next update tries again. A
    sketch is reused for `interval` updates and saved with the optimizer; the damping is always that of the update.

    Cost: `rank` products every `interval` updates; `2 n rank` multiplications per CG iteration; memory for `n rank` numbers, and for four times as
    many while sketching.

    Args:
        rank: Integer >= 1, the number of random directions; n if there are fewer weights than that.
        interval: Integer >= 1, the number of updates for which a sketch is used.

    Raises:
        ValueError: If an argument is not an integer >= 1.

    References:
        Frangella, Tropp & Udell (2021), *Randomized Nystrom preconditioning*, algorithm 2.1 and equation 5.3.
    """

    def __init__(self, rank=60, interval=10):
        self.rank = count("rank", rank)
        self.interval = count("interval", interval)

    def initial_state(self, variables, layers):
        del layers
        if self.interval == 1:
            return {}
        size, dtype = num_weights(variables), vector_dtype(variables)
        rank = min(self.rank, size)
        return {"vectors": tf.zeros([size, rank], dtype), "values": tf.zeros([rank], dtype), **never_made()}

    def inverse(self, objective, linearize, damping, state):
        product = linearize()

        def sketch():
            return _eigenvectors(product, _directions(objective, self.rank))

        def new_state():
            vectors, values, is_sound = sketch()
            new = {"vectors": vectors, "values": values, "made_at": objective.update_number}
            # A sketch that is not finite is not kept for an interval: the next update tries again.
            return {name: tf.where(is_sound, new[name], state[name]) for name in state}

        if self.interval == 1:
            vectors, values, _ = sketch()
        else:
            is_due = due(state, objective.update_number, self.interval)
            state = tf.cond(is_due, new_state, lambda: dict(state))
            vectors, values = state["vectors"], state["values"]
        # Below that the part along U would be the rounding error of 1 - 1, of either sign.
        damping = tf.maximum(damping, _rounding(vectors) * values[0])
        removed = tf.math.divide_no_nan(values - values[-1], values + damping)

        def precondition(residual):
            along = tf.linalg.matvec(vectors, residual, transpose_a=True)
            return residual - tf.linalg.matvec(vectors, removed * along)

        return precondition, state


def _directions(objective, rank):
    """Draws an orthonormal basis `(n, rank)` of a random space, a different one in every update."""
    size = objective.num_weights
    seed = tf.stack([objective.update_number, -1])
    return _orthonormal(tf.random.stateless_normal([size, min(rank, size)], seed, dtype=objective.dtype))


def _eigenvectors(product, directions):
    """Returns eigenvectors U `(n, rank)` and eigenvalues `(rank,)` of an approximation `U diag(values) U'` of G, and whether G was finite.

    Eigenvalues are >= 0, the largest first; columns of U are orthonormal, or zero where the rank of G is smaller.

    Args:
        product: Callable `v -> Gv` on the rows of `(k, n)`, symmetric.
        directions: Tensor `(n, rank)`, orthonormal columns.
    """
    images = tf.transpose(product(tf.transpose(directions)))
    size = tf.reduce_max(tf.abs(images))
    is_usable = tf.math.is_finite(size) & (size > 0)
    images = tf.where(is_usable, images / size, tf.zeros_like(images))
    core = tf.matmul(directions, images, transpose_a=True)
    core_values, core_vectors = tf.linalg.eigh((core + tf.transpose(core)) / 2)
    shift = _rounding(images) * tf.norm(images) + 2 * tf.maximum(-core_values[0], 0.0)
    root = tf.matmul(images + shift * directions, core_vectors)
    root = tf.math.divide_no_nan(root, tf.sqrt(core_values + shift))
    # The shift keeps the condition number of root'root small enough for this.
    basis = _orthonormal(root)
    roots, vectors, _ = tf.linalg.svd(tf.matmul(basis, root, transpose_a=True))
    values = tf.maximum(roots**2 - shift, 0.0)
    values = tf.where(is_usable, size * values, tf.zeros_like(values))
    return tf.matmul(basis, vectors), values, tf.math.is_finite(size)


def _orthonormal(columns):
    """Returns the orthonormal columns nearest to those of A `(n, k)`: `A (A'A)^(-1/2)`, without the null space of A'A."""
    for _ in range(2):
        values, vectors = tf.linalg.eigh(tf.matmul(columns, columns, transpose_a=True))
        is_independent = values > values.shape[0] * epsilon(values.dtype) * values[-1]
        scale = tf.where(is_independent, tf.math.rsqrt(tf.where(is_independent, values, 1.0)), 0.0)
        columns = tf.matmul(columns, tf.matmul(vectors * scale, vectors, transpose_b=True))
    return columns


def _rounding(tall):
    """Rounding error of the largest eigenvalue, relative to it; it grows only with the square root of n."""
    # The paper's shift uses the square root alone, which is too little for few weights.
    return (100 + math.sqrt(tall.shape[0])) * epsilon(tall.dtype)
