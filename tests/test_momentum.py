"""What preconditioned momentum promises: coefficients, the relation to conjugate gradients, rejection, and runs through `fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import dense_matrix, inputs, make_model, model_data, sequential, update_state, with_objective
from training import assert_equal, assert_same, fit, normal, renewed, trainable

from keras_hf import (
    ConjugateGradient,
    ConstantDamping,
    DoubleBackward,
    EmpiricalFisher,
    EmpiricalFisherDiagonal,
    ForwardAccumulation,
    GaussNewton,
    GrowingBatch,
    Hessian,
    HessianFree,
    Identity,
    KroneckerFactored,
    LevenbergMarquardt,
    PreconditionedMomentum,
    ResidualTolerance,
    conjugate_gradient,
)
from keras_hf.method.update import hf_update
from keras_hf.problem.objective import Change
from keras_hf.solvers.momentum import minimizer
from keras_hf.solvers.search import accept_unless_loss_rises

DAMPING = 0.02


def problem(**arguments):
    model = make_model(**arguments)
    return model, model_data(model, inputs(), np.sin(3 * np.repeat(inputs()[:, :1], 3, 1)) + 1)


def updated(objective, solver, previous=None):
    """What one update of an objective returns, the last step given."""
    state = update_state(objective, solver, DAMPING, scale=1.0)
    if previous is not None:
        state = state._replace(last_step=tf.constant(previous))
    return hf_update(objective, GaussNewton(DoubleBackward()), solver, state)


# One update.


@pytest.mark.usefixtures("float64")
def test_coefficients_are_those_of_the_dense_two_by_two_system():
    model, data = problem(regularizer=keras.regularizers.L2(0.1))
    solver = PreconditionedMomentum(KroneckerFactored(), 1.0)
    previous = 0.1 * np.random.default_rng(4).normal(size=model.count_params())

    def compute(objective):
        gradient = objective.loss_and_gradient().gradient
        precondition, _ = solver.preconditioner.inverse(objective, None, tf.constant(DAMPING, tf.float64), {})
        matrix = dense_matrix(objective.product(GaussNewton(DoubleBackward())), objective.num_weights)
        return updated(objective, solver, previous), matrix, -precondition(gradient), gradient

    result, *rest = with_objective(model, data, compute)
    matrix, direction, gradient = (tensor.numpy() for tensor in rest)
    directions = np.stack([direction, previous])
    damped = directions @ (matrix + DAMPING * np.eye(len(gradient))) @ directions.T
    expected = np.linalg.solve(damped, -directions @ gradient)
    np.testing.assert_allclose([result.logs["alpha"], result.logs["mu"]], expected, rtol=1e-8)
    assert result.step_size == 1
    step = result.step.numpy()
    np.testing.assert_allclose(step, expected @ directions, rtol=1e-7, atol=1e-12)
    # The ratio: without damping, and without another product.
    predicted = -(gradient @ step + 0.5 * step @ matrix @ step)
    np.testing.assert_allclose(result.reduction_ratio, result.actual_reduction / predicted, rtol=1e-7)
    assert result.trace["num_products"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_the_first_update_is_one_iteration_of_conjugate_gradients():
    model, data = problem()
    preconditioner = EmpiricalFisherDiagonal()
    solvers = [
        PreconditionedMomentum(preconditioner, 1.0),
        ConjugateGradient(preconditioner, max_iterations=1, warm_start_decay=0),
    ]
    one, other = with_objective(model, data, lambda objective: [updated(objective, solver) for solver in solvers])
    assert one.logs["mu"] == 0
    np.testing.assert_allclose(one.step, other.step, rtol=1e-8, atol=1e-13)
    np.testing.assert_allclose(one.reduction_ratio, other.reduction_ratio, rtol=1e-8)


def linear_problem(preconditioner):
    """A network of one layer, its cases, and its inputs with a 1 for the bias: under the squared error the loss is a quadratic."""
    optimizer = HessianFree(0.0, PreconditionedMomentum(preconditioner, 1.0), growing_batch=None, seed=0)
    model = trainable(sequential(layers.Dense(2), shape=(6,)), optimizer=optimizer)
    x = normal(40, 6, seed=5) * np.geomspace(1, 0.05, 6)
    return model, x, normal(40, 2, seed=6), np.concatenate([x, np.ones((40, 1))], 1)


@pytest.mark.usefixtures("float64")
def test_on_a_quadratic_the_updates_are_the_iterations_of_conjugate_gradients():
    model, x, y, a = linear_problem(Identity())
    residual = model(x).numpy() - y
    losses = fit(model, x, y, epochs=7, callbacks=[ConstantDamping()])["loss"]
    # The Hessian has 7 eigenvalues, each twice.
    hessian, gradient = np.kron(a.T @ a, np.eye(2)) / 40, (a.T @ residual).ravel() / 40
    product = lambda v: tf.linalg.matvec(hessian, v)  # noqa: E731
    course = conjugate_gradient(product, tf.constant(-gradient), None, None, ResidualTolerance(1e-12), 7).course
    np.testing.assert_allclose(losses, np.mean(residual**2) + course[:7], rtol=1e-8)


@pytest.mark.usefixtures("float64")
def test_a_quadratic_of_kronecker_structure_takes_one_update():
    model, x, y, a = linear_problem(KroneckerFactored(None))
    fit(model, x, y, callbacks=[ConstantDamping()])
    best = a @ np.linalg.lstsq(a, y, rcond=None)[0]
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), np.mean((best - y) ** 2), rtol=1e-10)


@pytest.mark.usefixtures("float64")
def test_forms_are_those_of_the_dense_matrix_on_a_chunk_in_micro_batches():
    model, data = problem(regularizer=keras.regularizers.L2(0.1))
    vectors = np.random.default_rng(6).normal(size=(3, model.count_params()))
    of_one_matrix = [
        [GaussNewton(DoubleBackward()), GaussNewton(ForwardAccumulation())],
        [Hessian(DoubleBackward())],
        [EmpiricalFisher(DoubleBackward())],
    ]

    def compute(objective):
        def forms_and_matrix(curvatures):
            products = [objective.product(curvature) for curvature in curvatures]
            forms = [product.forms(tf.unstack(tf.constant(vectors))) for product in products]
            return forms, dense_matrix(products[0], objective.num_weights)

        return [forms_and_matrix(curvatures) for curvatures in of_one_matrix]

    found = with_objective(model, data, compute, curvature_batch_size=9, micro_batch_size=4)
    for curvatures, (forms, matrix) in zip(of_one_matrix, found, strict=True):
        expected = vectors @ matrix.numpy() @ vectors.T
        for curvature, of_curvature in zip(curvatures, forms, strict=True):
            np.testing.assert_allclose(of_curvature, expected, rtol=1e-9, atol=1e-12, err_msg=repr(curvature))


@pytest.mark.parametrize(
    ("matrix", "slopes", "expected", "is_negative"),
    [
        ([[15.0, -7.5], [-7.5, 3.75]], [-2.0, 1.0], 2 / 15, False),
        ([[-2.0, 0.0], [0.0, 1.0]], [-4.0, 1.0], 2.0, True),
        ([[2.0, 0.0], [0.0, -1.0]], [-4.0, 1.0], 2.0, True),
        ([[-2.0, 3.0], [3.0, -1.0]], [-4.0, 1.0], 2.0, True),
        ([[0.0, 0.0], [0.0, 0.0]], [-4.0, 0.0], 0.0, False),
    ],
    ids=["parallel directions", "the first negative", "the second negative", "both negative", "no curvature"],
)
def test_where_two_directions_have_no_one_minimum_the_first_descends_alone(matrix, slopes, expected, is_negative):
    coefficients, found = minimizer(tf.constant(matrix, tf.float64), tf.constant(slopes, tf.float64), 1e-12)
    np.testing.assert_allclose(coefficients, [expected, 0.0])
    assert found == is_negative


# Acceptance.


def taken(before, after, standard_error, loss=5.0, after_of_all=None):
    """What becomes of a step that changes the loss of the chunk; with a last argument the cases are few, and it is their loss after the step."""
    change = Change(*(tf.constant(value, tf.float64) for value in (before, after, standard_error)))
    of_all = tf.constant(after_of_all or np.nan, tf.float64)
    arguments = lambda step: change, tf.constant(after_of_all is not None), lambda step: of_all
    return accept_unless_loss_rises(*arguments, tf.ones([1, 2]), tf.constant(loss, tf.float64), None)


@pytest.mark.parametrize(
    ("after", "accepted"), [(0.9, True), (1.1, True), (1.3, False), (np.nan, False), (np.inf, False), (-np.inf, False)]
)
def test_a_rise_beyond_two_standard_errors_is_rejected(after, accepted):
    found = taken(1.0, after, 0.1)
    assert found.step_size == float(accepted)
    assert found.loss == (after if accepted else 1.0)
    assert found.start_loss == 1.0


@pytest.mark.parametrize(("before", "loss", "most"), [(1.0, 5.0, 5.0), (1.0, 0.2, 1.0), (-1.0, -3.0, 3.0)])
def test_a_rise_beyond_the_loss_itself_is_rejected_however_noisy(before, loss, most):
    assert taken(before, before + 0.99 * most, 100.0, loss).step_size == 1
    assert taken(before, before + 1.01 * most, 100.0, loss).step_size == 0


def test_few_cases_are_all_looked_at_and_their_loss_does_not_rise():
    for after, accepted in ((4.9, True), (5.0, True), (5.01, False), (np.inf, False)):
        found = taken(1.0, 0.5, 100.0, 5.0, after)
        assert found.step_size == float(accepted)
        assert (found.start_loss, found.candidate_loss) == (5, after)


@pytest.mark.usefixtures("float64")
def test_a_change_and_its_standard_error_are_those_of_the_cases_one_by_one():
    model, data = problem(regularizer=keras.regularizers.L2(0.1))
    step = 0.3 * np.random.default_rng(7).normal(size=model.count_params())

    def compute(objective):
        change = objective.chunk_change_at(tf.constant(step))
        return change, objective._parts.micro_batches.chunk_indices(), objective.candidate(tf.constant(step))

    change, chunk, moved = with_objective(model, data, compute, curvature_batch_size=9, micro_batch_size=4)
    losses, of_cases = [], []
    for weights in (model.get_weights(), moved):
        model.set_weights(weights)
        of_cases.append(np.mean((model.predict(data.x.numpy(), verbose=0) - data.y.numpy()) ** 2, 1)[chunk.numpy()])
        losses.append(np.mean(of_cases[-1]) + float(sum(model.losses)))
    np.testing.assert_allclose([change.loss_before, change.loss_after], losses, rtol=1e-9)
    differences = of_cases[1] - of_cases[0]
    # Of a mean of cases that are drawn without replacement.
    rest = 1 - len(differences) / len(data.x)
    np.testing.assert_allclose(change.standard_error, differences.std() * (rest / len(differences)) ** 0.5, rtol=1e-9)


class _TooFar(PreconditionedMomentum):
    def solve(self, model, damping, state):
        path = super().solve(model, damping, state)
        return path._replace(candidates=-30 * path.candidates)


@pytest.mark.usefixtures("float64")
def test_a_rejected_step_leaves_the_weights_and_the_next_begins_without_it():
    model, data = problem()
    # Uphill along the previous step, and too far: the quadratic does not know that the loss is not one.
    solver, previous = _TooFar(Identity(), 1.0), np.ones(model.count_params())
    before = model.get_weights()
    result = with_objective(model, data, lambda objective: updated(objective, solver, previous))
    assert result.step_size == 0 and not np.any(result.step)
    assert result.reduction_ratio == -np.inf
    assert not np.any(result.state.last_step)
    assert_equal(before, model.get_weights())


# Runs.


def regression(num_cases=600):
    x = normal(num_cases, 4, dtype="float32")
    return x, np.sin(x[:, :1] * x[:, 1:2])


PART = GrowingBatch(100)


def momentum_model(solver=None, growing_batch=PART, **arguments):
    keras.utils.set_random_seed(0)
    network = sequential(layers.Dense(16, "tanh"), layers.Dense(16, "tanh"), layers.Dense(1), shape=(4,))
    solver = solver or PreconditionedMomentum()
    optimizer = HessianFree(solver=solver, growing_batch=growing_batch, seed=0, **arguments)
    return trainable(network, optimizer=optimizer)


def test_it_trains_through_fit_and_the_batch_grows():
    x, y = regression()
    model = renewed(momentum_model)
    history = fit(model, x, y, epochs=60)
    assert model.evaluate(x, y, verbose=0) < 0.1 * np.var(y)
    assert history["num_cases"][0] == 100 < history["num_cases"][-1]
    assert np.all(np.isfinite(history["alpha"])) and history["mu"][0] == 0


def test_on_few_cases_the_loss_never_rises_and_the_ratio_is_that_of_all_of_them():
    x = normal(300, 2, dtype="float32")
    y = ((x**2).sum(1) > 1.4) ^ (np.arange(300) % 7 == 0)
    network = sequential(layers.Dense(10, "tanh"), layers.Dense(2, "softmax"), shape=(2,))
    optimizer = HessianFree(1e-6, PreconditionedMomentum(), growing_batch=None, seed=0)
    model = trainable(network, loss="sparse_categorical_crossentropy", optimizer=optimizer)
    history = fit(model, x, y, epochs=60)
    loss, rejected = np.array(history["loss"]), np.array(history["step_size"]) == 0
    assert np.all(loss[1:] <= loss[:-1] * (1 + 1e-6)) and 0 < rejected.sum() < 40
    np.testing.assert_array_equal(rejected, np.isneginf(history["reduction_ratio"]))


@pytest.mark.parametrize(("growing_batch", "share"), [(PART, 0.002), (None, 0.02)])
def test_where_it_starts_small_the_first_damping_of_a_part_is_a_500th_of_the_curvature(growing_batch, share):
    model = momentum_model(PreconditionedMomentum(Identity(), starts_small=True), growing_batch)
    history = fit(model, *regression(), epochs=1)
    assert history["damping"][0] == pytest.approx(share * float(model.optimizer.curvature_scale), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("damping", "epochs"), [(0.0, 60), (1e8, 300)])
def test_a_damping_that_is_far_off_is_left_behind(damping, epochs):
    x, y = regression()
    model = renewed(momentum_model)
    model.optimizer.damping.assign(damping)
    fit(model, x, y, epochs=epochs)
    assert model.evaluate(x, y, verbose=0) < 0.3 * np.var(y)


def test_bad_cases_reject_the_step_and_leave_the_state():
    x, y = regression(64)
    broken = y.copy()
    broken[5] = np.nan
    model = renewed(momentum_model)
    before = model.get_weights()
    with pytest.warns(UserWarning, match="1 of the cases of the batch"):
        assert fit(model, x, broken, epochs=2)["step_size"] == [0, 0]
    assert_equal(before, model.get_weights())
    factors = [variable for variable in model.optimizer.variables if "preconditioner" in variable.path]
    assert factors and all(np.isfinite(variable).all() for variable in factors)
    assert fit(model, x, y)["step_size"][0] > 0


@pytest.mark.slow
def test_a_stream_of_minibatches_is_followed():
    x, y = regression()
    stream = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(600, seed=0).batch(100).repeat()
    model = momentum_model(growing_batch=None)
    fit(model, stream, epochs=10, steps_per_epoch=12)
    assert model.evaluate(x, y, verbose=0) < 0.1 * np.var(y)


@pytest.mark.slow
def test_the_average_of_the_weights_is_that_of_keras_of_a_momentum_that_grows_and_swaps_in_for_evaluation():
    x, y = regression()
    model = momentum_model(PreconditionedMomentum(Identity()), growing_batch=None, use_ema=True, ema_momentum=0.25)
    seen = []
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(model.get_weights()))
    fit(model, x, y, epochs=4, callbacks=[LevenbergMarquardt(), keep, keras.callbacks.SwapEMAWeights()])
    average = seen[0]
    for momentum, weights in zip((2 / 11, 3 / 12, 0.25), seen[1:], strict=True):
        average = [momentum * old + (1 - momentum) * new for old, new in zip(average, weights, strict=True)]
    # Keras leaves the average as the weights at the end of training.
    assert_same(average, model.get_weights(), rtol=1e-5, atol=1e-6)
    assert HessianFree.from_config(model.optimizer.get_config()).use_ema


# Settings.


@pytest.mark.parametrize("share", [0, -0.5, 1.5, np.nan, "half", True, None])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"`share` must be a number in \(0, 1\]. Received: share="):
        PreconditionedMomentum(share=share)


def test_a_preconditioner_that_is_none_is_refused():
    with pytest.raises(TypeError, match="`preconditioner` must be a `Preconditioner` object"):
        PreconditionedMomentum("kronecker")


def test_the_share_is_the_chunk_of_64_cases_at_least():
    model = momentum_model(PreconditionedMomentum(Identity(), 0.3), growing_batch=None)
    for num_cases, expected in ((600, 180), (100, 64), (50, 50)):
        data = model_data(model, *regression(num_cases))
        totals = with_objective(model, data, lambda objective: objective.totals)
        assert (totals.chunk_cases, totals.num_cases) == (expected, num_cases)
