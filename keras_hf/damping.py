"""Damping rules: Keras callbacks that read the logs of an update and own one scalar, the optimizer's damping."""

import math

import keras

from keras_hf.checks import count, finite, flag, positive

# The smallest normal float32: a damping that underflows to 0 could never rise again.
_SMALLEST = 2.0**-126
# The ratios that a search for the initial damping is content with, and the factor by which it goes until it has passed them.
_CONTENT, _STRIDE = (0.75, 0.95), 10.0


def _number(value):
    """The value of a Keras variable, also of one on several replicas, or of an initial damping."""
    return value.numpy().item() if isinstance(value, keras.Variable) else value


class DampingCallback(keras.callbacks.Callback):
    """Base of damping rules: reads the logs of each update and assigns `model.optimizer.damping`.

    Subclasses implement `next_damping`. The damping goes on over `fit` calls and is saved with the optimizer; nothing is reset.

    Args:
        min_damping: Float >= 0, the least damping assigned.
        max_damping: Float > 0, the greatest.

    Raises:
        ValueError: If a limit is out of its range or the least is above the greatest; at the start of training, if the model's optimizer has no
            damping, or if several updates run between two calls (`steps_per_execution > 1`).
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
        if self.adaptive:
            self.model.optimizer.damping.assign(self.within_limits(self.next_damping(logs["damping"], logs)))

    def within_limits(self, damping):
        """Returns the damping, or the limit that it exceeds."""
        return min(max(damping, self.min_damping), self.max_damping)


class ConstantDamping(DampingCallback):
    """Leaves the damping as it is, knowingly: `fit` does not warn then, and any `steps_per_execution` is welcome."""

    adaptive = False

    def __init__(self):
        super().__init__()

    def next_damping(self, damping, logs):
        return damping


class LevenbergMarquardt(DampingCallback):
    """Martens' Levenberg-Marquardt rule.

    With the reduction ratio of an update, the actual over the predicted reduction of the loss,

        ratio < low, NaN or minus infinity:  damping *= factor
        ratio > high:                        damping /= factor

    A zero gradient, where there is nothing to predict, leaves the damping as it is. A damping of 0 stays 0, since factors cannot raise it. The
    defaults find the scale of the damping in a few updates, and stop lowering it where the model begins to miss; Martens has `high=0.75` and
    `factor=1.5`.

    With `calibrate=True` the first updates search for the initial damping, so that the scale of the loss need not be known: by factors of 10 until
    the ratio has crossed the range from 0.75 to 0.95, then halfway between the two sides (in the logarithm), until it lies in that range or the sides
    are less than `factor` apart. What the search knows is saved with the optimizer: a run that is resumed goes on with it, and one that has found its
    damping does not search again.

    Args:
        low: Float, the ratio below which the model was too bold.
        high: Float > `low`, the ratio above which it was too timid.
        factor: Float > 1.
        min_damping: Float >= 0, the least damping.
        max_damping: Float > 0, the greatest.
        interval: Integer >= 1. The damping moves in every `interval`-th update, by its ratio; a search moves it in each.
        calibrate: Boolean, whether to search for the initial damping.

    Raises:
        ValueError: If a number is out of its range; at the start of training, if a search would start at a damping of 0; see also `DampingCallback`.

    References:
        Martens (2010), *Deep learning via Hessian-free optimization*, section 4.1; Nocedal & Wright (2006), section 10.3; Martens & Grosse (2015),
        section 6.5, for the interval.
    """

    def __init__(
        self, low=0.25, high=0.9, factor=2.5, min_damping=0.0, max_damping=math.inf, interval=1, calibrate=False
    ):
        super().__init__(min_damping, max_damping)
        self.interval, self.calibrate = count("interval", interval), flag("calibrate", calibrate)
        self.low, self.high, self.factor = finite("low", low), finite("high", high), positive("factor", factor)
        if self.low >= self.high:
            raise ValueError(f"`low` must be less than `high`. Received: low={low}, high={high}.")
        if self.factor <= 1:
            raise ValueError(f"`factor` must be > 1. Received: factor={factor}.")

    def next_damping(self, damping, logs):
        ratio = logs["reduction_ratio"]
        if logs["gradient_norm"] == 0:
            return damping
        if ratio > self.high:
            return max(damping / self.factor, min(damping, _SMALLEST))
        if ratio >= self.low:
            return damping
        return damping * self.factor

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        if self.calibrate and _number(self.model.optimizer.damping) == 0:
            raise ValueError(
                "`LevenbergMarquardt(calibrate=True)` searches by factors, which lead nowhere from 0. Received: damping=0. "
                "Start at `HessianFree(damping=1.0)`."
            )

    def on_train_batch_end(self, batch, logs=None):
        optimizer = self.model.optimizer
        if self.calibrate:
            bounds = [float(bound) for bound in optimizer.damping_bounds.numpy()]
            if bounds[0] < bounds[1]:
                damping, bounds = self._searched(logs, *bounds)
                optimizer.damping.assign(damping)
                optimizer.damping_bounds.assign(bounds)
                return
        if _number(optimizer.iterations) % self.interval == 0:
            super().on_train_batch_end(batch, logs)

    def _searched(self, logs, lower, upper):
        """Returns the damping that the search tries next, or ends with, and its bounds."""
        damping, ratio = float(logs["damping"]), logs["reduction_ratio"]
        if logs["gradient_norm"] == 0:
            return damping, (lower, upper)
        if _CONTENT[0] <= ratio <= _CONTENT[1]:
            return damping, (damping, damping)
        if ratio > _CONTENT[1]:
            upper = damping
        else:
            lower = damping
        if lower == 0:
            following = upper / _STRIDE
        elif upper == math.inf:
            following = lower * _STRIDE
        else:
            following = math.sqrt(lower * upper)
        following = max(self.within_limits(following), _SMALLEST)
        # At a limit, where there is no further to go, the search is over, too; the damping may have been rounded to float32.
        over = math.isclose(following, damping, rel_tol=1e-6) or upper / self.factor <= lower
        return following, (following, following) if over else (lower, upper)
