"""What the Kronecker-factored preconditioner promises: the Gauss-Newton matrix where layers allow it, and its damped inverse everywhere."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import (
    NUM_CASES,
    PROBLEMS,
    compiled,
    dense_matrix,
    inputs,
    loss_and_gradient,
    make_model,
    model_data,
    with_objective,
)

from keras_hf import (
    ConjugateGradient,
    ConstantDamping,
    DoubleBackward,
    EmpiricalFisherDiagonal,
    GaussNewton,
    HessianFree,
    KroneckerFactored,
)
from keras_hf.problem.capture import kernel_and_bias
from keras_hf.solvers import kronecker

pytestmark = pytest.mark.usefixtures("float64")

# Rounding, and a jitter of 4 epsilon of a factor's trace.
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def factors(model, data, num_cases=None, **arguments):
    """A and S of every captured layer."""
    preconditioner = KroneckerFactored(num_cases)
    found = with_objective(
        model, data, lambda objective: preconditioner._factors(objective, objective.captured), **arguments
    )
    return [tuple(np.diag(f) if f.shape.rank == 1 else f.numpy() for f in (a, s)) for a, s, _ in found]


def gauss_newton(model, data):
    return with_objective(
        model,
        data,
        lambda objective: dense_matrix(objective.product(GaussNewton(DoubleBackward())), objective.num_weights),
    ).numpy()


def inverse(model, data, damping=0.1, preconditioner=None, **arguments):
    def compute(objective):
        part = preconditioner or KroneckerFactored()
        precondition, _ = part.inverse(objective, None, tf.constant(damping, tf.float64), {})
        return dense_matrix(precondition, objective.num_weights)

    return with_objective(model, data, compute, **arguments).numpy()


def one_layer(problem="mse", use_bias=True):
    layer = layers.Dense(3, PROBLEMS[problem].activation, use_bias=use_bias)
    return compiled(keras.Sequential([keras.Input((2,)), layer]), PROBLEMS[problem].loss)


def targets(problem="mse"):
    return PROBLEMS[problem].targets(np.random.default_rng(3))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("columns", [32, 0])
def test_one_layer_under_squared_error_has_the_gauss_newton_matrix_itself(use_bias, columns, monkeypatch):
    monkeypatch.setattr(kronecker, "_MAX_COLUMNS", columns)
    model = one_layer(use_bias=use_bias)
    data = model_data(model, inputs(), targets())
    ((a, s),) = factors(model, data)
    np.testing.assert_allclose(np.kron(a, s), gauss_newton(model, data), **EXACT)


@pytest.mark.parametrize("name", sorted(set(PROBLEMS) - {"mse on sigmoid"}))
def test_one_layer_and_one_input_have_the_gauss_newton_matrix_itself(name):
    """Every case has the same input, so that A x S is exact whatever H is."""
    model = one_layer(name)
    data = model_data(model, np.tile([[0.3, -1.2]], [NUM_CASES, 1]), targets(name))
    ((a, s),) = factors(model, data)
    np.testing.assert_allclose(np.kron(a, s), gauss_newton(model, data), **EXACT)


@pytest.mark.parametrize("name", ["mse on sigmoid", "sparse categorical"])
def test_before_an_activation_the_mean_over_signs_is_the_pulled_back_loss_curvature(name):
    model = make_model(PROBLEMS[name].activation, PROBLEMS[name].loss)
    data = model_data(model, inputs(), targets(name))
    first, last = model.network.layers
    hidden = first(data.x).numpy()
    z = hidden @ last.kernel.numpy() + last.bias.numpy()
    hessian = PROBLEMS[name].output_hessian(z, data.y).numpy() / NUM_CASES
    slope = (
        model.network(data.x).numpy() * (1 - model.network(data.x).numpy())
        if name == "mse on sigmoid"
        else np.ones_like(z)
    )
    jacobian = slope[:, :, None] * last.kernel.numpy().T * (1 - hidden**2)[:, None, :]
    expected = np.einsum("nij,nik,nkl->jl", jacobian, hessian, jacobian)

    def draws(objective):
        def draw(i):
            moments = lambda piece, seeds: kronecker._moments(piece, [first], seeds + [[0, i]])  # noqa: E731
            return objective.sum_over_chunk(moments)[0].s

        return tf.map_fn(draw, tf.range(400), fn_output_signature=tf.float64)

    s = with_objective(model, data, draws).numpy()
    standard_error = np.std(s, 0) / np.sqrt(len(s))
    assert (np.abs(np.mean(s, 0) - expected) < 4.5 * standard_error + 1e-12).all()
    # Enough draws to tell.
    assert standard_error.max() < 0.05 * expected.max()


def test_roots_of_a_softmax_have_the_blocks_of_the_loss_curvature():
    name = "categorical from probabilities"
    model = one_layer(name)
    data = model_data(model, inputs(), targets(name))

    def of_piece(piece, seeds):
        evaluation = piece.forward()
        hessian = kronecker.loss_hessian(lambda: piece.loss(evaluation), evaluation.outputs)
        return kronecker._cholesky(lambda u: hessian([u])[0], evaluation.outputs[0])

    root = with_objective(model, data, lambda objective: objective.sum_over_chunk(of_piece)).numpy()
    z = model.network.layers[0](data.x)._keras_logits
    expected = PROBLEMS[name].output_hessian(z, data.y).numpy() / NUM_CASES
    np.testing.assert_allclose(root @ root.transpose(0, 2, 1), expected, **EXACT)


@pytest.mark.parametrize("damping", [1e-3, 10.0])
def test_inverse_is_that_of_the_damped_kronecker_product_formed_densely(damping):
    model = make_model(regularizer=keras.regularizers.L2(0.25))
    data = model_data(model, inputs(), targets())
    matrix = np.zeros((27, 27))
    # Regularized are 8 of the first layer's 12 weights, its kernel, and 3 of the last one's 15, its biases.
    for (a, s), start, own in zip(factors(model, data), (0, 12), (0.5 * 8 / 12, 0.5 * 3 / 15), strict=True):
        pi = np.sqrt(np.trace(a) / len(a) / (np.trace(s) / len(s)))
        root = np.sqrt(damping + own)
        block = np.kron(a + pi * root * np.eye(len(a)), s + root / pi * np.eye(len(s)))
        matrix[start : start + len(block), start : start + len(block)] = block
    np.testing.assert_allclose(inverse(model, data, damping) @ matrix, np.eye(27), atol=1e-9)


def largest_off_diagonal(matrix):
    return np.abs(matrix - np.diag(np.diag(matrix))).max()


def test_weights_in_no_captured_layer_have_the_diagonal():
    stack = [layers.Dense(3), layers.LayerNormalization(), layers.Dense(2)]
    model = compiled(keras.Sequential([keras.Input((2,)), *stack]))
    data = model_data(model, inputs(), targets()[:, :2])
    found = inverse(model, data)
    diagonal = inverse(model, data, preconditioner=EmpiricalFisherDiagonal())
    np.testing.assert_allclose(found[9:15], diagonal[9:15], **EXACT)  # gamma and beta
    assert largest_off_diagonal(found[:9, :9]) > 1e-2


def test_a_layer_with_too_many_rows_has_the_diagonal(monkeypatch):
    monkeypatch.setattr(kronecker, "_MAX_ROWS", 4)  # the first layer's matrix is 3 by 4, the last one's 5 by 3
    model = make_model()
    data = model_data(model, inputs(), targets())
    found = inverse(model, data)
    diagonal = inverse(model, data, preconditioner=EmpiricalFisherDiagonal())
    np.testing.assert_allclose(found[12:], diagonal[12:], **EXACT)
    assert largest_off_diagonal(found[:12, :12]) > 1e-2


def test_no_diagonal_is_computed_where_all_weights_are_captured(monkeypatch):
    monkeypatch.setattr(EmpiricalFisherDiagonal, "inverse", None)
    model = make_model()
    inverse(model, model_data(model, inputs(), targets()))


# Name: layers, shape of a case.
SHARED = {
    "Dense on sequences": (lambda: [layers.Dense(3)], (4, 2)),
    "Dense on masked sequences": (lambda: [layers.Masking(), layers.Dense(3)], (4, 1)),
    "Conv1D": (lambda: [layers.Conv1D(3, 3, padding="causal")], (6, 2)),
    "Conv2D": (lambda: [layers.Conv2D(3, (2, 3), padding="same")], (4, 4, 2)),
    "Conv3D": (lambda: [layers.Conv3D(2, 2, strides=2)], (2, 2, 4, 1)),
    "EinsumDense": (lambda: [layers.EinsumDense("abcd,cde->abe", (4, 3), bias_axes="e")], (4, 2, 2)),
    "Embedding": (lambda: [layers.Embedding(5, 3)], (4,)),
    "Embedding of one token": (lambda: [layers.Embedding(5, 3)], ()),
    "Embedding of masked tokens": (lambda: [layers.Embedding(5, 3, mask_zero=True)], (4,)),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("Conv1D", "Conv3D", "Embedding of one token") else [])
        for name in SHARED
    ],
)
def test_one_layer_that_shares_weights_among_places_has_the_gauss_newton_matrix_itself(name):
    """Squared error doesn't couple the places of an output: here, what Grosse & Martens assume is true."""
    make, shape = SHARED[name]
    model = compiled(keras.Sequential([keras.Input(shape), *make()]))
    # Zeros are masked, and tokens below zero count from the end.
    x = np.random.default_rng(3).integers(-2, 3, size=(7, *shape)).astype("float64")
    data = model_data(model, x, np.zeros(model.network(x).shape))
    ((a, s),) = factors(model, data)
    np.testing.assert_allclose(np.kron(a, s), gauss_newton(model, data), **EXACT)


def test_outputs_of_several_axes_have_the_diagonal_of_the_gauss_newton_matrix():
    """What signs couple between the axes vanishes in the mean."""
    model = compiled(keras.Sequential([keras.Input((4, 2)), layers.EinsumDense("abc,cde->abde", (4, 2, 3))]))
    x = np.random.default_rng(3).normal(size=(7, 4, 2))
    data = model_data(model, x, np.zeros((7, 4, 2, 3)))
    ((a, s),) = factors(model, data)
    np.testing.assert_allclose(np.kron(np.diag(a), np.diag(s)), np.diag(gauss_newton(model, data)), **EXACT)


def attending(vocabulary=5):
    """A network on masked words whose weights are all factored."""
    x = keras.Input((4,))
    words = layers.Embedding(vocabulary, 2, mask_zero=True)(x)
    seen = layers.MultiHeadAttention(2, 2)(words, words)
    return keras.Model(x, layers.Dense(1)(layers.GlobalAveragePooling1D()(seen)))


def tokens(num_cases=NUM_CASES, vocabulary=5):
    return np.random.default_rng(3).integers(0, vocabulary, size=(num_cases, 4))


def test_embedding_and_attention_have_the_inverse_of_the_damped_kronecker_product():
    model = compiled(attending())
    data = model_data(model, tokens(), np.random.default_rng(4).normal(size=(NUM_CASES, 1)))
    sizes = [weight.value.shape.num_elements() for weight in model.trainable_variables]
    starts = dict(zip([id(weight) for weight in model.trainable_variables], np.cumsum([0, *sizes]), strict=False))
    found = inverse(model, data)
    num_factored = 0
    for layer, (a, s) in zip(model._task(data)[1].captured, factors(model, data), strict=True):
        pi = np.sqrt(np.trace(a) / len(a) / (np.trace(s) / len(s)))
        root = np.sqrt(0.1)
        block = np.kron(a + pi * root * np.eye(len(a)), s + root / pi * np.eye(len(s)))
        start = starts[id(kernel_and_bias(layer)[0])]
        own = slice(start, start + len(block))
        np.testing.assert_allclose(found[own, own] @ block, np.eye(len(block)), atol=1e-9)
        found[own, own] = 0
        num_factored += len(block)
    assert num_factored == len(found) == 59
    assert (found == 0).all()


def test_vocabulary_may_be_large():
    """Of 100,000 words: as a matrix, A would take 80 GB."""
    model = compiled(keras.Sequential([keras.Input((3,)), layers.Embedding(100_000, 2)]))
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
    expected = 1 / (a + pi * np.sqrt(0.1)) / (s + np.sqrt(0.1) / pi)
    np.testing.assert_allclose(found, np.stack([expected, expected], 1), rtol=1e-9)


@pytest.mark.parametrize("micro_batch_size", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_pieces_of_any_size_give_the_same(micro_batch_size):
    model = make_model()
    data = model_data(model, inputs(), targets())
    whole, pieces = (inverse(model, data, micro_batch_size=size) for size in (None, micro_batch_size))
    np.testing.assert_allclose(pieces, whole, **EXACT)


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


def test_some_cases_stand_for_the_chunk():
    model = one_layer()
    data = model_data(model, np.tile([[0.3, -1.2]], [NUM_CASES, 1]), targets())
    for some, of_all in zip(factors(model, data, num_cases=4)[0], factors(model, data)[0], strict=True):
        np.testing.assert_allclose(some, of_all, **EXACT)


def test_factors_follow_sample_weights():
    model = one_layer()
    x, weight = np.tile([[0.3, -1.2]], [NUM_CASES, 1]), np.linspace(0, 2, NUM_CASES)
    data = model_data(model, x, targets(), weight)
    ((a, s),) = factors(model, data)
    np.testing.assert_allclose(np.kron(a, s), gauss_newton(model, data), **EXACT)


class Twice(keras.Model):
    """Calls one layer twice, and holds one that it never calls."""

    def __init__(self):
        super().__init__()
        self.shared, self.unused = layers.Dense(2, "tanh"), layers.Dense(2)

    def build(self, input_shape):
        self.shared.build(input_shape)
        self.unused.build(input_shape)

    def call(self, x):
        return self.shared(self.shared(x))


def test_calls_of_one_layer_count_as_places():
    model = compiled(Twice())
    x = inputs()
    data = model_data(model, x, np.zeros((NUM_CASES, 2)))
    seen = np.concatenate([np.concatenate([x, model.network.shared(x)]), np.ones((2 * NUM_CASES, 1))], 1)
    np.testing.assert_allclose(factors(model, data)[0][0], seen.T @ seen / (2 * NUM_CASES), **EXACT)
    assert np.linalg.eigvalsh(inverse(model, data)).min() > 0


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


def num_iterations(model, data, damping=1e-5):
    """CG's with the factors and with the diagonal for 99 % of the decrease that the quadratic model has to give: about what an update asks of it."""
    gradient, matrix = loss_and_gradient(model, data)[1], gauss_newton(model, data)
    matrix = matrix + damping * np.eye(len(gradient))
    most = gradient @ np.linalg.solve(matrix, gradient) / 2

    def needed(inverse_matrix):
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

    return [needed(inverse(model, data, damping, each)) for each in (KroneckerFactored(), EmpiricalFisherDiagonal())]


@pytest.mark.slow
def test_cg_needs_fewer_iterations_than_with_the_diagonal_on_a_deep_network():
    stack = [layers.Dense(units, "tanh") for units in (12, 8, 4, 2, 4, 8, 12)]
    model = compiled(keras.Sequential([keras.Input((16,)), *stack, layers.Dense(16)]))
    rng = np.random.default_rng(0)
    x = np.tanh(rng.normal(size=(200, 2)) @ rng.normal(size=(2, 16)))
    data = model_data(model, x, x)
    # By how much depends on the weights drawn: 17 against 68 here, 57 against 93 for another seed.
    with_factors, with_diagonal = num_iterations(model, data)
    assert with_factors < with_diagonal


def test_cg_needs_fewer_iterations_than_with_the_diagonal_on_embeddings_and_einsums():
    """Where words differ in frequency, as they do, and no other layer is there to help."""
    stack = [
        layers.Embedding(30, 4),
        layers.EinsumDense("abc,cde->abde", (4, 2, 3), "tanh", bias_axes="de"),
        layers.EinsumDense("abde,dec->abc", (4, 4), "tanh", bias_axes="c"),
        layers.EinsumDense("abc,bcd->ad", 3),
    ]
    model = compiled(keras.Sequential([keras.Input((4,)), *stack]))
    rng = np.random.default_rng(0)
    x = np.minimum(rng.zipf(1.5, size=(200, 4)) - 1, 29)
    data = model_data(model, x, np.tanh(rng.normal(size=(30, 3))[x].sum(1)))
    # Between 8 and 11 against 30 to 39 for three seeds.
    with_factors, with_diagonal = num_iterations(model, data)
    assert 2 * with_factors < with_diagonal


@pytest.mark.slow
def test_two_replicas_train():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        network = keras.Sequential([keras.Input((2,)), layers.Dense(4, "tanh"), layers.Dense(1)])
        model = compiled(
            network,
            optimizer=HessianFree(
                0.1, solver=ConjugateGradient(preconditioner=KroneckerFactored(9, interval=2)), seed=0
            ),
        )
    history = model.fit(inputs(), inputs()[:, :1] ** 2, epochs=4, verbose=0, callbacks=[ConstantDamping()]).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]


def initial_state(preconditioner, model):
    variables = [variable.value for variable in model.trainable_variables]
    return preconditioner.initial_state(variables, model.network._flatten_layers())


def inverse_and_state(model, data, preconditioner, state, update_number=0):
    """The inverse as a matrix, and the state that the update leaves."""

    def compute(objective):
        precondition, new = preconditioner.inverse(objective, None, tf.constant(0.1, tf.float64), state)
        return dense_matrix(precondition, objective.num_weights), new

    matrix, state = with_objective(model, data, compute, update_number=update_number)
    return matrix.numpy(), state


@pytest.mark.parametrize("columns", [pytest.param(32, marks=pytest.mark.slow), 0])
def test_inverses_serve_for_an_interval_of_updates(columns, monkeypatch):
    monkeypatch.setattr(kronecker, "_MAX_COLUMNS", columns)
    model = make_model("sigmoid")
    data = model_data(model, inputs(), targets())
    always, kept = KroneckerFactored(), KroneckerFactored(interval=3)
    first, state = inverse_and_state(model, data, kept, initial_state(kept, model))
    np.testing.assert_allclose(first, inverse_and_state(model, data, always, {})[0], **EXACT)
    for weight in model.trainable_variables:
        weight.assign(0.5 * weight)
    for update_number in (1, 2):
        again, state = inverse_and_state(model, data, kept, state, update_number)
        np.testing.assert_array_equal(again, first)
    refreshed, _ = inverse_and_state(model, data, kept, state, update_number=3)
    expected, _ = inverse_and_state(model, data, always, {}, update_number=3)
    np.testing.assert_allclose(refreshed, expected, **EXACT)
    assert np.abs(refreshed - first).max() > 1e-2


@pytest.mark.slow
def test_inverses_from_numbers_that_are_not_finite_are_made_anew_in_the_next_update():
    model, kept = make_model(), KroneckerFactored(interval=3)
    data = model_data(model, inputs(), targets())
    broken = data._replace(x=tf.tensor_scatter_nd_update(data.x, [[3, 0]], [np.nan]))
    found, state = inverse_and_state(model, broken, kept, initial_state(kept, model))
    np.testing.assert_array_equal(found, np.eye(len(found)))
    found, state = inverse_and_state(model, data, kept, state, update_number=1)
    expected, _ = inverse_and_state(model, data, KroneckerFactored(), {}, update_number=1)
    np.testing.assert_allclose(found, expected, **EXACT)
    # From there they serve for an interval; where others fail, for longer.
    found, state = inverse_and_state(model, broken, kept, state, update_number=4)
    np.testing.assert_allclose(found, expected, **EXACT)
    assert int(state["made_at"]) == 1


def frozen():
    stack = [layers.Dense(3, "tanh"), layers.Dense(3, "tanh", trainable=False), layers.Dense(1)]
    return keras.Sequential([keras.Input((2,)), *stack])


def convolutional():
    stack = [layers.Conv1D(3, 2, activation="tanh"), layers.BatchNormalization(), layers.Flatten(), layers.Dense(1)]
    return keras.Sequential([keras.Input((4, 2)), *stack])


# Name: network, shape of a case.
KEPT = {
    "frozen layer": (frozen, (2,)),
    "convolution and batch statistics": (convolutional, (4, 2)),
    "layer used twice and layer never used": (lambda: Twice(), (2,)),
    "embedding and attention": (lambda: attending(), (4,)),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("frozen layer", "embedding and attention") else [])
        for name in KEPT
    ],
)
def test_kept_state_fits_what_updates_make(name):
    make, shape = KEPT[name]
    model = compiled(make())
    x = np.random.default_rng(3).integers(-2, 3, size=(NUM_CASES, *shape))
    data = model_data(model, x, np.zeros(model.network(x).shape))
    kept = KroneckerFactored(interval=2)
    state = initial_state(kept, model)
    found, new = inverse_and_state(model, data, kept, state)
    np.testing.assert_allclose(found, inverse(model, data), **EXACT)
    assert {key: value.shape for key, value in new.items()} == {key: value.shape for key, value in state.items()}


@pytest.mark.slow
def test_eager_updates_keep_inverses_too():
    losses = []
    for run_eagerly in (False, True):
        optimizer = HessianFree(
            0.1, solver=ConjugateGradient(preconditioner=KroneckerFactored(interval=2), max_iterations=2), seed=0
        )
        model = make_model(optimizer=optimizer, run_eagerly=run_eagerly)
        history = model.fit(inputs(), targets(), epochs=3, verbose=0, callbacks=[ConstantDamping()]).history
        losses.append(history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32"])
@pytest.mark.slow
def test_trains_in_lower_precision(policy):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(policy)
    network = keras.Sequential([keras.Input((2,)), layers.Dense(8, "tanh"), layers.Dense(2, "softmax")])
    optimizer = HessianFree(0.1, solver=ConjugateGradient(preconditioner=KroneckerFactored()), seed=0)
    model = compiled(network, "sparse_categorical_crossentropy", optimizer=optimizer)
    x = inputs().astype("float32")
    history = model.fit(x, x[:, 0] > x[:, 1], epochs=5, verbose=0, callbacks=[ConstantDamping()]).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]


@pytest.mark.slow
def test_attention_trains_in_float16():
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("mixed_float16")
    optimizer = HessianFree(0.1, solver=ConjugateGradient(preconditioner=KroneckerFactored()), seed=0)
    model = compiled(attending(), optimizer=optimizer)
    x = tokens(60)
    history = model.fit(x, (x == 1).sum(1), epochs=8, verbose=0, callbacks=[ConstantDamping()]).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]


@pytest.mark.parametrize("value", [0, -1, 2.5, 0.0, True, "all"])
def test_a_bad_number_of_cases_is_refused(value):
    with pytest.raises(
        ValueError, match=r"`num_cases` must be an integer >= 1, a share .* or `None`. Received: num_cases="
    ):
        KroneckerFactored(num_cases=value)


@pytest.mark.parametrize("value", [0, -1, 2.5, None])
def test_a_bad_interval_is_refused(value):
    with pytest.raises(ValueError, match="`interval` must be an integer >= 1. Received: interval="):
        KroneckerFactored(interval=value)


# Averages over estimates.


@pytest.mark.slow
@pytest.mark.parametrize("columns", [32, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("interval", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_averaged_factors_are_the_explicit_average_with_bias_correction(columns, interval, monkeypatch):
    monkeypatch.setattr(kronecker, "_MAX_COLUMNS", columns)
    decay, model = 0.6, make_model("sigmoid")
    data = model_data(model, inputs(), targets())
    averaging = KroneckerFactored(None, interval=interval, decay=decay)
    state = initial_state(averaging, model)
    means, number = None, 0
    for update_number in range(7):
        found, state = inverse_and_state(model, data, averaging, state, update_number)
        # In each of the first three updates, then when the interval is over.
        if update_number < 3 or (update_number - 2) % interval == 0:
            number += 1
            weight = max(1 / number, 1 - decay)
            new = factors(model, data, update_number=update_number)
            means = (
                new
                if means is None
                else [
                    tuple(mean + weight * (factor - mean) for mean, factor in zip(*pair, strict=True))
                    for pair in zip(means, new, strict=True)
                ]
            )
            np.testing.assert_allclose(found, by_hand(means, 0.1), rtol=1e-7, atol=1e-10)
        for variable in model.trainable_variables:
            variable.assign(0.9 * variable)
    assert number == (7 if interval == 1 else 5)
    assert float(state["num_averaged"]) == number


def by_hand(means, damping):
    """The dense inverse of the 2-4-3 network's preconditioner from its factors."""
    blocks = []
    for a, s in means:
        pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(s) / len(s)))
        root = np.sqrt(damping)
        blocks.append(
            np.kron(np.linalg.inv(a + pi * root * np.eye(len(a))), np.linalg.inv(s + root / pi * np.eye(len(s))))
        )
    sizes = [len(block) for block in blocks]
    dense = np.zeros([sum(sizes)] * 2)
    dense[: sizes[0], : sizes[0]], dense[sizes[0] :, sizes[0] :] = blocks
    return dense


def test_an_estimate_that_is_not_finite_leaves_the_averages():
    model, averaging = make_model(), KroneckerFactored(None, interval=1, decay=0.5)
    data = model_data(model, inputs(), targets())
    _, before = inverse_and_state(model, data, averaging, initial_state(averaging, model))
    broken = data._replace(x=tf.tensor_scatter_nd_update(data.x, [[3, 0]], [np.nan]))
    found, after = inverse_and_state(model, broken, averaging, before, update_number=1)
    assert np.all(np.isfinite(found))
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_a_share_of_the_cases_may_be_more_than_the_chunk(share):
    model = make_model("sigmoid")
    data = model_data(model, inputs(), targets())
    numbers = {}

    def compute(objective):
        chunk = objective._parts.pieces.chunk_indices()
        counted = objective.sum_over_chunk(lambda piece, seeds: tf.cast(piece.num_cases, tf.float64), share)
        return counted, chunk

    for micro in (None, 2):
        counted, chunk = with_objective(model, data, compute, 4, micro)
        numbers[micro] = float(counted)
        assert len(chunk) == 4
    # Of one piece, of the chunk's size, at most; of several pieces, all.
    assert numbers == {None: min(4, np.ceil(share * NUM_CASES)), 2: np.ceil(share * NUM_CASES)}


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, np.nan, True, "0.9", None])
def test_a_bad_decay_is_refused(value):
    with pytest.raises(ValueError, match=r"`decay` must be a number in \[0, 1\). Received: decay="):
        KroneckerFactored(decay=value)
