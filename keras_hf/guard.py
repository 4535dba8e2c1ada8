"""Context of an update: the arithmetic that it relies on, and errors that name the cure and leave every value unchanged."""

import contextlib
import re

import tensorflow as tf

from keras_hf.problem.linearization import ForwardAccumulation

# Exceptions at the end of an epoch's data, which are not errors.
END_OF_DATA = (StopIteration, tf.errors.OutOfRangeError)


@contextlib.contextmanager
def unaltered_arithmetic():
    """Context in which TensorFlow does not change the arithmetic of an update.

    GPUs multiply float32 matrices in TF32, whose 10 bits are too few for CG's recurrences. The arithmetic optimizer merges additions into one sum,
    which becomes an accumulator if TensorFlow expects a shortage of memory; in the loops of large networks creating the accumulator fails (2.21,
    `AlreadyExistsError`). An update takes equally long without this optimizer.
    """
    options = tf.config.optimizer.get_experimental_options()
    arithmetic = options.get("arithmetic_optimization", True)
    tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(tf32)
        tf.config.optimizer.set_experimental_options({"arithmetic_optimization": arithmetic})


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
def values_kept_on_error(variables, but=()):
    """Context that restores variables if it ends with an error.

    Args:
        variables: List of `tf.Variable`.
        but: Tuple of exceptions that are not errors here.
    """
    before = [variable.read_value() for variable in variables]
    try:
        yield
    except but:
        raise
    except BaseException:
        _put_back(variables, before)
        raise


def _put_back(variables, values):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


@contextlib.contextmanager
def xla_explained(name, choice):
    """Context in which an error of XLA while compiling products names the cure.

    Args:
        name: String, the network's name.
        choice: Callable that returns the `compiled_model.Choice` of the last trace, which may happen in this context, or `None` before any trace.
    """
    try:
        yield
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.NotFoundError) as error:
        linearization = choice() and choice().linearization
        is_compiled = linearization is not None and linearization.jit_compile
        if not is_compiled or not re.search("XLA|tf2xla|trying to compile", str(error)):
            raise
        raise ValueError(
            f"XLA cannot compile the products of '{name}'. Use `{type(linearization).__name__}(jit_compile=False)`. "
            f"Received from TensorFlow: {str(error)[:300]}"
        ) from error


def raise_if_wrong(name, choice, loss, product_error, repeat_error):
    """Raises an error if an update was rejected because its numbers are inconsistent.

    Args:
        name: String, the network's name.
        choice: `compiled_model.Choice`.
        loss: Float, the loss at the start.
        product_error: Float, the relative error of the products in their identities.
        repeat_error: Float, the relative difference of a repeated loss.

    Raises:
        ValueError: If one of these errors is larger than rounding.
    """
    if repeat_error > choice.rounding:
        raise ValueError(
            f"The network '{name}' gave two different losses for the same cases and weights ({loss:.6g}, and "
            f"{repeat_error:.2g} of it apart). Hessian-free needs one fixed function per update; draw random numbers from a "
            "`keras.random.SeedGenerator` that the layer holds, and let nothing in `call` depend on how often it was called."
        )
    if product_error > choice.rounding:
        raise ValueError(
            f"The products of '{name}' by `{type(choice.linearization).__name__}` are wrong: v'Gv and (Jv)'H(Jv), or u'(Jv) and "
            f"(J'u)'v, must be equal. Their relative difference is {product_error:.2g}. {_cure_for_products(choice)} "
            "`HFModel.check_products` prints details."
        )


def _cure_for_products(choice):
    if isinstance(choice.linearization, ForwardAccumulation) or choice.linearization.jit_compile:
        return "Leave the curvature's `linearization` at its default, or use `DoubleBackward()`."
    known = " ".join(choice.suspects) or "Replace that layer."
    return f"TensorFlow has a wrong second derivative of one of the operations. {known}"
