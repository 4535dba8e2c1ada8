"""A record of every update in a file of JSON lines: the logs, and how the solver came by the step."""

import json
import math
import os
import time
from pathlib import Path

import keras
import numpy as np


class UpdateRecorder(keras.callbacks.Callback):
    """Writes a line of JSON after each update of an `HFModel`.

    | key | meaning |
    | --- | --- |
    | `update` | number of the update, from 1 |
    | `epoch` | its epoch, from 0 |
    | `seconds` | since `fit` began to train; goes on from the last line where `append` |
    | `loss`, `damping`, ... | the logs of the update, as in `HFModel`, and metrics |
    | `cost` | passes over cases, in gradients of one case: gradient 1, product 4/3, loss 1/3; preconditioner and unseen cases apart |
    | `trace` | see below |

    `trace` holds `losses`, of the candidate steps in order, null where the search did not look or found no number; `num_cuts`, how often the step was
    shortened; `num_products`; and what the solver adds. `ConjugateGradient` adds `course`, the quadratic that CG minimises at every iterate, the
    start among them, and `iterate_numbers`, the iterates that are the candidates. Numbers that are not finite are written as Python's `json` does,
    `NaN` and `-Infinity`. A line is on disk before the next update begins.

    Args:
        path: Path of the file.
        append: Boolean. `True` goes on with the file that is there, for runs that are resumed, less the lines of updates that are made again; `False`
            writes a new one.

    Raises:
        ValueError: At the start of training, if the model is no `HFModel`, or if several updates run between two calls (`steps_per_execution > 1`).
    """

    def __init__(self, path, append=False):
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
        # The file waits for the first update: another callback may bring back an earlier run, and its number of updates, until then.
        self._file, self._start = None, time.perf_counter()

    def _open(self):
        """Opens the file, with what is to be kept of an old one."""
        kept = []
        if self.append and self.path.exists():
            kept = [record for record in read_updates(self.path) if record["update"] < self._num_updates()]
        # What is left of an old file is whole before the old one goes.
        new = self.path.with_name(f"new-{os.getpid()}-{self.path.name}")
        new.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(new, self.path)
        self._file = open(self.path, "a")
        self._start -= kept[-1]["seconds"] if kept else 0.0
        # `fit` on a second call goes on with the file.
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
            **{name: _number(value) for name, value in logs.items()},
            "cost": self._cost(int(logs["num_cases"]), trace),
            "trace": trace,
        }
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _cost(self, num_cases, trace):
        in_chunk = min(self.model.optimizer.curvature_batch_size or num_cases, num_cases)
        num_losses = trace["num_cuts"] + sum(loss is not None for loss in trace["losses"])
        return num_cases + 4 / 3 * trace["num_products"] * in_chunk + num_losses / 3 * num_cases

    def on_train_end(self, logs=None):
        if self._file is not None:
            self._file.close()


def _number(value):
    """A number that JSON can hold, whole where it is whole by type."""
    return np.asarray(value).item()


def read_updates(path):
    """Reads what `UpdateRecorder` wrote.

    Args:
        path: Path of the file.

    Returns:
        List of dicts, an update each. A last line that was cut short, by a crash, is left out.

    Raises:
        ValueError: If another line is no record of an update.
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
