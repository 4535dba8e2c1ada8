"""Which callbacks a `fit` calls, and in which order."""

import keras

from keras_hf.callbacks.damping import DampingCallback, LevenbergMarquardt
from keras_hf.callbacks.evidence import EvidenceRegularization
from keras_hf.callbacks.progress import UpdateProgress
from keras_hf.callbacks.recorder import UpdateRecorder

# Callbacks that do nothing but write files; not those derived from them, which may do more.
_WRITERS = (keras.callbacks.ModelCheckpoint, keras.callbacks.CSVLogger, keras.callbacks.TensorBoard, UpdateRecorder)


def in_order(callbacks, verbose, finds_decay, writes):
    """Returns the callbacks of a `fit`, damping rules first and progress last, and the list of the user's among them.

    Args:
        callbacks: As `fit` takes them.
        verbose: 0 to 3 or "auto".
        finds_decay: Whether the weight decay is found by evidence.
        writes: Whether this process writes files; the others leave out callbacks that do nothing else.
    """
    found = keras.tree.flatten(getattr(callbacks, "callbacks", callbacks) or [])
    if isinstance(callbacks, keras.callbacks.CallbackList):
        # It may run in a thread of its own what a rule must do between two updates.
        return callbacks, found
    found = [callback for callback in found if writes or type(callback) not in _WRITERS]
    rules = [callback for callback in found if isinstance(callback, DampingCallback)]
    callbacks = [*(rules or [LevenbergMarquardt()]), *(callback for callback in found if callback not in rules)]
    if finds_decay and not any(isinstance(callback, EvidenceRegularization) for callback in found):
        callbacks.append(EvidenceRegularization())
    # Last, as Keras' own: it shows what the others add to the logs.
    if verbose != 0 and not any(isinstance(callback, keras.callbacks.ProgbarLogger) for callback in found):
        callbacks.append(UpdateProgress(shows_all=verbose == 3))
    return callbacks, found
