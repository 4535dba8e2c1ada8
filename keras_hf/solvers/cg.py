"""Preconditioned conjugate gradients on any symmetric positive definite product, as one `tf.while_loop`.

Martens (2010), sections 4.4 (when to stop), 4.6 (which iterates to keep) and 4.7 (the preconditioner); Nocedal & Wright (2006), algorithm 5.3.
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_hf.common.checks import count
from keras_hf.common.vectors import SeparateRows, dot, epsilon
from keras_hf.solvers.stopping import RelativeProgress


class CGStop(enum.IntEnum):
    """Why conjugate gradients stopped: the `cg_stop` of the logs.

    Attributes:
        MAX_ITERATIONS: 0, the limit was reached.
        STOPPING_RULE: 1, the stopping rule said so.
        CONVERGED: 2, the residual is zero to rounding.
        NEGATIVE_CURVATURE: 3, p'Ap <= 0 along the search direction p.
        BREAKDOWN: 4, a number that is not finite, or a preconditioner that is not positive definite.
    """

    MAX_ITERATIONS = 0
    STOPPING_RULE = 1
    CONVERGED = 2
    NEGATIVE_CURVATURE = 3
    BREAKDOWN = 4


class CGResult(NamedTuple):
    """Result of conjugate gradients.

    Attributes:
        iterates: Tensor `(k, n)`, the kept iterates in order; the last iterate is the last row. From `minimized`, `vectors.SeparateRows`.
        iterate_numbers: int32 `(k,)`, the iteration of each row; 0 is the start.
        values: float64 `(k,)`, the quadratic `x'Ax/2 - b'x` at each row.
        num_iterations: int32 scalar, the number of iterations that changed x. Products computed: one per iteration, one for a start other than zero,
            and one for a direction that could not be used (negative curvature, breakdown).
        reason: int32 scalar, a `CGStop`.
        course: float64 `(num_iterations + 1,)`, the quadratic at every iterate, kept or not, including the start.
    """

    iterates: tf.Tensor
    iterate_numbers: tf.Tensor
    values: tf.Tensor
    num_iterations: tf.Tensor
    reason: tf.Tensor
    course: tf.Tensor


class _State(NamedTuple):
    """One turn of the loop."""

    iteration: tf.Tensor
    x: tf.Tensor
    residual: tf.Tensor  # b - Ax
    direction: tf.Tensor
    residual_product: tf.Tensor  # r'M^-1 r, float64
    values: tf.TensorArray  # the quadratic at every iterate, float64
    iterates: tf.TensorArray  # the kept ones; the entry after them is the current one
    iterate_numbers: tf.TensorArray
    num_kept: tf.Tensor
    next_kept: tf.Tensor  # float64; the next iterate to keep is ceil of it
    reason: tf.Tensor  # -1 while running


# The kept iterates are ceil(5 * 1.3^j): 5, 7, 9, 11, 15, 19, 25, 32, ... as in Martens' released code. It starts at 5 where the paper's formula
# starts at 1: the first few are never the best, and each costs a pass over all data.
_FIRST_KEPT, _KEPT_RATIO = 5.0, 1.3
# Ten times as many still fit in an int32.
_MOST_WEIGHTS = 2**27


def conjugate_gradient(product, b, x0=None, precondition=None, stopping=None, max_iterations=None):
    """Minimises the quadratic `x'Ax/2 - b'x` by preconditioned conjugate gradients.

    If a search direction has negative curvature, CG stops and returns the current iterate; at the first iteration it returns
    `x0 + M^-1 (b - A x0)`, the preconditioned gradient step. If a product is not finite, CG stops and returns the last finite iterate. For `b = 0`
    the result is 0. Cost: one product and one application of the preconditioner per iteration, and one product for a start other than zero.

    Args:
        product: Callable `(n,) -> (n,)`, x -> Ax, symmetric positive definite (including the damping, if any).
        b: Tensor `(n,)`, float32 or float64.
        x0: Tensor `(n,)`, the start. Defaults to zero.
        precondition: Callable `(n,) -> (n,)`, r -> M^-1 r, an approximate inverse of A, symmetric positive definite. Defaults to the identity.
        stopping: A stopping rule. Defaults to `RelativeProgress()`.
        max_iterations: Integer >= 1. Defaults to 10 n, as in SciPy: n iterations suffice in exact arithmetic, but with rounding the directions
            lose their conjugacy, and an ill-conditioned A needs several times as many.

    Returns:
        A `CGResult`.

    Raises:
        ValueError: If `b` is not a vector or `max_iterations` is below 1.

    Example:

    >>> a = tf.constant([[4.0, 1.0], [1.0, 3.0]])
    >>> result = conjugate_gradient(lambda x: tf.linalg.matvec(a, x), tf.constant([1.0, 2.0]))
    >>> result.iterates[-1].numpy().round(3)
    array([0.091, 0.636], dtype=float32)

    References:
        Martens (2010), *Deep learning via Hessian-free optimization*, sections 4.4 and 4.6.
    """
    b = tf.convert_to_tensor(b)
    if b.shape.rank != 1:
        raise ValueError(f"`b` must be a vector of shape (n,). Received: shape={tuple(b.shape)}; reshape it to (-1,).")

    def with_form(v):
        image = product(v)
        return image, dot(v, image)

    result = minimized(with_form, b, x0, precondition, stopping, max_iterations)
    return result._replace(iterates=result.iterates.matrix())


def minimized(
    with_form, b, x0=None, precondition=None, stopping=None, max_iterations=None, max_kept=None, agreed=tf.identity
):
    """Minimises as `conjugate_gradient` does, with iterates that are not copied, and on several workers, which must leave the loop together.

    Args:
        with_form: Callable `(n,) -> ((n,), float64 scalar)`, x -> Ax and x'Ax, the scalar the same on all workers.
        b: As `conjugate_gradient`, as are those that follow down to `max_iterations`.
        x0: See there.
        precondition: See there.
        stopping: See there.
        max_iterations: See there.
        max_kept: Integer >= 1: only the last so many of the iterates are kept that would be kept otherwise. `None` = all.
        agreed: Callable on a float64 vector, which returns it as the first worker has computed it. With the product, an iteration has two sums
            over replicas.

    Returns:
        A `CGResult`, whose iterates are `vectors.SeparateRows`.
    """
    stopping = stopping or RelativeProgress()
    precondition = precondition or tf.identity
    if max_iterations is None:
        max_iterations = 10 * tf.minimum(tf.shape(b)[0], _MOST_WEIGHTS)
    else:
        max_iterations = tf.constant(count("max_iterations", max_iterations))

    run = _Run(
        b, with_form, precondition, stopping, max_iterations, max_kept, agreed, tf.sqrt(agreed(dot(b, b)[None])[0])
    )
    state = tf.while_loop(
        lambda state: state.reason < 0, lambda state: (run.iterate(state),), (run.start(x0),), parallel_iterations=1
    )[0]
    # If the last iterate was kept, it is at num_kept - 1, and there is nothing new after it.
    last = tf.maximum(state.num_kept - 1, 0)
    last = tf.where(state.iterate_numbers.read(last) == state.iteration, last, state.num_kept)
    rows = tf.range(0 if max_kept is None else tf.maximum(last + 1 - max_kept, 0), last + 1)
    numbers = state.iterate_numbers.gather(rows)
    iterates = SeparateRows(state.iterates, run.place_of(rows))
    course = state.values.gather(tf.range(state.iteration + 1))
    return CGResult(iterates, numbers, tf.gather(course, numbers), state.iteration, state.reason, course)


class _Run(NamedTuple):
    """A run of CG: its settings, and one iteration. Attributes as the arguments of `minimized`, and the norm of b."""

    b: tf.Tensor
    with_form: Callable
    precondition: Callable
    stopping: Any
    max_iterations: tf.Tensor
    max_kept: int | None
    agreed: Callable
    b_norm: tf.Tensor

    def start(self, x0):
        """Returns the `_State` before the first iteration."""
        b = self.b
        if x0 is None:
            x, residual = tf.zeros_like(b), b
        else:
            x = tf.where(dot(b, b) > 0, x0, tf.zeros([], b.dtype))
            residual = b - self.with_form(x)[0]
        direction = self.precondition(residual)
        residual_product, squared_norm, value = self._numbers(x, residual, direction)
        at_once = tf.sqrt(squared_norm) <= epsilon(b.dtype) * self.b_norm
        reason = tf.where(at_once, CGStop.CONVERGED, tf.where(residual_product > 0, -1, CGStop.BREAKDOWN))
        # No residual is small relative to infinity.
        reason = tf.where(tf.math.is_finite(self.b_norm), reason, CGStop.BREAKDOWN)
        return _State(
            iteration=tf.constant(0),
            x=x,
            residual=residual,
            direction=direction,
            residual_product=residual_product,
            # It grows where a run with the default limit is longer than n.
            values=_array(tf.float64, tf.minimum(self.max_iterations, tf.shape(b)[0]) + 1).write(0, value),
            iterates=_array(b.dtype, 1, b.shape).write(0, x),
            iterate_numbers=_array(tf.int32, 2).write(0, 0),
            num_kept=tf.constant(0),
            next_kept=tf.constant(_FIRST_KEPT, tf.float64),
            reason=reason,
        )

    def iterate(self, state):
        """Returns the `_State` after one more iteration."""
        image, curvature = self.with_form(state.direction)
        finite = tf.math.is_finite(curvature)
        usable = finite & (curvature > 0)
        # Without curvature the length of a step is not determined. The first step, the preconditioned gradient, is better than none.
        first = finite & ~usable & (state.iteration == 0)
        length = tf.where(usable, state.residual_product / curvature, tf.ones_like(curvature))
        stopped = tf.where(usable, -1, tf.where(finite, CGStop.NEGATIVE_CURVATURE, CGStop.BREAKDOWN))
        return tf.cond(
            usable | first,
            lambda: self._advanced(state, image, tf.cast(length, self.b.dtype), stopped),
            lambda: state._replace(reason=stopped),
        )

    def place_of(self, row):
        """Where a kept iterate is stored: old ones give way where their number is limited."""
        return row if self.max_kept is None else row % self.max_kept

    def _numbers(self, x, residual, preconditioned):
        # x'Ax/2 - b'x is known without another product.
        products = [dot(residual, preconditioned), dot(residual, residual), -0.5 * dot(x, self.b + residual)]
        return tf.unstack(self.agreed(tf.stack(products)))

    def _advanced(self, state, image, length, stopped):
        iteration = state.iteration + 1
        x = state.x + length * state.direction
        residual = state.residual - length * image
        preconditioned = self.precondition(residual)
        residual_product, squared_norm, value = self._numbers(x, residual, preconditioned)
        direction = preconditioned + tf.cast(residual_product / state.residual_product, self.b.dtype) * state.direction
        residual_norm = tf.sqrt(squared_norm)
        at_rounding = residual_norm <= epsilon(self.b.dtype) * self.b_norm
        values = state.values.write(iteration, value)
        stalled = self.stopping.should_stop(iteration, values.read, residual_norm, self.b_norm)

        reason = tf.where(iteration >= self.max_iterations, CGStop.MAX_ITERATIONS, -1)
        reason = tf.where(stalled, CGStop.STOPPING_RULE, reason)
        reason = tf.where(residual_product > 0, reason, CGStop.BREAKDOWN)
        reason = tf.where(at_rounding, CGStop.CONVERGED, reason)
        reason = tf.where(stopped < 0, reason, stopped)

        # The current iterate is stored after the kept ones. Incrementing num_kept keeps it; the last one is there when the loop ends.
        kept = tf.cast(iteration, tf.float64) >= tf.math.ceil(state.next_kept)
        return _State(
            iteration=iteration,
            x=x,
            residual=residual,
            direction=direction,
            residual_product=residual_product,
            values=values,
            iterates=state.iterates.write(self.place_of(state.num_kept), x),
            iterate_numbers=state.iterate_numbers.write(state.num_kept, iteration),
            num_kept=state.num_kept + tf.cast(kept, tf.int32),
            next_kept=tf.where(kept, _KEPT_RATIO * state.next_kept, state.next_kept),
            reason=reason,
        )


def _array(dtype, size, element_shape=()):
    return tf.TensorArray(dtype, size=size, dynamic_size=True, clear_after_read=False, element_shape=element_shape)
