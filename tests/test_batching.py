import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_hf import GrowingBatch
from keras_hf.problem import batching
from keras_hf.problem.case_range import CaseRange

# Cases, chunk, micro-batch: fitting and not, larger than there is, one, and none.
DIVISIONS = [
    (12, 4, 2),
    (12, 4, 3),
    (12, 4, None),
    (12, None, 5),
    (12, None, None),
    (11, 4, 3),
    (11, 5, 1),
    (11, 100, 4),
    (11, 3, 100),
    (11, 11, 11),
    (7, 1, 1),
    (1, 1, 1),
    (1, None, None),
]


def divide(num_cases, chunk=None, micro_batch=None, update=0, seed=0):
    return batching.divide(CaseRange.of_batch([num_cases]), chunk, micro_batch, tf.constant(update), seed)


def micro_batches_of(division):
    """CaseRange of the cases of each micro-batch, as lists."""
    return [division.indices(number).numpy().tolist() for number in range(division.num_in_batch)]


def chunk_starts(num_cases, chunk, seed=0, rounds=1):
    """First cases of the chunks of the updates of some rounds, a row each."""
    num_chunks = -(-num_cases // chunk)
    updates = range(rounds * num_chunks)
    starts = [int(divide(num_cases, chunk, update=update, seed=seed).chunk_start) for update in updates]
    return np.reshape(starts, [rounds, num_chunks])


@pytest.mark.parametrize("num_cases, run", [(1, 1), (1000, 30), (1000, 250), (2001, 500)])
def test_every_run_of_the_spread_order_is_spread_over_all_cases(num_cases, run):
    places = batching.spread(num_cases).numpy()
    assert sorted(places) == list(range(num_cases))
    for start in range(0, num_cases - run + 1, max(1, run // 3)):
        # Between neighbours, and at both ends: at most 2.7 times as many as evenly.
        gaps = np.diff([-1, *sorted(places[start : start + run]), num_cases])
        assert gaps.max() <= 2.7 * num_cases / run + 1


@pytest.mark.parametrize("update", [0, 1, 5])
@pytest.mark.parametrize(("num_cases", "chunk", "micro_batch"), DIVISIONS)
def test_micro_batches_hold_every_case_once_around_the_ring_and_are_full_but_for_the_last_of_chunk_and_rest(
    num_cases, chunk, micro_batch, update
):
    division = divide(num_cases, chunk, micro_batch, update)
    micro_batches, start, in_chunk = (
        micro_batches_of(division),
        int(division.chunk_start),
        int(division.num_in_chunk),
    )
    assert sum(micro_batches, []) == [(start + i) % num_cases for i in range(num_cases)]
    # Without a chunk size the chunk is all cases from the first.
    assert chunk is not None or start == 0
    first = sum(micro_batches[:in_chunk], [])
    assert first == division.chunk_indices().numpy().tolist()
    assert len(first) == (num_cases if chunk is None else min(chunk, num_cases))
    largest = num_cases if micro_batch is None else micro_batch
    for part in (micro_batches[:in_chunk], micro_batches[in_chunk:]):
        sizes = [len(each) for each in part]
        assert all(size == largest for size in sizes[:-1]) and all(0 < size <= largest for size in sizes[-1:])


def test_a_division_by_hand():
    # 11 cases, chunks of 4 start at 0, 4 and, shifted back from 8, 7.
    divisions = [divide(11, 4, 3, update) for update in range(3)]
    by_start = {int(division.chunk_start): micro_batches_of(division) for division in divisions}
    assert by_start == {
        0: [[0, 1, 2], [3], [4, 5, 6], [7, 8, 9], [10]],
        4: [[4, 5, 6], [7], [8, 9, 10], [0, 1, 2], [3]],
        7: [[7, 8, 9], [10], [0, 1, 2], [3, 4, 5], [6]],
    }


@pytest.mark.parametrize(
    ("num_cases", "chunk", "starts"),
    [
        (12, 4, [0, 4, 8]),
        (11, 4, [0, 4, 7]),
        (9, 4, [0, 4, 5]),
        (9, 2, [0, 2, 4, 6, 7]),
        (7, 100, [0]),
        (5, 4, [0, 1]),
        (4, 4, [0]),
        (3, 1, [0, 1, 2]),
        (100, 7, [*range(0, 98, 7), 93]),
    ],
)
def test_each_round_visits_every_chunk_once_the_last_shifted_back(num_cases, chunk, starts):
    for visited in chunk_starts(num_cases, chunk, rounds=4):
        assert sorted(visited) == starts


def test_the_order_of_chunks_is_given_by_seed_and_round():
    first = chunk_starts(90, 10, seed=3, rounds=3)
    np.testing.assert_array_equal(chunk_starts(90, 10, seed=3, rounds=3), first)
    # Two of 9! orders are equal by a chance of 3e-6.
    orders = [*first, *chunk_starts(90, 10, seed=4, rounds=3)]
    assert len({tuple(order) for order in orders}) == 6


def test_every_chunk_comes_equally_often_at_every_turn():
    # With a plain counter each of several batches would always meet the same chunk.
    starts = chunk_starts(8, 4, rounds=100)
    first_half_first = (starts[:, 0] == 0).sum()
    # Binomial(100, 1/2) has a standard deviation of 5.
    assert abs(first_half_first - 50) <= 20


def test_a_micro_batch_size_that_is_known_at_run_time_divides_as_a_number_does():
    for chunk in (None, 7):
        assert micro_batches_of(divide(11, chunk, tf.constant(3))) == micro_batches_of(divide(11, chunk, 3))


def test_no_cases_make_no_micro_batches():
    for chunk, micro_batch in itertools.product([None, 3], [None, 2]):
        division = divide(0, chunk, micro_batch, update=4)
        assert (division.num_in_batch, division.num_in_chunk) == (0, 0)
        assert not len(division.chunk_indices())


def test_a_share_of_no_cases_leaves_all_to_the_rest():
    # What a replica gets where there are fewer curvature cases than replicas.
    division = divide(5, tf.constant(0), 2)
    assert division.num_in_chunk == 0
    assert not len(division.chunk_indices())
    assert sorted(sum(micro_batches_of(division), [])) == list(range(5))


def test_one_graph_divides_batches_of_every_size():
    traces = []

    @tf.function
    def compiled(num_cases, update):
        traces.append(1)
        division = batching.divide(CaseRange.of_batch(num_cases[None]), 4, 3, update, 0)
        return division, division.indices(0), division.chunk_indices()

    for num_cases in (11, 12, 3, 0):
        for update in (0, 1):
            graph = compiled(tf.constant(num_cases), tf.constant(update))
            division = divide(num_cases, 4, 3, update)
            eager = (division, division.indices(0), division.chunk_indices())
            for a, b in zip(tf.nest.flatten(graph), tf.nest.flatten(eager), strict=True):
                np.testing.assert_array_equal(a, b)
    assert len(traces) == 1


# Growing batches.


def state_of(size, start=0, misses=0):
    return {"size": tf.constant(size), "start": tf.constant(start), "misses": tf.constant(misses)}


@tf.function
def selected(state, counts, replica):
    """CaseRange used and unseen; compiled, since tests ask for hundreds."""
    return [run.indices() for run in GrowingBatch().select(state, counts, replica)]


def select(*counts, replica=0, **state):
    """CaseRange used and unseen, as lists, of one of the replicas that hold so many cases."""
    return tuple(
        places.numpy().tolist() for places in selected(state_of(**state), tf.constant(counts), tf.constant(replica))
    )


@pytest.mark.parametrize(
    ("start", "used", "unseen"),
    [
        (0, [0, 1, 2], [3, 4, 5]),
        (3, [3, 4, 5], [6, 7, 8]),
        (6, [6, 7, 8], [9, 0, 1]),
        (9, [9, 0, 1], [2, 3, 4]),
        (10, [0, 1, 2], [3, 4, 5]),
        (104, [4, 5, 6], [7, 8, 9]),
        (9, [9], [0]),
        (7, [7, 8, 9, 0, 1], [2, 3, 4, 5, 6]),
    ],
)
def test_a_part_of_ten_cases_by_hand(start, used, unseen):
    assert select(10, size=len(used), start=start) == (used, unseen)


def test_a_part_that_would_be_more_than_half_of_the_batch_is_the_batch_from_its_first_case():
    for num_cases, size, start in [
        (10, 6, 0),
        (10, 6, 7),
        (10, 2**29, 3),
        (9, 500, 3),
        (2, 500, 3),
        (1, 500, 3),
        (0, 3, 2),
    ]:
        assert select(num_cases, size=size, start=start) == (list(range(num_cases)), [])
    for size in (2**30, 2**31, 10**12):
        state = GrowingBatch(initial_size=size).initial_state([], [])
        assert select(10, **{key: int(value) for key, value in state.items()}) == (list(range(10)), [])


def test_a_batch_of_fewer_cases_than_are_divided_is_used_whole():
    parts = GrowingBatch(2, min_batch_size=10)
    used = [parts.select(state_of(2), tf.constant([num_cases])).used.indices() for num_cases in (9, 10)]
    assert [cases.numpy().tolist() for cases in used] == [list(range(9)), [0, 1]]
    only = parts.select(state_of(2), tf.constant([9]), is_divided=False)
    assert only.used.indices().numpy().tolist() == [0, 1]


def test_replicas_take_their_shares_of_a_part():
    # 6 of 20 cases on two replicas with 10 each; the next part starts after the 3 that each has used.
    assert select(10, 10, size=6) == ([0, 1, 2], [3, 4, 5])
    assert select(10, 10, size=6, start=6) == ([3, 4, 5], [6, 7, 8])
    # One of 5 goes to either in turn.
    assert [select(10, 10, size=5, replica=i) for i in (0, 1)] == [([0, 1, 2], [3, 4]), ([0, 1], [2, 3, 4])]
    assert [select(10, 10, size=5, start=5, replica=i)[0] for i in (0, 1)] == [[3, 4], [2, 3, 4]]


def test_replicas_with_different_numbers_of_cases_agree_whether_all_are_used():
    # 26 of 51 are more than half of the batch, though 13 are no more than half of the first replica's.
    assert [select(26, 25, size=26, replica=i) for i in (0, 1)] == [(list(range(n)), []) for n in (26, 25)]
    assert sum(len(select(26, 25, size=25, replica=i)[1]) for i in (0, 1)) == 25


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(10,), (10, 10), (26, 25), (3, 3, 3, 0), (2, 2, 1, 0), (7, 0, 1), (1, 9), (0, 0)])
def test_parts_of_all_replicas_are_as_large_as_wanted_and_follow_each_other(counts):
    num_cases = sum(counts)
    for size in range(1, num_cases // 2 + 1):
        places = [[] for _ in counts]
        for start in range(0, size * num_cases, size):
            parts = [select(*counts, size=size, start=start, replica=i) for i in range(len(counts))]
            assert sum(len(used) for used, _ in parts) == sum(len(unseen) for _, unseen in parts) == size
            for (used, unseen), so_far in zip(parts, places, strict=True):
                assert not set(used) & set(unseen)
                so_far += used
        # Each case as often as any other, one after the other around the replica's batch.
        assert places == [[i % count for i in range(size * count)] for count in counts]


@tf.function
def state_in_turn(state, size, num_cases, number):
    """The state after an update that used a part of this size; compiled, too."""
    return next_state(state, num_used=size, num_unseen=size, num_cases=num_cases, update_number=number)


def parts_in_turn(num_updates, num_cases, size):
    """The places used by so many updates on end, and those unseen."""
    state, parts = state_of(size), []
    counts = tf.constant([num_cases])
    for number in range(num_updates):
        parts.append([places.numpy().tolist() for places in selected(state, counts, tf.constant(0))])
        state = state_in_turn(state, *(tf.constant(each) for each in (size, num_cases, number)))
    return parts


@pytest.mark.parametrize(("num_cases", "size"), [(12, 3), (10, 3), (11, 5), (7, 1), (8, 4)])
def test_parts_follow_each_other_around_the_batch_and_every_round_visits_it(num_cases, size):
    in_round, counts = -(-num_cases // size), np.zeros(num_cases)
    parts = parts_in_turn(20 * in_round, num_cases, size)
    for used, unseen in parts:
        assert not set(used) & set(unseen)
        counts[used] += 1
    if 3 * size <= num_cases:
        # Also in a new round the next part holds none of the last.
        assert not any(set(used) & set(following) for (used, _), (following, _) in itertools.pairwise(parts))
    for first in range(0, len(parts), in_round):
        places = sum([used for used, _ in parts[first : first + in_round]], [])
        assert places == [(places[0] + i) % num_cases for i in range(in_round * size)]
    assert len({used[0] for used, _ in parts[::in_round]}) > 1
    # Those that the last part of a round visits again are others in every round.
    assert counts.sum() == 20 * in_round * size and counts.max() <= 1.5 * counts.mean()


@pytest.mark.parametrize(
    ("num_batches", "size"),
    [(4, 25), (2, 50), (3, 33), (2, 25), (8, 25), (5, 20), pytest.param(40, 20, marks=pytest.mark.slow)],
)
def test_every_case_of_each_of_several_batches_has_its_turn(num_batches, size):
    # 30 epochs; were each batch married to one part, all but that one would be left out.
    num_epochs, visits = 30, np.zeros((num_batches, 100), int)
    for number, (used, _) in enumerate(parts_in_turn(num_epochs * num_batches, 100, size)):
        visits[number % num_batches, used] += 1
    assert visits.min() > 0
    assert visits.max() <= 4 * visits.mean()


def test_rounds_are_drawn_from_the_seed():
    def starts(seed):
        states = (next_state(state_of(3), num_cases=12, update_number=number, seed=seed) for number in range(12))
        return [int(state["start"]) for state in states]

    assert starts(1) == starts(1) != starts(2)
    assert all(start == 3 for number, start in enumerate(starts(1)) if number % 4 != 3)


HIT, MISS = (1.0, 0.5), (1.0, 0.1)


def next_state(
    state,
    reductions=HIT,
    num_used=3,
    num_unseen=3,
    num_cases=1000,
    update_number=0,
    seed=7,
    variation=0.0,
    before=0.0,
    **arguments,
):
    """The state after an update that lowered the loss of the cases used, and that of the unseen ones, by so much."""
    seen, before, after, variation = (
        tf.constant(value, tf.float64) for value in (reductions[0], before, before - reductions[1], variation)
    )
    num_used, num_unseen, num_cases, turn = (
        tf.convert_to_tensor(number) for number in (num_used, num_unseen, num_cases, [seed, update_number])
    )
    trial = batching.Trial(num_unseen, before, after, variation)
    return GrowingBatch(**arguments).next_state(state, num_used, seen, trial, num_cases, turn)


def sizes_after(updates, initial=4, **arguments):
    state, sizes = state_of(initial), []
    for reductions in updates:
        state = next_state(state, reductions, **arguments)
        sizes.append(int(state["size"]))
    return sizes


def test_a_part_doubles_after_as_many_misses_on_end_as_it_has_patience_and_never_shrinks():
    assert sizes_after([MISS] * 7, patience=3) == [4, 4, 8, 8, 8, 16, 16]
    assert sizes_after([MISS] * 3, patience=1) == [8, 16, 32]
    # A hit forgets the misses.
    assert sizes_after([MISS, MISS, HIT, MISS, MISS, MISS], patience=3) == [4, 4, 4, 4, 4, 8]
    assert sizes_after([MISS, *[HIT] * 20], patience=1) == [8] * 21


def test_a_miss_is_a_fall_of_the_unseen_loss_by_less_than_the_share():
    for seen, unseen in [(1.0, 0.3), (1.0, 5.0), (1.0, np.inf)]:
        assert sizes_after([(seen, unseen)], share=0.3, patience=1) == [4]
    # In the last two the loss of unseen cases left the numbers.
    for seen, unseen in [(1, 0.2999), (2, 0.5), (1, 0), (1, -1), (1e-300, 0), (1, np.nan), (1, -np.inf)]:
        assert sizes_after([(seen, unseen)], share=0.3, patience=1) == [8]
    # With a share of zero it is a rise.
    assert sizes_after([(1.0, 0.0), (1.0, -1e-9)], share=0, patience=1) == [4, 8]


def test_a_rejected_step_says_nothing():
    for reductions in itertools.product([0.0, -1.0, np.nan, -np.inf], [0.0, -1.0, 1.0, np.nan]):
        state = next_state(state_of(4, start=5, misses=2), reductions, num_used=4, patience=3)
        assert {key: int(value) for key, value in state.items()} == {"size": 4, "start": 9, "misses": 2}


def test_unseen_cases_whose_loss_was_no_number_before_say_nothing():
    for before, unseen in itertools.product([np.nan, np.inf, -np.inf], [0.0, 1.0, np.nan]):
        state = next_state(state_of(4, misses=2), (1.0, unseen), before=before, variation=1e6, patience=3)
        assert (int(state["size"]), int(state["misses"])) == (4, 2)


def test_a_miss_of_noisy_cases_makes_the_part_as_large_as_their_noise_asks_for():
    # The standard error of 250 cases, the root of variation / 250, is .2 of the mean where the variation is 10.
    sizes = {10.0: 250, 10.1: 500, 20.0: 500, 20.1: 1000, 1000.0: 32_000, 1e300: 2**29, np.inf: 250, np.nan: 250}
    for variation, size in sizes.items():
        state = next_state(state_of(250, misses=1), MISS, variation=variation, noise=0.2, patience=3)
        assert (int(state["size"]), int(state["misses"])) == (size, 2 if size == 250 else 0)
    # Noise alone does not, and a last miss does also where cases are alike.
    for reductions in (HIT, (0.0, -1.0), (np.nan, 0.0)):
        assert int(next_state(state_of(250), reductions, variation=1e3)["size"]) == 250
    assert int(next_state(state_of(250, misses=2), MISS, variation=0.0)["size"]) == 500


def test_without_unseen_cases_nothing_is_judged():
    assert sizes_after([(1.0, 0.0)] * 3, num_unseen=0, patience=1) == [4, 4, 4]


def test_the_next_part_starts_after_the_cases_used():
    assert int(next_state(state_of(4, start=5), num_used=4)["start"]) == 9
    # Also where it grows: the unseen cases, which spoke against its size, are among its cases.
    state = next_state(state_of(4, start=5), MISS, num_used=4, patience=1)
    assert (int(state["start"]), int(state["size"])) == (9, 8)


def test_sizes_and_starts_stay_int32():
    state = next_state(state_of(2**29, start=2**29 - 1), MISS, num_used=2**20, patience=1)
    assert 0 <= int(state["start"]) < 2**29 and int(state["size"]) == 2**29
    assert not select(10, **{key: int(value) for key, value in state.items()})[1]


@pytest.mark.parametrize(
    ("name", "values", "rule"),
    [
        ("initial_size", (0, 2.5, None), "an integer >= 1"),
        ("share", (-0.1, 1.1, np.nan), "a finite number in"),
        ("patience", (0, True), "an integer >= 1"),
        ("min_batch_size", (0, 0.5), "an integer >= 1"),
        ("noise", (0, np.inf), "a finite number > 0"),
    ],
)
def test_numbers_out_of_range_are_refused(name, values, rule):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must be {rule}.* Received: {name}={value}"):
            GrowingBatch(**{name: value})


def test_a_growing_batch_survives_saving():
    for batch in (GrowingBatch(), GrowingBatch(64, 1, 2, 3, 0.1, 5), GrowingBatch(np.int64(3), np.float32(0.5))):
        again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(batch))
        assert type(again) is GrowingBatch
        assert again.get_config() == batch.get_config() == GrowingBatch.from_config(batch.get_config()).get_config()


def test_a_growing_batch_starts_with_its_initial_size_at_the_first_case():
    state = GrowingBatch(initial_size=7).initial_state([], [])
    assert {key: (int(value), value.dtype) for key, value in state.items()} == {
        "size": (7, tf.int32),
        "start": (0, tf.int32),
        "misses": (0, tf.int32),
    }
