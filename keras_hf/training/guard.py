"""Context of an update: the arithmetic that it relies on, and errors that name the cure and leave every value unchanged."""

import contextlib

import tensorflow as tf

from keras_hf.differentiation.linearization import ForwardAccumulation
from keras_hf.network.second_derivatives import cures_of_wrong_ones


@contextlib.contextmanager
def unaltered_arithmetic(optimizes_graphs=False):
    """Context in which TensorFlow does not change the arithmetic of an update.

    GPUs multiply float32 matrices in TF32, whose 10 bits are too few for CG's recurrences. The arithmetic optimizer merges additions into one sum,
    which becomes an accumulator if TensorFlow expects a shortage of memory; in the loops of large networks creating the accumulator fails (2.21,
    `AlreadyExistsError`). An update takes equally long without this optimizer.

    Args:
        optimizes_graphs: Whether the others of TensorFlow's graph optimizers look at what is computed for the first time; see
            `setup.Setup.gains_by_optimized_graphs`. Where they are switched off already, they stay so.
    """
    options = tf.config.optimizer.get_experimental_options()
    before = {"arithmetic_optimization": True, "disable_meta_optimizer": False}
    before = {name: options.get(name, default) for name, default in before.items()}
    none = before["disable_meta_optimizer"] or not optimizes_graphs
    tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False, "disable_meta_optimizer": none})
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(tf32)
        tf.config.optimizer.set_experimental_options(before)


@contextlib.contextmanager
def values_kept(variables):
    """Context that restores variables at its end.

    Args:
        variables: List of `tf.Variable`.
    """
    before = [variable.read_value() for variable in variables]
    try:
        yield
    finally:
        _put_back(variables, before)


@contextlib.contextmanager
def values_kept_on_error(variables):
    """Context that restores variables if it ends with an error.

    Args:
        variables: List of `tf.Variable`.
    """
    before = [variable.read_value() for variable in variables]
    try:
        yield
    except BaseException:
        _put_back(variables, before)
        raise


def _put_back(variables, values):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def raise_if_wrong(name, setup, loss, again, product_error):
    """Raises an error if the numbers of an update are inconsistent.

    Args:
        name: String, the network's name.
        setup: `setup.Setup`.
        loss: Float, the loss at the start.
        again: Float, the same loss computed another time.
        product_error: Float, the relative error of the products in their identities.

    Raises:
        ValueError: If one of these errors is larger than rounding.
    """
    rounding, largest = setup.structure.rounding, max(abs(loss), abs(again))
    repeat_error = abs(loss - again) / largest if largest else 0.0
    if repeat_error > rounding:
        raise ValueError(
            f"The network '{name}' gave two different losses for the same cases and weights ({loss:.6g}, and "
            f"{repeat_error:.2g} of it apart). Hessian-free needs one fixed function per update; draw random numbers from a "
            "`keras.random.SeedGenerator` that the layer holds, and let nothing in `call` depend on how often it was called."
        )
    if product_error > rounding and setup.solver.forms_rows:
        raise ValueError(
            f"The rows of the Jacobian of '{name}' are wrong: their product with a vector and the outputs' forward derivative along it must be "
            f"equal. Their relative difference is {product_error:.2g}. TensorFlow has a wrong derivative of one of the operations. "
            f"{_known_cure(setup)} Or use `ConjugateGradient()`, after `HFModel.check_products` found its products right."
        )
    if product_error > rounding:
        raise ValueError(
            f"The products of '{name}' by `{type(setup.linearization).__name__}` are wrong: u'(Jv) and (J'u)'v, and v'Gv and "
            f"(Jv)'H(Jv), must be equal. Their relative difference is {product_error:.2g}. {_cure_for_products(setup)} "
            "`HFModel.check_products` prints details."
        )


def _cure_for_products(setup):
    if isinstance(setup.linearization, ForwardAccumulation):
        return "Leave the curvature's `linearization` at its default, or use `DoubleBackward()`."
    return f"TensorFlow has a wrong second derivative of one of the operations. {_known_cure(setup)}"


def _known_cure(setup):
    return " ".join(cures_of_wrong_ones(setup.structure.layer_of_op)) or "Replace that layer."
