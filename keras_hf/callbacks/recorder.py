"""Records every update in a JSON Lines file: the logs, and how the solver found the step."""

import json
import math
import time
from pathlib import Path

import keras
import numpy as np

from keras_hf.common.files import replacing


class UpdateRecorder(keras.callbacks.Callback):
    """Writes one line of JSON after each update of an `HFModel`.

    | key | meaning |
    | --- | --- |
    | `update` | number of the update, from 1 |
    | `epoch` | its epoch, from 0 |
    | `seconds` | since the start of training; continues from the last line that was kept |
    | `loss` | that of the update, `update_loss` of the logs |
    | `damping`, ... | the other logs of the update, as in `HFModel`, and metrics |
    | `cost` | passes over cases, in gradients of one case; see `recorder.update_cost` |
    | `trace` | see below |

    `trace` holds `losses`, the losses of the candidate steps in order (null where none was computed or it is NaN); `num_cuts`, how often the step was
    shortened; `num_products`; and what the solver adds. `ConjugateGradient` adds `course`, the quadratic that CG minimises at every iterate including
    the start, and `iterate_numbers`, the iterates that are the candidates. Numbers that are not finite are written as Python's `json` does, `NaN` and
    `-Infinity`. A line is on disk before the next update begins.

    Args:
        path: Path of the file.
        append: Boolean. `True` keeps the lines of an existing file whose updates came before: a second `fit` and a resumed run go on with it, lines
            of updates that are made again are dropped, and a run from new weights, whose updates are counted from 1, replaces it. `False` keeps none.

    Raises:
        ValueError: At the start of training, if the model is not an `HFModel`, or if the recorder cannot see every update
            (`steps_per_execution > 1`); at the first update, if the file to append to is not one of updates.
    """

    def __init__(self, path, append=True):
        super().__init__()
        self.path, self.append = Path(path), append
        self._file, self._epoch = None, 0

    def on_train_begin(self, logs=None):
        if not hasattr(self.model, "last_trace"):
            raise ValueError(f"`UpdateRecorder` records the updates of an `HFModel`. Received: {self.model!r}.")
        if self.model.steps_per_execution > 1:
            raise ValueError(
                "`UpdateRecorder` must see every update. Received: steps_per_execution="
                f"{self.model.steps_per_execution}. Compile with `steps_per_execution=1`."
            )
        # The file is opened at the first update: until then another callback may restore an earlier run, and its number of updates.
        self._file, self._start = None, time.perf_counter()

    def _open(self):
        """Opens the file, with the lines of an old one that are kept."""
        kept = []
        if self.append and self.path.exists():
            kept = [record for record in read_updates(self.path) if record["update"] < self._num_updates()]
        # What is left of an old file is whole before the old one goes.
        with replacing(self.path) as path:
            path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(self.path, "a")
        self._start -= kept[-1]["seconds"] if kept else 0.0
        # A second call of `fit` continues the file.
        self.append = True

    def _num_updates(self):
        return int(self.model.optimizer.iterations.numpy())

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self._file is None:
            self._open()
        trace = {name: np.asarray(value).tolist() for name, value in self.model.last_trace.items()}
        trace["losses"] = [None if math.isnan(loss) else loss for loss in trace["losses"]]
        record = {
            "update": self._num_updates(),
            "epoch": self._epoch,
            "seconds": round(time.perf_counter() - self._start, 3),
            **{name: _number(value) for name, value in logs.items() if name != "update_loss"},
            "loss": _number(logs["update_loss"]),
            "cost": update_cost(trace, int(logs["num_cases"]), self.model.optimizer.curvature_batch_size),
            "trace": trace,
        }
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def on_train_end(self, logs=None):
        if self._file is not None:
            self._file.close()


def _number(value):
    """Converts to a number that JSON can hold; integers stay integers."""
    return np.asarray(value).item()


def update_cost(trace, num_cases, curvature_batch_size=None):
    """Counts what an update cost: passes over cases, in gradients of one case.

    A case costs 1 in the gradient, 4/3 in a product and 1/3 in a loss. The gradient and the losses that the search looked at are on all cases that
    the update used, products on those of the curvature chunk. An update by `PreconditionedMomentum` costs its gradient and, on its share of the
    cases, two forward derivatives (5/3) and two losses. Left out are the preconditioner, unseen cases, checks, and what the first update spends to
    find the scale of the curvature.

    Args:
        trace: Dict, how the update came by its step: `HFModel.last_trace`, or `trace` of what `read_updates` returns.
        num_cases: Integer, the cases that the update used, `num_cases` of its logs.
        curvature_batch_size: Integer, that of the optimizer, or `None`: there are no chunks.

    Returns:
        Float.
    """
    in_chunk = min(curvature_batch_size or num_cases, num_cases)
    if "num_forward_derivatives" in trace:
        return num_cases + int(trace["chunk_cases"]) * (1 / 3 + 2 / 3 * int(trace["num_forward_derivatives"]) + 2 / 3)
    # As floats, the None of a record is NaN.
    num_losses = int(trace["num_cuts"]) + int(np.sum(~np.isnan(np.asarray(trace["losses"], float))))
    return num_cases * (1 + num_losses / 3) + in_chunk * 4 / 3 * int(trace["num_products"])


def read_updates(path):
    """Reads a file written by `UpdateRecorder`.

    Args:
        path: Path of the file.

    Returns:
        List of dicts, one per update. An incomplete last line, as after a crash, is left out.

    Raises:
        ValueError: If another line is not a record of an update.
    """
    records, lines = [], Path(path).read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["update"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"Line {number} of {path} is no record of an update, as `UpdateRecorder` writes them. Received: {line[:80]!r}."
            ) from error
        records.append(record)
    return records
