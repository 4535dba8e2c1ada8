"""What the problems with long-term dependencies promise: sequences whose targets follow from them by rules that a reader can check by hand."""

import numpy as np
import pytest

from examples import recurrent_problems as problems

LENGTH, NUM_CASES = 50, 400


def draw(name, length=LENGTH):
    return problems.PROBLEMS[name](length).draw(NUM_CASES, np.random.default_rng(0))


def starts_of_marked(x):
    """Where sequences start: the marker -1."""
    assert ((x[:, :, 1] == -1).sum(1) == 1).all()
    return (x[:, :, 1] == -1).argmax(1)


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_other_numbers_come_with_another_generator_alone(name):
    problem = problems.PROBLEMS[name](LENGTH)
    for one, same, other in zip(*(problem.draw(20, np.random.default_rng(seed)) for seed in (1, 1, 2)), strict=True):
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()


@pytest.mark.parametrize("name", ["addition", "multiplication", "xor", "temporal-order", "temporal-order-3"])
def test_lengths_are_between_t_and_a_tenth_more_and_steps_before_are_zero(name):
    x, _ = draw(name)
    assert x.shape[1] == 54
    lengths = x.shape[1] - (x != 0).any(-1).argmax(1)
    assert lengths.min() == 50 and lengths.max() == 54


@pytest.mark.parametrize(
    "name, first, second",
    [("addition", (1, 5), (5, 25)), ("multiplication", (1, 5), (5, 25)), ("xor", (1, 10), (15, 25))],
)
def test_two_values_are_marked_in_their_ranges_and_the_target_follows_from_them(name, first, second):
    x, y = draw(name)
    starts = starts_of_marked(x)
    marks = x[:, :, 1] == 1
    assert (marks.sum(1) == 2).all()
    places = np.stack([np.flatnonzero(row) - start for row, start in zip(marks, starts, strict=True)])
    for place, (low, high) in zip(places.T, (first, second), strict=True):
        assert place.min() == low and place.max() == high - 1
    a, b = x[:, :, 0][marks].reshape(-1, 2).T
    expected = {"addition": (a + b) / 2, "multiplication": a * b, "xor": np.abs(a - b)}[name]
    np.testing.assert_allclose(y[:, 0], expected, rtol=1e-6)
    # The cue is the third step from the end.
    np.testing.assert_array_equal(x[:, :, 2].argmax(1), x.shape[1] - 3)
    np.testing.assert_array_equal(x[:, :, 2].sum(1), 1)


@pytest.mark.parametrize(
    "name, ranges", [("temporal-order", [(0, 5), (20, 25)]), ("temporal-order-3", [(0, 5), (15, 20), (25, 30)])]
)
def test_the_order_of_x_and_y_is_the_class(name, ranges):
    x, y = draw(name)
    symbols, is_there = x.argmax(-1), x.any(-1)
    starts = is_there.argmax(1)
    rows = np.arange(NUM_CASES)
    assert (symbols[rows, starts] == 7).all() and (symbols[:, -1] == 6).all()
    found = is_there & ((symbols == 4) | (symbols == 5))
    assert (found.sum(1) == len(ranges)).all()
    bits = (symbols[found] == 5).reshape(NUM_CASES, -1)
    np.testing.assert_array_equal(y, bits @ (2 ** np.arange(len(ranges))[::-1]))
    places = np.stack([np.flatnonzero(row) - start for row, start in zip(found, starts, strict=True)])
    for place, (low, high) in zip(places.T, ranges, strict=True):
        assert place.min() >= max(1, low) and place.max() <= high
    assert set(y) == set(range(2 ** len(ranges)))


def test_a_permutation_ends_as_it_began():
    x, y = draw("permutation")
    symbols = x.argmax(-1)
    assert x.shape == (NUM_CASES, LENGTH, 100) and y.shape == (NUM_CASES, LENGTH)
    np.testing.assert_array_equal(y[:, :-1], symbols[:, 1:])
    np.testing.assert_array_equal(y[:, -1], symbols[:, 0])
    assert set(symbols[:, 0]) == {0, 1} and symbols[:, 1:].min() == 2 and symbols.max() == 99


@pytest.mark.parametrize("name, num_symbols, num_repeated", [("memory-5", 2, 5), ("memory-20", 5, 10)])
def test_symbols_come_back_after_the_cue(name, num_symbols, num_repeated):
    x, y = draw(name)
    symbols = x.argmax(-1)
    assert symbols.shape == y.shape == (NUM_CASES, LENGTH + 2 * num_repeated + 1)
    np.testing.assert_array_equal(y[:, -num_repeated:], symbols[:, :num_repeated])
    assert (y[:, :-num_repeated] == num_symbols).all() and symbols[:, :num_repeated].max() == num_symbols - 1
    # T blanks, then the cue, then blanks.
    assert (symbols[:, num_repeated : num_repeated + LENGTH] == num_symbols).all()
    assert (symbols[:, num_repeated + LENGTH] == num_symbols + 1).all()
    assert (symbols[:, num_repeated + LENGTH + 1 :] == num_symbols).all()


def test_five_bits_are_all_there():
    x, y = problems.memory_5(7).all_cases
    assert len(np.unique(x.argmax(-1)[:, :5], axis=0)) == len(x) == len(y) == 32


def test_what_counts_as_wrong():
    is_wrong = {name: make(LENGTH).is_wrong for name, make in problems.PROBLEMS.items()}
    np.testing.assert_array_equal(
        is_wrong["addition"](np.array([[0.5], [0.5]]), np.array([[0.53], [0.45]])), [False, True]
    )
    np.testing.assert_array_equal(is_wrong["xor"](np.array([[1.0], [0.0]]), np.array([[0.6], [0.6]])), [False, True])
    np.testing.assert_array_equal(is_wrong["temporal-order"](np.array([2, 2]), np.eye(4)[[2, 1]]), [False, True])
    # The last step alone, or every step.
    y, y_pred = np.array([[3, 1], [3, 1]]), np.eye(4)[[[0, 1], [3, 0]]]
    np.testing.assert_array_equal(is_wrong["permutation"](y, y_pred), [False, True])
    np.testing.assert_array_equal(is_wrong["memory-5"](y, y_pred), [True, True])
    np.testing.assert_array_equal(is_wrong["memory-5"](y, np.eye(4)[y]), [False, False])
