"""Preconditioners: approximate inverses of the damped curvature, for CG."""

import keras
import tensorflow as tf

from keras_hf.checks import positive
from keras_hf.part import Part


class Preconditioner(Part):
    """What a preconditioner promises: immutable settings, and an inverse for every update."""

    def inverse(self, objective, linearize, damping, state):
        """Prepares the preconditioner of one update.

        Args:
            objective: `objective.Objective`.
            linearize: Callable without arguments that gives the update's product `v -> Gv`, undamped; see `Objective.product`. It is the one CG
                uses: held from the first call on, so call it where products are needed only, and outside of branches and loops.
            damping: Scalar, the damping of this update.
            state: Dict of tensors, what the update before left; see `Part.initial_state`.

        Returns:
            Callable `(n,) -> (n,)`, r -> M^-1 r, with M symmetric positive definite; and the next state.
        """
        raise NotImplementedError


def never_made():
    """The initial state, a dict, of what serves for an interval of updates: the number of the update that made it, -1 before."""
    return {"made_at": tf.constant(-1)}


def due(state, update_number, interval):
    """Whether an update must make anew what serves for `interval` updates, a bool scalar: it is as old as that, or was never made well."""
    made_at = state["made_at"]
    # Also of a later update than this one: the count of updates was set back.
    return (made_at < 0) | (made_at > update_number) | (update_number - made_at >= interval)


@keras.saving.register_keras_serializable("keras_hf")
class Identity(Preconditioner):
    """No preconditioning: M = I."""

    def inverse(self, objective, linearize, damping, state):
        del objective, linearize, damping
        return tf.identity, state


@keras.saving.register_keras_serializable("keras_hf")
class EmpiricalFisherDiagonal(Preconditioner):
    """Martens' diagonal preconditioner `M = (d + damping + w)^exponent`.

    d is the mean over the batch's cases of the squared gradient of the case's loss: squares of per-case gradients, not of their mean. w is the
    second derivative of the regularizers (2c for `L2(c)`). M is 1 where it would be 0. Under BatchNormalization, where a case has no gradient of
    its own, the batch statistics count as constants. In networks with loops or batched matrix products (recurrent layers, attention), where
    TensorFlow cannot vectorise over cases, weights of other layers than Dense, EinsumDense, Embedding and convolutions have an unbiased estimate of
    d, from 32 blocks of cases with random signs. Cost: about two gradients an update, and one division per CG iteration.

    Args:
        exponent: Float > 0; 1 would be the diagonal itself, less than 1 interpolates to no preconditioning.

    Raises:
        ValueError: If `exponent` is not a finite number above 0.

    References:
        Martens (2010), *Deep learning via Hessian-free optimization*, section 4.7.
    """

    def __init__(self, exponent=0.75):
        self.exponent = positive("exponent", exponent)

    def inverse(self, objective, linearize, damping, state):
        del linearize
        diagonal = objective.squared_gradients() + objective.regularization_diagonal() + damping
        scale = diagonal ** tf.constant(self.exponent, diagonal.dtype)
        scale = tf.where(scale > 0, scale, tf.ones_like(scale))
        return lambda residual: residual / scale, state

    def get_config(self):
        return {"exponent": self.exponent}
