"""Keras' `BackupAndRestore`, made safe against a process that is killed while it writes, and against several workers that would all write.

Keras writes the weights and, in another file, the epoch that they belong to. Killed between the two, a run would repeat an epoch; killed within one,
it could not go on. Here the epoch of the next point is on disk before its weights are, with the number of the update that they are of, and each file
is replaced by a complete one.
"""

import contextlib
import json
import pathlib
import shutil

import keras

from keras_hf.common import keras_private
from keras_hf.common.files import replacing
from keras_hf.common.replaced import replaced


@contextlib.contextmanager
def complete_backups(callbacks, model, writes):
    """Context of a `fit` in which Keras' `BackupAndRestore` goes on from the last complete point.

    Args:
        callbacks: List of `keras.callbacks.Callback`.
        model: `HFModel`.
        writes: Whether this process writes files: the chief does.
    """
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            # Remote files are not replaced at a stroke: Keras writes them as always, but by one process.
            is_here = "://" not in str(getattr(callback, "backup_dir", ""))
            if isinstance(callback, keras.callbacks.BackupAndRestore) and (is_here or not writes):
                stack.enter_context(replaced(*_replacements(callback, model, writes)))
        yield


def _replacements(callback, model, writes):
    weights, metadata = (pathlib.Path(path) for path in keras_private.paths_of_backup(callback))
    begin, end = callback.on_train_begin, callback.on_train_end

    def save(*args):
        if not writes:
            return
        weights.parent.mkdir(parents=True, exist_ok=True)
        if getattr(callback, "double_checkpoint", False) and weights.exists():
            for path in (weights, metadata):
                shutil.copy(path, f"{path}.bkp")
        now = {"epoch": keras_private.epoch_of_backup(callback), "update": _num_updates(model)}
        _write(metadata, {**_read(metadata, weights), "next": now})
        model.save_weights(weights, overwrite=True)
        _write(metadata, now)

    def on_train_begin(logs=None):
        begin(logs)
        point = _read(metadata, weights).get("next")
        if point and point["update"] == _num_updates(model):
            keras_private.start_at_epoch(model, point["epoch"])

    def on_train_end(logs=None):
        if writes:
            end(logs)

    return (
        keras_private.backups_saved_by(callback, save),
        (callback, "on_train_begin", on_train_begin),
        (callback, "on_train_end", on_train_end),
    )


def _num_updates(model):
    return int(model.optimizer.iterations.numpy())


def _read(metadata, weights):
    """What is known of the point on disk; that of the start where there is none."""
    there = metadata.exists() and weights.exists()
    return json.loads(metadata.read_text()) if there else {"epoch": 0}


def _write(path, content):
    with replacing(path) as new:
        new.write_text(json.dumps(content))
