"""A loop over rows: what it returns, and what it leaves where its function raises."""

import numpy as np
import pytest
import tensorflow as tf

from keras_hf.common.loops import map_rows


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
