import numpy as np
import pytest
import tensorflow as tf

from keras_hf import batching

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
    return batching.divide(tf.constant(num_cases), chunk, piece, tf.constant(update), seed)


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
        division = batching.divide(num_cases, 4, 3, update, 0)
        return division, division.indices(0), division.chunk_indices()

    for num_cases in (11, 12, 3, 0):
        for update in (0, 1):
            graph = compiled(tf.constant(num_cases), tf.constant(update))
            division = divide(num_cases, 4, 3, update)
            eager = (division, division.indices(0), division.chunk_indices())
            for a, b in zip(tf.nest.flatten(graph), tf.nest.flatten(eager), strict=True):
                np.testing.assert_array_equal(a, b)
    assert len(traces) == 1
