import math
from types import SimpleNamespace
from typing import NamedTuple

import keras
import numpy as np
import pytest
from training import fit, renewed, trainable

from keras_hf import (
    ArcStepDamping,
    ConstantDamping,
    DampingCallback,
    DirectSolver,
    EmpiricalFisherDiagonal,
    LevenbergMarquardt,
    PreconditionedMomentum,
)

NAN, INF = math.nan, math.inf


class Doubling(DampingCallback):
    """The least that a rule of one's own must be."""

    def next_damping(self, damping, logs):
        return 2 * damping


# Rules by what they do after an update of ratio 1: by this factor the damping moves. A new rule stands here.
# Least squares are what their quadratic model says, so that every update of a linear network has ratio 1, above, between and below these thresholds.
RULES = {
    "lowering": (LevenbergMarquardt(), 1 / 2.5),
    "lowering_by_two": (LevenbergMarquardt(factor=2), 1 / 2),
    "keeping": (LevenbergMarquardt(low=0.5, high=1.5), 1),
    "raising": (LevenbergMarquardt(low=2, high=3), 2.5),
    "constant": (ConstantDamping(), 1),
    "own": (Doubling(), 2),
}


def linear_model(damping=1.0, loss="mse", **compile_arguments):
    """A linear network of two weights, zero at first; least squares by default."""
    output = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    network = keras.Sequential([keras.Input((2,)), output])
    # A preconditioner that takes half as long to trace as the default one.
    settings = {"damping": damping, "preconditioner": EmpiricalFisherDiagonal(), "growing_batch": None}
    return trainable(network, loss, compile_arguments=compile_arguments, **settings)


def least_squares():
    """Cases that no linear network fits."""
    x = np.random.default_rng(0).normal(size=(8, 2))
    return x, np.sin(3 * x[:, :1]) + 1


class Run(NamedTuple):
    """One call of `fit`: the logs of each update, the damping after the last and how often the model was traced until then."""

    logs: list
    damping_after: float
    num_traces: int

    def series(self, key):
        return [logs[key] for logs in self.logs]

    @property
    def dampings(self):
        return [*self.series("damping"), self.damping_after]


def train(model, x, y, rule, **kwargs):
    """Fits a model, and returns the `Run`."""
    updates = []
    record = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: updates.append(dict(logs)))
    fit(model, x, y, callbacks=[rule, record], **kwargs)
    return Run(updates, float(model.optimizer.damping), model.num_traces)


def rested(damping):
    """The one linear model, which is traced once, with weights of zero and this damping."""
    model = renewed(linear_model)
    model.optimizer.damping.assign(damping)
    return model


def logs(ratio, damping=6.0, gradient_norm=1.0):
    return {"reduction_ratio": ratio, "damping": damping, "gradient_norm": gradient_norm}


def with_solver(rule, solver):
    """The rule, set to judge the updates of a solver."""
    rule.set_model(SimpleNamespace(optimizer=SimpleNamespace(solver=solver)))
    return rule


def damping_after(callback, logs, model=None):
    """The optimizer's damping after an update with these logs."""
    model = renewed(linear_model) if model is None else model
    callback.set_model(model)
    callback.on_train_batch_end(0, logs)
    return float(model.optimizer.damping)


@pytest.mark.parametrize(
    ("expected", "ratios"),
    [
        (15.0, [-INF, -3.0, 0.0, math.nextafter(0.25, 0)]),
        (6.0, [0.25, 0.5, 0.9]),
        (6.0 / 2.5, [math.nextafter(0.9, 1), 1.0, 40.0, INF]),
    ],
)
def test_levenberg_marquardt_follows_its_table(expected, ratios):
    assert {LevenbergMarquardt().next_damping(6.0, logs(ratio)) for ratio in ratios} == {expected}


def test_levenberg_marquardt_uses_its_own_thresholds_and_factor():
    rule = LevenbergMarquardt(low=-1.0, high=0.125, factor=4)
    answers = {ratio: rule.next_damping(8.0, logs(ratio)) for ratio in (-1.5, -1.0, 0.0, 0.125, 0.25)}
    assert answers == {-1.5: 32.0, -1.0: 8.0, 0.0: 8.0, 0.125: 8.0, 0.25: 2.0}


def test_small_updates_move_the_damping_by_the_eighth_root_and_a_rejected_one_by_all_of_the_factor():
    rule, small = with_solver(LevenbergMarquardt(factor=4.0), PreconditionedMomentum()), {"step_size": 1.0}
    assert rule.next_damping(8.0, {**logs(1.0), **small}) == pytest.approx(8.0 / 4.0**0.125)
    assert rule.next_damping(8.0, {**logs(0.1), **small}) == pytest.approx(8.0 * 4.0**0.125)
    assert rule.next_damping(8.0, {**logs(-INF), **small, "step_size": 0.0}) == 32.0
    # Lost in rounding: far too small.
    assert rule.next_damping(8.0, {**logs(NAN), **small}) == 2.0


def test_the_damping_moves_only_where_that_can_show_something():
    rule, without = LevenbergMarquardt(), logs(NAN)
    ratios_at_rest = [logs(ratio, gradient_norm=0.0) for ratio in (NAN, -INF, 0.0, 1.0)]
    hopeless = [
        {**without, **outcome} for outcome in ({"converged": 1}, {"gradient_norm": NAN}, {"gradient_norm": INF})
    ]
    assert {rule.next_damping(6.0, outcome) for outcome in ratios_at_rest + hopeless} == {6.0}
    # The step was lost in rounding: a longer one may show something.
    assert {rule.next_damping(6.0, outcome) for outcome in (without, {**without, "converged": 0})} == {6.0 / 2.5}


def arc_logs(place, step_size=1.0, **others):
    """The logs of an update that searched along an arc; the ratio says the contrary of the place."""
    ratio = 0.0 if place > 0.1 else 1.0
    return {**logs(ratio), "arc_step": place, "step_size": step_size, **others}


@pytest.mark.parametrize("rule", [ArcStepDamping(), LevenbergMarquardt(low=-9, high=9, factor=2)], ids=["arc", "ratio"])
def test_the_place_on_the_arc_moves_the_damping_under_either_rule(rule):
    with_solver(rule, DirectSolver())
    for factor, places in (
        (0.4, [1.0, 0.4]),
        (1, [math.nextafter(0.4, 0), 0.2, 0.1]),
        (2.5, [math.nextafter(0.1, 0), 2.0**-10]),
    ):
        for place in places:
            assert rule.next_damping(6.0, arc_logs(place)) == pytest.approx(6 * factor, rel=1e-15)
            # A rejected step was none, wherever the least loss lay.
            assert rule.next_damping(6.0, arc_logs(place, step_size=0.0)) == pytest.approx(15.0, rel=1e-15)


@pytest.mark.parametrize("rule", [ArcStepDamping(), LevenbergMarquardt()], ids=["arc", "ratio"])
def test_where_no_step_can_show_anything_the_place_on_the_arc_moves_nothing(rule):
    with_solver(rule, DirectSolver())
    for place in (1.0, 2.0**-10):
        for outcome in ({"gradient_norm": 0.0}, {"gradient_norm": NAN}, {"gradient_norm": INF}, {"converged": 1}):
            assert rule.next_damping(6.0, arc_logs(place, **outcome)) == 6.0
        assert rule.next_damping(6.0, arc_logs(place, converged=0)) != 6.0


def test_along_a_line_smaller_dampings_are_held():
    rule = LevenbergMarquardt()
    with_solver(rule, DirectSolver(order=1))
    for factor, places in ((0.1, [1.0, 0.1]), (1, [0.0999, 0.02]), (10, [0.0199])):
        for place in places:
            assert rule.next_damping(6.0, arc_logs(place)) == pytest.approx(6 * factor, rel=1e-15)


def test_arc_step_damping_uses_its_own_thresholds_factor_and_limits():
    rule = ArcStepDamping(low=0.25, high=0.5, factor=4)
    answers = {place: rule.next_damping(8.0, arc_logs(place)) for place in (0.125, 0.25, 0.5)}
    assert answers == {0.125: 32.0, 0.25: 8.0, 0.5: 2.0}
    assert damping_after(ArcStepDamping(min_damping=5.0), arc_logs(1.0)) == 5.0
    assert damping_after(ArcStepDamping(max_damping=7.0), arc_logs(0.001)) == 7.0


def test_arc_step_damping_without_an_arc_is_refused():
    message = "`ArcStepDamping` needs a solver that searches along an arc.*ConjugateGradient.*Use `LevenbergMarq"
    with pytest.raises(ValueError, match=message):
        train(renewed(linear_model), *least_squares(), ArcStepDamping())


@pytest.mark.parametrize("name", ["mu", "arc_step"])
def test_a_metric_with_the_name_of_a_solvers_entry_changes_nothing(name):
    with_metric = {**logs(1.0), "step_size": 1.0, name: 0.001}
    assert damping_after(LevenbergMarquardt(), with_metric) == damping_after(LevenbergMarquardt(), logs(1.0))


@pytest.mark.parametrize(("ratio", "limit"), [(-INF, 2.0**46), (1.0, 2.0**-46)])
def test_damping_stays_within_what_rounding_leaves_of_the_scale(ratio, limit):
    model = renewed(linear_model)
    model.optimizer.curvature_scale.assign(8.0)
    end = damping_after(LevenbergMarquardt(factor=2), logs(ratio, damping=8 * limit), model)
    assert end == 8 * limit
    # A hundred updates on end.
    for _ in range(100):
        end = damping_after(LevenbergMarquardt(), logs(ratio, damping=end), model)
    assert end == 8 * limit


# With two weights and a scale of 2 rounding decides below eps sqrt(2) 2, which is 2^-21.5.
@pytest.mark.slow
def test_batches_that_are_fitted_do_not_ruin_each_other():
    """By the reduction ratio alone the damping falls to 1e-8, and the losses rise to 950 after 30 updates."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 30)), rng.integers(0, 5, size=60)
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.Input((30,)), keras.layers.Dense(20, "tanh"), keras.layers.Dense(5)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    settings = {"damping": None, "preconditioner": EmpiricalFisherDiagonal(), "growing_batch": None}
    losses = fit(trainable(network, loss, **settings), x, y, batch_size=20, epochs=60)["loss"]
    assert max(losses[10:]) < losses[0] / 2 and losses[-1] < losses[0] / 10


def test_a_damping_of_zero_stays_zero():
    for ratio in (-INF, 1.0):
        assert damping_after(LevenbergMarquardt(), logs(ratio, damping=0.0)) == 0.0


@pytest.mark.parametrize(
    ("ratio", "limits", "expected"),
    [
        (0.0, {"max_damping": 8.0}, 8.0),
        (0.0, {"max_damping": 100.0}, 15.0),
        (1.0, {"min_damping": 5.0}, 5.0),
        (1.0, {"min_damping": 2.0}, float(np.float32(6 / 2.5))),
        # A damping outside the limits is brought inside even where the rule would keep it.
        (0.5, {"max_damping": 2.0}, 2.0),
        (0.5, {"min_damping": 7.0}, 7.0),
        (0.0, {"min_damping": 3.0, "max_damping": 3.0}, 3.0),
    ],
)
def test_damping_stays_within_its_limits(ratio, limits, expected):
    assert damping_after(LevenbergMarquardt(**limits), logs(ratio)) == expected


def test_damping_moves_in_every_third_update():
    model, rule = renewed(linear_model), LevenbergMarquardt(factor=2, interval=3)
    rule.set_model(model)
    dampings = []
    for number in range(1, 8):
        model.optimizer.iterations.assign(number)
        rule.on_train_batch_end(0, logs(1.0, damping=float(model.optimizer.damping)))
        dampings.append(float(model.optimizer.damping))
    assert dampings == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_limits_hold_for_a_rule_of_ones_own_and_the_base_has_no_rule():
    assert damping_after(Doubling(max_damping=10), logs(1.0)) == 10.0
    with pytest.raises(NotImplementedError):
        damping_after(DampingCallback(), logs(1.0))


def test_constant_damping_leaves_what_another_callback_assigned_and_welcomes_several_updates_between_two_calls():
    rule, model = ConstantDamping(), linear_model(steps_per_execution=2)
    model.optimizer.damping.assign(3.0)
    assert damping_after(rule, logs(-INF, damping=1.0), model) == 3.0
    rule.on_train_begin()


def test_fit_moves_the_damping_by_the_rule_without_tracing_again():
    for name, (rule, factor) in RULES.items():
        run = train(rested(0.75), *least_squares(), rule, epochs=4)
        # The ratio is 1 but for float32: the reduction of the first update is 1e-2 and more of a loss whose steps are 1e-7.
        assert run.series("reduction_ratio")[0] == pytest.approx(1, abs=1e-4)
        assert run.dampings[0] == 0.75
        # The variable is float32, and so is each product.
        np.testing.assert_allclose(run.dampings, 0.75 * factor ** np.arange(5.0), rtol=5e-7, err_msg=name)
        assert run.num_traces == 1


def test_damping_goes_on_over_two_fits():
    model = rested(1.0)
    first, second = (train(model, *least_squares(), LevenbergMarquardt(), epochs=2) for _ in range(2))
    assert second.dampings[0] == first.damping_after
    np.testing.assert_allclose([*first.series("damping"), *second.dampings], 2.5 ** -np.arange(5.0), rtol=5e-7)
    assert second.num_traces == 1


def test_damping_is_kept_in_fit_where_the_gradient_is_zero():
    x, y = least_squares()
    # Weights of zero fit targets of zero without rounding.
    with pytest.warns(UserWarning, match="The gradient of the first update is zero"):
        run = train(rested(2.0), x, 0 * y, LevenbergMarquardt(), epochs=2)
    assert run.series("gradient_norm") == [0, 0]
    assert np.isnan(run.series("reduction_ratio")).all()
    assert run.dampings == [2, 2, 2]


def test_damping_adapts_after_every_batch():
    with pytest.warns(UserWarning, match="An update on 8 cases says little"):
        x, y = least_squares()
        # Not a model that others share: several batches need a trace of their own.
        run = train(linear_model(), np.tile(x, (2, 1)), np.tile(y, (2, 1)), Doubling(), batch_size=8)
    assert run.dampings == [1, 2, 4]


def test_damping_follows_the_ratios_of_a_curved_loss():
    # From far away the curvature of log cosh tells little: some steps are too bold, some are not.
    model = linear_model(damping=1e-3, loss="log_cosh")
    x, y = least_squares()
    run = train(model, x, 100 * y, LevenbergMarquardt(factor=8), epochs=8)
    directions = set()
    for ratio, before, after in zip(run.series("reduction_ratio"), run.dampings, run.dampings[1:], strict=False):
        if np.isnan(ratio):  # at the end, where there is nothing left to measure
            continue
        direction = -1 if ratio > 0.9 else 0 if ratio >= 0.25 else 1
        # A factor of 8 is exact in any binary float.
        assert after == before * 8.0**direction
        directions.add(direction)
    assert {-1, 1} <= directions
    assert run.num_traces == 1


@pytest.mark.parametrize("rule", [LevenbergMarquardt, ArcStepDamping, ConstantDamping, Doubling])
def test_a_model_without_hessian_free_is_refused(rule):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    message = (
        f"`{rule.__name__}` adapts the damping of `HessianFree`. Received: a model whose optimizer is .*SGD.*HFModel"
    )
    with pytest.raises(ValueError, match=message):
        model.fit(*least_squares(), callbacks=[rule()], verbose=0)


@pytest.mark.parametrize("rule", [LevenbergMarquardt, Doubling])
def test_several_updates_between_two_calls_are_refused(rule):
    model = linear_model(steps_per_execution=2)
    message = f"`{rule.__name__}` must see every update. Received: steps_per_execution=2..*`ConstantDamping"
    with pytest.raises(ValueError, match=message):
        model.fit(*least_squares(), callbacks=[rule()], verbose=0)
    assert not model.num_traces


def test_constant_damping_welcomes_several_updates_between_two_calls():
    rule = ConstantDamping()
    rule.set_model(linear_model(steps_per_execution=2))
    rule.on_train_begin()


NO_NUMBER, NOT_POSITIVE = "must be a finite number. Received", "must be a finite number > 0. Received"
LIMITS = "`min_damping` must not exceed `max_damping`. Received: min_damping=2.0, max_damping=1.0"
ORDER = "`low` must be less than `high`"


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (LevenbergMarquardt, {"low": NAN}, f"`low` {NO_NUMBER}: low=nan"),
        (LevenbergMarquardt, {"high": INF}, f"`high` {NO_NUMBER}: high=inf"),
        (LevenbergMarquardt, {"low": 0.9}, f"{ORDER}. Received: low=0.9, high=0.9"),
        (LevenbergMarquardt, {"low": 0.5, "high": 0.25}, f"{ORDER}. Received: low=0.5, high=0.25"),
        (LevenbergMarquardt, {"factor": 1}, "`factor` must be > 1. Received: factor=1"),
        (LevenbergMarquardt, {"factor": INF}, f"`factor` {NOT_POSITIVE}: factor=inf"),
        (
            LevenbergMarquardt,
            {"min_damping": -1.0},
            "`min_damping` must be a finite number >= 0. Received: min_damping=-1",
        ),
        (
            LevenbergMarquardt,
            {"min_damping": INF},
            "`min_damping` must be a finite number >= 0. Received: min_damping=inf",
        ),
        (LevenbergMarquardt, {"max_damping": 0}, f"`max_damping` {NOT_POSITIVE}: max_damping=0"),
        (LevenbergMarquardt, {"max_damping": NAN}, f"`max_damping` {NOT_POSITIVE}: max_damping=nan"),
        (LevenbergMarquardt, {"interval": 0}, "`interval` must be an integer >= 1. Received: interval=0"),
        (LevenbergMarquardt, {"min_damping": 2.0, "max_damping": 1.0}, LIMITS),
        (ArcStepDamping, {"low": 0}, f"`low` {NOT_POSITIVE}: low=0"),
        (ArcStepDamping, {"low": 0.4}, f"{ORDER}, and `high` at most 1. Received: low=0.4, high=0.4"),
        (ArcStepDamping, {"high": 1.5}, "`high` at most 1. Received: low=0.1, high=1.5"),
        (ArcStepDamping, {"high": NAN}, f"`high` {NOT_POSITIVE}: high=nan"),
        (ArcStepDamping, {"factor": 1}, "`factor` must be > 1. Received: factor=1"),
        (ArcStepDamping, {"factor": -2}, f"`factor` {NOT_POSITIVE}: factor=-2"),
        (ArcStepDamping, {"min_damping": 2.0, "max_damping": 1.0}, LIMITS),
    ],
)
def test_bad_arguments_are_refused(rule, arguments, message):
    with pytest.raises(ValueError, match=message):
        rule(**arguments)
