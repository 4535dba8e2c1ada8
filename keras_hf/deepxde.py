"""Problems of DeepXDE (Lu et al., 2021) for this package: geometry, equations, conditions and network stay as a script of DeepXDE has them.

    pip install "keras_hf[deepxde]"

A script goes on like this where it made a `dde.Model`:

    data = dde.data.PDE(geom, pde, bcs, num_domain=900, num_boundary=120)
    net = dde.nn.FNN([2, 32, 1], "tanh", "Glorot normal")
    pinn, (points, targets, weights) = as_pinn(data, net)
    model = HFModel(pinn)
    model.compile(loss="mse")
    model.fit(points, targets, sample_weight=weights, epochs=300)

A `dde.Model(data, net)` then predicts with the trained weights: the network is the same object.
"""

import os

import keras
import numpy as np
import tensorflow as tf

from keras_hf.common.replaced import replaced
from keras_hf.differentiation import taylor
from keras_hf.pinn import PINN

# DeepXDE reads it once, and asks for a file in the home folder without it.
os.environ.setdefault("DDE_BACKEND", "tensorflow")

try:
    import deepxde as dde
except ImportError as error:
    raise ImportError(
        '`keras_hf.deepxde` needs DeepXDE: `pip install "keras_hf[deepxde]"`, or `pip install deepxde`.'
    ) from error

if dde.backend.backend_name != "tensorflow":
    raise ImportError(
        "`keras_hf.deepxde` needs DeepXDE's backend for TensorFlow 2: set DDE_BACKEND=tensorflow in the environment before the import. "
        f"Received: DDE_BACKEND={dde.backend.backend_name}."
    )


def as_pinn(data, network, loss_weights=None, external_trainable_variables=()):
    """Returns a `PINN` whose loss is that of `dde.Model(data, network)`, and the inputs, targets and weights for `fit`.

    The loss of DeepXDE is the sum over equations and conditions of `loss weight * mean of squared residuals`. Points are those of `data` now: after
    `data.resample_train_points()` call it again.

    Args:
        data: `dde.data.PDE` or `dde.data.TimePDE`, of points, of equations, or of both.
        network: The network, such as `dde.nn.FNN`; its feature and output transforms are kept.
        loss_weights: List of positive floats, of the equations, then of the conditions, as `dde.Model.compile` takes them; `None` = ones.
        external_trainable_variables: List of `keras.Variable`: the unknown coefficients of an inverse problem, in place of `dde.Variable`.

    Derivatives by `dde.grad` are carried through the network's operations as `pinn.derivatives` are, for all outputs at once.

    Returns:
        A pair: the `PINN`, and what its `cases` returns.

    Raises:
        ValueError: If `data` is of another class, if a condition compares outputs of several points beyond a periodic one, if the weights do not fit,
            if an unknown coefficient is not a `keras.Variable`, or if `data` has auxiliary variables.
    """
    if not isinstance(data, dde.data.PDE) or isinstance(data, dde.data.IDE | dde.data.FPDE):
        raise ValueError(
            "`data` must be a `dde.data.PDE` or a `dde.data.TimePDE`, whose residuals are of one point each; integro-differential and fractional "
            f"equations compare many. Received: {type(data).__name__}."
        )
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
    terms = {name: _by_series(residual) for name, residual in terms.items()}
    # The second half of a point belongs to its condition.
    pinn = PINN(
        network, terms, features=lambda p: p[:, :dim], external_trainable_variables=external_trainable_variables
    )
    return pinn, pinn.cases(points, shares)


def _by_series(residual):
    """A term whose derivatives by `dde.grad` are Taylor series, and which DeepXDE forgets: it would keep derivatives of every trace."""

    def term(u, points):
        found = _BySeries()
        with replaced((dde.grad, "jacobian", found.jacobian), (dde.grad, "hessian", found.hessian)):
            values = residual(u, points)
        dde.gradients.clear()
        return values

    return term


class _BySeries:
    """DeepXDE's `dde.grad.jacobian` and `hessian`, of the tensors of one term; its own where an operation has no rule."""

    def __init__(self):
        self._jacobian, self._hessian = dde.grad.jacobian, dde.grad.hessian
        # Derivatives, dicts from indices, by what they are of; and of what each derivative that was given is one.
        self._known, self._origins = {}, {}

    def jacobian(self, ys, xs, i=None, j=None):
        is_one = ys.shape[-1] == 1 and xs.shape[-1] == 1
        if (i is None and j is None and not is_one) or not self._has(ys, xs, [i or 0], [j or 0]):
            return self._jacobian(ys, xs, i, j)
        if j is None:
            columns = [self._derivative(ys, xs, i or 0, (column,)) for column in range(xs.shape[1])]
        else:
            columns = [self._derivative(ys, xs, row, (j,)) for row in (range(ys.shape[1]) if i is None else [i])]
        if any(column is None for column in columns):
            return self._jacobian(ys, xs, i, j)
        return columns[0] if len(columns) == 1 else tf.concat(columns, 1)

    def hessian(self, ys, xs, component=0, i=0, j=0):
        found = self._derivative(ys, xs, component, (i, j)) if self._has(ys, xs, [component], [i, j]) else None
        return self._hessian(ys, xs, component, i, j) if found is None else found

    def _has(self, ys, xs, rows, columns):
        """Whether these are tensors of a graph that have such rows and columns; DeepXDE says what is wrong with others."""
        if tf.executing_eagerly() or ys.shape.rank != 2:
            return False
        return all(0 <= row < ys.shape[1] for row in rows) and all(0 <= column < xs.shape[1] for column in columns)

    def _derivative(self, ys, xs, row, columns):
        """One derivative, `(N, 1)`, by way of what ys itself is a derivative of; `None` where an operation has no rule."""
        base, row, before = self._origins.get((ys.ref(), xs.ref()), (ys, row, ()))
        index = tuple(sorted(before + columns))
        # All first derivatives together: few equations have one of them alone.
        wanted = frozenset((column,) for column in range(xs.shape[1])) if len(index) == 1 else frozenset([index])
        key = base.ref(), xs.ref(), wanted
        if key not in self._known:
            self._known[key] = taylor.derivatives_of(base, xs, wanted)
        if self._known[key] is None:
            return None
        found = self._known[key][index][:, row : row + 1]
        self._origins[found.ref(), xs.ref()] = base, row, index
        return found


def _equations(pde, u, points):
    """The residuals of the equations, a list of tensors `(N, m)`."""
    found = pde(points, u(points))
    return list(found) if isinstance(found, list | tuple) else [found]


def _sizes_of_equations(data, network):
    """The columns of every equation's residual, a list of integers."""
    point = tf.constant(data.train_x_all[:1], keras.config.floatx())
    sizes = []

    def of_point(u, p):
        residuals = _equations(data.pde, u, p)
        sizes.extend(residual.shape[1] for residual in residuals)
        return residuals

    tf.function(lambda p: _by_series(of_point)(network, p), autograph=False).get_concrete_function(point)
    return sizes


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
        return _as_column(condition.func(where, 0, len(where), None), where)

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
