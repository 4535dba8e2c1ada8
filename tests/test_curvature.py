"""What curvatures promise: products equal to dense matrices made by other means, in both ways to differentiate."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import (
    PROBLEMS,
    case_gradients,
    compiled,
    hessian_free,
    inputs,
    jacobian,
    loss_derivatives,
    make_model,
    matrices,
    model_data,
    set_up,
    squared_case_gradients,
    with_objective,
)
from training import assert_equal as assert_bits_equal
from training import fit

from keras_hf import (
    ConstantDamping,
    DoubleBackward,
    EmpiricalFisher,
    FiniteDifferenceHessian,
    ForwardAccumulation,
    GaussNewton,
    Hessian,
    Identity,
)

pytestmark = pytest.mark.usefixtures("float64")

LINEARIZATIONS = [DoubleBackward(), ForwardAccumulation()]
LINEARIZED = [GaussNewton, Hessian, EmpiricalFisher]
DIFFERENCES = FiniteDifferenceHessian()
CURVATURES = [*(make(linearization) for make in LINEARIZED for linearization in LINEARIZATIONS), DIFFERENCES]
# Each once, in one of the ways: what micro-batches, chunks, regularizers and added losses bring to a product is the same in both.
ONE_OF_EACH = [
    GaussNewton(ForwardAccumulation()),
    Hessian(DoubleBackward()),
    EmpiricalFisher(DoubleBackward()),
    DIFFERENCES,
]
EXACT = {"rtol": 1e-9, "atol": 1e-12}
# Relative to the largest entry: eps^(2/3), which truncation and rounding both are of the order of, times 100.
ROUNDING_OF_DIFFERENCES = {"float64": 4e-9, "float32": 2e-3}


def name_of(part):
    ways = [part.linearization] if getattr(part, "linearization", None) else []
    return "-".join(type(each).__name__ for each in (part, *ways))


def targets():
    return PROBLEMS["mse"].targets(np.random.default_rng(3))


def matrices_of(model, data, curvatures, **arguments):
    """The matrices of the products on an objective of the model, of all curvatures in one trace."""
    return with_objective(model, data, lambda objective: matrices(objective, curvatures), **arguments)


def assert_equal(curvatures, found, expected):
    """That the matrices of curvatures are those expected, to rounding, or to that of differences."""
    for curvature, one, other in zip(curvatures, found, expected, strict=True):
        tolerances = EXACT
        if curvature is DIFFERENCES:
            tolerances = {"rtol": 0, "atol": ROUNDING_OF_DIFFERENCES["float64"] * np.abs(other).max()}
        np.testing.assert_allclose(one, other, err_msg=name_of(curvature), **tolerances)


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


# One of each kind in the quick suite: losses of probabilities and of logits, with a diagonal second derivative and without.
QUICK = ["mse", "binary from probabilities", "categorical from logits", "sparse categorical"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in PROBLEMS]
)
def test_products_equal_the_dense_matrices(name):
    problem = PROBLEMS[name]
    model = make_model(problem.activation, problem.loss)
    data = model_data(model, inputs(), problem.targets(np.random.default_rng(3)))
    found = matrices_of(model, data, CURVATURES)
    hessian = loss_derivatives(model, data)[2]
    expected = [gauss_newton_oracle(model, data, problem), hessian, fisher_oracle(model, data)]
    assert_equal(CURVATURES, found, [*np.repeat(expected, 2, axis=0), hessian])
    np.testing.assert_allclose(np.diag(expected[-1]), squared_case_gradients(model, data), **EXACT)


def test_products_are_symmetric_and_those_of_any_micro_batches():
    model = make_model(loss=keras.losses.MeanSquaredError(), regularizer=keras.regularizers.L2(0.25))
    data = model_data(model, inputs(), targets(), np.linspace(0.1, 2, 15))
    whole = matrices_of(model, data, ONE_OF_EACH)
    assert_equal(ONE_OF_EACH, whole, np.swapaxes(whole, 1, 2))
    assert_equal(ONE_OF_EACH, matrices_of(model, data, ONE_OF_EACH, micro_batch_size=4), whole.numpy())


@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight"])
def test_products_on_a_chunk_are_those_of_the_chunk_alone(reduction):
    model = make_model(loss=keras.losses.MeanSquaredError(reduction=reduction))
    data = model_data(model, inputs(), targets(), np.tile(np.linspace(0.1, 2, 5), 3))
    of_chunk = matrices_of(model, data, ONE_OF_EACH, curvature_batch_size=5, micro_batch_size=2, update_number=1)
    # One trace for all places.
    alone = tf.function(lambda start: matrices_of(model, data.take(start + tf.range(5)), ONE_OF_EACH))
    places = np.stack([alone(tf.constant(start)) for start in (0, 5, 10)], 1)
    for curvature, found, of_places in zip(ONE_OF_EACH, of_chunk, places, strict=True):
        # A sum over 5 cases stands for one over 15: its gradients are 3 times as large, and 15 of them count.
        scale = {"sum": 9 if isinstance(curvature, EmpiricalFisher) else 3}.get(reduction, 1)
        nearest = min(scale * of_places, key=lambda one: np.abs(one - found).max())
        assert_equal([curvature], [found], [nearest])


def fisher_and_squares(model, data, linearizations, **arguments):
    """The empirical Fisher matrices in some ways, and the mean squared gradients that preconditioners have."""

    def of(objective):
        return matrices(objective, [EmpiricalFisher(way) for way in linearizations]), objective.squared_gradients()

    return with_objective(model, data, of, **arguments)


@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight", "sum_over_batch_size"])
def test_empirical_fisher_follows_sample_weights_as_its_diagonal_does(reduction):
    model = make_model(loss=keras.losses.MeanSquaredError(reduction=reduction))
    data = model_data(model, inputs(), targets(), np.linspace(0, 2, 15))
    (found,), squares = fisher_and_squares(model, data, LINEARIZATIONS[:1])
    np.testing.assert_allclose(np.diag(found), squares, **EXACT)
    if reduction == "sum_over_batch_size":
        np.testing.assert_allclose(found, fisher_oracle(model, data), **EXACT)


def test_empirical_fisher_takes_all_places_of_a_case_together():
    layers = [keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)]
    model = compiled(keras.Sequential([keras.Input((4, 2)), *layers]))
    rng = np.random.default_rng(4)
    data = model_data(model, rng.normal(size=(7, 4, 2)), rng.normal(size=(7, 4, 1)))
    for found in matrices_of(model, data, [EmpiricalFisher(way) for way in LINEARIZATIONS]):
        np.testing.assert_allclose(found, fisher_oracle(model, data), **EXACT)


def test_empirical_fisher_takes_all_outputs_of_a_case_together():
    x = keras.Input((2,))
    hidden = keras.layers.Dense(3, "tanh")(x)
    outputs = [keras.layers.Dense(2)(hidden), keras.layers.Dense(1, "sigmoid")(hidden)]
    model = compiled(keras.Model(x, outputs), loss=["mse", "binary_crossentropy"])
    rng = np.random.default_rng(4)
    data = model_data(model, inputs(), [rng.normal(size=(15, 2)), rng.integers(0, 2, (15, 1)).astype("float64")])
    (found,) = matrices_of(model, data, [EmpiricalFisher(DoubleBackward())])
    np.testing.assert_allclose(found, fisher_oracle(model, data), **EXACT)


def test_empirical_fisher_of_a_loss_without_curvature_is_not_zero_and_gives_no_warning():
    curvature = EmpiricalFisher(DoubleBackward())
    optimizer = hessian_free(curvature=curvature, preconditioner=Identity(), growing_batch=None)
    model = make_model(loss="mae", optimizer=optimizer)
    data = model_data(model, inputs(), targets())
    (found,) = matrices_of(model, data, [curvature])
    assert np.trace(found) > 0
    np.testing.assert_allclose(found, fisher_oracle(model, data), **EXACT)


@pytest.mark.parametrize(
    ("linearization", "micro_batch_size"),
    [(LINEARIZATIONS[0], 4), (LINEARIZATIONS[1], None)],
    ids=["micro-batches", "whole"],
)
def test_empirical_fisher_holds_batch_statistics_constant(linearization, micro_batch_size):
    stack = [keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = compiled(keras.Sequential([keras.Input((2,)), *stack]))
    data = model_data(model, inputs(), np.random.default_rng(3).normal(size=(15, 1)))
    # The squares are held against per-case gradients in the tests of preconditioners.
    (found,), squares = fisher_and_squares(model, data, [linearization], micro_batch_size=micro_batch_size)
    np.testing.assert_allclose(np.diag(found), squares, **EXACT)
    np.testing.assert_allclose(found, tf.transpose(found), **EXACT)
    assert np.linalg.matrix_rank(found) <= 15


def test_differences_equal_the_hessian_in_float32():
    exact = make_model()
    expected = loss_derivatives(exact, model_data(exact, inputs(), targets()))[2]
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    model = make_model()
    data = model_data(model, inputs().astype("float32"), targets().astype("float32"))

    def compute(objective):
        product = objective.product(DIFFERENCES)
        return tf.map_fn(product, tf.eye(objective.num_weights)), product(tf.zeros([objective.num_weights]))

    found, of_zero = with_objective(model, data, compute)
    tolerance = ROUNDING_OF_DIFFERENCES["float32"] * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert not np.any(of_zero)


def test_differences_do_not_depend_on_the_length_of_the_vector_and_leave_the_weights_bit_equal():
    model = make_model(regularizer=keras.regularizers.L2(0.25))
    data = model_data(model, inputs(), targets())
    before = model.get_weights()

    def compute(objective):
        v = tf.sin(tf.range(27, dtype=tf.float64))
        product = objective.product(DIFFERENCES)
        return [product(length * v) / length for length in (1e-12, 1.0, 1e12)]

    small, middle, large = with_objective(model, data, compute)
    np.testing.assert_allclose(small, middle, rtol=1e-8)
    np.testing.assert_allclose(large, middle, rtol=1e-8)
    assert_bits_equal(before, model.get_weights())


def test_differences_need_no_second_derivative_of_the_network():
    model, twin = (
        compiled(keras.Sequential([keras.Input((2,)), keras.layers.Dense(4, activation), keras.layers.Dense(3)]))
        for activation in ("softsign", lambda x: x / (1 + tf.abs(x)))
    )
    data = model_data(model, inputs(), targets())
    model_data(twin, inputs(), targets())
    twin.set_weights(model.get_weights())
    assert_equal([DIFFERENCES], matrices_of(model, data, [DIFFERENCES]), [loss_derivatives(twin, data)[2]])


def test_differences_of_coarse_gradients_are_refused():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = make_model()
    set_up(model, curvature=DIFFERENCES)
    with pytest.raises(ValueError, match=r"float32 or float64.*computes in bfloat16. Use `Hessian\(\)`"):
        model.fit(inputs(), np.zeros((15, 3)), verbose=0, callbacks=[ConstantDamping()])


def test_gauss_newton_equals_hessian_where_the_network_is_linear_in_its_weights():
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    model = compiled(network, keras.losses.CategoricalCrossentropy(from_logits=True))
    data = model_data(model, inputs(), np.eye(3)[np.arange(15) % 3])
    found = matrices_of(model, data, [make(way) for make in (GaussNewton, Hessian) for way in LINEARIZATIONS])
    np.testing.assert_allclose(found[:2], found[2:], **EXACT)


def test_regularizers_enter_with_their_second_derivative():
    plain, regularized = make_model(), make_model(regularizer=keras.regularizers.L2(0.25))
    data = model_data(plain, inputs(), targets())
    model_data(regularized, inputs(), targets())
    difference = matrices_of(regularized, data, ONE_OF_EACH) - matrices_of(plain, data, ONE_OF_EACH)
    # L2(c) is c * sum(w^2): 2c on the first kernel (8 weights) and the last bias (3), as make_model sets it.
    expected = np.diag([0.5] * 8 + [0.0] * 4 + [0.0] * 12 + [0.5] * 3)
    np.testing.assert_allclose(difference, [expected] * len(ONE_OF_EACH), **EXACT)


class Adding(keras.layers.Layer):
    """Adds a loss of its input."""

    def call(self, x):
        self.add_loss(tf.reduce_mean(tf.reduce_sum(x**4, -1)))
        return x


def test_added_losses_enter_with_their_exact_hessian():
    def build(*layers):
        hidden = keras.layers.Dense(4, "tanh", kernel_initializer=keras.initializers.RandomNormal(seed=1))
        output = keras.layers.Dense(3, kernel_initializer=keras.initializers.RandomNormal(seed=2))
        return compiled(keras.Sequential([keras.Input((2,)), hidden, *layers, output]))

    model, plain = build(Adding()), build()
    data = model_data(model, inputs(), targets())
    model_data(plain, data.x, data.y)
    curvatures = [GaussNewton(DoubleBackward()), *ONE_OF_EACH]
    found, loss_pass = with_objective(
        model, data, lambda objective: (matrices(objective, curvatures), objective.loss_and_gradient())
    )
    loss, gradient, hessian = loss_derivatives(model, data)
    np.testing.assert_allclose(loss_pass.loss, loss, **EXACT)
    np.testing.assert_allclose(loss_pass.gradient, gradient, **EXACT)
    of_added = hessian - loss_derivatives(plain, data)[2]
    gauss_newton, fisher = of_added + matrices_of(plain, data, [ONE_OF_EACH[0], ONE_OF_EACH[2]])
    assert_equal(curvatures, found, [gauss_newton, gauss_newton, hessian, fisher, hessian])


# With the Gauss-Newton matrix all other tests train.
@pytest.mark.parametrize(
    "curvature", [pytest.param(Hessian(), marks=pytest.mark.slow), EmpiricalFisher(), DIFFERENCES], ids=name_of
)
def test_training_with_any_curvature_lowers_the_loss_by_the_choice_of_one_trace(curvature, monkeypatch):
    chosen, fitted_to = [], type(curvature).fitted_to

    def recorded(self, *arguments):
        chosen.append(fitted_to(self, *arguments))
        return chosen[-1]

    monkeypatch.setattr(type(curvature), "fitted_to", recorded)
    optimizer = hessian_free(damping=0.1, preconditioner=Identity(), curvature=curvature, growing_batch=None, seed=0)
    model = make_model(optimizer=optimizer)
    x = inputs()
    y = np.stack([np.sin(x[:, 0]), x[:, 1] ** 2, x[:, 0] * x[:, 1]], 1)
    losses = fit(model, x, y, epochs=10)["loss"]
    assert np.diff(losses).max() <= 0
    assert losses[-1] < 0.5 * losses[0]
    assert chosen == [model.setup.curvature]


class Nested(keras.layers.Layer):
    """Computes in a function of its own."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    @tf.function
    def scaled(self, x):
        return tf.tanh(x * self.scale)

    def call(self, x):
        return self.scaled(x)


@pytest.mark.slow
def test_double_backward_is_right_for_loops_and_nested_functions():
    layers = [keras.layers.SimpleRNN(2), Nested(), keras.layers.Dense(1)]
    model = compiled(keras.Sequential([keras.Input((4, 2)), *layers]))
    rng = np.random.default_rng(4)
    data = model_data(model, rng.normal(size=(5, 4, 2)), rng.normal(size=(5, 1)))
    gauss_newton, hessian, fisher, differences = matrices_of(
        model, data, [*(make(DoubleBackward()) for make in LINEARIZED), DIFFERENCES]
    )
    j = jacobian(lambda: model(data.x), [variable.value for variable in model.trainable_variables])
    np.testing.assert_allclose(gauss_newton, 2 / 5 * np.einsum("nip,niq->pq", j, j), **EXACT)
    np.testing.assert_allclose(fisher, fisher_oracle(model, data), **EXACT)
    assert_equal([DIFFERENCES], [differences], [hessian.numpy()])


def test_a_curvature_takes_linearizations_only():
    with pytest.raises(
        TypeError, match="`linearization` must be a `Linearization` .*Received: linearization='forward'"
    ):
        GaussNewton("forward")


@pytest.mark.parametrize("curvature", CURVATURES, ids=name_of)
def test_config_round_trip(curvature):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(curvature))
    assert type(again) is type(curvature)
    assert type(again.linearization) is type(curvature.linearization)


def test_a_linearization_saved_with_jit_compile_loads():
    for linearization in LINEARIZATIONS:
        config = keras.saving.serialize_keras_object(linearization)
        config["config"]["jit_compile"] = True
        assert type(keras.saving.deserialize_keras_object(config)) is type(linearization)
