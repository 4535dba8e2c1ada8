"""What curvatures promise: products equal to dense matrices made by other means, in both ways to differentiate."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import (
    PROBLEMS,
    compiled,
    dense_matrix,
    inputs,
    jacobian,
    loss_derivatives,
    make_model,
    model_data,
    with_objective,
)

from keras_hf import ConstantDamping, DoubleBackward, ForwardAccumulation, GaussNewton, Hessian

pytestmark = pytest.mark.usefixtures("float64")

LINEARIZATIONS = [DoubleBackward(), ForwardAccumulation()]
EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(params=LINEARIZATIONS, ids=lambda way: type(way).__name__)
def linearization(request):
    return request.param


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param]


def matrix(model, data, curvature, **arguments):
    return with_objective(
        model, data, lambda objective: dense_matrix(objective.product(curvature), objective.num_weights), **arguments
    ).numpy()


def gauss_newton_oracle(model, data, problem):
    """J'HJ / N with J by `GradientTape.jacobian` and H by hand."""
    hidden, output = model.network.layers

    def pre_activation():
        return tf.matmul(hidden(data.x), output.kernel) + output.bias

    variables = [variable.value for variable in model.trainable_variables]
    j = jacobian(lambda: problem.cut(pre_activation()), variables)
    h = problem.output_hessian(pre_activation(), data.y).numpy()
    return np.einsum("nip,nij,njq->pq", j, h, j) / len(j)


def test_gauss_newton_equals_the_dense_matrix(problem, linearization):
    model = make_model(problem.activation, problem.loss)
    data = model_data(model, inputs(), problem.targets(np.random.default_rng(3)))
    found = matrix(model, data, GaussNewton(linearization))
    np.testing.assert_allclose(found, gauss_newton_oracle(model, data, problem), **EXACT)


def test_hessian_equals_the_dense_matrix(problem, linearization):
    model = make_model(problem.activation, problem.loss)
    data = model_data(model, inputs(), problem.targets(np.random.default_rng(3)))
    found = matrix(model, data, Hessian(linearization))
    np.testing.assert_allclose(found, loss_derivatives(model, data)[2], **EXACT)


def test_gauss_newton_equals_hessian_where_the_network_is_linear_in_its_weights(linearization):
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    model = compiled(network, keras.losses.CategoricalCrossentropy(from_logits=True))
    data = model_data(model, inputs(), np.eye(3)[np.arange(15) % 3])
    np.testing.assert_allclose(
        matrix(model, data, GaussNewton(linearization)), matrix(model, data, Hessian(linearization)), **EXACT
    )


@pytest.mark.parametrize("curvature", [GaussNewton, Hessian])
def test_regularizers_enter_with_their_second_derivative(curvature, linearization):
    data_free = make_model()
    regularized = make_model(regularizer=keras.regularizers.L2(0.25))
    y = PROBLEMS["mse"].targets(np.random.default_rng(3))
    data = model_data(data_free, inputs(), y)
    model_data(regularized, inputs(), y)
    difference = matrix(regularized, data, curvature(linearization)) - matrix(data_free, data, curvature(linearization))
    # L2(c) is c * sum(w^2): 2c on the first kernel (8 weights) and the last bias (3), as make_model sets it.
    expected = np.diag([0.5] * 8 + [0.0] * 4 + [0.0] * 12 + [0.5] * 3)
    np.testing.assert_allclose(difference, expected, **EXACT)


def test_added_losses_enter_with_their_exact_hessian(linearization):
    class Adding(keras.layers.Layer):
        def call(self, x):
            self.add_loss(tf.reduce_mean(tf.reduce_sum(x**4, -1)))
            return x

    def build(layers):
        hidden = keras.layers.Dense(4, "tanh", kernel_initializer=keras.initializers.RandomNormal(seed=1))
        output = keras.layers.Dense(3, kernel_initializer=keras.initializers.RandomNormal(seed=2))

        return compiled(keras.Sequential([keras.Input((2,)), hidden, *layers, output]))

    model, plain = build([Adding()]), build([])
    data = model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)))
    model_data(plain, data.x, data.y)
    loss, gradient, hessian = loss_derivatives(model, data)
    found = with_objective(model, data, lambda objective: objective.loss_and_gradient())
    np.testing.assert_allclose(found.loss, loss, **EXACT)
    np.testing.assert_allclose(found.gradient, gradient, **EXACT)
    np.testing.assert_allclose(matrix(model, data, Hessian(linearization)), hessian, **EXACT)
    of_added = matrix(model, data, GaussNewton(linearization)) - matrix(plain, data, GaussNewton(linearization))
    np.testing.assert_allclose(of_added, hessian - loss_derivatives(plain, data)[2], **EXACT)


def test_forward_accumulation_refuses_a_network_with_loops():
    network = keras.Sequential([keras.Input((4, 2)), keras.layers.GRU(2), keras.layers.Dense(1)])
    model = compiled(network)
    model.optimizer.curvature = GaussNewton(ForwardAccumulation())
    with pytest.raises(ValueError, match=r"wrong products.*'While'.*DoubleBackward"):
        model.fit(np.zeros((8, 4, 2)), np.zeros((8, 1)), verbose=0, callbacks=[ConstantDamping()])


def test_double_backward_is_right_for_loops_and_nested_functions():
    class Nested(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

        @tf.function
        def scaled(self, x):
            return tf.tanh(x * self.scale)

        def call(self, x):
            return self.scaled(x)

    layers = [
        keras.layers.SimpleRNN(2),
        Nested(),
        keras.layers.Dense(1),
    ]
    model = compiled(keras.Sequential([keras.Input((4, 2)), *layers]))
    rng = np.random.default_rng(4)
    data = model_data(model, rng.normal(size=(5, 4, 2)), rng.normal(size=(5, 1)))
    variables = [variable.value for variable in model.trainable_variables]
    j = jacobian(lambda: model(data.x), variables)
    np.testing.assert_allclose(matrix(model, data, GaussNewton()), 2 / 5 * np.einsum("nip,niq->pq", j, j), **EXACT)


def test_a_curvature_takes_linearizations_only():
    with pytest.raises(
        TypeError, match="`linearization` must be a `Linearization` object.*Received: linearization='forward'"
    ):
        GaussNewton("forward")


@pytest.mark.parametrize("curvature", [GaussNewton(), Hessian(ForwardAccumulation())])
def test_config_round_trip(curvature):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(curvature))
    assert type(again) is type(curvature)
    assert type(again.linearization) is type(curvature.linearization)
