"""Runs of cases, and each replica's share of them."""

import numpy as np
import pytest
import tensorflow as tf

from keras_hf.problem.batching import divide
from keras_hf.problem.case_range import CaseRange, by_replica, parts_of_replicas, share

COUNTS = [(10,), (10, 10), (26, 25), (3, 3, 3, 0), (2, 2, 1, 0), (7, 0, 1), (1, 9)]

each_division_among_replicas = pytest.mark.parametrize("counts", COUNTS)


def runs(counts, start=0, num_cases=None):
    """The range of a batch as each replica sees it."""
    whole = [CaseRange.of_batch(list(counts), replica) for replica in range(len(counts))]
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
    sizes, starts = np.arange(sum(counts) + 1), np.arange(2 * sum(counts))[:, None]
    total = sum(run.up_to(sizes).numpy() for run in runs(counts, starts))
    np.testing.assert_array_equal(total, np.broadcast_to(sizes, [len(starts), len(sizes)]))


@each_division_among_replicas
def test_every_case_of_a_run_has_one_number_on_one_replica(counts):
    size = max(sum(counts) // 2, 1)
    for start in (0, 3, 9):
        numbers = [run.numbers(tf.range(run.num_local)).numpy() for run in runs(counts, start, size)]
        assert sorted(np.concatenate(numbers)) == list(range(size))
        # In the order of the replica's own cases.
        assert all((np.diff(own) > 0).all() for own in numbers)


@each_division_among_replicas
def test_the_chunk_of_all_replicas_is_that_of_one_device(counts):
    chunk = max(sum(counts) // 3, 1)
    for update in (0, 1, 2):
        numbers = []
        for run in runs(counts):
            micro_batches = divide(run, chunk, 2, tf.constant(update), 5)
            numbers += run.numbers(micro_batches.chunk_indices()).numpy().tolist()
            assert int(micro_batches.share_of_first(chunk)) == int(micro_batches.chunk_size)
        one = divide(CaseRange.of_batch([sum(counts)]), chunk, 2, tf.constant(update), 5)
        assert sorted(numbers) == one.chunk_indices().numpy().tolist()


@each_division_among_replicas
def test_the_first_cases_from_a_chunk_on_go_around_the_run(counts):
    sizes = np.arange(sum(counts) + 1)
    for chunk in (2, max(sum(counts) // 3, 1)):
        rings = [divide(run, chunk, None, tf.constant(1), 0).share_of_first(sizes).numpy() for run in runs(counts)]
        for run, ring in zip(runs(counts), rings, strict=True):
            assert ring[0] == 0 and ring[-1] == int(run.num_local) and (np.diff(ring) >= 0).all()
        np.testing.assert_array_equal(sum(rings), sizes)


@pytest.mark.parametrize(("num_cases", "num_replicas"), [(51, 2), (17, 4), (9, 4), (8, 2), (1, 2), (0, 2)])
def test_a_batch_in_the_order_of_replicas_has_each_ones_share_of_any_run_on_it(num_cases, num_replicas):
    order = by_replica(tf.constant(num_cases), num_replicas).numpy()
    counts = parts_of_replicas(tf.constant(num_cases), num_replicas).numpy()
    assert sorted(order) == list(range(num_cases)) and counts.sum() == num_cases
    for run, held in zip(runs(tuple(counts)), np.split(order, np.cumsum(counts)[:-1]), strict=True):
        for size, num_local in enumerate(run.up_to(np.arange(num_cases + 1)).numpy()):
            # The places of the first cases of the order, in order.
            assert held[:num_local].tolist() == [place for place in held if place < size]


@pytest.mark.parametrize(("num_cases", "num_replicas"), [(51, 2), (17, 4), (9, 4)])
def test_tensorflow_divides_a_batch_among_replicas_as_assumed(num_cases, num_replicas):
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(num_replicas)])
    of_any_length = lambda x: tf.compat.v1.placeholder_with_default(x, [None])  # noqa: E731
    batch = tf.data.Dataset.from_tensors(np.arange(num_cases)).map(of_any_length)
    (divided,) = strategy.experimental_distribute_dataset(batch)
    found = [part.numpy().tolist() for part in strategy.experimental_local_results(divided)]
    counts = parts_of_replicas(tf.constant(num_cases), num_replicas).numpy()
    assert [len(part) for part in found] == counts.tolist() and sum(found, []) == list(range(num_cases))
