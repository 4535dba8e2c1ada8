"""Several processes that train together, on this machine: the same numbers on all, the numbers of one, and no loss by a kill."""

import concurrent.futures
import csv
import itertools
import json
import os
import socket
import threading
import time
import types

import cluster
import keras
import numpy as np
import pytest
import tensorflow as tf
import worker
from training import assert_equal, fit, renewed

from examples.precision import precision
from keras_hf import multi_worker_strategy, read_updates
from keras_hf.callbacks.backup import complete_backups
from keras_hf.common.cluster import is_chief, num_workers, worker_number
from keras_hf.training import workers

pytestmark = pytest.mark.filterwarnings("ignore:An update on")
ONE = tf.distribute.get_strategy()
# Workers with batch normalization each normalize by their own cases, as in Keras.
AS_ONE = [name for name in worker.OF_CLUSTERS[2] if name != "normalized"]


@pytest.fixture(scope="module")
def of_one_and_two(tmp_path_factory):
    """What one process makes of the runs, and where a cluster of two wrote it: at the same time, since the one leaves a core idle."""
    folder = tmp_path_factory.mktemp("two")
    with concurrent.futures.ThreadPoolExecutor() as pool, precision("float64"):
        of_two = pool.submit(cluster.run, 2, folder, "train", "reductions", "other_jobs", "long_run")
        of_one = {name: worker.trained(ONE, **worker.RUNS[name])[1] for name in AS_ONE}
        of_two.result()
    return of_one, folder


@pytest.fixture(scope="module")
def of_one(of_one_and_two):
    return of_one_and_two[0]


@pytest.fixture(scope="module")
def of_two(of_one_and_two):
    return of_one_and_two[1]


@pytest.fixture(scope="module")
def of_three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    cluster.run(3, folder, "train")
    return folder


def told(folder, name, num_workers=2):
    """What every worker wrote."""
    return [json.loads((folder / f"{name}-{number}.json").read_text()) for number in range(num_workers)]


def assert_as_one(found, one):
    """That all workers have the same weights after every update, and they and all a user sees are those of one process."""
    for other in found[1:]:
        assert other["hashes"] == found[0]["hashes"]
    worker.assert_as_one(found[0], one)


@pytest.mark.slow
@pytest.mark.parametrize("name", AS_ONE)
def test_two_workers_make_the_updates_of_one_process(name, of_two, of_one):
    assert_as_one(told(of_two, name), of_one[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", worker.OF_CLUSTERS[3])
def test_three_workers_make_the_updates_of_one_process(name, of_three, of_one):
    assert_as_one(told(of_three, name, 3), of_one[name])


@pytest.mark.slow
def test_workers_with_batch_normalization_stay_together(of_two):
    # The statistics of evaluation are of all cases.
    one, two = told(of_two, "normalized")
    assert one["hashes"] == two["hashes"] and one["history"]["val_loss"] == two["history"]["val_loss"]
    assert one["history"]["loss"][-1] < one["history"]["loss"][0]


@pytest.mark.slow
def test_an_iteration_of_cg_has_two_reductions_and_a_loss_one(of_two):
    # Before the iterations: the product at the start, numbers of the start, the norm of b, and after them the slopes.
    assert [count for count in told(of_two, "reductions")[0] if count] == [1, 1, 2, 4]


@pytest.mark.slow
def test_workers_with_different_jobs_are_told_what_differs(of_two):
    for number, errors in enumerate(told(of_two, "told")):
        for what, name in (("data", "data"), ("cases", "batches"), ("optimizer", "optimizer")):
            assert f"{name}: here (worker {number})" in errors[what] and f"not so on {1 - number}" in errors[what]


def values_of(run):
    """The variables of both workers at the end of a long run."""
    files = [np.load(run / f"values-{number}.npz") for number in range(2)]
    return [[file[name] for name in file.files] for file in files]


@pytest.mark.slow
def test_the_chief_alone_writes_files_that_are_whole(of_two):
    run = of_two / "run"
    one, two = values_of(run)
    assert_equal(one, two)
    assert [record["update"] for record in read_updates(run / "updates.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert len((run / "log.csv").read_text().splitlines()) == 7
    assert sorted(path.name for path in run.iterdir()) == [
        *("backup", "best.keras", "last.keras", "last.weights.h5", "log.csv", "updates.jsonl"),
        *("values-0.npz", "values-1.npz"),
    ]
    again = keras.models.load_model(run / "last.keras")
    assert_equal([*again.weights, *again.optimizer.variables], one)


@pytest.mark.slow
def test_a_run_goes_on_after_a_worker_and_then_the_chief_were_killed_as_if_they_had_not(of_two, tmp_path):
    # All processes end, also those that nobody killed.
    for job in ("kill_worker", "kill_chief"):
        assert all(code != 0 for _, code in cluster.ended(2, tmp_path, job))
    cluster.run(2, tmp_path, "long_run")
    # The chief was killed in the second of its epochs, before its weights were on disk.
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["4", "5"]
    for one, two in zip(values_of(tmp_path / "run"), values_of(of_two / "run"), strict=True):
        assert_equal(one, two)


# The meeting, without TensorFlow's.


class Resolver:
    """A cluster of two workers, of which this process is one."""

    def __init__(self, addresses, number):
        self._addresses, self.task_type, self.task_id = addresses, "worker", number

    def cluster_spec(self):
        return tf.train.ClusterSpec({"worker": self._addresses})


def test_workers_meet_whoever_comes_first(monkeypatch):
    has_come = threading.Event()

    def seen(function):
        def called(*args):
            has_come.set()
            return function(*args)

        return called

    # The chief listens by then, and a worker was where no chief is yet.
    monkeypatch.setattr(workers, "_accept_workers", seen(workers._accept_workers))
    monkeypatch.setattr(workers, "time", types.SimpleNamespace(monotonic=time.monotonic, sleep=seen(time.sleep)))
    for first in (0, 1, 2):
        tasks = {("worker", i): workers._address(address) for i, address in enumerate(cluster.free_addresses(3))}
        has_come.clear()
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            meetings = [pool.submit(workers._rendezvous, tasks, ("worker", first), cluster.LONGEST)]
            assert has_come.wait(cluster.LONGEST)
            meetings += [
                pool.submit(workers._rendezvous, tasks, task, cluster.LONGEST) for task in tasks if task[1] != first
            ]
            assert [meeting.result() for meeting in meetings] == [None] * 3


@pytest.mark.parametrize(("number", "told"), [(0, "worker 1 did not come"), (1, "The chief at 127.0.0.1")])
def test_a_worker_that_never_comes_is_named_when_the_time_is_over(number, told, monkeypatch):
    # Every look at the clock is later by more than the time that there is.
    clock = types.SimpleNamespace(monotonic=itertools.count(0.0, 100.0).__next__, sleep=lambda seconds: None)
    monkeypatch.setattr(workers, "time", clock)
    with pytest.raises(TimeoutError, match=told):
        multi_worker_strategy(Resolver(cluster.free_addresses(2), number))


def test_strangers_who_call_at_the_port_do_not_end_the_meeting_nor_hold_it_up(monkeypatch):
    monkeypatch.setattr(workers, "_PATIENCE", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        for said in (b"GET / HTTP/1.0\n", b"1\n", b"[[1]]\n", b""):
            with socket.create_connection(address) as stranger:
                stranger.sendall(said)
        # One says nothing and does not hang up. What the worker says is there before it is asked.
        with socket.create_connection(address), socket.create_connection(address) as one:
            one.sendall(b'["worker", 1]\n')
            workers._accept_workers(listener, {("worker", 1)}, time.monotonic() + cluster.LONGEST, cluster.LONGEST)
            assert one.makefile().readline() == "go\n"


@pytest.mark.parametrize("number", [0, 1])
def test_a_port_in_use_is_named(number):
    addresses = cluster.free_addresses(2)
    host, port = workers._address(addresses[number])
    with socket.create_server(("", port)):
        with pytest.raises(OSError, match=f"Port {port}, that of worker {number} in the cluster, cannot be used"):
            multi_worker_strategy(Resolver(addresses, number))


def test_a_task_that_is_not_in_the_cluster_is_refused():
    with pytest.raises(ValueError, match="Received: task worker 5 and the workers worker 0, worker 1"):
        multi_worker_strategy(Resolver(cluster.free_addresses(2), 5))


@pytest.mark.parametrize("timeout", [0, -1, "1", True])
def test_a_timeout_must_be_positive(timeout):
    with pytest.raises(ValueError, match="`timeout` must be a finite number > 0"):
        multi_worker_strategy(timeout=timeout)


def test_several_steps_in_one_execution_are_refused_on_several_workers(monkeypatch):
    workers.require_single_steps(ONE, 3)
    monkeypatch.setattr(workers, "num_workers", lambda strategy: 2)
    workers.require_single_steps(ONE, 1)
    with pytest.raises(ValueError, match="one step per execution. Received: steps_per_execution=3 and 2 workers"):
        workers.require_single_steps(ONE, 3)


def test_one_process_is_its_own_chief():
    for strategy in (ONE, tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
        assert (num_workers(strategy), worker_number(strategy), is_chief(strategy)) == (1, 0, True)


# Backups, which a kill may interrupt at any time.


def backed_up(folder, crash_at=None, **arguments):
    """A run with backups, interrupted at one of its replacements of files; the optimizer's and the network's values, and the number of updates."""
    model = renewed(worker.model_of, ONE)
    replacements = itertools.count(1)

    def crashing(source, target, replace=os.replace):
        if next(replacements) == crash_at:
            raise KeyboardInterrupt
        return replace(source, target)

    backup = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", crashing)
        try:
            fit(model, *worker.cases(), epochs=4, callbacks=[backup, worker.LevenbergMarquardt()])
        except KeyboardInterrupt:
            assert crash_at
    values = [variable.numpy() for variable in [*model.weights, *model.optimizer.variables]]
    return values, int(model.optimizer.iterations.numpy())


@pytest.mark.slow
def test_a_run_that_ended_while_a_backup_was_written_ends_as_if_it_had_not(tmp_path, float64):
    whole, _ = backed_up(tmp_path / "whole")
    # Every backup replaces three files.
    for crash_at in range(1, 7):
        _, num_updates = backed_up(tmp_path / f"{crash_at}", crash_at)
        assert num_updates == (crash_at + 2) // 3
        resumed, num_updates = backed_up(tmp_path / f"{crash_at}")
        assert num_updates == 4
        assert_equal(resumed, whole)


def test_a_worker_that_is_not_the_chief_backs_nothing_up(tmp_path):
    model = worker.model_of(ONE)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    backup.set_model(model)
    model.optimizer.build(model.trainable_variables)
    with complete_backups([backup], model, writes=False):
        backup.on_train_begin()
        backup.on_epoch_end(0)
        backup.on_train_end()
    assert not (tmp_path / "backup").exists()
    # As it was.
    assert "_save_model" not in vars(backup) and "on_train_end" not in vars(backup)


@pytest.mark.slow
def test_the_second_last_backup_is_kept_where_that_is_asked_for(tmp_path, float64):
    backed_up(tmp_path, double_checkpoint=True)
    assert json.loads((tmp_path / "training_metadata.json").read_text())["epoch"] == 4
    assert json.loads((tmp_path / "training_metadata.json.bkp").read_text())["epoch"] == 3
    assert (tmp_path / "latest.weights.h5.bkp").exists()


def test_jobs_are_told_by_names_shapes_and_types():
    x, rest = np.ones([5, 3], "float32"), tf.constant([[1]])
    assert workers.describe((x, {"a": rest}, None)) == "('float32[3]', {'a': 'int32[1]'}, None)"
    dataset = tf.data.Dataset.from_tensor_slices((x, x)).batch(2)
    assert "float32[3]" in workers.describe((dataset, None, None))
    names = [
        workers.name_of(loss) for loss in ("mse", keras.losses.Huber(), keras.losses.poisson, worker.Hashes(), None)
    ]
    assert names == ["mean_squared_error", "huber_loss", "poisson", "Hashes", "NoneType"]
