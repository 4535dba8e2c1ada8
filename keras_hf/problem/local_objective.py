"""The objective on one replica's cases, processed in micro-batches: one replica's terms of the sums that `objective` takes over all replicas."""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from keras_hf.common.loops import map_rows
from keras_hf.common.vectors import dense, dot, inner_product, num_weights, pack, unpack
from keras_hf.differentiation.jacobian import LocalRows, compiles_rows, rows_dtype
from keras_hf.differentiation.linearization import DoubleBackward
from keras_hf.network.capture import squared_gradients
from keras_hf.problem.batching import share_of
from keras_hf.problem.micro_batch import MicroBatch, Totals

# Roundings of H, in machine epsilons of the outputs' type.
_NOISE = 10.0


class Pass(NamedTuple):
    """One pass over all micro-batches: loss in float64, gradient `(n,)`, the network's states after it.

    Losses and gradients are sums over micro-batches. So are floating-point states: they are the mean over cases of the states after each micro-batch.
    Other states (counts, flags) have no mean, and the first micro-batch's are taken. Statistics of BatchNormalization are those of all cases
    together.
    """

    loss: tf.Tensor
    gradient: tf.Tensor
    states: list


class LocalCases:
    """One replica's cases and their division into micro-batches. Used in replica context.

    Args:
        network: `fixed_network.FixedNetwork`.
        data: `fixed_network.Data`.
        micro_batches: `batching.MicroBatches`.
    """

    def __init__(self, network, data, micro_batches):
        self.network, self.data, self.micro_batches = network, data, micro_batches
        self.dtype = network.dtype

    def of_micro_batch(self, number):
        """Returns the cases of micro-batch `number`."""
        return self.data.take(self.micro_batches.indices(number))

    def counts(self):
        """Returns this replica's terms of `Totals`. Cost: if an output's mask must be known, the part of a forward pass that computes it."""
        num_cases, chunk_size = (
            tf.cast(n, self.dtype) for n in (self.micro_batches.num_cases, self.micro_batches.chunk_size)
        )
        combinations = self.network.structure.combinations
        of_batch = of_chunk = tf.zeros([len(combinations)], self.dtype)
        if "data" in combinations:

            def add_micro_batch(number, sums):
                data = self.of_micro_batch(number)
                with self.network.fixed_state(number):
                    terms = self.network.task.loss_terms(data, self.network.evaluate(data, number).y_pred)
                    found = [
                        tf.cast(term.denominator(), self.dtype) if combination == "data" else tf.zeros([], self.dtype)
                        for term, combination in zip(terms, combinations, strict=True)
                    ]
                in_chunk = tf.cast(number < self.micro_batches.num_in_chunk, self.dtype)
                return sums[0] + tf.stack(found), sums[1] + in_chunk * tf.stack(found)

            of_batch, of_chunk = _over_micro_batches(
                0, self.micro_batches.num_in_batch, add_micro_batch, (of_batch, of_chunk)
            )
        return Totals(num_cases, of_batch, chunk_size, of_chunk)


class LocalObjective:
    """The objective on one replica's cases, as terms of sums over all replicas. Used in replica context.

    Args:
        cases: `LocalCases`.
        totals: `micro_batch.Totals`, the sums of `LocalCases.counts` over all replicas.
        num_replicas: Integer.
    """

    def __init__(self, cases, totals, num_replicas):
        self._cases, self._totals, self._num_replicas = cases, totals, num_replicas
        self._network, self.micro_batches = cases.network, cases.micro_batches
        self._task, self._structure, self._dtype = cases.network.task, cases.network.structure, cases.network.dtype

    def _micro_batch(self, number, of_chunk):
        """Returns micro-batch `number` as part of the chunk or of the batch."""
        return MicroBatch(self._network, self._totals, self._cases.of_micro_batch(number), number, of_chunk)

    def gradient_pass(self):
        """Returns a `Pass` and its `batch_statistics.Statistics` over all micro-batches, and updates the metrics. Cost: one gradient."""
        task = self._task

        def add_micro_batch(number, sums):
            sums, statistics = sums
            micro_batch = self._micro_batch(number, of_chunk=False)
            gradient, evaluation = micro_batch.gradient()
            gradient = pack(gradient, self._dtype) / micro_batch.loss_scale
            task.update_metrics(evaluation.data, evaluation.y_pred)
            states = [
                total + tf.cast(micro_batch.share, total.dtype) * new
                if total.dtype.is_floating
                else tf.where(number == 0, new, total)
                for total, new in zip(sums.states, evaluation.states, strict=True)
            ]
            sums = Pass(sums.loss + micro_batch.accurate_share(evaluation), sums.gradient + gradient, states)
            return sums, statistics.joined(self._network.statistics(micro_batch.num_cases, evaluation.states))

        with tf.GradientTape() as tape:
            regularization = self._regularization()
        gradient = pack(dense(tape.gradient(regularization, task.variables), task.variables), self._dtype)
        states = [
            tf.zeros_like(value) if value.dtype.is_floating else value
            for value in map(tf.convert_to_tensor, self._structure.states)
        ]
        start = Pass(tf.cast(regularization, tf.float64), gradient, states)
        return _over_micro_batches(
            0, self.micro_batches.num_in_batch, add_micro_batch, (start, self._network.no_statistics())
        )

    def statistics(self):
        """Returns the `batch_statistics.Statistics` over all micro-batches at the current weights. Cost: one forward pass."""

        def add_micro_batch(number, statistics):
            data = self._cases.of_micro_batch(number)
            states = self._network.evaluate(data, number).states
            return statistics.joined(self._network.statistics(data.num_cases, states))

        return _over_micro_batches(0, self.micro_batches.num_in_batch, add_micro_batch, self._network.no_statistics())

    def loss(self):
        """Returns this replica's share of the loss over the batch: float64 scalar. Cost: one forward pass."""

        def add_micro_batch(number, total):
            micro_batch = self._micro_batch(number, of_chunk=False)
            return total + micro_batch.accurate_share(micro_batch.forward())

        return _over_micro_batches(
            0, self.micro_batches.num_in_batch, add_micro_batch, tf.cast(self._regularization(), tf.float64)
        )

    def observed(self):
        """Returns this replica's share of `Objective.observed`, float64 `(3,)`; see `MicroBatch.observed`."""

        def add_micro_batch(number, total):
            micro_batch = self._micro_batch(number, of_chunk=False)
            return total + micro_batch.observed(micro_batch.forward())

        return _over_micro_batches(0, self.micro_batches.num_in_batch, add_micro_batch, tf.zeros([3], tf.float64))

    def chunk_shares(self):
        """Returns each case's share of the chunk's loss, float64 `(chunk_size,)`, and this replica's share of the regularizers' loss.

        Cost: one forward pass of the chunk.
        """

        def add_micro_batch(number, shares):
            micro_batch = self._micro_batch(number, of_chunk=True)
            places = number * self.micro_batches.micro_batch_size + tf.range(micro_batch.num_cases)
            return tf.tensor_scatter_nd_update(shares, places[:, None], micro_batch.case_shares(micro_batch.forward()))

        zeros = tf.zeros([self.micro_batches.chunk_size], tf.float64)
        shares = _over_micro_batches(0, self.micro_batches.num_in_chunk, add_micro_batch, zeros)
        return shares, tf.cast(self._regularization(), tf.float64)

    def sums_over_cases(self):
        """Returns this replica's share of the loss, and the sums of the absolute values and of the squares of its cases' shares.

        Float64 `(3,)`. Cost: one forward pass.
        """

        def add_micro_batch(number, total):
            micro_batch = self._micro_batch(number, of_chunk=False)
            shares = micro_batch.case_shares(micro_batch.forward())
            return total + tf.stack([tf.reduce_sum(sums) for sums in (shares, tf.abs(shares), shares**2)])

        start = tf.stack([tf.cast(self._regularization(), tf.float64), 0.0, 0.0])
        return _over_micro_batches(0, self.micro_batches.num_in_batch, add_micro_batch, start)

    def regularizations(self, candidates):
        """This replica's shares of the regularizers' loss at several weights, float64 `(k,)`.

        Args:
            candidates: List of tensors `(k, *weight's shape)`.
        """
        places = {id(variable): place for place, variable in enumerate(self._task.variables)}
        total = tf.zeros([tf.shape(candidates[0])[0]], tf.float64)
        for variable, regularizer in self._task.regularizers:
            of_one = lambda value, regularizer=regularizer: tf.cast(regularizer(value), tf.float64)  # noqa: E731
            total += map_rows(of_one, candidates[places[id(variable)]], tf.float64)
        return tf.cast(self._regularization_share(), tf.float64) * total

    def rows(self, most_cases=None):
        """The `jacobian.LocalRows` of all cases.

        Args:
            most_cases: Integer, an upper bound of their number over all replicas, or `None`.
        """
        most_cases = most_cases and -(-most_cases // self._num_replicas)
        micro_batch = MicroBatch(self._network, self._totals, self._cases.data, tf.constant(0), of_chunk=False)
        # Programs read the variables of one device only.
        is_alone = self._num_replicas == 1
        programs = self._network.programs if is_alone else None
        dtypes = self._dtype, rows_dtype(self._structure, self._dtype)
        return LocalRows(micro_batch, *dtypes, programs, compiles_rows(self._structure) and is_alone, most_cases)

    def _regularization_share(self):
        return tf.cast(self._totals.num_cases > 0, self._dtype) / self._num_replicas

    def _regularization(self):
        """Returns this replica's share of the regularizers' loss; 0 for a batch without cases, which gives no information."""
        losses = [tf.cast(regularizer(variable), self._dtype) for variable, regularizer in self._task.regularizers]
        return self._regularization_share() * tf.add_n(losses) if losses else tf.zeros([], self._dtype)

    def regularization_product(self):
        """Returns `v -> Rv` on flat vectors, this replica's share of the regularizers' second derivative R."""
        if not self._task.regularizers:
            return tf.zeros_like
        product = DoubleBackward().hessian(self._regularization, self._task.variables)
        return lambda v: pack(product(unpack(v, self._task.variables)), self._dtype)

    def product(self, curvature):
        """Returns `v -> Gv` on flat vectors or rows of them, this replica's share over the chunk, regularizers included.

        With structural damping a second argument, a scalar, is that by which G_S is added to G; see `structural_damping.StructuralDamping`.

        The first micro-batch is linearized now and kept; further micro-batches, if the chunk has them, are linearized again in every product, so that
        memory is bounded by that of one micro-batch.
        """
        micro_batch = self._micro_batch(tf.constant(0), of_chunk=True)
        first = curvature.linearize(micro_batch)
        regularization = self.regularization_product()

        def image(linearized, v, more):
            return _by_rows(lambda v: pack(linearized(unpack(v, self._task.variables), *more), self._dtype), v)

        def product(v, *more):
            size = self._size(v)
            scaled = v / size

            def add_micro_batch(number, total):
                return total + image(curvature.linearize(self._micro_batch(number, of_chunk=True)), scaled, more)

            total = self._of_cases(image(first, scaled, more))
            if not self.micro_batches.chunk_is_one:
                total = _over_micro_batches(1, self.micro_batches.num_in_chunk, add_micro_batch, total)
            return (size / micro_batch.loss_scale) * total + _by_rows(regularization, v)

        def forms(vectors):
            parts = [unpack(v / self._size(v), self._task.variables) for v in vectors]
            total = self._of_cases(_forms(first, parts))
            if not self.micro_batches.chunk_is_one:
                total = _over_micro_batches(
                    1,
                    self.micro_batches.num_in_chunk,
                    lambda number, total: (
                        total + _forms(curvature.linearize(self._micro_batch(number, of_chunk=True)), parts)
                    ),
                    total,
                )
            sizes = tf.stack([tf.cast(tf.reshape(self._size(v), []), tf.float64) for v in vectors])
            total *= sizes[:, None] * sizes / tf.cast(micro_batch.loss_scale, tf.float64)
            if not self._task.regularizers:
                return total
            images = [regularization(v) for v in vectors]
            return total + tf.stack([tf.stack([dot(v, image) for image in images]) for v in vectors])

        # The kept micro-batch is checked: another linearization would take seconds to trace.
        return _LocalProduct(
            product, forms, lambda v: self._sides(first, v, micro_batch.loss_scale / micro_batch.all_cases)
        )

    def _of_cases(self, sums):
        """Returns the results of the chunk's first micro-batch, a nest of tensors; zeros if the micro-batch is empty, as on a replica without cases.

        The mean over zero cases, which BatchNormalization takes, is NaN, and would make a sum over replicas NaN.
        """
        if self._num_replicas == 1:
            return sums
        return tf.nest.map_structure(
            lambda value: tf.where(self.micro_batches.chunk_size > 0, value, tf.zeros_like(value)), sums
        )

    def _size(self, v):
        """Returns the divisor of a vector, or of each row, before it is passed through the network.

        1, except for float16, where CG's small vectors would become zero.
        """
        if not self._structure.is_float16:
            return tf.ones([], self._dtype)
        largest = tf.reduce_max(tf.abs(v), -1, keepdims=v.shape.rank == 2)
        return tf.where(largest > 0, largest, tf.ones_like(largest))

    def _sides(self, linearized, v, scale):
        """Computes, for a random u, both sides of `u'(Jv) = (J'u)'v` on a micro-batch, and of `v'Gv = (Jv)'H(Jv)` where that does not follow.

        Args:
            linearized: `linearization.Linearized` of the micro-batch.
            v: Tensor `(n,)`.
            scale: Scalar, by which the loss of a case counts in H.

        Returns:
            For each identity a triple of float64 scalars: left side, right side, and the size that their difference is relative to. `None` for a
            curvature without J.
        """
        if getattr(linearized, "factors", None) is None:
            return None
        v = unpack(v / self._size(v), self._task.variables)
        tangents_of, hessian, pull_back = linearized.factors()
        tangents = _copied(tangents_of(v))
        u = [
            tf.cast(tf.random.stateless_normal(tf.shape(tangent), [seed, 2], dtype=self._dtype), tangent.dtype)
            for seed, tangent in enumerate(tangents)
        ]
        # In sequence: memory is that of one pass. What comes after a call of a function does not wait for its results, but for operations on them.
        with tf.control_dependencies(tangents):
            left, right = inner_product(u, tangents), inner_product(pull_back(_copied(u)), v)
        # If all tangents are lost, their size is zero, and the right side shows the error.
        found = [(left, right, tf.sqrt(inner_product(u, u) * inner_product(tangents, tangents)) + tf.abs(right))]
        if not linearized.is_of_factors:
            with tf.control_dependencies([right]):
                image = _copied(linearized(_copied(v)))
            left, right = inner_product(v, image), inner_product(tangents, hessian(tangents))
            if linearized.added is not None:
                right += inner_product(v, linearized.added(v))
            # The last term: if positive and negative curvature cancel, rounding is not small compared with the remainder; nor is it where a
            # classifier is sure of all cases, so that H is the difference of numbers that cancel.
            size = tf.sqrt(inner_product(v, v) * inner_product(image, image))
            noise = _NOISE * self._structure.epsilon / self._structure.rounding * tf.cast(scale, tf.float64)
            size = tf.abs(left) + tf.abs(right) + 1e-4 * size + noise * inner_product(tangents, tangents)
            found.append((left, right, size))
        return self._of_cases(found)

    def sum_over_chunk(self, function, num_cases):
        """Returns this replica's term of `Objective.sum_over_chunk`."""
        micro_batches = self.micro_batches
        if isinstance(num_cases, float):
            # Of one micro-batch at most, where no loop over micro-batches is traced.
            most = micro_batches.micro_batch_size if micro_batches.chunk_is_one else micro_batches.num_cases
            wanted = micro_batches.share_of_first(share_of(num_cases, micro_batches.cases.num_cases))
            micro_batches = micro_batches._replace(chunk_size=tf.minimum(wanted, most))
        elif num_cases is not None:
            micro_batches = micro_batches._replace(
                chunk_size=tf.minimum(micro_batches.chunk_size, micro_batches.share_of_first(num_cases))
            )

        def of_micro_batch(number):
            indices = micro_batches.indices(number)
            # Not the numbers of micro-batch and replica: results must not depend on how cases are divided.
            numbers = micro_batches.cases.numbers(indices)
            seeds = tf.stack([numbers, tf.fill(tf.shape(numbers), self._network.update_number)], 1)
            micro_batch = MicroBatch(self._network, self._totals, self._cases.data.take(indices), number, of_chunk=True)
            return function(micro_batch.cases_apart(), seeds)

        total = self._of_cases(of_micro_batch(tf.constant(0)))
        if micro_batches.chunk_is_one:
            return total
        add_micro_batch = lambda number, total: tf.nest.map_structure(tf.add, total, of_micro_batch(number))  # noqa: E731
        return _over_micro_batches(1, micro_batches.num_in_chunk, add_micro_batch, total)

    def squared_gradients(self, skipped=()):
        """Returns this replica's share of the mean over cases of the squared gradient of a case's loss, `(n,)`. Cost: about two gradients.

        If the loss is the sum of the cases' shares c_i, this is `N * sum_i (dc_i)^2`: for a mean over N cases, the mean of their squared gradients.
        """

        def add_micro_batch(number, total):
            micro_batch = self._micro_batch(number, of_chunk=False).cases_apart()
            squares = squared_gradients(micro_batch, self._structure.captured, skipped)
            return total + pack(squares, self._dtype) / micro_batch.loss_scale**2

        zeros = tf.zeros([num_weights(self._task.variables)], self._dtype)
        return self._totals.num_cases * _over_micro_batches(0, self.micro_batches.num_in_batch, add_micro_batch, zeros)


class _LocalProduct(NamedTuple):
    """One replica's share of a product `v -> Gv`, the forms `v'Gw`, and the sides of the product's identities; see `LocalObjective`."""

    product: Callable
    forms: Callable
    sides: Callable


def _copied(tensors):
    return [tf.identity(tensor) for tensor in tensors]


def _forms(linearized, vectors):
    """Returns `v'Gw` of every two of a list of vectors, each a list of tensors shaped as the weights: float64 `(k, k)`."""
    if getattr(linearized, "factors", None) is None:
        left, right = vectors, [linearized(v) for v in vectors]
    else:
        tangents_of, hessian, _ = linearized.factors()
        left = [tangents_of(v) for v in vectors]
        right = [hessian(tangents) for tangents in left]
    forms = tf.stack([tf.stack([inner_product(a, b) for b in right]) for a in left])
    if getattr(linearized, "added", None) is not None:
        images = [linearized.added(v) for v in vectors]
        forms += tf.stack([tf.stack([inner_product(v, image) for image in images]) for v in vectors])
    return (forms + tf.transpose(forms)) / 2


def _over_micro_batches(first, stop, add_micro_batch, sums):
    """Runs `sums = add_micro_batch(number, sums)` for the micro-batches first..stop-1 in sequence: memory is that of one micro-batch."""
    # What comes before the loop is to be done: micro-batches do not depend on it, and would be computed beside it.
    with tf.control_dependencies(tf.nest.flatten(sums)):
        number = tf.identity(first)
    _, sums = tf.while_loop(
        lambda number, _: number < stop,
        lambda number, sums: (number + 1, add_micro_batch(number, sums)),
        (number, sums),
        parallel_iterations=1,
    )
    return sums


def _by_rows(function, v):
    """Applies `(n,) -> (n,)` to a vector, or to every row of `(k, n)` in sequence: memory is that of one row."""
    return function(v) if v.shape.rank == 1 else map_rows(function, v)
