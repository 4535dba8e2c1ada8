"""The problems with long-term dependencies of Martens & Sutskever (2011), after Hochreiter & Schmidhuber (1997): sequences of any length.

A network that solves one must carry something over the whole length, past what is only noise. With `T` the length, `f = T / 100`:

| problem | inputs | target |
| --- | --- | --- |
| addition | numbers in [0, 1], two of them marked, in [1, 10) f and [10, 50) f | the mean of the two, after the last step |
| multiplication | the same | their product |
| xor | bits; marks in [1, 10) f and [15, 25) f with `f = T / 50` | their exclusive or |
| temporal-order | four symbols of noise; X or Y at [1, 10] f and at [40, 50] f | which came first and second: 4 classes |
| temporal-order-3 | the same, X or Y at [1, 10] f, [30, 40] f and [50, 60] f | 8 classes |
| permutation | 100 symbols: the first 0 or 1, the last the same, noise between | the next symbol at every step; the last one counts |
| memory-5, memory-20 | 5 of 2 symbols (10 of 5), T blanks, a cue, blanks | blanks, and after the cue the symbols |

The first four have sequences of `T` to `1.1 T` steps. They stand at the end of an array of the greatest length; the steps before are zero, so that no
mask is needed. The first step of a sequence has the marker -1, or a symbol of its own; so has the cue, shortly before the end: three steps in the
problems with numbers and bits, the last step in those of order.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Problem(NamedTuple):
    """A problem of a given length.

    Attributes:
        draw: Callable `(num_cases, rng) -> x (num_cases, steps, inputs), y`, both float32, or y int32 for classes. y is `(num_cases, 1)`,
            `(num_cases,)` or, of a target at every step, `(num_cases, steps)`.
        num_outputs: Integer, entries of the network's output.
        activation: String, of the output.
        loss: String, for `compile`.
        every_step: Whether there is a target at every step.
        is_wrong: Callable `(y, y_pred) -> bool (num_cases,)`, what counts as a failure.
        all_cases: Pair of arrays, where there are so few sequences that all of them are trained on; else None.
    """

    draw: Callable
    num_outputs: int
    activation: str
    loss: str
    every_step: bool
    is_wrong: Callable
    all_cases: tuple | None = None


def addition(length):
    """The mean of two marked numbers."""
    return _marked(length, lambda first, second: (first + second) / 2)


def multiplication(length):
    """The product of two marked numbers."""
    return _marked(length, lambda first, second: first * second)


def _marked(length, result):
    f = length / 100

    def draw(num_cases, rng):
        values = rng.uniform(size=(num_cases, greatest_length(length)))
        x, marked = _with_marks(values, length, ((f, 10 * f), (10 * f, 50 * f)), rng)
        return x, result(*marked.T)[:, None].astype("float32")

    return Problem(draw, 1, "linear", "mean_squared_error", False, lambda y, y_pred: np.abs(y_pred - y)[:, 0] > 0.04)


def xor(length):
    """The exclusive or of two marked bits."""
    f = length / 50

    def draw(num_cases, rng):
        values = rng.integers(2, size=(num_cases, greatest_length(length)))
        x, marked = _with_marks(values, length, ((f, 10 * f), (15 * f, 25 * f)), rng)
        return x, np.not_equal(*marked.T)[:, None].astype("float32")

    return Problem(
        draw, 1, "sigmoid", "binary_crossentropy", False, lambda y, y_pred: (y_pred[:, 0] > 0.5) != (y[:, 0] > 0.5)
    )


def _with_marks(values, length, ranges, rng):
    """Returns inputs (value, mark, cue) of values `(N, steps)`, and the marked values `(N, marks)`."""
    num_cases, steps = values.shape
    starts = steps - _lengths(num_cases, length, rng)
    x = np.zeros((num_cases, steps, 3), "float32")
    x[:, :, 0] = np.where(np.arange(steps) >= starts[:, None], values, 0)
    rows = np.arange(num_cases)
    x[rows, starts, 1] = -1
    # Half-open ranges, at least one position each, none that of the start.
    bounds = [(max(1, round(low)), max(2, round(high))) for low, high in ranges]
    places = [starts + rng.integers(low, max(high, low + 1), size=num_cases) for low, high in bounds]
    for place in places:
        x[rows, place, 1] = 1
    x[:, -3, 2] = 1
    return x, np.stack([x[rows, place, 0] for place in places], 1)


def temporal_order(length):
    """Which of X and Y came at two places."""
    return _order(length, ((1, 10), (40, 50)))


def temporal_order_3(length):
    """Which of X and Y came at three places."""
    return _order(length, ((1, 10), (30, 40), (50, 60)))


def _order(length, ranges):
    f = length / 100
    noise, x_and_y, cue, start = 4, (4, 5), 6, 7

    def draw(num_cases, rng):
        steps = greatest_length(length)
        starts = steps - _lengths(num_cases, length, rng)
        symbols = rng.integers(noise, size=(num_cases, steps))
        rows = np.arange(num_cases)
        symbols[rows, starts], symbols[:, -1] = start, cue
        classes = np.zeros(num_cases, "int32")
        for low, high in ranges:
            which = rng.integers(2, size=num_cases)
            # Both ends included.
            place = starts + rng.integers(max(1, round(low * f)), round(high * f) + 1, size=num_cases)
            symbols[rows, place] = np.take(x_and_y, which)
            classes = 2 * classes + which.astype("int32")
        x = np.eye(8, dtype="float32")[symbols]
        x[np.arange(steps) < starts[:, None]] = 0
        return x, classes

    return Problem(draw, 2 ** len(ranges), "softmax", "sparse_categorical_crossentropy", False, _other_class)


def permutation(length):
    """The first of many symbols again, at the end."""
    num_symbols = 100

    def draw(num_cases, rng):
        symbols = rng.integers(2, num_symbols, size=(num_cases, length + 1))
        symbols[:, 0] = symbols[:, -1] = rng.integers(2, size=num_cases)
        return np.eye(num_symbols, dtype="float32")[symbols[:, :-1]], symbols[:, 1:].astype("int32")

    def is_wrong(y, y_pred):
        return y_pred[:, -1].argmax(-1) != y[:, -1]

    return Problem(draw, num_symbols, "softmax", "sparse_categorical_crossentropy", True, is_wrong)


def memory_5(length):
    """Five bits to repeat: 32 sequences."""
    patterns = np.array(list(itertools.product(range(2), repeat=5)))
    return _memory(length, 2, 5)._replace(all_cases=_memory_sequences(patterns, length, 2))


def memory_20(length):
    """Ten symbols of five to repeat, about 20 bits."""
    return _memory(length, 5, 10)


def _memory(length, num_symbols, num_repeated):
    def draw(num_cases, rng):
        return _memory_sequences(rng.integers(num_symbols, size=(num_cases, num_repeated)), length, num_symbols)

    def is_wrong(y, y_pred):
        return (y_pred.argmax(-1) != y).any(-1)

    return Problem(draw, num_symbols + 1, "softmax", "sparse_categorical_crossentropy", True, is_wrong)


def _memory_sequences(patterns, length, num_symbols):
    """Returns inputs and targets for the symbols to repeat, integers `(N, symbols)`."""
    num_cases, num_repeated = patterns.shape
    blank, cue = num_symbols, num_symbols + 1
    symbols = np.full((num_cases, num_repeated + length + 1 + num_repeated), blank)
    symbols[:, :num_repeated] = patterns
    symbols[:, num_repeated + length] = cue
    y = np.full(symbols.shape, blank, "int32")
    y[:, -num_repeated:] = patterns
    return np.eye(num_symbols + 2, dtype="float32")[symbols], y


def _other_class(y, y_pred):
    return y_pred.argmax(-1) != y


def greatest_length(length):
    """Returns the number of steps of the longest sequence: less than `1.1 T`."""
    return max(length, (11 * length + 9) // 10 - 1)


def _lengths(num_cases, length, rng):
    return rng.integers(length, greatest_length(length) + 1, size=num_cases)


PROBLEMS = {
    "addition": addition,
    "multiplication": multiplication,
    "xor": xor,
    "temporal-order": temporal_order,
    "temporal-order-3": temporal_order_3,
    "permutation": permutation,
    "memory-5": memory_5,
    "memory-20": memory_20,
}
