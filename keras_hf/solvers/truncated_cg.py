"""The solver of the talk: truncated, warm-started conjugate gradients, and backtracking over their iterates by the true loss.

Martens (2010), sections 4.4 to 4.8.
"""

import functools

import keras
import tensorflow as tf

from keras_hf.common.checks import count, finite, part
from keras_hf.common.loops import map_rows
from keras_hf.common.part import if_finite
from keras_hf.common.passes import graph_function
from keras_hf.common.vectors import SeparateRows, dot, num_weights, vector_dtype
from keras_hf.solvers.cg import CGResult, CGStop, minimized
from keras_hf.solvers.kronecker import KroneckerFactored
from keras_hf.solvers.preconditioners import EmpiricalFisherDiagonal, Preconditioner
from keras_hf.solvers.search import walk_back
from keras_hf.solvers.solver import Path, Solver
from keras_hf.solvers.stopping import RelativeProgress, StoppingRule


@keras.saving.register_keras_serializable("keras_hf")
class ConjugateGradient(Solver):
    """Truncated conjugate gradients, the solver of Martens (2010).

    Preconditioned CG on the damped product, started from the decayed last iterate of the previous update. The kept iterates are the path: the search
    walks back from the last one while the loss on all cases does not rise, then shortens the step until that loss falls enough (Armijo). Iterates
    along which the loss does not descend, which a warm start can produce, are not candidates; if none descends, CG runs once more, from zero.

    The defaults reach a given loss soonest on deep networks (docs/faster.md); `recipe_of_2010` has those of the paper.

    Logs: `cg_iterations` (number run), `cg_step` (number of the iterate taken), `cg_stop` (a `CGStop`), `negative_curvature` (0 or 1).

    Cost: one product per iteration and one for the start; the preconditioner; one loss per iterate that the search tries.

    Args:
        preconditioner: `KroneckerFactored(interval=5)` (default), `EmpiricalFisherDiagonal()`, `Nystrom()` or `Identity()`.
        stopping: When CG may stop: `RelativeProgress(tolerance=1e-2)` (default) or `ResidualTolerance()`.
        max_iterations: Integer >= 1, the limit of CG iterations. It bounds the cost of an update, and how closely CG fits the curvature of a chunk.
        warm_start_decay: Float in [0, 1]. CG starts at this multiple of the last iterate of the previous update; 0 = from zero. The longer CG runs,
            the larger it should be: 0.95 suits hundreds of iterations, but overshoots after 25.
        max_kept_iterates: Integer >= 1: of the iterates that are kept for backtracking (7 of 25, 16 of 250), only so many, the last ones. Each takes
            the memory of the weights. The search then goes back no further than to the first of them. `None` = all. See docs/memory.md.

    Raises:
        ValueError: If a number is out of its range.
        TypeError: If a part has the wrong type.

    References:
        Martens (2010), *Deep learning via Hessian-free optimization*, sections 4.4 to 4.8.
    """

    tells_convexity = True
    steered_by = ("cg_iterations",)
    other_logs = ("cg_step", "cg_stop", "negative_curvature")

    def __init__(
        self, preconditioner=None, stopping=None, max_iterations=25, warm_start_decay=0.7, max_kept_iterates=None
    ):
        preconditioner = KroneckerFactored(interval=5) if preconditioner is None else preconditioner
        self.preconditioner = part("preconditioner", preconditioner, Preconditioner, "KroneckerFactored()")
        stopping = RelativeProgress(tolerance=1e-2) if stopping is None else stopping
        self.stopping = part("stopping", stopping, StoppingRule, "RelativeProgress()")
        self.max_iterations = count("max_iterations", max_iterations)
        self.warm_start_decay = finite("warm_start_decay", warm_start_decay, 0, 1)
        self.max_kept_iterates = count("max_kept_iterates", max_kept_iterates, optional=True)

    def initial_state(self, variables, layers):
        return {
            "warm_start": tf.zeros([num_weights(variables)], vector_dtype(variables)),
            "preconditioner": self.preconditioner.initial_state(variables, layers),
            "stopping": self.stopping.initial_state(variables, layers),
        }

    def solve(self, model, damping, state):
        gradient = model.gradient
        # In sequence: the graph would otherwise run these passes in parallel and hold the activations of all of them.
        with tf.control_dependencies([gradient, damping]):
            precondition, preconditioner_state = self.preconditioner.inverse(
                model.objective,
                lambda: model.linearize_with_hidden_states(damping),
                damping,
                state["preconditioner"],
            )
        inverse = precondition
        precondition = graph_function(lambda r: model.along(inverse(r)))
        with tf.control_dependencies([precondition(gradient)]):
            damped = model.damped(damping)
        stopping = self.stopping.prepared(state["stopping"])

        def run(start):
            limits = self.max_iterations, self.max_kept_iterates
            return minimized(damped.with_form, -gradient, start, precondition, stopping, *limits, model.agreed)

        def slopes_of(result):
            array, places = result.iterates
            of_place = lambda place: dot(array.read(place), gradient)  # noqa: E731
            slopes = map_rows(of_place, places, tf.float64)
            return model.agreed(slopes)

        decay = tf.constant(self.warm_start_decay, gradient.dtype)
        # The first product's forward pass does not depend on anything before it.
        with tf.control_dependencies([gradient]):
            result, slopes, num_products = _again_from_zero(
                run, slopes_of, lambda: model.along(decay * state["warm_start"]), gradient
            )
        downhill = slopes < 0
        # If none descends, all are kept: the line search then rejects the step.
        kept = tf.where(tf.reduce_any(downhill), downhill, tf.ones_like(downhill))
        numbers, slopes = tf.boolean_mask(result.iterate_numbers, kept), tf.boolean_mask(slopes, kept)
        last = result.iterates[-1]
        candidates = result.iterates._replace(places=tf.boolean_mask(result.iterates.places, kept))

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
                # The last iterate, not the one taken: CG continues from where it stopped. After a rejection it starts from zero.
                "warm_start": tf.where(moved, last, tf.zeros([], last.dtype)),
                "preconditioner": if_finite(preconditioner_state, state["preconditioner"], model.agreed),
                "stopping": self.stopping.next_state(state["stopping"], result),
            }

        return Path(
            candidates=candidates,
            search=functools.partial(walk_back, slopes=slopes),
            logs=logs,
            next_state=next_state,
            num_products=num_products,
            trace={"course": result.course, "iterate_numbers": numbers},
        )


def _again_from_zero(run, slopes_of, start, gradient):
    """Runs CG from `start()`, and again from zero, where iterates always descend, if none does.

    Returns:
        A `CGResult`, the slopes of its iterates, float64 `(k,)`, NaN where they are not finite, and the number of products.
    """
    zero, none = tf.zeros([], gradient.dtype), tf.constant(0)
    numbers = tf.zeros([0], tf.float64)
    array = tf.TensorArray(gradient.dtype, 0, dynamic_size=True, clear_after_read=False, element_shape=gradient.shape)
    nothing = CGResult(SeparateRows(array, none[None][:0]), none[None], numbers, none, none, numbers)

    def useless(turn, result, slopes, _):
        unmoved = (result.num_iterations == 0) & (result.reason != CGStop.CONVERGED)
        lost = unmoved | ~tf.reduce_any(slopes < 0)
        return (turn == 0) | ((turn == 1) & lost & tf.reduce_any(start() != 0))

    def again(turn, _, __, num_products):
        result = run(tf.where(turn == 0, start(), zero))
        useless_direction = (result.reason == CGStop.NEGATIVE_CURVATURE) | (result.reason == CGStop.BREAKDOWN)
        spent = 1 + result.num_iterations + tf.cast(useless_direction, tf.int32)
        return turn + 1, result, slopes_of(result), num_products + spent

    shapes = CGResult(
        SeparateRows(tf.TensorShape([]), tf.TensorShape([None])),
        *[tf.TensorShape([None])] * 2,
        *[tf.TensorShape([])] * 2,
        tf.TensorShape([None]),
    )
    _, *found = tf.while_loop(
        useless,
        again,
        (none, nothing, numbers, none),
        shape_invariants=(none.shape, shapes, tf.TensorShape([None]), none.shape),
        parallel_iterations=1,
    )
    return found


def recipe_of_2010():
    """Returns the solver of Martens (2010), with the parts and constants of the paper.

    Use it as `HessianFree(damping=45.0, solver=recipe_of_2010(), growing_batch=None)`, where 45 applies to a loss summed over outputs, together with
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
