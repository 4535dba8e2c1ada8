"""What the Nystrom preconditioner promises: the damped inverse of what its sketch saw, and to be positive definite."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import (
    PROBLEMS,
    compiled,
    dense_matrix,
    inputs,
    make_model,
    model_data,
    sequential,
    update_state,
    with_objective,
)
from training import all_values, assert_equal, fit, trainable

from keras_hf import (
    ConjugateGradient,
    DoubleBackward,
    ForwardAccumulation,
    GaussNewton,
    Hessian,
    Identity,
    Nystrom,
    ResidualTolerance,
    conjugate_gradient,
)
from keras_hf.method.update import hf_update
from keras_hf.solvers import nystrom

pytestmark = pytest.mark.usefixtures("float64")


class Plain:
    """An objective that is a matrix: what `Nystrom` asks of one."""

    dtype = tf.float64

    def __init__(self, matrix, update_number=0):
        self.matrix, self.num_weights = tf.constant(matrix), len(matrix)
        self.update_number = tf.constant(update_number)

    def product(self):
        return lambda rows: tf.matmul(rows, self.matrix)

    def inverse(self, preconditioner, damping, state=None):
        """M^-1 as a matrix, and the next state."""
        if state is None:
            state = preconditioner.initial_state([tf.zeros([self.num_weights], self.dtype)], [])
        precondition, state = preconditioner.inverse(self, self.product, tf.constant(damping, self.dtype), state)
        return dense_matrix(precondition, self.num_weights).numpy(), state


def symmetric(values, seed=0):
    """A matrix of given eigenvalues."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return basis * values @ basis.T


def data_of(model, name="mse"):
    return model_data(model, inputs(), PROBLEMS[name].targets(np.random.default_rng(3)))


def inverse_and_matrix(objective, preconditioner, damping=0.1, curvature=None):
    """M^-1 and the matrix G, of an objective."""
    product = objective.product(curvature or GaussNewton(DoubleBackward()))
    state, damping = preconditioner.initial_state(objective.variables, []), tf.constant(damping, tf.float64)
    precondition, _ = preconditioner.inverse(objective, lambda: product, damping, state)
    return [dense_matrix(each, objective.num_weights) for each in (precondition, product)]


def assert_inverts(found, matrix, damping):
    """M^-1 is that of the damped matrix, times a number."""
    identity = found @ (matrix + damping * np.eye(len(matrix)))
    np.testing.assert_allclose(identity / identity[0, 0], np.eye(len(matrix)), atol=1e-7)


def assert_positive_definite(found):
    np.testing.assert_allclose(found, tf.transpose(found), rtol=1e-9, atol=1e-12)
    assert np.linalg.eigvalsh(found).min() > 0


# The sketch, against dense matrices.


def test_full_rank_is_the_inverse_with_the_damping_of_the_update_also_of_an_old_sketch():
    preconditioner, matrix = Nystrom(20, interval=3), symmetric(np.logspace(0, -4, 20))
    found, state = Plain(matrix, 0).inverse(preconditioner, 1e-3)
    assert_inverts(found, matrix, 1e-3)
    found, _ = Plain(np.zeros((20, 20)), 1).inverse(preconditioner, 7.0, state)
    assert_inverts(found, matrix, 7.0)


def test_a_matrix_of_low_rank_is_recovered():
    values = np.array([7.0, 5.0, 0.3] + [0.0] * 17)
    matrix = symmetric(values)
    _, state = Plain(matrix).inverse(Nystrom(6), 0.1)
    np.testing.assert_allclose(state["values"], values[:6], atol=1e-12)
    vectors = state["vectors"].numpy()
    np.testing.assert_allclose(vectors * state["values"] @ vectors.T, matrix, atol=1e-12)


def test_the_sketch_is_below_the_matrix_and_near_its_largest_eigenvalues_and_the_preconditioner_that_of_the_paper():
    eigenvalues = np.logspace(2, -6, 40)
    matrix = symmetric(eigenvalues)
    found, state = Plain(matrix).inverse(Nystrom(12), 0.1)
    u, values = state["vectors"].numpy(), state["values"].numpy()
    np.testing.assert_allclose(u.T @ u, np.eye(12), atol=1e-12)
    assert np.linalg.eigvalsh(matrix - u * values @ u.T).min() > -1e-10
    np.testing.assert_allclose(values[:4], eigenvalues[:4], rtol=0.05)
    expected = (values[-1] + 0.1) * u / (values + 0.1) @ u.T + np.eye(40) - u @ u.T
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_size_of_the_matrix_does_not_matter():
    matrix = symmetric(np.logspace(0, -4, 20))
    tiny, one, huge = (Plain(matrix * s).inverse(Nystrom(5), 1e-3 * s)[0] for s in (1e-200, 1, 1e150))
    np.testing.assert_allclose([tiny, huge], [one, one], atol=1e-9)


INDEFINITE = np.concatenate([np.logspace(1, -3, 15), -np.logspace(1.5, -3, 15)])


@pytest.mark.parametrize(
    "matrix",
    [
        np.zeros((30, 30)),
        np.ones((30, 30)),
        symmetric(np.logspace(8, -20, 30)),
        symmetric(INDEFINITE),
        -symmetric(np.logspace(1, -3, 30)),
        np.full((30, 30), np.nan),
        np.full((30, 30), np.inf),
    ],
    ids=["zero", "rank one", "ill-conditioned", "indefinite", "negative", "no number", "infinite"],
)
def test_any_matrix_leaves_the_preconditioner_positive_definite(matrix):
    for rank in (5, 30):
        state = None
        for damping in (0.0, 1e-12, 0.1):
            found, state = Plain(matrix).inverse(Nystrom(rank), damping, state)
            assert_positive_definite(found)
            assert (state["values"].numpy() >= 0).all()


def test_float32_stays_positive_definite_without_damping():
    # Residuals along the largest eigenvector, where what is left is 1 - 1.
    preconditioner, objective = Nystrom(10), Plain(symmetric(np.logspace(4, -8, 500)).astype("float32"))
    objective.dtype = tf.float32
    state = preconditioner.initial_state([tf.zeros([500])], [])
    precondition, state = preconditioner.inverse(objective, objective.product, tf.zeros([]), state)
    for vector in tf.unstack(state["vectors"], axis=1):
        assert tf.reduce_sum(vector * precondition(vector)) > 0


def test_cg_needs_a_few_iterations_where_few_eigenvalues_stand_out():
    matrix = symmetric(np.concatenate([np.logspace(6, 1, 20), np.full(180, 1e-2)]))
    b, damping = tf.constant(np.random.default_rng(1).normal(size=200)), 1e-2
    inverse_matrix = tf.constant(Plain(matrix).inverse(Nystrom(30), damping)[0])

    def solve(precondition):
        product = lambda v: tf.linalg.matvec(matrix, v) + damping * v  # noqa: E731
        return conjugate_gradient(product, b, None, precondition, ResidualTolerance(1e-9), 100)

    without, found = solve(None), solve(lambda r: tf.linalg.matvec(inverse_matrix, r))
    assert found.num_iterations < 10 < 80 < without.num_iterations
    exact = np.linalg.solve(matrix + damping * np.eye(200), b)
    np.testing.assert_allclose(found.iterates[-1], exact, rtol=1e-6, atol=1e-8 * np.abs(exact).max())


# State.


def test_a_sketch_is_renewed_after_its_interval():
    preconditioner, state, kept = Nystrom(4, interval=3), None, []
    matrices = [symmetric(np.logspace(0, -2, 12), seed=number) for number in range(7)]
    for number, matrix in enumerate(matrices):
        _, state = Plain(matrix, number).inverse(preconditioner, 0.1, state)
        kept.append(state["vectors"].numpy())
    changed = [not np.array_equal(a, b) for a, b in zip(kept, kept[1:], strict=False)]
    assert changed == [False, False, True, False, False, True]
    _, fresh = Plain(matrices[3], 3).inverse(preconditioner, 0.1)
    np.testing.assert_array_equal(kept[5], fresh["vectors"])


def test_a_sketch_that_is_not_finite_is_made_anew_in_the_next_update():
    preconditioner, matrix = Nystrom(12, interval=3), symmetric(np.logspace(0, -2, 12))
    broken = np.full((12, 12), np.nan)
    found, state = Plain(broken, 0).inverse(preconditioner, 0.1)
    np.testing.assert_allclose(found, np.eye(12))
    found, state = Plain(matrix, 1).inverse(preconditioner, 0.1, state)
    assert_inverts(found, matrix, 0.1)
    # From there it serves for an interval; where another fails, for longer.
    for number in (2, 3, 4):
        _, later = Plain(broken, number).inverse(preconditioner, 0.1, state)
        for name in state:
            np.testing.assert_array_equal(later[name], state[name])
    assert int(Plain(matrix, 5).inverse(preconditioner, 0.1, state)[1]["made_at"]) == 5


def test_updates_draw_other_directions():
    first, again, second = (nystrom._directions(Plain(np.eye(20), number), 4).numpy() for number in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.T @ second).max() < 0.9
    np.testing.assert_allclose(second.T @ second, np.eye(4), atol=1e-12)


def test_a_sketch_for_one_update_is_not_kept():
    assert Nystrom(4, interval=1).initial_state([tf.zeros([12])], []) == {}
    _, state = Plain(np.eye(12)).inverse(Nystrom(4, interval=1), 0.1)
    assert state == {}


@pytest.mark.slow
def test_in_16_bits_it_trains_with_a_sketch_of_32_and_goes_on_after_saving_as_if_it_had_not_stopped(tmp_path):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("mixed_float16")
    network = sequential(layers.Dense(8, "tanh"), layers.Dense(2, "softmax"))
    loss, preconditioner = "sparse_categorical_crossentropy", Nystrom(10, interval=3)
    model = trainable(network, loss, preconditioner=preconditioner, growing_batch=None)
    data = inputs().astype("float32"), inputs()[:, 0] > inputs()[:, 1]
    losses = fit(model, *data, epochs=5)["loss"]
    assert losses[-1] < 0.5 * losses[0]
    state = model.optimizer.state().solver["preconditioner"]
    assert state["vectors"].dtype == tf.float32 and tf.reduce_any(state["values"] > 0)
    # The first update after saving uses a sketch of an update before.
    model.save(tmp_path / "run.keras")
    resumed = keras.models.load_model(tmp_path / "run.keras")
    assert fit(resumed, *data, epochs=2) == fit(model, *data, epochs=2)
    assert_equal(all_values(resumed), all_values(model))


# The curvature of networks.


@pytest.mark.parametrize(
    ("linearization", "sizes"),
    [
        (ForwardAccumulation(), {"micro_batch_size": 4}),
        (DoubleBackward(), {"curvature_batch_size": 6, "micro_batch_size": 4}),
    ],
    ids=["forward, micro-batches", "double, chunk"],
)
def test_full_rank_is_the_damped_inverse_of_a_network_with_its_regularizers(linearization, sizes):
    model = make_model(regularizer=keras.regularizers.L2(0.25))
    compute = lambda objective: inverse_and_matrix(objective, Nystrom(27), curvature=GaussNewton(linearization))  # noqa: E731
    assert_inverts(*with_objective(model, data_of(model), compute, **sizes), 0.1)


class Concave(layers.Layer):
    """Adds a loss whose curvature is negative."""

    def call(self, x):
        self.add_loss(-3.0 * tf.reduce_mean(x**2))
        return x


@pytest.mark.parametrize(
    ("curvature", "added"), [(Hessian(DoubleBackward()), []), (GaussNewton(DoubleBackward()), [Concave])]
)
def test_negative_curvature_of_a_network_or_its_added_losses_leaves_it_positive_definite(curvature, added):
    stack = [layers.Dense(4, "tanh"), *(make() for make in added), layers.Dense(3, "sigmoid")]
    model = compiled(sequential(*stack))
    compute = lambda objective: inverse_and_matrix(objective, Nystrom(10), 0.0, curvature)  # noqa: E731
    found, matrix = with_objective(model, data_of(model, "mse on sigmoid"), compute)
    assert np.linalg.eigvalsh(matrix).min() < -1e-3
    assert_positive_definite(found)


def test_recurrent_networks_have_one():
    model = compiled(sequential(layers.SimpleRNN(3), layers.Dense(2), shape=(3, 2)))
    x = np.random.default_rng(0).normal(size=(7, 3, 2))
    data = model_data(model, x, x[:, 0])
    assert model.setup_for(data).structure.nesting_ops
    found, matrix = with_objective(model, data, lambda objective: inverse_and_matrix(objective, Nystrom(100), 1e-3))
    assert_inverts(found, matrix, 1e-3)


@pytest.mark.slow
def test_an_update_takes_fewer_iterations_to_the_same_step_and_forms_products_once():
    # A deep network on inputs of very different sizes.
    stack = [layers.Dense(units, "tanh") for units in (8, 6, 4)]
    model = compiled(sequential(*stack, layers.Dense(3), shape=(6,)))
    x = np.random.default_rng(0).normal(size=(100, 6)) * np.logspace(0, -2, 6)
    formed = []

    class Counted(GaussNewton):
        def linearize(self, micro_batch):
            formed.append(micro_batch)
            return super().linearize(micro_batch)

    def both(objective):
        results = []
        for preconditioner in (Nystrom(40), Identity()):
            solver = ConjugateGradient(preconditioner, ResidualTolerance(1e-8), 1000, warm_start_decay=0.0)
            state = update_state(objective, solver, damping=1e-6, scale=1.0)
            results.append(hf_update(objective, Counted(DoubleBackward()), solver, state))
        return results

    results = with_objective(model, model_data(model, x, np.tanh(x[:, :3])), both)
    assert len(formed) == 2  # once in each of the updates
    # 69 and 543.
    with_sketch, without = (result.logs["cg_iterations"] for result in results)
    assert 2 * with_sketch < without
    np.testing.assert_allclose(*(result.state.solver["warm_start"] for result in results), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["rank", "interval"])
def test_a_bad_argument_is_refused(name):
    for value in (0, -1, 2.5, True, "all", None):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer >= 1. Received: {name}="):
            Nystrom(**{name: value})


def test_more_directions_than_weights_are_as_many():
    state = Nystrom(60).initial_state([tf.zeros([3, 2]), tf.zeros([2])], [])
    assert state["vectors"].shape == (8, 8) and state["values"].shape == (8,)
