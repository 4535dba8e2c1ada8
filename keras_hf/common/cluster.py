"""The workers and replicas of a strategy, and which of them this is."""

import tensorflow as tf


def num_workers(strategy):
    """Returns the number of processes that train together under a strategy, an integer: 1 unless it is one of several workers."""
    return max(len(_tasks(strategy)), 1)


def worker_number(strategy):
    """Returns the place of this process among the workers of a strategy, the chief's being 0: an integer."""
    tasks = _tasks(strategy)
    if not tasks:
        return 0
    resolver = strategy.cluster_resolver
    return tasks.index((resolver.task_type, resolver.task_id))


def is_chief(strategy):
    """Whether this process is the one that writes files: the only one, or the first of several workers."""
    return worker_number(strategy) == 0


def _tasks(strategy):
    return (
        tasks_of(strategy.cluster_resolver) if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) else []
    )


def tasks_of(resolver):
    """Returns the workers of a `ClusterResolver`, a list of tuples of job and number, the chief first; empty without a cluster."""
    cluster = resolver.cluster_spec()
    return [(job, number) for job in ("chief", "worker") if job in cluster.jobs for number in cluster.task_indices(job)]


def replica_number():
    """This replica's number, an int32 scalar."""
    return tf.cast(tf.convert_to_tensor(tf.distribute.get_replica_context().replica_id_in_sync_group), tf.int32)
