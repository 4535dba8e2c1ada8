"""What every exchangeable part promises: immutable settings that serialise, and memory that somebody else keeps."""

import tensorflow as tf


class Part:
    """Base of the parts handed to `HessianFree`. Subclasses with settings override `get_config`, those with memory `initial_state`."""

    def initial_state(self, variables, layers):
        """Returns what this part remembers before the first update: a dict of tensors or of such dicts, whose shapes stay.

        The optimizer makes variables of it, which are saved with it; an update passes their values in and hands the next ones back, whether its step
        is taken or rejected. A state with floats that are not finite is not kept, nor that of an update that raises.

        Args:
            variables: List of tensors or variables, the trainable weights in the order of flat vectors.
            layers: List of `keras.Layer`, all layers of the network.
        """
        del variables, layers
        return {}

    def get_config(self):
        """Returns the constructor's arguments as a dict."""
        return {}

    @classmethod
    def from_config(cls, config):
        """Makes the part from what `get_config` returned."""
        return cls(**config)


def if_finite(new, old):
    """Returns a state or, where numbers in it are not finite, all of the old one: nests of tensors."""
    floats = [tensor for tensor in tf.nest.flatten(new) if tensor.dtype.is_floating]
    is_finite = tf.reduce_all([True, *[tf.reduce_all(tf.math.is_finite(tensor)) for tensor in floats]])
    return tf.nest.map_structure(lambda new, old: tf.where(is_finite, new, old), new, old)
