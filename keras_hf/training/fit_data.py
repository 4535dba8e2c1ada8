"""The cases that `fit` was given, as what Keras' `fit` is to be called with: arrays become one batch of all cases, in an order that stays."""

import functools
import math

import keras
import numpy as np
import tensorflow as tf

from keras_hf.common import checks
from keras_hf.network.fixed_network import Data
from keras_hf.problem import batching
from keras_hf.problem.case_range import by_replica


class FitData:
    """The cases of a `fit`, and how they come in batches. For arguments see `HFModel.fit`.

    Args:
        x: As in `fit`.
        y: As in `fit`.
        sample_weight: As in `fit`.
        class_weight: As in `fit`.
        **arguments: `batch_size`, `steps_per_epoch`, `shuffle`, `validation_data`, `validation_split` and `validation_batch_size`, as in `fit`.

    Raises:
        ValueError: If there are no cases, if arrays have different numbers of cases, if `batch_size` is not a positive integer, or if weights of
            classes come beside weights of cases, or with other targets than those of one output.

    Attributes:
        source: How cases come, for advice: "arrays", "dataset" or "batches"; `None` if one batch holds all of them.
        num_cases: Integer, the number of training cases in arrays; `None` of other data.
        most_cases: Integer, an upper bound of the number of cases of a batch, or `None`.
    """

    def __init__(self, x, y, sample_weight, class_weight=None, **arguments):
        if x is None:
            raise ValueError(
                "`fit` needs cases. Received: x=None. Hand over arrays, a `tf.data.Dataset`, a generator or a `PyDataset`."
            )
        x = strings_as_tensors(x)
        if isinstance(arguments["validation_data"], tuple):
            others, *rest = arguments["validation_data"]
            arguments["validation_data"] = strings_as_tensors(others), *rest
        self._x, self._y, self._sample_weight, self._arguments = x, y, sample_weight, arguments
        self._class_weight = class_weight
        self.source = "dataset" if isinstance(x, tf.data.Dataset) else "batches"
        self.num_cases = self.most_cases = None
        if not is_arrays(x):
            return
        arguments["batch_size"] = batch_size = checks.count("batch_size", arguments["batch_size"], optional=True)
        self.num_cases = checks.num_cases(x, y, sample_weight)
        if class_weight is not None:
            self._sample_weight = weights_of_classes(class_weight, y, sample_weight)
        if self._holds_validation:
            # As in Keras, the last cases are for validation.
            self.num_cases = checks.split(self.num_cases, arguments["validation_split"])
        self.batch_size = batch_size or max(1, math.ceil(self.num_cases / (arguments["steps_per_epoch"] or 1)))
        self.most_cases = min(self.batch_size, self.num_cases)
        self.source = None if self.batch_size >= self.num_cases else "arrays"

    @property
    def _holds_validation(self):
        return bool(self._arguments["validation_split"]) and self._arguments["validation_data"] is None

    @property
    def is_one_batch(self):
        """Whether all cases come as one batch."""
        return self.num_cases is not None and self.source is None

    def specs(self):
        """Returns types and shapes of arrays as batches will hold them, a `Data` of `tf.TensorSpec`."""

        def spec(array):
            dtype = tf.as_dtype(np.asarray(getattr(array, "iloc", array)[:1]).dtype)
            dtype = keras.config.floatx() if dtype.is_floating else dtype
            return tf.TensorSpec([self.most_cases, *array.shape[1:]], dtype)

        arrays = self._x, self._y, self._sample_weight
        specs = keras.tree.map_structure(lambda array: None if array is None else spec(array), arrays)
        return Data(*keras.tree.lists_to_tuples(specs))

    def for_keras(self, seed, num_updates, grows, is_of_any_length, num_replicas, has_single_steps):
        """Returns the arguments for `keras.Model.fit`, a dict.

        Args:
            seed: Integer scalar variable, by which cases are put in order.
            num_updates: Integer scalar variable, the number of updates so far: every pass over batches has an order of its own.
            grows: Whether updates use a part of the batch, which grows.
            is_of_any_length: See `repeated`.
            num_replicas: Integer.
            has_single_steps: Whether Keras takes one batch at a time.
        """
        found = {"x": self._x, "y": self._y, "sample_weight": self._sample_weight, **self._arguments}
        if self.num_cases is None:
            if not isinstance(self._x, keras.utils.PyDataset):
                found["shuffle"] = False  # Keras ignores True and warns about its own default.
            found["class_weight"] = self._class_weight
            if self._class_weight is not None and isinstance(self._x, tf.data.Dataset):
                weigh = functools.partial(_weighed, self._class_weight)
                found.update(x=self._x.map(tf.autograph.experimental.do_not_convert(weigh)), class_weight=None)
            return found
        found["batch_size"] = self.batch_size
        steps = found["steps_per_epoch"]
        arrays = self._x, self._y, self._sample_weight
        if self._holds_validation:
            *arrays, others = split(arrays, self.num_cases)
            # As in Keras, weights of classes are for training alone.
            found.update(validation_split=0.0, validation_data=others if self._class_weight is None else others[:2])
        found.update(y=None, sample_weight=None, batch_size=None, shuffle=False)
        size = 32 if self.is_one_batch else self.batch_size
        found["validation_batch_size"] = found["validation_batch_size"] or size
        if not self.is_one_batch:
            # By size, they might be fewer than asked for: 1,020 cases make 93 batches of 11.
            by_steps = self._arguments["batch_size"] is None and steps < self.num_cases
            num_batches = steps if by_steps else math.ceil(self.num_cases / self.batch_size)
            steps = None if steps == num_batches else steps
            order = functools.partial(batching.order, seed=seed) if self._arguments["shuffle"] else None
            found.update(x=in_batches(*arrays, num_batches, num_updates, order, steps), steps_per_epoch=None)
            return found
        # Without end: where several workers divide the data, a new iterator in every epoch takes seconds. Not where Keras takes several batches at a
        # time: the last of an epoch would be of the next one.
        times = None if has_single_steps else steps or 1
        found["steps_per_epoch"] = (steps or 1) if has_single_steps else None
        order = batching.spread if grows else None
        if self._arguments["shuffle"]:
            order = lambda num_cases: batching.order(num_cases, tf.convert_to_tensor(seed))  # noqa: E731
        found["x"] = repeated(*arrays, order, times, is_of_any_length, num_replicas)
        return found


def is_arrays(x):
    """Whether `fit` was given arrays, and not a dataset or a generator."""
    if x is None or isinstance(x, (tf.data.Dataset, tf.distribute.DistributedDataset, keras.utils.PyDataset)):
        return False
    leaves = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    return bool(leaves) and all(hasattr(leaf, "shape") and hasattr(leaf, "__len__") for leaf in leaves)


def strings_as_tensors(x):
    """Returns a nest of arrays in which strings are tensors: where Keras cuts batches, it takes no others. Other data stay as they are."""

    def converted(array):
        is_string = not tf.is_tensor(array) and getattr(getattr(array, "dtype", None), "kind", None) in ("O", "S", "U")
        return tf.convert_to_tensor(np.asarray(array)) if is_string else array

    return keras.tree.map_structure(converted, x) if is_arrays(x) else x


def weights_of_classes(class_weight, y, sample_weight=None):
    """Returns weights of cases, those of their classes: 1 for classes that are not named, as Keras has it for arrays alone.

    Args:
        class_weight: Dict from numbers of classes to weights.
        y: Array or tensor of numbers of classes `(..., 1)` or `(N,)`, or one-hot `(..., k)`.
        sample_weight: Weights of the cases, which must be `None`.

    Returns:
        Tensor of Keras' float type, `(...)`: a weight for every label.

    Raises:
        ValueError: If there are weights of cases, several targets or none, or targets that are strings.
    """
    checks.class_weight(class_weight, y, sample_weight)
    labels = y if tf.is_tensor(y) else tf.convert_to_tensor(np.asarray(y))
    checks.targets_are_numbers(labels)
    labels = tf.cast(labels, tf.int32) if labels.dtype == tf.bool else tf.round(labels)
    if labels.shape.rank > 1:
        is_one_hot = tf.shape(labels)[-1] > 1
        labels = tf.cond(is_one_hot, lambda: tf.argmax(labels, -1), lambda: tf.cast(labels[..., 0], tf.int64))
    first, last = int(min(class_weight)), int(max(class_weight))
    weights = [1.0, *(class_weight.get(label, 1.0) for label in range(first, last + 1)), 1.0]
    places = tf.clip_by_value(tf.cast(labels, tf.int64) - first, -1, last - first + 1) + 1
    return tf.gather(tf.constant(weights, keras.config.floatx()), places)


def _weighed(class_weight, *batch):
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    return x, y, weights_of_classes(class_weight, y, sample_weight)


def split(arrays, num_cases):
    """Takes the first cases of each of `(x, y, sample_weight)` for training, and gives the rest as Keras' `validation_data`."""
    first, rest = (
        keras.tree.map_structure(
            lambda array, part=part: None if array is None else getattr(array, "iloc", array)[part], arrays
        )
        for part in (slice(num_cases), slice(num_cases, None))
    )
    return *first, rest if arrays[2] is not None else rest[:2]


def repeated(x, y, sample_weight, order, times=None, is_of_any_length=False, num_replicas=1):
    """Gives arrays as a dataset of one batch, `times` or again and again: Keras would copy them, and start anew, in every epoch.

    They are put in order when the first epoch begins: a callback may have brought back the seed of an earlier run by then.

    Args:
        x: Nest of arrays.
        y: Nest of arrays, or `None`.
        sample_weight: Nest of arrays, or `None`.
        order: Callable from a number of cases, an int32 scalar, to their places, int32; `None` = as they are.
        times: Integer, how often the batch comes; `None` = without end.
        is_of_any_length: Whether TensorFlow is not told the number of cases. Another number then needs no other trace. Told, it makes smaller graphs:
            an update of an LSTM took half as long.
        num_replicas: Integer, the number of equal parts that TensorFlow will cut the batch into: each gets its share of every run of the order.
    """
    batch = _whole(x, y, sample_weight)
    batch = batch.map(_of_any_length) if is_of_any_length else batch
    if order is not None or num_replicas > 1:

        @tf.autograph.experimental.do_not_convert
        def permuted(*tensors):
            places = tf.range(_num_cases(tensors)) if order is None else order(_num_cases(tensors))
            if num_replicas > 1:
                places = tf.gather(places, by_replica(_num_cases(tensors), num_replicas))
            gather = lambda t: None if t is None else tf.ensure_shape(tf.gather(t, places), t.shape)  # noqa: E731
            return keras.tree.map_structure(gather, tensors)

        batch = batch.map(permuted).cache()
    return _without_tuning(batch.repeat(times))


def in_batches(x, y, sample_weight, num_batches, num_updates, order=None, steps=None):
    """Gives arrays as a dataset of so many batches, whose sizes differ by at most one case: Keras makes all of one size, but for the last.

    Seed and number of updates are read when an epoch begins: a resumed run goes on with the same batches, and workers cut alike.

    Args:
        x: Nest of arrays.
        y: Nest of arrays, or `None`.
        sample_weight: Nest of arrays, or `None`.
        num_batches: Integer, at most the number of cases: the batches of one pass over them.
        num_updates: Integer scalar variable, the number of updates so far.
        order: Callable `(num_cases, number=) -> int32 (num_cases,)`, the order of a pass; `None` = as they are.
        steps: Integer, the number of batches of an epoch, which goes on where the last one has ended; `None` = one pass.
    """

    @tf.autograph.experimental.do_not_convert
    def epoch(*tensors):
        num_cases, start = _num_cases(tensors), tf.cast(tf.convert_to_tensor(num_updates), tf.int64)
        skipped = tf.zeros([], tf.int64) if steps is None else start % num_batches
        stop = skipped + (steps or num_batches)

        @tf.autograph.experimental.do_not_convert
        def one_pass(number):
            before = number * num_batches
            places = tf.range(num_cases) if order is None else order(num_cases, number=start - skipped + before)

            @tf.autograph.experimental.do_not_convert
            def batch(number):
                cuts = [number * tf.cast(num_cases, tf.int64) // num_batches for number in (number, number + 1)]
                gather = lambda t: None if t is None else tf.gather(t, places[cuts[0] : cuts[1]])  # noqa: E731
                return keras.tree.map_structure(gather, tensors)

            numbers = tf.maximum(skipped - before, 0), tf.minimum(stop - before, num_batches)
            return tf.data.Dataset.range(*numbers).map(batch)

        return tf.data.Dataset.range(-(-stop // num_batches)).flat_map(one_pass)

    batches = _whole(x, y, sample_weight).flat_map(epoch)
    # Keras ends an epoch by it.
    return _without_tuning(batches.apply(tf.data.experimental.assert_cardinality(steps or num_batches)))


def _without_tuning(dataset):
    """Gives the same without a thread that tunes it: there is nothing to tune, and dropping an iterator waits up to a minute until that thread wakes.

    (TensorFlow 2.21 tells it to end before it says so: where it is quick, it sees nothing, and sleeps on.)
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _whole(*arrays):
    """Gives `(x, y, sample_weight)` as a dataset of one batch of all cases."""
    while arrays[-1] is None:
        arrays = arrays[:-1]
    tensors = keras.tree.map_structure(lambda array: None if array is None else _tensor(array), arrays)
    # tf.data would pack a list into one tensor.
    return tf.data.Dataset.from_tensors(keras.tree.lists_to_tuples(tensors))


def _tensor(array):
    array = array if isinstance(array, tf.Tensor) else np.asarray(array)
    is_float = tf.as_dtype(array.dtype).is_floating
    return tf.cast(array, keras.config.floatx()) if is_float else tf.convert_to_tensor(array)


def _num_cases(tensors):
    return tf.shape(next(t for t in keras.tree.flatten(tensors[0]) if t is not None))[0]


@tf.autograph.experimental.do_not_convert
def _of_any_length(*arrays):
    """The same arrays, their numbers of cases unknown to TensorFlow: another number then needs no other trace."""

    def of_any_length(tensor):
        # Nothing is copied.
        return None if tensor is None else tf.compat.v1.placeholder_with_default(tensor, [None, *tensor.shape[1:]])

    return keras.tree.map_structure(of_any_length, arrays)
