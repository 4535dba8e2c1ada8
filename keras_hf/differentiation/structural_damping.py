"""Structural damping: the damping of recurrent networks, which holds back changes of hidden states, not of weights alone.

Martens & Sutskever (2011), section 3.2; Martens & Sutskever (2012), section 6.3.
"""

import keras
import tensorflow as tf

from keras_hf.common.checks import positive
from keras_hf.common.part import Part


@keras.saving.register_keras_serializable("keras_hf")
class StructuralDamping(Part):
    """Damping of recurrent networks: a step is dear if it changes the hidden states.

    In a recurrent network a small change of the weights may change the hidden states of late steps entirely, and with them the gradient: the
    quadratic model of the loss then holds for tiny steps only. This part replaces the damping's identity by

        damping (I + weight G_S),   G_S = mean over cases of the sum over time steps of J_t' J_t

    where J_t is the derivative of the hidden states at time step t with respect to the weights: G_S is the Gauss-Newton matrix of half the squared
    distance between the hidden states before and after the step. Damping rules move both terms together; the reduction ratio leaves out both.

    The distance is the squared one on the hidden states, as they leave the nonlinearity; it needs no assumption about their range. The released code
    of 2011 takes the cross-entropy between (1 + h) / 2 of tanh units before and after: the same near h = 0, where both have the weight 1 at the
    pre-activation; for saturated units it has 1 - h^2 where the squared distance has (1 - h^2)^2.

    Hidden states are the outputs, at all time steps, of the cells of all recurrent layers: `keras.layers.RNN` and what is derived of it (`SimpleRNN`,
    `GRU`, `LSTM`, convolutional ones), stacked or in `Bidirectional`, whatever the layers return. Steps under a mask do not count; sample weights do
    not enter. A cell of your own with other hidden states than its outputs names them by a method, which is called in every step:

        def hidden_states(self, outputs, states):  # of the cell; returns a list of tensors (cases, ...)

    Cost: none beside that of a product with the curvature; the hidden states of all steps are kept with it.

    Args:
        weight: Float > 0, the share of hidden states in the damping. As the damping multiplies it, it does not depend on the scale of the loss. The
            released code of 2011 has 0.03 and, in its example, 1.

    Raises:
        ValueError: If `weight` is not a finite number above 0; at the first update, if the network has no recurrent layer, or one that does not show
            its hidden states.

    Example:

    >>> optimizer = HessianFree(structural_damping=StructuralDamping(weight=0.1))

    References:
        Martens & Sutskever (2011), *Learning recurrent neural networks with Hessian-free optimization*, section 3.2.
    """

    def __init__(self, weight=1.0):
        self.weight = positive("weight", weight)


def with_hidden_states(micro_batch, forward, hessian_at):
    """Adds hidden states to the outputs of a Gauss-Newton matrix `J'HJ`, so that `J'HJ + strength G_S` is one product.

    Args:
        micro_batch: `micro_batch.MicroBatch`.
        forward: Callable `() -> (outputs, evaluation)`.
        hessian_at: Callable `(outputs, evaluation) -> (u -> Hu)`.

    Returns:
        Both for outputs and hidden states; the second gives `(u, strength) -> Hu`, with strength a scalar, 0 by default.
    """

    def extended_forward():
        outputs, evaluation = forward()
        return [*outputs, *[state.values for state in evaluation.hidden]], evaluation

    def extended_hessian_at(outputs, evaluation):
        num_outputs = len(outputs) - len(evaluation.hidden)
        hessian = hessian_at(outputs[:num_outputs], evaluation)

        def product(u, strength=None):
            curved = hessian(u[:num_outputs])
            if strength is None:
                return [*curved, *map(tf.zeros_like, u[num_outputs:])]
            # G_S is a mean over all cases, of which these are a micro-batch.
            strength *= micro_batch.loss_scale / tf.maximum(micro_batch.all_cases, 1)
            return [*curved, *map(_scaled(strength), u[num_outputs:], evaluation.hidden)]

        return product

    return extended_forward, extended_hessian_at


def _scaled(strength):
    """Returns `(u, hidden states) -> strength * u`, zero under their mask."""

    def scale(u, state):
        scaled = tf.cast(strength, u.dtype) * u
        if state.mask is None:
            return scaled
        mask = tf.reshape(state.mask, tf.concat([tf.shape(state.mask), [1] * (u.shape.rank - 2)], 0))
        return tf.where(mask, scaled, tf.zeros_like(scaled))

    return scale
