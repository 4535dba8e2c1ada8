import numpy as np
import pytest
import tensorflow as tf

from keras_hf.solvers.search import backtrack, coarse_to_fine, least_loss, line_search

NAN, INF = np.nan, np.inf
not_finite = pytest.mark.parametrize("bad", [NAN, INF, -INF])
MODES = {"eager": lambda function: function, "compiled": tf.function(autograph=False)}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


class Losses:
    """A function of a step `(1,)` that remembers where it was computed, eagerly or in a graph."""

    def __init__(self):
        self.function, self.steps = None, []

    def __call__(self, step):
        return tf.ensure_shape(tf.numpy_function(self._compute, [step], tf.float64), ())

    def _compute(self, step):
        self.steps.append(float(step[0]))
        return np.float64(self.function(float(step[0])))

    def restart(self, function):
        self.function, self.steps = function, []


LOSSES = Losses()


@tf.function(input_signature=[tf.TensorSpec([None, 1])])
def compiled_backtrack(iterates):
    return backtrack(LOSSES, iterates)


@tf.function
def compiled_line_search(*args):
    return line_search(LOSSES, *args)


def in_both_modes(function, eager, compiled, *args):
    """Calls both forms with the losses of a function, and returns their common result and the steps looked at."""
    # NaN is why: graph optimization rewrites comparisons, and `not (a <= b)` is not `a > b` there.
    outcomes = []
    for form in (eager, compiled):
        LOSSES.restart(function)
        outcomes.append((form(*args), LOSSES.steps))
    (result, steps), (compiled_result, compiled_steps) = outcomes
    for one, other in zip(compiled_result, result, strict=True):
        np.testing.assert_array_equal(one, other)
    assert compiled_steps == steps
    return result, steps


def walk_back(losses):
    """Backtracks over iterates 0, 1, 2, ... with these losses, and returns the result and the iterates looked at."""
    iterates = tf.range(float(len(losses)))[:, None]
    result, steps = in_both_modes(
        lambda step: losses[int(step)], lambda x: backtrack(LOSSES, x), compiled_backtrack, iterates
    )
    looked_at = [loss if i in steps else NAN for i, loss in enumerate(losses)]
    np.testing.assert_array_equal(result.losses, looked_at)
    return result, steps


def search(function, slope, loss=0.0, loss_at_step=None, dtype="float64"):
    """Searches along the step 1 from 0, and returns the result and the step sizes tried."""
    loss_at_step = function(1.0) if loss_at_step is None else loss_at_step
    numbers = [tf.constant(value, tf.float64) for value in (loss, loss_at_step, slope)]
    result, steps = in_both_modes(
        function, lambda *args: line_search(LOSSES, *args), compiled_line_search, tf.ones(1, dtype), *numbers
    )
    assert result.num_cuts == len(steps)
    return result, steps


@pytest.mark.parametrize(
    ("losses", "row", "looked_at"),
    [
        ([5.0], 0, [0]),
        ([5.0, 4.0], 1, [1, 0]),
        ([4.0, 5.0], 0, [1, 0]),
        ([9.0, 5.0, 3.0, 4.0, 6.0], 2, [4, 3, 2, 1]),
        ([6.0, 5.0, 4.0, 3.0], 3, [3, 2]),
        ([3.0, 4.0, 5.0, 6.0], 0, [3, 2, 1, 0]),
        # The rule is local: it stops at the first rise on the way back, whatever lies behind.
        ([1.0, 5.0, 4.0, 6.0], 2, [3, 2, 1]),
        ([0.0, 0.0, 7.0, 6.5], 3, [3, 2]),
        # Of equals the earlier.
        ([3.0, 3.0], 0, [1, 0]),
        ([9.0, 3.0, 3.0, 3.0], 1, [3, 2, 1, 0]),
        ([9.0, 3.0, 3.0, 4.0], 1, [3, 2, 1, 0]),
        ([2.0, 2.0, 2.0], 0, [2, 1, 0]),
    ],
)
def test_backtracking_walks_back_while_the_loss_does_not_rise(losses, row, looked_at):
    result, steps = walk_back(losses)
    assert result.row == row
    assert result.loss == losses[row]
    assert steps == looked_at


@not_finite
def test_backtracking_takes_a_loss_that_is_not_finite_for_a_rise(bad):
    # At the end it is walked away from, on the way it is not entered.
    assert walk_back([5.0, 4.0, bad])[0].row == 1
    assert walk_back([5.0, bad, 4.0])[0].row == 2
    assert walk_back([9.0, 4.0, bad, bad])[0].row == 1
    for losses in ([bad, bad, bad], [bad]):
        result, _ = walk_back(losses)
        assert (result.row, result.loss) == (0, INF)


@pytest.mark.parametrize(
    ("curvature", "num_cuts"),
    # -t + c t^2 / 2 <= -0.01 t where t <= 1.98 / c.
    [(0.0, 0), (1.0, 0), (1.97, 0), (1.99, 1), (1.98 / 0.801, 1), (1.98 / 0.799, 2), (4.0, 4), (1.98 / 1e-5, 52)],
)
def test_step_size_is_the_largest_power_that_meets_armijo(curvature, num_cuts):
    result, steps = search(lambda t: -t + curvature * t * t / 2, slope=-1.0)
    # Rounding of repeated products.
    assert float(result.step_size) == pytest.approx(0.8**num_cuts, rel=1e-14)
    assert steps == pytest.approx([0.8**i for i in range(1, num_cuts + 1)], rel=1e-14)
    t = 0.8**num_cuts
    assert float(result.loss) == pytest.approx(-t + curvature * t * t / 2, rel=1e-12)


def test_armijo_is_met_with_equality():
    # loss = 0.01 * slope exactly, a hundredth of what the slope promises.
    assert search(lambda t: -0.01 * t, slope=-1.0)[0].step_size == 1
    assert search(lambda t: -0.00999 * t, slope=-1.0)[0].step_size == 0


def test_the_start_need_not_have_loss_zero():
    result, _ = search(lambda t: 7 - 3 * t + 6 * t * t, slope=-3.0, loss=7.0)
    # By hand: 6 t <= 2.97, and 0.8^4 = 0.4096 is the first power below 0.495.
    assert float(result.step_size) == pytest.approx(0.8**4, rel=1e-14)


def test_sixty_cuts_reject_and_the_sixtieth_is_still_taken():
    result, steps = search(lambda t: 3.0 + t, slope=-1.0, loss=3.0)
    assert len(steps) == 60
    assert (result.step_size, result.loss) == (0, 3)
    result, steps = search(lambda t: -1.0 if t < 0.8**59.5 else 1.0, slope=-1.0)
    assert len(steps) == 60
    assert float(result.step_size) == pytest.approx(0.8**60, rel=1e-13)
    assert result.loss == -1


@pytest.mark.parametrize(
    ("slope", "loss"), [(0.0, 0.5), (1.0, 0.5), (1e-300, 0.5), (NAN, 0.5), (-1.0, NAN), (-1.0, INF), (-1.0, -INF)]
)
def test_a_slope_not_below_zero_and_a_start_that_is_not_finite_reject_without_computing_losses(slope, loss):
    result, steps = search(lambda t: -t, slope=slope, loss=loss)
    assert not steps
    assert result.step_size == 0
    np.testing.assert_array_equal(result.loss, loss)


@not_finite
def test_a_loss_on_the_way_that_is_not_finite_cuts_on_until_none_is_left(bad):
    result, steps = search(lambda t: bad if t > 0.6 else -t, slope=-1.0)
    # 1, 0.8 and 0.64 are spoiled.
    assert len(steps) == 3
    assert float(result.step_size) == pytest.approx(0.8**3, rel=1e-15)
    result, _ = search(lambda t: bad, slope=-1.0, loss=2.0)
    assert (result.step_size, result.loss) == (0, 2)


def test_the_loss_at_the_whole_step_is_not_computed_again():
    result, steps = search(lambda t: 1.0, slope=-1.0, loss_at_step=-0.5)
    assert not steps
    assert (result.step_size, result.loss) == (1, -0.5)


def test_steps_keep_their_dtype_and_numbers_are_float64():
    result, steps = search(lambda t: -t + 2 * t * t, slope=-1.0, dtype="float32")
    assert steps == [np.float32(0.8**i) for i in range(1, 5)]
    assert result.step_size.dtype == result.loss.dtype == tf.float64


@modes
@pytest.mark.parametrize(
    ("losses", "row"),
    [
        ([5.0, 3.0, 4.0, 6.0], 1),
        # Wherever it lies, and of equals the first.
        ([1.0, 5.0, 0.5, 6.0], 2),
        ([3.0, 2.0, 2.0, 3.0], 1),
        ([7.0], 0),
        ([NAN, 5.0, -INF, INF], 1),
    ],
)
def test_the_candidate_of_least_loss_is_taken_where_it_is_less_than_at_the_start(losses, row, mode):
    candidates, gradient = tf.range(float(len(losses)))[:, None], tf.ones(1)

    def refuse(step):
        raise AssertionError("all candidates are looked at together")

    @mode
    def find(loss):
        return least_loss(lambda steps: tf.constant(losses, tf.float64), refuse, candidates, loss, gradient)

    for loss, accepted in ((10.0, True), (losses[row], False), (-20.0, False), (NAN, False), (INF, False)):
        found = find(tf.constant(loss, tf.float64))
        assert (found.row, found.candidate, found.candidate_loss, found.num_cuts) == (row, row, losses[row], 0)
        assert found.step_size == float(accepted) and found.step_size.dtype == tf.float64
        np.testing.assert_array_equal(found.loss, losses[row] if accepted else loss)
        np.testing.assert_array_equal(found.losses, losses)


@not_finite
def test_losses_none_of_which_is_finite_take_no_candidate(bad):
    losses, candidates = tf.fill([3], tf.constant(bad, tf.float64)), tf.zeros([3, 2])
    found = least_loss(lambda steps: losses, None, candidates, tf.constant(1.0, tf.float64), None)
    assert (found.step_size, found.loss) == (0, 1)


@modes
@pytest.mark.parametrize("best", range(9))
def test_coarse_to_fine_finds_the_bottom_of_a_valley_at_half_the_cost(best, mode):
    computed = []

    def losses_at(steps):
        computed.append(steps.shape[0])
        return tf.cast(tf.abs(steps[:, 0] - best), tf.float64)

    losses = mode(coarse_to_fine(losses_at))(tf.range(9.0)[:, None]).numpy()
    assert computed == [5, 2]
    assert np.nanargmin(losses) == best and losses[best] == 0
    known = ~np.isnan(losses)
    np.testing.assert_array_equal(losses[known], np.abs(np.arange(9) - best)[known])
