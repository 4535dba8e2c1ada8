"""Preconditioners: approximate inverses of the damped curvature, for CG."""

import keras
import tensorflow as tf

from keras_hf.common.checks import positive
from keras_hf.common.part import Part


class Preconditioner(Part):
    """Base class of preconditioners: immutable settings, and an approximate inverse for every update."""

    def inverse(self, objective, linearize, damping, state):
        """Prepares the preconditioner of one update.

        Args:
            objective: `objective.Objective`.
            linearize: Callable without arguments that returns the undamped product `v -> Gv` of the update; see `Objective.product`. CG uses the same
                product. Under structural damping its term of hidden states is added, and `damping` times the identity alone is missing. The product
                is kept in memory from the first call on: call it only if you need products, and outside of branches and loops.
            damping: Scalar, the damping of this update.
            state: Dict of tensors, the state after the previous update; see `Part.initial_state`.

        Returns:
            Callable `(n,) -> (n,)`, r -> M^-1 r, with M symmetric positive definite; and the next state.
        """
        raise NotImplementedError


def never_made():
    """Returns the initial state, a dict, of something that is reused for several updates: the number of the update that made it, -1 before."""
    return {"made_at": tf.constant(-1)}


def due(state, update_number, interval):
    """Whether something that is reused for `interval` updates must be made anew, a bool scalar: it is that old, or was never made successfully."""
    made_at = state["made_at"]
    # Also if it is of a later update than this one: the number of updates was set back.
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

    d is the mean over the cases of the batch of the squared gradient of the case's loss (the mean of per-case squares, not the square of the mean). w
    is the second derivative of the regularizers (2c for `L2(c)`). Where M would be 0 it is 1. Under BatchNormalization, where the gradient of a
    single case is not defined, the batch statistics count as constants.

    In networks with loops or batched matrix products (recurrent layers, attention) TensorFlow cannot vectorise over cases. There, weights of layers
    other than Dense, EinsumDense, Embedding and convolutions get an unbiased estimate of d, from 32 blocks of cases with random signs. Cost: about
    two gradients per update, and one division per CG iteration.

    Args:
        exponent: Float > 0. With 1, M is the diagonal itself; smaller exponents are closer to no preconditioning.

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
