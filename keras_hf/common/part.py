"""The interface of every exchangeable part: immutable settings that can be serialised, and a state that the optimizer keeps."""

import inspect

import keras
import tensorflow as tf

# Numbers of a small state: choosing each costs less than a branch, for which every tensor is handed over twice.
_MOST_CHOSEN = 2**16


class Part:
    """Base class of the parts passed to `HessianFree`. Subclasses with state override `initial_state`.

    A subclass keeps each argument of its constructor in an attribute of the same name: its configuration is read from these, nested parts included.
    """

    def initial_state(self, variables, layers):
        """Returns the state before the first update: a dict of tensors, or of such dicts, whose shapes do not change.

        The optimizer creates variables for it and saves them. An update takes their values and returns the next ones, whether its step is taken or
        rejected. A state with floats that are not finite is discarded, as is the state of an update that raises an error.

        Args:
            variables: List of tensors or variables, the trainable weights in the order of flat vectors.
            layers: List of `keras.Layer`, all layers of the network.
        """
        del variables, layers
        return {}

    def get_config(self):
        """Returns the constructor's arguments as a dict.

        Raises:
            TypeError: If an argument is not kept in an attribute of its name.
        """
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(type(self)).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind in named]
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise TypeError(
                "A part must keep every argument of its constructor in an attribute of the same name, from which it is saved. "
                f"Received: a `{type(self).__name__}` without {', '.join(missing)}. Assign it in `__init__`, or override `get_config`."
            )
        return {name: keras.saving.serialize_keras_object(getattr(self, name)) for name in names}

    @classmethod
    def from_config(cls, config):
        """Creates the part from the result of `get_config`."""
        return cls(**{name: keras.saving.deserialize_keras_object(value) for name, value in config.items()})


def if_finite(new, old, agreed=tf.identity):
    """Returns the new state, or all of the old one if any float of the new is not finite: nests of tensors.

    Args:
        new: Nest of tensors.
        old: The same.
        agreed: Callable on a bool scalar, which returns what all workers go by; see `Objective.agreed`.
    """
    floats = [tensor for tensor in tf.nest.flatten(new) if tensor.dtype.is_floating]
    if not floats:
        return new
    is_finite = agreed(all_finite(floats))
    if sum(tensor.shape.num_elements() or _MOST_CHOSEN for tensor in floats) < _MOST_CHOSEN:
        return tf.nest.map_structure(lambda new, old: tf.where(is_finite, new, old), new, old)
    # A branch, not a choice of every number: factors and inverses are many megabytes.
    return tf.cond(is_finite, lambda: _copied(new), lambda: _copied(old))


def all_finite(tensors):
    """Whether tensors of floats hold finite numbers alone, a bool scalar: by their sums, in a third of the time of looking at each number."""
    return tf.reduce_all([True, *[tf.math.is_finite(tf.reduce_sum(tensor)) for tensor in tensors]])


def _copied(nest):
    return tf.nest.map_structure(tf.identity, nest)
