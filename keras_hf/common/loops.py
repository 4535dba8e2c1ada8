"""Loops over rows and over blocks of cases: in sequence, so that memory is that of one of them, or vectorised."""

import re

import tensorflow as tf


class _NotVectorizableError(Exception):
    """A function of a row has an operation that TensorFlow vectorises wrongly."""


def mapped(function, rows, dtype, is_vectorizable=True):
    """Applies a function to every row of a tensor or of nested ones: all rows at once where TensorFlow vectorises it rightly, else in sequence.

    The operations of one row decide. Wrong are those whose number of results depends on values, such as `tf.where(condition)`: TensorFlow 2.21
    raises, or mixes the rows up silently. Gradients have them, too: that of entries gathered from a concatenation looks for those of each part. Where
    the vectorisation itself raises, rows come in sequence, too.

    Args:
        function: Takes a row, returns a tensor or nested ones.
        rows: Tensor `(k, ...)`, or nested ones of the same k.
        dtype: Of what the function returns, nested as that is.
        is_vectorizable: Whether to vectorise at all.
    """
    if not is_vectorizable:
        return map_rows(function, rows, dtype)

    def of_row(row):
        graph = tf.compat.v1.get_default_graph()
        num_others = len(graph.get_operations())
        values = function(row)
        if not _vectorizes(graph.get_operations()[num_others:], tf.nest.flatten(row)):
            raise _NotVectorizableError
        return values

    try:
        return _vectorized_map(of_row, rows)
    except Exception:  # of any kind: what the function itself raises is raised again
        return map_rows(function, rows, dtype)


# Their results do not depend on values.
_OF_SHAPES = ("Shape", "ShapeN", "Size", "Rank")


def _vectorizes(operations, row):
    """Whether TensorFlow vectorises operations that are applied to a row, a list of tensors, rightly."""
    differs = {x.ref() for x in row}
    for op in operations:
        if op.type in _OF_SHAPES or all(x.ref() not in differs for x in op.inputs):
            continue
        differs.update(x.ref() for x in op.outputs)
        # The lists of loops, whose type is variant, do not tell the shapes in them.
        knows_inputs = all(_has_shape(x) and x.dtype != tf.variant for x in op.inputs)
        if knows_inputs and not all(map(_has_shape, op.outputs)):
            return False
        # Vectorised as if its input was a batch of images.
        if (
            op.type in ("BiasAdd", "BiasAddGrad")
            and op.get_attr("data_format") == b"NCHW"
            and op.inputs[0].shape.rank != 4
        ):
            return False
    return True


def _has_shape(tensor):
    return tensor.dtype == tf.variant or tensor.shape.is_fully_defined()


def _vectorized_map(function, rows):
    """`tf.vectorized_map`, without remarks in a user's log that no user can act on.

    They are for TensorFlow's developers ("Conv2DBackpropFilter uses a while_loop. Fix that!"), or eagerly about the function that it traces in every
    call.
    """
    logger = tf.get_logger()

    def is_for_users(record):
        return not re.search(r"while_loop|pfor was converting|pfor\.<locals>", record.getMessage())

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
