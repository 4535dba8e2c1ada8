"""What the Kronecker-factored preconditioner promises: the Gauss-Newton matrix where layers allow it, and its damped inverse everywhere."""

import keras
import numpy as np
import pytest
import scipy.linalg
import tensorflow as tf
from keras import layers
from problems import (
    NUM_CASES,
    PROBLEMS,
    Own,
    compiled,
    dense_matrix,
    inputs,
    make_model,
    model_data,
    objective_function,
    sequential,
    values_of,
    with_objective,
)
from training import fit, trainable

from keras_hf import ConstantDamping, DoubleBackward, EmpiricalFisherDiagonal, GaussNewton, KroneckerFactored
from keras_hf.network.capture import is_capturable, kernel_and_bias, moments_of_cases, recorded_uses
from keras_hf.solvers import kronecker

pytestmark = pytest.mark.usefixtures("float64")

# Rounding, and a jitter of 4 epsilon of a factor's trace.
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def factors(objective, num_cases=None):
    """A and S of every captured layer, as matrices, in the order of the weights."""
    places = {id(variable): place for place, variable in enumerate(objective.variables)}
    in_order = sorted(objective.captured, key=lambda layer: places[id(kernel_and_bias(layer)[0].value)])
    found = KroneckerFactored(num_cases)._factors(objective, in_order)
    return [tuple(tf.linalg.diag(f) if f.shape.rank == 1 else f for f in (a, s)) for a, s, _ in found]


def gauss_newton(objective):
    return dense_matrix(objective.product(GaussNewton(DoubleBackward())), objective.num_weights)


def inverse(objective, preconditioner=None, damping=0.1, state=None):
    """The inverse as a matrix, and the state that the update leaves."""
    preconditioner = preconditioner or KroneckerFactored()
    precondition, state = preconditioner.inverse(objective, None, tf.constant(damping, tf.float64), state or {})
    return dense_matrix(precondition, objective.num_weights), state


def damped_inverse(factors, dampings, num_embeddings=0):
    """The dense inverse of the damped Kronecker products of layers, each with its own damping; embeddings come first."""
    blocks = []
    for number, ((a, s), damping) in enumerate(zip(factors, dampings, strict=True)):
        pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(s) / len(s)))
        of_inputs = np.eye(len(a))
        if number < num_embeddings:
            of_inputs = np.diag(np.sqrt(np.maximum(np.diag(a) / np.diag(a).mean(), 0.02)))
        parts = a + pi * np.sqrt(damping) * of_inputs, s + np.sqrt(damping) / pi * np.eye(len(s))
        blocks.append(np.kron(*map(np.linalg.inv, parts)))
    return scipy.linalg.block_diag(*blocks)


def initial_state(preconditioner, model):
    return preconditioner.initial_state(values_of(model), model.network._flatten_layers())


def one_layer(problem="mse", use_bias=True):
    layer = layers.Dense(3, PROBLEMS[problem].activation, use_bias=use_bias)
    return compiled(sequential(layer), PROBLEMS[problem].loss)


def targets(problem="mse"):
    return PROBLEMS[problem].targets(np.random.default_rng(3))


def with_a_nan(data):
    return data._replace(x=tf.tensor_scatter_nd_update(data.x, [[3, 0]], [np.nan]))


def assert_factors_are_the_gauss_newton_matrix(model, data, num_cases=None):
    both = lambda objective: (factors(objective, num_cases), gauss_newton(objective))  # noqa: E731
    [(a, s)], matrix = with_objective(model, data, both)
    np.testing.assert_allclose(np.kron(a, s), matrix, **EXACT)


@pytest.mark.parametrize(("use_bias", "columns"), [(True, 32), (False, 0)])
def test_one_layer_under_squared_error_has_the_gauss_newton_matrix_itself(use_bias, columns, monkeypatch):
    monkeypatch.setattr(kronecker, "_MAX_COLUMNS", columns)
    model = one_layer(use_bias=use_bias)
    assert_factors_are_the_gauss_newton_matrix(model, model_data(model, inputs(), targets()))


@pytest.mark.parametrize(
    ("name", "weight", "num_cases"),
    [
        ("mse", None, 4),
        ("mse", np.linspace(0, 2, NUM_CASES), None),
        ("binary from probabilities", None, None),
        ("categorical from logits", None, None),
        ("sparse categorical", None, None),
    ],
    ids=["some cases", "weighted cases", "binary from probabilities", "categorical from logits", "sparse categorical"],
)
def test_one_layer_and_one_input_have_the_gauss_newton_matrix_itself(name, weight, num_cases):
    """Every case has the same input: A x S is exact whatever H and the cases' weights are, and some cases stand for all."""
    model = one_layer(name)
    data = model_data(model, np.tile([[0.3, -1.2]], [NUM_CASES, 1]), targets(name), weight)
    assert_factors_are_the_gauss_newton_matrix(model, data, num_cases)


@pytest.mark.parametrize("name", ["mse on sigmoid", "sparse categorical"])
def test_before_an_activation_the_mean_over_signs_is_the_pulled_back_loss_curvature(name):
    model = make_model(PROBLEMS[name].activation, PROBLEMS[name].loss)
    data = model_data(model, inputs(), targets(name))
    first, last = model.network.layers
    hidden, y_pred = first(data.x).numpy(), model.network(data.x).numpy()
    z = hidden @ last.kernel.numpy() + last.bias.numpy()
    hessian = PROBLEMS[name].output_hessian(z, data.y).numpy() / NUM_CASES
    slope = y_pred * (1 - y_pred) if name == "mse on sigmoid" else np.ones_like(z)
    jacobian = slope[:, :, None] * last.kernel.numpy().T * (1 - hidden**2)[:, None, :]
    expected = np.einsum("nij,nik,nkl->jl", jacobian, hessian, jacobian)

    def draws(objective):
        def draw(i):
            moments = lambda micro_batch, seeds: kronecker._moments(micro_batch, [first], seeds + [[0, i]])  # noqa: E731
            return objective.sum_over_chunk(moments)[0].s

        return tf.map_fn(draw, tf.range(400), fn_output_signature=tf.float64)

    s = with_objective(model, data, draws).numpy()
    standard_error = np.std(s, 0) / np.sqrt(len(s))
    assert (np.abs(np.mean(s, 0) - expected) < 4.5 * standard_error + 1e-12).all()
    # Enough draws to tell.
    assert standard_error.max() < 0.05 * expected.max()


def test_inverse_is_that_of_the_damped_kronecker_product_in_micro_batches_too_and_needs_no_diagonal(monkeypatch):
    monkeypatch.setattr(EmpiricalFisherDiagonal, "inverse", None)
    model = make_model(regularizer=keras.regularizers.L2(0.25))
    data = model_data(model, inputs(), targets())
    # Regularized are 8 of the first layer's 12 weights, its kernel, and 3 of the last one's 15, its biases.
    own = np.array([0.5 * 8 / 12, 0.5 * 3 / 15])
    small, large = (lambda objective, d=damping: inverse(objective, damping=d)[0] for damping in (1e-3, 10.0))
    means, found = with_objective(model, data, lambda objective: (factors(objective), small(objective)))
    np.testing.assert_allclose(found, damped_inverse(means, 1e-3 + own), rtol=1e-8, atol=1e-11)
    # The last micro-batch is one case.
    found = with_objective(model, data, large, micro_batch_size=7)
    np.testing.assert_allclose(found, damped_inverse(means, 10.0 + own), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("stack", "num_factored", "max_rows"),
    [
        (lambda: [layers.Dense(3), layers.LayerNormalization()], 9, 4096),
        # The matrix of the first layer is 3 by 4, that of the last one 5 by 3.
        (lambda: [layers.Dense(4, "tanh"), layers.Dense(3)], 12, 4),
        # A kernel of 3 by 1 by 2, and its bias.
        (lambda: [layers.Reshape((1, 2)), layers.Conv1DTranspose(1, 3), layers.Flatten()], 6, 4096),
    ],
    ids=["no captured layer", "a layer with too many rows", "a transposed convolution"],
)
def test_weights_in_no_factored_layer_have_the_diagonal(stack, num_factored, max_rows, monkeypatch):
    monkeypatch.setattr(kronecker, "_MAX_ROWS", max_rows)
    model = compiled(sequential(*stack()))
    both = lambda objective: [inverse(objective, part)[0] for part in (None, EmpiricalFisherDiagonal())]  # noqa: E731
    found, diagonal = with_objective(model, model_data(model, inputs(), targets()), both)
    np.testing.assert_allclose(found[num_factored:], diagonal[num_factored:], **EXACT)
    block = found[:num_factored, :num_factored].numpy()
    assert np.abs(block - np.diag(np.diag(block))).max() > 1e-2


# Name: layers, shape of a case.
SHARED = {
    "Dense on masked sequences": (lambda: [layers.Masking(), layers.Dense(3)], (4, 1)),
    "Conv2D": (lambda: [layers.Conv2D(3, (2, 3), padding="same")], (4, 4, 2)),
    "EinsumDense": (lambda: [layers.EinsumDense("abcd,cde->abe", (4, 3), bias_axes="e")], (4, 2, 2)),
    "Embedding of one token": (lambda: [layers.Embedding(5, 3)], ()),
    "Embedding of masked tokens": (lambda: [layers.Embedding(5, 3, mask_zero=True)], (4,)),
}


@pytest.mark.parametrize("name", SHARED)
def test_one_layer_that_shares_weights_among_places_has_the_gauss_newton_matrix_itself(name):
    """Squared error doesn't couple the places of an output: here, what Grosse & Martens assume is true."""
    make, shape = SHARED[name]
    model = compiled(sequential(*make(), shape=shape))
    # Zeros are masked, and tokens below zero count from the end.
    x = np.random.default_rng(3).integers(-2, 3, size=(7, *shape)).astype("float64")
    assert_factors_are_the_gauss_newton_matrix(model, model_data(model, x, np.zeros(model.network(x).shape)))


def test_outputs_of_several_axes_have_the_diagonal_of_the_gauss_newton_matrix():
    """What signs couple between the axes vanishes in the mean."""
    model = compiled(sequential(layers.EinsumDense("abc,cde->abde", (4, 2, 3)), shape=(4, 2)))
    data = model_data(model, np.random.default_rng(3).normal(size=(7, 4, 2)), np.zeros((7, 4, 2, 3)))
    [(a, s)], matrix = with_objective(model, data, lambda objective: (factors(objective), gauss_newton(objective)))
    np.testing.assert_allclose(np.kron(np.diag(a), np.diag(s)), np.diag(matrix), **EXACT)


def attending(activation=None):
    """A network on masked words whose weights are all factored."""
    x = keras.Input((4,))
    words = layers.Embedding(5, 2, mask_zero=True)(x)
    seen = layers.MultiHeadAttention(2, 2)(words, words)
    return keras.Model(x, layers.Dense(2, activation)(layers.GlobalAveragePooling1D()(seen)))


def tokens(num_cases=NUM_CASES):
    return np.random.default_rng(3).integers(0, 5, size=(num_cases, 4))


def test_embedding_and_attention_have_the_inverse_of_the_damped_kronecker_product():
    model = compiled(attending())
    data = model_data(model, tokens(), np.random.default_rng(4).normal(size=(NUM_CASES, 2)))
    means, found = with_objective(model, data, lambda objective: (factors(objective), inverse(objective)[0]))
    np.testing.assert_allclose(found, damped_inverse(means, [0.1] * 6, 1), rtol=1e-8, atol=1e-11)


def test_vocabulary_may_be_large():
    """Of 100,000 words: as a matrix, A would take 80 GB."""
    model = compiled(sequential(layers.Embedding(100_000, 2), shape=(3,)))
    data = model_data(model, np.array([[7, 7, 99_999]] * 5), np.zeros((5, 3, 2)))

    def compute(objective):
        preconditioner = KroneckerFactored(interval=2)
        state = initial_state(preconditioner, model)
        precondition, _ = preconditioner.inverse(objective, None, tf.constant(0.1, tf.float64), state)
        return precondition(tf.ones([200_000], tf.float64))

    found = with_objective(model, data, compute).numpy().reshape(-1, 2)
    # The mean over two units, H summed over 15 places.
    a, s = np.bincount([7, 7, 99_999], minlength=100_000) / 3, 2 / 2 / 15 * 15
    pi = np.sqrt(1e-5 / s)
    # The damping of a word goes with the root of its frequency, from a fiftieth of the mean on.
    of_words = np.sqrt(np.maximum(a / 1e-5, 0.02))
    expected = 1 / (a + pi * np.sqrt(0.1) * of_words) / (s + np.sqrt(0.1) / pi)
    np.testing.assert_allclose(found, np.stack([expected, expected], 1), rtol=1e-9)


def test_signs_are_fair_and_others_in_another_update():
    seeds = tf.stack([tf.range(200), tf.zeros([200], tf.int32)], 1)
    like = tf.zeros([200, 50], tf.float64)
    signs, next_signs = (kronecker._signs(like, seeds + [0, i], [0])[0].numpy() for i in (0, 1))
    assert set(np.unique(signs)) == {-1.0, 1.0}
    # A mean of 10,000 fair signs has a standard deviation of 0.01.
    assert abs(signs.mean()) < 0.04
    assert abs((signs * next_signs).mean()) < 0.04
    # The largest of some thousand, or ten thousand, correlations of 200, or 50.
    assert np.abs(np.corrcoef(signs.T) - np.eye(50)).max() < 5 / np.sqrt(200)
    assert np.abs(np.corrcoef(signs) - np.eye(200)).max() < 6 / np.sqrt(50)


def test_a_share_of_the_cases_may_be_more_than_the_chunk():
    model = one_layer()
    data = model_data(model, inputs(), targets())

    def compute(objective):
        number = lambda micro_batch, seeds: tf.cast(micro_batch.num_cases, tf.float64)  # noqa: E731
        chunk = objective._parts.micro_batches.chunk_indices()
        return [*(objective.sum_over_chunk(number, share) for share in (0.1, 0.4, 1.0)), tf.size(chunk)]

    # Of one micro-batch, of the chunk's size, at most; of several micro-batches, all.
    for micro_batch_size, expected in ((None, [2, 4, 4, 4]), (2, [2, 6, 15, 4])):
        found = with_objective(model, data, compute, curvature_batch_size=4, micro_batch_size=micro_batch_size)
        assert [int(number) for number in found] == expected


def twice():
    """A network that calls one layer twice, and holds one that it never calls."""
    unused = layers.Dense(2)
    unused.build((None, 2))
    return Own(lambda x, shared, unused: shared(shared(x)), layers.Dense(2, "tanh"), unused)


# Name: layers, shape of a case. Products of positions are fewer than those of gradients on the short sequence, more on the others.
SUMMED = {
    **SHARED,
    "Dense on short sequences": (lambda: [layers.Dense(6)], (2, 5)),
    "Dense on long sequences": (lambda: [layers.Dense(3, use_bias=False)], (9, 2)),
    "a layer called twice": (lambda: [twice()], (2,)),
    "transposed convolution": (lambda: [layers.Conv2DTranspose(3, (2, 3), 2, padding="same")], (2, 3, 2)),
    "transposed convolution of one place": (lambda: [layers.Conv1DTranspose(2, 3, use_bias=False)], (1, 4)),
}


@pytest.mark.parametrize("name", SUMMED)
def test_moments_of_cases_are_those_of_their_gradients(name):
    make, shape = SUMMED[name]
    network = sequential(*make(), shape=shape)
    x = tf.constant(np.random.default_rng(3).integers(-2, 3, size=(4, *shape)).astype("float64"))
    value = lambda: tf.reduce_sum(tf.reshape(tf.sin(network(x)), [4, -1]), 1)  # noqa: E731
    captured = [layer for layer in network._flatten_layers() if is_capturable(layer)]
    with tf.GradientTape() as tape, recorded_uses(captured, tape) as uses:
        values = value()
    [layer] = [layer for layer in captured if uses[layer]]
    gradients = tape.gradient(values, [use.preactivation for use in uses[layer]])
    found = moments_of_cases(layer, [(use.inputs, d) for use, d in zip(uses[layer], gradients, strict=True)])
    weights = [weight.value for weight in kernel_and_bias(layer)]
    with tf.GradientTape(persistent=True) as tape:
        values = [value()[case] for case in range(4)]
    by_case = [[tf.convert_to_tensor(part) for part in tape.gradient(of_case, weights)] for of_case in values]
    units = weights[0].shape[-1] if name != "EinsumDense" else 3
    g = np.stack([np.concatenate([np.reshape(part, [-1, units]) for part in of_case]) for of_case in by_case])
    a = np.einsum("nij,nkj->ik", g, g)
    expected = np.diag(a) if name.startswith("Embedding") else a, np.einsum("nij,nik->jk", g, g), (g**2).sum()
    assert expected[2] > 0
    for result, of_cases in zip(found, expected, strict=True):
        np.testing.assert_allclose(result, of_cases, **EXACT)


def test_positions_that_are_averaged_have_the_gauss_newton_matrix_itself():
    """Here, where positions as independent cases would have a third of it."""
    model = compiled(sequential(layers.Dense(1), layers.GlobalAveragePooling1D(), shape=(3, 2)))
    x = np.random.default_rng(3).normal(size=(7, 3, 2))
    assert_factors_are_the_gauss_newton_matrix(model, model_data(model, x, np.zeros((7, 1))))


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_inverse_by_halves_is_the_inverse(size, monkeypatch):
    monkeypatch.setattr(kronecker, "_MAX_SOLVED", 2)
    root = np.tril(np.random.default_rng(0).normal(size=(size, size))) + 3 * np.eye(size)
    found = kronecker._inverse_from_root(tf.constant(root))
    np.testing.assert_allclose(found, np.linalg.inv(root @ root.T), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize(
    ("a", "s"),
    [
        (np.zeros((2, 2)), np.zeros((3, 3))),
        (np.ones((2, 2)), np.ones((3, 3))),
        (np.full((2, 2), np.nan), np.eye(3)),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), np.full(3, np.inf)),
    ],
    ids=["zero", "singular", "no number", "indefinite"],
)
def test_factors_without_an_inverse_leave_the_preconditioner_positive_definite(a, s, damping):
    moments = kronecker._Moments(tf.constant(a), tf.constant(s), tf.ones([]))
    for each in kronecker._damped(moments, tf.constant(damping, tf.float64)):
        matrix = kronecker._inverse(*each)
        matrix = np.diag(matrix) if matrix.shape.rank == 1 else matrix.numpy()
        assert np.linalg.eigvalsh(matrix).min() > 0


# Iterations of CG.


def num_iterations(matrix, gradient, inverse_matrix):
    """How many CG takes for 99 % of the decrease that the quadratic model has to give: about what an update asks of it."""
    most = gradient @ np.linalg.solve(matrix, gradient) / 2
    step, residual, direction, number = np.zeros_like(gradient), -gradient, -inverse_matrix @ gradient, 0
    while -(gradient @ step + step @ matrix @ step / 2) <= 0.99 * most:
        size = residual @ inverse_matrix @ residual
        image = matrix @ direction
        length = size / (direction @ image)
        step, residual = step + length * direction, residual - length * image
        solved = inverse_matrix @ residual
        direction = solved + residual @ solved / size * direction
        number += 1
    return number


def deep():
    """A deep autoencoder, and its cases."""
    stack = [layers.Dense(units, "tanh") for units in (12, 8, 4, 2, 4, 8, 12)]
    rng = np.random.default_rng(0)
    x = np.tanh(rng.normal(size=(200, 2)) @ rng.normal(size=(2, 16)))
    return sequential(*stack, layers.Dense(16), shape=(16,)), x, x


def words():
    """A network of embeddings and einsums alone, on words that differ in frequency, as they do; and its cases."""
    stack = [
        layers.Embedding(30, 4),
        layers.EinsumDense("abc,cde->abde", (4, 2, 3), "tanh", bias_axes="de"),
        layers.EinsumDense("abde,dec->abc", (4, 4), "tanh", bias_axes="c"),
        layers.EinsumDense("abc,bcd->ad", 3),
    ]
    rng = np.random.default_rng(0)
    x = np.minimum(rng.zipf(1.5, size=(200, 4)) - 1, 29)
    return sequential(*stack, shape=(4,)), x, np.tanh(rng.normal(size=(30, 3))[x].sum(1))


# By how much depends on the weights drawn: in the deep network 17 against 68, for another seed 57 against 93; for words 8 to 11 against 30 to 39.
@pytest.mark.parametrize(("problem", "times"), [pytest.param(deep, 1, marks=pytest.mark.slow), (words, 2)])
def test_cg_needs_fewer_iterations_than_with_the_diagonal(problem, times):
    network, x, y = problem()
    model = compiled(network)

    def compute(objective):
        parts = KroneckerFactored(), EmpiricalFisherDiagonal()
        inverses = [inverse(objective, part, damping=1e-5)[0] for part in parts]
        return gauss_newton(objective), objective.loss_and_gradient().gradient, inverses

    matrix, gradient, inverses = with_objective(model, model_data(model, x, y), compute)
    damped = matrix.numpy() + 1e-5 * np.eye(len(gradient))
    with_factors, with_diagonal = (num_iterations(damped, gradient.numpy(), each.numpy()) for each in inverses)
    assert times * with_factors < with_diagonal


# What is kept from one update to the next.


def updates(model, kept, *others, run_eagerly=False):
    """Function of data, state and update number: the inverse, the state that the update leaves, and what `others` make of the objective."""

    def compute(objective, state):
        return *inverse(objective, kept, state=state), *(other(objective) for other in others)

    return objective_function(model, compute, run_eagerly)


def made_anew(objective):
    return inverse(objective)[0]


@pytest.mark.parametrize("run_eagerly", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_inverses_serve_for_an_interval_of_updates(run_eagerly, monkeypatch):
    monkeypatch.setattr(kronecker, "_MAX_COLUMNS", 0)  # S of the last layer is a diagonal, kept as a matrix
    model, kept = make_model("sigmoid"), KroneckerFactored(interval=3)
    data = model_data(model, inputs(), targets())
    update = updates(model, kept, made_anew, run_eagerly=run_eagerly)
    first, state, expected = update(data, initial_state(kept, model))
    np.testing.assert_allclose(first, expected, **EXACT)
    model.set_weights([0.5 * weight for weight in model.get_weights()])
    for number in (1, 2):
        again, state, _ = update(data, state, update_number=number)
        np.testing.assert_array_equal(again, first)
    refreshed, _, expected = update(data, state, update_number=3)
    np.testing.assert_allclose(refreshed, expected, **EXACT)
    assert np.abs(refreshed - first).max() > 1e-2


@pytest.mark.slow
def test_inverses_from_numbers_that_are_not_finite_are_made_anew_in_the_next_update():
    model, kept = make_model(), KroneckerFactored(interval=3)
    data = model_data(model, inputs(), targets())
    update = updates(model, kept, made_anew)
    found, state, _ = update(with_a_nan(data), initial_state(kept, model))
    np.testing.assert_array_equal(found, np.eye(len(found)))
    found, state, expected = update(data, state, update_number=1)
    np.testing.assert_allclose(found, expected, **EXACT)
    # From there they serve for an interval; where others fail, for longer.
    found, state, _ = update(with_a_nan(data), state, update_number=4)
    np.testing.assert_allclose(found, expected, **EXACT)
    assert int(state["made_at"]) == 1


def convolutional():
    """A network with batch statistics and a layer that is not trained."""
    stack = [layers.Conv1D(3, 2, activation="tanh"), layers.BatchNormalization(), layers.Flatten()]
    return sequential(*stack, layers.Dense(3, trainable=False), layers.Dense(1), shape=(4, 2))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(convolutional, (4, 2)), (twice, (2,)), pytest.param(attending, (4,), marks=pytest.mark.slow)],
    ids=["convolution, batch statistics and frozen layer", "layer used twice and layer never used", "attention"],
)
def test_kept_state_fits_what_updates_make(make, shape):
    model, kept = compiled(make()), KroneckerFactored(interval=2)
    x = np.random.default_rng(3).integers(-2, 3, size=(NUM_CASES, *shape))
    data = model_data(model, x, np.zeros(model.network(x).shape))
    state = initial_state(kept, model)
    found, new, expected = updates(model, kept, made_anew)(data, state)
    np.testing.assert_allclose(found, expected, **EXACT)
    assert np.linalg.eigvalsh(found).min() > 0
    assert {key: value.shape for key, value in new.items()} == {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize(("interval", "columns"), [(1, 32), pytest.param(2, 0, marks=pytest.mark.slow)])
def test_averages_are_explicit_with_bias_correction_and_leave_out_what_is_not_finite(interval, columns, monkeypatch):
    monkeypatch.setattr(kronecker, "_MAX_COLUMNS", columns)
    decay, model = 0.6, make_model("sigmoid")
    data = model_data(model, inputs(), targets())
    averaging = KroneckerFactored(None, interval=interval, decay=decay)
    update, state = updates(model, averaging, factors), initial_state(averaging, model)
    means, num_averaged = [(0, 0), (0, 0)], 0
    for number in range(7):
        found, state, new = update(data, state, update_number=number)
        # In each of the first three updates, then when the interval is over.
        if number < 3 or (number - 2) % interval == 0:
            num_averaged += 1
            weight = max(1 / num_averaged, 1 - decay)
            means = tf.nest.map_structure(lambda mean, f, w=weight: mean + w * (f.numpy() - mean), means, new)
            np.testing.assert_allclose(found, damped_inverse(means, [0.1, 0.1]), rtol=1e-7, atol=1e-10)
        model.set_weights([0.9 * weights for weights in model.get_weights()])
    assert num_averaged == {1: 7, 2: 5}[interval] == float(state["num_averaged"])
    found, after, _ = update(with_a_nan(data), state, update_number=8)
    assert np.all(np.isfinite(found))
    for key in state.keys() - {"made_at"}:
        np.testing.assert_array_equal(after[key], state[key])


def flat(activation):
    stack = layers.Embedding(5, 2), layers.Flatten(), layers.Dense(4, "tanh"), layers.Dense(2, activation)
    return sequential(*stack, shape=(4,))


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "make"), [("mixed_float16", attending), ("mixed_bfloat16", flat)])
def test_embeddings_attention_and_softmax_train_in_16_bits(policy, make):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(policy)
    loss, preconditioner = "sparse_categorical_crossentropy", KroneckerFactored()
    model = trainable(make("softmax"), loss, preconditioner=preconditioner, growing_batch=None)
    x = tokens(60)
    loss = fit(model, x, (x == 1).any(1), epochs=8, callbacks=[ConstantDamping()])["loss"]
    assert loss[-1] < 0.5 * loss[0]


@pytest.mark.parametrize(
    ("argument", "rule", "values"),
    [
        ("num_cases", "an integer >= 1, a share .* or `None`", [0, -1, 2.5, 0.0, True, "all"]),
        ("interval", "an integer >= 1", [0, -1, 2.5, None]),
        ("decay", r"a number in \[0, 1\)", [-0.1, 1.0, 1.5, np.nan, True, "0.9", None]),
    ],
)
def test_a_bad_argument_is_refused(argument, rule, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{argument}` must be {rule}. Received: {argument}="):
            KroneckerFactored(**{argument: value})
