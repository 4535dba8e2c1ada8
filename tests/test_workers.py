"""Several processes that train together, on this machine: the same numbers on all, the numbers of one, and no loss by a kill."""

import json
import os
import socket
import threading
import time

import cluster
import keras
import numpy as np
import pytest
import tensorflow as tf
import worker

from keras_hf import multi_worker_strategy, read_updates, workers
from keras_hf.backup import complete_backups
from keras_hf.problem.replicas import is_chief, num_workers, worker_number


def found_by(num_workers, folder, names):
    """What the workers of a cluster wrote of each case."""
    cluster.run(num_workers, "train", folder, *names, timeout=500)
    return {
        name: [json.loads((folder / f"{name}-{number}.json").read_text()) for number in range(num_workers)]
        for name in names
    }


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return found_by(2, tmp_path_factory.mktemp("two"), worker.CASES)


@pytest.fixture(scope="module")
def of_three(tmp_path_factory):
    return found_by(3, tmp_path_factory.mktemp("three"), ["diagonal", "growing", "one case"])


def assert_as_one(found, name):
    """That all workers have the same weights after every update, and they and all a user sees are those of one process."""
    one = worker.trained(tf.distribute.get_strategy(), **worker.CASES[name])
    for other in found[1:]:
        assert other["hashes"] == found[0]["hashes"]
    assert len(found[0]["hashes"]) == len(one["hashes"])
    for key in ("weights", "evaluated", "predicted"):
        # CG amplifies the rounding of sums.
        np.testing.assert_allclose(found[0][key], one[key], atol=1e-6, err_msg=key)
    for key in ("loss", "mae", "val_loss", "val_mae", "damping", "num_cases", "gradient_norm"):
        values = one["history"][key]
        np.testing.assert_allclose(found[0]["history"][key], values, rtol=1e-5, atol=1e-8, err_msg=key)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:An update on")
@pytest.mark.parametrize("name", [name for name in worker.CASES if name != "normalized"])
def test_two_workers_make_the_updates_of_one_process(name, of_two, float64):
    assert_as_one(of_two[name], name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:An update on")
@pytest.mark.parametrize("name", ["diagonal", "growing", "one case"])
def test_three_workers_make_the_updates_of_one_process(name, of_three, float64):
    assert_as_one(of_three[name], name)


@pytest.mark.slow
def test_workers_with_batch_normalization_stay_together(of_two):
    # Each normalizes by its own cases, as in Keras; the statistics of evaluation are of all cases.
    one, two = of_two["normalized"]
    assert one["hashes"] == two["hashes"] and one["evaluated"] == two["evaluated"]
    assert one["history"]["loss"][-1] < one["history"]["loss"][0]


@pytest.mark.slow
def test_an_iteration_of_cg_has_two_reductions_and_a_loss_one(tmp_path):
    cluster.run(2, "reductions", tmp_path)
    # Before the iterations: the product at the start, numbers of the start, the norm of b, and after them the slopes.
    loops = [count for count in json.loads((tmp_path / "reductions-0.json").read_text()) if count]
    assert loops == [1, 1, 2, 4]


def values_of(folder, num_workers=2):
    """The variables of every worker at the end of a run."""
    files = [np.load(folder / f"values-{number}.npz") for number in range(num_workers)]
    return [[file[name] for name in file.files] for file in files]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    cluster.run(2, "whole", folder)
    return folder


@pytest.mark.slow
def test_the_chief_alone_writes_files_that_are_whole(uninterrupted):
    one, two = values_of(uninterrupted)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [record["update"] for record in read_updates(uninterrupted / "updates.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert len((uninterrupted / "log.csv").read_text().splitlines()) == 7
    assert sorted(path.name for path in uninterrupted.iterdir()) == [
        *("backup", "best.keras", "last.keras", "last.weights.h5", "log.csv", "updates.jsonl"),
        *("values-0.npz", "values-1.npz"),
    ]
    again = keras.models.load_model(uninterrupted / "last.keras")
    for a, b in zip([*again.weights, *again.optimizer.variables], one, strict=True):
        np.testing.assert_array_equal(a.numpy(), b)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [["kill_worker"], ["kill_chief", "weights"]], ids=["worker", "chief"])
def test_a_run_goes_on_after_a_process_was_killed_as_if_it_had_not(kill, uninterrupted, tmp_path):
    what, *moment = kill
    began = time.monotonic()
    with cluster.workers(2, what, tmp_path, *moment) as processes:
        outputs = cluster.ended(processes, 200)
    assert time.monotonic() - began < 200 and all(code != 0 for _, code in outputs)
    cluster.run(2, "whole", tmp_path)
    for one, two in zip(values_of(tmp_path), values_of(uninterrupted), strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_workers_with_different_jobs_are_told_what_differs(tmp_path):
    cluster.run(2, "other_jobs", tmp_path)
    for number in range(2):
        told = json.loads((tmp_path / f"told-{number}.json").read_text())
        for what, name in (("data", "data"), ("cases", "batches"), ("optimizer", "optimizer")):
            assert f"{name}: here (worker {number})" in told[what] and f"not so on {1 - number}" in told[what]


# The meeting, without TensorFlow's.


class Resolver:
    """A cluster of two workers, of which this process is one."""

    def __init__(self, addresses, number):
        self._addresses, self.task_type, self.task_id = addresses, "worker", number

    def cluster_spec(self):
        return tf.train.ClusterSpec({"worker": self._addresses})


def meeting(addresses, number, timeout):
    """One worker's part of it; returns the seconds that it took."""
    began = time.monotonic()
    tasks = {("worker", i): workers._address(address) for i, address in enumerate(addresses)}
    workers._meet(tasks, ("worker", number), timeout)
    return time.monotonic() - began


def test_workers_meet_whoever_comes_first():
    for first in (0, 1, 2):
        addresses = cluster.free_addresses(3)
        order = [first, *{0, 1, 2} - {first}]
        threads = [threading.Thread(target=meeting, args=(addresses, number, 20)) for number in order]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(("number", "told"), [(0, "worker 1 did not come"), (1, "The chief at 127.0.0.1")])
def test_a_worker_that_never_comes_is_named_in_time(number, told):
    with pytest.raises(TimeoutError, match=told):
        multi_worker_strategy(Resolver(cluster.free_addresses(2), number), timeout=0.5)


def test_somebody_else_who_calls_at_the_port_does_not_end_the_meeting():
    addresses = cluster.free_addresses(2)
    thread = threading.Thread(target=meeting, args=(addresses, 0, 20))
    thread.start()
    address = workers._address(addresses[0])
    for said in (b"GET / HTTP/1.0\n", b"1\n", b"[[1]]\n", b""):
        while True:
            try:
                with socket.create_connection(address, 1) as connection:
                    connection.sendall(said)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
    meeting(addresses, 1, 20)
    thread.join(20)
    assert not thread.is_alive()


def test_somebody_who_says_nothing_does_not_hold_up_the_meeting(monkeypatch):
    monkeypatch.setattr(workers, "_PATIENCE", 0.2)
    addresses = cluster.free_addresses(2)
    thread = threading.Thread(target=meeting, args=(addresses, 0, 20))
    thread.start()
    time.sleep(0.3)
    with socket.create_connection(workers._address(addresses[0]), 1):
        assert meeting(addresses, 1, 20) < 10
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("number", [0, 1])
def test_a_port_in_use_is_named(number):
    addresses = cluster.free_addresses(2)
    host, port = workers._address(addresses[number])
    with socket.create_server(("", port)):
        with pytest.raises(OSError, match=f"Port {port}, that of worker {number} in the cluster, cannot be used"):
            multi_worker_strategy(Resolver(addresses, number), timeout=5)


def test_a_task_that_is_not_in_the_cluster_is_refused():
    with pytest.raises(ValueError, match="Received: task worker 5 and the workers worker 0, worker 1"):
        multi_worker_strategy(Resolver(cluster.free_addresses(2), 5))


@pytest.mark.parametrize("timeout", [0, -1, "1", True])
def test_a_timeout_must_be_positive(timeout):
    with pytest.raises(ValueError, match="`timeout` must be a finite number > 0"):
        multi_worker_strategy(timeout=timeout)


def test_several_steps_in_one_execution_are_refused_on_several_workers(monkeypatch):
    one = tf.distribute.get_strategy()
    workers.require_single_steps(one, 3)
    monkeypatch.setattr(workers, "num_workers", lambda strategy: 2)
    workers.require_single_steps(one, 1)
    with pytest.raises(ValueError, match="one step per execution. Received: steps_per_execution=3 and 2 workers"):
        workers.require_single_steps(one, 3)


def test_one_process_is_its_own_chief():
    for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
        assert (num_workers(strategy), worker_number(strategy), is_chief(strategy)) == (1, 0, True)


# Backups, which a kill may interrupt at any time.


def backed_up(folder, epochs=4, crash_at=None, monkeypatch=None):
    """A run with backups, interrupted at one of its replacements of files; the optimizer's and the network's values, and the number of updates."""
    model = worker.model_of(tf.distribute.get_strategy(), "diagonal")
    x, y = worker.cases(51, "mse")
    count = 0

    def crashing(source, target, replace=os.replace):
        nonlocal count
        count += 1
        if count == crash_at:
            raise KeyboardInterrupt
        return replace(source, target)

    backup = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", crashing)
        try:
            model.fit(x, y, epochs=epochs, callbacks=[backup, worker.LevenbergMarquardt()], verbose=0)
        except KeyboardInterrupt:
            assert crash_at
    values = [variable.numpy() for variable in [*model.weights, *model.optimizer.variables]]
    return values, int(model.optimizer.iterations.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("crash_at", [1, 2, 3, 4, 5, 6])
def test_a_run_that_ended_while_a_backup_was_written_ends_as_if_it_had_not(crash_at, tmp_path, monkeypatch, float64):
    backed_up(tmp_path / "crashed", crash_at=crash_at, monkeypatch=monkeypatch)
    resumed, num_updates = backed_up(tmp_path / "crashed", monkeypatch=monkeypatch)
    whole, _ = backed_up(tmp_path / "whole", monkeypatch=monkeypatch)
    assert num_updates == 4
    for a, b in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_worker_that_is_not_the_chief_backs_nothing_up(tmp_path):
    model = worker.model_of(tf.distribute.get_strategy(), "diagonal")
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
    model = worker.model_of(tf.distribute.get_strategy(), "diagonal")
    backup = keras.callbacks.BackupAndRestore(tmp_path, double_checkpoint=True, delete_checkpoint=False)
    model.fit(*worker.cases(51, "mse"), epochs=3, callbacks=[backup, worker.LevenbergMarquardt()], verbose=0)
    assert json.loads((tmp_path / "training_metadata.json").read_text())["epoch"] == 3
    assert json.loads((tmp_path / "training_metadata.json.bkp").read_text())["epoch"] == 2
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
