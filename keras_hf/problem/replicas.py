"""Sums over replicas: the only room that knows `tf.distribute`.

An update runs in cross-replica context, so that its loops may hold sums over replicas (a replica-context all-reduce inside `tf.while_loop` raises);
what each replica does with its own cases runs through `Replicas.run`. On a single device all of it is transparent.
"""

import tensorflow as tf


class Replicas:
    """The replicas of a strategy, seen from outside.

    Args:
        strategy: `tf.distribute.Strategy`.
    """

    def __init__(self, strategy):
        self._strategy = strategy
        self.count = strategy.num_replicas_in_sync

    def run(self, function, *args):
        """Calls `function(*args)` on every replica; an argument made by an earlier `run` is handed to each as its own part."""
        return self._strategy.run(function, args=args)

    def sum(self, function, *args):
        """Calls `function(*args)` on every replica and adds the results, a nest of tensors, or `None`."""
        values = self.run(function, *args)
        if self.count == 1 or values is None:
            return values
        return tf.nest.map_structure(lambda value: self._strategy.reduce("SUM", value, axis=None), values)

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


def replica_number():
    """This replica's number, an int32 scalar."""
    return tf.cast(tf.convert_to_tensor(tf.distribute.get_replica_context().replica_id_in_sync_group), tf.int32)
