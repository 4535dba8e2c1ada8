"""The interface of solvers: from the quadratic model at the start of an update to a path of candidate steps, from which a search picks one.

A solver works on vectors, callables and one scalar. It knows nothing about Keras, the data or the damping rule. For an example see `truncated_cg.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from keras_hf.common.part import Part
from keras_hf.common.vectors import SeparateRows, epsilon
from keras_hf.problem.batching import GrowingBatch
from keras_hf.solvers.lanczos import effective_trace, random_signs


class LocalModel:
    """The objective at the start of an update, as passed to a solver.

    Args:
        objective: `objective.Objective`.
        linearize: Callable without arguments that returns the update's product; see below.
        gradient: Tensor `(n,)`. Zero once the run has converged to rounding, so that every solver returns a zero step.
        last_step: Tensor `(n,)`, the step of the last update, zero if it was rejected or there was none; `None` = zero.
        tangent: `constraints.Tangent`, the directions in which weights may move; `None` = all.

    Attributes:
        objective: As above; preconditioners use it.
        gradient: As above.
        last_step: As above, along these directions.
        tangent: As above.
        linearize: Returns the undamped product `v -> Gv` on vectors `(n,)` or rows `(k, n)`; see `Objective.product`. Call it outside branches and
            loops.
    """

    def __init__(self, objective, linearize, gradient, last_step=None, tangent=None):
        self.objective, self.linearize, self.gradient, self.tangent = objective, linearize, gradient, tangent
        self.last_step = tf.zeros_like(gradient) if last_step is None else self.along(last_step)

    def along(self, v):
        """Returns the part of a vector `(n,)` along the directions in which weights may move."""
        return v if self.tangent is None else self.tangent(v)

    def damped(self, damping):
        """Returns the damped product `v -> (G + damping I) v` on vectors `(n,)`; under structural damping `I + weight G_S` takes the place of I.

        Of vectors along which weights may move, and its part along such. Call it outside branches and loops. Cost of a product: that of one without
        damping.

        Args:
            damping: Scalar >= 0 of the weights' dtype.
        """
        return Damped(self.linearize_with_hidden_states(damping), damping, self.along)

    def linearize_with_hidden_states(self, damping):
        """Returns what `damped(damping)` does without `damping * v`: the product that preconditioners are made from, on vectors or rows."""
        return self.linearize().with_hidden_states(damping)

    def agreed(self, nest):
        """Returns tensors as the first of several workers has computed them; see `Objective.agreed`.

        For what decides how a loop or a branch with products or losses in it goes on: inner products are rounded differently on other processors.
        """
        return self.objective.agreed(nest)


class Damped:
    """A damped product `v -> (G + damping I) v` on vectors `(n,)`; see `LocalModel.damped`.

    Args:
        product: `objective.Product`.
        damping: Scalar.
        along: Callable `(n,) -> (n,)`, `LocalModel.along`.
    """

    def __init__(self, product, damping, along):
        self._product, self._damping, self._along = product, damping, along

    def __call__(self, v):
        return self._along(self._product(v) + self._damping * v)

    def with_form(self, v):
        """Returns `(G + damping I) v` and its inner product with v, a float64 scalar, the same on all workers."""
        image, form = self._product.damped_with_form(v, self._damping)
        return self._along(image), form


class Path(NamedTuple):
    """What a solver returns: candidate steps, how to search them, and functions of the result.

    Attributes:
        candidates: Tensor `(k, n)`, k >= 1, in order, or `common.vectors.SeparateRows`, which are not copied.
        search: Callable `(loss_at, candidates, loss, gradient) -> Taken`, such as `search.walk_back`.
        logs: Callable from the row taken (int32 scalar) to a dict of scalars, the solver's entries in the logs.
        next_state: Callable from the step applied to the weights, `(n,)`, zero if it was rejected, to the solver's next state.
        num_products: int32 scalar, the number of products used.
        trace: Dict of tensors, for a recorder.
        model_steps: Tensor `(k, n)`, the steps of the quadratic model that the candidates of a curved path stand for: the reduction ratio compares
            the loss at a candidate with what the model predicts for its step. `None` = the candidates themselves.
        curvatures: Float64 `(k,)`, `p'Gp` of these steps p, without damping, where the solver knows them; `None` costs one more product.
    """

    candidates: tf.Tensor | SeparateRows
    search: Callable
    logs: Callable
    next_state: Callable
    num_products: tf.Tensor
    trace: dict
    model_steps: tf.Tensor | None = None
    curvatures: tf.Tensor | None = None


class Solver(Part):
    """Base class of solvers: immutable settings, and a path for every update. Subclasses implement `solve`.

    Attributes:
        uses_all_cases: Whether every update needs all cases of its batch: no growing part, no curvature chunk.
        chunk_share: Float in (0, 1], the curvature chunk as a share of the cases of an update.
        forms_rows: Whether its products are those of rows of the Jacobian, and not of the curvature.
        damps_hidden_states: Whether the solver forms damped products by `LocalModel.damped`, so that structural damping has an effect.
        judged_by: String, the entry of the logs by which a damping rule judges a step: "reduction_ratio", or "arc_step" where an arc is searched.
        arc_band: Where an arc is searched, `low`, `high` and `factor` of the `ArcStepDamping` that suits it.
        factor_power: Float, the power of a damping rule's factor that suits an ordinary update: 1, or less where updates are small and many.
        first_share: Float, the first damping as a share of the curvature along the gradient.
        first_share_of_part: The same where the first update uses a part of its batch, which grows where the damping is too small.
        tells_convexity: Whether `negative_curvature` in its logs is that of the matrix, and not rounding.
        evidence_interval: Integer, in every how many updates `num_effective` is computed where weight decay is found by evidence, so that it takes
            less than a fifth of their time.
        steered_by: Tuple of strings, those of its entries in the logs that the progress bar shows.
        other_logs: Tuple of strings, the rest of these entries.
    """

    uses_all_cases = False
    chunk_share = 1.0
    forms_rows = False
    damps_hidden_states = True
    judged_by = "reduction_ratio"
    arc_band = None
    factor_power = 1.0
    # Measured (benchmarks/first_damping.py): on shallow networks the loss after 30 updates differs little between shares of 1e-4 and 1; on a deep
    # autoencoder larger shares give a smaller loss, and later updates do not repair too small a start.
    first_share = 0.1
    tells_convexity = False
    evidence_interval = 10
    steered_by = ()
    other_logs = ()

    @staticmethod
    def least_damping(dtype):
        """Returns the share of the curvature's scale below which dampings change nothing but rounding, a float.

        Args:
            dtype: String, the name of the weights' float type.
        """
        return epsilon(dtype) ** 2

    @property
    def first_share_of_part(self):
        return self.first_share

    def growing_batch(self):
        """Returns the `GrowingBatch` that suits the solver, `None` where updates use all cases: the default of `HessianFree`."""
        return None if self.uses_all_cases else GrowingBatch()

    def require(self, structure):
        """Raises where the solver would be wrong for a network.

        Args:
            structure: `structure.Structure` of the traced network.

        Raises:
            ValueError: If it would.
        """
        del structure

    def linearize(self, objective, curvature):
        """Returns the product `v -> Gv` by which the solver's steps, the scale of the curvature and the reduction ratio are judged.

        Args:
            objective: `objective.Objective`.
            curvature: `curvature.Curvature`.
        """
        return objective.product(curvature)

    def product_error(self, objective, curvature, v):
        """Returns by how much the product with a vector fails what must hold of it, relative to it, float64; `None` where nothing is known.

        Called before the first update. For arguments and default see `linearize` and `objective.Product.error`.
        """
        return self.linearize(objective, curvature).error(v)

    def num_effective(self, objective, product, decay):
        """Returns MacKay's gamma, how many weights the data determine: the trace of `G (G + decay I)^-1`, float64.

        By a random vector of signs, and Lanczos' method for it. Cost: 30 products.

        Args:
            objective: `objective.Objective`.
            product: What `linearize` has returned; regularizers, among them the decay, are in it.
            decay: Scalar >= 0.
        """
        signs = random_signs(objective.num_weights, objective.update_number, objective.dtype)
        return effective_trace(product, objective.agreed(signs), decay)

    def solve(self, model, damping, state):
        """Finds candidate steps of `q(p) = g'p + p'(G + damping I)p / 2`.

        Called in cross-replica context inside a `tf.function`: write loops as `tf.while_loop`.

        Args:
            model: `LocalModel`.
            damping: Scalar >= 0 of the weights' dtype.
            state: Nest of tensors, the state after the previous update; see `Part.initial_state`.

        Returns:
            A `Path`.
        """
        raise NotImplementedError
