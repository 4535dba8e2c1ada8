import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_hf import GrowingBatch
from keras_hf.problem import batching
from keras_hf.problem.places import Places

# Cases, chunk, piece: fitting and not, larger than there is, one, and none.
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

each_division = pytest.mark.parametrize(("num_cases", "chunk", "piece"), DIVISIONS)


def divide(num_cases, chunk=None, piece=None, update=0, seed=0):
    return batching.divide(Places.of_batch([num_cases]), chunk, piece, tf.constant(update), seed)


def pieces_of(division):
    """Places of the cases of each piece, as lists."""
    return [division.indices(number).numpy().tolist() for number in range(division.num_pieces)]


def chunk_starts(num_cases, chunk, seed=0, rounds=1):
    """First cases of the chunks of the updates of some rounds, a row each."""
    num_chunks = -(-num_cases // chunk)
    updates = range(rounds * num_chunks)
    starts = [int(divide(num_cases, chunk, update=update, seed=seed).chunk_start) for update in updates]
    return np.reshape(starts, [rounds, num_chunks])


@each_division
@pytest.mark.parametrize("update", [0, 1, 5])
def test_pieces_hold_every_case_once(num_cases, chunk, piece, update):
    pieces = pieces_of(divide(num_cases, chunk, piece, update))
    assert sorted(sum(pieces, [])) == list(range(num_cases))


@each_division
@pytest.mark.parametrize("update", [0, 1, 5])
def test_the_chunk_is_the_union_of_the_first_pieces(num_cases, chunk, piece, update):
    division = divide(num_cases, chunk, piece, update)
    pieces = pieces_of(division)
    first = sum(pieces[: int(division.num_chunk_pieces)], [])
    assert first == division.chunk_indices().numpy().tolist()
    assert len(first) == (num_cases if chunk is None else min(chunk, num_cases))


@each_division
def test_pieces_are_full_but_for_the_last_of_the_chunk_and_of_the_rest(num_cases, chunk, piece):
    division = divide(num_cases, chunk, piece)
    sizes = [len(each) for each in pieces_of(division)]
    in_chunk = int(division.num_chunk_pieces)
    largest = num_cases if piece is None else piece
    for part in (sizes[:in_chunk], sizes[in_chunk:]):
        assert all(size == largest for size in part[:-1])
        assert all(0 < size <= largest for size in part[-1:])


@each_division
@pytest.mark.parametrize("update", [0, 1, 5])
def test_cases_follow_each_other_around_the_ring(num_cases, chunk, piece, update):
    division = divide(num_cases, chunk, piece, update)
    ring = sum(pieces_of(division), [])
    start = int(division.chunk_start)
    assert ring == [(start + i) % num_cases for i in range(num_cases)]


def test_a_division_by_hand():
    # 11 cases, chunks of 4 start at 0, 4 and, shifted back from 8, 7.
    divisions = [divide(11, 4, 3, update) for update in range(3)]
    by_start = {int(division.chunk_start): pieces_of(division) for division in divisions}
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
        (5, 4, [0, 1]),
        (4, 4, [0]),
        (3, 1, [0, 1, 2]),
        (100, 7, [*range(0, 98, 7), 93]),
    ],
)
def test_each_round_visits_every_chunk_once_the_last_shifted_back(num_cases, chunk, starts):
    for visited in chunk_starts(num_cases, chunk, rounds=4):
        assert sorted(visited) == starts


@pytest.mark.parametrize(("num_cases", "chunk"), [(12, 4), (11, 4), (5, 4), (9, 2), (7, 100)])
def test_every_chunk_is_full_and_contiguous_without_going_around(num_cases, chunk):
    for update in range(6):
        places = divide(num_cases, chunk, update=update).chunk_indices().numpy()
        assert len(places) == min(chunk, num_cases)
        assert (np.diff(places) == 1).all()


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


@pytest.mark.parametrize("piece", [None, 1, 5, 100])
def test_without_a_chunk_size_the_chunk_is_all_cases_from_the_first(piece):
    for update in range(3):
        division = divide(11, None, piece, update)
        assert division.chunk_indices().numpy().tolist() == list(range(11))
        assert division.num_pieces == division.num_chunk_pieces == -(-11 // (piece or 11))


def test_without_a_piece_size_the_chunk_is_one_piece_and_the_rest_another():
    assert [len(piece) for piece in pieces_of(divide(11, 4))] == [4, 7]
    assert [len(piece) for piece in pieces_of(divide(11, 11))] == [11]


@pytest.mark.parametrize("chunk", [None, 7])
def test_a_piece_size_that_is_known_at_run_time_divides_as_a_number_does(chunk):
    assert pieces_of(divide(11, chunk, tf.constant(3))) == pieces_of(divide(11, chunk, 3))


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("piece", [None, 2])
def test_no_cases_make_no_pieces(chunk, piece):
    division = divide(0, chunk, piece, update=4)
    assert (division.num_pieces, division.num_chunk_pieces) == (0, 0)
    assert not len(division.chunk_indices())


def test_a_share_of_no_cases_leaves_all_to_the_rest():
    # What a replica gets where there are fewer curvature cases than replicas.
    division = divide(5, tf.constant(0), 2)
    assert division.num_chunk_pieces == 0
    assert not len(division.chunk_indices())
    assert sorted(sum(pieces_of(division), [])) == list(range(5))


def test_one_graph_divides_batches_of_every_size():
    traces = []

    @tf.function
    def compiled(num_cases, update):
        traces.append(1)
        division = batching.divide(Places.of_batch(num_cases[None]), 4, 3, update, 0)
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


def select(*counts, replica=0, **state):
    """Places used and unseen, as lists, of one of the replicas that hold so many cases."""
    selection = GrowingBatch().select(state_of(**state), tf.constant(counts), replica)
    return tuple(run.indices().numpy().tolist() for run in selection)


@pytest.mark.parametrize(
    ("state", "used", "unseen"),
    [
        ({"size": 3}, [0, 1, 2], [3, 4, 5]),
        ({"size": 3, "start": 3}, [3, 4, 5], [6, 7, 8]),
        ({"size": 3, "start": 6}, [6, 7, 8], [9, 0, 1]),
        ({"size": 3, "start": 9}, [9, 0, 1], [2, 3, 4]),
        ({"size": 3, "start": 10}, [0, 1, 2], [3, 4, 5]),
        ({"size": 3, "start": 104}, [4, 5, 6], [7, 8, 9]),
        ({"size": 1, "start": 9}, [9], [0]),
        ({"size": 5, "start": 7}, [7, 8, 9, 0, 1], [2, 3, 4, 5, 6]),
        # More than half: all, from the first.
        ({"size": 6}, list(range(10)), []),
        ({"size": 6, "start": 7}, list(range(10)), []),
        ({"size": 2**29, "start": 3}, list(range(10)), []),
    ],
)
def test_a_part_of_ten_cases_by_hand(state, used, unseen):
    assert select(10, **state) == (used, unseen)


@pytest.mark.parametrize("num_cases", [1, 2, 9])
def test_a_part_larger_than_the_batch_is_the_batch(num_cases):
    assert select(num_cases, size=500, start=3) == (list(range(num_cases)), [])


def test_a_part_of_no_cases_is_empty():
    assert select(0, size=3, start=2) == ([], [])


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


def parts_in_turn(num_updates, num_cases, size):
    """The places used by so many updates on end, and those unseen."""
    state, parts = state_of(size), []
    for number in range(num_updates):
        selection = GrowingBatch().select(state, tf.constant([num_cases]))
        parts.append([run.indices().numpy().tolist() for run in selection])
        state = next_state(state, num_used=size, num_unseen=size, num_cases=num_cases, update_number=number)
    return parts


@pytest.mark.parametrize(("num_cases", "size"), [(12, 3), (10, 3), (11, 5), (7, 1), (8, 4)])
def test_parts_follow_each_other_around_the_batch_and_every_round_visits_it(num_cases, size):
    in_round, counts = -(-num_cases // size), np.zeros(num_cases)
    parts = parts_in_turn(20 * in_round, num_cases, size)
    for used, unseen in parts:
        assert not set(used) & set(unseen)
        counts[used] += 1
    for first in range(0, len(parts), in_round):
        places = sum([used for used, _ in parts[first : first + in_round]], [])
        assert places == [(places[0] + i) % num_cases for i in range(in_round * size)]
    assert len({used[0] for used, _ in parts[::in_round]}) > 1
    # Those that the last part of a round visits again are others in every round.
    assert counts.sum() == 20 * in_round * size and counts.max() <= 1.5 * counts.mean()


@pytest.mark.parametrize(("num_cases", "size"), [(12, 3), (10, 3), (7, 1)])
def test_the_next_part_holds_none_of_the_last_also_in_a_new_round(num_cases, size):
    parts = parts_in_turn(40, num_cases, size)
    for (used, _), (then, _) in zip(parts, parts[1:], strict=False):
        assert not set(used) & set(then)


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
        states = (next_state(state_of(3), num_cases=12, update_number=number, seed=seed) for number in range(40))
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
    trial = batching.Trial(tf.constant(num_unseen), before, after, variation)
    num_used, num_cases, turn = (tf.constant(number) for number in (num_used, num_cases, [seed, update_number]))
    return GrowingBatch(**arguments).next_state(state, num_used, seen, trial, num_cases, turn)


def sizes_after(updates, initial=4, **arguments):
    state, sizes = state_of(initial), []
    for reductions in updates:
        state = next_state(state, reductions, **arguments)
        sizes.append(int(state["size"]))
    return sizes


def test_a_part_doubles_after_as_many_misses_on_end_as_it_has_patience():
    assert sizes_after([MISS] * 7, patience=3) == [4, 4, 8, 8, 8, 16, 16]
    assert sizes_after([MISS] * 3, patience=1) == [8, 16, 32]


def test_a_hit_forgets_the_misses():
    assert sizes_after([MISS, MISS, HIT, MISS, MISS, MISS], patience=3) == [4, 4, 4, 4, 4, 8]


def test_a_part_never_shrinks():
    assert sizes_after([MISS, *[HIT] * 20], patience=1) == [8] * 21


@pytest.mark.parametrize(
    ("reductions", "grows"),
    [
        ((1.0, 0.3), False),
        ((1.0, 0.2999), True),
        ((2.0, 0.5), True),
        ((1.0, 5.0), False),
        ((1.0, 0.0), True),
        ((1.0, -1.0), True),
        ((1e-300, 0.0), True),
        # The loss of unseen cases left the numbers.
        ((1.0, np.nan), True),
        ((1.0, -np.inf), True),
        ((1.0, np.inf), False),
    ],
)
def test_a_miss_is_a_fall_of_the_unseen_loss_by_less_than_the_share(reductions, grows):
    assert sizes_after([reductions], share=0.3, patience=1) == [8 if grows else 4]


@pytest.mark.parametrize("seen", [0.0, -1.0, np.nan, -np.inf])
@pytest.mark.parametrize("unseen", [0.0, -1.0, 1.0, np.nan])
def test_a_rejected_step_says_nothing(seen, unseen):
    state = next_state(state_of(4, start=5, misses=2), (seen, unseen), num_used=4, patience=3)
    assert {key: int(value) for key, value in state.items()} == {"size": 4, "start": 9, "misses": 2}


@pytest.mark.parametrize("before", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("unseen", [0.0, 1.0, np.nan])
def test_unseen_cases_whose_loss_was_no_number_before_say_nothing(before, unseen):
    state = next_state(state_of(4, misses=2), (1.0, unseen), before=before, variation=1e6, patience=3)
    assert (int(state["size"]), int(state["misses"])) == (4, 2)


@pytest.mark.parametrize(
    ("variation", "size"),
    [
        # The standard error of 250 cases, the root of variation / 250, is .2 of the mean.
        (10.0, 250),
        (10.1, 500),
        (20.0, 500),
        (20.1, 1000),
        (1000.0, 32_000),
        (1e300, 2**29),
        (np.inf, 250),
        (np.nan, 250),
    ],
)
def test_a_miss_of_noisy_cases_makes_the_part_as_large_as_their_noise_asks_for(variation, size):
    state = next_state(state_of(250, misses=1), MISS, variation=variation, noise=0.2, patience=3)
    assert (int(state["size"]), int(state["misses"])) == (size, 2 if size == 250 else 0)


@pytest.mark.parametrize("reductions", [HIT, (0.0, -1.0), (np.nan, 0.0)])
def test_noise_alone_does_not_make_a_part_grow(reductions):
    assert int(next_state(state_of(250), reductions, variation=1e3)["size"]) == 250


def test_a_last_miss_doubles_also_where_cases_are_alike():
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
    ("arguments", "rule"),
    [
        ({"initial_size": 0}, "`initial_size` must be an integer >= 1. Received: initial_size=0"),
        ({"initial_size": 2.5}, "`initial_size` must be an integer >= 1. Received: initial_size=2.5"),
        ({"initial_size": None}, "`initial_size` must be an integer >= 1. Received: initial_size=None"),
        ({"share": -0.1}, "`share` must be a finite number in"),
        ({"share": 1.1}, "`share` must be a finite number in"),
        ({"share": np.nan}, "`share` must be a finite number in"),
        ({"patience": 0}, "`patience` must be an integer >= 1. Received: patience=0"),
        ({"noise": 0}, "`noise` must be a finite number > 0. Received: noise=0"),
        ({"noise": np.inf}, "`noise` must be a finite number > 0. Received: noise=inf"),
        ({"patience": True}, "`patience` must be an integer >= 1. Received: patience=True"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        GrowingBatch(**arguments)


@pytest.mark.parametrize(
    "batch", [GrowingBatch(), GrowingBatch(64, 1, 2, 3), GrowingBatch(np.int64(3), np.float32(0.5))]
)
def test_a_growing_batch_survives_saving(batch):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(batch))
    assert type(again) is GrowingBatch
    assert again.get_config() == batch.get_config() == GrowingBatch.from_config(batch.get_config()).get_config()


@pytest.mark.parametrize("size", [2**30, 2**31, 10**12])
def test_a_size_past_all_batches_means_all_cases(size):
    state = GrowingBatch(initial_size=size).initial_state([], [])
    assert select(10, **{key: int(value) for key, value in state.items()}) == (list(range(10)), [])


def test_a_share_of_zero_grows_only_where_the_unseen_loss_rises():
    assert sizes_after([(1.0, 0.0), (1.0, -1e-9)], share=0, patience=1) == [4, 8]


def test_a_growing_batch_starts_with_its_initial_size_at_the_first_case():
    state = GrowingBatch(initial_size=7).initial_state([], [])
    assert {key: (int(value), value.dtype) for key, value in state.items()} == {
        "size": (7, tf.int32),
        "start": (0, tf.int32),
        "misses": (0, tf.int32),
    }
