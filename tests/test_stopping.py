import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_hf.solvers.stopping import RelativeProgress, ResidualTolerance, StoppingRule

# A new rule stands here, with settings other than its defaults.
RULES = [RelativeProgress(tolerance=0.125), ResidualTolerance(rtol=0.3), ResidualTolerance(rtol=None)]

each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}-{rule.get_config()}")


def stops(rule, iteration, values=None, residual_norm=1.0, b_norm=1.0):
    """Asks a rule after an iteration; `values` is indexed by iteration."""
    values = None if values is None else tf.constant(values, tf.float64)
    norms = [tf.constant(norm, tf.float64) for norm in (residual_norm, b_norm)]
    return bool(rule.should_stop(tf.constant(iteration), lambda i: values[i], *norms))


def ending(iteration, value, older, window):
    """Values up to an iteration that are `older` up to a window before its end, and `value` after."""
    return [older] * (iteration - window + 1) + [value] * window


@each_rule
def test_configuration_survives_saving(rule):
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(rule))
    assert type(restored) is type(rule)
    assert restored.get_config() == rule.get_config()


@each_rule
def test_compiled_and_eager_answers_agree(rule):
    @tf.function
    def compiled(iteration, values, residual_norm, b_norm):
        return rule.should_stop(iteration, lambda i: tf.gather(values, i), residual_norm, b_norm)

    values = -1 + np.geomspace(1, 1e-3, 41)
    answers = set()
    for iteration in range(1, 41):
        norm = tf.constant(1 / iteration, tf.float64)
        graph = compiled(tf.constant(iteration), tf.constant(values), norm, tf.constant(1.0, tf.float64))
        assert graph == stops(rule, iteration, values, norm)
        answers.add(bool(graph))
    assert answers == {False, True}


def test_the_base_answers_nothing():
    with pytest.raises(NotImplementedError):
        stops(StoppingRule(), 1)


def test_relative_progress_looks_back_a_tenth_of_the_iterations_and_at_least_ten():
    windows = {11: 10, 12: 10, 99: 10, 100: 10, 101: 11, 110: 11, 111: 12, 120: 12, 121: 13, 250: 25}
    for iteration, window in windows.items():
        values = np.full(iteration + 1, -1.0)
        assert stops(RelativeProgress(), iteration, values)
        for place in {0, *range(iteration - window - 1, iteration - window + 2), iteration - 1, iteration} - {-1}:
            # One value of zero stops the rule from stopping where it looks, and nowhere else.
            spoiled = np.where(np.arange(iteration + 1) == place, 0.0, values)
            looked_at = place in (iteration - window, iteration)
            assert stops(RelativeProgress(), iteration, spoiled) is not looked_at, (iteration, place)


def test_relative_progress_never_stops_before_iteration_eleven():
    # No progress at all.
    answers = [stops(RelativeProgress(), iteration, [-1.0] * 21) for iteration in range(1, 21)]
    assert answers == [False] * 10 + [True] * 10


@pytest.mark.parametrize(
    ("value", "older", "answer"),
    [
        (-8.0, -3.0, False),  # (-8 + 3) / -8 = 5/8, which is not below 10/16
        (-8.0, -3.0001, True),
        (-8.0, -2.9999, False),
        (-8.0, -8.0, True),
        (-8.0, -9.0, True),  # a rise, as rounding makes it
        (-1e-300, -3.8e-301, True),  # 0.62 of however little
        (-1e-300, -3.7e-301, False),
    ],
)
def test_relative_progress_stops_below_window_times_tolerance(value, older, answer):
    assert stops(RelativeProgress(1 / 16), 30, ending(30, value, older, 10)) is answer


def test_relative_progress_allows_more_of_a_longer_window():
    # At iteration 200 the window of 20 doubles the bound: 0.8 of the whole is too little there and enough before.
    for iteration in (11, 45, 100):
        assert not stops(RelativeProgress(1 / 20), iteration, ending(iteration, -10.0, -2.0, 10))
    assert stops(RelativeProgress(1 / 20), 200, ending(200, -10.0, -2.0, 20))


@pytest.mark.parametrize(
    ("value", "older"),
    [(0.0, -1.0), (1.0, -1.0), (-1.0, 0.0), (-1.0, 1.0), (0.0, 0.0), (1.0, 1.0), (np.nan, -1.0), (-1.0, np.nan)],
)
def test_relative_progress_waits_until_both_values_are_negative(value, older):
    assert not stops(RelativeProgress(0.2), 30, ending(30, value, older, 10))


def test_relative_progress_stops_a_geometric_decrease_at_the_iteration_derived_by_hand():
    # phi_i = -(1 - r^i): the progress r^(i-10) (1 - r^10) / (1 - r^i) falls below 10 * tolerance for the first time at i = 67 for r = 0.9:
    # 0.9^57 * 0.6513 / 0.9991 = 0.001607, and 0.001786 at i = 66.
    values = [-(1 - 0.9**i) for i in range(101)]
    first = next(i for i in range(1, 101) if stops(RelativeProgress(1.7e-4), i, values))
    assert first == 67


def test_tolerances_are_by_default_that_of_martens_and_the_share_that_shrinks_with_b():
    assert RelativeProgress().get_config() == {"tolerance": 5e-4}
    assert ResidualTolerance().get_config() == {"rtol": None}


@pytest.mark.parametrize(
    ("rtol", "residual_norm", "b_norm", "answer"),
    [
        (0.25, 0.99, 4.0, True),
        (0.25, 1.0, 4.0, False),  # not below
        (0.25, 1.01, 4.0, False),
        (0.25, np.nan, 4.0, False),
        (None, 0.99 / 64, 1 / 16, True),  # sqrt(1/16) = 1/4 of 1/16
        (None, 1 / 64, 1 / 16, False),
        (None, 0.12, 1 / 4, True),  # where the two bounds meet
        (None, 1 / 8, 1 / 4, False),
        (None, 4.4, 9.0, True),  # 1/2, not sqrt(9)
        (None, 4.5, 9.0, False),
    ],
)
def test_residual_tolerance_stops_below_its_share_of_b(rtol, residual_norm, b_norm, answer):
    assert stops(ResidualTolerance(rtol), 1, None, residual_norm, b_norm) is answer


@pytest.mark.parametrize("bad", [0, 0.0, -0.1, float("nan"), float("inf"), "0.1", True, [0.1], None])
def test_bad_tolerances_are_refused(bad):
    with pytest.raises(ValueError, match=r"`tolerance` must be a finite number > 0. Received: tolerance="):
        RelativeProgress(bad)
    # There `None` means something.
    if bad is not None:
        with pytest.raises(ValueError, match=r"`rtol` must be a finite number > 0. Received: rtol="):
            ResidualTolerance(bad)
