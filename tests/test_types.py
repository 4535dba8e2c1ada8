"""What float types promise: CG's numbers in float32 at least, products right to the type's rounding, progress of 1e-6 seen."""

import contextlib
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import compiled, model_data, with_objective

from keras_hf import DoubleBackward, ForwardAccumulation, GaussNewton, HessianFree, HFModel, LevenbergMarquardt

ROUNDING = {"float64": 1e-12, "float32": 1e-5, "mixed_bfloat16": 3e-2, "mixed_float16": 5e-3}
NUM_CASES = 300


@pytest.fixture(params=list(ROUNDING))
def policy(request):
    """A dtype policy, with `floatx` float64 only where the policy is."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64" if request.param == "float64" else "float32")
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


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


def numbers(kind, policy, loss="mse", scale=1.0, way=None):
    """Gradient, a product and squares of a network under a policy, as float64 arrays."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64" if policy == "float64" else "float32")
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(network(kind), loss)
        data = model_data(model, *cases(model.network))

        def compute(objective):
            v = tf.constant(scale * np.cos(np.arange(objective.num_weights)), objective.dtype)
            at_start = objective.loss_and_gradient()
            return (
                at_start.gradient,
                objective.product(GaussNewton(way or DoubleBackward()))(v) / scale,
                objective.squared_gradients(),
            )

        return [np.asarray(value, "float64") for value in with_objective(model, data, compute)]
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


@functools.cache
def exact_numbers(kind):
    """The same in float64."""
    return numbers(kind, "float64")


def relative_error(found, exact):
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize(
    "kind", ["dense", "dense, float32 output", "convolution", pytest.param("recurrent", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_gradient_product_and_squares_are_right_to_rounding(kind, policy):
    exact, found = exact_numbers(kind), numbers(kind, policy)
    for name, one, other in zip(("gradient", "product", "squares"), found, exact, strict=True):
        # Squares double the relative error.
        assert relative_error(one, other) < ROUNDING[policy] * (2 if name == "squares" else 1), name


@pytest.mark.parametrize("scale", [1e-7, 1e6])
def test_vectors_of_any_size_pass_through_float16(scale):
    exact, found = exact_numbers("dense"), numbers("dense", "mixed_float16", scale=scale)
    assert relative_error(found[1], exact[1]) < ROUNDING["mixed_float16"]


def test_forward_accumulation_takes_mixed_types_too():
    exact = exact_numbers("dense")
    found = numbers("dense", "mixed_float16", way=ForwardAccumulation())
    assert relative_error(found[1], exact[1]) < ROUNDING["mixed_float16"]


@pytest.mark.slow
def test_training_works_and_keeps_its_vectors_in_float32(policy):
    model = HFModel(network("dense"))
    model.compile(optimizer=HessianFree(damping=0.1, seed=0), loss="mse")
    x, y = cases(model.network)
    y = np.sin(x[:, :3])
    history = model.fit(x, y, epochs=6, verbose=0, callbacks=[LevenbergMarquardt()]).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert isinstance(model.optimizer, HessianFree)  # No loss scaling around it.
    expected = "float64" if policy == "float64" else "float32"
    assert model.optimizer.state().solver["warm_start"].dtype == model.optimizer.damping.dtype == expected
    assert all(weight.dtype == expected for weight in model.trainable_weights)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"], indirect=True)
def test_check_products_allows_for_the_rounding_of_the_type(policy):
    model = compiled(network("dense"))
    assert all(
        check.holds and check.tolerance == pytest.approx(2e-2) for check in model.check_products(*cases(model.network))
    )


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_cross_entropy_that_leaves_float16_is_said_with_the_cure(policy, dtype):
    output = layers.Dense(2, "softmax", dtype=dtype)
    model = compiled(keras.Sequential([keras.Input((1,)), output]), "sparse_categorical_crossentropy")
    # The label has a probability of 8e-7, so that the derivative of the loss in it is -1.2e6.
    output.kernel.assign([[0.0, 14.0]])
    said = pytest.warns(UserWarning, match='In float16.*give the last layer `dtype="float32"`')
    with said if dtype is None else contextlib.nullcontext():
        history = model.fit(np.ones((300, 1)), np.zeros(300), verbose=0, callbacks=[LevenbergMarquardt()]).history
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

    model = compiled(keras.Sequential([keras.Input((6,)), Looking(), layers.Dense(3)]))
    seen.clear()
    tf.config.experimental.enable_tensor_float_32_execution(True)
    x, y = cases(model.network)
    model.fit(x, y, verbose=0, callbacks=[LevenbergMarquardt()])
    assert (False, False) in seen
    assert settings() == (True, True)
