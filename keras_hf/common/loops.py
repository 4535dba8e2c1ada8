"""Loops over rows and over blocks of cases: in sequence, so that memory is that of one of them, or vectorised."""

import tensorflow as tf


def vectorized_map(function, rows):
    """`tf.vectorized_map`, without its remarks to TensorFlow's developers ("Conv2DBackpropFilter uses a while_loop. Fix that!") in a user's log."""
    logger = tf.get_logger()

    def is_for_users(record):
        return "while_loop" not in record.getMessage()

    logger.addFilter(is_for_users)
    try:
        return tf.vectorized_map(function, rows)
    finally:
        logger.removeFilter(is_for_users)


def map_rows(function, rows, dtype=None):
    """Applies a function to every row of a tensor or of nested ones, in sequence: memory is that of one row.

    `tf.map_fn` leaves a caching device in the variable scope of the whole process where the function raises (TensorFlow 2.21), and no
    `tf.distribute` strategy can be entered afterwards. Functions do raise: products refuse what they cannot differentiate.

    Args:
        function: Takes a row, returns a tensor.
        rows: Tensor `(k, ...)`, or nested ones of the same k.
        dtype: Of what the function returns; of its argument by default.
    """
    scope = tf.compat.v1.get_variable_scope()
    caching_device = scope.caching_device
    try:
        return tf.map_fn(function, rows, fn_output_signature=dtype, parallel_iterations=1)
    finally:
        # Eagerly nothing is left, and nothing can be set.
        if not tf.executing_eagerly():
            scope.set_caching_device(caching_device)


def sum_over_blocks(size, block, terms, start):
    """Adds `terms(first, last)` over blocks of cases `first` to `last - 1`, in sequence: memory is that of one block.

    Args:
        size: Integer scalar, the number of cases.
        block: Scalar of the same type, or integer, >= 1: the number of cases in a block. The last one may have fewer.
        terms: Callable `(first, last) -> nest of tensors`.
        start: The same nest, what they are added to.
    """

    def add_block(first, sums):
        last = tf.minimum(first + block, size)
        return last, tf.nest.map_structure(tf.add, sums, terms(first, last))

    return tf.while_loop(lambda first, _: first < size, add_block, (tf.zeros_like(size), start), parallel_iterations=1)[
        1
    ]


def stacked(array, length):
    """Returns what a loop has written to a `tf.TensorArray`, with the shape that the loop loses.

    Layers that come next may depend on it: `keras.layers.TimeDistributed` takes the number of cases for that of steps where no trace knows the steps.

    Args:
        array: `tf.TensorArray`.
        length: The number of its entries, an integer, or a scalar or `None` where no trace knows it.
    """
    values = array.stack()
    return tf.ensure_shape(values, [length, *values.shape[1:]]) if isinstance(length, int) else values
