"""Layers as users write them, which reproductions hold beside their program."""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("fuzz")
class Added(keras.layers.Layer):
    """Adds a loss of what passes through it."""

    def call(self, h):
        self.add_loss(0.1 * tf.reduce_mean(tf.square(h)))
        return h


@keras.saving.register_keras_serializable("fuzz")
class Moving(keras.layers.Layer):
    """Subtracts a moving mean, which it changes after its use."""

    def build(self, shape):
        self.moving = self.add_weight(shape=shape[-1:], initializer="zeros", trainable=False, name="moving_mean")

    def call(self, h, training=False):
        found = h - self.moving
        if training:
            mean = tf.reduce_mean(h, list(range(h.shape.rank - 1)))
            self.moving.assign(0.9 * self.moving + 0.1 * mean)
        return found

    def compute_output_shape(self, shape):
        return shape
