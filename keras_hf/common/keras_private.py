"""The private names of Keras that this package depends on, and what it takes them to mean. No other room touches any.

Keras may rename them in any version: `tests/test_keras_private.py` has a test of each meaning, and one that Keras still calls the
private method that `HFModel` overrides, `_maybe_symbolic_build`.
"""

import contextlib
import types

import keras
from keras.src.backend.tensorflow import trainer
from keras.src.layers.normalization import batch_normalization, spectral_normalization
from keras.src.utils import io_utils

from keras_hf.common.replaced import replaced

# Of layers and tensors.


def takes_training(layer):
    """Returns whether a layer's `call` has the argument `training`."""
    return layer._call_has_training_arg


def all_layers(layer):
    """Returns a layer and all layers in it, however deep, each once: a list."""
    return layer._flatten_layers()


def seed_generators(layer):
    """Returns the `keras.random.SeedGenerator`s that a layer itself holds, not those of the layers in it: a list."""
    return list(layer._seed_generators)


def logits(tensor):
    """Returns what Keras' losses take in place of the output of a softmax or sigmoid, what it was computed from; `None` of other tensors."""
    return getattr(tensor, "_keras_logits", None)


def mask(tensor):
    """Returns the mask that layers have attached to a tensor, which Keras' losses apply, or `None`."""
    return getattr(tensor, "_keras_mask", None)


@contextlib.contextmanager
def complete_derivatives():
    """Has Keras' layers, while this is open, differentiate all that they compute of weights and cases.

    `SpectralNormalization` declares its singular vectors constant, and BatchNormalization with `renorm` its corrections, though both change with the
    weights: the gradient would not be that of the loss. No other layer of Keras does so.
    """
    modules = batch_normalization, spectral_normalization
    with replaced(
        *[(m, "ops", types.SimpleNamespace(**vars(m.ops) | {"stop_gradient": lambda x: x})) for m in modules]
    ):
        yield


# Of models and what they are compiled with.


def require_compiled(model, method):
    """Raises Keras' `ValueError` where `method` was called before `compile`."""
    model._assert_compile_called(method)


def compiled_loss(model):
    """Returns the `CompileLoss` of a compiled model, which finds the loss of each output, or `None` where `compile` got no loss."""
    return model._compile_loss


def set_losses(compile_loss, loss):
    """Has a `CompileLoss` that is not built yet made of other losses, a nest like the one that `compile` got."""
    compile_loss._user_loss = loss


@contextlib.contextmanager
def losses_called_by(compile_loss, make_call):
    """Has a built `CompileLoss`, while this is open, call other functions than its losses.

    Args:
        compile_loss: Keras' `CompileLoss`.
        make_call: Callable `(keras.losses.Loss, loss weight or None) -> callable (y, y_pred, sample_weight) -> scalar`.
    """
    entries = [entry._replace(loss=make_call(entry.loss, entry.loss_weights)) for entry in compile_loss._flat_losses]
    with replaced((compile_loss, "_flat_losses", entries)):
        yield


def call_compute_loss(model, x, y, y_pred, sample_weight):
    """Calls a model's `compute_loss` for training, with the argument `training` where an override has it."""
    return model._compute_loss(x, y, y_pred, sample_weight, training=True)


def track_loss(model, loss, num_cases):
    """Adds a batch to the running mean that Keras shows as `loss`."""
    model._loss_tracker.update_state(loss, sample_weight=num_cases)


def as_keras_returns(model, metrics):
    """Returns a dict of metrics as Keras' methods do without `return_dict`: a list in the order of the model's, of one alone a scalar."""
    return model._flatten_metrics_in_order(metrics)


def optimized_weights(optimizer):
    """Returns the `keras.Variable`s that an optimizer was built for, in order."""
    return optimizer._trainable_variables


def average_weights(optimizer, momentum):
    """Brings an optimizer's moving averages of its weights up to date, if it has any; call it before it counts the update.

    Args:
        optimizer: `keras.optimizers.Optimizer`.
        momentum: Scalar tensor, the weight of the old averages, in place of the optimizer's own. At the first update it counts as 0.
    """
    with replaced((optimizer, "ema_momentum", momentum)):
        optimizer._update_model_variables_moving_average(optimizer._trainable_variables)


# Of the building of models from a first batch.


def symbolic_build(model, data_batch):
    """Builds what is not built yet of a model, its metrics and loss and its optimizer, from a batch of which types and shapes are known."""
    model._symbolic_build(data_batch=data_batch)


def batch_spec(epoch_iterator):
    """Returns the types and shapes of the batches that Keras' iterator over an epoch will give; no batch is taken."""
    return epoch_iterator._distributed_dataset.element_spec


def spec_of_first_replica(spec):
    """Returns the type and shape of the first replica's part, where a batch is divided among replicas; else `spec` itself."""
    # TensorFlow's.
    return getattr(spec, "_value_specs", (spec,))[0]


# Of Keras' `BackupAndRestore`.


def paths_of_backup(callback):
    """Returns the paths of a `BackupAndRestore`'s weights and of the file that says of which epoch they are."""
    return callback._weights_path, callback._training_metadata_path


def epoch_of_backup(callback):
    """Returns the epoch from which a run would go on with the weights as they are now."""
    return callback._current_epoch


def backups_saved_by(callback, save):
    """Returns what `replaced` takes to have a `BackupAndRestore` call `save` where it would write its files."""
    return callback, "_save_model", save


def start_at_epoch(model, epoch):
    """Has the `fit` that is about to begin its epochs begin with this one."""
    model._initial_epoch = epoch


def print_message(message, line_break=True):
    """Prints as Keras' progress bar does: to standard output, or where `keras.config.disable_interactive_logging` sends it."""
    io_utils.print_msg(message, line_break=line_break)


# Of the functions in which Keras runs steps on all replicas.


@contextlib.contextmanager
def results_of_first_replica():
    """Has train and test functions that run or are traced while this is open return the first replica's results.

    Keras would average them, which fails on scalars under `MultiWorkerMirroredStrategy` (Keras 3.15). The steps of this package return the same
    results on all replicas.
    """

    def first(values, strategy, reduction):
        del reduction
        return keras.tree.map_structure(lambda value: strategy.experimental_local_results(value)[0], values)

    with replaced((trainer, "reduce_per_replica", first)):
        yield
