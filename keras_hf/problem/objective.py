"""The objective: network and loss on given cases as functions of one flat vector of all trainable weights `(n,)`.

Each replica holds a `LocalObjective`, which processes its own cases in micro-batches. The `Objective` sums over replicas, packs and unpacks the flat
vector, and assigns candidate weights and restores them. It knows nothing about damping or CG.
"""

import copy
import functools
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_hf.common.loops import map_rows, mapped
from keras_hf.common.passes import graph_function
from keras_hf.common.vectors import assign, dot, num_weights, pack, unpack, unpack_rows
from keras_hf.network import batch_statistics
from keras_hf.problem import constraints
from keras_hf.problem.local_objective import LocalObjective


class Product:
    """A product over all replicas. Calling it computes `v -> Gv`; see `Objective.product`.

    Args:
        replicas: `replicas.Replicas`.
        parts: The `_LocalProduct` of every replica, as `replicas` holds them.
        structural_damping: `structural_damping.StructuralDamping`, or `None`.
        strength: Scalar by which the curvature of the hidden states is added, or `None`; see `with_hidden_states`.

    Attributes:
        trace: `None`: the trace of G is not known.
    """

    trace = None

    def __init__(self, replicas, parts, structural_damping=None, strength=None):
        self._replicas, self._parts, self._structural_damping = replicas, parts, structural_damping
        self._more = () if strength is None else (strength,)
        # Of one vector: a loop over rows calls it, too.
        self._of_vector = graph_function(
            lambda *args: replicas.run(lambda part, *args: part.product(*args), parts, *args)
        )

    def __call__(self, v):
        if v.shape.rank == 1:
            # Added outside: TensorFlow loses the key of a reduction in a function that is called in a branch.
            return self._replicas.total(self._of_vector(v, *self._more))
        return self._replicas.sum(lambda part, v, *more: part.product(v, *more), self._parts, v, *self._more)

    def damped_with_form(self, v, damping):
        """Returns `(G + damping I) v` and its inner product with v, a float64 scalar, the same on all workers. Both are one sum over replicas."""
        if not self._replicas.has_workers:
            image = self(v) + damping * v
            return image, dot(v, image)
        share = damping / self._replicas.count
        image, form = self._replicas.sum_with(
            lambda part, v, *more: part.product(v, *more),
            lambda image, part, v, *more: dot(v, image + share * v),
            self._parts,
            v,
            *self._more,
        )
        return image + damping * v, form

    def with_hidden_states(self, damping):
        """Returns the product `v -> Gv + damping weight G_S v`, damped but for the identity; see `structural_damping.StructuralDamping`."""
        if self._structural_damping is None:
            return self
        strength = damping * tf.constant(self._structural_damping.weight, damping.dtype)
        return Product(self._replicas, self._parts, self._structural_damping, strength)

    def forms(self, vectors):
        """Returns `v'Gw` of every two of a list of vectors `(n,)`: float64 `(k, k)`.

        By forward derivatives, where the curvature is `J'HJ`: a forward pass for all, and about two for each vector.
        """
        return self._replicas.sum(lambda part, vectors: part.forms(vectors), self._parts, vectors)

    def error(self, v):
        """Returns the relative error of `u'(Jv) = (J'u)'v` for a random u, or if it is larger, of `v'Gv = (Jv)'H(Jv)`: a float64 scalar.

        `None` without a Jacobian J. On the first micro-batch of every replica. If a second derivative of TensorFlow is wrong or tangents are lost, J
        and J' are not transposes of each other. The second identity follows where the product is made of the same passes, and is left out there.
        Cost: one product, or two.

        Args:
            v: Tensor `(n,)`.
        """
        # As the product, which TensorFlow may differentiate otherwise in a function than outside.
        sides = graph_function(lambda v: self._replicas.run(lambda part, v: part.sides(v), self._parts, v))
        of_identities = self._replicas.total(sides(v))
        if of_identities is None:
            return None
        return tf.reduce_max([tf.math.divide_no_nan(tf.abs(left - right), size) for left, right, size in of_identities])


class Rows:
    """The weighted Jacobian B of all replicas; see `jacobian`. Vectors of rows are divided among replicas as the cases are.

    Args:
        replicas: `replicas.Replicas`.
        parts: The `jacobian.LocalRows` of every replica, as `replicas` holds them.
        most_cases: Integer, an upper bound of the number of cases, where it is known before they come; else `None`.
    """

    _tangent = None

    def __init__(self, replicas, parts, most_cases=None):
        self._replicas, self._parts, self._most_cases = replicas, parts, most_cases

    def along(self, tangent):
        """Returns these rows along the directions in which weights may move, in `jacobian` and `pull`; B multiplies vectors that are such.

        Args:
            tangent: `constraints.Tangent`; `None` = all directions.
        """
        rows = copy.copy(self)
        rows._tangent = tangent
        return rows

    def _projected(self, columns):
        return columns if self._tangent is None else self._tangent(columns)

    @property
    def jacobian(self):
        """B, `(rows, n)`; `None` on several replicas, or where it is too large to be kept."""
        jacobian = self._parts.jacobian if self._replicas.count == 1 else None
        return None if jacobian is None else self._projected(jacobian)

    @property
    def num_rows(self):
        """The number of rows of B, where it is kept: an integer, else `None`. An upper bound, if only that is known, or of several replicas."""
        part = self._replicas.any_of(self._parts)
        if part.jacobian is None:
            return None
        # Replicas may hold different numbers of cases: that of one says nothing of the others'.
        num_rows = part.jacobian.shape[0] if self._replicas.count == 1 else None
        return num_rows or (self._most_cases and self._most_cases * part.per_case)

    @property
    def residuals(self):
        """s, `(rows,)` on each replica, with `B's` the gradient of the compiled loss."""
        return self._replicas.run(lambda part: part.residuals, self._parts)

    def gathered(self):
        """Returns the rows with B on every replica: these if there is one. Cost: B is sent to all."""
        return self if self._replicas.count == 1 else GatheredRows(self._replicas, self._parts, self.num_rows)

    def gram(self):
        """Returns `B'B`, `(n, n)`."""
        return self._replicas.sum(lambda part: part.gram(), self._parts)

    def pull(self, u):
        """Returns `B'u`, `(n,)`."""
        return self._projected(self._replicas.sum(lambda part, u: part.pull(u), self._parts, u))

    def plus_push(self, u, v):
        """Returns `u + Bv`, `(rows,)` on each replica."""
        return self._replicas.run(lambda part, u, v: u + part.push(v), self._parts, u, v)

    def tangent_error(self, v):
        """Returns by how much Bv and the outputs' forward derivative along v differ, relative to them, a scalar. Cost: about two forward passes."""
        squares = self._replicas.sum(lambda part, v: part.tangent_squares(v), self._parts, v)
        return tf.sqrt(tf.math.divide_no_nan(*squares))

    def norm(self, u):
        """Returns the norm of `(rows,)`, a scalar."""
        return tf.sqrt(self._replicas.sum(lambda u: tf.reduce_sum(u**2), u))

    def combined(self, weights, vectors):
        """Returns the sum of weights, scalars, times vectors, `(rows,)` on each replica."""
        return self._replicas.run(lambda vectors: _combined(weights, vectors), vectors)

    def second_derivative(self, *args):
        """Returns `L'(f''[slope, slope] + J second)`, `(rows,)` on each replica; see `LocalRows.second_derivative`."""
        return self._replicas.run(lambda part, *args: part.second_derivative(*args), self._parts, *args)

    def losses(self, candidates):
        """Returns the compiled loss at several weights, a list of tensors `(k, *shape)`: float64 `(k,)`."""
        return self._replicas.sum(lambda part, candidates: part.losses(candidates), self._parts, candidates)


class GatheredRows(Rows):
    """The rows of all replicas on each of them: less to be sent than `B'B` where there are fewer rows than weights. Vectors of rows are whole.

    Args:
        replicas: `replicas.Replicas`.
        parts: The `jacobian.LocalRows` of every replica, as `replicas` holds them.
        num_rows: Integer, at least the number of rows; those that are missing are zero.
    """

    def __init__(self, replicas, parts, num_rows):
        super().__init__(replicas, parts)
        self._num_rows = num_rows
        self._jacobian = self._whole(lambda part: part.jacobian)

    @property
    def jacobian(self):
        """B, `(rows, n)`."""
        return self._projected(self._jacobian)

    @property
    def residuals(self):
        """s, `(rows,)`."""
        return self._whole(lambda part: part.residuals)

    def pull(self, u):
        """Returns `B'u`, `(n,)`."""
        return self._projected(tf.linalg.matvec(self._jacobian, u, transpose_a=True))

    def plus_push(self, u, v):
        """Returns `u + Bv`, `(rows,)`."""
        return u + tf.linalg.matvec(self._jacobian, v)

    def norm(self, u):
        """Returns the norm of `(rows,)`, a scalar."""
        return tf.norm(u)

    def combined(self, weights, vectors):
        """Returns the sum of weights, scalars, times vectors, `(rows,)`."""
        return _combined(weights, vectors)

    def second_derivative(self, *args):
        """Returns `L'(f''[slope, slope] + J second)`, `(rows,)`."""
        return self._whole(lambda part, *args: part.second_derivative(*args), *args)

    def _whole(self, function, *args):
        """Joins `function(part, *args)` of all replicas along the first axis, and adds zeros up to the number of rows."""
        return self._replicas.joined(function, self._num_rows, self._parts, *args)


def _combined(weights, vectors):
    return tf.add_n([tf.cast(weight, vector.dtype) * vector for weight, vector in zip(weights, vectors, strict=True)])


class Change(NamedTuple):
    """The loss of a chunk before and after a step, and the standard error of the change as that of all cases: float64 scalars."""

    loss_before: tf.Tensor
    loss_after: tf.Tensor
    standard_error: tf.Tensor


class Objective:
    """The objective over all replicas and cases, which an update minimises. Used in cross-replica context.

    While it is in use, the weights are at their start, except during `loss_at` and during a product by differences. Weights with constraints are
    projected: those of every candidate, so that the loss is evaluated at the weights that the update assigns, and the start if it violates them.

    Args:
        replicas: `replicas.Replicas`.
        cases: The `LocalCases` of every replica, as `replicas` holds them.
        network: `FixedNetwork` of any replica.
        most_cases: Integer, an upper bound of the number of cases, where it is known before they come; else `None`.
    """

    def __init__(self, replicas, cases, network, most_cases=None):
        self._replicas, self._task, self._structure = replicas, network.task, network.structure
        self.dtype, self.update_number = network.dtype, network.update_number
        task = self._task
        self._most_cases = most_cases
        self.num_weights = num_weights(task.variables)
        self._start = [tf.convert_to_tensor(variable) for variable in task.variables]
        if any(task.constraints):
            self._start = self.agreed([*map(constraints.where_violated, task.constraints, self._start)])
            assign(task.variables, self._start)
        self._start_vector = pack(self._start, self.dtype)
        self._losses = graph_function(lambda step: self._at(step, lambda part: part.loss()))
        self._unconstrained_losses = graph_function(
            lambda step: self._at_weights(unpack(self._start_vector + step, task.variables), lambda part: part.loss())
        )
        self._chunk_shares = graph_function(lambda step: self._at(step, lambda part: part.chunk_shares()))
        self._sums_over_cases = graph_function(lambda step: self._at(step, lambda part: part.sums_over_cases()))
        self._observed = graph_function(lambda: replicas.run(lambda part: part.observed(), self._parts))
        self.totals = replicas.sum(lambda cases: cases.counts(), cases)
        self._parts = replicas.run(
            lambda cases, totals: LocalObjective(cases, totals, replicas.count), cases, self.totals
        )

    def loss_and_gradient(self):
        """Returns a `Pass` at the start: loss, gradient `(n,)` and the network's states after the pass. Cost: one gradient."""
        found = self._replicas.run(lambda part: part.gradient_pass(), self._parts)
        states = [tf.convert_to_tensor(state) for state in self._structure.states]
        means = [i for i, state in enumerate(states) if state.dtype.is_floating]
        others = [i for i, state in enumerate(states) if not state.dtype.is_floating]
        passes, statistics = found
        total = self._replicas.sum(lambda local: local._replace(states=[local.states[i] for i in means]), passes)
        # The first replica with cases: others have made no pass.
        first = self._replicas.first(
            [states[i] for i in others],
            lambda part, local: (part.micro_batches.num_cases > 0, [local.states[i] for i in others]),
            self._parts,
            passes,
        )
        means_are_there = self.totals.num_cases > 0
        for i, mean in zip(means, total.states, strict=True):
            states[i] = tf.where(means_are_there, mean, states[i])
        for i, value in zip(others, first, strict=True):
            states[i] = value
        return total._replace(states=self._with_statistics(states, statistics))

    def next_states(self, states, num_before):
        """Returns the network's states after an update; the statistics of BatchNormalization are those at the new weights.

        Moving averages would need thousands of steps, and the weights move far in one. Statistics are therefore computed again on the cases used, at
        the new weights. Those of only a few cases (the rest of an epoch) would be poor: old statistics of more cases are kept in part, shifted by
        the change on the few cases.

        Args:
            states: List of tensors, the states from `loss_and_gradient`.
            num_before: Scalar, the number of cases behind the network's statistics.

        Returns:
            List of tensors. Cost: one forward pass, none in networks without BatchNormalization.
        """
        places = self._structure.statistics
        if not places:
            return states
        new = self._with_statistics(states, self._replicas.run(lambda part: part.statistics(), self._parts))
        fresh = tf.math.divide_no_nan(self.totals.num_cases, tf.maximum(self.totals.num_cases, num_before))
        variances = [variance for _, variance in places]
        for place in [place for pair in places for place in pair]:
            old, start, end = (
                tf.cast(x, self.dtype) for x in (self._structure.states[place], states[place], new[place])
            )
            value = batch_statistics.carried_over(old, start, end, fresh, place in variances)
            new[place] = tf.cast(value, states[place].dtype)
        return new

    def _with_statistics(self, states, statistics):
        """Returns the states with BatchNormalization's statistics over all replicas, combined from the `Statistics` of each."""
        places = self._structure.statistics
        if not places:
            return states
        means, variances = batch_statistics.over_replicas(self._replicas, statistics, self.totals.num_cases)
        states = list(states)
        for pair, found in zip(places, zip(means, variances, strict=True), strict=True):
            for place, value in zip(pair, found, strict=True):
                states[place] = tf.cast(value, states[place].dtype)
        return states

    def loss(self):
        """Returns the loss over the batch at the start, float64. Cost: one forward pass."""
        return self._replicas.sum(lambda part: part.loss(), self._parts)

    def observed(self):
        """Returns how many values the batch observed, and by what the loss is multiplied to be the negative log-likelihood: float64 scalars.

        The multiplier is that of cross-entropies. For a network with one loss that is a likelihood. Cost: one forward pass at most.
        """
        number, weights, coefficients = tf.unstack(self._replicas.total(self._observed()))
        return number, tf.math.divide_no_nan(weights, coefficients)

    def loss_at(self, step):
        """Returns the loss over the batch at start + step, float64, and restores the weights. Cost: one forward pass."""
        # Added outside: TensorFlow loses the key of a reduction in a function that is called in a branch.
        return self._replicas.total(self._losses(step))

    def slope_along(self, v, width):
        """Returns `(L(w + width v) - L(w - width v)) / (2 width)` of the loss L, float64; constraints do not count. Cost: two forward passes."""
        ahead, behind = (self._replicas.total(self._unconstrained_losses(sign * width * v)) for sign in (1, -1))
        return (ahead - behind) / (2 * tf.cast(width, tf.float64))

    def chunk_change_at(self, step):
        """Returns the `Change` of the curvature chunk's loss from the start to start + step. Cost: two forward passes of the chunk."""

        def sums(before, after):
            change = after[0] - before[0]
            losses = [tf.reduce_sum(shares) + regularization for shares, regularization in (before, after)]
            return tf.stack([*losses, tf.reduce_sum(change), tf.reduce_sum(change**2)])

        before, after = self._chunk_shares(tf.zeros_like(step)), self._chunk_shares(step)
        loss_before, loss_after, change, squares = tf.unstack(self._replicas.sum(sums, before, after))
        num_cases, in_chunk = (tf.cast(n, tf.float64) for n in (self.totals.num_cases, self.totals.chunk_cases))
        # The variance of a sum of shares: their number times that of one; without replacement, so that all cases have none.
        variance = squares - tf.math.divide_no_nan(change**2, in_chunk)
        variance *= 1 - tf.math.divide_no_nan(in_chunk, num_cases)
        return Change(loss_before, loss_after, tf.sqrt(tf.maximum(variance, 0.0)))

    def loss_and_variation_at(self, step):
        """Returns the loss over the batch at start + step, and the squared coefficient of variation of its cases' absolute losses.

        Float64 scalars; the variation leaves out regularizers. Cost: one forward pass.
        """
        loss, size, squares = tf.unstack(self._replicas.total(self._sums_over_cases(step)))
        num_cases = tf.cast(self.totals.num_cases, tf.float64)
        return loss, tf.maximum(tf.math.divide_no_nan(num_cases * squares, size**2) - 1.0, 0.0)

    def _at(self, step, function):
        """Returns `function(part)` of every replica at start + step."""
        return self._at_weights(self.candidate(step), function)

    def _at_weights(self, weights, function):
        assign(self._task.variables, weights)
        values = self._replicas.run(function, self._parts)
        assign(self._task.variables, self._start)
        return values

    def candidate(self, step):
        """Returns the weights at start + step, a list of tensors."""
        return self._project(unpack(self._start_vector + step, self._task.variables))

    def new_weights(self, step):
        """Returns `candidate(step)`, the same on all workers if the step is."""
        weights = self.candidate(step)
        return self.agreed(weights) if any(self._task.constraints) else weights

    def change(self, step):
        """Returns the change of the weights to `new_weights(step)`, `(n,)`."""
        return pack(self.new_weights(step), self.dtype) - self._start_vector if any(self._task.constraints) else step

    def agreed(self, nest):
        """Returns a nest of tensors as the first of several workers has computed it; on one worker, as it is.

        Whatever is computed from sums over replicas is the same on all workers, but for the rounding of sums over entries, such as inner products.
        What decides how a loop or a branch goes on in which there are products or losses must not differ even by that. Cost: one reduction for all
        scalars, and one for every other tensor.
        """
        return self._replicas.agreed(nest)

    def start(self):
        """Returns the weights at the start, a list of tensors."""
        return self._start

    def tangent_space(self, gradient):
        """Returns the directions in which weights may move: the `constraints.Tangent` at the start, `None` without bounds and norms.

        Args:
            gradient: Tensor `(n,)`.
        """
        return constraints.tangent_space(self._task.constraints, self._start, gradient)

    @property
    def start_vector(self):
        """The weights at the start as one vector `(n,)`."""
        return self._start_vector

    def shared_out(self, function, inputs, costs):
        """Returns the list of `function(*each)` for each of some inputs; on several replicas, each is computed on one of them, which sends it to all.

        Args:
            function: Callable that returns a tensor like the first of its arguments.
            inputs: List of tuples of tensors, computed from sums over replicas.
            costs: List of numbers, what each input costs.
        """
        return self._replicas.shared_out(function, inputs, costs)

    def product(self, curvature):
        """Returns `v -> Gv`, the product over the chunk at the start, including the second derivatives of regularizers.

        It applies to a vector `(n,)` or to every row of `(k, n)`; for all rows together, micro-batches after the first are linearized once. Rows are
        processed in sequence: on a CPU, vectorised products took up to 3.7 times as long, and a third less at best.

        Args:
            curvature: `curvature.Curvature`, fitted to the network: see `Curvature.fitted_to`.
        """
        parts = self._replicas.run(lambda part: part.product(curvature), self._parts)
        return Product(self._replicas, parts, self._task.structural_damping)

    @functools.cached_property
    def rows(self):
        """The `Rows` of the batch at the start. Cost: one vectorised gradient per case and output."""
        parts = self._replicas.run(lambda part: part.rows(self._most_cases), self._parts)
        return Rows(self._replicas, parts, self._most_cases)

    def losses_at(self, steps):
        """Returns the losses over the batch at start + each of several steps, `(k, n)`: float64 `(k,)`. For networks that have `rows`.

        Cost: k forward passes, vectorised. The weights stay as they are.
        """
        candidates = unpack_rows(self._start_vector + steps, self._task.variables)
        if any(self._task.constraints):
            candidates = map_rows(self._project, candidates)
        regularizations = self._replicas.sum(lambda part, c: part.regularizations(c), self._parts, candidates)
        return self.rows.losses(candidates) + regularizations

    @property
    def has_regularization(self):
        """Whether a weight has a regularizer."""
        return bool(self._task.regularizers)

    @property
    def regularized(self):
        """The weights that have a regularizer, a list of `tf.Variable`."""
        return [variable for variable, _ in self._task.regularizers]

    @property
    def has_diagonal_regularization(self):
        """Whether the second derivative of the regularizers is known to be diagonal."""
        kinds = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)
        return all(isinstance(regularizer, kinds) for _, regularizer in self._task.regularizers)

    def regularization_matrix(self):
        """Returns the regularizers' second derivative, `(n, n)`, or `None` without any. Cost: n products of them unless it is diagonal."""
        if not self._task.regularizers:
            return None
        if self.has_diagonal_regularization:
            return tf.linalg.diag(self.regularization_diagonal())
        identity = tf.eye(self.num_weights, dtype=self.dtype)

        def matrix(part):
            return mapped(part.regularization_product(), identity, self.dtype)

        return self._replicas.sum(matrix, self._parts)

    @property
    def epsilon(self):
        """Machine epsilon of the coarsest float type of the network: a Python float."""
        return self._structure.epsilon

    @property
    def rounding(self):
        """The relative difference allowed between two computations of the same number: a Python float."""
        return self._structure.rounding

    @property
    def variables(self):
        """The trainable weights, a list of `tf.Variable`, in the order of flat vectors."""
        return self._task.variables

    @property
    def captured(self):
        """The layers whose gradients are computed from their inputs and pre-activations, a list of `keras.Layer`."""
        return self._structure.captured

    def sum_over_chunk(self, function, num_cases=None):
        """Returns a sum over micro-batches of the chunk, and over all replicas.

        Args:
            function: Callable `(micro_batch, seeds) -> nest of tensors`. `micro_batch` is a `MicroBatch` with batch statistics held constant;
                `seeds`, int32 `(cases, 2)`, holds two numbers per case that are unique to the case and the update and do not depend on micro-batches
                and replicas.
            num_cases: Integer, the largest number of the chunk's cases to use; `None` = all. Float: the share of the batch's cases instead, which may
                be more than the chunk.
        """
        return self._replicas.sum(lambda part: part.sum_over_chunk(function, num_cases), self._parts)

    def squared_gradients(self, skipped=()):
        """Returns the mean over the batch's cases of the squared gradient of a case's loss, `(n,)`, without regularizers.

        Args:
            skipped: List of captured layers whose entries are zero, at no cost.
        """
        return self._replicas.sum(lambda part: part.squared_gradients(skipped), self._parts)

    def regularization_diagonal(self):
        """Returns the diagonal of the regularizers' second derivative, `(n,)`, if that is diagonal, as for L2; never negative."""
        ones = tf.ones([self.num_weights], self.dtype)
        return tf.maximum(self._replicas.sum(lambda part: part.regularization_product()(ones), self._parts), 0.0)

    def _project(self, values):
        return [*map(constraints.projected, self._task.constraints, values)]
