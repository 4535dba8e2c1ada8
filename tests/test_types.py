"""What float types promise: CG's numbers in float32 at least, products right to the type's rounding, progress of 1e-6 seen."""

import contextlib
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import compiled, hessian_free, model_data, with_objective
from training import fit, trainable

from examples.precision import precision
from keras_hf import DoubleBackward, ForwardAccumulation, GaussNewton, HessianFree, Identity

ROUNDING = {"float64": 1e-12, "float32": 1e-5, "mixed_bfloat16": 3e-2, "mixed_float16": 5e-3}
NUM_CASES = 300
SLOW = pytest.mark.slow


@contextlib.contextmanager
def types(policy):
    """Context of a dtype policy, with `floatx` float64 only where the policy is."""
    with precision("float64" if policy == "float64" else "float32"):
        keras.config.set_dtype_policy(policy)
        yield


def network(kind):
    """A network with the same weights in every type."""
    stack = {
        "dense": lambda: [keras.Input((6,)), layers.Dense(5, "tanh"), layers.Dense(3)],
        "dense, float32 output": lambda: [keras.Input((6,)), layers.Dense(5, "tanh"), layers.Dense(3, dtype="float32")],
        "convolution": lambda: [
            keras.Input((6, 6, 1)),
            layers.Conv2D(3, 3, activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(3),
        ],
        "recurrent": lambda: [keras.Input((4, 3)), layers.LSTM(3), layers.Dense(3)],
    }[kind]()
    model = keras.Sequential(stack)
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape) * 0.5)
    return model


def cases(model):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(NUM_CASES, *model.input_shape[1:])).astype("float32")
    return x, rng.normal(size=(NUM_CASES, 3)).astype("float32")


WAYS = {"double": DoubleBackward(), "forward": ForwardAccumulation()}
# Of vectors: such numbers leave the range of float16.
SCALES = 1.0, 1e-7, 1e6


def numbers(kind, policy, ways):
    """Gradient and squares of a network under a policy, and products of vectors of several sizes divided by these, as float64 arrays in a dict."""
    with types(policy):
        model = compiled(network(kind))
        data = model_data(model, *cases(model.network))

        def compute(objective):
            v = np.cos(np.arange(objective.num_weights))
            rows = tf.constant(np.multiply.outer(SCALES, v), objective.dtype)
            products = [objective.product(GaussNewton(WAYS[way]))(rows) for way in ways]
            return objective.loss_and_gradient().gradient, objective.squared_gradients(), products

        gradient, squares, products = with_objective(model, data, compute)
    found = {"gradient": gradient, "squares": squares}
    for way, rows in zip(ways, products, strict=True):
        found |= {
            f"{way}, {scale}": np.asarray(row, "float64") / scale for scale, row in zip(SCALES, rows, strict=True)
        }
    return {name: np.asarray(value, "float64") for name, value in found.items()}


@functools.cache
def exact_numbers(kind):
    """The same in float64."""
    return numbers(kind, "float64", ["double"])


@pytest.mark.parametrize(
    "kind, policy, ways",
    [
        ("dense", "float32", ["double"]),
        ("dense", "mixed_float16", ["double", "forward"]),
        ("dense, float32 output", "mixed_float16", ["double"]),
        ("convolution", "mixed_float16", ["double"]),
        pytest.param("dense", "mixed_bfloat16", ["double"], marks=SLOW),
        pytest.param("recurrent", "mixed_float16", ["double"], marks=SLOW),
    ],
)
def test_gradient_squares_and_products_of_vectors_of_any_size_are_right_to_rounding(kind, policy, ways):
    exact, found = exact_numbers(kind.split(",")[0]), numbers(kind, policy, ways)
    assert len(found) == 2 + 3 * len(ways)
    for name, value in found.items():
        expected = exact[name if name in exact else "double, 1.0"]
        error = np.linalg.norm(value - expected) / np.linalg.norm(expected)
        # Squares double the relative error.
        assert error < ROUNDING[policy] * (2 if name == "squares" else 1), name


def cheap_optimizer():
    return hessian_free(damping=0.1, preconditioner=Identity(), max_iterations=10, growing_batch=None, seed=0)


def vectors_are_of(model, dtype):
    """Whether weights and all that updates remember are of a type."""
    kept = [model.optimizer.state().solver["warm_start"], model.optimizer.damping, *model.trainable_weights]
    return all(variable.dtype == dtype for variable in kept)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float64", "mixed_bfloat16", "mixed_float16"])
def test_training_works_and_keeps_its_vectors_in_float32_at_least(policy):
    with types(policy):
        model = trainable(network("dense"), optimizer=cheap_optimizer())
        x, _ = cases(model.network)
        losses = fit(model, x, np.sin(x[:, :3]), epochs=6)["loss"]
    assert losses[-1] < 0.5 * losses[0]
    assert isinstance(model.optimizer, HessianFree)  # No loss scaling around it.
    assert vectors_are_of(model, "float64" if policy == "float64" else "float32")


def test_check_products_allows_for_the_rounding_of_the_type():
    with types("mixed_bfloat16"):
        model = compiled(network("dense"))
        checks = model.check_products(*cases(model.network))
    assert checks and all(check.holds and check.tolerance == pytest.approx(2e-2) for check in checks)


@pytest.mark.parametrize("dtype", [None, pytest.param("float32", marks=SLOW)])
def test_a_cross_entropy_that_leaves_float16_is_said_with_the_cure(dtype):
    with types("mixed_float16"):
        output = layers.Dense(2, "softmax", dtype=dtype)
        model = compiled(
            keras.Sequential([keras.Input((1,)), output]),
            "sparse_categorical_crossentropy",
            optimizer=cheap_optimizer(),
        )
        # The label has a probability of 8e-7, so that the derivative of the loss in it is -1.2e6.
        output.kernel.assign([[0.0, 14.0]])
        said = pytest.warns(UserWarning, match='In float16.*give the last layer `dtype="float32"`')
        with said if dtype is None else contextlib.nullcontext():
            history = fit(model, np.ones((300, 1)), np.zeros(300))
    assert np.isfinite(history["gradient_norm"][0]) == (dtype == "float32")


def test_arithmetic_is_unaltered_during_training_and_as_before_afterwards():
    """Full float32 products, and no additions put together."""

    def settings():
        options = tf.config.optimizer.get_experimental_options()
        return tf.config.experimental.tensor_float_32_execution_enabled(), options.get("arithmetic_optimization", True)

    seen = []

    class Looking(layers.Layer):
        def call(self, x):
            seen.append(settings())
            return x

    model = compiled(keras.Sequential([keras.Input((6,)), Looking(), layers.Dense(3)]), optimizer=cheap_optimizer())
    seen.clear()
    tf.config.experimental.enable_tensor_float_32_execution(True)
    fit(model, *cases(model.network))
    assert (False, False) in seen
    assert settings() == (True, True)
    assert vectors_are_of(model, "float32")
