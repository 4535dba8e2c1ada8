"""Randomized Nystrom preconditioner: the largest eigenvalues of the curvature, from a sketch of it.

Frangella, Tropp & Udell (2021): algorithm 2.1 for the sketch `Y = G Omega`, equation 5.3 for the preconditioner. Two
steps differ. Where the paper takes a Cholesky factor of the core `Omega'Y`, eigenvalues tell how large a shift makes it
definite, so that nothing can fail. And tall matrices are orthonormalised through their Gram matrix, twice: TensorFlow's
`qr` takes six times as long on a CPU, and leaves errors of 4e-4 in float32 with a million rows.
"""

import math

import keras
import numpy as np
import tensorflow as tf

from keras_hf.checks import count
from keras_hf.objective import num_weights, vector_dtype
from keras_hf.preconditioners import Preconditioner, due, never_made


@keras.saving.register_keras_serializable("keras_hf")
class Nystrom(Preconditioner):
    """Nystrom preconditioner: `M = U (L + damping I) U' / (l + damping) + (I - UU')`.

    U `(n, rank)` and L hold approximate eigenvectors of the curvature and their eigenvalues, l is the least of L: what
    is large is divided out, the rest left as it is. It needs products with random directions alone, so it serves
    networks of any layers: physics-informed and recurrent ones, where there are no Kronecker factors. For a few hundred
    weights, `rank` can be half of them (`benchmarks/nystrom.py`); for many, it pays where few eigenvalues stand out.

    The curvature is sketched as CG sees it: that of the chunk, with regularizers and added losses. Where it is not
    positive semi-definite, L is what exceeds a shift that makes it so. M is positive definite in any case: a damping
    below the rounding of the largest eigenvalue counts as that rounding. A sketch that is not finite gives way to the one before, or to `M = I`, and
    the next update makes another.
    A sketch serves for some updates and is saved with the optimizer; the damping is always the update's own.

    Cost: `rank` products every `interval` updates; `2 n rank` multiplications in every CG iteration; memory of `n rank`
    numbers, and of four times as many while sketching.

    Args:
        rank: Integer >= 1, random directions; n where there are fewer weights than that.
        interval: Integer >= 1, updates that a sketch serves for.

    Raises:
        ValueError: If an argument is no integer >= 1.

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
            # One of numbers that are not finite does not serve for an interval: the next update tries again.
            return {name: tf.where(is_sound, new[name], state[name]) for name in state}

        if self.interval == 1:
            vectors, values, _ = sketch()
        else:
            is_due = due(state, objective.update_number, self.interval)
            state = tf.cond(is_due, new_state, lambda: dict(state))
            vectors, values = state["vectors"], state["values"]
        # Below that the part along U would be what rounding leaves of 1 - 1, of any sign.
        damping = tf.maximum(damping, _rounding(vectors) * values[0])
        removed = tf.math.divide_no_nan(values - values[-1], values + damping)

        def precondition(residual):
            along = tf.linalg.matvec(vectors, residual, transpose_a=True)
            return residual - tf.linalg.matvec(vectors, removed * along)

        return precondition, state

    def get_config(self):
        return {"rank": self.rank, "interval": self.interval}


def _directions(objective, rank):
    """Draws an orthonormal basis `(n, rank)` of a random space, another one in every update."""
    size = objective.num_weights
    seed = tf.stack([objective.update_number, -1])
    return _orthonormal(tf.random.stateless_normal([size, min(rank, size)], seed, dtype=objective.dtype))


def _eigenvectors(product, directions):
    """Gives eigenvectors U `(n, rank)` and eigenvalues `(rank,)` of an approximation `U diag(values) U'` of G, and whether G was finite.

    Eigenvalues are >= 0, the largest first; columns of U are orthonormal, or zero where G has fewer directions.

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
    # The shift keeps the condition of root'root within what this needs.
    basis = _orthonormal(root)
    roots, vectors, _ = tf.linalg.svd(tf.matmul(basis, root, transpose_a=True))
    values = tf.maximum(roots**2 - shift, 0.0)
    values = tf.where(is_usable, size * values, tf.zeros_like(values))
    return tf.matmul(basis, vectors), values, tf.math.is_finite(size)


def _orthonormal(columns):
    """Gives the orthonormal columns nearest to those of A `(n, k)`: `A (A'A)^(-1/2)`, without the null space of A'A."""
    for _ in range(2):
        values, vectors = tf.linalg.eigh(tf.matmul(columns, columns, transpose_a=True))
        is_independent = values > values.shape[0] * _epsilon(values) * values[-1]
        scale = tf.where(is_independent, tf.math.rsqrt(tf.where(is_independent, values, 1.0)), 0.0)
        columns = tf.matmul(columns, tf.matmul(vectors * scale, vectors, transpose_b=True))
    return columns


def _rounding(tall):
    """What rounding leaves of the largest eigenvalue, relative to it: a share that only grows with the square root of n."""
    # The paper's shift is the square root alone, too little for a few weights.
    return (100 + math.sqrt(tall.shape[0])) * _epsilon(tall)


def _epsilon(tensor):
    """The distance from 1 to the next number."""
    return float(np.finfo(tensor.dtype.as_numpy_dtype).eps)
