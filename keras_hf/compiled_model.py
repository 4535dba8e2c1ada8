"""The compiled Keras model as plain functions for the update, and the choices made by tracing it."""

import logging
import math
from typing import Any, NamedTuple

import keras

from keras_hf.common import checks, keras_private, vectors
from keras_hf.pinn import PINN
from keras_hf.problem.fixed_network import Task
from keras_hf.problem.linearization import without_fused_kernels
from keras_hf.problem.loss_terms import WholeLoss, recorded_terms
from keras_hf.problem.structure import second_derivatives_explained, trace_structure
from keras_hf.solvers.kronecker import num_factored_weights

_logger = logging.getLogger("keras_hf")

# Up to which the exact solver is the choice: operations that form the system, on data and on differential equations, and numbers of its Jacobian
# (half a GiB). Conjugate gradients are ahead on smooth data from about the first bound on (benchmarks/exact_solver.py); on equations they stall, and
# are behind in the end at twice the second, too, where an update of the exact solver takes 6 s or more (docs/physics-informed.md).
_MOST_OPERATIONS, _MOST_OPERATIONS_FOR_EQUATIONS, _MOST_FLOATS = 5e9, 1e11, 2**26
# Where momentum was measured to be ahead (benchmarks/classifier_solvers.py): losses, and weights, of which nearly all are in dense layers and
# convolutions. With attention it was behind.
_CLASSIFYING = {"categorical_crossentropy", "sparse_categorical_crossentropy"}
_FEWEST_WEIGHTS, _LEAST_SHARE = 5_000, 0.9
_ELSEWHERE = keras.layers.EinsumDense, keras.layers.Embedding


class Choice(NamedTuple):
    """What a trace of the compiled model chose, and the tolerance that its products are checked with.

    Attributes:
        curvature: `curvature.Curvature`, fitted to the network: products are formed by its linearization.
        rounding: Float, the relative difference allowed between two computations of the same number.
        suspects: List of strings, cures for layers of which some forms have a wrong second derivative in TensorFlow.
        epsilon: Float, machine epsilon of the coarsest float type that the network computes in.
    """

    curvature: Any
    rounding: float
    suspects: list
    epsilon: float

    @property
    def linearization(self):
        """`linearization.Linearization`, or `None` where products are formed without one."""
        return self.curvature.linearization


def require_targets(model, y):
    """Raises an error if the compiled loss needs targets and there are none."""
    if y is None and keras_private.compiled_loss(model) is not None and not overrides_compute_loss(model):
        raise ValueError(f"`y` must hold what the loss {model.loss!r} compares predictions with. Received: y=None.")


def task_of(model, whole_loss):
    """Returns the `fixed_network.Task` of a compiled model.

    Args:
        model: `HFModel`, compiled.
        whole_loss: Callable `(data, y_pred) -> scalar`, the result of an overridden `compute_loss`, without regularizers and added losses.

    Raises:
        ValueError: If there is no trainable weight, if one cannot be trained, if they are not those for which the optimizer was built, or if a
            layer of several replicas is `synchronized`.
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
        with without_fused_kernels(layers):
            return model(x, training=True)

    return Task(
        network=network,
        loss_terms=lambda data, y_pred: loss_terms(model, whole_loss, data, y_pred),
        regularizers=[
            (variable.value, variable.regularizer) for variable in trainable if variable.regularizer is not None
        ],
        update_metrics=lambda data, y_pred: update_metrics(model, data, y_pred),
        variables=[variable.value for variable in trainable],
        weights=trainable,
        constraints=[variable.constraint for variable in trainable],
        states=[variable for variable in model.non_trainable_variables if id(variable) not in seeds],
        seeds=list(seeds.values()),
        seed=optimizer.seed,
        layers=layers,
        structural_damping=optimizer.structural_damping,
    )


def trace(task, data, curvature, solver, num_replicas, name):
    """Traces a task once, chooses how products are formed, and logs the choice.

    Args:
        task: `fixed_network.Task`.
        data: `fixed_network.Data`, of which only types and shapes are used.
        curvature: `curvature.Curvature`.
        solver: `solver.Solver`.
        num_replicas: Integer.
        name: String, the network's name.

    Returns:
        A `structure.Structure` and a `Choice`.

    Raises:
        ValueError: If there is no loss, if the network draws random numbers that cannot be held fixed, if the curvature is wrong for it, or if
            structural damping finds no hidden states.
    """
    with second_derivatives_explained({}):
        structure = trace_structure(task, data)
    checks.has_loss(structure.combinations or structure.has_added_loss)
    solver.require(structure)
    fitted = curvature.fitted_to(structure, num_replicas)
    _logger.info(
        "Steps for '%s': by %s%s.", name, type(solver).__name__, " on all cases" if solver.uses_all_cases else ""
    )
    if fitted.linearization is not None and not solver.uses_all_cases:
        _logger.info(
            "Products for '%s': %s by %s(jit_compile=%s)%s.",
            name,
            type(fitted).__name__,
            type(fitted.linearization).__name__,
            fitted.linearization.jit_compile,
            "" if curvature.linearization else ", chosen for the network",
        )
    return structure, Choice(fitted, structure.rounding, structure.suspects, structure.epsilon)


def exact_solver_pays(model, data, num_cases):
    """Whether `DirectSolver` can train a compiled model and is the choice for it.

    It ends at far smaller losses where digits count: on squared losses in float64, if the system is small; of a `PINN` it may be larger. Conjugate
    gradients may be ahead early, and were on the two classifiers measured.

    Args:
        model: `HFModel`, compiled and built.
        data: `fixed_network.Data`, a few cases, of which only types and shapes are used.
        num_cases: Integer, of an update.
    """
    num_weights = vectors.num_weights([variable.value for variable in model.trainable_variables])
    outputs = [leaf for leaf in keras.tree.flatten(data.y) if leaf is not None]
    num_rows = num_cases * sum(math.prod(leaf.shape[1:]) for leaf in outputs)
    most = _MOST_OPERATIONS_FOR_EQUATIONS if isinstance(model.network, PINN) else _MOST_OPERATIONS
    is_small = 2 * num_rows * num_weights * min(num_rows, num_weights) <= most
    is_precise = all(variable.dtype == "float64" for variable in model.trainable_variables)
    names = {loss_name(leaf) for leaf in keras.tree.flatten(model.loss)}
    is_squared = bool(outputs) and names == {"mean_squared_error"} and not overrides_compute_loss(model)
    if not (is_small and num_rows * num_weights <= _MOST_FLOATS and is_precise and is_squared):
        return False
    with second_derivatives_explained({}):
        structure = trace_structure(task_of(model, None), data)
    return structure.is_vectorizable and not structure.without_rows


def momentum_pays(model):
    """Whether `PreconditionedMomentum` is the choice for a compiled and built model.

    It is for classifiers whose weights are nearly all those of dense layers and convolutions, whatever the number of cases (docs/which-solver.md has
    the measurements).

    Args:
        model: `HFModel`, compiled and built.
    """
    names = {loss_name(leaf) for leaf in keras.tree.flatten(model.loss)}
    if not names or not names <= _CLASSIFYING or overrides_compute_loss(model):
        return False
    variables = [variable.value for variable in model.trainable_variables]
    num_weights = vectors.num_weights(variables)
    if num_weights < _FEWEST_WEIGHTS:
        return False
    layers = [layer for layer in keras_private.all_layers(model.network) if not isinstance(layer, _ELSEWHERE)]
    return num_factored_weights(layers, variables) >= _LEAST_SHARE * num_weights


def overrides_compute_loss(model):
    """Whether the class of a model overrides `compute_loss`."""
    return type(model).compute_loss is not keras.Model.compute_loss


def loss_terms(model, whole_loss, data, y_pred):
    """Returns the list of terms of the compiled loss on these cases; for the arguments see `task_of`."""
    replicas = model.distribute_strategy.num_replicas_in_sync
    if overrides_compute_loss(model):
        # Keras divides its own loss by the number of replicas, and expects the user's to be divided already.
        return [WholeLoss(lambda: replicas * whole_loss(data, y_pred))]
    compile_loss = keras_private.compiled_loss(model)
    if compile_loss is None:
        return []
    if not compile_loss.built:
        compile_loss.build(data.y, y_pred)
    with recorded_terms(compile_loss, replicas) as terms:
        compile_loss(data.y, y_pred, data.sample_weight)
    return terms


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
