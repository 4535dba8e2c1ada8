"""A computation as one function of the graph: traced once for all its uses."""

import tensorflow as tf


def graph_function(function):
    """Returns a function that is traced at its first call in a graph, and that the graph then calls wherever it is called again.

    TensorFlow would otherwise copy the operations to every use, and optimise each copy. Eagerly it is the function itself.

    Args:
        function: Callable on tensors that returns a nest of tensors. It may use tensors of the graph in which the result is first called.
    """
    compiled = tf.function(function, autograph=False, experimental_attributes={"_noinline": True})
    return lambda *args: function(*args) if tf.executing_eagerly() else compiled(*args)
