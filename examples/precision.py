"""The float type that Keras computes in, for a while."""

import contextlib

import keras


@contextlib.contextmanager
def precision(floatx):
    """Context in which a float type is Keras' default: that of layers, by their policy, and that of losses.

    Args:
        floatx: String, "float32" or "float64".
    """
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(floatx)
    try:
        yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])
