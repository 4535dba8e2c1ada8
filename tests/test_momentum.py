"""What preconditioned momentum promises: coefficients, the relation to conjugate gradients, rejection, and runs through `fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import (
    compiled,
    dense_matrix,
    inputs,
    make_model,
    model_data,
    update_state,
    with_objective,
)

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
    HFModel,
    Identity,
    KroneckerFactored,
    LevenbergMarquardt,
    PreconditionedMomentum,
)
from keras_hf.problem.objective import Change
from keras_hf.solvers.momentum import minimizer
from keras_hf.solvers.search import take_unless_it_rises
from keras_hf.update import hf_update

DAMPING = 0.02


def problem(**arguments):
    model = make_model(**arguments)
    return model, model_data(model, inputs(), np.sin(3 * np.repeat(inputs()[:, :1], 3, 1)) + 1)


def update(model, data, solver, previous=None, damping=DAMPING, curvature=None, **arguments):
    """One update, and the dense matrix, inverse preconditioner and gradient that it is about."""
    curvature = curvature or GaussNewton(DoubleBackward())

    def compute(objective):
        state = update_state(objective, solver, damping, scale=1.0)
        if previous is not None:
            state = state._replace(solver={**state.solver, "previous": tf.constant(previous)})
        result = hf_update(objective, curvature, solver, state)
        n, gradient = objective.num_weights, objective.loss_and_gradient().gradient
        precondition, _ = solver.preconditioner.inverse(objective, None, state.damping, {})
        return result, dense_matrix(objective.product(curvature), n), dense_matrix(precondition, n), gradient

    result, *rest = with_objective(model, data, compute, **arguments)
    return result, *[tensor.numpy() for tensor in rest]


# One update.


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("regularizer", [pytest.param(None, marks=pytest.mark.slow), keras.regularizers.L2(0.1)])
@pytest.mark.parametrize("preconditioner", [Identity(), EmpiricalFisherDiagonal(), KroneckerFactored()])
def test_coefficients_are_those_of_the_dense_two_by_two_system(preconditioner, regularizer):
    model, data = problem(regularizer=regularizer)
    previous = 0.1 * np.random.default_rng(4).normal(size=model.count_params())
    result, matrix, inverse, gradient = update(model, data, PreconditionedMomentum(preconditioner, 1.0), previous)
    directions = np.stack([-inverse @ gradient, previous])
    damped = directions @ (matrix + DAMPING * np.eye(len(gradient))) @ directions.T
    expected = np.linalg.solve(damped, -directions @ gradient)
    found = [result.logs["alpha"], result.logs["mu"]]
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    assert result.step_size == 1
    step = result.step.numpy()
    np.testing.assert_allclose(step, expected @ directions, rtol=1e-7, atol=1e-12)
    # The ratio: without damping, and without another product.
    predicted = -(gradient @ step + 0.5 * step @ matrix @ step)
    np.testing.assert_allclose(result.reduction_ratio, result.actual_reduction / predicted, rtol=1e-7)
    assert result.trace["num_products"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("preconditioner", [EmpiricalFisherDiagonal(), KroneckerFactored()])
def test_the_first_update_is_one_iteration_of_conjugate_gradients(preconditioner):
    model, data = problem()
    solvers = [
        PreconditionedMomentum(preconditioner, 1.0),
        ConjugateGradient(preconditioner, max_iterations=1, warm_start_decay=0),
    ]
    one, other = (
        with_objective(
            model,
            data,
            lambda o, s=solver: hf_update(o, GaussNewton(DoubleBackward()), s, update_state(o, s, DAMPING, scale=1.0)),
        )
        for solver in solvers
    )
    assert one.logs["mu"] == 0
    np.testing.assert_allclose(one.step, other.step, rtol=1e-8, atol=1e-13)
    np.testing.assert_allclose(one.reduction_ratio, other.reduction_ratio, rtol=1e-8)


def linear_model(solver, damping=0.0):
    """A network of one layer and its optimizer: under the squared error the loss is a quadratic."""
    optimizer = HessianFree(damping, solver, growing_batch=None, seed=0)
    return compiled(keras.Sequential([keras.Input((6,)), layers.Dense(2)]), optimizer=optimizer)


def linear_cases():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(40, 6)) * np.geomspace(1, 0.05, 6)
    return x, rng.normal(size=(40, 2))


@pytest.mark.usefixtures("float64")
def test_on_a_quadratic_the_updates_are_the_iterations_of_conjugate_gradients():
    x, y = linear_cases()
    model = linear_model(PreconditionedMomentum(Identity(), 1.0))
    before = np.concatenate([weight.ravel() for weight in model.get_weights() or _built(model, x)])
    losses = model.fit(x, y, epochs=9, callbacks=[ConstantDamping()], verbose=0).history["loss"]
    # By hand, on the normal equations of both outputs.
    a = np.concatenate([x, np.ones((40, 1))], 1)
    hessian = np.kron(a.T @ a, np.eye(2)) / 40
    w = np.concatenate([before])
    gradient = lambda w: ((a @ w.reshape(7, 2) - y).T @ a).T.ravel() / 40  # noqa: E731
    direction, expected = None, []
    for _ in range(9):
        expected.append(np.mean((a @ w.reshape(7, 2) - y) ** 2))
        g = gradient(w)
        direction = (
            -g if direction is None else -g + (g @ hessian @ direction) / (direction @ hessian @ direction) * direction
        )
        w = w - (g @ direction) / (direction @ hessian @ direction) * direction
    np.testing.assert_allclose(losses, expected, rtol=1e-8)


def _built(model, x):
    model_data(model, x, None)
    return model.get_weights()


@pytest.mark.usefixtures("float64")
def test_a_quadratic_of_kronecker_structure_takes_one_update():
    x, y = linear_cases()
    model = linear_model(PreconditionedMomentum(KroneckerFactored(None), 1.0))
    model.fit(x, y, epochs=1, callbacks=[ConstantDamping()], verbose=0)
    a = np.concatenate([x, np.ones((40, 1))], 1)
    best = a @ np.linalg.lstsq(a, y, rcond=None)[0]
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), np.mean((best - y) ** 2), rtol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "curvature",
    [
        GaussNewton(DoubleBackward()),
        GaussNewton(ForwardAccumulation()),
        GaussNewton(DoubleBackward(jit_compile=True)),
        Hessian(DoubleBackward()),
        EmpiricalFisher(DoubleBackward()),
    ],
    ids=lambda c: f"{type(c).__name__}-{type(c.linearization).__name__}",
)
@pytest.mark.parametrize("sizes", [pytest.param((None, None), marks=pytest.mark.slow), (9, 4)])
def test_forms_are_those_of_the_dense_matrix(curvature, sizes):
    model, data = problem(regularizer=keras.regularizers.L2(0.1))
    vectors = np.random.default_rng(6).normal(size=(3, model.count_params()))

    def compute(objective):
        product = objective.product(curvature)
        return product.forms(tf.unstack(tf.constant(vectors))), dense_matrix(product, objective.num_weights)

    forms, matrix = with_objective(model, data, compute, *sizes)
    np.testing.assert_allclose(forms, vectors @ matrix.numpy() @ vectors.T, rtol=1e-9, atol=1e-12)


# The minimiser of two coefficients.


def test_parallel_directions_use_the_first_alone():
    direction = np.array([1.0, 2.0, -1.0])
    matrix = np.diag([1.0, 3.0, 2.0])
    pair = np.stack([direction, -0.5 * direction])
    coefficients, is_negative = minimizer(
        tf.constant(pair @ matrix @ pair.T), tf.constant(pair @ [-1.0, 0.5, 2.0]), 1e-12
    )
    expected = -(direction @ [-1.0, 0.5, 2.0]) / (direction @ matrix @ direction)
    np.testing.assert_allclose(coefficients, [expected, 0.0])
    assert not is_negative


@pytest.mark.parametrize("matrix", [[[-2.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, -1.0]], [[-2.0, 3.0], [3.0, -1.0]]])
def test_negative_curvature_leaves_a_step_that_descends(matrix):
    coefficients, is_negative = minimizer(tf.constant(matrix), tf.constant([-4.0, 1.0]), 1e-12)
    np.testing.assert_allclose(coefficients, [2.0, 0.0])
    assert is_negative


def test_without_curvature_there_is_no_step():
    coefficients, is_negative = minimizer(tf.zeros([2, 2]), tf.constant([-4.0, 0.0]), 1e-12)
    np.testing.assert_array_equal(coefficients, [0.0, 0.0])
    assert not is_negative


# Acceptance.


@pytest.mark.parametrize(
    ("after", "accepted"), [(0.9, True), (1.1, True), (1.3, False), (np.nan, False), (np.inf, False), (-np.inf, False)]
)
def test_a_rise_beyond_two_standard_errors_is_rejected(after, accepted):
    numbers = [tf.constant(value, tf.float64) for value in (1.0, after, 0.1)]
    taken = take_unless_it_rises(
        lambda step: Change(*numbers), None, tf.ones([1, 2]), tf.constant(5.0, tf.float64), None
    )
    assert taken.step_size == float(accepted)
    assert taken.loss == (after if accepted else 1.0)
    assert taken.start_loss == 1.0


@pytest.mark.parametrize(("before", "loss", "most"), [(1.0, 5.0, 5.0), (1.0, 0.2, 1.0), (-1.0, -3.0, 3.0)])
def test_a_rise_beyond_the_loss_itself_is_rejected_however_noisy(before, loss, most):
    for rise, accepted in ((0.99 * most, True), (1.01 * most, False)):
        numbers = [tf.constant(value, tf.float64) for value in (before, before + rise, 100.0)]
        taken = take_unless_it_rises(
            lambda step, numbers=numbers: Change(*numbers), None, tf.ones([1, 2]), tf.constant(loss, tf.float64), None
        )
        assert taken.step_size == float(accepted)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sizes", [(None, None), (9, 4)])
def test_a_change_and_its_standard_error_are_those_of_the_cases_one_by_one(sizes):
    model, data = problem(regularizer=keras.regularizers.L2(0.1))
    step = 0.3 * np.random.default_rng(7).normal(size=model.count_params())

    def compute(objective):
        change = objective.chunk_change_at(tf.constant(step))
        return change, objective._parts.pieces.chunk_indices(), objective.candidate(tf.constant(step))

    change, chunk, moved = with_objective(model, data, compute, *sizes)
    losses, of_cases = [], []
    for weights in (model.get_weights(), moved):
        model.set_weights(weights)
        of_cases.append(np.mean((model.predict(data.x.numpy(), verbose=0) - data.y.numpy()) ** 2, 1)[chunk.numpy()])
        losses.append(np.mean(of_cases[-1]) + float(sum(model.losses)))
    np.testing.assert_allclose([change.loss_before, change.loss_after], losses, rtol=1e-9)
    differences = of_cases[1] - of_cases[0]
    np.testing.assert_allclose(change.standard_error, differences.std() / len(differences) ** 0.5, rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_a_rejected_step_leaves_the_weights_and_the_next_begins_without_it():
    model, data = problem()
    # Uphill along the previous step, and too far: the quadratic does not know that the loss is not one.
    solver = _TooFar(Identity(), 1.0)
    before = model.get_weights()
    result, *_ = update(model, data, solver, previous=np.ones(model.count_params()))
    assert result.step_size == 0 and not np.any(result.step)
    assert result.reduction_ratio == -np.inf
    assert not np.any(result.state.solver["previous"])
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


class _TooFar(PreconditionedMomentum):
    def solve(self, model, damping, state):
        path = super().solve(model, damping, state)
        return path._replace(candidates=-30 * path.candidates)


# Runs.


def regression(num_cases=600, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_cases, 4)).astype("float32")
    return x, np.sin(x[:, :1] * x[:, 1:2])


def network(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((4,)), layers.Dense(16, "tanh"), layers.Dense(16, "tanh"), layers.Dense(1)])


PART = GrowingBatch(100)


def momentum_model(solver=None, growing_batch=PART, **arguments):
    model = HFModel(network())
    optimizer = HessianFree(solver=solver or PreconditionedMomentum(), growing_batch=growing_batch, seed=0, **arguments)
    model.compile(optimizer, loss="mse")
    return model


def test_it_trains_through_fit_and_the_batch_grows():
    x, y = regression()
    model = momentum_model()
    history = model.fit(x, y, epochs=60, callbacks=[LevenbergMarquardt()], verbose=0).history
    assert model.evaluate(x, y, verbose=0) < 0.1 * np.var(y)
    assert history["num_cases"][0] == 100 < history["num_cases"][-1]
    assert np.all(np.isfinite(history["alpha"])) and history["mu"][0] == 0


@pytest.mark.slow
def test_a_stream_of_minibatches_is_followed():
    x, y = regression()
    stream = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(600, seed=0).batch(100).repeat()
    model = momentum_model(growing_batch=None)
    model.fit(stream, epochs=10, steps_per_epoch=12, callbacks=[LevenbergMarquardt()], verbose=0)
    assert model.evaluate(x, y, verbose=0) < 0.1 * np.var(y)


@pytest.mark.slow
def test_the_average_of_the_weights_is_that_of_keras_and_swaps_in_for_evaluation():
    x, y = regression()
    model = momentum_model(use_ema=True, ema_momentum=0.8)
    seen = []
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(model.get_weights()))
    swap = keras.callbacks.SwapEMAWeights()
    model.fit(x, y, epochs=4, callbacks=[LevenbergMarquardt(), keep, swap], verbose=0)
    average = seen[0]
    for weights in seen[1:]:
        average = [0.8 * old + 0.2 * new for old, new in zip(average, weights, strict=True)]
    # Keras leaves the average as the weights at the end of training.
    for one, other in zip(average, model.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert HessianFree.from_config(model.optimizer.get_config()).use_ema


@pytest.mark.slow
def test_two_replicas_give_the_weights_of_one_device(float64):
    x, y = regression(128)
    devices = tf.config.list_logical_devices("CPU")
    weights = []
    for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy([d.name for d in devices[:2]])):
        with strategy.scope():
            model = momentum_model(PreconditionedMomentum(Identity(), 1.0), growing_batch=None, damping=0.1)
        model.fit(x, y, batch_size=64, epochs=3, shuffle=False, callbacks=[LevenbergMarquardt()], verbose=0)
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_bad_cases_reject_the_step_and_leave_the_state():
    x, y = regression(64)
    y[5] = np.nan
    model = momentum_model(growing_batch=None, damping=0.1)
    before = [weight.copy() for weight in model.get_weights()]
    with pytest.warns(UserWarning, match="1 of the 64 cases"):
        model.fit(x, y, epochs=2, callbacks=[LevenbergMarquardt()], verbose=0)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    for variable in tf.nest.flatten([v.value for v in model.optimizer.variables if "preconditioner" in v.path]):
        assert np.all(np.isfinite(variable))


@pytest.mark.slow
@pytest.mark.parametrize("damping", [0.0, 1e8])
def test_a_damping_that_is_far_off_is_left_behind(damping):
    x, y = regression()
    model = momentum_model(damping=damping)
    model.fit(x, y, epochs=300, callbacks=[LevenbergMarquardt()], verbose=0)
    assert model.evaluate(x, y, verbose=0) < 0.3 * np.var(y)


# Settings.


@pytest.mark.parametrize("share", [0, -0.5, 1.5, np.nan, "half", True, None])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"`share` must be a number in \(0, 1\]. Received: share="):
        PreconditionedMomentum(share=share)


def test_a_preconditioner_that_is_none_is_refused():
    with pytest.raises(TypeError, match="`preconditioner` must be a `Preconditioner` object"):
        PreconditionedMomentum("kronecker")


@pytest.mark.parametrize(("num_cases", "expected"), [(600, 180), (100, 64), (50, 50)])
def test_the_share_is_the_chunk_of_64_cases_at_least(num_cases, expected):
    x, y = regression(num_cases)
    model = momentum_model(PreconditionedMomentum(Identity(), 0.3), growing_batch=None)
    data = model_data(model, x, y)
    sizes = with_objective(model, data, lambda objective: (objective.totals.chunk_cases, objective.totals.num_cases))
    assert [float(size) for size in sizes] == [expected, num_cases]
