from types import SimpleNamespace

import pytest
import tensorflow as tf

from keras_hf import ConjugateGradient, DirectSolver, DoubleBackward, ForwardAccumulation
from keras_hf.training import guard


def choice(linearization=None, solver=None, **layer_of_op):
    """What a `Setup` says of products."""
    structure = SimpleNamespace(rounding=1e-3, layer_of_op=layer_of_op)
    solver, linearization = solver or ConjugateGradient(), linearization or DoubleBackward()
    return SimpleNamespace(solver=solver, linearization=linearization, structure=structure)


def settings():
    options = tf.config.optimizer.get_experimental_options()
    no_optimizers = options.get("disable_meta_optimizer", False)
    arithmetic = options.get("arithmetic_optimization", True)
    return tf.config.experimental.tensor_float_32_execution_enabled(), arithmetic, no_optimizers


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("of_user", [True, False])
def test_arithmetic_is_unaltered_while_it_is_open_and_as_before_afterwards(tf32, of_user):
    """Of the graph optimizers those of the user's are on that the network gains by."""
    before = settings()
    try:
        tf.config.experimental.enable_tensor_float_32_execution(tf32)
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not of_user})
        for gains in (True, False):
            with pytest.raises(RuntimeError), guard.unaltered_arithmetic(gains):
                assert settings() == (False, False, not (of_user and gains))
                raise RuntimeError
            assert settings() == (tf32, before[1], not of_user)
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before[0])
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": before[2]})


def test_values_are_kept_whatever_happens():
    variable = tf.Variable(1.0)
    with guard.values_kept([variable]):
        variable.assign(2.0)
    assert float(variable) == 1.0
    with pytest.raises(KeyboardInterrupt), guard.values_kept([variable]):
        variable.assign(2.0)
        raise KeyboardInterrupt
    assert float(variable) == 1.0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_puts_values_back(error):
    variable = tf.Variable(1.0)
    with pytest.raises(error), guard.values_kept_on_error([variable]):
        variable.assign(2.0)
        raise error
    assert float(variable) == 1.0


def test_numbers_within_rounding_pass():
    guard.raise_if_wrong("net", choice(), 1.0, 1.0 - 9e-4, 9e-4)
    guard.raise_if_wrong("net", choice(), 1.0, float("nan"), float("nan"))
    guard.raise_if_wrong("net", choice(), 0.0, 0.0, 0.0)


def test_a_loss_that_repeats_otherwise_is_named():
    with pytest.raises(ValueError, match="The network 'net' gave two different losses.*0.25, and 0.1 of it apart"):
        guard.raise_if_wrong("net", choice(), 0.25, 0.225, 0.5)


@pytest.mark.parametrize(
    ("of", "cure"),
    [
        (choice(ForwardAccumulation()), "Leave the curvature's `linearization` at its default, or use `DoubleBackward"),
        (choice(), "wrong second derivative of one of the operations. Replace that layer."),
        (choice(MaxPool="pool"), "of the operations. Layer 'pool': use `padding=\"valid\"`"),
    ],
)
def test_wrong_products_are_named_with_the_cure(of, cure):
    with pytest.raises(ValueError, match=f"The products of 'net' by `{type(of.linearization).__name__}`.*{cure}"):
        guard.raise_if_wrong("net", of, 0.25, 0.25, 0.1)


@pytest.mark.parametrize(
    ("layer_of_op", "cure"),
    [({}, "Replace that layer."), ({"MaxPool": "pool"}, "Layer 'pool': use `padding=\"valid\"`")],
)
def test_wrong_rows_are_named_as_such(layer_of_op, cure):
    of_rows = choice(solver=DirectSolver(), **layer_of_op)
    with pytest.raises(ValueError, match=f"The rows of the Jacobian of 'net' are wrong.*{cure}.*ConjugateGradient"):
        guard.raise_if_wrong("net", of_rows, 0.25, 0.25, 0.1)
