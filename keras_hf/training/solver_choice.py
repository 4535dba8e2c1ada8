"""Which solver trains a compiled model where the optimizer leaves that open, by measured rules."""

import math

import keras

from keras_hf.common import keras_private, vectors
from keras_hf.solvers.direct import DirectSolver
from keras_hf.solvers.kronecker import factored_layers, num_factored_weights
from keras_hf.solvers.momentum import PreconditionedMomentum
from keras_hf.training.compiled_model import loss_name, overrides_compute_loss, task_of
from keras_hf.training.setup import traced_structure

# Up to which the exact solver is the choice: operations that form the system, on data and on differential equations, and numbers of its Jacobian
# (half a GiB). Conjugate gradients are ahead on smooth data from about the first bound on (benchmarks/exact_solver.py); on equations they stall, and
# are behind in the end at twice the second, too, where an update of the exact solver takes 6 s or more (docs/measured-equations.md).
_MOST_OPERATIONS, _MOST_OPERATIONS_FOR_EQUATIONS, _MOST_FLOATS = 5e9, 1e11, 2**26
# Those of errors, of which the exact solver takes each case's second derivative, where it is negative as zero: conjugate gradients stop there.
_OF_ERRORS = {"mean_squared_error", "mean_squared_logarithmic_error", "huber", "huber_loss", "log_cosh", "cauchy"}
# Where momentum was measured to be ahead (benchmarks/classifier_solvers.py): losses, and weights, of which nearly all have Kronecker factors.
_CLASSIFYING = {"categorical_crossentropy", "sparse_categorical_crossentropy"}
_FEWEST_WEIGHTS, _LEAST_SHARE = 5_000, 0.9


def reason(model):
    """Returns why a compiled model's solver is the one in use, for a user to read."""
    if not model.optimizer.chooses_solver:
        return "as `HessianFree` was told"
    reasons = {
        DirectSolver: "for small systems",
        PreconditionedMomentum: "for classifiers whose layers have Kronecker factors",
    }
    return reasons.get(type(model.solver), "the default")


def exact_solver_pays(model, data, num_cases, trace=None):
    """Whether `DirectSolver` can train a compiled model and is the choice for it.

    It ends at far smaller losses where digits count: on squared and robust losses of errors, if the system is small; of a `PINN` it may be larger.
    Conjugate gradients may be ahead early, and were on the two classifiers measured.

    Args:
        model: `HFModel`, compiled and built.
        data: `Data`, a few cases, of which only types and shapes are used.
        num_cases: Integer, of an update.
        trace: Callable without arguments that returns the `structure.Structure` of the network; called where the rest allows the solver.
    """
    outputs = [leaf for leaf in keras.tree.flatten(data.y) if leaf is not None]
    num_weights = vectors.num_weights([variable.value for variable in model.trainable_variables])
    num_rows = num_cases * sum(math.prod(leaf.shape[1:]) for leaf in outputs)
    most = _MOST_OPERATIONS_FOR_EQUATIONS if getattr(model.network, "solves_equations", False) else _MOST_OPERATIONS
    is_small = 2 * num_rows * num_weights * min(num_rows, num_weights) <= most
    names = {loss_name(leaf) for leaf in keras.tree.flatten(model.loss)}
    is_of_errors = bool(outputs) and bool(names) and names <= _OF_ERRORS and not overrides_compute_loss(model)
    if not (is_small and num_rows * num_weights <= _MOST_FLOATS and is_of_errors):
        return False
    structure = trace() if trace else traced_structure(task_of(model), data)
    return structure.is_vectorizable and not structure.without_rows


def has_positions(model):
    """Whether some layer with Kronecker factors is of a kind that serves several positions of a case, as convolutions and attention do.

    Embeddings alone do not count: few cases hold few of the tokens.
    """
    variables = [variable.value for variable in model.trainable_variables]
    layers = factored_layers(keras_private.all_layers(model.network), variables)
    return any(type(layer) not in (keras.layers.Dense, keras.layers.Embedding) for layer in layers)


def momentum_pays(model):
    """Whether `PreconditionedMomentum` is the choice for a compiled and built model.

    It is for classifiers whose weights are nearly all in layers with Kronecker factors, whatever the number of cases (docs/measured-solvers.md has
    the measurements).

    Args:
        model: `HFModel`, compiled and built.
    """
    if not _classifies(model) or overrides_compute_loss(model):
        return False
    variables = [variable.value for variable in model.trainable_variables]
    num_weights = vectors.num_weights(variables)
    if num_weights < _FEWEST_WEIGHTS:
        return False
    return num_factored_weights(keras_private.all_layers(model.network), variables) >= _LEAST_SHARE * num_weights


def _classifies(model):
    """Whether the loss of a compiled and built model is a cross-entropy of classes."""
    names = {loss_name(leaf) for leaf in keras.tree.flatten(model.loss)}
    if names == {"binary_crossentropy"}:
        # Of more numbers than one it may be that of an autoencoder, or of a mask. A network made by subclassing does not know before it is called.
        shapes = [tuple(output.shape) for output in getattr(model.network, "outputs", None) or []]
        return shapes in ([(None,)], [(None, 1)])
    return bool(names) and names <= _CLASSIFYING
