"""The place in 0.3 of `keras_hf.differentiation.curvature`."""

from keras_hf.differentiation.curvature import *  # noqa: F403
