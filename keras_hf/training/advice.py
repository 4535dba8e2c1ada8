"""Warnings that a user can act on, each given once. This room receives logs, numbers and names; it knows no model."""

import math
import warnings

# Mean square of the residuals at other points, relative to that at the training points. It is about 1 where there are enough points
# (docs/measured-equations.md).
_SPURIOUS = 100.0
# A validation loss that is so much larger than its least, and was less so many epochs before, says that what came after fits the training cases.
_RISEN, _LONG = 1.2, 20
# Rejected updates in a row that call for a warning: a damping that starts far too small is large enough after fewer.
_MANY_REJECTIONS = 30
# A batch of fewer cases is hardly worth an update, whatever the damping.
_FEW_CASES = 16
# The rest of an epoch with fewer cases, and less than a quarter of the batches before it, gets a damping that is right for those.
_FEW_IN_REMAINDER = 64
# The optimism above which, in so many updates in a row, steps fit the noise of their batches: damping rules hold it at a half.
_OPTIMISTIC, _MANY_OPTIMISTIC = 0.75, 40
_NO_CURVATURE = {
    "mean_absolute_error": "keras.losses.Huber() or LogCosh()",
    "mean_absolute_percentage_error": "keras.losses.MeanSquaredLogarithmicError()",
    "hinge": "keras.losses.SquaredHinge()",
    "categorical_hinge": "keras.losses.CategoricalCrossentropy()",
}
# Both are needed: losses follow the second.
_FLOAT64 = '`keras.config.set_dtype_policy("float64")` and `keras.config.set_floatx("float64")`'
# Cures for small batches and small remainders, by how the cases come.
_LARGER_BATCHES = {
    "arrays": "Raise `batch_size`, or leave it out to take all cases.",
    "dataset": "Batch the dataset by more cases: `dataset.unbatch().batch(1000)`.",
    "batches": "Hand over more cases in every batch.",
}
_NO_REMAINDER = {
    "arrays": "Choose a `batch_size` that leaves no small remainder, or leave it out to take all cases.",
    "dataset": "Leave out the remainder, by `dataset.batch(..., drop_remainder=True)`, or choose a size that leaves no small one.",
    "batches": "Leave out the remainder, or spread it over the other batches.",
}


class Advice:
    """The warnings already given to the user of one model, and what the next ones depend on."""

    def __init__(self):
        self._given = set()
        self._source, self._largest_batch = "batches", 0
        self._num_rejected = 0
        self._num_optimistic = 0

    def warn_once(self, key, message):
        """Warns with `message`, unless a warning with this `key` was given before. Call it from a method that the model calls: see `stacklevel`."""
        if key not in self._given:
            self._given.add(key)
            warnings.warn(message, stacklevel=3)

    # Before the first update.

    def cases_come_as(self, source):
        """Records at the start of `fit` how cases come: as "arrays", "dataset" or "batches"; `None` if one batch holds all of them."""
        self._source, self._largest_batch = source, 0

    def loss_of_gauss_newton(self, name):
        """Warns if the loss of this name has no curvature. For models that use the Gauss-Newton matrix."""
        if name in _NO_CURVATURE:
            self.warn_once(
                f"curvature of {name}",
                f"The loss '{name}' has no curvature: its second derivative is zero, and the update a scaled gradient step. "
                f"Its smooth cousin is {_NO_CURVATURE[name]}.",
            )

    def no_curvature(self):
        """Warns that the traced loss has no second derivative with respect to the tensors at which it is cut from the network."""
        self.warn_once(
            "curvature",
            "The loss has no second derivative in the network's outputs: every product is zero and the update a scaled gradient step. "
            "Use a smooth loss.",
        )

    def unknown_combination(self):
        """Warns that the loss of a batch does not follow from the losses of its micro-batches."""
        self.warn_once(
            "combination",
            "The loss of a batch cannot be put together from parts of it (the loss function gives one number or compares cases, as `Circle` "
            "does, or `compute_loss` is overridden): `micro_batch_size` and `curvature_batch_size` are not used. Return one value per case, of that "
            "case alone, from the loss to use them.",
        )

    def float_types_of_exact_solver(self, dtypes):
        """Warns if network and loss of an exact solver compute in several types; `dtypes` is a set of their names.

        Where all is in float32, `no_progress` says it of a run that ends by rounding.
        """
        if len(dtypes) > 1:
            self.warn_once(
                "float types of exact solver",
                "A fit to many digits needs network and loss in float64, and ends by the rounding of the coarser one. "
                f"Received: weights and losses of {', '.join(sorted(dtypes))}. Before the network is made, call {_FLOAT64}.",
            )

    def changed_weights(self, paths):
        """Warns if there are paths of weights that are trainable now but were not at `compile`, or were and are not now."""
        if paths:
            self.warn_once(
                f"changed weights {paths}",
                f"`layer.trainable` has changed since `compile`, which settles what is trained: {paths} stay as they were then. Compile again, "
                "with a new `HessianFree(...)`, for the change to take effect.",
            )

    # After an update.

    def small_batch(self, logs, on_purpose):
        """Warns if the update had very few cases.

        Args:
            logs: Dict, the logs of the update.
            on_purpose: Number of cases that are not too few: those of a growing part that starts small; infinity without one.
        """
        if self._source is None or "small batch" in self._given:
            return
        num_cases = int(logs["num_cases"])
        is_remainder = num_cases < self._largest_batch
        self._largest_batch = max(num_cases, self._largest_batch)
        what = f"An update on {num_cases} cases says little about others: Hessian-free optimization wants batches of hundreds to thousands. "
        if not is_remainder and num_cases < min(_FEW_CASES, on_purpose):
            self.warn_once("small batch", what + _LARGER_BATCHES[self._source])
        elif num_cases < _FEW_IN_REMAINDER and 4 * num_cases < self._largest_batch:
            self.warn_once("remainder", f"{what}Others held up to {self._largest_batch}. {_NO_REMAINDER[self._source]}")

    def noise_is_fitted(self, optimism):
        """Warns if updates keep fitting the noise of their batches; `optimism` is that of the logs."""
        self._num_optimistic = self._num_optimistic + 1 if optimism > _OPTIMISTIC else 0
        if self._num_optimistic == _MANY_OPTIMISTIC:
            self.warn_once(
                "optimism",
                f"For {_MANY_OPTIMISTIC} updates, steps have gained on their own batch what was not there on the next one: `optimism` in the "
                f"logs is {optimism:.2f}. They fit the noise of their batches. A damping rule such as `LevenbergMarquardt()` raises the damping "
                f"where it is above a half. {_LARGER_BATCHES[self._source or 'batches']}",
            )

    def negative_curvature(self, logs, rounding):
        """Warns if CG met negative curvature of a Gauss-Newton matrix. With a convex loss there is none.

        Args:
            logs: Dict, the logs of the update.
            rounding: Float, the rounding error of the curvature along a unit vector.
        """
        # The undamped curvature that CG met is below `-damping`. If that is within rounding, the loss may be convex.
        if int(logs["negative_curvature"]) and float(logs["damping"]) > rounding:
            self.warn_once(
                "negative curvature",
                "CG met negative curvature: the loss is not convex in what the Gauss-Newton matrix is cut at (the network's outputs, or its "
                "logits), or an added loss is not convex in the weights. CG then stops early; `negative_curvature` in the logs counts it. On "
                "small networks `DirectSolver()` takes the loss of a case, where it is not convex, as flat. Otherwise cut after the nonlinearity: "
                "move what the loss does to its predictions into the last layer, or choose a loss that is convex in them.",
            )

    def spurious_solution(self, history):
        """Warns if the residuals of a physics-informed network are far larger at points that it was not trained on.

        Args:
            history: Dict of lists, `History.history` of a `fit` with `validation_data`.
        """
        if not history.get("val_loss"):
            return
        loss, val_loss = history["loss"][-1], history["val_loss"][-1]
        if val_loss > _SPURIOUS * loss and math.isfinite(val_loss):
            self.warn_once(
                "spurious solution",
                f"The residuals at the points of `validation_data` are far larger than at those trained on (mean squares {val_loss:.1e} and "
                f"{loss:.1e}): the network satisfies its equations at the points, not between them, and need not be near a solution. "
                "Use more points, or draw them anew while training (`PINN.redrawn`).",
            )

    def validation_rose(self, history):
        """Warns if the validation loss was at its least long before the end and has risen since. For a `fit` whose callbacks keep no best weights.

        Args:
            history: Dict of lists, `History.history`.
        """
        losses = [loss if math.isfinite(loss) else math.inf for loss in history.get("val_loss", ())]
        if not losses:
            return
        least, last = min(losses), losses[-1]
        best = losses.index(least) + 1
        if last > _RISEN * least and len(losses) - best >= _LONG:
            self.warn_once(
                "validation",
                f"`val_loss` was {least:.3g} after {best} of {len(losses)} epochs and is {last:.3g} now: later updates fitted the training "
                "cases alone. `keras.callbacks.EarlyStopping(patience=10, restore_best_weights=True)` stops there and keeps the best weights.",
            )

    def no_progress(self, logs, num_nonfinite, num_updates, dtype):
        """Warns of the reason if the step was rejected.

        Args:
            logs: Dict, the logs of the update.
            num_nonfinite: Integer, the number of cases of the batch with numbers that are not finite.
            num_updates: Integer, the number of updates so far, including this one.
            dtype: String, the type in which the network computes.
        """
        self._num_rejected = 0 if float(logs["step_size"]) > 0 else self._num_rejected + 1
        if not self._num_rejected:
            return
        num_cases, gradient_norm = int(logs["num_cases"]), float(logs["gradient_norm"])
        if num_nonfinite:
            self.warn_once(
                "cases that are not finite",
                f"{num_nonfinite} of the cases of the batch hold numbers that are not finite (NaN or infinity) in `x`, `y` or "
                "`sample_weight`, and so has the loss: the step is rejected, and so will be every other on these cases. Remove or repair them.",
            )
        elif not math.isfinite(gradient_norm):
            # Keras casts predictions to float32 for the loss and so loses their logits: the derivative 1 / p goes back into the network in float16.
            in_float16 = (
                " In float16, whose largest number is 65504, cross-entropies of probabilities below 1.5e-5 do: give the last layer "
                '`dtype="float32"`.'
            )
            self.warn_once(
                "gradient that is not finite",
                "The loss or its gradient is not finite, though the numbers in the cases are: the step is rejected. Something overflows, or has no "
                "derivative where it is asked for, such as a square root or a logarithm at 0; scale the inputs, or bound what the layer takes."
                f"{in_float16 if dtype == 'float16' else ''}",
            )
        elif gradient_norm == 0 and num_cases and num_updates == 1:
            self.warn_once(
                "zero gradient",
                "The gradient of the first update is zero: there is nothing to descend. Look for layers whose outputs do not depend on their "
                "weights (units of ReLU that are all off, zero initialization) or for targets that are fitted exactly.",
            )
        elif int(logs["converged"]) and "zero gradient" not in self._given:
            cure = "Stop here"
            if dtype != "float64":
                cure += f", or go on in float64 ({_FLOAT64} before the network is made)"
            self.warn_once(
                "converged",
                f"Training has converged to rounding: no step lowers the loss by more than {dtype} can tell. `converged` in the logs is "
                f"1 from here on, and updates leave the solver out. {cure}.",
            )
        elif gradient_norm and self._num_rejected == _MANY_REJECTIONS:
            self.warn_once(
                "rejections",
                f"{_MANY_REJECTIONS} updates in a row were rejected: the loss rose along each step. With a damping rule such as "
                "`LevenbergMarquardt()` the damping rises until steps are short enough; where it does, the gradient may be wrong, or the loss not "
                "smooth here. `HFModel.check_products` tells more.",
            )
