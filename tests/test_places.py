"""Runs of cases, and each replica's share of them."""

import numpy as np
import pytest
import tensorflow as tf

from keras_hf.problem.batching import divide
from keras_hf.problem.places import Places, by_replica, parts_of_replicas, share

COUNTS = [(10,), (10, 10), (26, 25), (3, 3, 3, 0), (2, 2, 1, 0), (7, 0, 1), (1, 9)]

each_division_among_replicas = pytest.mark.parametrize("counts", COUNTS)


def runs(counts, start=0, num_cases=None):
    """The run of a batch as each replica sees it."""
    whole = [Places.of_batch(list(counts), replica) for replica in range(len(counts))]
    num_cases = sum(counts) if num_cases is None else num_cases
    return [run._replace(start=tf.constant(start), num_cases=tf.constant(num_cases)) for run in whole]


def test_shares_by_hand():
    shares = lambda *counts: [int(share(8, tf.constant(counts), i)) for i in range(len(counts))]  # noqa: E731
    assert shares(9) == [8]
    assert shares(5, 5) == [4, 4]
    assert shares(3, 3, 3, 0) == [3, 3, 2, 0]
    assert shares(20, 5) == [6, 2]


@each_division_among_replicas
def test_shares_of_a_run_add_up_to_it(counts):
    sizes = np.arange(sum(counts) + 1)
    for start in range(2 * sum(counts)):
        np.testing.assert_array_equal(sum(run.up_to(sizes).numpy() for run in runs(counts, start)), sizes)


@each_division_among_replicas
@pytest.mark.parametrize("start", [0, 3, 9])
def test_every_case_of_a_run_has_one_number_on_one_replica(counts, start):
    size = max(sum(counts) // 2, 1)
    numbers = [run.numbers(tf.range(run.num_local)).numpy() for run in runs(counts, start, size)]
    assert sorted(np.concatenate(numbers)) == list(range(size))
    # In the order of the replica's own cases.
    assert all((np.diff(own) > 0).all() for own in numbers)


@each_division_among_replicas
@pytest.mark.parametrize("update", [0, 1, 2])
def test_the_chunk_of_all_replicas_is_that_of_one_device(counts, update):
    num_cases = sum(counts)
    chunk = max(num_cases // 3, 1)
    numbers = []
    for run in runs(counts):
        pieces = divide(run, chunk, 2, tf.constant(update), 5)
        numbers += run.numbers(pieces.chunk_indices()).numpy().tolist()
        assert int(pieces.share_of_first(chunk)) == int(pieces.chunk_size)
    one = divide(Places.of_batch([num_cases]), chunk, 2, tf.constant(update), 5)
    assert sorted(numbers) == one.chunk_indices().numpy().tolist()


@each_division_among_replicas
def test_the_first_cases_from_a_chunk_on_go_around_the_run(counts):
    for run in runs(counts):
        pieces = divide(run, max(sum(counts) // 3, 1), None, tf.constant(1), 0)
        ring = [int(pieces.share_of_first(size)) for size in range(sum(counts) + 1)]
        assert ring[0] == 0 and ring[-1] == int(run.num_local) and (np.diff(ring) >= 0).all()
    totals = [
        sum(int(divide(run, 2, None, tf.constant(1), 0).share_of_first(size)) for run in runs(counts))
        for size in range(sum(counts) + 1)
    ]
    assert totals == list(range(sum(counts) + 1))


@pytest.mark.parametrize(("num_cases", "num_replicas"), [(51, 2), (17, 4), (9, 4), (8, 2), (1, 2), (0, 2)])
def test_a_batch_in_the_order_of_replicas_has_each_ones_share_of_any_run_on_it(num_cases, num_replicas):
    order = by_replica(tf.constant(num_cases), num_replicas).numpy()
    counts = parts_of_replicas(tf.constant(num_cases), num_replicas).numpy()
    assert sorted(order) == list(range(num_cases)) and counts.sum() == num_cases
    held = np.split(order, np.cumsum(counts)[:-1])
    for size in range(num_cases + 1):
        for replica, run in enumerate(runs(tuple(counts), 0, size)):
            # The places of the first cases of the order, in order.
            assert held[replica][: int(run.num_local)].tolist() == [p for p in held[replica] if p < size]


@pytest.mark.parametrize(("num_cases", "num_replicas"), [(51, 2), (17, 4), (9, 4)])
def test_tensorflow_divides_a_batch_among_replicas_as_assumed(num_cases, num_replicas):
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(num_replicas)])
    of_any_length = lambda x: tf.compat.v1.placeholder_with_default(x, [None])  # noqa: E731
    batch = tf.data.Dataset.from_tensors(np.arange(num_cases)).map(of_any_length)
    (divided,) = strategy.experimental_distribute_dataset(batch)
    found = [part.numpy().tolist() for part in strategy.experimental_local_results(divided)]
    counts = parts_of_replicas(tf.constant(num_cases), num_replicas).numpy()
    assert [len(part) for part in found] == counts.tolist() and sum(found, []) == list(range(num_cases))
