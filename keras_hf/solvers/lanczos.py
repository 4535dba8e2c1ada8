"""Lanczos' method: the trace of a function of a matrix that is known by its products alone."""

import tensorflow as tf

from keras_hf.common.vectors import dot

_STEPS = 30
# Sets these random numbers apart from others of the same update.
_STREAM = 7


def random_signs(size, number, dtype):
    """Returns signs `(size,)`, the same for the same number, an int32 scalar."""
    draws = tf.random.stateless_uniform([size], tf.stack([number, tf.constant(_STREAM)]))
    return tf.where(draws < 0.5, tf.ones([], dtype), -tf.ones([], dtype))


def effective_trace(product, start, decay):
    """Estimates the trace of `A' (A' + decay I)^-1`, float64, where `A = A' + decay I` is the matrix of the product.

    The quadrature of Gauss for z's spectral measure (Golub & Meurant 2010, *Matrices, moments and quadrature*, chapter 7): exact where there are at
    most as many different eigenvalues as steps. For random signs z the mean is the trace (Hutchinson 1990).

    Cost: 30 products.

    Args:
        product: Callable `(n,) -> (n,)`.
        start: Tensor `(n,)`, z.
        decay: Scalar >= 0.
    """
    length = tf.sqrt(dot(start, start))
    count = min(_STEPS, start.shape[0])

    def step(number, before, now, beta, alphas, betas):
        image = product(now) - tf.cast(beta, now.dtype) * before
        alpha = dot(now, image)
        image -= tf.cast(alpha, now.dtype) * now
        beta = tf.sqrt(dot(image, image))
        # An invariant space: what follows has no weight.
        following = tf.math.divide_no_nan(image, tf.cast(beta, now.dtype))
        return number + 1, now, following, beta, alphas.write(number, alpha), betas.write(number, beta)

    arrays = [tf.TensorArray(tf.float64, count) for _ in range(2)]
    first = start / tf.cast(length, start.dtype)
    zero = tf.zeros([], tf.float64)
    state = (tf.constant(0), tf.zeros_like(first), first, zero, *arrays)
    *_, alphas, betas = tf.while_loop(lambda number, *_: number < count, step, state, parallel_iterations=1)
    alphas, betas = alphas.stack(), betas.stack()[:-1]
    matrix = tf.linalg.diag(alphas) + tf.linalg.diag(betas, k=1) + tf.linalg.diag(betas, k=-1)
    # TensorFlow refuses eigenvectors of what is not finite.
    is_finite = tf.reduce_all(tf.math.is_finite(matrix))
    nodes, vectors = tf.linalg.eigh(tf.where(is_finite, matrix, tf.zeros_like(matrix)))
    decay = tf.cast(decay, tf.float64)
    shares = tf.clip_by_value(1 - tf.math.divide_no_nan(decay, nodes), 0.0, 1.0)
    estimate = length**2 * tf.reduce_sum(vectors[0] ** 2 * shares)
    return tf.where(is_finite, estimate, tf.constant(float("nan"), tf.float64))
