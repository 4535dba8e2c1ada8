"""What optimism promises: it is the share of the loss that steps gain on their own batch and not on the next, and it holds the damping."""

import math
import warnings
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_damping import logs
from training import all_values, assert_equal, fit, normal, renewed, set_weights, small_network, trainable

from keras_hf import (
    ConjugateGradient,
    ConstantDamping,
    DampingCallback,
    GrowingBatch,
    HessianFree,
    Identity,
    LevenbergMarquardt,
    PreconditionedMomentum,
)
from keras_hf.method.optimism import Optimism

NAN, INF = float("nan"), float("inf")


def number(value):
    return tf.constant(value, tf.float64)


def record(reduction, total=0.0, weight=0.0, gained=0.0):
    return Optimism(number(reduction), number(total), number(weight), number(gained))


@pytest.mark.parametrize(
    ("reduction", "before", "now", "share"),
    [
        (0.5, 2.0, 1.75, 0.125),
        (0.5, 2.0, 1.0, -0.25),
        (0.5, 2.0, 9.0, 1.0),  # one bad batch counts as the whole loss, and no more
        (9.0, 2.0, 1.0, 1.0),
        (0.5, 2.0, INF, 1.0),
        (0.5, 2.0, NAN, 1.0),
    ],
)
def test_what_the_next_batch_adds_to_the_mean(reduction, before, now, share):
    first = record(reduction).after(number(before), number(now))
    assert first[1:] == (share, 1.0, reduction / before)
    later = record(reduction, 3.0, 4.0, 6.0).after(number(before), number(now))
    np.testing.assert_allclose(later[1:], [2.7 + share, 4.6, 5.4 + reduction / before])


@pytest.mark.parametrize(
    ("total", "weight", "gained", "size"),
    [
        (0.8, 2.0, 8.0, 0.4),  # of the loss
        (0.2, 2.0, 0.2, 0.5),  # of gains, of which the next batch has none
        (0.2, 2.0, 0.4, 0.25),
        (0.2, 2.0, 0.01, 1.0),  # steps do harm: no more than the whole
        (0.2, 2.0, 0.0, 0.1),  # nothing was gained
        (0.2, 2.0, -0.1, 0.1),
        (-0.2, 2.0, 0.5, -0.1),
    ],
)
def test_its_size_is_the_larger_of_two_shares(total, weight, gained, size):
    assert float(record(0.5, total, weight, gained).size) == pytest.approx(size)


@pytest.mark.parametrize(("reduction", "before"), [(0.0, 2.0), (0.5, NAN), (0.5, INF), (0.5, 0.0), (0.5, -1.0)])
def test_batches_that_say_nothing_leave_the_mean(reduction, before):
    assert record(reduction, 3.0, 4.0, 6.0).after(number(before), number(1.0))[1:] == (3.0, 4.0, 6.0)
    assert math.isnan(Optimism.unknown().after(number(before), number(1.0)).size)


def noisy(num_cases, seed=0):
    x = normal(num_cases, 2, seed=seed)
    return x, np.sin(x[:, :1]) + normal(num_cases, 1, seed=seed + 1)


def batches(x, y, size):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(size)


class Losses(keras.callbacks.Callback):
    """The losses of batches at the weights after every update."""

    def __init__(self, *batches):
        super().__init__()
        self.batches, self.found = batches, []

    def on_train_batch_end(self, batch, logs=None):
        self.found.append([self.model.evaluate(*data, verbose=0) for data in self.batches])


def model_of_batches(solver=ConjugateGradient, constraint=None):
    """A model that uses all of every batch."""
    parts = [Identity()] if solver is ConjugateGradient else []
    optimizer = HessianFree(damping=1e-3, solver=solver(*parts), growing_batch=None, seed=0)
    network = small_network(units=16)
    network.layers[-1].kernel.constraint = constraint
    model = trainable(network, optimizer=optimizer)
    set_weights(model)
    if constraint:
        network.layers[-1].kernel.assign(constraint(network.layers[-1].kernel))
    return model


@pytest.mark.parametrize(
    ("solver", "constraint"),
    [
        (ConjugateGradient, None),
        (ConjugateGradient, keras.constraints.NonNeg()),
        (ConjugateGradient, keras.constraints.UnitNorm()),
        pytest.param(PreconditionedMomentum, None, marks=pytest.mark.slow),
    ],
)
def test_it_is_the_loss_of_the_next_batch_before_and_after_the_step(float64, solver, constraint):
    x, y = noisy(120)
    parts = [(x[start : start + 40], y[start : start + 40]) for start in (0, 40, 80)]
    model = renewed(model_of_batches, solver, constraint)
    at_start = [model.evaluate(*part, verbose=0) for part in parts]
    losses, seen = Losses(*parts), []
    record = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["optimism"]))
    fit(model, batches(x, y, 40), callbacks=[ConstantDamping(), losses, record])
    course = np.array([at_start, *losses.found])
    shares, gains, expected = [], [], []
    for update in (1, 2):
        before, now = course[update - 1 : update + 1, update]
        own = course[update - 1, update - 1] - course[update, update - 1]
        shares = [*shares, (own - (before - now)) / before]
        gains = [*gains, own / before]
        weights = 0.9 ** np.arange(update)[::-1]
        expected.append(max(np.average(shares, weights=weights), min(weights @ shares / (weights @ gains), 2) / 2))
    assert math.isnan(seen[0])
    np.testing.assert_allclose(seen[1:], expected, rtol=1e-5)


@pytest.mark.slow
def test_one_batch_of_all_cases_is_not_asked_and_its_user_may_have_a_metric_of_that_name():
    x, y = noisy(40)
    model = model_of_batches()
    assert "optimism" not in fit(model, x, y, epochs=2)
    assert not model.setup.has_other_cases
    # Several batches need another trace, which serves one batch, too: the same cases gain what they gained.
    assert len(fit(model, x, y, batch_size=20, epochs=2)["optimism"]) == 2
    found = np.abs(fit(model, x, y, epochs=8)["optimism"])
    assert (np.diff(found[1:]) < 0).all()

    def optimism(y_true, y_pred):
        return 9.0 + 0.0 * y_pred[:, 0]

    dampings = []
    for metrics in ([], [optimism]):
        model = model_of_batches()
        model.compile(model.optimizer, "mse", metrics=metrics)
        dampings.append(fit(model, x, y, epochs=4)["damping"])
    assert dampings[0] == dampings[1]


@pytest.mark.slow
def test_a_part_that_grows_answers_for_its_steps_until_it_is_the_batch():
    x, y = noisy(80)
    model = trainable(small_network(), growing_batch=GrowingBatch(10), damping=1e-3)
    assert math.isnan(fit(model, batches(x, y, 40), epochs=1)["optimism"][-1])
    model = trainable(small_network(), growing_batch=GrowingBatch(30), damping=1e-3)
    assert np.isfinite(fit(model, batches(x, y, 40), epochs=1)["optimism"][-1])


def test_a_rejected_step_is_not_judged():
    x, y = noisy(80)
    model = renewed(model_of_batches)
    poisoned = np.where(np.arange(80)[:, None] < 40, np.nan, y)
    with pytest.warns(UserWarning, match="hold numbers that are not finite"):
        found = fit(model, batches(x, poisoned, 40), callbacks=[ConstantDamping()])
    assert math.isnan(found["optimism"][-1]) and model.optimizer.state().optimism.reduction != 0


@pytest.mark.parametrize(
    ("optimism", "ratio", "expected"),
    [
        (NAN, 1.0, 6.0 / 2.5),
        (-0.3, 1.0, 6.0 / 2.5),
        (0.0, 1.0, 6.0 / 2.5),
        (0.25, 1.0, 6.0 / 2.5),
        (0.375, 1.0, 6.0 / 2.5**0.25),
        (0.375, 0.5, 6.0),
        (0.5, 1.0, 6.0),
        (0.75, 1.0, 6.0 * 2.5**0.25),
        (0.51, 1.0, 6.0 * 2.5**0.0004),
        (0.51, 0.5, 6.0 * 2.5**0.04),  # held by the ratio: nothing else moves it
        (0.75, 0.5, 15.0),
        (1.0, 0.5, 15.0),
        (1.0, 1.0, 15.0),
        (1.0, -INF, 15.0),
        (0.25, -INF, 15.0),
    ],
)
def test_the_damping_falls_no_further_than_the_batches_bear(monkeypatch, optimism, ratio, expected):
    model = renewed(model_of_batches)
    monkeypatch.setattr(type(model), "setup", SimpleNamespace(has_other_cases=True))
    rule = LevenbergMarquardt()
    rule.set_model(model)
    rule.on_train_batch_end(0, {**logs(ratio), "optimism": optimism})
    assert float(model.optimizer.damping) == pytest.approx(expected)


def test_where_updates_are_small_and_many_a_held_damping_rises_by_as_much_less(monkeypatch):
    model, rule = renewed(model_of_batches, PreconditionedMomentum), LevenbergMarquardt()
    monkeypatch.setattr(type(model), "setup", SimpleNamespace(has_other_cases=True))
    rule.set_model(model)
    for optimism, expected in ((0.51, 6.0 * 2.5**0.005), (1.0, 15.0)):
        rule.on_train_batch_end(0, {**logs(0.5), "optimism": optimism})
        assert float(model.optimizer.damping) == pytest.approx(expected)


@pytest.mark.parametrize("nothing_to_learn", [{"gradient_norm": 0.0}, {"gradient_norm": NAN}, {"converged": 1}])
def test_the_damping_stays_where_no_other_gives_a_better_step(monkeypatch, nothing_to_learn):
    model, rule = renewed(model_of_batches), LevenbergMarquardt()
    monkeypatch.setattr(type(model), "setup", SimpleNamespace(has_other_cases=True))
    rule.set_model(model)
    rule.on_train_batch_end(0, {**logs(NAN), "optimism": 0.9, **nothing_to_learn})
    assert float(model.optimizer.damping) == pytest.approx(6.0)


def test_a_rule_of_a_users_own_is_held_in_the_same_way(monkeypatch):
    class Hundredth(DampingCallback):
        def next_damping(self, damping, logs):
            return damping / 100

    model, rule = renewed(model_of_batches), Hundredth()
    monkeypatch.setattr(type(model), "setup", SimpleNamespace(has_other_cases=True))
    rule.set_model(model)
    rule.on_train_batch_end(0, {**logs(1.0), "optimism": 0.375})
    assert float(model.optimizer.damping) == pytest.approx(6.0 / 100**0.25)


class Unheld(LevenbergMarquardt):
    """By the reduction ratio alone."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.optimizer.damping.assign(self.within_limits(self.next_damping(logs["damping"], logs)))


@pytest.mark.parametrize("rule", [LevenbergMarquardt, pytest.param(Unheld, marks=pytest.mark.slow)])
def test_weights_do_not_follow_the_noise_of_batches_smaller_than_their_number(rule):
    model, (x, y), test = renewed(model_of_batches), noisy(480), normal(1000, 2, seed=9)
    with warnings.catch_warnings():
        # Of the small batches, and of what becomes of the weights.
        warnings.simplefilter("ignore")
        fit(model, batches(x, y, 8), epochs=6, callbacks=[rule()])
    error = np.mean((model.predict(test, verbose=0) - np.sin(test[:, :1])) ** 2)
    # The noise has a variance of 1. By the ratio alone the damping falls to 1e-13, and the error rises to 1e30.
    assert error < 0.8 if rule is LevenbergMarquardt else not error < 100


def test_a_run_on_batches_that_is_saved_goes_on_bit_by_bit(tmp_path):
    x, y = noisy(60)
    model = renewed(model_of_batches)
    fit(model, batches(x, y, 20), epochs=2)
    model.save(tmp_path / "run.keras")
    for going_on in (model, keras.models.load_model(tmp_path / "run.keras")):
        fit(going_on, batches(x, y, 20), epochs=2)
    assert_equal(all_values(model), all_values(going_on))
