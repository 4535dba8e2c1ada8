"""What `fit` does with arrays of cases: one batch of all of them, in an order that stays."""

import keras
import numpy as np
import tensorflow as tf

from keras_hf.problem import batching
from keras_hf.problem.places import by_replica


def is_arrays(x):
    """Whether `fit` was given arrays, and not a dataset or a generator."""
    if x is None or isinstance(x, (tf.data.Dataset, tf.distribute.DistributedDataset, keras.utils.PyDataset)):
        return False
    leaves = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    return bool(leaves) and all(hasattr(leaf, "shape") and hasattr(leaf, "__len__") for leaf in leaves)


def split(arrays, num_cases):
    """Takes the first cases of each of `(x, y, sample_weight)` for training, and gives the rest as Keras' `validation_data`."""
    first, rest = (
        keras.tree.map_structure(
            lambda array, part=part: None if array is None else getattr(array, "iloc", array)[part], arrays
        )
        for part in (slice(num_cases), slice(num_cases, None))
    )
    return *first, rest if arrays[2] is not None else rest[:2]


def repeated(x, y, sample_weight, seed, times=None, is_of_any_length=False, num_replicas=1):
    """Gives arrays as a dataset of one batch, `times` or again and again: Keras would copy them, and start anew, in every epoch.

    They are put in the order of `seed` when the first epoch begins: a callback may have brought back the seed of an earlier run by then.

    Args:
        x: Nest of arrays.
        y: Nest of arrays, or `None`.
        sample_weight: Nest of arrays, or `None`.
        seed: int32 scalar variable, or `None` for the order as it is.
        times: Integer, how often the batch comes; `None` = without end.
        is_of_any_length: Whether TensorFlow is not told the number of cases. Another number then needs no other trace. Told, it makes smaller graphs:
            an update of an LSTM took half as long.
        num_replicas: Integer, the number of equal parts that TensorFlow will cut the batch into: each gets its share of every run of the order.
    """
    batch = _whole(x, y, sample_weight)
    batch = batch.map(_of_any_length) if is_of_any_length else batch
    if seed is not None or num_replicas > 1:

        @tf.autograph.experimental.do_not_convert
        def permuted(*tensors):
            places = tf.range(_num_cases(tensors))
            if seed is not None:
                places = batching.order(_num_cases(tensors), tf.convert_to_tensor(seed))
            if num_replicas > 1:
                places = tf.gather(places, by_replica(_num_cases(tensors), num_replicas))
            gather = lambda t: None if t is None else tf.ensure_shape(tf.gather(t, places), t.shape)  # noqa: E731
            return keras.tree.map_structure(gather, tensors)

        batch = batch.map(permuted).cache()
    return batch.repeat(times)


def in_batches(x, y, sample_weight, num_batches, is_shuffled):
    """Gives arrays as a dataset of so many batches, whose sizes differ by at most one case: Keras makes all of one size, but for the last.

    Args:
        x: Nest of arrays.
        y: Nest of arrays, or `None`.
        sample_weight: Nest of arrays, or `None`.
        num_batches: Integer, at most the number of cases.
        is_shuffled: Whether every epoch has the cases in another random order.
    """

    @tf.autograph.experimental.do_not_convert
    def cut(*tensors):
        num_cases = tf.cast(_num_cases(tensors), tf.int64)
        places = tf.random.shuffle(tf.range(num_cases)) if is_shuffled else tf.range(num_cases)

        def batch(number):
            start, stop = number * num_cases // num_batches, (number + 1) * num_cases // num_batches
            gather = lambda t: None if t is None else tf.gather(t, places[start:stop])  # noqa: E731
            return keras.tree.map_structure(gather, tensors)

        return tf.data.Dataset.range(num_batches).map(batch)

    batches = _whole(x, y, sample_weight).flat_map(cut)
    # Keras ends an epoch by it.
    return batches.apply(tf.data.experimental.assert_cardinality(num_batches))


def _whole(*arrays):
    """Gives `(x, y, sample_weight)` as a dataset of one batch of all cases."""

    def tensor(array):
        array = array if isinstance(array, tf.Tensor) else np.asarray(array)
        is_float = tf.as_dtype(array.dtype).is_floating
        return tf.cast(array, keras.config.floatx()) if is_float else tf.convert_to_tensor(array)

    while arrays[-1] is None:
        arrays = arrays[:-1]
    tensors = keras.tree.map_structure(lambda array: None if array is None else tensor(array), arrays)
    # tf.data would pack a list into one tensor.
    return tf.data.Dataset.from_tensors(keras.tree.lists_to_tuples(tensors))


def _num_cases(tensors):
    return tf.shape(next(t for t in keras.tree.flatten(tensors[0]) if t is not None))[0]


@tf.autograph.experimental.do_not_convert
def _of_any_length(*arrays):
    """The same arrays, their numbers of cases unknown to TensorFlow: another number then needs no other trace."""

    def of_any_length(tensor):
        # Nothing is copied.
        return None if tensor is None else tf.compat.v1.placeholder_with_default(tensor, [None, *tensor.shape[1:]])

    return keras.tree.map_structure(of_any_length, arrays)
