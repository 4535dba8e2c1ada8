"""The solver of the talk: conjugate gradients from the last solution, cut short, and a walk back over their iterates by the true loss.

Martens (2010), sections 4.4 to 4.8.
"""

import keras
import tensorflow as tf

from keras_hf.common.checks import count, finite, part
from keras_hf.common.part import if_finite
from keras_hf.common.vectors import num_weights, vector_dtype
from keras_hf.solvers.cg import CGResult, CGStop, conjugate_gradient
from keras_hf.solvers.kronecker import KroneckerFactored
from keras_hf.solvers.preconditioners import EmpiricalFisherDiagonal, Preconditioner
from keras_hf.solvers.search import walk_back
from keras_hf.solvers.solver import Path, Solver
from keras_hf.solvers.stopping import RelativeProgress, StoppingRule


@keras.saving.register_keras_serializable("keras_hf")
class ConjugateGradient(Solver):
    """Truncated conjugate gradients, the solver of Martens (2010).

    Preconditioned CG on the damped product, from the decayed last iterate of the update before. Its kept iterates are the path: the search walks
    back from the last while the loss on all cases does not rise, and shortens the step until that loss falls enough (Armijo). Iterates along which
    the loss does not descend, which a warm start may leave, are no candidates; where all are such, CG runs once more, from zero.

    The defaults are those that reach a given loss soonest on deep networks (docs/faster.md); `recipe_of_2010` has those of the paper.

    Logs: `cg_iterations` (run), `cg_step` (number of the iterate that was taken), `cg_stop` (a `CGStop`), `negative_curvature` (0 or 1).

    Cost: one product an iteration and one for the start; the preconditioner; one loss for each iterate that the search looks at.

    Args:
        preconditioner: `KroneckerFactored(interval=5)` (default), `EmpiricalFisherDiagonal()`, `Nystrom()` or `Identity()`.
        stopping: When CG may stop: `RelativeProgress(tolerance=1e-2)` (default) or `ResidualTolerance()`.
        max_iterations: Integer >= 1, the limit of CG. It bounds the cost of an update, and how far CG may fit the curvature of a chunk.
        warm_start_decay: Float in [0, 1]. CG starts at this share of its last iterate of the update before; 0 = from zero. The longer CG runs, the
            more of it is worth keeping: 0.95 for hundreds of iterations; after 25, the same share overshoots.

    Raises:
        ValueError: If a number is out of its range.
        TypeError: If a part is not an object of its kind.

    References:
        Martens (2010), *Deep learning via Hessian-free optimization*, sections 4.4 to 4.8.
    """

    def __init__(self, preconditioner=None, stopping=None, max_iterations=25, warm_start_decay=0.7):
        preconditioner = KroneckerFactored(interval=5) if preconditioner is None else preconditioner
        self.preconditioner = part("preconditioner", preconditioner, Preconditioner, "KroneckerFactored()")
        stopping = RelativeProgress(tolerance=1e-2) if stopping is None else stopping
        self.stopping = part("stopping", stopping, StoppingRule, "RelativeProgress()")
        self.max_iterations = count("max_iterations", max_iterations)
        self.warm_start_decay = finite("warm_start_decay", warm_start_decay, 0, 1)

    def initial_state(self, variables, layers):
        return {
            "warm_start": tf.zeros([num_weights(variables)], vector_dtype(variables)),
            "preconditioner": self.preconditioner.initial_state(variables, layers),
            "stopping": self.stopping.initial_state(variables, layers),
        }

    def solve(self, model, damping, state):
        gradient = model.gradient
        # One after the other: a graph would run the passes at once, and hold the activations of all of them.
        with tf.control_dependencies([gradient, damping]):
            precondition, preconditioner_state = self.preconditioner.inverse(
                model.objective, model.linearize, damping, state["preconditioner"]
            )
        with tf.control_dependencies([precondition(gradient)]):
            product = model.linearize()
        stopping = self.stopping.prepared(state["stopping"])

        def run(start):
            return conjugate_gradient(
                lambda v: product(v) + damping * v, -gradient, start, precondition, stopping, self.max_iterations
            )

        decay = tf.constant(self.warm_start_decay, gradient.dtype)
        result, num_products = _again_from_zero(run, decay * state["warm_start"], gradient)
        downhill = _downhill(result, gradient)
        # None: the search will find so, too, and reject.
        kept = tf.where(tf.reduce_any(downhill), downhill, tf.ones_like(downhill))
        numbers = tf.boolean_mask(result.iterate_numbers, kept)
        last = result.iterates[-1]

        def logs(row):
            return {
                "cg_iterations": result.num_iterations,
                "cg_step": numbers[row],
                "cg_stop": result.reason,
                "negative_curvature": tf.cast(result.reason == CGStop.NEGATIVE_CURVATURE, tf.int32),
            }

        def next_state(step):
            moved = tf.reduce_any(step != 0)
            return {
                # The last iterate, not the one taken: CG goes on from where it stopped. After a rejection it starts afresh.
                "warm_start": tf.where(moved, last, tf.zeros_like(last)),
                "preconditioner": if_finite(preconditioner_state, state["preconditioner"]),
                "stopping": self.stopping.next_state(state["stopping"], result),
            }

        return Path(
            candidates=tf.ensure_shape(tf.boolean_mask(result.iterates, kept), [None, last.shape[0]]),
            search=walk_back,
            logs=logs,
            next_state=next_state,
            num_products=num_products,
            trace={"course": result.course, "iterate_numbers": numbers},
        )

    def get_config(self):
        return {
            "preconditioner": keras.saving.serialize_keras_object(self.preconditioner),
            "stopping": keras.saving.serialize_keras_object(self.stopping),
            "max_iterations": self.max_iterations,
            "warm_start_decay": self.warm_start_decay,
        }

    @classmethod
    def from_config(cls, config):
        parts = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in ("preconditioner", "stopping")
            if config.get(name) is not None
        }
        return cls(**{**config, **parts})


def _downhill(result, gradient):
    """For every kept iterate whether it descends to first order, bool `(k,)`; a slope that is no number does not."""
    return tf.linalg.matvec(result.iterates, gradient) < 0


def _again_from_zero(run, start, gradient):
    """Runs CG from a start, and once more from zero where no iterate descends: those from zero do. Returns a `CGResult` and the products spent."""
    zero, none = tf.zeros_like(start), tf.constant(0)
    numbers = tf.zeros([0], tf.float64)
    nothing = CGResult(zero[None], none[None], numbers, none, none, numbers)

    def useless(turn, result, _):
        unmoved = (result.num_iterations == 0) & (result.reason != CGStop.CONVERGED)
        lost = unmoved | ~tf.reduce_any(_downhill(result, gradient))
        return (turn == 0) | ((turn == 1) & lost & tf.reduce_any(start != 0))

    def again(turn, _, num_products):
        result = run(tf.where(turn == 0, start, zero))
        useless_direction = (result.reason == CGStop.NEGATIVE_CURVATURE) | (result.reason == CGStop.BREAKDOWN)
        spent = 1 + result.num_iterations + tf.cast(useless_direction, tf.int32)
        return turn + 1, result, num_products + spent

    shapes = CGResult(
        tf.TensorShape([None, start.shape[0]]),
        *[tf.TensorShape([None])] * 2,
        *[tf.TensorShape([])] * 2,
        tf.TensorShape([None]),
    )
    _, result, num_products = tf.while_loop(
        useless,
        again,
        (none, nothing, none),
        shape_invariants=(none.shape, shapes, none.shape),
        parallel_iterations=1,
    )
    return result, num_products


def recipe_of_2010():
    """Returns the solver of Martens (2010), part by part.

    With it go `HessianFree(damping=45.0, solver=recipe_of_2010(), growing_batch=None)`, 45 being for a loss summed over outputs, and
    `LevenbergMarquardt(low=0.25, high=0.75, factor=1.5)`.

    References:
        Martens (2010), *Deep learning via Hessian-free optimization*, section 4; the constants are those of its released code.
    """
    return ConjugateGradient(
        preconditioner=EmpiricalFisherDiagonal(exponent=0.75),
        stopping=RelativeProgress(tolerance=5e-4),
        max_iterations=250,
        warm_start_decay=0.95,
    )
