"""What surrounds an update: the arithmetic that it counts on, and errors that name the cure and leave every value as it was."""

import contextlib
import re

import tensorflow as tf

from keras_hf.problem.linearization import ForwardAccumulation

# How the data of an epoch end, which is no error.
END_OF_DATA = (StopIteration, tf.errors.OutOfRangeError)


@contextlib.contextmanager
def unaltered_arithmetic():
    """Keeps TensorFlow from computing something near what an update says.

    GPUs multiply float32 matrices in TF32, whose 10 bits CG's recurrences don't survive. The arithmetic optimizer makes one sum of several
    additions, which becomes an accumulator where it expects memory to run short; in the loops of large networks creating that fails (2.21,
    `AlreadyExistsError`). Without it an update takes as long.
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
    """Leaves variables as they were before it was opened.

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
    """Leaves variables as they were before it was opened where it is left by an error.

    Args:
        variables: List of `tf.Variable`.
        but: Tuple of exceptions that are no errors here.
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
    """Names the cure where XLA cannot compile the products that the user wanted compiled.

    Args:
        name: String, the network's name.
        choice: Callable `() -> compiled_model.Choice` of the last trace, which may be made while this is open, or `None` before any.
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
    """Raises where an update was rejected because its numbers contradict each other.

    Args:
        name: String, the network's name.
        choice: `compiled_model.Choice`.
        loss: Float, the loss at the start.
        product_error: Float, by how much of itself what must be equal of products differs.
        repeat_error: Float, by how much of itself a repeated loss differs.

    Raises:
        ValueError: If one of them is more than rounding.
    """
    if repeat_error > choice.rounding:
        raise ValueError(
            f"The network '{name}' gave two different losses for the same cases and weights ({loss:.6g}, and "
            f"{repeat_error:.2g} of it apart). Hessian-free needs one fixed function per update; draw random numbers from a "
            "`keras.random.SeedGenerator` that the layer holds, and let nothing in `call` depend on how often it was called."
        )
    if product_error > choice.rounding:
        raise ValueError(
            f"The products of '{name}' by `{type(choice.linearization).__name__}` are wrong: what must be equal (v'Gv and "
            f"(Jv)'H(Jv), or u'(Jv) and (J'u)'v) differs by {product_error:.2g} of itself. {_cure_for_products(choice)} "
            "`HFModel.check_products` tells more."
        )


def _cure_for_products(choice):
    if isinstance(choice.linearization, ForwardAccumulation) or choice.linearization.jit_compile:
        return "Leave the curvature's `linearization` at its default, or use `DoubleBackward()`."
    known = " ".join(choice.suspects) or "Replace that layer."
    return f"TensorFlow has a wrong second derivative of one of the operations. {known}"
