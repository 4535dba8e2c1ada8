"""A loop over rows: what it returns, and what it leaves where its function raises."""

import logging

import numpy as np
import pytest
import tensorflow as tf

from keras_hf.common.loops import map_rows, vectorized_map


@tf.function(autograph=False)
def traced(function, *args):
    return map_rows(function, *args)


@pytest.mark.parametrize("loop", [map_rows, traced], ids=["eager", "traced"])
def test_rows_are_mapped_in_order(loop):
    rows = tf.reshape(tf.range(6.0), [3, 2])
    np.testing.assert_array_equal(loop(lambda row: 2 * row, rows), 2 * rows)
    pair = (rows, tf.range(3))
    of_pair = lambda pair: tf.reduce_sum(tf.cast(pair[0], tf.float64)) + tf.cast(pair[1], tf.float64)  # noqa: E731
    np.testing.assert_array_equal(loop(of_pair, pair, tf.float64), [1.0, 6.0, 11.0])


@pytest.mark.parametrize("loop", [map_rows, traced], ids=["eager", "traced"])
def test_strategies_can_be_entered_after_a_function_that_raises(loop):
    def refuse(row):
        raise LookupError("no second derivative")

    with pytest.raises(Exception, match="no second derivative"):  # TensorFlow wraps it
        loop(refuse, tf.zeros([2, 2]))
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        assert tf.Variable(0.0).shape == ()


def test_a_vectorised_map_does_not_tell_users_what_tensorflow_should_mend():
    rng = np.random.default_rng(0)
    images, kernel = tf.constant(rng.normal(size=(3, 4, 4, 1))), tf.constant(rng.normal(size=(2, 2, 1, 1)))

    def gradient(image):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            outputs = tf.nn.conv2d(image[None], kernel, 1, "VALID")
        return tape.gradient(outputs, kernel)

    records = []
    handler = logging.Handler()
    handler.emit = records.append
    tf.get_logger().addHandler(handler)
    try:
        found = vectorized_map(gradient, images)
        assert [record for record in records if "while_loop" in record.getMessage()] == []
        np.testing.assert_allclose(found, tf.vectorized_map(gradient, images))
        assert any("while_loop" in record.getMessage() for record in records)
    finally:
        tf.get_logger().removeHandler(handler)
