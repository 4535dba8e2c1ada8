"""What Laplace's approximation promises: closed forms of linear models, dense matrices for every structure, and nothing at other weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import normal

from keras_hf import HFModel, Laplace
from keras_hf.pinn import PINN
from keras_hf.posterior.evidence import effective, most_probable, noise_variance
from keras_hf.posterior.gaussian import Dual, Kronecker, Primal, restored

pytestmark = pytest.mark.usefixtures("float64")


def compiled(*stack, loss="mse", num_inputs=2):
    model = HFModel(keras.Sequential([keras.Input((num_inputs,)), *stack]))
    model.compile(loss=loss)
    return model


def linear(num_cases=40, noise=0.3):
    """A linear model at the mean of its posterior for a prior precision of 2, the cases, and the design."""
    x = normal(num_cases, 3)
    design = np.c_[x, np.ones(num_cases)]
    y = design @ normal(4, 1, seed=1) + noise * normal(num_cases, 1, seed=2)
    model = compiled(layers.Dense(1), num_inputs=3)
    covariance = np.linalg.inv(design.T @ design / noise**2 + 2.0 * np.eye(4))
    mean = covariance @ design.T @ y / noise**2
    model.network.set_weights([mean[:3], mean[3]])
    return model, x, y, design, covariance


# Closed forms.


@pytest.mark.parametrize("structure", ["full", "kronecker", "last_layer"])
def test_of_a_linear_model_it_is_bayesian_regression(structure):
    model, x, y, design, covariance = linear()
    posterior = model.laplace(x, y, structure=structure, noise=0.3, prior_precision=2.0)
    np.testing.assert_allclose(posterior.covariance, covariance, rtol=1e-10)
    marginal = 0.09 * np.eye(40) + design @ design.T / 2
    evidence = -0.5 * (y.T @ np.linalg.solve(marginal, y) + np.linalg.slogdet(marginal)[1] + 40 * np.log(2 * np.pi))
    assert posterior.log_evidence == pytest.approx(evidence.item(), abs=1e-9)
    assert posterior.num_effective == pytest.approx(4 - 2 * np.trace(covariance), abs=1e-10)
    prediction = posterior.predict(x[:7])
    variance = np.einsum("ci,ij,cj->c", design[:7], covariance, design[:7])[:, None]
    np.testing.assert_allclose(prediction.std, np.sqrt(variance), rtol=1e-10)
    np.testing.assert_allclose(prediction.observation_std, np.sqrt(variance + 0.09), rtol=1e-10)
    np.testing.assert_allclose(prediction.mean, model.predict(x[:7], verbose=0), rtol=1e-12)


def test_weights_of_cases_divide_the_variance_of_the_noise():
    model, x, y, design, _ = linear()
    weights = np.linspace(0, 2, 40)
    posterior = model.laplace(x, y, sample_weight=weights, noise=0.3, prior_precision=2.0)
    precision = (design * weights[:, None]).T @ design / 0.09 + 2 * np.eye(4)
    np.testing.assert_allclose(posterior.covariance, np.linalg.inv(precision), rtol=1e-10)
    # A case of weight 0 is none.
    without = model.laplace(x[1:], y[1:], sample_weight=weights[1:], noise=0.3, prior_precision=2.0)
    assert posterior.log_evidence == pytest.approx(without.log_evidence, abs=1e-9)


def test_an_l2_regularizer_of_the_mean_loss_is_the_prior():
    """L2(c) of a mean over N values of one output stands for a prior precision of `c N / noise^2`, at any noise."""
    model, x, y, *_ = linear()
    regularized = compiled(layers.Dense(1, kernel_regularizer="l2", bias_regularizer="l2"), num_inputs=3)
    regularized.network.set_weights(model.network.get_weights())
    posterior = regularized.laplace(x, y)
    precision = 0.01 * 40 / posterior.noise**2
    np.testing.assert_allclose(posterior.prior_precision, precision, rtol=1e-10)
    same = model.laplace(x, y, noise=posterior.noise, prior_precision=precision)
    np.testing.assert_allclose(posterior.covariance, same.covariance, rtol=1e-10)
    residuals = model.predict(x, verbose=0) - y
    assert posterior.noise**2 == pytest.approx(np.sum(residuals**2) / (40 - posterior.num_effective))
    np.testing.assert_allclose(posterior.noise, model.laplace(x, y, prior_precision=precision).noise, rtol=1e-8)


def test_weights_without_a_regularizer_have_no_prior_and_the_evidence_is_not_defined():
    model, x, y, design, _ = linear()
    regularized = compiled(layers.Dense(1, kernel_regularizer="l2"), num_inputs=3)
    regularized.network.set_weights(model.network.get_weights())
    posterior = regularized.laplace(x, y, noise=1.0)
    prior = np.diag([0.4, 0.4, 0.4, 0.0])
    np.testing.assert_allclose(posterior.covariance, np.linalg.inv(design.T @ design + prior), rtol=1e-10)
    assert np.isnan(posterior.log_evidence)


def test_evidence_has_its_maximum_where_it_is_said_to_be():
    model, x, y, *_ = linear()
    best = model.laplace(x, y)
    assert best.noise == pytest.approx(0.3, rel=0.3)
    for share in (0.9, 1.1):
        for change in ({"noise": share * best.noise}, {"prior_precision": share * best.prior_precision[0]}):
            found = {"noise": best.noise, "prior_precision": best.prior_precision[0], **change}
            assert model.laplace(x, y, **found).log_evidence < best.log_evidence


def test_the_fixed_point_of_evidence_satisfies_its_equations():
    spectrum = np.array([1e-6, 0.1, 3.0, 200.0])
    precision, variance = most_probable(spectrum, 2.5, squares=9.0, num_values=50)
    gamma = effective(spectrum, precision)
    assert precision == pytest.approx(variance * gamma / 2.5, rel=1e-8) and variance == pytest.approx(9 / (50 - gamma))
    assert noise_variance(spectrum, precision / variance, 9.0, 50) == pytest.approx(variance, rel=1e-8)
    # Nothing is known: anything finite serves.
    assert np.isfinite(most_probable(np.zeros(3), 1.0, 1.0, 5)).all()


# Dense matrices.


# Activation, loss (an object is made under the fixture: it keeps the float type of then), and by what a
# mean loss of 30 cases and three outputs is to be multiplied, at unit noise.
LOSSES = {
    "probabilities of classes": ("softmax", "sparse_categorical_crossentropy", 30),
    "one-hot targets": ("softmax", "categorical_crossentropy", 30),
    "logits": (None, lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True), 30),
    "a sum": ("softmax", lambda: keras.losses.CategoricalCrossentropy(reduction="sum"), 1),
    "bits": ("sigmoid", "binary_crossentropy", 90),
    "squares": (None, "mse", 45),
}


@pytest.mark.parametrize(("activation", "loss", "scale"), LOSSES.values(), ids=LOSSES)
def test_the_full_covariance_is_that_of_dense_matrices(activation, loss, scale):
    loss = loss() if callable(loss) else loss
    l2 = [keras.regularizers.L2(0.01 * number) for number in (1, 2, 3, 4)]
    model = compiled(
        layers.Dense(4, "tanh", kernel_regularizer=l2[0], bias_regularizer=l2[1]),
        layers.Dense(3, activation, kernel_regularizer=l2[2], bias_regularizer=l2[3]),
        loss=loss,
    )
    x, weights, classes = normal(30, 2), np.linspace(0.5, 2, 30), np.arange(30) % 3
    is_sparse = "sparse" in str(loss)
    settings = {"structure": "full", "noise": 0.7 if loss == "mse" else None}
    posterior = model.laplace(x, classes if is_sparse else np.eye(3)[classes], sample_weight=weights, **settings)

    hidden, last = model.network.layers
    with tf.GradientTape(persistent=True) as tape:
        logits = tf.matmul(hidden(tf.constant(x)), last.kernel) + last.bias
    variables = [variable.value for variable in model.trainable_variables]
    jacobian = np.concatenate([tape.jacobian(logits, v).numpy().reshape(30, 3, -1) for v in variables], 2)
    if loss == "mse":
        hessians = [np.eye(3) / posterior.noise**2] * 30
    elif activation == "sigmoid":
        hessians = [np.diag(each * (1 - each)) for each in tf.sigmoid(logits).numpy()]
    else:
        hessians = [np.diag(each) - np.outer(each, each) for each in tf.nn.softmax(logits).numpy()]
    scale /= posterior.noise**2
    prior = np.concatenate([np.full(np.prod(v.shape), 0.02 * scale * (i + 1)) for i, v in enumerate(variables)])
    precision = np.diag(prior) + sum(w * j.T @ h @ j for w, j, h in zip(weights, jacobian, hessians, strict=True))
    covariance = np.linalg.inv(precision)
    np.testing.assert_allclose(posterior.covariance, covariance, rtol=1e-8, atol=1e-10)
    prediction = posterior.predict(x[:4])
    of_outputs = jacobian[:4] @ covariance @ np.swapaxes(jacobian[:4], 1, 2)
    np.testing.assert_allclose(prediction.covariance, of_outputs, rtol=1e-8)
    if loss != "mse":
        np.testing.assert_allclose(
            posterior.predict(x[:4], num_samples=20_000, seed=0).probabilities, prediction.probabilities, atol=0.05
        )


def test_all_structures_of_one_layer_are_the_same_and_the_last_layer_is_a_block():
    model = compiled(layers.Dense(4, "tanh"), layers.Dense(2))
    x, y = normal(30, 2), normal(30, 2, seed=1)
    settings = {"noise": 0.5, "prior_precision": 3.0}
    full, last, factored = (model.laplace(x, y, structure=s, **settings) for s in ("full", "last_layer", "kronecker"))
    precision = np.linalg.inv(full.covariance)
    np.testing.assert_allclose(np.linalg.inv(last.covariance), precision[12:, 12:], rtol=1e-8, atol=1e-9)
    # Of the last layer, whose derivative is the same for all cases, the product is exact.
    np.testing.assert_allclose(factored.covariance[12:, 12:], last.covariance, rtol=1e-8, atol=1e-12)
    assert not factored.covariance[:12, 12:].any()


def test_kronecker_factors_of_convolutions_and_tokens_are_means_of_inputs_and_sums_of_derivatives():
    """Against the definition, by hand: the mean of aa' over positions, and the sum of dd' over positions and outputs."""
    model = HFModel(keras.Sequential([keras.Input((5, 2)), layers.Conv1D(2, 3), layers.Flatten(), layers.Dense(1)]))
    model.compile(loss="mse")
    x, y = normal(8, 5, 2), normal(8, 1)
    posterior = model.laplace(x, y, structure="kronecker", noise=1.0, prior_precision=1.0)
    a, s = np.zeros((7, 7)), np.zeros((2, 2))
    of_output = model.network.layers[-1].kernel.numpy().reshape(3, 2)
    for case in x:
        for place in range(3):
            patch = np.append(case[place : place + 3].ravel(), 1.0)
            a += np.outer(patch, patch) / 24
            s += np.outer(of_output[place], of_output[place])
    block = np.linalg.inv(np.kron(a, s) + np.eye(14))
    np.testing.assert_allclose(posterior.covariance[:14, :14], block, rtol=1e-8, atol=1e-12)


def test_transposed_convolutions_whose_biases_have_no_factor_are_certain():
    stack = layers.Reshape((1, 2)), layers.Conv1DTranspose(2, 3), layers.Flatten(), layers.Dense(1)
    model = compiled(*stack)
    x, y = normal(8, 2), normal(8, 1)
    posterior = model.laplace(x, y, structure="kronecker", noise=1.0, prior_precision=1.0)
    assert [variable.path for variable in posterior.variables] == [weight.path for weight in stack[-1].weights]


@pytest.mark.parametrize("make", [Primal, Dual, Kronecker])
def test_distributions_have_the_covariance_and_the_numbers_of_a_dense_matrix(make):
    b = normal(5, 12)
    if make is Primal:
        curvature = b.T @ b
        form = Primal(curvature)
    elif make is Dual:
        curvature, form = b.T @ b, Dual(b)
    else:
        a, s, tokens = b[:, :3].T @ b[:, :3], b[:, 3:5].T @ b[:, 3:5], np.array([2.0, 0.0, 1.0])
        form = Kronecker([(a, s), (tokens, s)])
        curvature = np.zeros((12, 12))
        curvature[:6, :6], curvature[6:, 6:] = np.kron(a, s), np.kron(np.diag(tokens), s)
    diagonal = np.repeat([0.7, 0.2], 6)
    found = form.factorized(diagonal)
    covariance = np.linalg.inv(curvature + np.diag(diagonal))
    np.testing.assert_allclose(found.covariance(), covariance, rtol=1e-9, atol=1e-12)
    assert found.log_determinant == pytest.approx(-np.linalg.slogdet(covariance)[1])
    assert found.num_effective == pytest.approx(np.trace(curvature @ covariance))
    np.testing.assert_allclose(np.sort(form.spectrum), np.sort(np.linalg.eigvalsh(curvature)), atol=1e-9)
    rows = normal(3, 2, 12, seed=1)
    again = restored({key: np.asarray(value) for key, value in found.arrays().items()})
    for each in (found, again):
        np.testing.assert_allclose(each.forms(rows), rows @ covariance @ np.swapaxes(rows, 1, 2), rtol=1e-9)
        # The root of the covariance: its images of all unit vectors.
        root = each.roots(np.eye(each.num_normals))
        np.testing.assert_allclose(root.T @ root, covariance, rtol=1e-9, atol=1e-12)


# What a user does with it.


def test_error_bars_grow_away_from_the_data_and_samples_have_their_spread():
    model = compiled(layers.Dense(8, "tanh"), layers.Dense(1), num_inputs=1)
    x = np.linspace(-1, 1, 40)[:, None]
    model.fit(x, np.sin(3 * x) + 0.1 * normal(40, 1), epochs=15, verbose=0)
    posterior = model.laplace(x, np.sin(3 * x) + 0.1 * normal(40, 1))
    inside, outside = posterior.predict(np.array([[0.0], [3.0]])).std.ravel()
    assert outside > 3 * inside
    weights = posterior.sample(4000, seed=0)
    np.testing.assert_allclose(weights.std(0), np.sqrt(np.diag(posterior.covariance)), rtol=0.1)
    assert np.array_equal(weights, posterior.sample(4000, seed=0))


def test_it_is_saved_as_arrays_and_belongs_to_its_weights(tmp_path):
    model = compiled(layers.Dense(3, "tanh"), layers.Dense(2))
    x, y = normal(20, 2), normal(20, 2, seed=1)
    posterior = model.laplace(x, y)
    posterior.save(tmp_path / "posterior")
    assert [path.name for path in tmp_path.iterdir()] == ["posterior"]
    network = keras.models.clone_model(model.network)
    network.set_weights(model.network.get_weights())
    loaded = Laplace.load(tmp_path / "posterior", network)
    for one, other in zip(posterior.predict(x), loaded.predict(x), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (loaded.log_evidence, loaded.structure) == (posterior.log_evidence, "full")
    with pytest.raises(
        ValueError, match="must be the one that the distribution was made with. Received: a network of 2 "
    ):
        Laplace.load(tmp_path / "posterior", keras.Sequential([keras.Input((2,)), layers.Dense(2)]))
    model.network.layers[0].bias.assign([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="weights it was made at, and they have changed since"):
        posterior.predict(x)


def test_repeated_calls_are_traced_without_a_warning(tensorflow_log):
    model = compiled(layers.Dense(3, "tanh"), layers.Dense(1))
    x, y = normal(20, 2), normal(20, 1)
    for _ in range(3):
        for structure in ("full", "kronecker"):
            posterior = model.laplace(x, y, structure=structure)
    for num_cases in range(1, 7):
        posterior.predict(x[:num_cases])
    assert tensorflow_log == []


def test_outputs_with_more_axes_keep_them():
    model = HFModel(keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.Reshape((2, 2))]))
    model.compile(loss="mse")
    x, y = normal(20, 3), normal(20, 2, 2, seed=1)
    prediction = model.laplace(x, y, sample_weight=np.ones((20, 2))).predict(x[:5])
    assert prediction.mean.shape == prediction.std.shape == (5, 2, 2) and prediction.covariance.shape == (5, 4, 4)


def test_of_a_pinn_the_solution_is_predicted_at_points():
    network = keras.Sequential([keras.Input((1,)), layers.Dense(6, "tanh"), layers.Dense(1)])
    pinn = PINN(network, {"data": lambda u, p: u(p)}, transform=lambda p, output: p * output)
    model = HFModel(pinn)
    model.compile(loss="mse")
    points = np.linspace(0, 1, 12)[:, None]
    x, y, weights = pinn.cases({"data": (points, np.sin(points))})
    posterior = model.laplace(x, y, sample_weight=weights)
    prediction = posterior.predict(np.array([[0.0], [0.5]]))
    np.testing.assert_allclose(prediction.mean, pinn.solution(np.array([[0.0], [0.5]])), rtol=1e-10)
    # The transform fixes the start.
    assert prediction.std[0] == 0 < prediction.std[1]


def test_a_recurrent_network_is_taken_case_by_case():
    model = HFModel(keras.Sequential([keras.Input((4, 2)), layers.SimpleRNN(3), layers.Dense(1)]))
    model.compile(loss="mse")
    x, y = normal(10, 4, 2), normal(10, 1)
    posterior = model.laplace(x, y, noise=1.0, prior_precision=1.0)
    with tf.GradientTape(persistent=True) as tape:
        outputs = model.network(tf.constant(x))
    parts = [tape.jacobian(outputs, v.value, experimental_use_pfor=False) for v in model.trainable_variables]
    jacobian = np.concatenate([part.numpy().reshape(10, -1) for part in parts], 1)
    np.testing.assert_allclose(
        posterior.covariance, np.linalg.inv(jacobian.T @ jacobian + np.eye(len(jacobian.T))), rtol=1e-8, atol=1e-10
    )


# Doors.


def test_what_has_no_likelihood_is_refused_by_name():
    x, y = normal(10, 2), normal(10, 1)
    for loss in ("log_cosh", keras.losses.Huber(), keras.losses.BinaryCrossentropy(label_smoothing=0.1)):
        with pytest.raises(ValueError, match="`laplace` needs a loss that is the logarithm of a likelihood"):
            compiled(layers.Dense(1), loss=loss).laplace(x, y)
    two = keras.Input((2,))
    model = HFModel(keras.Model(two, [layers.Dense(1)(two), layers.Dense(1)(two)]))
    model.compile(loss=["mse", "mse"])
    with pytest.raises(ValueError, match="`laplace` needs one output and one loss"):
        model.laplace(x, [y, y])


class Absolute(keras.regularizers.Regularizer):
    """A prior that is not normal. Keras 3.12 has its L1 in float32 alone."""

    def __call__(self, x):
        return keras.ops.sum(keras.ops.abs(x))


def test_wrong_settings_are_refused_by_name():
    x, y = normal(10, 2), normal(10, 1)
    model = compiled(layers.Dense(1))
    with pytest.raises(ValueError, match="`structure` must be 'auto' or one of 'full'.*structure='diagonal'"):
        model.laplace(x, y, structure="diagonal")
    with pytest.raises(ValueError, match="`prior_precision` must be"):
        model.laplace(x, y, prior_precision=-1.0)
    with pytest.raises(ValueError, match="`noise` is that of regression"):
        compiled(layers.Dense(1, "sigmoid"), loss="binary_crossentropy").laplace(x, y > 0, noise=1.0)
    with pytest.raises(ValueError, match="`sample_weight` must not be negative"):
        model.laplace(x, y, sample_weight=-np.ones(10))
    with pytest.raises(ValueError, match="network that is not built. Call `fit` first"):
        unbuilt = HFModel(keras.Sequential([layers.Dense(1)]))
        unbuilt.compile(loss="mse")
        unbuilt.laplace(x, y)
    with pytest.raises(ValueError, match="a network with BatchNormalization, batch_normalization"):
        compiled(layers.BatchNormalization(), layers.Dense(1)).laplace(x, y)
    with pytest.raises(ValueError, match="does not see the scale of kernels within `SpectralNormalization`"):
        compiled(layers.SpectralNormalization(layers.Dense(2)), layers.Dense(1)).laplace(x, y)
    with pytest.raises(ValueError, match="needs priors that are normal, regularizers L2.*Absolute"):
        compiled(layers.Dense(1, kernel_regularizer=Absolute())).laplace(x, y)
    with pytest.raises(ValueError, match="`num_samples` is for the probabilities of classifiers"):
        model.laplace(x, y).predict(x, num_samples=3)


def test_cases_that_the_network_does_not_take_are_refused_with_the_rule():
    model = compiled(layers.Dense(1))
    posterior = model.laplace(normal(10, 2), normal(10, 1))
    with pytest.raises(ValueError, match=r"the first axis is the case. Received: x of shape \(3, 5\)"):
        posterior.predict(normal(3, 5))
    with pytest.raises(ValueError, match=r"x of shape \(2,\). One case alone is `x\[None\]`"):
        posterior.predict(np.array([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"must hold dense arrays.*Received: x\[0\]=0.1 of type float"):
        posterior.predict([0.1, 0.2])
    assert posterior.predict(np.array([0.1, 0.2])[None]).mean.shape == (1, 1)


def test_cases_of_one_number_need_no_second_axis():
    model = compiled(layers.Dense(1), num_inputs=1)
    posterior = model.laplace(normal(10, 1), normal(10, 1))
    for x in (np.array([[0.1], [0.2]]), np.array([0.1, 0.2]), np.array([0.1])):
        assert posterior.predict(x).mean.shape == (len(x), 1)


def test_what_data_and_prior_leave_open_is_refused():
    model = compiled(layers.Dense(1, kernel_regularizer="l2"), layers.Dense(1))
    with pytest.raises(ValueError, match="The data and the prior must determine every weight"):
        model.laplace(normal(20, 2), normal(20, 1))
    with pytest.raises(ValueError, match="forms matrices of at most 5000 weights. Received: 9000 trainable weights"):
        compiled(layers.Dense(3000)).laplace(normal(2, 2), normal(2, 3000), structure="full")
