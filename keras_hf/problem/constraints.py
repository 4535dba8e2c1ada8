"""Bounds of weights: a constraint of Keras that is a box, and which constraints are one."""

import keras
import numpy as np

from keras_hf.common.checks import bound


@keras.saving.register_keras_serializable("keras_hf")
class Box(keras.constraints.Constraint):
    """Keeps every entry of a weight within bounds: `lower <= w <= upper`.

    With `DirectSolver` the step itself respects the bounds of this constraint and of `keras.constraints.NonNeg`: entries at a bound, towards which
    the loss falls, are left out of the system (the projected Newton method of Bertsekas 1982), and what leaves the box on the way is projected. A
    minimum at a bound is reached as exactly as one inside. The other solvers see the gradient along the bound, and project after the step.

    Args:
        lower: Float, minus infinity = no bound.
        upper: Float, infinity = no bound.

    Raises:
        ValueError: If a bound is not a number, or `lower` is not less than `upper`.

    References:
        Bertsekas (1982), *Projected Newton methods for optimization problems with simple constraints*.
    """

    def __init__(self, lower=-np.inf, upper=np.inf):
        self.lower, self.upper = bound("lower", lower), bound("upper", upper)
        if not self.lower < self.upper:
            raise ValueError(f"`lower` must be less than `upper`. Received: lower={lower}, upper={upper}.")

    def __call__(self, w):
        return keras.ops.clip(w, self.lower, self.upper)

    def get_config(self):
        """Returns the arguments, a dict."""
        return {"lower": self.lower, "upper": self.upper}


def bounds_of(constraint):
    """Returns the bounds of a constraint that is a box, two floats; else minus infinity and infinity."""
    if isinstance(constraint, Box):
        return constraint.lower, constraint.upper
    return (0.0 if type(constraint) is keras.constraints.NonNeg else -np.inf), np.inf
