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


def across_replicas(function, *args):
    """Leaves the replica context for `function(replicas, *args)`, called once for all replicas, and returns its result to each.

    Arguments are the parts of all replicas, to be handed to `Replicas.run`.
    """
    context = tf.distribute.get_replica_context()
    return context.merge_call(lambda strategy, *parts: function(Replicas(strategy), *parts), args=args)


def replica_share(total):
    """This replica's share of `total` cases: equal shares, the first replicas one more where it does not divide."""
    context = tf.distribute.get_replica_context()
    count = context.num_replicas_in_sync
    if count == 1:
        return total
    number = tf.cast(tf.convert_to_tensor(context.replica_id_in_sync_group), tf.int32)
    return total // count + tf.cast(number < total % count, tf.int32)


def replica_number():
    """This replica's number, an int32 scalar."""
    return tf.cast(tf.convert_to_tensor(tf.distribute.get_replica_context().replica_id_in_sync_group), tf.int32)
