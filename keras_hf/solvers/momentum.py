"""One preconditioned direction and the previous step, their coefficients from the exact quadratic: for wide networks on redundant data.

Martens & Grosse (2015), sections 6 and 7.
"""

import functools

import keras
import tensorflow as tf

from keras_hf.common.checks import flag, fraction, part
from keras_hf.common.vectors import dot, epsilon
from keras_hf.problem.batching import GrowingBatch
from keras_hf.solvers.kronecker import KroneckerFactored
from keras_hf.solvers.preconditioners import Preconditioner
from keras_hf.solvers.search import accept_unless_loss_rises
from keras_hf.solvers.solver import Path, Solver

# Of so few cases a loss costs less than what an update computes besides.
_FEW_CASES = 512
# Directions count as parallel where the squared sine of their angle, in the metric of the quadratic, is below so many machine epsilons.
_PARALLEL = 100.0


@keras.saving.register_keras_serializable("keras_hf")
class PreconditionedMomentum(Solver):
    """The preconditioned gradient and the previous step, combined by the exact quadratic: for wide networks, on minibatches.

        step = alpha d + mu s,    d = -M^-1 g

    where s is the previous step and M the preconditioner. alpha and mu minimise the damped quadratic `g'p + p'(G + damping I)p / 2` over all such
    steps, so there is neither a learning rate nor a momentum to set. Where a few hundred cases say nearly what all say, another step on fresh cases
    is worth more than a more accurate solution on the same ones. On a fixed quadratic these steps are those of preconditioned CG.

    It suits classifiers of dense layers, convolutions, attention and recurrent layers (docs/which-solver.md).

    The quadratic's forms come from forward derivatives along d and s, without a backward pass, on a share of the cases of the update. Of up
    to 512 cases the loss of all is checked, and a step along which it rises is rejected; of more, that of the share: a step is rejected if it is not
    finite there, or rises by more than the cases' noise explains, or by more than the loss itself. The reduction ratio is of the same cases. After a
    rejected step the next update begins without s.

    Use it with fresh cases in each update: `fit` on arrays, where the default is a growing part of the cases, which doubles in 60 updates:
    `GrowingBatch(500, share=0.0, patience=10, rate=0.0116, min_batch_size=2000)`; or a `tf.data` stream of batches, for which
    `HessianFree(use_ema=True)` averages the weights. On wide autoencoders a rate of 0.003 with averages (`ema_momentum=0.95`) ends lower
    (docs/measured-minibatches.md).

    Logs: `alpha`, `mu` (coefficients of d and s), `negative_curvature` (0 or 1).

    Cost: a gradient; on the share, about 5/3 of a gradient for the forms, and two losses (of few cases one loss of all); the preconditioner, applied
    once.

    Args:
        preconditioner: `KroneckerFactored(num_cases=0.5, interval=10, decay=0.75)` (default), or another.
        share: Float in (0, 1], the share of the cases of an update on which forms are computed, and of many cases the loss; 64 cases at least.
        starts_small: Boolean, whether the growing part begins with 64 cases, and there with a damping of a 500th of the curvature along the gradient
            in place of a fiftieth. For layers that serve several positions of a case (convolutions, attention, recurrent layers), of
            which few cases say much: a transformer block takes a third of the time. On dense layers it fits more noise. `HessianFree()` chooses.

    Raises:
        ValueError: If `share` is out of its range, or `starts_small` is no boolean.
        TypeError: If the preconditioner has the wrong type.

    References:
        Martens & Grosse (2015), *Optimizing neural networks with Kronecker-factored approximate curvature*, sections 6.4 and 7.
    """

    damps_hidden_states = False
    # 1.12 an update, with 2.5 as factor. Martens & Grosse (2015) have 1.05; measured on MNIST's autoencoder, 1.1 is sooner, 1.2 and 2.5 are later.
    factor_power = 1 / 8
    # From 0.1 the damping takes 14 updates to fall as far.
    first_share = 0.02
    evidence_interval = 50
    steered_by = ("mu",)
    other_logs = ("alpha", "negative_curvature")

    @staticmethod
    def least_damping(dtype):
        # The damping of a layer's factors is the root of it: with a smaller one the preconditioner inverts the noise of a minibatch.
        return epsilon(dtype) ** 1.25

    def __init__(self, preconditioner=None, share=0.125, starts_small=False):
        if preconditioner is None:
            preconditioner = KroneckerFactored(num_cases=0.5, interval=10, decay=0.75)
        self.preconditioner = part("preconditioner", preconditioner, Preconditioner, "KroneckerFactored()")
        self.share = fraction("share", share)
        self.starts_small = flag("starts_small", starts_small)

    @property
    def chunk_share(self):
        return self.share

    @property
    def first_share_of_part(self):
        # From a fiftieth the damping takes 20 updates to fall as far; lower shares are rejected on the language model of
        # benchmarks/classifier_solvers.py.
        return 0.002 if self.starts_small else self.first_share

    def growing_batch(self):
        return GrowingBatch(64 if self.starts_small else 500, share=0.0, patience=10, rate=0.0116, min_batch_size=2000)

    def initial_state(self, variables, layers):
        return {"preconditioner": self.preconditioner.initial_state(variables, layers)}

    def solve(self, model, damping, state):
        gradient, previous = model.gradient, model.last_step
        # In sequence: the graph would otherwise run these passes in parallel and hold the activations of all of them.
        with tf.control_dependencies([gradient, damping]):
            precondition, preconditioner_state = self.preconditioner.inverse(
                model.objective, model.linearize, damping, state["preconditioner"]
            )
        direction = -model.along(precondition(gradient))
        with tf.control_dependencies([direction]):
            product = model.linearize()
        forms = product.forms([direction, previous])
        inner = lambda a, b: tf.cast(dot(a, b), tf.float64)  # noqa: E731
        crossed = inner(direction, previous)
        squares = tf.stack([[inner(direction, direction), crossed], [crossed, inner(previous, previous)]])
        slopes = tf.stack([inner(gradient, direction), inner(gradient, previous)])
        squares, slopes = model.agreed((squares, slopes))
        rounding = _PARALLEL * epsilon(gradient.dtype)
        coefficients, is_negative = minimizer(forms + tf.cast(damping, tf.float64) * squares, slopes, rounding)
        alpha, mu = tf.unstack(tf.cast(coefficients, direction.dtype))
        # A direction of coefficient 0 may be without numbers.
        candidate = tf.where(alpha == 0, tf.zeros([], direction.dtype), alpha * direction) + mu * previous

        return Path(
            candidates=candidate[None],
            search=functools.partial(
                accept_unless_loss_rises,
                model.objective.chunk_change_at,
                model.objective.totals.num_cases <= _FEW_CASES,
            ),
            logs=lambda row: {"alpha": alpha, "mu": mu, "negative_curvature": tf.cast(is_negative, tf.int32)},
            next_state=lambda step: {"preconditioner": preconditioner_state},
            num_products=tf.constant(0),
            trace={
                "num_forward_derivatives": tf.constant(2),
                "chunk_cases": tf.cast(model.objective.totals.chunk_cases, tf.int32),
            },
            curvatures=tf.reduce_sum(coefficients[:, None] * forms * coefficients)[None],
        )


def minimizer(matrix, slopes, rounding):
    """Minimises `slopes'c + c'(matrix)c / 2` over c of two coefficients.

    Where the two directions are parallel, or the matrix is not positive definite, only the first is used, and the absolute value of its curvature;
    without curvature, none.

    Args:
        matrix: Tensor `(2, 2)`, symmetric.
        slopes: Tensor `(2,)`.
        rounding: Float, the squared sine of the angle of the directions below which they count as parallel.

    Returns:
        c, `(2,)`, and whether the curvature along a direction is negative, a bool scalar.
    """
    (first, crossed), (_, second) = [tf.unstack(row) for row in tf.unstack(matrix)]
    determinant = first * second - crossed**2
    both = (first > 0) & (second > 0) & (determinant > rounding * first * second)
    alone = tf.stack([-tf.math.divide_no_nan(slopes[0], tf.abs(first)), tf.zeros_like(first)])
    inverse = tf.math.divide_no_nan(tf.stack([[second, -crossed], [-crossed, first]]), determinant)
    together = -tf.linalg.matvec(inverse, slopes)
    return tf.where(both, together, alone), (first < 0) | (second < 0)
