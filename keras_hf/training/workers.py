"""Several processes that train together: the rendezvous, whether they have the same job, and who writes files.

TensorFlow's own rendezvous never ends if a worker does not come, and its error for a port in use names none.
"""

import contextlib
import hashlib
import json
import socket
import time

import keras
import numpy as np
import tensorflow as tf

from keras_hf.common.checks import positive
from keras_hf.common.cluster import is_chief, num_workers, tasks_of, worker_number
from keras_hf.training import compiled_model

# Seconds between two tries to reach the chief, and those that a caller has to say who it is.
_PAUSE, _PATIENCE = 0.1, 5.0


def multi_worker_strategy(cluster_resolver=None, timeout=60.0, communication_options=None):
    """Returns a `tf.distribute.MultiWorkerMirroredStrategy` once all workers of the cluster are there.

    Call it first in the program of every worker, before TensorFlow has done anything else. The workers meet at the chief's address, and then connect
    as always. TensorFlow alone would wait for a missing worker without end.

        strategy = keras_hf.multi_worker_strategy()
        with strategy.scope():
            model = keras_hf.HFModel(network)
            model.compile(loss="mse")
        model.fit(x, y)

    Args:
        cluster_resolver: `tf.distribute.cluster_resolver.ClusterResolver`, such as `SlurmClusterResolver()`. Defaults to the environment variable
            `TF_CONFIG`.
        timeout: Float > 0, seconds to wait for the other workers.
        communication_options: `tf.distribute.experimental.CommunicationOptions`, as TensorFlow's strategy takes it.

    Returns:
        The strategy. Without a cluster of several workers, one of this process alone.

    Raises:
        TimeoutError: If workers have not come in time; the message names them.
        OSError: If the port of this worker is in use; the message names it.
        ValueError: If this task is not one of the cluster, or `timeout` is not a finite number > 0.
    """
    timeout = positive("timeout", timeout)
    resolver = cluster_resolver or tf.distribute.cluster_resolver.TFConfigClusterResolver()
    tasks = tasks_of(resolver)
    if len(tasks) > 1:
        cluster = resolver.cluster_spec()
        addresses = {task: _address(cluster.task_address(*task)) for task in tasks}
        own = (resolver.task_type, resolver.task_id)
        if own not in addresses:
            raise ValueError(
                f"The cluster must hold this task. Received: task {own[0]} {own[1]} and the workers {_named(tasks)}. Set `task` in `TF_CONFIG` "
                "to one of them."
            )
        _rendezvous(addresses, own, timeout)
    return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver, communication_options)


def _rendezvous(addresses, own, timeout):
    """Returns once all workers have come: the chief listens at its address, the others say there who they are, and wait for its word.

    Args:
        addresses: Dict from task to host and port, the chief first.
        own: The task of this process.
        timeout: Float, seconds.
    """
    end, chief = time.monotonic() + timeout, next(iter(addresses))
    with _listener(addresses[own], own) as listener:
        if own == chief:
            _accept_workers(listener, set(addresses) - {own}, end, timeout)
    if own != chief:
        _register(addresses[chief], own, end, timeout)


def _listener(address, own):
    """Returns a socket that listens at this worker's port, which shows that it is free."""
    try:
        # On all interfaces, as TensorFlow's server: the name of a host may be known to others alone.
        return socket.create_server(("", address[1]), backlog=128)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Port {address[1]}, that of {own[0]} {own[1]} in the cluster, cannot be used: {error.strerror}. Stop what holds it, or "
            "give the cluster another port.",
        ) from error


def _accept_workers(listener, missing, end, timeout):
    """Accepts the workers, and gives all of them the word."""
    with contextlib.ExitStack() as stack:
        connections = []
        while missing:
            listener.settimeout(max(end - time.monotonic(), 1e-3))
            try:
                connection = stack.enter_context(listener.accept()[0])
                connection.settimeout(_PATIENCE)
                missing.discard(tuple(json.loads(connection.makefile().readline())))
                connections.append(connection)
            except (ValueError, TypeError):
                # Somebody else.
                continue
            except OSError as error:
                if time.monotonic() < end:
                    continue
                raise TimeoutError(
                    f"{_named(sorted(missing))} did not come within {timeout:g} s. Start one process for every worker of the cluster, with its own "
                    "`task` in `TF_CONFIG`, and see whether it reaches the chief's address."
                ) from error
        for connection in connections:
            connection.sendall(b"go\n")


def _register(address, own, end, timeout):
    """Says to the chief who has come, and waits for its word."""
    while True:
        try:
            with socket.create_connection(address, max(end - time.monotonic(), 1e-3)) as connection:
                connection.settimeout(max(end - time.monotonic(), 1e-3))
                connection.sendall((json.dumps(own) + "\n").encode())
                if connection.makefile().readline() == "go\n":
                    return
        except OSError:
            pass
        if time.monotonic() > end:
            raise TimeoutError(
                f"The chief at {address[0]}:{address[1]} did not answer within {timeout:g} s: it or another worker has not come. Start one process "
                "for every worker of the cluster, and see whether this host reaches that address."
            )
        time.sleep(_PAUSE)


def _address(text):
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def _named(tasks):
    return ", ".join(f"{job} {number}" for job, number in tasks)


def require_same_job(strategy, job):
    """Raises an error on every worker where one has another job than the chief: TensorFlow would hang, or mix what does not belong together.

    Args:
        strategy: `tf.distribute.Strategy`.
        job: Callable without arguments that returns a dict from what is compared to its description, of the same keys on all workers.

    Raises:
        ValueError: If descriptions differ.
    """
    if num_workers(strategy) == 1:
        return
    job = job()
    # 48 bits, which a float holds.
    numbers = [float(int(hashlib.sha256(repr(value).encode()).hexdigest()[:12], 16)) for value in job.values()]
    table = np.zeros([num_workers(strategy), len(job)])
    table[worker_number(strategy)] = numbers

    # Each replica of this worker adds its share of the row.
    share = tf.constant(table * (num_workers(strategy) / strategy.num_replicas_in_sync))

    @tf.function(autograph=False)
    def total():
        return strategy.reduce("SUM", strategy.run(lambda: share), axis=None)

    different = np.round(total().numpy()) != table[worker_number(strategy)]
    found = {
        name: np.flatnonzero(different[:, place]).tolist()
        for place, name in enumerate(job)
        if different[:, place].any()
    }
    if found:
        told = "; ".join(
            f"{name}: here (worker {worker_number(strategy)}) {job[name]}, not so on {', '.join(map(str, workers))}"
            for name, workers in found.items()
        )
        raise ValueError(
            f"All workers must train the same network in the same way on data of the same form. Received: {told}. Give every worker the same program "
            "and data; TensorFlow divides the cases."
        )


def describe(nest):
    """Returns the types and shapes of cases, but for their number, as text: of a nest of arrays and datasets."""

    def of_leaf(leaf):
        if leaf is None:
            return None
        if hasattr(leaf, "element_spec"):
            return describe(leaf.element_spec)
        shape, dtype = getattr(leaf, "shape", ()), getattr(leaf, "dtype", type(leaf).__name__)
        return f"{getattr(dtype, 'name', dtype)}{list(shape[1:])}"

    return repr(keras.tree.map_structure(of_leaf, nest))


def name_of(loss):
    """Returns the name of a loss, as all workers have it: not where it is in memory."""
    name = compiled_model.loss_name(loss)
    return name if isinstance(name, str) else type(name).__name__


def require_single_steps(strategy, steps_per_execution):
    """Raises an error for several steps in one execution on several workers: TensorFlow ends their loop with an error about its placeholders.

    Raises:
        ValueError: If so.
    """
    if steps_per_execution > 1 and num_workers(strategy) > 1:
        raise ValueError(
            "On several workers TensorFlow runs one step per execution. "
            f"Received: steps_per_execution={steps_per_execution} and {num_workers(strategy)} workers. Compile with `steps_per_execution=1`."
        )


def verbose_of(strategy, verbose):
    """Returns how much this process shows: of "auto", workers other than the chief show nothing."""
    return 0 if verbose == "auto" and not is_chief(strategy) else verbose
