"""The compiled Keras model as plain functions for the update."""

import keras
import tensorflow as tf

from keras_hf.common import checks, keras_private
from keras_hf.common.replaced import replaced
from keras_hf.network.fixed_network import Task
from keras_hf.network.spectral_norm import UnitSpectralNorm
from keras_hf.problem.loss_terms import WholeLoss, overrides_compute_loss, recorded_terms


def require_targets(model, y):
    """Raises an error if the compiled loss needs targets and there are none."""
    if y is None and keras_private.compiled_loss(model) is not None and not overrides_compute_loss(model):
        raise ValueError(f"`y` must hold what the loss {model.loss!r} compares predictions with. Received: y=None.")


def require_numbers(model, data):
    """Raises an error if there are strings where the network's inputs, or the loss, are numbers. Networks made by subclassing may take any."""
    inputs = getattr(model.network, "inputs", None)
    if inputs and not any(tensor.dtype == "string" for tensor in inputs):
        checks.no_strings(
            "x",
            data.x,
            "Let the network begin with `TextVectorization` or `StringLookup` on a `keras.Input(..., dtype='string')`, or encode them.",
        )
    if not overrides_compute_loss(model):
        checks.targets_are_numbers(data.y)


def task_of(model):
    """Returns the `fixed_network.Task` of a compiled model.

    Args:
        model: `HFModel`, compiled.

    Raises:
        ValueError: If there is no trainable weight, if one cannot be trained, if they are not those for which the optimizer was built, if a
            layer of several replicas is `synchronized`, or if a kernel of `SpectralNormalization` has a constraint.
    """
    trainable, optimizer = model.trainable_variables, model.optimizer
    if not trainable:
        raise ValueError(
            "`HFModel` needs at least one trainable weight. Received: a network with none; set `layer.trainable = True`."
        )
    if optimizer.built:
        # Batches of another length cause a new trace, by when other weights may be trainable.
        checks.weights_of_optimizer(keras_private.optimized_weights(optimizer), trainable)
    checks.trainable_weights(trainable)
    layers = keras_private.all_layers(model.network)
    synchronized = [layer.name for layer in layers if getattr(layer, "synchronized", False)]
    if synchronized and model.distribute_strategy.num_replicas_in_sync > 1:
        raise ValueError(
            "`HFModel` cannot normalize by the cases of all replicas within a pass: TensorFlow has no sums over replicas in loops. Received: "
            f"synchronized=True in {', '.join(synchronized)}. Leave it out; the statistics for evaluation are those of all replicas' cases."
        )
    generators = [generator for layer in layers for generator in keras_private.seed_generators(layer)]
    seeds = {id(generator.state): generator.state for generator in generators}

    def network(x):
        # cuDNN's fused kernels have no second derivative.
        without_cudnn = replaced(*[(layer, "use_cudnn", False) for layer in layers if hasattr(layer, "use_cudnn")])
        with without_cudnn, keras_private.complete_derivatives():
            return model(x, training=True)

    constraints = [_constraint(variable, layers) for variable in trainable]
    regularizers = [
        *((variable, variable.regularizer) for variable in trainable if variable.regularizer is not None),
        *((variable, WeightDecay(optimizer)) for variable in trainable if optimizer.weight_decay is not None),
    ]
    normalized = {
        id(variable): constraint
        for variable, constraint in zip(trainable, constraints, strict=True)
        if isinstance(constraint, UnitSpectralNorm)
    }

    return Task(
        network=network,
        loss_terms=lambda data, y_pred: loss_terms(model, data, y_pred),
        regularizers=[
            (v.value, normalized[id(v)].regularized_by(regularizer) if id(v) in normalized else regularizer)
            for v, regularizer in regularizers
        ],
        update_metrics=lambda data, y_pred: update_metrics(model, data, y_pred),
        variables=[variable.value for variable in trainable],
        weights=trainable,
        constraints=constraints,
        states=[variable for variable in model.non_trainable_variables if id(variable) not in seeds],
        seeds=list(seeds.values()),
        seed=optimizer.seed,
        num_updates=optimizer.iterations,
        layers=layers,
        structural_damping=optimizer.structural_damping,
        groups=getattr(model.network, "observation_groups", None),
        solves_equations=getattr(model.network, "solves_equations", False),
    )


def _constraint(variable, layers):
    """Returns the constraint of a weight, a callable or `None`: of a kernel that `SpectralNormalization` normalizes, this norm."""
    wrappers = [layer for layer in layers if isinstance(layer, keras.layers.SpectralNormalization)]
    wrappers = [layer for layer in wrappers if getattr(layer, "kernel", None) is variable]
    if not wrappers:
        return variable.constraint
    if variable.constraint is not None:
        raise ValueError(
            f"The kernel of `SpectralNormalization` must have no constraint, since dividing by the spectral norm would violate it. Received: "
            f"{variable.constraint!r} of '{variable.path}'. Leave it out."
        )
    return UnitSpectralNorm(wrappers[0])


class WeightDecay(keras.regularizers.L2):
    """Half the optimizer's weight decay, as it is at the time, times the sum of squares.

    Args:
        optimizer: `HessianFree` with a weight decay.
    """

    def __init__(self, optimizer):
        self._optimizer = optimizer

    def __call__(self, x):
        # Not built yet where a first trace only looks at operations.
        decay = self._optimizer.weight_decay if self._optimizer.built else 0.0
        return 0.5 * tf.cast(tf.convert_to_tensor(decay), x.dtype) * tf.reduce_sum(tf.square(x))


def loss_terms(model, data, y_pred):
    """Returns the list of terms of the compiled loss on these cases."""
    replicas = model.distribute_strategy.num_replicas_in_sync
    if overrides_compute_loss(model):
        # Keras divides its own loss by the number of replicas, and expects the user's to be divided already.
        return [WholeLoss(lambda: replicas * _whole_loss(model, data, y_pred))]
    compile_loss = keras_private.compiled_loss(model)
    if compile_loss is None:
        return []
    if not compile_loss.built:
        compile_loss.build(data.y, y_pred)
    with recorded_terms(compile_loss, replicas) as terms:
        compile_loss(data.y, y_pred, data.sample_weight)
    return terms


def _whole_loss(model, data, y_pred):
    """Returns the result of an overridden `compute_loss`, without the regularizers and the added losses."""
    with replaced((model, "adds_losses", False)):
        return keras_private.call_compute_loss(model, data.x, data.y, y_pred, data.sample_weight)


def update_metrics(model, data, y_pred):
    """Adds cases to the model's metrics."""
    compile_loss = keras_private.compiled_loss(model)
    if compile_loss is not None and compile_loss.metrics:
        # Keras tracks the loss of each output in this call.
        compile_loss(data.y, y_pred, data.sample_weight)
    model.compute_metrics(data.x, data.y, y_pred, data.sample_weight)


def loss_name(loss):
    """Returns the name of a loss as passed to `compile`: for a string, that of Keras' function; the loss itself if it has no name."""
    name = getattr(loss, "name", None) or getattr(loss, "__name__", None) or loss
    return getattr(keras.losses.get(name), "__name__", name) if isinstance(loss, str) else name


def checked(loss):
    """Returns a loss that checks the values of the user's and explains errors that Keras would not; its `__wrapped__` is the user's."""
    if isinstance(loss, keras.losses.Loss):
        # A loss with its own `__call__` has no values to check.
        return loss if type(loss).__call__ is not keras.losses.Loss.__call__ else CheckedLoss(loss)
    if not callable(loss) or isinstance(loss, type):
        return loss

    def with_check(y_true, y_pred):
        return checks.loss_values(with_check.__name__, loss(y_true, y_pred), y_pred)

    with_check.__name__ = getattr(loss, "__name__", None) or type(loss).__name__
    with_check.__wrapped__ = loss
    return with_check


class CheckedLoss(keras.losses.Loss):
    """A user's loss object with the same check."""

    def __init__(self, loss):
        super().__init__(loss.name, loss.reduction, loss.dtype)
        self.__wrapped__ = loss

    def call(self, y_true, y_pred):
        return checks.loss_values(self.name, self.__wrapped__.call(y_true, y_pred), y_pred)
