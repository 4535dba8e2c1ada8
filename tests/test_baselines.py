"""What the methods that Hessian-free is compared with promise: right derivatives, the steps of their rules, and a loss that falls."""

import functools
import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import KERAS
from training import Clock, assert_equal, assert_same

from benchmarks.time_to_error import METHODS, Cases
from examples import baselines
from keras_hf import FiniteDifferenceHessian, HFModel, UpdateRecorder, read_updates


def tiny_cases():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4)).astype("float32")
    return x, np.tanh(x @ rng.normal(size=(4, 4))).astype("float32")


def tiny_network():
    layers = keras.layers.Dense(3, "tanh", kernel_regularizer=keras.regularizers.L2(0.01)), keras.layers.Dense(4)
    return keras.Sequential([keras.Input((4,)), *layers])


def squares(y_true, y_pred):
    return tf.reduce_sum(tf.square(y_true - y_pred), -1)


def whole_loss(network, x, y):
    return tf.reduce_mean(squares(y, network(x))) + sum(network.losses)


def recorder(network, path, **arguments):
    x, _ = tiny_cases()
    return baselines.Recorder(network, x, x[:10], path, **{"max_seconds": math.inf, "max_updates": 30, **arguments})


@functools.cache
def compiled_once():
    """A network, its weights at the start, and its loss on two pieces of different sizes."""
    network = tiny_network()
    return network, network.get_weights(), baselines.LossAndGradient(network, squares, *tiny_cases(), piece_size=20)


@pytest.fixture
def compiled(monkeypatch):
    """A network and its loss, the one that methods of scipy make, too."""
    network, weights, function = compiled_once()
    network.set_weights(weights)
    function.cost = 0
    monkeypatch.setattr(baselines, "LossAndGradient", lambda *arguments: function)
    return network, function


def train(method, setting, network, record):
    x, y = tiny_cases()
    METHODS[method](SimpleNamespace(loss=squares), setting, network, Cases(x, y, x[:10], y[:10]), record, 0)


def test_loss_gradient_and_products_equal_those_of_dense_matrices(compiled):
    network, function = compiled
    vector = function.vector() + 0.1  # Biases that aren't zero.
    loss, gradient = function(vector)
    np.testing.assert_allclose(function.vector(), vector, rtol=1e-6)
    variables = [weight.value for weight in network.trainable_variables]
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            expected = whole_loss(network, *tiny_cases())
        flat = tf.concat([tf.reshape(part, [-1]) for part in inner.gradient(expected, variables)], 0)
    rows = outer.jacobian(flat, variables, experimental_use_pfor=False)
    hessian = np.concatenate([row.numpy().reshape(len(vector), -1) for row in rows], 1)
    assert loss == pytest.approx(float(expected), rel=1e-5)  # Float32 sums in another order.
    np.testing.assert_allclose(gradient, flat, rtol=1e-4, atol=1e-5)
    function.assign(np.zeros_like(vector))  # A product is at the vector that it is asked for.
    products = np.stack([function.hessian_product(vector, direction) for direction in np.eye(len(vector))])
    np.testing.assert_allclose(products, hessian, rtol=1e-4, atol=1e-5 * np.abs(hessian).max())
    assert function.cost == 1 + 2 * len(vector)


@pytest.mark.parametrize(
    ("method", "setting"), [("lbfgs", {"max_corrections": 5}), ("ncg", {}), ("trust-region", {"initial_radius": 0.1})]
)
def test_methods_of_scipy_reduce_the_loss(method, setting, compiled, tmp_path):
    network, _ = compiled
    record = recorder(network, tmp_path / "run.csv", log_names=("cost",))
    before = float(whole_loss(network, *tiny_cases()))
    train(method, setting, network, record)
    assert float(whole_loss(network, *tiny_cases())) < 0.3 * before
    assert record.rows[-1]["update"] == 30 and record.rows[-1]["cost"] >= 30


def test_a_method_whose_updates_take_long_ends_within_one(compiled, tmp_path, monkeypatch):
    network, function = compiled
    monkeypatch.setattr(baselines, "time", clock := Clock())
    record = recorder(network, tmp_path / "run.csv", max_seconds=0.1)
    product = function.hessian_product

    def slow(vector, direction):
        clock.now += 0.2
        return product(vector, direction)

    monkeypatch.setattr(function, "hessian_product", slow)
    weights = network.get_weights()
    train("trust-region", {}, network, record)
    assert record.is_over
    assert record.rows[-1]["update"] == 0
    assert_equal(weights, network.get_weights())


@pytest.mark.parametrize("name", ["gd", "momentum"])
def test_compiled_descent_on_all_cases_takes_the_steps_that_its_rule_says(name, compiled, tmp_path):
    network, function = compiled
    baseline, rate = baselines.BASELINES[name], 1e-2
    assert baseline.batch_size is None
    optimizer = baseline.optimizer(rate)
    expected, velocity, weights = function.vector(), 0.0, network.get_weights()
    for _ in range(baselines.STEPS_PER_EXECUTION):
        velocity = optimizer.momentum * velocity - rate * function(expected)[1]
        expected = expected + velocity
    network.set_weights(weights)
    steps = recorder(network, tmp_path / "run.csv", max_updates=1)
    baselines.fit_compiled(network, optimizer, squares, *tiny_cases(), None, steps)
    np.testing.assert_allclose(function.vector(), expected, atol=1e-5)
    assert optimizer.momentum == {"gd": 0, "momentum": 0.9}[name]


def test_compiled_steps_are_those_of_the_optimizer_on_one_batch_after_the_other(compiled):
    network, _ = compiled
    x, y = tiny_cases()
    weights, batches = network.get_weights(), np.arange(30).reshape(10, 3)[::-1].astype("int32")
    optimizer, other = (keras.optimizers.SGD(1e-2, momentum=0.9, nesterov=True) for _ in range(2))
    optimizer.build(network.trainable_variables)
    steps = baselines._compiled_steps(network, optimizer, squares, tf.constant(x), tf.constant(y))
    steps(tf.constant(batches))
    ours = network.get_weights()
    network.set_weights(weights)
    for batch in batches:
        with tf.GradientTape() as tape:
            loss = whole_loss(network, x[batch], y[batch])
        other.apply(tape.gradient(loss, network.trainable_weights), network.trainable_weights)
    assert_same(ours, network.get_weights(), rtol=1e-3, atol=1e-5)


def test_an_epoch_holds_every_case_once():
    batches = baselines._batches_of_cases(50, 5, np.random.default_rng(0))
    for _ in range(2):
        assert sorted(next(batches).numpy().ravel()) == list(range(50))


@pytest.mark.skipif(KERAS < (3, 13), reason="Muon of Keras 3.12 fails on TensorFlow")
def test_muon_leaves_the_last_layer_to_adam_without_weight_decay():
    network = tiny_network()
    optimizer = baselines.muon(0.1, network)
    optimizer.build(network.trainable_variables)
    by_adam = [velocity is not None for velocity in optimizer.adam_velocities]
    assert by_adam == [False, True, True, True]  # kernel, bias, kernel, bias
    before = network.get_weights()
    optimizer.apply([tf.zeros(weight.shape) for weight in before])
    assert_equal(before, network.get_weights())


def test_standard_hessian_free_reduces_the_loss_with_constant_damping_on_all_cases(tmp_path):
    network = tiny_network()
    record = recorder(network, tmp_path / "run.csv", max_updates=15, log_names=("damping", "num_cases"))
    before = float(whole_loss(network, *tiny_cases()))
    train("standard", {"damping": 1.0}, network, record)
    assert float(whole_loss(network, *tiny_cases())) < 0.3 * before
    assert [(row["damping"], row["num_cases"]) for row in record.rows[1:]] == 15 * [(1.0, 30)]
    optimizer, _ = baselines.standard_hessian_free(curvature=FiniteDifferenceHessian())
    assert isinstance(optimizer.curvature, FiniteDifferenceHessian)


@pytest.mark.slow
def test_cost_of_hessian_free_is_that_of_the_updates_recorded(tmp_path):
    network, (x, y) = tiny_network(), tiny_cases()
    record = recorder(network, tmp_path / "run.csv", max_updates=3, log_names=("cost", "total_cg_iterations"))
    optimizer, damping_rule = baselines.recipe(1.0, curvature_batch_size=10, seed=0)
    model = HFModel(network)
    model.compile(optimizer=optimizer, loss=squares)
    model.fit(x, y, epochs=3, verbose=0, callbacks=[UpdateRecorder(tmp_path / "updates.jsonl"), damping_rule, record])
    updates = read_updates(tmp_path / "updates.jsonl")
    costs = [update["cost"] / 30 for update in updates]
    np.testing.assert_allclose([row["cost"] for row in record.rows], [0, *np.cumsum(costs)])
    iterations = [update["cg_iterations"] for update in updates]
    assert [row["total_cg_iterations"] for row in record.rows] == [0, *np.cumsum(iterations)]
