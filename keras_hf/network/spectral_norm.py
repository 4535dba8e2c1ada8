"""Kernels within `keras.layers.SpectralNormalization`, which the layer divides by their spectral norm."""

import keras
import tensorflow as tf

from keras_hf.common import keras_private


class UnitSpectralNorm:
    """Divides the kernel of a `keras.layers.SpectralNormalization` by its spectral norm, as the layer does in every pass of training mode.

    In training mode the scale of the kernel makes no difference; in evaluation mode the layer takes the kernel as it is. The spectral norm is that
    along the layer's singular vector, which stays as it is within an update.

    Args:
        layer: The layer, built.
    """

    def __init__(self, layer):
        self._layer = layer

    def __call__(self, w):
        def normalized():
            with keras.StatelessScope(state_mapping=[(self._layer.kernel, w)]), keras_private.complete_derivatives():
                return self._layer.normalized_weights()[1]

        return tf.cond(tf.reduce_all(w == 0), lambda: w, normalized)

    def regularized_by(self, regularizer):
        """Returns the regularizer of the kernel that the layer uses, as a function of the kernel before."""
        return lambda w: regularizer(self(w))
