"""The exact solver: the damped Gauss-Newton system by factorization, geodesic acceleration, and a search along the arc.

For small networks: the best step of the quadratic model costs less than the products of CG. Levenberg (1944), Marquardt (1963), Transtrum & Sethna
(2012).
"""

import functools

import keras
import numpy as np
import tensorflow as tf

from keras_hf.common.checks import flag
from keras_hf.solvers.factorized import LEAST_DAMPING_POWER, dual_solver, primal_solver
from keras_hf.solvers.search import coarse_to_fine, least_loss
from keras_hf.solvers.solver import Path, Solver

# The places on the arc at which the loss is looked up.
_ARC = 2.0 ** -np.arange(0.0, 10.5, 0.5)


@keras.saving.register_keras_serializable("keras_hf")
class DirectSolver(Solver):
    """Exact damped Gauss-Newton steps with geodesic acceleration, for small networks.

    The Jacobian B of the outputs, its rows weighted by a root of the loss's second derivative, is formed by one vectorised gradient per case and
    output. With `G = B'B` and the regularizers' second derivative in it,

        v = -(G + damping I)^-1 g                  the step of Levenberg and Marquardt
        a = -(G + damping I)^-1 J'H f_vv           the geodesic acceleration
        candidates: t v + t^2/2 a,  t = 1, 2^-0.5, ..., 2^-10

    where f_vv is the second directional derivative of the outputs along v. Candidates are evaluated in vectorised passes, the powers of 2 and then
    the neighbours of the best; that of least loss is taken, if it is less than the loss at the start. The system is solved in the space of weights
    (n by n) or of rows (rows by rows), whichever is smaller. Where the damping is lost in the rounding of `B'B`, B is factorized instead.

    Every update uses all cases of its batch: give `fit` all cases in one batch. Use float64 (`keras.config.set_floatx("float64")`): float32 ends at a
    relative accuracy of about 1e-4. `LevenbergMarquardt` adapts the damping by how far along the arc the step was taken.

    Logs: `arc_step` (t of the candidate taken), `acceleration` (norm of a over that of v).

    Cost: the Jacobian, about as much as one or two gradients; `rows n min(rows, n)` multiplications and a factorization; about 17 forward passes.
    Memory: the Jacobian, up to 1 GiB; a larger one is formed anew in pieces.

    Args:
        acceleration: Whether to use the acceleration; without it the arc is a line.

    Raises:
        ValueError: If `acceleration` is not a bool; at the first update, for networks in which cases do not have outputs of their own
            (BatchNormalization), which draw random numbers (Dropout), add losses in `call`, or compute in 16 bits; and for losses without a value
            per case (Dice) or whose values compare cases (Circle).

    References:
        Transtrum & Sethna (2012), *Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares minimization*; Mueller & Zeinhofer
        (2023), *Achieving high accuracy with PINNs via energy natural gradient descent*, for the search over powers of 2.
    """

    least_damping_power = LEAST_DAMPING_POWER
    uses_all_cases = True
    damps_hidden_states = False

    def __init__(self, acceleration=True):
        self.acceleration = flag("acceleration", acceleration)

    def require(self, structure):
        for what, cure in structure.without_rows:
            raise ValueError(
                f"`DirectSolver` needs the derivative of every case's own outputs in full precision. Received: a network with {what}. "
                f"Use `ConjugateGradient()`, or {cure}."
            )

    def linearize(self, objective, curvature):
        del curvature
        return _System(objective)

    def solve(self, model, damping, state):
        system, objective = model.linearize(), model.objective
        direction, accelerate = system.steps(model.gradient, damping)
        direction = model.agreed(direction)
        norm = tf.norm(direction)
        if self.acceleration:
            second = accelerate(direction)
            # Where there is none (no second derivative, or numbers out of range), the arc is a line.
            second = model.agreed(tf.where(tf.reduce_all(tf.math.is_finite(second)), second, tf.zeros_like(second)))
        else:
            second = tf.zeros_like(direction)
        arc = tf.constant(_ARC, direction.dtype)
        candidates = arc[:, None] * direction + (arc**2 / 2)[:, None] * second

        def logs(row):
            return {"arc_step": arc[row], "acceleration": tf.math.divide_no_nan(tf.norm(second), norm)}

        return Path(
            candidates=candidates,
            search=functools.partial(least_loss, coarse_to_fine(objective.losses_at)),
            logs=logs,
            next_state=lambda step: state,
            num_products=tf.constant(0),
            trace={"arc": arc},
            # Along the arc the residuals change as they would in the linear model along v: the acceleration undoes what the outputs' curvature adds.
            model_steps=arc[:, None] * direction,
        )

    def get_config(self):
        return {"acceleration": self.acceleration}


class _System:
    """The Gauss-Newton matrix as what its rows are; called, it is the product `v -> Gv`.

    Args:
        objective: `objective.Objective`.
    """

    def __init__(self, objective):
        num_rows = objective.rows.num_rows
        self._is_dual = (
            num_rows is not None and num_rows < objective.num_weights and objective.has_diagonal_regularization
        )
        # Replicas send the rows to each other, or add up their `B'B`: whichever is less.
        self._rows = objective.rows.gathered() if self._is_dual else objective.rows
        jacobian = self._rows.jacobian
        if self._is_dual:
            self._gram = None
            self._added = objective.regularization_diagonal() if objective.has_regularization else None
            self._size = tf.reduce_sum(jacobian**2)
        else:
            self._gram, self._added = self._rows.gram(), objective.regularization_matrix()
            self._size = tf.linalg.trace(self._gram)

    def __call__(self, v):
        if self._is_dual:
            jacobian = self._rows.jacobian
            image = tf.linalg.matvec(jacobian, tf.linalg.matvec(jacobian, v), transpose_a=True)
            return image if self._added is None else image + self._added * v
        image = tf.linalg.matvec(self._gram, v)
        return image if self._added is None else image + tf.linalg.matvec(self._added, v)

    def errors(self, v, scale=0.0):
        """By how much the rows times v and a forward derivative along v differ, relative to them: a float64 scalar."""
        return tf.cast(self._rows.tangent_error(v), tf.float64)

    def steps(self, gradient, damping):
        """Returns the step `-(G + damping I)^-1 gradient`, and what gives the acceleration of a step."""
        rows, rounding = self._rows, float(np.finfo(gradient.dtype.as_numpy_dtype).eps)
        moves = tf.cast(tf.reduce_any(gradient != 0), gradient.dtype)
        damping = tf.maximum(damping, rounding**LEAST_DAMPING_POWER * self._size)
        if self._is_dual:
            solve = dual_solver(rows.jacobian, damping, self._added)
        else:
            solve = primal_solver(rows, self._gram, damping, self._added)
        # What is not in the range of the rows: regularizers, and losses without curvature. Rounding there would be divided by the damping.
        residuals = rows.residuals
        rest = gradient - rows.pull(residuals)
        noise = 100 * rounding * tf.sqrt(self._size) * rows.norm(residuals)
        rest = tf.where(tf.norm(rest) > noise, rest, tf.zeros_like(rest))
        return moves * solve(residuals, rest), lambda v: solve(rows.second(v), None)
