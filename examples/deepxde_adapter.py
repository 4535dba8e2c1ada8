"""A problem of DeepXDE, trained by this package: its geometry, equation, conditions and network stay as they are.

    pip install ".[deepxde]"
    python -m examples.deepxde_adapter --seconds 20 --out runs/deepxde

trains a Poisson equation with a Dirichlet, a Neumann and a periodic condition, beside DeepXDE's own Adam and L-BFGS, from the same weights.

A script of DeepXDE goes on like this where it made a `dde.Model`:

    dde.config.set_default_float("float64")
    keras.config.set_dtype_policy("float64")  # of the layers of `net`
    data = dde.data.PDE(geom, pde, bcs, num_domain=900, num_boundary=120)
    net = dde.nn.FNN([2, 32, 1], "tanh", "Glorot normal")
    pinn, (points, targets, weights) = as_pinn(data, net)
    model = HFModel(pinn)
    model.compile(loss="mse")
    model.fit(points, targets, sample_weight=weights, epochs=300)

A `dde.Model(data, net)` then predicts with the trained weights: the network is the same object.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# DeepXDE reads it once, and asks for a file in the home folder without it.
os.environ.setdefault("DDE_BACKEND", "tensorflow")

import deepxde as dde  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from examples.tables import write_rows  # noqa: E402
from keras_hf import HFModel, LevenbergMarquardt  # noqa: E402
from keras_hf.pinn import PINN  # noqa: E402


def as_pinn(data, network, loss_weights=None, external_trainable_variables=()):
    """Returns a `PINN` whose loss is that of `dde.Model(data, network)`, and the inputs, targets and weights for `fit`.

    The loss of DeepXDE is the sum over equations and conditions of `loss weight * mean of squared residuals`. Points are those of `data` now: after
    `data.resample_train_points()` call it again.

    Args:
        data: `dde.data.PDE` or `dde.data.TimePDE`.
        network: The network, such as `dde.nn.FNN`; its feature and output transforms are kept.
        loss_weights: List of positive floats, of the equations, then of the conditions, as `dde.Model.compile` takes them; `None` = ones.
        external_trainable_variables: List of `keras.Variable`: the unknown coefficients of an inverse problem, in place of `dde.Variable`.

    Raises:
        ValueError: If a condition is of a class that compares outputs of several points beyond a periodic one, if the weights do not fit, if an
            unknown coefficient is not a `keras.Variable`, or if `data` has auxiliary variables.
    """
    for variable in external_trainable_variables:
        if not isinstance(variable, keras.Variable):
            raise ValueError(
                "`external_trainable_variables` must hold `keras.Variable`s, which Keras can train and save: "
                f"`keras.Variable(2.0)` in place of `dde.Variable(2.0)`. Received: {type(variable).__name__}."
            )
    if data.auxiliary_var_fn is not None:
        raise ValueError(
            "`data` must have no `auxiliary_var_function`: its numbers belong into the network's inputs, as further coordinates."
        )
    dim = data.train_x.shape[1]
    network(np.zeros((1, dim), keras.config.floatx()))  # makes its weights
    starts = np.cumsum([0, *data.num_bcs])
    conditions = [
        _condition(condition, data.train_x[begin:end], dim)
        for condition, begin, end in zip(data.bcs, starts[:-1], starts[1:], strict=True)
    ]
    sizes = _sizes_of_equations(data, network) if data.pde is not None else []
    num_equations = len(sizes)
    weights = [1.0] * (num_equations + len(conditions)) if loss_weights is None else list(loss_weights)
    if len(weights) != num_equations + len(conditions):
        raise ValueError(
            f"`loss_weights` must hold {num_equations} weights of equations, then {len(conditions)} of conditions. Received: {weights}."
        )
    terms, points, shares = {}, {}, {}
    for place, (residual, where, values) in enumerate(conditions):
        name = f"condition_{place}"
        terms[name], points[name], shares[name] = residual, (where, values), weights[num_equations + place]
    if num_equations:
        # The mean of DeepXDE is over points and over the columns of an equation, that of a `PINN` over the columns of all.
        roots = np.sqrt(np.repeat(np.divide(weights[:num_equations], sizes), sizes))
        terms["equation"] = lambda u, p: tf.concat(_equations(data.pde, u, p[:, :dim]), 1) * tf.constant(roots, p.dtype)
        points["equation"], shares["equation"] = _extended(data.train_x_all, None, dim), float(sum(sizes))
    terms = {name: _forgetful(residual) for name, residual in terms.items()}
    # The second half of a point belongs to its condition.
    pinn = PINN(
        network, terms, features=lambda p: p[:, :dim], external_trainable_variables=external_trainable_variables
    )
    return pinn, pinn.cases(points, shares)


def _forgetful(residual):
    """A term after which DeepXDE forgets the derivatives: it would keep each, by the tensors of the trace that it is of."""

    def term(u, points):
        found = residual(u, points)
        dde.gradients.clear()
        return found

    return term


def _equations(pde, u, points):
    """The residuals of the equations, a list of tensors `(N, m)`."""
    found = pde(points, u(points))
    return list(found) if isinstance(found, list | tuple) else [found]


def _sizes_of_equations(data, network):
    """The columns of every equation's residual, a list of integers."""
    point = tf.constant(data.train_x_all[:1], keras.config.floatx())
    residuals = tf.function(lambda p: _equations(data.pde, network, p), autograph=False)(point)
    return [residual.shape[1] for residual in residuals]


def _condition(condition, where, dim):
    """A condition as a term `(u, points) -> residual`, its points `(N, 2 d)`, and the values it is to have.

    The columns beyond the first d are the outward normal at the point, or the point that a periodic condition compares it with.
    """
    component = getattr(condition, "component", 0)
    column = slice(component, component + 1)

    def slope(u, points):
        """The derivative by the outward normal, `(N, 1)`."""
        inputs = points[:, :dim]
        gradient = dde.grad.jacobian(u(inputs), inputs, i=component)
        return tf.reduce_sum(gradient * points[:, dim:], 1, keepdims=True)

    def normals():
        return condition.geom.boundary_normal(where)

    def values():
        return np.asarray(condition.func(where, 0, len(where), None))

    if isinstance(condition, dde.icbc.DirichletBC | dde.icbc.IC):
        return lambda u, p: u(p)[:, column], _extended(where, None, dim), values()
    if isinstance(condition, dde.icbc.PointSetBC):
        return lambda u, p: u(p)[:, column], _extended(where, None, dim), _as_column(condition.values, where)
    if isinstance(condition, dde.icbc.NeumannBC):
        return slope, _extended(where, normals(), dim), values()
    if isinstance(condition, dde.icbc.RobinBC):
        residual = lambda u, p: slope(u, p) - condition.func(p[:, :dim], u(p))  # noqa: E731
        return residual, _extended(where, normals(), dim), None
    if isinstance(condition, dde.icbc.PeriodicBC):
        here, there = np.split(where, 2)

        def compared(u, side):
            if condition.derivative_order == 0:
                return u(side)[:, column]
            return dde.grad.jacobian(u(side), side, i=component, j=condition.component_x)

        difference = lambda u, p: compared(u, p[:, :dim]) - compared(u, p[:, dim:])  # noqa: E731
        return difference, _extended(here, there, dim), None
    if isinstance(condition, dde.icbc.OperatorBC | dde.icbc.PointSetOperatorBC):
        target = _as_column(condition.values, where) if isinstance(condition, dde.icbc.PointSetOperatorBC) else None

        def of_operator(u, points):
            inputs = points[:, :dim]
            return condition.func(inputs, u(inputs), inputs)

        return of_operator, _extended(where, None, dim), target
    raise ValueError(
        "Conditions must be residuals of a point: DirichletBC, NeumannBC, RobinBC, PeriodicBC, OperatorBC, PointSetBC, PointSetOperatorBC, IC. "
        f"Received: {type(condition).__name__}."
    )


def _extended(where, more, dim):
    """Points `(N, 2 d)`: d more columns, zero where a condition needs none."""
    where = np.asarray(where)
    return np.concatenate([where, np.zeros((len(where), dim)) if more is None else np.asarray(more)], 1)


def _as_column(values, where):
    return np.broadcast_to(np.asarray(values).reshape(-1, 1), (len(where), 1))


def solution(x):
    """The solution of the example, `cos(2 pi x) sin(pi y / 2)`: 0 at y = 0, slope 0 at y = 1, periodic in x."""
    return np.cos(2 * np.pi * x[:, :1]) * np.sin(0.5 * np.pi * x[:, 1:])


def problem():
    """The Poisson equation on the unit square, as a script of DeepXDE has it."""
    geom = dde.geometry.Rectangle([0, 0], [1, 1])

    def pde(x, u):
        laplacian = dde.grad.hessian(u, x, i=0, j=0) + dde.grad.hessian(u, x, i=1, j=1)
        return laplacian + 4.25 * np.pi**2 * tf.cos(2 * np.pi * x[:, :1]) * tf.sin(0.5 * np.pi * x[:, 1:])

    is_at = lambda column, value: lambda x, on: on and dde.utils.isclose(x[column], value)  # noqa: E731
    conditions = [
        dde.icbc.DirichletBC(geom, lambda x: np.zeros((len(x), 1)), is_at(1, 0)),
        dde.icbc.NeumannBC(geom, lambda x: np.zeros((len(x), 1)), is_at(1, 1)),
        dde.icbc.PeriodicBC(geom, 0, is_at(0, 0)),
        dde.icbc.PeriodicBC(geom, 0, is_at(0, 0), derivative_order=1),
    ]
    return dde.data.PDE(geom, pde, conditions, num_domain=900, num_boundary=120, solution=solution)


def by_deepxde(data, network, seconds):
    """DeepXDE's usual course: half of the time Adam, then L-BFGS, 100 iterations at a time until the time is up."""
    model, start = dde.Model(data, network), time.perf_counter()
    model.compile("adam", lr=1e-3)
    half = dde.callbacks.Timer(seconds / 2 / 60)
    model.train(iterations=10**9, display_every=10**9, callbacks=[half], verbose=0)
    dde.optimizers.set_LBFGS_options(maxiter=100)
    while time.perf_counter() < start + seconds:
        model.compile("L-BFGS")
        model.train(display_every=10**9, verbose=0)


def by_hessian_free(data, network, seconds):
    """The same loss by `HessianFree`, with its defaults."""
    start = time.perf_counter()
    pinn, (points, targets, weights) = as_pinn(data, network)
    model = HFModel(pinn)
    model.compile(loss="mse")

    def stop(epoch, logs):
        model.stop_training = time.perf_counter() >= start + seconds

    callbacks = [LevenbergMarquardt(), keras.callbacks.LambdaCallback(on_epoch_end=stop)]
    model.fit(points, targets, sample_weight=weights, epochs=10**9, callbacks=callbacks, verbose=0)


METHODS = {"deepxde": by_deepxde, "keras_hf": by_hessian_free}


def main(arguments=None):
    """Trains by both libraries from the same weights, and prints the relative errors."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of training, tracing included, for each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/deepxde"))
    options = parser.parse_args(arguments)

    dde.config.set_default_float("float64")
    keras.config.set_dtype_policy("float64")
    test = dde.geometry.Rectangle([0, 0], [1, 1]).uniform_points(10_000)
    rows = []
    for method, train in METHODS.items():
        keras.utils.set_random_seed(options.seed)
        data, network = problem(), dde.nn.FNN([2, 32, 1], "tanh", "Glorot normal")
        start = time.perf_counter()
        train(data, network, options.seconds)
        seconds = time.perf_counter() - start
        error = float(dde.metrics.l2_relative_error(solution(test), np.asarray(network(test))))
        rows.append({"method": method, "seed": options.seed, "seconds": seconds, "error": error})
        print(f"{method}: relative error {error:.1e} after {seconds:.0f} s", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(options.out / "errors.csv", rows)


if __name__ == "__main__":
    main()
