"""The place in 0.3 of `keras_hf.differentiation.linearization`."""

from keras_hf.differentiation.linearization import *  # noqa: F403
