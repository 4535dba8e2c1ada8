"""What the door for DeepXDE promises: the loss that DeepXDE forms, and the network trained in place."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import Clock, fit

from examples import deepxde_adapter
from keras_hf import HessianFree, HFModel, deepxde
from keras_hf.deepxde import as_pinn, dde

SQUARE = dde.geometry.Rectangle([0, 0], [1, 1])
# What DeepXDE prints is not a warning; corners have no normal.
CORNERS = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])


@pytest.fixture(autouse=True)
def float64_in_deepxde(float64):
    dde.config.set_default_float("float64")


def is_at(column, value):
    return lambda x, on: on and bool(np.isclose(x[column], value))


def network(num_inputs=2, num_outputs=2):
    return dde.nn.FNN([num_inputs, 5, num_outputs], "tanh", "Glorot normal")


def two_equations(x, y):
    first = dde.grad.hessian(y, x, component=0, i=0, j=0) + y[:, 1:]
    return [first - x[:, :1], 3.0 * dde.grad.jacobian(y, x, i=1, j=0) * y]  # one column, and two


def one_equation(x, y):
    return dde.grad.jacobian(y, x, i=0, j=1) - dde.grad.hessian(y, x, component=0, i=0, j=0)


def dirichlet():
    return dde.icbc.DirichletBC(SQUARE, lambda x: x[:, 1:] ** 2, is_at(0, 0), component=1)


def all_conditions():
    """One of every kind, and of every kind of values at points."""
    product = lambda x, y, _: dde.grad.jacobian(y, x, i=0, j=1) * x[:, :1]  # noqa: E731
    observed = np.array([[0.2, 0.3], [0.7, 0.1], [0.5, 0.5]])
    return [
        dirichlet(),
        dde.icbc.NeumannBC(SQUARE, lambda x: x[:, :1], lambda x, on: on, component=1),
        dde.icbc.RobinBC(SQUARE, lambda x, y: y[:, :1] ** 2 + x[:, 1:], is_at(1, 1)),
        dde.icbc.PeriodicBC(SQUARE, 0, is_at(0, 0), component=1),
        dde.icbc.PeriodicBC(SQUARE, 1, is_at(1, 0), derivative_order=1, component=1),
        dde.icbc.OperatorBC(SQUARE, product, is_at(0, 1)),
        dde.icbc.PointSetBC(observed, np.array([[1.0], [2.0], [-1.0]]), component=1),
        dde.icbc.PointSetBC(observed, 2.0),
        dde.icbc.PointSetOperatorBC(observed, np.array([[1.0], [0.0], [2.0]]), lambda x, y, _: y[:, :1] * y[:, 1:]),
    ]


def losses_of_both(data, net, loss_weights=None):
    """The loss of DeepXDE's own model, and that of ours."""
    pinn, (points, targets, weights) = as_pinn(data, net, loss_weights)
    model = HFModel(pinn)
    model.compile(loss="mse")
    theirs = dde.Model(data, net)
    theirs.compile("adam", lr=1e-3, loss_weights=loss_weights, verbose=0)
    losses = theirs.outputs_losses_train(data.train_x, data.train_y, data.train_aux_vars)[1]
    return float(np.sum(losses)), model.evaluate(points, targets, sample_weight=weights, verbose=0)


def test_loss_of_equations_and_conditions_of_all_kinds_is_that_of_deepxde():
    conditions = all_conditions()
    data = dde.data.PDE(SQUARE, two_equations, conditions, num_domain=20, num_boundary=16, exclusions=CORNERS)
    # As large as each other, none of the eleven terms is lost in the rounding of the rest.
    expected, found = losses_of_both(data, network(), np.linspace(0.5, 3.0, 2 + len(conditions)).tolist())
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_loss_of_a_problem_in_time_is_that_of_deepxde():
    area = dde.geometry.GeometryXTime(dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 1))
    conditions = [
        dde.icbc.DirichletBC(area, lambda x: 0 * x[:, :1], lambda _, on: on),
        dde.icbc.IC(area, lambda x: -np.sin(np.pi * x[:, :1]), lambda _, on: on),
        dde.icbc.NeumannBC(area, lambda x: x[:, 1:], lambda _, on: on),
    ]
    data = dde.data.TimePDE(area, one_equation, conditions, num_domain=20, num_boundary=8, num_initial=6)
    net = network(num_outputs=1)
    net.apply_output_transform(lambda x, y: x[:, 1:] * y + x[:, :1])
    expected, found = losses_of_both(data, net)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "value",
    [lambda x: 0.5, lambda x: np.full(len(x), 0.5), lambda x: tf.fill([len(x), 1], tf.constant(0.5, "float64"))],
)
def test_a_condition_has_the_values_of_a_number_an_array_or_a_tensor(value):
    data = dde.data.PDE(
        SQUARE, one_equation, dde.icbc.DirichletBC(SQUARE, value, is_at(0, 0)), num_domain=9, num_boundary=12
    )
    _, (_, targets, _) = as_pinn(data, network())
    assert set(targets.ravel()) == {0.0, 0.5}


def test_derivatives_by_deepxde_are_series_of_what_they_are_derivatives_of(monkeypatch):
    """Of the fourth order by two of the second, of three outputs, a column, a row and one entry alone."""
    net, points = network(num_outputs=3), tf.constant(np.random.default_rng(0).uniform(size=(4, 2)))
    net(points)

    def derivatives(x, y):
        second = dde.grad.hessian(y, x, component=2, i=0, j=1)
        rows = dde.grad.jacobian(y, x, i=1), dde.grad.jacobian(y, x, i=1, j=0), dde.grad.jacobian(second, x, i=0, j=1)
        return [dde.grad.hessian(second, x, i=0, j=0), *rows, second]

    compiled = lambda term: tf.function(lambda p: term(net, p), autograph=False)(points)  # noqa: E731
    term = lambda u, p: derivatives(p, u(p))  # noqa: E731
    expected = compiled(term)
    dde.gradients.clear()
    monkeypatch.setattr(
        dde.gradients.gradients_reverse.JacobianReverse, "__call__", None
    )  # DeepXDE's own are not asked
    for found, value in zip(compiled(deepxde._by_series(term)), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-10, atol=1e-12)


def test_the_network_is_trained_in_place_and_a_coefficient_is_found():
    coefficient = keras.Variable(0.5, dtype="float64")

    def decay(t, y):
        return dde.grad.jacobian(y, t, i=0, j=0) + coefficient * y

    line = dde.geometry.Interval(0, 1)
    times = np.linspace(0, 1, 11)[:, None]
    data = dde.data.PDE(line, decay, dde.icbc.PointSetBC(times, np.exp(-2 * times)), num_domain=30, num_boundary=2)
    net = network(1, 1)
    pinn, (points, targets, weights) = as_pinn(data, net, external_trainable_variables=[coefficient])
    model = HFModel(pinn)
    model.compile(optimizer=HessianFree(), loss="mse")
    fit(model, points, targets, sample_weight=weights, epochs=60)
    np.testing.assert_allclose(coefficient.numpy(), 2.0, atol=1e-4)
    theirs = dde.Model(data, net)
    theirs.compile("adam", lr=1e-3, verbose=0)
    np.testing.assert_allclose(theirs.predict(times), np.exp(-2 * times), atol=1e-4)


def test_what_cannot_be_taken_is_refused_by_name():
    line = dde.geometry.Interval(0, 1)
    integral = dde.data.IDE(line, lambda x, y, z: y, [], quad_deg=3, num_domain=5)
    with pytest.raises(ValueError, match="integro-differential and fractional equations compare many. Received: IDE"):
        as_pinn(integral, network(1, 1))
    conditions = [dde.icbc.Interface2DBC(SQUARE, lambda x: 0 * x[:, :1], is_at(0, 0), is_at(0, 1))]
    data = dde.data.PDE(SQUARE, two_equations, conditions, num_domain=10, num_boundary=12)
    with pytest.raises(ValueError, match="residuals of a point.*Interface2DBC"):
        as_pinn(data, network())
    data = dde.data.PDE(SQUARE, two_equations, dirichlet(), num_domain=10, num_boundary=12)
    with pytest.raises(ValueError, match="2 weights of equations, then 1 of conditions"):
        as_pinn(data, network(), [1.0, 1.0])
    auxiliary = dde.data.PDE(SQUARE, lambda x, y, z: z * y, [], num_domain=9, auxiliary_var_function=lambda x: x[:, :1])
    with pytest.raises(ValueError, match="no `auxiliary_var_function`"):
        as_pinn(auxiliary, network())
    with pytest.raises(ValueError, match=r"keras.Variable\(2.0\)"):
        as_pinn(data, network(), external_trainable_variables=[tf.Variable(2.0)])


@pytest.mark.slow
def test_the_command_compares_both_in_the_same_seconds(tmp_path, monkeypatch):
    # A second passes at every look at the clock: two steps of Adam and a call of L-BFGS, and two updates of ours.
    for module in (deepxde_adapter, dde.callbacks):
        monkeypatch.setattr(module, "time", Clock(step=1.0))
    set_options = dde.optimizers.set_LBFGS_options
    monkeypatch.setattr(dde.optimizers, "set_LBFGS_options", lambda maxiter: set_options(maxiter=2))
    deepxde_adapter.main(["--seconds", "2", "--out", str(tmp_path)])
    rows = [line.split(",") for line in (tmp_path / "errors.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["method", "deepxde", "keras_hf"]
    assert [float(row[2]) for row in rows[1:]] == [4.0, 4.0]
    assert all(np.isfinite(float(row[3])) for row in rows[1:])
