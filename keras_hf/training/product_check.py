"""The self-check of products: what must hold of any right `v -> Gv`, and of the gradient, on the user's own network and cases."""

from typing import NamedTuple

import tensorflow as tf

from keras_hf.common.vectors import dot
from keras_hf.differentiation.curvature import Curvature, EmpiricalFisher, GaussNewton
from keras_hf.differentiation.linearization import DoubleBackward, ForwardAccumulation
from keras_hf.problem.replicas import on_replicas
from keras_hf.training.setup import with_objective

# Of the losses in differences, in machine epsilons.
_ROUNDINGS = 10.0


class ProductCheck(NamedTuple):
    """What one check found.

    Attributes:
        name: String, the fact that was checked.
        error: Float, by how much it fails, relative to what is compared; NaN where it could not be checked.
        tolerance: Float, what rounding explains.
        remark: String, why it could not be checked or what a failure means.
    """

    name: str
    error: float
    tolerance: float
    remark: str = ""

    @property
    def holds(self):
        """Whether the fact holds to rounding, or could not be checked."""
        return not self.error > self.tolerance

    def __str__(self):
        verdict = "-" if self.error != self.error else "ok" if self.holds else "FAILS"
        return f"{self.name:<28}{self.error:10.1e}  {verdict:<6}{self.remark if verdict != 'ok' else ''}".rstrip()


class BothWays(NamedTuple):
    """A curvature fitted to a network, and what its products are compared with.

    Attributes:
        curvature: `curvature.Curvature`.
        other: The same curvature by the other linearization; `None` where there is none.
        missing: String, why there is none.
    """

    curvature: Curvature
    other: Curvature | None
    missing: str = ""


class Errors(NamedTuple):
    """Relative errors of the checks, float64 scalars, as a compiled function gives them."""

    determinism: tf.Tensor
    linearity: tf.Tensor
    symmetry: tf.Tensor
    negativity: tf.Tensor
    adjointness: tf.Tensor
    other_way: tf.Tensor
    slope: tf.Tensor


def first_check(objective, setup, optimizer):
    """Computes what must agree with an update on the same cases: cost of about three gradients.

    Args:
        objective: `objective.Objective`.
        setup: `setup.Setup`.
        optimizer: `HessianFree`.

    Returns:
        The loss, and by how much the solver's product with a random vector fails what must hold of it, 0 where nothing is known: float64 scalars.
    """
    curvature, _ = setup.curvature.prepared(objective, optimizer.state().curvature)
    loss = objective.loss()
    # In sequence: memory is that of one pass.
    with tf.control_dependencies([loss]):
        v = tf.random.stateless_normal([objective.num_weights], [0, 1], dtype=objective.dtype)
    error = setup.solver.product_error(objective, curvature, v)
    return loss, tf.zeros([], tf.float64) if error is None else error


def checked_products(setup, optimizer, data, strategy):
    """Computes all checks of the products on some cases, as a program of its own.

    Args:
        setup: `setup.Setup` for these cases.
        optimizer: `HessianFree`, built.
        data: `Data`.
        strategy: `tf.distribute.Strategy` of the model.

    Returns:
        `BothWays` and a list of `ProductCheck`.
    """
    compared = both_ways(setup.curvature, setup.structure)

    def of(objective):
        state = optimizer.state().curvature
        prepared = [
            curvature and curvature.prepared(objective, state)[0] for curvature in (compared.curvature, compared.other)
        ]
        return product_errors(objective, *prepared)

    def errors():
        return with_objective(setup, data, of)

    found = tf.nest.map_structure(float, tf.function(on_replicas(strategy, errors), autograph=False)())
    return compared, judged(found, setup.structure.rounding, compared)


def product_errors(objective, curvature, other):
    """Computes the errors of the products of a curvature, and of the gradient. Cost: about nine products.

    Args:
        objective: `objective.Objective`.
        curvature: `curvature.Curvature`.
        other: The same curvature by another linearization, or `None`.

    Returns:
        An `Errors`.
    """
    zero = tf.zeros([objective.num_weights], objective.dtype)
    u, v = (tf.random.stateless_normal(zero.shape, [seed, 1], dtype=objective.dtype) for seed in (0, 1))
    product = objective.product(curvature)
    of_u, of_v, again = product(u), product(v), product(v)
    at_start = objective.loss_and_gradient()
    losses = at_start.loss, objective.loss_at(zero)
    # A repeated loss may be summed in another order, a repeated product not.
    repeated = tf.maximum(
        _difference(of_v, again), tf.abs(losses[0] - losses[1]) / tf.maximum(tf.abs(losses[0]), 1e-300)
    )
    combined = product(2 * u - 3 * v)
    bilinear = tf.abs(dot(u, of_v) - dot(v, of_u)) / tf.maximum(_norm(u) * _norm(of_v) + _norm(v) * _norm(of_u), 1e-300)
    negative = tf.maximum(-dot(v, of_v), 0.0) / tf.maximum(_norm(v) * _norm(of_v), 1e-300)
    missing = tf.constant(float("nan"), tf.float64)
    error = product.error(v)
    return Errors(
        determinism=repeated,
        linearity=_difference(combined, 2 * of_u - 3 * of_v),
        symmetry=bilinear,
        negativity=negative,
        adjointness=missing if error is None else error,
        other_way=missing if other is None else _difference(of_v, objective.product(other)(v)),
        slope=_slope_error(objective, at_start),
    )


def _slope_error(objective, at_start):
    """Returns by how much the loss' slope along the gradient differs from the gradient's norm, relative to that, a float64 scalar.

    By differences over two widths: what they disagree by, and what rounding may do to them, is no error.
    """
    slope, width = _norm(at_start.gradient), objective.epsilon ** (1 / 3)
    v = tf.math.divide_no_nan(at_start.gradient, tf.cast(slope, objective.dtype))
    wide, narrow = (objective.slope_along(v, tf.constant(w, objective.dtype)) for w in (width, width / 2))
    unsure = tf.abs(wide - narrow) + _ROUNDINGS * objective.epsilon * tf.abs(at_start.loss) / width
    return tf.math.divide_no_nan(tf.maximum(tf.abs((4 * narrow - wide) / 3 - slope) - unsure, 0.0), slope)


def both_ways(curvature, structure):
    """Returns `BothWays` of a curvature fitted to a network.

    Args:
        curvature: `curvature.Curvature`, fitted.
        structure: `structure.Structure` of the traced network.
    """
    if curvature.linearization is None:
        return BothWays(curvature, None, "this curvature is made without one")
    is_forward = isinstance(curvature.linearization, ForwardAccumulation)
    other = DoubleBackward() if is_forward else ForwardAccumulation()
    try:
        return BothWays(curvature, curvature.by(other.fitted_to(structure)))
    except ValueError:
        return BothWays(curvature, None, "forward accumulation would be wrong for this network")


def judged(errors, rounding, compared):
    """Adds names, tolerances and remarks to `Errors`.

    Args:
        errors: `Errors` of floats.
        rounding: Float, the tolerance.
        compared: `BothWays`, what the errors are of.

    Returns:
        List of `ProductCheck`.
    """
    remarks = {
        "determinism": "draw random numbers from a `keras.random.SeedGenerator`; let nothing depend on how often `call` ran",
        "negativity": "the loss is not convex in what it is cut at: see `negative_curvature` in the logs",
        "adjointness": "TensorFlow has a wrong second derivative of an operation; see docs/support.md",
        "other_way": compared.missing,
        "slope": "a layer stops a gradient or gives another: steps are judged by a loss that the gradient is not of",
    }
    if not isinstance(compared.curvature, (GaussNewton, EmpiricalFisher)):
        remarks["adjointness"] = "this curvature is not made of J"
        remarks["negativity"] = "expected: a Hessian is indefinite away from a minimum"
    names = {
        "determinism": "two calls agree",
        "linearity": "G(2u - 3v) = 2Gu - 3Gv",
        "symmetry": "u'Gv = v'Gu",
        "negativity": "v'Gv >= 0",
        "adjointness": "u'(Jv) = (J'u)'v",
        "other_way": "both linearizations agree",
        "slope": "the gradient is the loss'",
    }
    return [
        ProductCheck(name, float(getattr(errors, field)), rounding, remarks.get(field, ""))
        for field, name in names.items()
    ]


def report(network, curvature, checks):
    """Returns the checks as lines of text.

    Args:
        network: String, the network's name.
        curvature: `curvature.Curvature`, fitted to the network.
        checks: List of `ProductCheck`.
    """
    parts = [type(part).__name__ for part in (curvature, curvature.linearization) if part is not None]
    return "\n  ".join([f"Products for '{network}', {', '.join(parts)}:", *map(str, checks)])


def _norm(vector):
    return tf.sqrt(dot(vector, vector))


def _difference(a, b):
    return tf.math.divide_no_nan(_norm(a - b), tf.maximum(_norm(a), _norm(b)))
