"""Damping rules: Keras callbacks that read the logs of an update and assign one scalar, the optimizer's damping."""

import math

import keras

from keras_hf.common.checks import count, finite, positive
from keras_hf.method.scale import damping_limits
from keras_hf.solvers.solver import Solver

# The share of the loss up to which steps may gain on their own batch what they do not gain on the next. Of least squares with noise it is twice the
# effective number of parameters of a step over the number of cases: a quarter of a parameter for each case.
_MOST_OPTIMISM = 0.5
# By which the damping rises where they gain twice as much.
_FACTOR = 2.5


def _number(value):
    """The value of a Keras variable, also of one on several replicas, or of an initial damping."""
    return value.numpy().item() if isinstance(value, keras.Variable) else value


class DampingCallback(keras.callbacks.Callback):
    """Base class of damping rules: reads the logs of each update and assigns `model.optimizer.damping`.

    Subclasses implement `next_damping`. The damping is kept from one `fit` call to the next and saved with the optimizer; nothing is reset. It stays
    within the limits below, and within limits set by rounding: from eps^2 (eps^1.25 for `PreconditionedMomentum`, and in float64 for
    `DirectSolver`) to eps^-2 times the curvature along the first gradient, or with `DirectSolver` the trace of a later one if it is less, where eps
    is the machine epsilon of the weights' float type. A damping of 0 is exempt from the latter.

    A step is fitted to the noise of its batch, too, the more so the smaller the damping is; the reduction ratio, which is of the same cases, does not
    show it. Where cases come in several batches, `optimism` in the logs does: what steps gain on their own batch and not on the next one, as a share
    of the loss, or as half of a share of the gains if that is larger, a mean over updates. Up to a quarter the rule is followed; then it lowers the
    damping by the power `(2 - 4 o)^2` of its factor, o being the optimism, and above a half the damping rises, by `2.5^((2 o - 1)^2)`. Where the rule
    holds it, steps are as long as the model is valid and gain nothing on the next batch: then it rises by at least `2.5^(4 o - 2)`, up to 2.5 (by the
    eighth root of that with `PreconditionedMomentum`). So the damping stays where batches of that size bear it, and rises where they do not. Parts of
    a batch that grow are not judged by this: they grow.

    Args:
        min_damping: Float >= 0, the smallest damping assigned.
        max_damping: Float > 0, the largest damping assigned.

    Raises:
        ValueError: If a limit is out of its range or `min_damping` exceeds `max_damping`; at the start of training, if the model's optimizer has no
            damping, or if the rule cannot see every update (`steps_per_execution > 1`).
    """

    # Whether the rule must see every update.
    adaptive = True

    def __init__(self, min_damping=0.0, max_damping=math.inf):
        super().__init__()
        self.min_damping = finite("min_damping", min_damping, minimum=0)
        self.max_damping = max_damping if max_damping == math.inf else positive("max_damping", max_damping)
        if self.min_damping > self.max_damping:
            raise ValueError(
                f"`min_damping` must not exceed `max_damping`. Received: min_damping={min_damping}, max_damping={max_damping}."
            )

    def next_damping(self, damping, logs):
        """Returns the damping of the next update.

        Args:
            damping: Float, the damping of this update.
            logs: Dict of floats, the logs of this update; see `HFModel`.
        """
        raise NotImplementedError

    @property
    def solver(self):
        """The solver whose updates the rule judges: that of the model, or before one is set, a `Solver` as most are."""
        return Solver if self.model is None else self.model.optimizer.solver

    def on_train_begin(self, logs=None):
        if not hasattr(self.model.optimizer, "damping"):
            raise ValueError(
                f"`{type(self).__name__}` adapts the damping of `HessianFree`. Received: a model whose optimizer is "
                f"{self.model.optimizer!r}. Train with `HFModel(network)` compiled with `HessianFree()`."
            )
        if self.adaptive and self.model.steps_per_execution > 1:
            raise ValueError(
                f"`{type(self).__name__}` must see every update. Received: steps_per_execution={self.model.steps_per_execution}. "
                "Compile with `steps_per_execution=1`, or use `ConstantDamping()`."
            )

    def on_train_batch_end(self, batch, logs=None):
        # NaN: the first update could not find it yet, and there is nothing to adapt.
        if self.adaptive and not math.isnan(logs["damping"]):
            before, setup = logs["damping"], self.model.setup
            # Otherwise it is a metric of that name, or says nothing of this update.
            is_judged = setup is not None and setup.has_other_cases and _can_learn(logs)
            optimism = logs.get("optimism", math.nan) if is_judged else math.nan
            damping = _as_batches_bear(self.next_damping(before, logs), before, optimism, self.solver.factor_power)
            self.model.optimizer.damping.assign(self.within_limits(damping))

    def within_limits(self, damping):
        """Returns the damping, clipped to the limits."""
        optimizer, scale = self.model.optimizer, self._scale(damping)
        if scale:
            dtype = optimizer.damping.dtype
            least, greatest = damping_limits(scale, dtype, self.solver.least_damping(dtype))
            damping = min(max(damping, least), greatest)
        return min(max(damping, self.min_damping), self.max_damping)

    def _scale(self, damping):
        """Returns the scale of the curvature; 0 where it is not known, or the damping is 0 and to stay so."""
        optimizer = self.model.optimizer
        return _number(optimizer.curvature_scale) if damping and optimizer.built else 0


def _as_batches_bear(damping, before, optimism, factor_power):
    """Returns the damping that a rule wants in place of the one before, or a larger one where updates fit the noise of their batches."""
    if math.isnan(optimism) or damping > before:
        return damping
    room = 1 - optimism / _MOST_OPTIMISM
    if room < 0:
        # Of short steps the excess is noise, which says nothing of their length: there a rise in proportion would go on for ever.
        return before * _FACTOR ** (room**2 if damping < before else max(room**2, min(-2 * room, 1.0) * factor_power))
    return before * (damping / before) ** min((2 * room) ** 2, 1.0) if before else damping


class ConstantDamping(DampingCallback):
    """Keeps the damping constant. With this rule any `steps_per_execution` is allowed."""

    adaptive = False

    def __init__(self):
        super().__init__()

    def next_damping(self, damping, logs):
        return damping


class ArcStepDamping(DampingCallback):
    """Damping by how far along the arc the step was taken, for solvers that search along one, such as `DirectSolver`.

    With t the place on the arc, 1 at its end and 0 where the step was rejected:

        t < low:    damping *= factor
        t >= high:  damping /= factor

    A short step means that the model is not valid as far as the damped step goes; the reduction ratio does not show it, since it is near 1 for every
    short step. A lower band (0.02 and 0.1, with factor 10) holds smaller dampings, with which all modes shrink at the same rate along the arc, the
    flat ones, too. On equations it takes two to three times as many updates to the first digits, and some gain their last two sooner
    (docs/measured-equations.md); recurrent networks find long-term dependencies with it alone, along a line (docs/measured-recurrent.md).

    If the gradient is zero or not finite, or the run has converged, the damping stays as it is.

    Args:
        low: Float in (0, 1), the place below which the damping is raised.
        high: Float in (`low`, 1], the place from which it is lowered.
        factor: Float > 1, by which the damping is multiplied or divided.
        min_damping: Float >= 0, the smallest damping.
        max_damping: Float > 0, the largest damping.

    Raises:
        ValueError: If an argument is out of its range; see also `DampingCallback`.
    """

    def __init__(self, low=0.1, high=0.4, factor=2.5, min_damping=0.0, max_damping=math.inf):
        super().__init__(min_damping, max_damping)
        self.low, self.high, self.factor = positive("low", low), positive("high", high), positive("factor", factor)
        if not self.low < self.high <= 1:
            raise ValueError(f"`low` must be less than `high`, and `high` at most 1. Received: low={low}, high={high}.")
        if self.factor <= 1:
            raise ValueError(f"`factor` must be > 1. Received: factor={factor}.")

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        if self.solver.judged_by != "arc_step":
            raise ValueError(
                f"`ArcStepDamping` needs a solver that searches along an arc, such as `DirectSolver()`. Received: {self.solver!r}. Use "
                "`LevenbergMarquardt()`."
            )

    def next_damping(self, damping, logs):
        place = logs["arc_step"] if logs["step_size"] else 0.0
        if not _can_learn(logs) or self.low <= place < self.high:
            return damping
        return damping / self.factor if place >= self.high else damping * self.factor


class LevenbergMarquardt(DampingCallback):
    """Martens' Levenberg-Marquardt rule, which `fit` uses unless its callbacks hold another.

    The reduction ratio of an update is the actual over the predicted reduction of the loss.

        ratio < low, or minus infinity:  damping *= factor
        ratio > high:                    damping /= factor

    The ratio is NaN where nothing could be measured. If the gradient is zero or not finite, or the run has converged, the damping stays as it is.
    Otherwise the step was so short that its effect was lost in rounding, and the damping is lowered. A damping of 0 stays 0, since multiplication
    cannot raise it. With `DirectSolver`, the place on the arc is what counts, and the rule is that of `ArcStepDamping()`; with
    `DirectSolver(order=1)` that of `ArcStepDamping(0.02, 0.1, 10)`. With `PreconditionedMomentum`, whose updates are small and many, the eighth root
    of `factor` takes its place. The defaults find the scale of the
    damping in a few updates, and stop lowering it where the model becomes inaccurate. Martens uses `high=0.75` and `factor=1.5`.

    Args:
        low: Float, the ratio below which the damping is raised: the model predicted too much.
        high: Float > `low`, the ratio above which the damping is lowered.
        factor: Float > 1, by which the damping is multiplied or divided.
        min_damping: Float >= 0, the smallest damping.
        max_damping: Float > 0, the largest damping.
        interval: Integer >= 1. The damping changes only in every `interval`-th update, by the ratio of that update.

    Raises:
        ValueError: If an argument is out of its range; see also `DampingCallback`.

    References:
        Martens (2010), *Deep learning via Hessian-free optimization*, section 4.1; Nocedal & Wright (2006), section 10.3; Martens & Grosse (2015),
        section 6.5, for the interval.
    """

    def __init__(self, low=0.25, high=0.9, factor=2.5, min_damping=0.0, max_damping=math.inf, interval=1):
        super().__init__(min_damping, max_damping)
        self.interval = count("interval", interval)
        self.low, self.high, self.factor = finite("low", low), finite("high", high), positive("factor", factor)
        if self.low >= self.high:
            raise ValueError(f"`low` must be less than `high`. Received: low={low}, high={high}.")
        if self.factor <= 1:
            raise ValueError(f"`factor` must be > 1. Received: factor={factor}.")

    def next_damping(self, damping, logs):
        if self.solver.judged_by == "arc_step":
            return ArcStepDamping(*self.solver.arc_band).next_damping(damping, logs)
        ratio = logs["reduction_ratio"]
        # A rejected step is no small update, and one that is lost in rounding is far too small.
        is_ordinary = logs.get("step_size", 1) and not math.isnan(ratio)
        factor = self.factor ** (self.solver.factor_power if is_ordinary else 1)
        if logs["gradient_norm"] == 0:
            return damping
        if math.isnan(ratio):
            # Where the update could measure something with a longer step, the effect of this one was lost in rounding.
            return damping / factor if _can_learn(logs) else damping
        if ratio > self.high:
            return damping / factor
        if ratio >= self.low:
            return damping
        return damping * factor

    def on_train_batch_end(self, batch, logs=None):
        if _number(self.model.optimizer.iterations) % self.interval == 0:
            super().on_train_batch_end(batch, logs)


def _can_learn(logs):
    """Whether another damping may give a better step: the gradient is finite and not zero, and the run has not converged."""
    return math.isfinite(logs["gradient_norm"]) and logs["gradient_norm"] > 0 and not logs.get("converged")
