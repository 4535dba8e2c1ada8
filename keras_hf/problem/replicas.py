"""Sums over replicas: the only room that knows `tf.distribute`.

An update runs in cross-replica context, so that its loops may hold sums over replicas (a replica-context all-reduce inside `tf.while_loop` raises);
what each replica does with its own cases runs through `Replicas.run`. On a single device all of it is transparent.
"""

import tensorflow as tf

from keras_hf.common.cluster import num_workers, replica_number


class Replicas:
    """The replicas of a strategy, seen from outside.

    Args:
        strategy: `tf.distribute.Strategy`.

    Attributes:
        count: Integer, the number of replicas.
        has_workers: Whether they belong to several processes, each of which computes whatever is not on replicas.
    """

    def __init__(self, strategy):
        self._strategy = strategy
        self.count = strategy.num_replicas_in_sync
        self.has_workers = num_workers(strategy) > 1

    def run(self, function, *args):
        """Calls `function(*args)` on every replica; an argument made by an earlier `run` is handed to each as its own part."""
        return self._strategy.run(function, args=args)

    def sum(self, function, *args):
        """Calls `function(*args)` on every replica and adds the results, a nest of tensors, or `None`."""
        return self.total(self.run(function, *args))

    def total(self, values):
        """Adds over replicas what `run` returned, a nest of tensors, or `None`."""
        if self.count == 1 or values is None:
            return values
        return tf.nest.map_structure(lambda value: self._strategy.reduce("SUM", value, axis=None), values)

    def joined(self, function, num_rows, *args):
        """Returns the results of `function(*args)` of all replicas, one after the other along their first axis, and zeros up to `num_rows`.

        As a sum: TensorFlow's own gathering fails where replicas have different numbers of rows.
        """
        values = self.run(function, *args)
        counts = self.sum(
            lambda value: tf.one_hot(replica_number(), self.count) * tf.cast(tf.shape(value)[0], tf.float32), values
        )

        def in_place(value, starts):
            start = starts[replica_number()]
            rows = [start, num_rows - start - tf.shape(value)[0]]
            return tf.ensure_shape(
                tf.pad(value, [rows, *[[0, 0]] * (value.shape.rank - 1)]), [num_rows, *value.shape[1:]]
            )

        return self.sum(in_place, values, tf.cast(tf.cumsum(counts, exclusive=True), tf.int32))

    def any_of(self, values):
        """Returns what `run` returned on one replica of this process."""
        return self._strategy.experimental_local_results(values)[0]

    def sum_with(self, function, scalar, *args):
        """Returns the sums over replicas of `function(*args)`, a vector, and of `scalar(vector, *args)` of each, a float64 scalar.

        Both are one sum; on several replicas the scalar has the vector's type on the way.
        """

        def both(*args):
            vector = function(*args)
            return tf.concat([vector, tf.reshape(tf.cast(scalar(vector, *args), vector.dtype), [1])], 0)

        total = self.sum(both, *args)
        return total[:-1], tf.cast(total[-1], tf.float64)

    def agreed(self, nest):
        """Returns the first replica's values of a nest of tensors that every worker has computed by itself, bit for bit.

        Workers with other processors, or another number of cores, add in another order. What they decide by a rounded number they would decide
        differently: leave a loop earlier than others, who then wait for ever, or drift apart. On one worker nothing is done. Cost: one reduction for
        all scalars, and one for every other tensor.
        """
        if not self.has_workers:
            return nest
        leaves = tf.nest.flatten(nest)
        scalars = [tf.cast(leaf, tf.float64) for leaf in leaves if leaf.shape.rank == 0]
        sent = [tf.stack(scalars)] * bool(scalars) + [leaf for leaf in leaves if leaf.shape.rank != 0]

        def of_first():
            is_first = replica_number() == 0
            # Not by a product: what is not finite is to arrive as it is.
            return [tf.where(is_first, value, tf.zeros_like(value)) for value in sent]

        received = self.sum(of_first)
        numbers = iter(tf.unstack(received.pop(0)) if scalars else ())
        others = iter(received)
        found = [tf.cast(next(numbers), leaf.dtype) if leaf.shape.rank == 0 else next(others) for leaf in leaves]
        return tf.nest.pack_sequence_as(nest, found)

    def shared_out(self, function, inputs, costs):
        """Returns `function(*each)` for each of some inputs, computed on one replica and sent to all.

        Args:
            function: Callable that returns a tensor like the first of its arguments.
            inputs: List of tuples of tensors, the same on all replicas.
            costs: List of numbers, what each input costs, by which they are divided among replicas.
        """
        if self.count == 1:
            return [function(*each) for each in inputs]
        owners, loads = {}, [0.0] * self.count
        # The dearest first, each to the replica that has the least to do.
        for place in sorted(range(len(inputs)), key=lambda place: -costs[place]):
            owners[place] = loads.index(min(loads))
            loads[owners[place]] += costs[place]

        def own(*inputs):
            number = replica_number()
            return [
                tf.cond(
                    number == owners[place], lambda each=each: function(*each), lambda each=each: tf.zeros_like(each[0])
                )
                for place, each in enumerate(inputs)
            ]

        return self.sum(own, *inputs) if inputs else []

    def first(self, like, function, *args):
        """Calls `function(*args)` on every replica and returns the tensors of one, bit for bit.

        Args:
            like: List of tensors, for the types, any that have a size in bytes, and the shapes.
            function: Callable that returns a bool scalar and a list of tensors. Taken are those of the first replica that says true, if none does
                those of the first.
            *args: Its arguments, as in `run`.
        """
        if self.count == 1:
            return self.run(function, *args)[1]

        def row(*args):
            is_it, values = function(*args)
            place = tf.one_hot(replica_number(), self.count)
            return place * tf.cast(is_it, place.dtype), [place[:, None] * _as_bytes(value) for value in values]

        # One row of bytes for every replica, as floats: a sum of those is exact, and known to all strategies on all devices.
        is_it, rows = self.sum(row, *args)
        number = tf.argmax(is_it)
        return [_from_bytes(of_replicas[number], value) for of_replicas, value in zip(rows, like, strict=True)]


def across_replicas(function, *args):
    """Leaves the replica context for `function(replicas, *args)`, called once for all replicas, and returns its result to each.

    Arguments are the parts of all replicas, to be handed to `Replicas.run`.
    """
    context = tf.distribute.get_replica_context()
    return context.merge_call(lambda strategy, *parts: function(Replicas(strategy), *parts), args=args)


def on_replicas(strategy, function):
    """Returns a function that calls `function(*args)` on every replica, and returns the first one's results, a nest: they are the same on all."""

    def run(*args):
        results = strategy.run(function, args=args)
        return tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], results)

    return run


def of_each_replica(number):
    """Returns the int32 scalars `number` of all replicas, int32 `(replicas,)`, the same on each of them."""
    count = tf.distribute.get_replica_context().num_replicas_in_sync
    if count == 1:
        return tf.reshape(number, [1])
    # In floats, which every way to reduce can add.
    own = tf.one_hot(replica_number(), count, dtype=tf.float64) * tf.cast(number, tf.float64)
    return tf.cast(across_replicas(lambda replicas, own: replicas.sum(tf.identity, own), own), tf.int32)


def _as_bytes(value):
    """The bytes of a tensor as floats `(bytes,)`."""
    value = tf.cast(value, tf.uint8) if value.dtype == tf.bool else value
    return tf.reshape(tf.cast(tf.bitcast(value, tf.uint8), tf.float32), [-1])


def _from_bytes(numbers, like):
    """The tensor typed and shaped as `like` that `_as_bytes` gave these numbers of."""
    dtype = tf.uint8 if like.dtype == tf.bool else like.dtype
    shape = [*like.shape, dtype.size] if dtype.size > 1 else like.shape
    return tf.cast(tf.bitcast(tf.reshape(tf.cast(numbers, tf.uint8), shape), dtype), like.dtype)
