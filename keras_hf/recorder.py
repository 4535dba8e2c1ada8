"""The place in 0.3 of `keras_hf.callbacks.recorder`."""

from keras_hf.callbacks.recorder import *  # noqa: F403
