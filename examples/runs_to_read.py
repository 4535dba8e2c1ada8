"""Runs to read: a healthy one and four sick ones, with the tables and figures of docs/reading-the-logs.md.

    python -m examples.runs_to_read

trains the demo's autoencoder on 1,000 synthetic curves five times, in about five minutes on one core. What the updates tell
is written into `runs/to-read`, a file a run; figures go to `docs/images`, and tables are printed.
"""

import argparse
import warnings
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from examples.autoencoder import SETTINGS, build_autoencoder, cross_entropy
from examples.datasets import synthetic_curves
from keras_hf import GrowingBatch, HessianFree, HFModel, LevenbergMarquardt, UpdateRecorder, read_updates
from keras_hf.plots import plot_updates

WIDTHS, NUM_CASES = SETTINGS["curves", "demo"].widths, 1000
COLUMNS = (
    "update",
    "loss",
    "val_loss",
    "damping",
    "reduction_ratio",
    "cg_iterations",
    "cg_step",
    "step_size",
    "num_cases",
    "cost so far",
)


class Run(NamedTuple):
    """One run.

    Attributes:
        damping: Float, at the start. 45 is about right for this loss.
        batch_size: Integer, cases of an update, or None for a growing part of all.
        is_spoiled: Whether one pixel of one image is no number.
        shown: Tuple of integers, the updates in the table, in order.
    """

    damping: float = 45.0
    batch_size: int | None = None
    is_spoiled: bool = False
    shown: tuple = (1, 2, 3, 5, 10, 20, 30, 40, 60)

    @property
    def num_updates(self):
        """Updates in all: up to the last one shown."""
        return self.shown[-1]


RUNS = {
    "healthy": Run(),
    "small-batches": Run(batch_size=20, shown=(1, 5, 10, 20, 50, 100, 120, 130, 140, 160, 200)),
    "damping-too-large": Run(damping=45e6, shown=(1, 2, 3, 5, 10, 15, 20, 25, 30, 40, 60)),
    "damping-too-small": Run(damping=45e-9),
    "not-a-number": Run(is_spoiled=True),
}


def main(arguments=None):
    """Makes the runs asked for, prints their tables and draws their figures.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", choices=RUNS, nargs="+", default=list(RUNS))
    parser.add_argument("--updates", type=int, help="of each run, if not as many as are shown")
    parser.add_argument("--out", type=Path, default=Path("runs", "to-read"), help="folder of the records")
    parser.add_argument("--images", type=Path, default=Path("docs", "images"), help="folder of the figures")
    args = parser.parse_args(arguments)
    for folder in (args.out, args.images):
        folder.mkdir(parents=True, exist_ok=True)
    images = synthetic_curves(NUM_CASES, seed=0)
    for name in args.run:
        updates = train(RUNS[name], images, args.updates or RUNS[name].num_updates, args.out / f"{name}.jsonl")
        print(f"\n{name}\n\n{table(updates, RUNS[name].shown)}")
        plot(updates, args.images / f"{name}.png")


def train(run, images, num_updates, path):
    """Trains an autoencoder, and returns its updates.

    Args:
        run: `Run`.
        images: Array `(N, 784)`.
        num_updates: Integer.
        path: Path of the record.

    Returns:
        List of dicts, those of `read_updates` with two more numbers: `val_loss`, the loss of all images after the update, and `cost so far`, in
        gradients of all images.
    """
    keras.utils.set_random_seed(0)
    x = images.copy()
    if run.is_spoiled:
        x[0, 400] = np.nan
    model = HFModel(build_autoencoder(WIDTHS, l2=2e-5, seed=0))
    growing_batch = GrowingBatch() if run.batch_size is None else None
    model.compile(optimizer=HessianFree(damping=run.damping, growing_batch=growing_batch), loss=cross_entropy)
    batch_size = run.batch_size or len(x)
    batches = tf.data.Dataset.from_tensor_slices((x, x)).shuffle(len(x), seed=0).batch(batch_size).repeat()
    data = {"x": x, "y": x} if run.batch_size is None else {"x": batches, "steps_per_epoch": 1}
    with warnings.catch_warnings():
        # The run is there to show what the warning is about.
        warnings.filterwarnings("ignore", "An update on")
        history = model.fit(
            **data,
            epochs=num_updates,
            validation_data=(images, images),
            validation_batch_size=len(images),
            callbacks=[LevenbergMarquardt(), UpdateRecorder(path)],
            verbose=0,
        )
    updates = read_updates(path)
    costs = np.cumsum([update["cost"] for update in updates]) / len(images)
    return [
        {**update, "val_loss": loss, "cost so far": round(cost)}
        for update, loss, cost in zip(updates, history.history["val_loss"], costs, strict=True)
    ]


def table(updates, shown):
    """Writes some updates as a table of Markdown.

    Args:
        updates: List of dicts.
        shown: Integers, numbers of updates.
    """
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    rows += [[number(update[column]) for column in COLUMNS] for update in updates if update["update"] in shown]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def number(value):
    """Writes a number: in three digits, unless it is whole and below 100,000."""
    return f"{value:.0f}" if float(value).is_integer() and value < 1e5 else f"{value:.3g}"


def plot(updates, path):
    """Draws the updates.

    Args:
        updates: List of dicts.
        path: Path of the PNG file.
    """
    figure = plot_updates(updates)
    figure.set_size_inches(7, 8)
    figure.savefig(path, dpi=70)


if __name__ == "__main__":
    main()
