"""What weight decay promises, given or found by evidence: MacKay's fixed point on the training cases alone, as state, never out of its limits."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import all_values, assert_equal, fit, normal

from keras_hf import (
    ConjugateGradient,
    DirectSolver,
    EvidenceRegularization,
    GrowingBatch,
    HessianFree,
    HFModel,
    PreconditionedMomentum,
)
from keras_hf.solvers.lanczos import effective_trace, random_signs


def regression(num_cases=60):
    x = np.linspace(-1, 1, num_cases)[:, None]
    return x, np.sin(4 * x) + 0.3 * normal(num_cases, 1)


def compiled(weight_decay="evidence", solver=None, loss="mse", regularizer=None, **arguments):
    dense = lambda *args: layers.Dense(*args, kernel_regularizer=regularizer, bias_regularizer=regularizer)  # noqa: E731
    network = keras.Sequential([keras.Input((1,)), dense(8, "tanh"), dense(1)])
    model = HFModel(network)
    optimizer = HessianFree(solver=solver or DirectSolver(), weight_decay=weight_decay, seed=0, **arguments)
    model.compile(optimizer, loss)
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=weight.shape) for weight in model.weights])
    return model


# A decay that is given.


@pytest.mark.parametrize("solver", [DirectSolver, pytest.param(ConjugateGradient, marks=pytest.mark.slow)])
def test_a_decay_is_an_l2_regularizer_of_every_weight_that_evaluation_leaves_out(float64, solver):
    x, y = regression()
    settings = {"solver": solver(), "damping": 0.1, "growing_batch": None}
    one = compiled(0.02, **settings)
    other = compiled(None, regularizer=keras.regularizers.L2(0.01), **settings)
    histories = [fit(model, x, y, epochs=3) for model in (one, other)]
    # Keras holds 0.01 in float32.
    np.testing.assert_allclose(histories[0]["loss"], histories[1]["loss"], rtol=1e-5)
    assert "weight_decay" not in histories[0]
    squares = sum(np.sum(weight**2) for weight in one.get_weights())
    assert one.objective(x, y).loss_at(one.objective(x, y).weights) == pytest.approx(
        one.evaluate(x, y, verbose=0) + 0.01 * squares
    )
    prior = one.laplace(x, y, noise=1.0).prior_precision
    np.testing.assert_allclose(prior, 0.02 * 30)


def test_a_decay_may_be_assigned_without_another_trace(float64):
    x, y = regression()
    model = compiled(0.0)
    before = fit(model, x, y)["loss"]
    model.optimizer.weight_decay.assign(3.0)
    squares = sum(np.sum(weight**2) for weight in model.get_weights())
    data_loss = model.evaluate(x, y, verbose=0)
    assert fit(model, x, y)["loss"] == pytest.approx([data_loss + 1.5 * squares])
    assert before[0] > 0


@pytest.mark.parametrize("wrong", [-1.0, "mackay", np.nan])
def test_a_decay_out_of_range_is_refused(wrong):
    with pytest.raises((ValueError, TypeError), match="`weight_decay` must be"):
        HessianFree(weight_decay=wrong)


# How many weights the data determine.


@pytest.mark.parametrize("num_cases", [6, 60])
def test_exact_steps_count_the_weights_that_the_data_determine(float64, num_cases):
    x, y = regression(num_cases)  # fewer rows than weights, or more
    model = compiled()
    fit(model, x, y, epochs=6)
    decay = model.optimizer.weight_decay.numpy()
    residuals = HFModel(model.network)
    residuals.compile(HessianFree(solver=DirectSolver()), "mse")
    jacobian = residuals.objective(x, y).jacobian(residuals.objective(x, y).weights)
    values = np.linalg.svd(jacobian, compute_uv=False) ** 2
    model.optimizer.iterations.assign(5)
    assert fit(model, x, y)["num_effective"][0] == pytest.approx(np.sum(values / (values + decay)))


def test_the_quadrature_is_exact_where_eigenvalues_are_few(float64):
    values = np.repeat([0.0, 0.3, 4.0, 500.0], [90, 5, 3, 2])
    basis = np.linalg.qr(normal(100, 100))[0]
    # Any start of length sqrt(n) in a space that the matrix keeps.
    matrix = tf.constant(basis * (values + 0.1) @ basis.T)
    start = tf.constant(basis.sum(1))
    found = effective_trace(lambda v: tf.linalg.matvec(matrix, v), start, tf.constant(0.1, tf.float64))
    assert found.numpy() == pytest.approx(np.sum(values / (values + 0.1)), rel=1e-9)


def test_the_estimate_has_the_trace_as_its_mean(float64):
    values = np.logspace(-6, 2, 200)
    basis = np.linalg.qr(normal(200, 200))[0]
    matrix = tf.constant(basis * (values + 1e-3) @ basis.T)
    trace = tf.function(
        lambda z: effective_trace(lambda v: tf.linalg.matvec(matrix, v), z, tf.constant(1e-3, tf.float64))
    )
    found = [trace(random_signs(200, tf.constant(number), tf.float64)).numpy() for number in range(40)]
    true = np.sum(values / (values + 1e-3))
    assert np.mean(found) == pytest.approx(true, abs=4 * np.std(found) / np.sqrt(40) + 0.1 * true)
    assert np.std(found) < np.sqrt(2 * true)
    assert np.array_equal(random_signs(9, tf.constant(3), tf.float64), random_signs(9, tf.constant(3), tf.float64))


def test_what_is_not_finite_gives_no_number():
    found = effective_trace(lambda v: v * np.nan, tf.ones([5]), tf.constant(0.1))
    assert np.isnan(found)


# The decay that is found.


@pytest.mark.parametrize("solver", [DirectSolver(), pytest.param(ConjugateGradient(), marks=pytest.mark.slow)])
def test_the_decay_ends_where_evidence_after_training_finds_it(float64, solver):
    x, y = regression()
    model = compiled(solver=solver, growing_batch=None)
    history = fit(model, x, y, epochs=80)
    with_decay, after = model.laplace(x, y), model.laplace(x, y, prior_precision="evidence")
    tolerance = 1e-3 if isinstance(solver, DirectSolver) else 0.5
    np.testing.assert_allclose(with_decay.prior_precision, after.prior_precision, rtol=tolerance)
    assert with_decay.noise == pytest.approx(0.3, rel=0.2)
    known = [number for number in history["num_effective"] if np.isfinite(number)]
    assert len(known) == 80 // solver.evidence_interval and known[-1] == pytest.approx(after.num_effective, rel=0.5)
    assert history["loss"][-1] == pytest.approx(
        history["data_loss"][-1] + history["weight_decay"][-1] * history["squared_weights"][-1] / 2
    )


@pytest.mark.slow
@pytest.mark.slow
def test_minibatches_and_growing_parts_find_a_decay_of_the_same_size(float64):
    x, y = regression(600)
    found = []
    for solver, growing_batch, batch_size, epochs in (
        (DirectSolver(), None, None, 60),
        (ConjugateGradient(), GrowingBatch(100), None, 200),
        (PreconditionedMomentum(), None, 100, 200),
    ):
        model = compiled(solver=solver, growing_batch=growing_batch)
        model.fit(x, y, batch_size=batch_size, epochs=epochs, verbose=0)
        found.append(float(model.optimizer.weight_decay.numpy()))
    assert max(found) < 4 * min(found)


def logs(**changes):
    return {"weight_decay": 0.1, "num_effective": 4.0, "data_loss": 0.5, "squared_weights": 8.0, **changes}


def ready(**arguments):
    """A callback at the start of training, by a model of 25 weights and one output."""
    model = compiled()
    model.build((None, 1))
    model.optimizer.build(model.trainable_variables)
    callback = EvidenceRegularization(**arguments)
    callback.set_model(model)
    callback.on_train_begin()
    return callback


def test_the_rule_by_hand():
    callback = ready()
    # 2 gamma loss / (w'w (N - gamma)), with N = 54.
    assert callback.next_decay(logs(weight_decay=0.01), 54) == pytest.approx(4.0 / 400)
    # By a factor of three at most, either way.
    assert callback.next_decay(logs(weight_decay=0.1), 54) == pytest.approx(0.1 / 3)
    assert callback.next_decay(logs(weight_decay=1e-5), 54) == pytest.approx(3e-5)
    # At first so that it is a hundredth of the loss.
    assert callback.next_decay(logs(weight_decay=0.0), 54) == pytest.approx(2 * 0.01 * 0.5 / 8)
    for key in ("num_effective", "data_loss"):
        assert np.isnan(callback.next_decay(logs(**{key: np.nan}), 54))
    assert np.isnan(callback.next_decay(logs(squared_weights=0.0), 54))


def test_a_growing_part_stands_for_its_whole_batch(float64):
    x, y = regression(60)
    model = compiled(solver=ConjugateGradient(), growing_batch=GrowingBatch(20))
    history = fit(model, x, y, epochs=1)
    assert history["num_cases"] == [20] and history["num_values"] == [60]


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_batches_stand_for_all_of_the_data(float64):
    x, y = regression(60)
    callback, counted = EvidenceRegularization(), []
    next_decay = callback.next_decay
    callback.next_decay = lambda logs, num_values: counted.append(num_values) or next_decay(logs, num_values)
    model = compiled(None)
    model.fit(x, y, batch_size=20, epochs=2, callbacks=[callback], verbose=0)
    assert counted[0] == counted[5] == 60
    # Keras does not know how many batches there are, until it has seen them.
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(20).filter(lambda x, y: True)
    counted.clear()
    model.fit(dataset, epochs=2, callbacks=[callback], verbose=0)
    assert np.isnan(counted[:3]).all() and 60 in counted[3:]


def test_the_decay_does_not_fall_where_the_data_determine_more_than_half_as_many_weights_as_there_are_values():
    callback = ready()
    assert callback.next_decay(logs(weight_decay=0.2, num_effective=26.0), 54) == pytest.approx(26 / (8 * 28))
    assert np.isnan(callback.next_decay(logs(weight_decay=0.2, num_effective=28.0, data_loss=0.001), 54))
    # It rises: of 54 residuals of mean square 0.5, one is left for the noise.
    found = callback.next_decay(logs(weight_decay=5.0, num_effective=53.0), 54)
    assert found == pytest.approx(2 * 53 * 0.5 / (8 * 1))


@pytest.mark.slow
@pytest.mark.parametrize("solver", [DirectSolver(), ConjugateGradient()])
def test_more_weights_than_cases_do_not_interpolate_noise(float64, solver):
    x, y = regression(20)
    histories = [
        fit(compiled(decay, solver=solver, growing_batch=None), x, y, epochs=60) for decay in (0.0, "evidence")
    ]
    assert histories[0]["loss"][-1] < 0.01 < 0.3**2 / 3 < histories[1]["data_loss"][-1]


def test_the_decay_stays_within_its_limits():
    callback = ready(min_decay=0.02, max_decay=0.03)
    for loss, limit in ((1e-9, 0.02), (1e9, 0.03)):
        callback.on_train_batch_end(0, logs(weight_decay=0.025, data_loss=loss, num_values=54.0))
        assert float(callback.model.optimizer.weight_decay.numpy()) == pytest.approx(limit)
    callback.on_train_batch_end(0, logs(num_effective=np.nan, num_values=np.nan))
    assert float(callback.model.optimizer.weight_decay.numpy()) == pytest.approx(0.03)
    with pytest.raises(
        ValueError, match="`min_decay` must not exceed `max_decay`. Received: min_decay=2.0, max_decay=1.0"
    ):
        EvidenceRegularization(2.0, 1.0)


def test_classes_have_no_noise():
    model = compiled(loss=keras.losses.BinaryCrossentropy(from_logits=True), solver=ConjugateGradient())
    model.build((None, 1))
    model.optimizer.build(model.trainable_variables)
    callback = EvidenceRegularization()
    callback.set_model(model)
    callback.on_train_begin()
    assert callback.next_decay(logs(weight_decay=0.01), 54) == pytest.approx(4.0 / (8 * 54))


@pytest.mark.slow
def test_the_decay_is_saved_and_a_resumed_run_is_the_same(float64, tmp_path):
    x, y = regression()
    model = compiled()
    fit(model, x, y, epochs=7)
    model.save_weights(tmp_path / "a.weights.h5")
    resumed = compiled()
    resumed.build((None, 1))
    resumed._build_optimizer()
    resumed.load_weights(tmp_path / "a.weights.h5")
    assert resumed.optimizer.weight_decay.numpy() == model.optimizer.weight_decay.numpy() > 0
    assert_equal(*[fit(each, x, y, epochs=6)["loss"] for each in (model, resumed)])
    assert_equal(all_values(model), all_values(resumed))
    again = HessianFree.from_config(model.optimizer.get_config())
    assert again.finds_decay and HessianFree.from_config(HessianFree(weight_decay=0.5).get_config()).weight_decay == 0.5


@pytest.mark.slow
def test_the_callback_alone_turns_it_on_at_any_time(float64):
    x, y = regression()
    model = compiled(None)
    fit(model, x, y, epochs=2)
    model.fit(x, y, epochs=6, callbacks=[EvidenceRegularization()], verbose=0)
    assert float(model.optimizer.weight_decay.numpy()) > 0
    network = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    network.compile("sgd", "mse")
    with pytest.raises(
        ValueError, match="assigns the weight decay of `HessianFree`. Received: a model whose optimizer is <.*SGD"
    ):
        network.fit(x, y, callbacks=[EvidenceRegularization()], verbose=0)


def test_what_has_no_evidence_is_refused_by_name(float64):
    x, y = regression()
    with pytest.raises(ValueError, match="finds one decay for all weights. Received: regularizers of .*kernel"):
        compiled(regularizer="l2").fit(x, y, verbose=0)
    with pytest.raises(ValueError, match="`EvidenceRegularization` needs a loss that is the logarithm of a likelihood"):
        compiled(loss="log_cosh").fit(x, y, verbose=0)
