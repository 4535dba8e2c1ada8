"""Flat vectors: all trainable weights as one `(n,)`, and lists of tensors shaped as the weights. Imports nothing of the package."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

# Products of an inner product that are summed in their own dtype.
_BLOCK = 256
# Below this, what a graph's operations cost outweighs what converting costs.
_FEWEST_IN_BLOCKS = 2**14


def epsilon(dtype):
    """Returns the distance from 1 to the next number of a float type, of TensorFlow or NumPy: a float."""
    # NumPy does not know bfloat16.
    return 2.0 ** -{"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}[tf.as_dtype(dtype).name]


class SeparateRows(NamedTuple):
    """The rows of a matrix `(k, n)`, each a tensor of its own. As one tensor they would be copied, which takes their memory once more.

    Attributes:
        array: `tf.TensorArray` of vectors `(n,)`.
        places: int32 `(k,)`, the place of each row in the array.
    """

    array: tf.TensorArray
    places: tf.Tensor

    def __getitem__(self, row):
        """Returns a row, or the `SeparateRows` of a slice."""
        places = self.places[row]
        return SeparateRows(self.array, places) if isinstance(row, slice) else self.array.read(places)

    def matrix(self):
        """Returns a copy of all as one tensor `(k, n)`."""
        return self.array.gather(self.places)


def num_rows(rows):
    """Returns k, an int32 scalar, of a tensor `(k, n)` or of `SeparateRows`."""
    return tf.shape(rows.places if isinstance(rows, SeparateRows) else rows)[0]


def num_weights(variables):
    """Returns n, the number of all weights."""
    return sum(variable.shape.num_elements() for variable in variables)


def vector_dtype(variables):
    """The dtype of flat vectors: float64 if any weight is, else float32."""
    return tf.float64 if any(variable.dtype == tf.float64 for variable in variables) else tf.float32


def pack(tensors, dtype):
    """Joins tensors into one flat vector `(n,)`."""
    return tf.concat([tf.reshape(tf.cast(tensor, dtype), [-1]) for tensor in tensors], 0)


def unpack(vector, variables):
    """Cuts a flat vector `(n,)` into tensors shaped and typed as `variables`."""
    parts = tf.split(vector, [variable.shape.num_elements() for variable in variables])
    return [tf.cast(tf.reshape(part, v.shape), v.dtype) for part, v in zip(parts, variables, strict=True)]


def unpack_rows(vectors, variables):
    """Cuts flat vectors, the rows of `(k, n)`, into tensors `(k, *shape)`, typed as `variables`."""
    parts = tf.split(vectors, [variable.shape.num_elements() for variable in variables], axis=1)
    return [tf.cast(tf.reshape(part, [-1, *v.shape]), v.dtype) for part, v in zip(parts, variables, strict=True)]


def assign(variables, values):
    """Gives variables the values of a list of tensors."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def dot(a, b):
    """Inner product of two vectors `(n,)`, summed in float64: relative progress of 1e-6 must be seen in float32 runs."""
    # Products and sums of a block stay in their dtype: their rounding averages out over blocks, at a third of the time of converting each product.
    products = a * b
    if a.shape[0] and a.shape[0] < _FEWEST_IN_BLOCKS:
        return tf.reduce_sum(tf.cast(products, tf.float64))
    in_blocks = a.shape[0] // _BLOCK * _BLOCK if a.shape[0] else 0
    blocks = tf.reduce_sum(tf.reshape(products[:in_blocks], [-1, _BLOCK]), 1)
    return tf.reduce_sum(tf.cast(tf.concat([blocks, products[in_blocks:]], 0), tf.float64))


def inner_product(a, b):
    """Sum of the inner products of two lists of tensors, a float64 scalar."""
    products = [tf.reduce_sum(tf.cast(s, tf.float64) * tf.cast(t, tf.float64)) for s, t in zip(a, b, strict=True)]
    return tf.add_n([tf.zeros([], tf.float64), *products])


def gram(matrix):
    """Returns `B'B`, `(n, n)`, of B `(m, n)`, n static."""
    return _with_transpose(matrix, matrix.shape[1], lambda b: b.T @ b, transpose_a=True)


def row_gram(matrix):
    """Returns `BB'`, `(m, m)`, of B `(m, n)`, m static."""
    return _with_transpose(matrix, matrix.shape[0], lambda b: b @ b.T, transpose_b=True)


def _with_transpose(matrix, size, by_numpy, **transposed):
    """A product of a matrix and its transpose. On processors by NumPy, which knows that it is symmetric: a third of TensorFlow's time."""
    if any(device.device_type != "CPU" for device in tf.config.list_logical_devices()):
        return tf.matmul(matrix, matrix, **transposed)

    def quietly(b):
        # What is not finite is a rejected step here, not a warning, which would be an error for some.
        with np.errstate(all="ignore"):
            return by_numpy(b)

    return tf.ensure_shape(tf.numpy_function(quietly, [matrix], matrix.dtype, stateful=False), [size, size])


def dense(gradients, sources):
    """Returns gradients as dense tensors of their sources' shapes: zeros for `None`, sparse ones converted, lost static shapes restored."""

    def of(gradient, source):
        if gradient is None:
            return tf.zeros_like(source)
        gradient = tf.convert_to_tensor(gradient)
        # Only where needed: `tf.autodiff.ForwardAccumulator` cannot differentiate `tf.ensure_shape`.
        same = gradient.shape.as_list() == source.shape.as_list() if gradient.shape.rank is not None else False
        return gradient if same else tf.ensure_shape(gradient, source.shape)

    return [of(gradient, source) for gradient, source in zip(gradients, sources, strict=True)]
