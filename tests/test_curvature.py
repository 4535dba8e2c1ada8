"""What curvatures promise: products equal to dense matrices made by other means, in both ways to differentiate."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import (
    PROBLEMS,
    case_gradients,
    compiled,
    dense_matrix,
    inputs,
    jacobian,
    loss_derivatives,
    make_model,
    model_data,
    squared_case_gradients,
    with_objective,
)

from keras_hf import (
    ConjugateGradient,
    ConstantDamping,
    DoubleBackward,
    EmpiricalFisher,
    FiniteDifferenceHessian,
    ForwardAccumulation,
    GaussNewton,
    Hessian,
    HessianFree,
    Identity,
    LevenbergMarquardt,
)

pytestmark = pytest.mark.usefixtures("float64")

LINEARIZATIONS = [DoubleBackward(), ForwardAccumulation()]
LINEARIZED = [GaussNewton, Hessian, EmpiricalFisher]
CURVATURES = [
    *(make(linearization) for make in LINEARIZED for linearization in LINEARIZATIONS),
    FiniteDifferenceHessian(),
]
EXACT = {"rtol": 1e-9, "atol": 1e-12}
# Relative to the largest entry: eps^(2/3), which truncation and rounding both are of the order of, times 100.
DIFFERENCES = {"float64": 4e-9, "float32": 2e-3}


def name_of(part):
    ways = [part.linearization] if getattr(part, "linearization", None) else []
    return "-".join(type(each).__name__ for each in (part, *ways))


@pytest.fixture(params=LINEARIZATIONS, ids=name_of)
def linearization(request):
    return request.param


@pytest.fixture(params=CURVATURES, ids=name_of)
def curvature(request):
    return request.param


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param]


# Every problem under one linearization; of the other, which is of the network alone, those with the most of it in the quick suite.
ROWS = pytest.mark.parametrize(
    ("problem", "linearization"),
    [
        pytest.param(
            problem,
            linearization,
            id=f"{name}-{name_of(linearization)}",
            marks=[] if number == 0 or name in ("mse", "sparse categorical") else [pytest.mark.slow],
        )
        for name, problem in PROBLEMS.items()
        for number, linearization in enumerate(LINEARIZATIONS)
    ],
)


def tensor(model, data, curvature, **arguments):
    """The matrix of the products that an update makes."""
    model.optimizer.curvature = curvature

    def of(objective):
        return dense_matrix(objective.product(model._choice.curvature), objective.num_weights)

    return with_objective(model, data, of, **arguments)


def matrix(model, data, curvature, **arguments):
    """The same as an array."""
    return tensor(model, data, curvature, **arguments).numpy()


def assert_equal(curvature, found, expected):
    """To rounding, or to that of differences."""
    if isinstance(curvature, FiniteDifferenceHessian):
        np.testing.assert_allclose(found, expected, rtol=0, atol=DIFFERENCES["float64"] * np.abs(expected).max())
    else:
        np.testing.assert_allclose(found, expected, **EXACT)


def gauss_newton_oracle(model, data, problem):
    """J'HJ / N with J by `GradientTape.jacobian` and H by hand."""
    hidden, output = model.network.layers

    def pre_activation():
        return tf.matmul(hidden(data.x), output.kernel) + output.bias

    variables = [variable.value for variable in model.trainable_variables]
    j = jacobian(lambda: problem.cut(pre_activation()), variables)
    h = problem.output_hessian(pre_activation(), data.y).numpy()
    return np.einsum("nip,nij,njq->pq", j, h, j) / len(j)


def fisher_oracle(model, data):
    """The mean over cases of outer products of gradients."""
    gradients = case_gradients(model, data)
    return gradients.T @ gradients / len(gradients)


@ROWS
def test_gauss_newton_equals_the_dense_matrix(problem, linearization):
    model = make_model(problem.activation, problem.loss)
    data = model_data(model, inputs(), problem.targets(np.random.default_rng(3)))
    found = matrix(model, data, GaussNewton(linearization))
    np.testing.assert_allclose(found, gauss_newton_oracle(model, data, problem), **EXACT)


@ROWS
def test_hessian_equals_the_dense_matrix(problem, linearization):
    model = make_model(problem.activation, problem.loss)
    data = model_data(model, inputs(), problem.targets(np.random.default_rng(3)))
    found = matrix(model, data, Hessian(linearization))
    np.testing.assert_allclose(found, loss_derivatives(model, data)[2], **EXACT)


@ROWS
def test_empirical_fisher_equals_the_mean_of_outer_products(problem, linearization):
    model = make_model(problem.activation, problem.loss)
    data = model_data(model, inputs(), problem.targets(np.random.default_rng(3)))
    found = matrix(model, data, EmpiricalFisher(linearization))
    np.testing.assert_allclose(found, fisher_oracle(model, data), **EXACT)
    np.testing.assert_allclose(np.diag(found), squared_case_gradients(model, data), **EXACT)


def test_differences_equal_the_dense_matrix(problem):
    model = make_model(problem.activation, problem.loss)
    data = model_data(model, inputs(), problem.targets(np.random.default_rng(3)))
    curvature = FiniteDifferenceHessian()
    assert_equal(curvature, matrix(model, data, curvature), loss_derivatives(model, data)[2])


def test_products_are_symmetric_and_those_of_any_pieces(curvature):
    model = make_model(loss=keras.losses.MeanSquaredError(), regularizer=keras.regularizers.L2(0.25))
    weight = np.linspace(0.1, 2, 15)
    data = model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)), weight)
    whole = matrix(model, data, curvature)
    assert_equal(curvature, whole, whole.T)
    assert_equal(curvature, matrix(model, data, curvature, micro_batch_size=4), whole)


# Sums of every kind of product in the quick suite, means of every way to differentiate.
@pytest.mark.parametrize(
    ("curvature", "reduction"),
    [
        pytest.param(
            curvature,
            reduction,
            id=f"{name_of(curvature)}-{reduction}",
            marks=[pytest.mark.slow]
            if reduction == "sum" and isinstance(curvature.linearization, ForwardAccumulation)
            else [],
        )
        for curvature in CURVATURES
        for reduction in ("sum", "mean_with_sample_weight")
    ],
)
def test_products_on_a_chunk_are_those_of_the_chunk_alone(curvature, reduction):
    model = make_model(loss=keras.losses.MeanSquaredError(reduction=reduction))
    data = model_data(
        model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)), np.tile(np.linspace(0.1, 2, 5), 3)
    )
    of_chunk = matrix(model, data, curvature, curvature_batch_size=5, micro_batch_size=2, update_number=1)
    # A sum over 5 cases stands for one over 15: its gradients are 3 times as large, and 15 of them count.
    scale = {"sum": 9 if isinstance(curvature, EmpiricalFisher) else 3}.get(reduction, 1)
    # One trace for all places.
    alone = tf.function(lambda start: tensor(model, data.take(start + tf.range(5)), curvature))
    matrices = [scale * alone(tf.constant(start)).numpy() for start in (0, 5, 10)]
    nearest = min(matrices, key=lambda one: np.abs(one - of_chunk).max())
    assert_equal(curvature, of_chunk, nearest)


@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight", "sum_over_batch_size"])
def test_empirical_fisher_follows_sample_weights_as_its_diagonal_does(reduction):
    model = make_model(loss=keras.losses.MeanSquaredError(reduction=reduction))
    data = model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)), np.linspace(0, 2, 15))
    found = matrix(model, data, EmpiricalFisher())
    squares = with_objective(model, data, lambda objective: objective.squared_gradients())
    np.testing.assert_allclose(np.diag(found), squares, **EXACT)
    if reduction == "sum_over_batch_size":
        np.testing.assert_allclose(found, fisher_oracle(model, data), **EXACT)


def test_empirical_fisher_takes_all_places_of_a_case_together(linearization):
    layers = [keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)]
    model = compiled(keras.Sequential([keras.Input((4, 2)), *layers]))
    rng = np.random.default_rng(4)
    data = model_data(model, rng.normal(size=(7, 4, 2)), rng.normal(size=(7, 4, 1)))
    found = matrix(model, data, EmpiricalFisher(linearization))
    np.testing.assert_allclose(found, fisher_oracle(model, data), **EXACT)


def test_empirical_fisher_takes_all_outputs_of_a_case_together():
    x = keras.Input((2,))
    hidden = keras.layers.Dense(3, "tanh")(x)
    outputs = [keras.layers.Dense(2)(hidden), keras.layers.Dense(1, "sigmoid")(hidden)]
    model = compiled(keras.Model(x, outputs), loss=["mse", "binary_crossentropy"])
    rng = np.random.default_rng(4)
    data = model_data(model, inputs(), [rng.normal(size=(15, 2)), rng.integers(0, 2, (15, 1)).astype("float64")])
    np.testing.assert_allclose(matrix(model, data, EmpiricalFisher()), fisher_oracle(model, data), **EXACT)


def test_empirical_fisher_of_a_loss_without_curvature_is_not_zero_and_gives_no_warning():
    optimizer = HessianFree(
        solver=ConjugateGradient(preconditioner=Identity()), curvature=EmpiricalFisher(), growing_batch=None
    )
    model = make_model(loss="mae", optimizer=optimizer)
    data = model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)))
    found = matrix(model, data, EmpiricalFisher())
    assert np.trace(found) > 0
    np.testing.assert_allclose(found, fisher_oracle(model, data), **EXACT)


@pytest.mark.parametrize(
    ("linearization", "micro_batch_size"), [(LINEARIZATIONS[0], 4), (LINEARIZATIONS[1], None)], ids=["pieces", "whole"]
)
def test_empirical_fisher_holds_batch_statistics_constant(linearization, micro_batch_size):
    stack = [keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = compiled(keras.Sequential([keras.Input((2,)), *stack]))
    data = model_data(model, inputs(), np.random.default_rng(3).normal(size=(15, 1)))
    arguments = {"micro_batch_size": micro_batch_size}
    found = matrix(model, data, EmpiricalFisher(linearization), **arguments)
    # Held against per-case gradients in the tests of preconditioners.
    squares = with_objective(model, data, lambda objective: objective.squared_gradients(), **arguments)
    np.testing.assert_allclose(np.diag(found), squares, **EXACT)
    np.testing.assert_allclose(found, found.T, **EXACT)
    assert np.linalg.matrix_rank(found) <= 15


def test_differences_equal_the_hessian_in_float32():
    exact = make_model()
    y = PROBLEMS["mse"].targets(np.random.default_rng(3))
    expected = matrix(exact, model_data(exact, inputs(), y), Hessian())
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    model = make_model()
    data = model_data(model, inputs().astype("float32"), y.astype("float32"))

    def compute(objective):
        product = objective.product(FiniteDifferenceHessian())
        return tf.map_fn(product, tf.eye(objective.num_weights)), product(tf.zeros([objective.num_weights]))

    found, of_zero = with_objective(model, data, compute)
    tolerance = DIFFERENCES["float32"] * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert not np.any(of_zero)


def test_differences_do_not_depend_on_the_length_of_the_vector_and_leave_the_weights_bit_equal():
    model = make_model(regularizer=keras.regularizers.L2(0.25))
    data = model_data(model, inputs(), PROBLEMS["mse"].targets(np.random.default_rng(3)))
    before = model.get_weights()

    def compute(objective):
        v = tf.sin(tf.range(27, dtype=tf.float64))
        product = objective.product(FiniteDifferenceHessian())
        return [product(length * v) / length for length in (1e-12, 1.0, 1e12)]

    small, middle, large = with_objective(model, data, compute)
    np.testing.assert_allclose(small, middle, rtol=1e-8)
    np.testing.assert_allclose(large, middle, rtol=1e-8)
    assert all((one == other).all() for one, other in zip(before, model.get_weights(), strict=True))


def test_differences_need_no_second_derivative_of_the_network():
    stack = [keras.layers.Dense(4, "softsign"), keras.layers.Dense(3)]
    model = compiled(keras.Sequential([keras.Input((2,)), *stack]))
    twin = compiled(
        keras.Sequential(
            [keras.Input((2,)), keras.layers.Dense(4, lambda x: x / (1 + tf.abs(x))), keras.layers.Dense(3)]
        )
    )
    y = PROBLEMS["mse"].targets(np.random.default_rng(3))
    data = model_data(model, inputs(), y)
    model_data(twin, inputs(), y)
    twin.set_weights(model.get_weights())
    curvature = FiniteDifferenceHessian()
    assert_equal(curvature, matrix(model, data, curvature), matrix(twin, data, Hessian()))


def test_differences_of_coarse_gradients_are_refused():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = make_model()
    model.optimizer.curvature = FiniteDifferenceHessian()
    with pytest.raises(ValueError, match=r"float32 or float64.*computes in bfloat16. Use `Hessian\(\)`"):
        model.fit(inputs(), np.zeros((15, 3)), verbose=0, callbacks=[ConstantDamping()])


def test_gauss_newton_equals_hessian_where_the_network_is_linear_in_its_weights(linearization):
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    model = compiled(network, keras.losses.CategoricalCrossentropy(from_logits=True))
    data = model_data(model, inputs(), np.eye(3)[np.arange(15) % 3])
    np.testing.assert_allclose(
        matrix(model, data, GaussNewton(linearization)), matrix(model, data, Hessian(linearization)), **EXACT
    )


@pytest.mark.parametrize("curvature", [*(make() for make in LINEARIZED), FiniteDifferenceHessian()], ids=name_of)
def test_regularizers_enter_with_their_second_derivative(curvature):
    data_free = make_model()
    regularized = make_model(regularizer=keras.regularizers.L2(0.25))
    y = PROBLEMS["mse"].targets(np.random.default_rng(3))
    data = model_data(data_free, inputs(), y)
    model_data(regularized, inputs(), y)
    difference = matrix(regularized, data, curvature) - matrix(data_free, data, curvature)
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
    differences = FiniteDifferenceHessian()
    for curvature in (Hessian(linearization), differences):
        assert_equal(curvature, matrix(model, data, curvature), hessian)
    of_added = hessian - loss_derivatives(plain, data)[2]
    for curvature in (GaussNewton(linearization), EmpiricalFisher(linearization)):
        found = matrix(model, data, curvature) - matrix(plain, data, curvature)
        np.testing.assert_allclose(found, of_added, **EXACT)


# With the Gauss-Newton matrix all other tests train.
@pytest.mark.parametrize("curvature", [Hessian(), EmpiricalFisher(), FiniteDifferenceHessian()], ids=name_of)
def test_training_with_any_curvature_lowers_the_loss(curvature):
    optimizer = HessianFree(
        damping=0.1,
        solver=ConjugateGradient(preconditioner=Identity()),
        curvature=curvature,
        growing_batch=None,
        seed=0,
    )
    model = make_model(optimizer=optimizer)
    x = inputs()
    y = np.stack([np.sin(x[:, 0]), x[:, 1] ** 2, x[:, 0] * x[:, 1]], 1)
    history = model.fit(x, y, epochs=10, verbose=0, callbacks=[LevenbergMarquardt()]).history
    assert np.diff(history["loss"]).max() <= 0
    assert history["loss"][-1] < 0.5 * history["loss"][0]


def test_forward_accumulation_refuses_a_network_with_loops():
    network = keras.Sequential([keras.Input((4, 2)), keras.layers.GRU(2), keras.layers.Dense(1)])
    model = compiled(network)
    model.optimizer.curvature = GaussNewton(ForwardAccumulation())
    with pytest.raises(ValueError, match=r"wrong products.*'While'.*DoubleBackward"):
        model.fit(np.zeros((8, 4, 2)), np.zeros((8, 1)), verbose=0, callbacks=[ConstantDamping()])


def test_an_update_uses_the_linearization_chosen_in_its_trace():
    calls = []

    class Counted(GaussNewton):
        def fitted_to(self, structure, num_replicas=1):
            calls.append(super().fitted_to(structure, num_replicas))
            return calls[-1]

    model = make_model()
    model.optimizer.curvature = Counted()
    model.fit(inputs(), np.zeros((15, 3)), epochs=2, verbose=0, callbacks=[ConstantDamping()])
    assert calls == [model._choice.curvature]


@pytest.mark.slow
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
    np.testing.assert_allclose(matrix(model, data, EmpiricalFisher()), fisher_oracle(model, data), **EXACT)
    differences = FiniteDifferenceHessian()
    assert_equal(differences, matrix(model, data, differences), matrix(model, data, Hessian()))


def test_a_curvature_takes_linearizations_only():
    with pytest.raises(
        TypeError, match="`linearization` must be a `Linearization` object.*Received: linearization='forward'"
    ):
        GaussNewton("forward")


def test_config_round_trip(curvature):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(curvature))
    assert type(again) is type(curvature)
    assert type(again.linearization) is type(curvature.linearization)
