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
    moved,
    sequential,
    update_state,
    values_of,
    with_objective,
)
from training import all_values, assert_equal, assert_same, fit, renewed, trainable

from keras_hf import ConjugateGradient, DirectSolver, DoubleBackward, GaussNewton, GrowingBatch, Hessian, HessianFree
from keras_hf.differentiation import jacobian as jacobian_room
from keras_hf.method.update import hf_update
from keras_hf.network.fixed_network import Data
from keras_hf.solvers.direct import next_terms

DAMPING = 0.02
ARC = 2.0 ** -np.arange(0, 10.5, 0.5)
SLOW = pytest.mark.slow


def update(objective, order):
    """One update of an objective."""
    solver = DirectSolver(order)
    return hf_update(objective, GaussNewton(), solver, update_state(objective, solver, DAMPING, scale=1.0))


# One update.


def by_hand(model, data, order):
    """The rows, the terms of the arc and the candidates of the 2-4-3 network under the mean squared error, in NumPy, and the loss at each."""
    x, y = data.x.numpy(), data.y.numpy()
    scale = np.sqrt(2 / y.size)
    b = scale * jacobian(lambda: model(x), values_of(model)).reshape(y.size, -1)
    solve = lambda u: -np.linalg.solve(b.T @ b + DAMPING * np.eye(27), b.T @ u.ravel())  # noqa: E731
    curve = [solve(scale * (model(x).numpy() - y))]
    while len(curve) < order:
        curve.append(solve(scale * derivative_along(model, x, curve)))
    candidates = sum(ARC[:, None] ** power / math.factorial(power) * term for power, term in enumerate(curve, 1))
    losses, start = [], model.get_weights()
    for candidate in candidates:
        model.set_weights(moved(start, candidate))
        losses.append(np.mean((model(x).numpy() - y) ** 2))
    model.set_weights(start)
    return b, curve, candidates, np.array(losses)


@pytest.mark.parametrize(
    "num_cases, order, is_kept",
    [
        (15, 4, True),
        (5, 2, True),
        pytest.param(15, 1, True, marks=SLOW),
        pytest.param(5, 3, True, marks=SLOW),
        pytest.param(5, 4, False, marks=SLOW),
    ],
)
def test_an_update_and_derivatives_along_any_arc_are_those_by_hand(num_cases, order, is_kept, float64, monkeypatch):
    # Of 27 weights 45 rows are more, and 15 are fewer.
    model, x = make_model(), inputs()[:num_cases]
    data = model_data(model, x, np.sin(3 * np.repeat(x[:, :1], 3, 1)) + 1)
    any_curve = np.random.default_rng(1).normal(size=(3, 27))
    if not is_kept:
        monkeypatch.setattr(jacobian_room, "_KEPT_FLOATS", 0)

    def compute(objective):
        rows, found, terms = objective.rows, [], iter([tf.constant(term) for term in any_curve[1:]])
        assert (rows.jacobian is not None) == is_kept

        def term_of(derivative):
            found.append(rows.combined([1.0], [derivative]))
            return next(terms, tf.zeros([27], tf.float64))

        next_terms(rows, term_of, tf.constant(any_curve[0]), order, 2.0**-52)
        return update(objective, order), found

    (result, found), (_, gradient) = with_objective(model, data, compute), loss_and_gradient(model, data)
    b, (v, *others), candidates, losses = by_hand(model, data, order)
    # Derivatives after the second are differences.
    error = 1e-9 if order < 3 else 1e-6
    known = np.isfinite(result.trace["losses"])
    assert known.sum() in (12, 13) and known[::2].all()
    np.testing.assert_allclose(result.trace["losses"][known], losses[known], rtol=error if order > 2 else 1e-11)
    best = np.argmin(losses)
    np.testing.assert_allclose(result.step, candidates[best], rtol=error, atol=1e-3 * error)
    assert result.step_size == 1 and result.logs["arc_step"] == ARC[best]
    acceleration = np.linalg.norm(others[0]) / np.linalg.norm(v) if others else 0
    assert float(result.logs["acceleration"]) == pytest.approx(acceleration, rel=1e-9)
    assert float(result.actual_reduction) == pytest.approx(float(result.loss) - losses[best], rel=error)
    # What the quadratic model predicts for the straight step that stands for the candidate.
    straight = ARC[best] * v
    predicted = -(gradient @ straight + np.sum((b @ straight) ** 2) / 2)
    assert float(result.reduction_ratio) == pytest.approx(result.actual_reduction.numpy() / predicted, rel=error)
    assert len(found) == order - 1
    for number, derivative in enumerate(found, 2):
        expected = np.sqrt(2 / (3 * num_cases)) * derivative_along(model, x, list(any_curve[: number - 1])).ravel()
        # The error of differences is that of the square of the step, and rounding over its square.
        error = 1e-12 if number == 2 else 1e-6
        np.testing.assert_allclose(derivative, expected, rtol=0, atol=error * np.abs(expected).max())


@keras.saving.register_keras_serializable("tests")
class SquaredSums(keras.regularizers.Regularizer):
    """A convex regularizer whose second derivative is not diagonal."""

    def __call__(self, x):
        return 0.1 * keras.ops.sum(keras.ops.square(keras.ops.sum(x, 0)))


L2 = keras.regularizers.L2(0.1)


# Of Poisson's loss per case, `p - y log p`, the slope is not in the range of the second derivative where y is 0.
@pytest.mark.filterwarnings("ignore:.*no curvature")
@pytest.mark.parametrize(
    "activation, loss, regularizer, num_cases",
    [
        pytest.param("linear", "mse", SquaredSums(), 5, id="any"),
        pytest.param("softplus", "poisson", L2, 15, id="L2", marks=SLOW),
        pytest.param("softplus", "poisson", L2, 5, id="L2, dual"),
        pytest.param("linear", "mae", None, 15, id="no curvature"),
    ],
)
def test_the_step_solves_the_damped_system_whatever_regularizer_and_loss(
    activation, loss, regularizer, num_cases, float64
):
    model = make_model(activation, loss, regularizer)
    data = model_data(model, inputs()[:num_cases], np.eye(3)[np.arange(num_cases) % 3])

    def compute(objective):
        product = objective.product(GaussNewton(DoubleBackward()))
        return update(objective, 1), dense_matrix(product, objective.num_weights)

    (result, matrix), (_, gradient) = with_objective(model, data, compute), loss_and_gradient(model, data)
    assert result.step_size == 1 and np.any(matrix) == (loss != "mae")
    expected = -np.linalg.solve(matrix + DAMPING * np.eye(27), gradient)
    np.testing.assert_allclose(result.step / result.logs["arc_step"], expected, rtol=1e-8, atol=1e-10)


# Runs, most of them by one compiled function.

X = np.random.default_rng(0).uniform(-1, 1, size=(40, 2))
Y = np.sin(3 * X[:, :1]) * X[:, 1:]


def small(**layer_arguments):
    keras.utils.set_random_seed(1)
    network = sequential(layers.Dense(6, "tanh", **layer_arguments), layers.Dense(1))
    return trainable(network, optimizer=HessianFree(solver=DirectSolver(), seed=0))


def run(x=X, y=Y, epochs=3, damping=None, scale=1.0, weights=None):
    """Trains the network from its start; returns history and model."""
    model = renewed(small)
    if weights is not None:
        model.set_weights(weights)
    if damping is not None:
        model.optimizer.damping.assign(damping)
    return fit(model, x, y, epochs=epochs, sample_weight=np.full(len(x), scale)), model


def falls(losses, rounding=0.0):
    """Whether no loss is larger than the one before."""
    return all(b <= a + rounding for a, b in zip(losses, losses[1:], strict=False))


@pytest.mark.filterwarnings("ignore:.*(converged|rejected)")
# 25 weights, 40 cases: Adam needs thousands of updates for 1e-4.
@pytest.mark.parametrize("y, least", [(Y, 1e-4), (0 * Y, 1e-30)], ids=["noise-free", "zero"])
def test_exact_steps_fit_a_small_regression_and_at_the_end_of_the_run_nothing_happens(y, least, float64):
    history, model = run(y=y, epochs=80)
    assert history["loss"][-1] < least
    # Of sums of squares of 1e-17, what one pass computes as less another may compute as more.
    assert falls(history["loss"], rounding=1e-30)
    assert y.any() or history["converged"][-1] == 1
    assert all(np.isfinite(values).all() for values in [*all_values(model), history["loss"], history["damping"]])


def test_a_factor_of_the_loss_does_not_change_the_run(float64):
    one, model = run(epochs=10)
    weights = model.get_weights()
    # A power of 2 changes no digit.
    for factor in (2.0**20, 2.0**-20):
        other, model = run(epochs=10, scale=factor)
        np.testing.assert_allclose(other["loss"], np.multiply(one["loss"], factor), rtol=1e-9)
        assert other["arc_step"] == one["arc_step"]
        assert_same(model.get_weights(), weights, rtol=1e-6)


def test_the_first_damping_matters_little(float64):
    losses = [run(epochs=60, damping=damping)[0]["loss"][-1] for damping in (1e-3, 1e3)]
    assert max(losses) < 1e-4


def test_a_zero_gradient_leaves_every_weight_as_it_was(float64):
    weights = renewed(small).get_weights()
    weights[2:] = [0 * weight for weight in weights[2:]]
    with pytest.warns(UserWarning, match="gradient of the first update is zero"):
        history, model = run(y=0 * Y, weights=weights)
    assert history["gradient_norm"] == [0, 0, 0]
    assert_equal(model.get_weights(), weights)


def test_a_case_that_is_not_finite_leaves_every_weight_as_it_was(float64):
    x, weights = X.copy(), renewed(small).get_weights()
    x[3, 1] = np.nan
    with pytest.warns(UserWarning, match="not finite"):
        history, model = run(x=x, damping=0.1)
    assert history["step_size"] == [0] * 3 and history["damping"] == [0.1] * 3
    assert_equal(model.get_weights(), weights)


def test_products_pass_their_check(float64, capsys):
    checks = renewed(small).check_products(X, Y)
    assert checks and all(check.holds for check in checks)


@pytest.mark.slow
def test_fit_again_on_another_number_of_cases(float64):
    first, model = run()
    # 15 rows are fewer than the 25 weights: the other form.
    second = fit(model, X[:15], Y[:15], epochs=3, sample_weight=np.ones(15))
    assert first["num_cases"] + second["num_cases"] == [40] * 3 + [15] * 3
    assert first["loss"][0] > first["loss"][-1] and second["loss"][0] > second["loss"][-1]


@pytest.mark.slow
def test_in_float32_constraints_hold_for_every_candidate_and_a_regularizer_that_is_not_convex_stops_no_run():
    regularizer = keras.regularizers.OrthogonalRegularizer(0.01, mode="rows")
    model = small(kernel_regularizer=regularizer, kernel_constraint=keras.constraints.NonNeg())
    losses = fit(model, X.astype("float32"), Y.astype("float32"), epochs=10)["loss"]
    assert (model.get_weights()[0] >= 0).all() and losses[-1] < 0.7 * losses[0]
    # What a candidate promised is what the next update finds.
    assert falls(losses)


@pytest.mark.slow
def test_two_replicas_with_cases_of_different_number_give_the_weights_of_one_device(float64):
    weights = []
    for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
        with strategy.scope():
            model = small(kernel_regularizer=keras.regularizers.L2(1e-3))
        fit(model, X[:39], Y[:39], epochs=3)
        weights.append(model.get_weights())
    # Differences along the arc make the root of a rounding of it.
    assert_same(*weights, rtol=0, atol=1e-7)


# What is said and what is refused.


def exact(*stack, loss="mse", shape=(2,)):
    return compiled(sequential(*stack, shape=shape), loss, optimizer=HessianFree(solver=DirectSolver()))


def start_of_update(model, dtype="float32"):
    x, y = X.astype(dtype), Y.astype(dtype)
    return with_objective(model, model_data(model, x, y), lambda objective: objective.start_vector)


def test_numbers_of_float32_in_the_loss_alone_are_said_once():
    model = exact(layers.Dense(1, dtype="float64"))
    with pytest.warns(
        UserWarning, match=r'rounding of the coarser one. Received.*float32.*set_floatx\("float64"\)'
    ) as said:
        assert [start_of_update(model, "float64").dtype for _ in range(2)] == ["float64"] * 2
    assert sum("coarser" in str(warning.message) for warning in said) == 1


class AddingLoss(layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.mean(x**2))
        return x


def of_all(y, y_pred):
    return keras.ops.mean((y - y_pred) ** 2)


WHOLE = "a loss of the whole batch.*use a loss with one value per case"


@pytest.mark.filterwarnings("ignore:.*cannot be put together")
@pytest.mark.parametrize(
    "part, loss, message",
    [
        (layers.BatchNormalization, "mse", r"with BatchNormalization. Use `ConjugateGradient\(\)`, or use Layer"),
        (lambda: layers.Dropout(0.5), "mse", "random layers, such as Dropout.*leave them out"),
        (AddingLoss, "mse", "losses added in `call`.*add them to the outputs"),
        (lambda: layers.Dense(3, dtype="mixed_float16"), "mse", "16-bit arithmetic.*use float64"),
        (lambda: layers.Dense(3, dtype="mixed_bfloat16"), "mse", "16-bit arithmetic.*use float64"),
        (layers.Identity, of_all, WHOLE),
        (layers.Identity, keras.losses.Circle(), WHOLE),
    ],
)
def test_what_has_no_outputs_or_loss_of_every_case_in_full_precision_is_refused(part, loss, message):
    model = exact(layers.Dense(3, "tanh"), part(), layers.Dense(1), loss=loss)
    with pytest.raises(
        ValueError, match=f"`DirectSolver` needs the derivative of every case's own outputs.*a network.*{message}"
    ):
        start_of_update(model)


class Growth(layers.Layer):
    """`exp(b x)`."""

    def build(self, shape):
        self.b = self.add_weight(name="b", shape=(), initializer=keras.initializers.Constant(3.0))

    def call(self, x):
        return tf.exp(self.b * x)


@pytest.mark.filterwarnings("ignore:Training has converged to rounding")
def test_the_damping_falls_with_the_curvature_however_much_that_is(float64):
    x = np.arange(1.0, 11)[:, None]
    model = exact(Growth(), shape=(1,))
    history = fit(model, x, np.exp(0.3 * x), epochs=75)
    # From 1e27: limits relative to the first curvature end at a damping above all that is left.
    assert history["damping"][0] > 1e25 and history["damping"][-1] < 1e4
    np.testing.assert_allclose(float(model.weights[0]), 0.3, rtol=1e-12)


def test_lengths_that_are_not_known_are_refused():
    model = exact(layers.Dense(2), layers.GlobalAveragePooling1D(), shape=(None, 2))
    y = tf.zeros([4, 2])
    model_data(model, tf.zeros([4, 3, 2]), y)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, None, 2])])
    def compute(x):
        return with_objective(model, Data(x, y, None), lambda objective: objective.start_vector)

    with pytest.raises(ValueError, match="axes of unknown length.*give the input its shape"):
        compute(tf.zeros([4, 3, 2]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"growing_batch": GrowingBatch()}, "uses all cases of the batch in every update. Received: growing_batch="),
        ({"curvature_batch_size": 10}, "uses all cases of the batch.*Received: curvature_batch_size=10"),
        ({"curvature": Hessian()}, "`DirectSolver` factorizes the Gauss-Newton matrix. Received: curvature="),
    ],
)
def test_parts_of_the_cases_and_other_curvatures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"{message}.*Leave it out"):
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
