"""What the exact solver promises: the step, the arc and the choice of the formulas; runs that end well; and errors where it would be wrong."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import (
    compiled,
    dense_matrix,
    derivative_along,
    inputs,
    jacobian,
    loss_and_gradient,
    make_model,
    model_data,
    update_state,
    with_objective,
)

from examples.precision import precision
from keras_hf import (
    ConjugateGradient,
    DirectSolver,
    DoubleBackward,
    GaussNewton,
    GrowingBatch,
    Hessian,
    HessianFree,
    HFModel,
    LevenbergMarquardt,
)
from keras_hf.problem import jacobian as jacobian_room
from keras_hf.problem.fixed_network import Data
from keras_hf.solvers.direct import next_terms
from keras_hf.update import hf_update

DAMPING = 0.02
ARC = 2.0 ** -np.arange(0, 10.5, 0.5)


def update(model, data, solver):
    """One update, as arrays."""
    return with_objective(
        model,
        data,
        lambda objective: hf_update(
            objective, GaussNewton(), solver, update_state(objective, solver, DAMPING, scale=1.0)
        ),
    )


def gauss_newton(model, data):
    """The matrix of the products of an update."""
    product = lambda objective: objective.product(GaussNewton(DoubleBackward()))  # noqa: E731
    return with_objective(
        model, data, lambda objective: dense_matrix(product(objective), objective.num_weights)
    ).numpy()


# One update.


def least_squares(num_cases, **arguments):
    model = make_model(**arguments)
    y = np.sin(3 * np.repeat(inputs()[:, :1], 3, 1)) + 1
    return model, model_data(model, inputs()[:num_cases], y[:num_cases])


def by_hand(model, data, order):
    """The terms of the arc and the candidates of the 2-4-3 network under the mean squared error, in NumPy, and the loss at each."""
    x, y = data.x.numpy(), data.y.numpy()
    scale = np.sqrt(2 / y.size)
    outputs = model(x).numpy()
    b = scale * jacobian(lambda: model(x), [variable.value for variable in model.trainable_variables]).reshape(
        y.size, -1
    )
    solve = lambda u: -np.linalg.solve(b.T @ b + DAMPING * np.eye(27), b.T @ u.ravel())  # noqa: E731
    curve = [solve(scale * (outputs - y))]
    while len(curve) < order:
        curve.append(solve(scale * derivative_along(model, x, curve)))
    candidates = sum(ARC[:, None] ** power / math.factorial(power) * term for power, term in enumerate(curve, 1))
    losses, start = [], model.get_weights()
    for candidate in candidates:
        ends = np.split(candidate, np.cumsum([weight.size for weight in start])[:-1])
        model.set_weights([w + part.reshape(w.shape) for w, part in zip(start, ends, strict=True)])
        losses.append(np.mean((model(x).numpy() - y) ** 2))
    model.set_weights(start)
    return curve, candidates, np.array(losses)


@pytest.mark.parametrize(
    "num_cases, order",
    [(15, 4), (5, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((15, 1), (15, 2), (5, 2), (15, 3)))],
)
def test_an_update_is_the_one_by_hand(num_cases, order, float64):
    # Of 27 weights 45 rows are more, and 15 are fewer.
    model, data = least_squares(num_cases)
    result, (_, gradient) = update(model, data, DirectSolver(order)), loss_and_gradient(model, data)
    (v, *others), candidates, losses = by_hand(model, data, order)
    # Derivatives after the second are differences.
    error = 1e-9 if order < 3 else 1e-6
    known = np.isfinite(result.trace["losses"])
    assert known.sum() in (12, 13) and known[::2].all()
    np.testing.assert_allclose(result.trace["losses"][known], losses[known], rtol=error if order > 2 else 1e-11)
    best = np.argmin(losses)
    np.testing.assert_allclose(result.step, candidates[best], rtol=error, atol=1e-3 * error)
    assert result.step_size == 1 and result.logs["arc_step"] == ARC[best]
    assert float(result.logs["acceleration"]) == pytest.approx(
        np.linalg.norm(others[0]) / np.linalg.norm(v) if others else 0, rel=1e-9
    )
    assert float(result.actual_reduction) == pytest.approx(float(result.loss) - losses[best], rel=error)
    # What the quadratic model predicts for the straight step that stands for the candidate.
    straight = ARC[best] * v
    b_squares = np.sum((2 / data.y.numpy().size) * jacobian_times(model, data, straight) ** 2)
    predicted = -(gradient @ straight + b_squares / 2)
    assert float(result.reduction_ratio) == pytest.approx(result.actual_reduction.numpy() / predicted, rel=error)


def test_derivatives_along_the_arc_equal_those_by_hand(float64):
    model, data = least_squares(15)
    curve = np.random.default_rng(1).normal(size=(3, 27))

    def derivatives(objective):
        rows, found, terms = objective.rows, [], iter([tf.constant(term) for term in curve[1:]])

        def term_of(derivative):
            found.append(rows.combined([1.0], [derivative]))
            return next(terms, tf.zeros([27], tf.float64))

        next_terms(rows, term_of, tf.constant(curve[0]), 4)
        return found

    found = with_objective(model, data, derivatives)
    for order, derivative in enumerate(found, 2):
        expected = np.sqrt(2 / 45) * derivative_along(model, inputs(), list(curve[: order - 1])).ravel()
        # The error of differences is that of the square of the step, and rounding over its square.
        error = 1e-12 if order == 2 else 1e-6
        np.testing.assert_allclose(derivative, expected, rtol=0, atol=error * np.abs(expected).max())


def jacobian_times(model, data, v):
    variables = [variable.value for variable in model.trainable_variables]
    return jacobian(lambda: model(data.x), variables) @ v


def l2_and_poisson():
    """Of the loss per case `p - y log p` the slope is not in the range of the second derivative where y is 0."""
    network = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(4, "tanh", kernel_regularizer=keras.regularizers.L2(0.1)),
            layers.Dense(3, "softplus"),
        ]
    )
    return compiled(network, "poisson")


@keras.saving.register_keras_serializable("tests")
class ColumnSums(keras.regularizers.Regularizer):
    """A convex regularizer whose second derivative is not diagonal."""

    def __call__(self, x):
        return 0.1 * keras.ops.sum(keras.ops.square(keras.ops.sum(x, 0)))


def column_sums():
    stack = [layers.Dense(4, "tanh", kernel_regularizer=ColumnSums()), layers.Dense(3)]
    return compiled(keras.Sequential([keras.Input((2,)), *stack]))


@pytest.mark.parametrize(
    "make, num_cases",
    [
        pytest.param(column_sums, 5, id="any"),
        pytest.param(l2_and_poisson, 15, id="L2", marks=pytest.mark.slow),
        pytest.param(l2_and_poisson, 5, id="L2, dual"),
    ],
)
def test_the_step_solves_the_damped_system_of_regularizers_and_losses_with_a_rest(make, num_cases, float64):
    model = make()
    y = np.eye(3)[np.arange(15) % 3]
    data = model_data(model, inputs()[:num_cases], y[:num_cases])
    result, (_, gradient) = update(model, data, DirectSolver(order=1)), loss_and_gradient(model, data)
    expected = -np.linalg.solve(gauss_newton(model, data) + DAMPING * np.eye(27), gradient)
    assert result.step_size == 1
    np.testing.assert_allclose(result.step / result.logs["arc_step"], expected, rtol=1e-8, atol=1e-10)


def test_a_loss_without_curvature_gives_steps_along_the_gradient(float64):
    with pytest.warns(UserWarning, match="no curvature"):
        model = make_model(loss="mae")
    data = model_data(model, inputs(), np.full((15, 3), 10.0))
    result, (_, gradient) = update(model, data, DirectSolver()), loss_and_gradient(model, data)
    assert not gauss_newton(model, data).any()
    np.testing.assert_allclose(result.step, -gradient * result.logs["arc_step"] / DAMPING, rtol=1e-12)


@pytest.mark.slow
def test_a_jacobian_that_is_not_kept_gives_the_same_step(float64, monkeypatch):
    model, data = least_squares(5)
    kept = update(model, data, DirectSolver())
    monkeypatch.setattr(jacobian_room, "_KEPT_FLOATS", 0)
    formed_anew = update(model, data, DirectSolver())
    # Rounding is divided by the square of the step of the differences, 1.5e-8.
    np.testing.assert_allclose(formed_anew.step, kept.step, rtol=0, atol=1e-8)


# Runs, all of them by one compiled function.

X = np.random.default_rng(0).uniform(-1, 1, size=(40, 2))
Y = np.sin(3 * X[:, :1]) * X[:, 1:]


def small(loss="mse", units=6, **layer_arguments):
    keras.utils.set_random_seed(1)
    network = keras.Sequential([keras.Input((2,)), layers.Dense(units, "tanh", **layer_arguments), layers.Dense(1)])
    model = HFModel(network)
    model.compile(HessianFree(solver=DirectSolver(), seed=0), loss)
    return model


@pytest.fixture(scope="module")
def run():
    """Callable that trains one model from its start, and returns history and weights."""
    with precision("float64"):
        model = small()
        start = model.get_weights()
        state = tf.nest.map_structure(lambda variable: variable.numpy(), model.optimizer.state())

        def train(y=Y, epochs=5, damping=None, scale=1.0, weights=start, x=X):
            model.set_weights(weights)
            model.optimizer.assign_state(state)
            model.optimizer.damping.assign(np.nan if damping is None else damping)
            arguments = {"sample_weight": np.full(40, scale), "callbacks": [LevenbergMarquardt()], "verbose": 0}
            history = model.fit(x, y, epochs=epochs, shuffle=False, **arguments).history
            return history, model.get_weights(), model

    return train


def test_exact_steps_fit_a_small_regression(run, float64):
    history, _, _ = run(epochs=60)
    # 25 weights, 40 cases: Adam needs thousands of updates for 1e-4.
    assert history["loss"][-1] < 1e-4
    assert all(b <= a for a, b in zip(history["loss"], history["loss"][1:], strict=False))


@pytest.mark.parametrize("factor", [2.0**20, 2.0**-20])
def test_a_factor_of_the_loss_does_not_change_the_run(factor, run, float64):
    one, weights, _ = run(epochs=20)
    other, scaled_weights, _ = run(epochs=20, scale=factor)
    # A power of 2 changes no digit.
    np.testing.assert_allclose(other["loss"], np.multiply(one["loss"], factor), rtol=1e-9)
    assert other["arc_step"] == one["arc_step"]
    for a, b in zip(weights, scaled_weights, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-9)


def test_the_first_damping_matters_little(run, float64):
    losses = [run(epochs=60, damping=damping)[0]["loss"][-1] for damping in (1e-3, 1e3)]
    assert max(losses) < 1e-4


def test_a_zero_gradient_leaves_every_weight_as_it_was(run, float64):
    weights = [weight.copy() for weight in run(epochs=1)[1]]
    weights[2:] = [0 * weight for weight in weights[2:]]
    history, after, _ = run(y=0 * Y, weights=weights, epochs=3)
    assert history["gradient_norm"] == [0, 0, 0]
    for a, b in zip(weights, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_case_that_is_not_finite_leaves_every_weight_as_it_was(run, float64):
    x, (_, weights, _) = X.copy(), run(epochs=2)
    x[3, 1] = np.nan
    with pytest.warns(UserWarning, match="not finite"):
        history, after, model = run(x=x, weights=weights, damping=0.1)
    assert history["step_size"] == [0] * 5 and history["damping"] == [0.1] * 5
    for a, b in zip(weights, after, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore:.*(converged|rejected)")
@pytest.mark.parametrize("y", [0 * Y, Y], ids=["zero", "noise-free"])
def test_at_the_end_of_a_run_nothing_happens(y, run, float64):
    history, weights, model = run(y=y, epochs=300)
    assert history["converged"][-1] == 1 or y.any()
    assert np.isfinite([*history["loss"], *history["damping"]]).all() and np.isfinite(model.optimizer.damping.numpy())
    assert all(np.isfinite(weight).all() for weight in weights)
    # At the end, of sums of squares of 1e-17, what one pass computes as less another may compute as more.
    assert all(b <= a + 1e-30 for a, b in zip(history["loss"], history["loss"][1:], strict=False))


def test_products_pass_their_check(run, float64, capsys):
    _, _, model = run(epochs=1)
    checks = model.check_products(X, Y)
    assert checks and all(check.holds for check in checks)


@pytest.mark.slow
def test_fit_again_on_another_number_of_cases(float64):
    model = small()
    first = model.fit(X, Y, epochs=3, verbose=0, callbacks=[LevenbergMarquardt()]).history
    # 15 rows are fewer than the 25 weights: the other form.
    second = model.fit(X[:15], Y[:15], epochs=3, verbose=0, callbacks=[LevenbergMarquardt()]).history
    assert first["num_cases"] + second["num_cases"] == [40] * 3 + [15] * 3
    assert first["loss"][0] > first["loss"][-1] and second["loss"][0] > second["loss"][-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`DirectSolver` is for fits to many digits")
def test_a_regularizer_that_is_not_convex_stops_no_run():
    model = small(kernel_regularizer=keras.regularizers.OrthogonalRegularizer(0.01, mode="columns"))
    x, y = X.astype("float32"), Y.astype("float32")
    history = model.fit(x, y, epochs=10, verbose=0, callbacks=[LevenbergMarquardt()]).history
    assert history["loss"][-1] < 0.7 * history["loss"][0]


@pytest.mark.slow
def test_constraints_hold_for_every_candidate(float64):
    model = small(kernel_constraint=keras.constraints.NonNeg())
    history = model.fit(X, Y, epochs=8, verbose=0, callbacks=[LevenbergMarquardt()]).history
    assert (model.get_weights()[0] >= 0).all() and history["loss"][-1] < 0.7 * history["loss"][0]
    # What a candidate promised is what the next update finds.
    assert all(b <= a for a, b in zip(history["loss"], history["loss"][1:], strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("num_cases", [40, 39])
def test_two_replicas_give_the_weights_of_one_device(num_cases, float64):
    weights = []
    for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
        with strategy.scope():
            model = small(kernel_regularizer=keras.regularizers.L2(1e-3))
        model.fit(X[:num_cases], Y[:num_cases], epochs=3, verbose=0, callbacks=[LevenbergMarquardt()])
        weights.append(model.get_weights())
    # Differences along the arc make the root of a rounding of it.
    for one, two in zip(*weights, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-7)


# What is refused.


class AddingLoss(layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.mean(x**2))
        return x


@pytest.mark.parametrize(
    "part, message",
    [
        (layers.BatchNormalization, r"a network with BatchNormalization. Use `ConjugateGradient\(\)`, or use Layer"),
        (lambda: layers.Dropout(0.5), "random layers, such as Dropout.*leave them out"),
        (AddingLoss, "losses added in `call`.*add them to the outputs"),
        (lambda: layers.Dense(3, dtype="mixed_float16"), "16-bit arithmetic.*use float64"),
        (lambda: layers.Dense(3, dtype="mixed_bfloat16"), "16-bit arithmetic.*use float64"),
    ],
)
def test_networks_without_outputs_of_every_case_in_full_precision_are_refused(part, message):
    network = keras.Sequential([keras.Input((2,)), layers.Dense(3, "tanh"), part(), layers.Dense(1)])
    model = compiled(network, optimizer=HessianFree(solver=DirectSolver()))
    data = model_data(model, X.astype("float32"), Y.astype("float32"))
    with pytest.raises(ValueError, match=f"`DirectSolver` needs the derivative of every case's own outputs.*{message}"):
        with_objective(model, data, lambda objective: objective.start_vector)


@pytest.mark.parametrize("policy", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
def test_numbers_of_float32_in_the_network_or_the_loss_are_said_once(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(
            keras.Sequential([keras.Input((2,)), layers.Dense(1)]), optimizer=HessianFree(solver=DirectSolver())
        )
        with pytest.warns(
            UserWarning, match=r'accuracy of about 1e-4. Received.*float32.*set_floatx\("float64"\)'
        ) as record:
            for _ in range(2):
                model.fit(X, Y, verbose=0, callbacks=[LevenbergMarquardt()])
    finally:
        keras.config.set_dtype_policy(before)
    assert sum("1e-4" in str(warning.message) for warning in record) == 1


def of_all(y, y_pred):
    return keras.ops.mean((y - y_pred) ** 2)


@pytest.mark.filterwarnings("ignore:.*cannot be put together")
@pytest.mark.parametrize("loss", [of_all, keras.losses.Circle()], ids=["one number", "compares cases"])
def test_a_loss_of_the_whole_batch_is_refused(loss):
    network = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model = compiled(network, loss, optimizer=HessianFree(solver=DirectSolver()))
    data = model_data(model, X.astype("float32"), Y.astype("float32"))
    with pytest.raises(ValueError, match="a loss of the whole batch.*use a loss with one value per case"):
        with_objective(model, data, lambda objective: objective.start_vector)


def test_lengths_that_are_not_known_are_refused():
    network = keras.Sequential([keras.Input((None, 2)), layers.Dense(2), layers.GlobalAveragePooling1D()])
    model = compiled(network, optimizer=HessianFree(solver=DirectSolver()))
    x, y = tf.zeros([4, 3, 2]), tf.zeros([4, 2])
    model_data(model, x, y)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, None, 2])])
    def compute(x):
        return model._with_objective(Data(x, y, None), lambda objective, structure: objective.start_vector)

    with pytest.raises(ValueError, match="axes of unknown length.*give the input its shape"):
        compute(x)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"growing_batch": GrowingBatch()},
            "uses all cases of the batch in every update. Received: growing_batch=.*Leave it out",
        ),
        ({"curvature_batch_size": 10}, "uses all cases of the batch.*Received: curvature_batch_size=10. Leave it out"),
        (
            {"curvature": Hessian()},
            r"`DirectSolver` factorizes the Gauss-Newton matrix. Received: curvature=.*Leave it out",
        ),
    ],
)
def test_parts_of_the_cases_and_other_curvatures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HessianFree(solver=DirectSolver(), **arguments)


def test_the_whole_batch_is_the_default_with_it_and_survives_saving():
    optimizer = HessianFree(solver=DirectSolver(order=2))
    assert optimizer.growing_batch is None
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert restored.solver.get_config() == {"order": 2}
    assert HessianFree(solver=ConjugateGradient()).growing_batch is not None


@pytest.mark.parametrize("value", [0, 5, True, None, "yes"])
def test_what_is_no_order_is_refused(value):
    with pytest.raises(ValueError, match=rf"`order` must be an integer in \[1, 4\]. Received: order={value!r}"):
        DirectSolver(order=value)
