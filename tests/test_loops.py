"""A loop over rows: what it returns, and what it leaves where its function raises."""

import numpy as np
import pytest
import tensorflow as tf

from keras_hf.common import loops
from keras_hf.common.loops import map_rows, mapped


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


def test_a_vectorised_map_does_not_tell_users_what_tensorflow_should_mend(tensorflow_log):
    rng = np.random.default_rng(0)
    images, kernel = tf.constant(rng.normal(size=(3, 4, 4, 1))), tf.constant(rng.normal(size=(2, 2, 1, 1)))

    def gradient(image):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            outputs = tf.nn.conv2d(image[None], kernel, 1, "VALID")
        return tape.gradient(outputs, kernel)

    found = mapped(gradient, images, tf.float64)
    assert not any("while_loop" in message for message in tensorflow_log)
    np.testing.assert_allclose(found, tf.vectorized_map(gradient, images))
    assert any("while_loop" in message for message in tensorflow_log)


def test_an_eager_vectorised_map_does_not_warn_of_the_function_that_it_traces(tensorflow_log):
    for _ in range(6):
        mapped(tf.square, tf.range(3.0), tf.float32)
    assert tensorflow_log == []


def as_images(rank):
    """Adds a bias to what has its channels in front, as Keras does where only that fits."""
    shape = [1, 2, 3, *[1] * (rank - 3)]
    return lambda t, i: tf.nn.bias_add(tf.reshape(t, shape) ** 2, t[:2] * t[2], "NCHW")[0]


# Functions of a vector (6,) and of a number that differs from row to row.
OPERATIONS = {
    "stack": lambda t, i: tf.stack([t[0] ** 2, t[3], t[i]]),
    "concat": lambda t, i: tf.concat([t[:2] ** 2, t], 0),
    "concat, ensure_shape": lambda t, i: tf.ensure_shape(tf.concat([t[:2] ** 2, t], 0), [8]),
    "concat, gather_nd": lambda t, i: tf.gather_nd(tf.concat([t[:2] ** 2, t], 0), [[i]]),
    "gather_nd": lambda t, i: tf.gather_nd(tf.reshape(t, [2, 3]), [[i // 3, i % 3], [1, 2]]),
    "scatter_nd": lambda t, i: tf.scatter_nd([[i], [1], [1]], t[:3] ** 2, [6]),
    "pad": lambda t, i: tf.pad(t**2, [[1, 2]], constant_values=1.5),
    "split": lambda t, i: tf.split(t**2, [2, 4])[1],
    "tile": lambda t, i: tf.tile(t**2, [2]),
    "repeat": lambda t, i: tf.repeat(t**2, [1, 2, 0, 3, 1, 1]),
    "reverse": lambda t, i: tf.reverse(t**2, [0]),
    "cumsum": lambda t, i: tf.cumsum(t**2, exclusive=True, reverse=True),
    "where": lambda t, i: tf.where(t > 0, t**2, t[::-1]),
    "slice": lambda t, i: tf.slice(t**2, [i // 2], [3]),
    "strided_slice": lambda t, i: (t**2)[4:0:-2],
    "transpose": lambda t, i: tf.transpose(tf.reshape(t**2, [2, 3])),
    "einsum": lambda t, i: tf.einsum("ij,kj->ik", tf.reshape(t, [2, 3]), tf.reshape(t, [2, 3])),
    "boolean_mask, constant": lambda t, i: tf.boolean_mask(t**2, [True, False, True, True, False, True]),
    "boolean_mask, of a row": lambda t, i: tf.boolean_mask(t**2, tf.range(6) <= i),
    "dynamic_partition": lambda t, i: tf.dynamic_partition(t**2, tf.cast(tf.range(6) > i, tf.int32), 2)[0],
    "unique": lambda t, i: tf.gather(t**2, tf.unique(tf.stack([i, 1]))[0]),
    "segment_sum": lambda t, i: tf.math.segment_sum(t**2, tf.cast(tf.range(6) > i, tf.int32)),
    "unsorted_segment_sum": lambda t, i: tf.math.unsorted_segment_sum(t**2, tf.range(6) % (i + 1), 6),
    "one_hot": lambda t, i: tf.one_hot([i, 3], 6, dtype=t.dtype) @ t[:, None] ** 2,
    "bias_add, rank 3": as_images(3),
    "bias_add, rank 4": as_images(4),
    "bias_add, rank 5": as_images(5),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_gradients_of_every_row_are_those_of_the_tape(operation):
    """Through an operation on weights, of whose results each row takes one, and on activations."""
    rng = np.random.default_rng(0)
    kernel, b, rows = (tf.constant(rng.normal(size=shape)) for shape in [(3, 6), 6, (4, 3)])

    def gradient(row):
        x, i = row
        with tf.GradientTape() as tape:
            tape.watch([kernel, b])
            of_weights = operation(b, i)
            taken = tf.gather(of_weights, i % tf.shape(of_weights)[0])
            of_activations = operation(tf.tanh(tf.linalg.matvec(kernel, x, transpose_a=True)) + b, i)
            value = tf.reduce_sum(tf.sin(taken)) * x[0] + tf.reduce_sum(tf.sin(of_activations))
        return tf.concat([tf.reshape(part, [-1]) for part in tape.gradient(value, [kernel, b])], 0)

    numbers = tf.constant([0, 5, 2, 2])
    found = tf.function(lambda *rows: mapped(gradient, rows, tf.float64), autograph=False)(rows, numbers)
    expected = [gradient(row) for row in zip(rows, numbers, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


def test_rows_come_in_sequence_only_where_they_must(monkeypatch):
    monkeypatch.setattr(loops, "map_rows", lambda *arguments: None)
    spec = tf.TensorSpec([None, 3], tf.float64)

    @tf.function(autograph=False, input_signature=[spec, spec])
    def products(rows, others):
        """With others, of a number that no trace knows."""
        assert mapped(lambda row: tf.boolean_mask(row, row > 0), rows, tf.float64) is None
        return mapped(lambda row: tf.boolean_mask(tf.linalg.matvec(others, row), [True] * 2), rows, tf.float64)

    rows = tf.constant(np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(products(rows, rows), rows @ tf.transpose(rows))


def test_what_a_function_raises_is_raised():
    def refuse(row):
        raise LookupError("no second derivative")

    with pytest.raises(LookupError, match="no second derivative"):
        tf.function(lambda rows: mapped(refuse, rows, tf.float64), autograph=False)(tf.zeros([2, 2]))
