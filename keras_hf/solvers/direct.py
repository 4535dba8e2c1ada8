"""The exact solver: the damped Gauss-Newton system by factorization, geodesic acceleration and its next orders, and a search along the arc.

For small networks: the best step of the quadratic model costs less than the products of CG. Levenberg (1944), Marquardt (1963), Transtrum & Sethna
(2012).
"""

import functools
import math

import keras
import numpy as np
import tensorflow as tf

from keras_hf.common.checks import integer
from keras_hf.common.vectors import epsilon, row_gram
from keras_hf.solvers.factorized import LEAST_DAMPING_POWER, dual_solver, primal_solver
from keras_hf.solvers.search import coarse_to_fine, least_loss
from keras_hf.solvers.solver import Path, Solver

# The places on the arc at which the loss is looked up.
_ARC = 2.0 ** -np.arange(0.0, 10.5, 0.5)
_MOST_TERMS = 4


@keras.saving.register_keras_serializable("keras_hf")
class DirectSolver(Solver):
    """Exact damped Gauss-Newton steps along an arc of up to fourth order, for small networks.

    The Jacobian B of the outputs, its rows weighted by a root of the loss's second derivative, is formed by one vectorised gradient per case and
    output. With `G = B'B` and the regularizers' second derivative in it,

        c_1 = -(G + damping I)^-1 g                the step of Levenberg and Marquardt
        c_2 = -(G + damping I)^-1 J'H f^(2)        the geodesic acceleration
        c_3 = -(G + damping I)^-1 J'H f^(3)
        c_4 = -(G + damping I)^-1 J'H f^(4)
        candidates: t c_1 + t^2/2 c_2 + t^3/6 c_3 + t^4/24 c_4,  t = 1, 2^-0.5, ..., 2^-10

    where f^(k) is the derivative of order k, at t = 0, of the outputs along the arc of the terms before: f^(2) the second directional derivative
    along c_1. Without damping the outputs would go straight along an arc of infinite order, and residuals shrink as 1 - t. The more terms, the
    farther the arc is valid: with four, steps are larger at smaller dampings than with two (docs/measured-equations.md has the measurements).
    Candidates are evaluated in vectorised passes, the powers of 2 and then the neighbours of the best; that of least loss is taken, if it is less
    than the loss at the start. The system is factorized once, in the space of weights (n by n) or of rows (rows by rows), whichever is smaller. Where
    the damping is lost in the rounding of `B'B`, B is factorized instead. Weights at a bound, beyond which the loss falls, are left out; see `Box`.

    Every update uses all cases of its batch: give `fit` all cases in one batch. The system is in float64 whatever the network computes in, but for
    recurrent ones; a network in float32 ends at a relative accuracy of 1e-5 to 1e-4, so use float64 where digits count
    (`keras.config.set_floatx("float64")`). `LevenbergMarquardt` adapts the damping by how far along the arc the step was taken.

    For recurrent networks with few outputs per sequence, take `order=1` and about 1,000 outputs an update (docs/recurrent.md): layers of Keras'
    cells without dropout are vectorised over sequences, but second derivatives need TensorFlow's loops over lists.

    Logs: `arc_step` (t of the candidate taken), `acceleration` (norm of c_2 over that of c_1).

    Cost: the Jacobian, about as much as one or two gradients for each output of a case; `rows n min(rows, n)` multiplications and a factorization;
    about 17 forward passes; for the terms c_2, c_3 and c_4 about 4, 8 and 4 gradients. Memory: the Jacobian, up to 1 GiB; a larger one is formed
    anew in micro-batches.

    Args:
        order: Integer in [1, 4], the number of terms of the arc: 1 = a line, 2 = geodesic acceleration.

    Raises:
        ValueError: If `order` is not an integer in [1, 4]; at the first update, for networks in which cases do not have outputs of their own
            (BatchNormalization), which draw random numbers (Dropout), add losses in `call`, or compute in 16 bits; and for losses without a value
            per case (Dice) or whose values compare cases (Circle).

    References:
        Transtrum & Sethna (2012), *Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares minimization*; Mueller & Zeinhofer
        (2023), *Achieving high accuracy with PINNs via energy natural gradient descent*, for the search over powers of 2.
    """

    uses_all_cases = True
    forms_rows = True
    damps_hidden_states = False
    judged_by = "arc_step"
    steered_by = ("arc_step",)
    other_logs = ("acceleration",)
    evidence_interval = 5

    @staticmethod
    def least_damping(dtype):
        # The second is that of the system, which is in float64 but for recurrent networks.
        return max(Solver.least_damping(dtype), epsilon("float64") ** LEAST_DAMPING_POWER)

    @property
    def arc_band(self):
        # Along a line, with which recurrent networks are trained, larger dampings do not find a dependency over 100 steps.
        return (0.02, 0.1, 10.0) if self.order == 1 else (0.1, 0.4, 2.5)

    def __init__(self, order=4):
        self.order = integer("order", order, 1, _MOST_TERMS)

    def require(self, structure):
        for what, cure in structure.without_rows:
            raise ValueError(
                f"`DirectSolver` needs the derivative of every case's own outputs in full precision. Received: a network with {what}. "
                f"Use `ConjugateGradient()`, or {cure}."
            )

    def linearize(self, objective, curvature):
        del curvature
        return _System(objective)

    def product_error(self, objective, curvature, v):
        """By how much the rows times v and a forward derivative along v differ, relative to them: a float64 scalar."""
        del curvature
        return tf.cast(objective.rows.tangent_error(v), tf.float64)

    def num_effective(self, objective, product, decay):
        # Exact.
        return product.num_effective(decay)

    def solve(self, model, damping, state):
        system, objective = model.linearize(), model.objective
        direction, solve = system.steps(model.gradient, damping, model.tangent)
        first, dtype = model.agreed(direction), model.gradient.dtype

        def term_of(derivative):
            """The term of the arc that undoes a derivative of the outputs, zero where that is not finite: then the arc is of a lower order."""
            term = solve(derivative)
            return model.agreed(tf.where(tf.reduce_all(tf.math.is_finite(term)), term, tf.zeros_like(term)))

        curve = tf.stack([first, *next_terms(system.rows, term_of, first, self.order, epsilon(dtype))])
        acceleration = tf.zeros([], curve.dtype) if self.order == 1 else _ratio(curve[1], first)
        arc = tf.constant(_ARC, curve.dtype)
        powers = np.arange(1, self.order + 1)
        coefficients = _ARC[:, None] ** powers / [math.factorial(power) for power in powers]
        candidates = tf.cast(tf.matmul(tf.constant(coefficients, curve.dtype), curve), dtype)

        def logs(row):
            return {"arc_step": arc[row], "acceleration": acceleration}

        return Path(
            candidates=candidates,
            search=functools.partial(least_loss, coarse_to_fine(objective.losses_at)),
            logs=logs,
            next_state=lambda step: state,
            num_products=tf.constant(0),
            trace={"arc": arc},
            # Along the arc the residuals change as they would in the linear model along c_1: the other terms undo what the outputs' curvature adds.
            model_steps=tf.cast(arc[:, None] * first, dtype),
        )


def next_terms(rows, term_of, first, order, rounding):
    """Returns the terms c_2, ..., c_order of the arc, a list of tensors `(n,)`.

    With s(t) the second derivative of the outputs along `t c_1 + t^2 / 2 c_2`, exact at any t: `s(0) = f^(2) + J c_2`, `f^(3) = s'(0)` and
    `f^(4) = s''(0) + 4 f''[c_1, c_3]`. The derivatives of s are central differences, `2 f''[c_1, c_3]` is that of `f''[c_1, c_1]` along c_3.
    Cost: about 4, 12 or 16 gradients.

    Args:
        rows: `objective.Rows`.
        term_of: Callable `(rows,) -> (n,)`, the term for a derivative of the outputs.
        first: Tensor `(n,)`, c_1.
        order: Integer in [1, 4].
        rounding: Float, the relative error of the outputs.
    """
    if order == 1:
        return []
    start = rows.second_derivative(first)
    second = term_of(start)
    if order == 2:
        return [second]
    # In t: the fourth root of the rounding, whose square is the error of either kind, as long as the terms are of the same size.
    step = rounding**0.25 / tf.maximum(_ratio(second, first), 1.0)

    def along(t, after):
        return rows.second_derivative(first + t * second, second, t * first + t**2 / 2 * second, after)

    ahead = along(step, start)
    behind = along(-step, ahead)
    third = term_of(rows.combined([0.5 / step, -0.5 / step], [ahead, behind]))
    if order == 3:
        return [second, third]
    share = rounding**0.5 / tf.maximum(_ratio(third, first), 1.0)
    turned, middle = rows.second_derivative(first + share * third), rows.plus_push(start, second)
    weights = 1 / step**2, -2 / step**2, 1 / step**2, 2 / share, -2 / share
    return [second, third, term_of(rows.combined(weights, [ahead, middle, behind, turned, start]))]


def _ratio(term, first):
    return tf.math.divide_no_nan(tf.norm(term), tf.norm(first))


class _System:
    """The Gauss-Newton matrix as what its rows are; called, it is the product `v -> Gv`.

    Args:
        objective: `objective.Objective`.

    Attributes:
        rows: `objective.Rows`.
        trace: Scalar, the trace of the matrix, without regularizers.
    """

    def __init__(self, objective):
        num_rows = objective.rows.num_rows
        self._is_dual = (
            num_rows is not None and num_rows < objective.num_weights and objective.has_diagonal_regularization
        )
        # Replicas send the rows to each other, or add up their `B'B`: whichever is less.
        self.rows = objective.rows.gathered() if self._is_dual else objective.rows
        jacobian = self.rows.jacobian
        if self._is_dual:
            self._gram = None
            added = objective.regularization_diagonal() if objective.has_regularization else None
            self.trace = tf.reduce_sum(jacobian**2)
        else:
            self._gram, added = self.rows.gram(), objective.regularization_matrix()
            self.trace = tf.linalg.trace(self._gram)
        self._added = None if added is None else tf.cast(added, self.trace.dtype)

    def __call__(self, v):
        x = tf.cast(v, self.trace.dtype)
        if self._is_dual:
            jacobian = self.rows.jacobian
            image = tf.linalg.matvec(jacobian, tf.linalg.matvec(jacobian, x), transpose_a=True)
            added = None if self._added is None else self._added * x
        else:
            image = tf.linalg.matvec(self._gram, x)
            added = None if self._added is None else tf.linalg.matvec(self._added, x)
        return tf.cast(image if added is None else image + added, v.dtype)

    def num_effective(self, decay):
        """Returns the trace of `B'B (B'B + decay I)^-1`, float64."""
        matrix = row_gram(self.rows.jacobian) if self._is_dual else self._gram
        values = tf.linalg.eigvalsh(matrix)
        decay = tf.maximum(tf.cast(decay, values.dtype), epsilon(values.dtype) * self.trace)
        return tf.cast(tf.reduce_sum(tf.maximum(values, 0) / (tf.maximum(values, 0) + decay)), tf.float64)

    def steps(self, gradient, damping, tangent=None):
        """Returns the step `-(G + damping I)^-1 gradient`, and `u -> -(G + damping I)^-1 B'u`.

        Args:
            gradient: Tensor `(n,)`, along the tangent.
            damping: Scalar.
            tangent: `constraints.Tangent`, the directions in which weights may move, as if there were no others; `None` = all.
        """
        rows, rounding, dtype = self.rows.along(tangent), epsilon(gradient.dtype), self.trace.dtype
        gram, added = self._gram, self._added
        if tangent is not None:
            along = lambda matrix: matrix if matrix is None else tangent(tf.transpose(tangent(matrix)))  # noqa: E731
            # A diagonal is the same for all entries of a weight, so that it keeps vectors along the tangent.
            gram, added = along(gram), added if self._is_dual else along(added)
        if tangent is not None and tangent.has_norms:
            multipliers = tf.cast(tangent.multipliers, dtype)
            multipliers = multipliers if self._is_dual else tf.linalg.diag(multipliers)
            added = multipliers if added is None else added + multipliers
        gradient, damping = tf.cast(gradient, dtype), tf.cast(damping, dtype)
        moves = tf.cast(tf.reduce_any(gradient != 0), dtype)
        damping = tf.maximum(damping, epsilon(dtype) ** LEAST_DAMPING_POWER * self.trace)
        if self._is_dual:
            solve = dual_solver(rows.jacobian, damping, added)
        else:
            solve = primal_solver(rows, gram, damping, added)
        # What is not in the range of the rows: regularizers, and losses without curvature. Rounding there would be divided by the damping.
        residuals = rows.residuals
        rest = gradient - rows.pull(residuals)
        noise = 100 * rounding * tf.sqrt(self.trace) * rows.norm(residuals)
        rest = tf.where(tf.norm(rest) > noise, rest, tf.zeros_like(rest))
        return moves * solve(residuals, rest), solve
