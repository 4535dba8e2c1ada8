"""Stopping rules of conjugate gradients.

A rule receives the iteration, the values of the quadratic so far and two norms, and decides whether to stop. It knows nothing of networks or damping.
"""

import keras
import tensorflow as tf

from keras_hf.common.checks import positive
from keras_hf.common.part import Part


class StoppingRule(Part):
    """Base class of stopping rules: immutable settings and one decision.

    Subclasses implement `should_stop`, which is called after every iteration, inside a `tf.while_loop`. A rule with state declares `initial_state`,
    and overrides `prepared` and `next_state`.
    """

    def prepared(self, state):
        """Returns the rule of one update.

        Args:
            state: Dict of tensors, the state after the previous update; see `Part.initial_state`.

        Returns:
            A `StoppingRule`: this one, or a copy that holds what it needs of the state.
        """
        del state
        return self

    def next_state(self, state, result):
        """Returns the state after an update.

        Args:
            state: Dict of tensors, the state before it.
            result: `cg.CGResult` of the CG run that used the rule.
        """
        del result
        return state

    def should_stop(self, iteration, value_at, residual_norm, b_norm):
        """Returns whether CG may stop after `iteration`.

        Args:
            iteration: int32 scalar, the number of iterations done, >= 1.
            value_at: Callable from an iteration number in [0, iteration] to the value `x'Ax/2 - b'x` (float64) of that iterate; 0 is the start.
            residual_norm: float64 scalar, norm of `b - Ax` at this iterate.
            b_norm: float64 scalar, norm of `b`.

        Returns:
            A bool scalar.
        """
        raise NotImplementedError


@keras.saving.register_keras_serializable("keras_hf")
class RelativeProgress(StoppingRule):
    """Stops when the last k iterations contributed too little of the total decrease.

    With phi the value of the quadratic, CG stops at iteration i when `i > k`, `phi_i < 0`, `phi_{i-k} < 0` and

        (phi_i - phi_{i-k}) / phi_i < k * tolerance,    k = max(10, ceil(i / 10)).

    It measures the quadratic, which CG minimises, and not the residual norm. The earliest stop is at iteration 11.

    Args:
        tolerance: Float > 0, the progress per iteration, relative to the total decrease, below which to stop.

    Raises:
        ValueError: If `tolerance` is not a finite number above 0.

    References:
        Martens (2010), *Deep learning via Hessian-free optimization*, section 4.4.
    """

    def __init__(self, tolerance=5e-4):
        self.tolerance = positive("tolerance", tolerance)

    def should_stop(self, iteration, value_at, residual_norm, b_norm):
        del residual_norm, b_norm
        # ceil(i/10) in integers: a float quotient would make 30/10 ceil to 4 on some hardware.
        window = tf.maximum(10, (iteration + 9) // 10)
        value = value_at(iteration)
        older = value_at(tf.maximum(iteration - window, 0))
        # (value - older) / value < bound, multiplied by value, which is negative where it counts.
        bound = tf.cast(window, value.dtype) * tf.constant(self.tolerance, value.dtype)
        stalled = (value - older) > bound * value
        return (iteration > window) & (value < 0) & (older < 0) & stalled


@keras.saving.register_keras_serializable("keras_hf")
class ResidualTolerance(StoppingRule):
    """Stops when the residual is small: `norm(b - Ax) < rtol * norm(b)`, the standard rule of truncated Newton methods.

    Args:
        rtol: Float > 0, or `None` for `min(1/2, sqrt(norm(b)))`, which makes Newton's method converge superlinearly.

    Raises:
        ValueError: If `rtol` is neither `None` nor a finite number above 0.

    References:
        Nocedal & Wright (2006), *Numerical Optimization*, algorithm 7.1.
    """

    def __init__(self, rtol=None):
        self.rtol = None if rtol is None else positive("rtol", rtol)

    def should_stop(self, iteration, value_at, residual_norm, b_norm):
        del iteration, value_at
        if self.rtol is None:
            rtol = tf.minimum(tf.constant(0.5, b_norm.dtype), tf.sqrt(b_norm))
        else:
            rtol = tf.constant(self.rtol, b_norm.dtype)
        return residual_norm < rtol * b_norm
