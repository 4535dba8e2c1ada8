"""What must hold of every program: each property is one function of a program's names, which a reproduction holds beside it."""

import numpy as np

from fuzz.oracles import Dense, close, flat, kept, loss_of


def loss_gradient_and_product(model, network, top, cut, x, y, sample_weight):
    f = model.objective(x, y, sample_weight)
    before = flat(network.variables)
    loss, gradient = f.loss_and_gradient(f.weights)
    dense = Dense(network, [top], [cut], x, y, sample_weight)
    close("loss", loss, dense.loss)
    close("gradient", gradient, dense.gradient, scale=abs(loss))
    for v in np.random.default_rng(1).normal(size=(2, gradient.size)):
        size = np.abs(dense.curvature).max() + abs(loss)
        close("product", f.product(f.weights, v), dense.curvature @ v, scale=size)
    assert np.array_equal(flat(network.variables), before), "products changed the network"


def jacobian(model, network, top, cut, x, y, sample_weight):
    f = model.objective(x, y, sample_weight)
    residuals, rows = f.residuals(f.weights), f.jacobian(f.weights)
    dense = Dense(network, [top], [cut], x, y, sample_weight)
    close("half the squared residuals", residuals @ residuals / 2, dense.loss)
    close("J'r", rows.T @ residuals, dense.gradient, scale=dense.loss)
    close("J'J", rows.T @ rows, dense.curvature, scale=dense.loss)


def update(model, network, top, cut, x, y, sample_weight):
    dense = Dense(network, [top], [cut], x, y, sample_weight)
    before, w = loss_of(network, x, y, sample_weight), flat(network.trainable_variables)
    fixed = [v for v in network.non_trainable_variables if "moving" not in v.name]
    fixed = [(v, v.numpy()) for v in fixed if "seed" not in v.name]
    logs = model.fit(x, y, sample_weight=sample_weight, verbose=0).history
    for variable, value in fixed:
        assert np.array_equal(variable.numpy(), value), f"{variable.path} is not trained, but changed"
    with kept(network):
        after = loss_of(network, x, y, sample_weight)
    assert after <= before + 1e-9 * abs(before), f"an update raised the loss of its cases from {before} to {after}"
    close("logged loss", logs["loss"][0], before)
    size = (logs["arc_step"] if "arc_step" in logs else logs["step_size"])[0]
    step = flat(network.trainable_variables) - w
    if size == 0 or not np.any(step):
        assert np.array_equal(step, 0 * step), "a rejected step changed weights"
        return
    order = getattr(model.solver, "order", 1)
    curved = np.linalg.eigvalsh(dense.curvature)[0] > -1e-8 * (1 + abs(before))
    if order > 1 or not curved:
        return
    # Of the unscaled step, which minimises the quadratic along itself.
    step, damped = step / size, dense.curvature + 0.1 * np.eye(step.size)
    slope = step @ dense.gradient
    # Plain conjugate gradients in NumPy, too, lose six digits of this to rounding within a dozen iterations.
    close("slope at the step's end", slope + step @ damped @ step, 0.0, 1e-4, scale=abs(slope))
    if "arc_step" in logs:
        close("exact step", step, dense.step(0.1), 1e-6)


PROPERTIES = (loss_gradient_and_product, jacobian, update)


def holds_for(program):
    """The properties that are defined for a program."""
    squares = program.has_squares
    return [check for check in PROPERTIES if check is not jacobian or squares]
