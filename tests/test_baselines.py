"""What the methods that Hessian-free is compared with promise: right derivatives, and a loss that falls."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from examples import baselines
from keras_hf import FiniteDifferenceHessian, HFModel


def tiny_cases():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4)).astype("float32")
    return x, np.tanh(x @ rng.normal(size=(4, 4))).astype("float32")


def tiny_network():
    penalty = keras.regularizers.L2(0.01)
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh", kernel_regularizer=penalty)])
    network.add(keras.layers.Dense(4))
    return network


def squares(y_true, y_pred):
    return tf.reduce_sum(tf.square(y_true - y_pred), -1)


def whole_loss(network, x, y):
    return tf.reduce_mean(squares(y, network(x))) + sum(network.losses)


def recorder(network, path, **limits):
    x, _ = tiny_cases()
    return baselines.Recorder(network, x, x[:10], path, **{"max_seconds": 60.0, "max_updates": 30, **limits})


def test_loss_gradient_and_products_equal_those_of_dense_matrices():
    network, (x, y) = tiny_network(), tiny_cases()
    function = baselines.LossAndGradient(network, squares, x, y, piece_size=13)
    vector = function.vector() + 0.1
    loss, gradient = function(vector)
    variables = [weight.value for weight in network.trainable_variables]
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            expected = whole_loss(network, x, y)
        flat = tf.concat([tf.reshape(part, [-1]) for part in inner.gradient(expected, variables)], 0)
    rows = outer.jacobian(flat, variables, experimental_use_pfor=False)
    hessian = np.concatenate([row.numpy().reshape(len(vector), -1) for row in rows], 1)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient, flat, rtol=1e-4, atol=1e-5)
    function.assign(np.zeros_like(vector))  # A product is at the vector that it is asked for.
    products = np.stack([function.hessian_product(vector, direction) for direction in np.eye(len(vector))])
    np.testing.assert_allclose(products, hessian, rtol=1e-4, atol=1e-5 * np.abs(hessian).max())
    assert function.cost == 1 + 2 * len(vector)


@pytest.mark.parametrize(
    "fit", [baselines.fit_lbfgs, baselines.fit_nonlinear_cg, baselines.fit_trust_region], ids=lambda fit: fit.__name__
)
def test_methods_of_scipy_reduce_the_loss(fit, tmp_path):
    network, (x, y) = tiny_network(), tiny_cases()
    record = recorder(network, tmp_path / "run.csv")
    before = float(whole_loss(network, x, y))
    fit(network, squares, x, y, record)
    assert float(whole_loss(network, x, y)) < 0.3 * before
    assert record.rows[-1]["update"] == 30


def test_a_method_whose_updates_take_long_ends_within_one(tmp_path, monkeypatch):
    network, (x, y) = tiny_network(), tiny_cases()
    record = recorder(network, tmp_path / "run.csv", max_seconds=0.1)
    product = baselines.LossAndGradient.hessian_product

    def slow(self, vector, direction):
        time.sleep(0.2)
        return product(self, vector, direction)

    monkeypatch.setattr(baselines.LossAndGradient, "hessian_product", slow)
    weights = network.get_weights()
    baselines.fit_trust_region(network, squares, x, y, record)
    assert record.is_over
    assert record.rows[-1]["update"] == 0
    for before, after in zip(weights, network.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", ["gd", "momentum"])
def test_compiled_descent_on_all_cases_takes_the_steps_that_its_rule_says(name, tmp_path):
    network, (x, y) = tiny_network(), tiny_cases()
    baseline, rate = baselines.BASELINES[name], 1e-2
    assert baseline.batch_size is None
    optimizer = baseline.optimizer(rate)
    function = baselines.LossAndGradient(network, squares, x, y)
    expected, velocity, weights = function.vector(), 0.0, network.get_weights()
    for _ in range(baselines.STEPS_PER_EXECUTION):
        velocity = optimizer.momentum * velocity - rate * function(expected)[1]
        expected = expected + velocity
    network.set_weights(weights)
    steps = recorder(network, tmp_path / "run.csv", max_updates=1)
    baselines.fit_compiled(network, optimizer, squares, x, y, None, steps)
    np.testing.assert_allclose(function.vector(), expected, atol=1e-5)
    assert optimizer.momentum == {"gd": 0, "momentum": 0.9}[name]


@pytest.mark.parametrize("curvature", [None, FiniteDifferenceHessian()], ids=["exact", "differences"])
def test_standard_hessian_free_reduces_the_loss_by_plain_cg_from_zero(curvature):
    network, (x, y) = tiny_network(), tiny_cases()
    before = float(whole_loss(network, x, y))
    optimizer, damping_rule = baselines.standard_hessian_free(damping=1.0, curvature=curvature, seed=0)
    model = HFModel(network)
    model.compile(optimizer=optimizer, loss=squares)
    history = model.fit(x, y, epochs=15, verbose=0, callbacks=[damping_rule]).history
    assert float(whole_loss(network, x, y)) < 0.3 * before
    assert set(history["damping"]) == {1.0}
    assert set(history["num_cases"]) == {30}
