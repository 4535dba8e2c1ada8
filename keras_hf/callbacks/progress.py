"""The progress bar of `HFModel.fit`: of the numbers of an update only those by which a user steers, in few characters."""

import keras

from keras_hf.common.keras_private import print_message
from keras_hf.training.solver_choice import reason

# Of the update, before those that the solver names. What has other names, such as metrics, is always shown.
_STEERED_BY = ("damping", "reduction_ratio")
# Of more epochs than that, each of one update, the bar is that of epochs: two lines for each would be thousands.
_MANY_EPOCHS = 100
_OTHERS = (
    *("update_loss", "step_size", "gradient_norm", "num_cases", "converged", "optimism"),
    *("weight_decay", "num_effective", "squared_weights", "data_loss", "num_values", "loss_multiplier"),
)


class UpdateProgress(keras.callbacks.ProgbarLogger):
    """Keras' progress bar, which shows the numbers of updates as they are to be read.

    `reduction_ratio` says, too, what became of the update, unless its step was taken as it was: "rejected", "converged", or the step size. More than
    100 epochs of one update each are shown in one line, which moves from epoch to epoch.

    Args:
        shows_all: Boolean, whether the bar shows all numbers of an update, or else those by which a user steers.
    """

    def __init__(self, shows_all=False):
        super().__init__()
        self._shows_all = shows_all
        self._announced, self._is_of_epochs = "", False

    def set_params(self, params):
        super().set_params(params)
        self._is_of_epochs = self.verbose == 1 and self.target == 1 and self.epochs > _MANY_EPOCHS
        if self._is_of_epochs:
            self.target = self.epochs
            self._reset_progbar()

    def on_epoch_begin(self, epoch, logs=None):
        if self._is_of_epochs:
            self._maybe_init_progbar()
        else:
            super().on_epoch_begin(epoch, logs)

    def on_train_batch_begin(self, batch, logs=None):
        super().on_train_batch_begin(batch, logs)
        if self.verbose and self.model.train_function.is_first_update:
            self._announced = f"Tracing the first update: {type(self.model.solver).__name__}, {reason(self.model)}"
            # Keras' bar goes over this line, the lines of `verbose=2` come after it.
            print_message(self._announced, line_break=self.verbose == 2)

    def on_train_batch_end(self, batch, logs=None):
        if self._announced:
            if self.verbose != 2:
                print_message(f"\r{' ' * len(self._announced)}\r", line_break=False)
            self._announced = ""
        if not self._is_of_epochs:
            super().on_train_batch_end(batch, self._shown(logs))

    def on_epoch_end(self, epoch, logs=None):
        if not self._is_of_epochs:
            super().on_epoch_end(epoch, self._shown(logs))
            return
        self._update_progbar(epoch, self._shown(logs))
        if epoch + 1 == self.epochs or self.model.stop_training:
            self.target = self.progbar.target = self.seen
            self._finalize_progbar(self._shown(logs))

    def _shown(self, logs):
        """Returns what the bar shows of the logs, in its order: loss and metrics, the update's numbers, validation."""
        logs, solver = logs or {}, self.model.solver
        steered_by, hidden = _STEERED_BY + solver.steered_by, _OTHERS + solver.other_logs
        names = steered_by + hidden if self._shows_all else steered_by
        others = {name: value for name, value in logs.items() if name not in steered_by + hidden}
        shown = {name: value for name, value in others.items() if not name.startswith("val_")}
        remarks = {"reduction_ratio": _outcome(logs)}
        shown |= {name: Shown(logs[name], remarks.get(name, "")) for name in names if name in logs}
        shown |= others
        # Keras 3.12 would show their means over the epoch's batches.
        self.progbar.stateful_metrics = set(shown)
        return shown


def _outcome(logs):
    """Returns what became of an update, or an empty string where its step was taken as it was."""
    if logs.get("converged"):
        return "converged"
    step_size = logs.get("step_size", 1)
    if step_size == 0:
        return "rejected"
    return "" if step_size == 1 else f"step_size {_number(step_size)}"


def _number(value):
    """Returns a number as text: integers as integers, others to three digits."""
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e9 else f"{value:.3g}"


class Shown(float):
    """A number as Keras' progress bar is to show it.

    The bar divides a number by the count of what it is the mean of, here 1, and formats the quotient.

    Args:
        value: Float or integer.
        remark: String, what stands in brackets behind the number.

    Attributes:
        text: String: integers as integers, others to three digits.
    """

    def __new__(cls, value, remark=""):
        shown = super().__new__(cls, value)
        shown.text = _number(float(value)) + (f" ({remark})" if remark else "")
        return shown

    def __truediv__(self, count):
        return self

    def __format__(self, spec):
        return self.text
