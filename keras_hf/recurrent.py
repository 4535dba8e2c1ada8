"""What recurrent networks need besides Keras' layers: a first hidden state that is trained."""

import keras
from keras import ops

from keras_hf.common.checks import count


@keras.saving.register_keras_serializable("keras_hf")
class InitialState(keras.layers.Layer):
    """A trainable first hidden state of a recurrent layer, the same for all sequences.

    It takes the layer's input, of which it uses the number of sequences alone, and goes to the layer's `initial_state`; layers with several states,
    such as `LSTM`, take a list of them. To a layer with an initial state Keras hands no mask: pass it, `mask=masking.compute_mask(sequences)`.

    Args:
        units: Integer >= 1, the size of the state.
        initializer: Keras initializer of the state.
        **kwargs: As `keras.layers.Layer`.

    Raises:
        ValueError: If `units` is not an integer >= 1.

    Example:

    >>> sequences = keras.Input((None, 3))
    >>> hidden = keras.layers.SimpleRNN(100)(sequences, initial_state=InitialState(100)(sequences))
    >>> states = [InitialState(50)(sequences), InitialState(50)(sequences)]
    >>> hidden = keras.layers.LSTM(50)(sequences, initial_state=states)

    References:
        Sutskever (2013), *Training recurrent neural networks*, section 2.2.
    """

    def __init__(self, units, initializer="zeros", **kwargs):
        super().__init__(**kwargs)
        self.units = count("units", units)
        self.initializer = keras.initializers.get(initializer)
        self.supports_masking = True

    def build(self, input_shape):
        self.state = self.add_weight((self.units,), self.initializer, name="state")

    def call(self, sequences):
        return ops.broadcast_to(ops.cast(self.state, self.compute_dtype), (ops.shape(sequences)[0], self.units))

    def compute_mask(self, sequences, mask=None):
        # There are no time steps left.
        return None

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.units)

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "initializer": keras.initializers.serialize(self.initializer),
        }
