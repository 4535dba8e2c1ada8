"""The objective: network and loss on given cases as functions of one flat vector of all trainable weights `(n,)`.

Each replica holds a `LocalObjective`, its own cases worked through in pieces; the `Objective` adds over replicas, adds what concerns the weights
alone (regularizers), packs and unpacks the flat vector, and assigns candidate weights and restores them. It knows no damping and no CG.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_hf.capture import constant_statistics, own_statistics, squared_gradients
from keras_hf.linearization import DoubleBackward, dense
from keras_hf.replicas import replica_number
from keras_hf.vectors import assign, inner_product, num_weights, pack, unpack, vector_dtype


class Task(NamedTuple):
    """What the Keras room hands over: the model as plain functions.

    Attributes:
        network: Callable `x -> y_pred`, the network in training mode.
        loss_terms: Callable `(data, y_pred) -> list of loss_terms.LossTerm`, the compiled loss without regularizers and added losses; no terms if
            the model has only added losses.
        regularizers: List of `(tf.Variable, callable variable -> scalar)`, the losses that depend on one weight alone.
        update_metrics: Callable `(data, y_pred)`, called once per piece with its outputs before the update.
        variables: List of `tf.Variable`, the trainable weights.
        constraints: List, for every variable its Keras constraint, a callable that projects a value, or `None`.
        states: List of `keras.Variable`, the non-trainable values that a forward pass may change, seeds apart.
        seeds: List of `keras.Variable`, the states of the network's seed generators.
        seed: int32 scalar `keras.Variable`, the optimizer's seed.
        layers: List of `keras.Layer`, all layers of the network.
    """

    network: Callable
    loss_terms: Callable
    regularizers: list
    update_metrics: Callable
    variables: list
    constraints: list
    states: list
    seeds: list
    seed: keras.Variable
    layers: list


class Data(NamedTuple):
    """Cases as Keras hands them over: nests of tensors whose first axis is the case, or `None`."""

    x: Any
    y: Any
    sample_weight: Any

    def take(self, indices):
        """Returns the cases at `indices`, int32 `(k,)`."""
        return Data(
            *keras.tree.map_structure(lambda leaf: None if leaf is None else tf.gather(leaf, indices), tuple(self))
        )

    @property
    def num_cases(self):
        """Number of cases, an int32 scalar."""
        return tf.shape(self._first_leaf)[0]

    def num_nonfinite_cases(self):
        """Returns how many cases hold a number that is not finite, in inputs, targets or weights: an int32 scalar."""
        leaves = [leaf for leaf in keras.tree.flatten(tuple(self)) if leaf is not None and leaf.dtype.is_floating]
        bad = tf.zeros([self.num_cases], tf.bool)
        for leaf in leaves:
            bad |= tf.reduce_any(~tf.math.is_finite(leaf), tf.range(1, tf.rank(leaf)))
        return tf.reduce_sum(tf.cast(bad, tf.int32))

    @property
    def static_num_cases(self):
        """Number of cases where it is known before they come, else `None`."""
        return self._first_leaf.shape[0]

    @property
    def _first_leaf(self):
        return next(leaf for leaf in keras.tree.flatten(self.x) if leaf is not None)


class Evaluation(NamedTuple):
    """One forward pass on one piece.

    Attributes:
        data: `Data`, the piece's cases.
        y_pred: The network's outputs, as Keras gives them.
        outputs: List of tensors, those that the loss is cut at: logits or entries of `y_pred`.
        added_loss: Scalar, the sum of the losses added in `call` and by activity regularizers, or `None`.
        states: List of tensors, what the pass would make of `Structure.states`; but of BatchNormalization the statistics of its inputs themselves,
            not the moving averages of them.
    """

    data: Data
    y_pred: Any
    outputs: list
    added_loss: Any
    states: list


class Totals(NamedTuple):
    """Over all replicas, of the batch and of the chunk: numbers of cases, and denominators of the loss terms `(terms,)`; in the weights' dtype."""

    num_cases: tf.Tensor
    denominators: tf.Tensor
    chunk_cases: tf.Tensor
    chunk_denominators: tf.Tensor


class Pass(NamedTuple):
    """One pass over all pieces: loss in float64, gradient `(n,)`, the network's states after it.

    Losses and gradients are sums of shares. So are states that are floats, the mean over cases of what pieces make of them; of other states
    (counts, flags) there is no mean, and the first piece's are taken. Statistics of BatchNormalization are those of all cases together.
    """

    loss: tf.Tensor
    gradient: tf.Tensor
    states: list


class Statistics(NamedTuple):
    """Of the inputs of BatchNormalization layers: the number of cases, and lists of means and variances, in the type of flat vectors."""

    num_cases: tf.Tensor
    means: list
    variances: list

    def joined(self, other):
        """Returns those of both together; updates as in Chan, Golub & LeVeque (1983) cancel no digits."""
        num_cases = self.num_cases + other.num_cases
        share = tf.math.divide_no_nan(other.num_cases, num_cases)
        moves = [new - old for old, new in zip(self.means, other.means, strict=True)]
        return Statistics(
            num_cases,
            [mean + share * move for mean, move in zip(self.means, moves, strict=True)],
            [
                (1 - share) * old + share * new + share * (1 - share) * move**2
                for old, new, move in zip(self.variances, other.variances, moves, strict=True)
            ],
        )


class PieceFunction:
    """One piece of data as a function of the weights: what a curvature linearizes and a preconditioner looks into.

    Args:
        local: `LocalObjective`, whose piece this is.
        data: `Data`, its cases.
        number: int32 scalar, the piece's number.
        of_chunk: Whether it enters the mean over the curvature chunk, or that over the batch.
        statistics: See `LocalObjective.evaluate`.

    Attributes:
        variables: List of `tf.Variable`.
        has_added_loss: Whether the network adds losses of its own.
        num_cases: int32 scalar.
        all_cases: Scalar, the cases of the chunk or of the batch, those of other pieces and replicas among them.
        share: Scalar, the piece's part of all cases.
        loss_scale: Scalar, by which `loss`, `added_loss` and their derivatives are larger than the piece's shares, as in mixed-precision training:
            what is made of them is divided by it. 1, but for float16, whose range the derivatives of a mean would leave: the number of all cases.
    """

    def __init__(self, local, data, number, of_chunk, statistics=()):
        self.variables = local.task.variables
        self.has_added_loss = local.structure.has_added_loss
        self.num_cases = data.num_cases
        self.all_cases = local.totals.chunk_cases if of_chunk else local.totals.num_cases
        self.share = tf.math.divide_no_nan(tf.cast(self.num_cases, local.dtype), self.all_cases)
        is_scaled = local.structure.is_float16 and "sum" not in local.structure.combinations
        self.loss_scale = self.all_cases if is_scaled else tf.ones([], local.dtype)
        self._local, self._data, self._number, self._of_chunk = local, data, number, of_chunk
        self._statistics = statistics

    def forward(self):
        """Runs the network once and returns an `Evaluation`. Nothing is assigned: every call sees the same random numbers and statistics."""
        return self._local.evaluate(self._data, self._number, self._statistics)

    def cases(self, indices):
        """Returns the function of the piece's cases at `indices`, int32 `(k,)`, alone."""
        return PieceFunction(self._local, self._data.take(indices), self._number, self._of_chunk, self._statistics)

    def cases_apart(self):
        """Returns the piece with its batch statistics held constant, so that each case has a gradient of its own."""
        statistics = self._local.batch_statistics(self._data, self._number)
        return PieceFunction(self._local, self._data, self._number, self._of_chunk, statistics)

    def signs(self, salt):
        """Returns a random sign for every case, float32 `(cases,)`, others in another update or with another int32 `salt`."""
        seed = tf.stack([self._local.update_number, 65536 * self._number + salt])
        return 2.0 * tf.cast(tf.random.stateless_uniform([self.num_cases], seed) < 0.5, tf.float32) - 1.0

    @property
    def hessian_is_diagonal(self):
        """Whether the second derivative of `loss` in the outputs is."""
        return self._local.structure.is_entrywise

    @property
    def is_vectorizable(self):
        """Whether TensorFlow vectorises the network over cases."""
        return self._local.structure.is_vectorizable

    @property
    def floats_per_case(self):
        """Floats that a gradient of one case computes, about."""
        return self._local.structure.bytes_per_case // 4

    def loss(self, evaluation):
        """The piece's share of the compiled loss, times `loss_scale`, a scalar."""
        dtype = self._local.dtype
        return self.loss_scale * self._sum_of_terms(evaluation, lambda term: tf.cast(term.value(), dtype), dtype)

    def added_loss(self, evaluation):
        """The piece's share of the added losses, times `loss_scale`, a scalar."""
        return self.loss_scale * self.share * evaluation.added_loss

    def whole_loss(self, evaluation):
        """The piece's share of the compiled loss and of the added losses, times `loss_scale`, a scalar."""
        loss = self.loss(evaluation)
        return loss + self.added_loss(evaluation) if self.has_added_loss else loss

    def gradient(self):
        """Returns the gradient of `whole_loss`, a list of tensors, and the `Evaluation`. Cost: one gradient."""
        with tf.GradientTape() as tape:
            evaluation = self.forward()
            loss = self.whole_loss(evaluation)
        return dense(tape.gradient(loss, self.variables), self.variables), evaluation

    def gradient_at(self, weights):
        """Returns the gradient of `whole_loss` at other weights, a list of tensors. The weights are as before afterwards. Cost: one gradient."""
        before = [tf.convert_to_tensor(variable) for variable in self.variables]
        assign(self.variables, weights)
        gradient, _ = self.gradient()
        assign(self.variables, before)
        return gradient

    def accurate_share(self, evaluation):
        """The piece's share of the whole loss, a float64 scalar."""
        loss = self._sum_of_terms(evaluation, lambda term: term.accurate_value(), tf.float64)
        return loss + tf.cast(self.share * evaluation.added_loss, tf.float64) if self.has_added_loss else loss

    def case_shares(self, evaluation):
        """What each case adds to the whole loss, float64 `(cases,)`; the same of every case where only their sum is known."""
        evenly = lambda sum_: tf.fill([self.num_cases], tf.cast(sum_, tf.float64) / tf.cast(self.num_cases, tf.float64))  # noqa: E731

        def shares(term):
            losses = term.case_losses()
            return evenly(term.accurate_value()) if losses is None else losses

        of_terms = self._sum_of_terms(evaluation, shares, tf.float64, [self.num_cases])
        return of_terms + evenly(self.share * evaluation.added_loss) if self.has_added_loss else of_terms

    def _sum_of_terms(self, evaluation, value_of, dtype, shape=()):
        """The sum of the terms of the compiled loss, each by its denominator's part of the denominator of all."""
        local, totals = self._local, self._local.totals
        scaled = [tf.zeros(shape, dtype)]
        with local.fixed_state(self._number):
            terms = local.task.loss_terms(evaluation.data, evaluation.y_pred)
            for i, (term, combination) in enumerate(zip(terms, local.structure.combinations, strict=True)):
                value = value_of(term)
                if combination == "sum":
                    # A sum over the chunk stands for the sum over the batch.
                    scale = totals.num_cases / totals.chunk_cases if self._of_chunk else 1.0
                elif combination == "data":
                    denominators = totals.chunk_denominators if self._of_chunk else totals.denominators
                    scale = tf.math.divide_no_nan(tf.cast(term.denominator(), local.dtype), denominators[i])
                else:
                    scale = self.share
                scaled.append(tf.cast(scale, dtype) * value)
        return tf.add_n(scaled)


class LocalObjective:
    """The objective on one replica's cases, as shares of sums over all replicas. Lives in replica context.

    Args:
        task: `Task`.
        structure: `structure.Structure`, what the traced network told.
        data: `Data`, this replica's cases.
        pieces: `batching.Pieces`.
        update_number: int32 scalar, which the random numbers of an update are derived from.
    """

    def __init__(self, task, structure, data, pieces, update_number):
        self.task, self.structure, self.pieces = task, structure, pieces
        self.dtype = vector_dtype(task.variables)
        self._data, self.update_number = data, update_number
        self.totals = self._num_replicas = None

    def counts(self):
        """This replica's parts of `Totals`. Cost: a forward pass where an output's mask must be known, as far as the mask needs one."""
        num_cases, chunk_size = (tf.cast(n, self.dtype) for n in (self.pieces.num_cases, self.pieces.chunk_size))
        combinations = self.structure.combinations
        of_batch = of_chunk = tf.zeros([len(combinations)], self.dtype)
        if "data" in combinations:

            def add_piece(number, sums):
                data = self._data.take(self.pieces.indices(number))
                with self.fixed_state(number):
                    terms = self.task.loss_terms(data, self.evaluate(data, number).y_pred)
                    found = [
                        tf.cast(term.denominator(), self.dtype) if combination == "data" else tf.zeros([], self.dtype)
                        for term, combination in zip(terms, combinations, strict=True)
                    ]
                in_chunk = tf.cast(number < self.pieces.num_chunk_pieces, self.dtype)
                return sums[0] + tf.stack(found), sums[1] + in_chunk * tf.stack(found)

            of_batch, of_chunk = _over_pieces(0, self.pieces.num_pieces, add_piece, (of_batch, of_chunk))
        return Totals(num_cases, of_batch, chunk_size, of_chunk)

    def set_totals(self, totals, num_replicas):
        """Tells this replica the sums of `counts` over all of them, and how many they are."""
        self.totals, self._num_replicas = totals, num_replicas

    def evaluate(self, data, number, statistics=(), measured=None):
        """Runs the network on a piece.

        Args:
            data: `Data`, the piece's cases.
            number: int32 scalar, the piece's number, which its random numbers depend on.
            statistics: Pairs of a moving statistic of BatchNormalization and the value it has, as a constant, instead of the piece's.
            measured: List of BatchNormalization layers whose own statistics are among the states; by default `measured_normalizations`.

        Returns:
            An `Evaluation`.
        """
        measured = self.structure.measured_normalizations if measured is None else measured
        frozen = constant_statistics(self.structure.batch_normalizations) if statistics else own_statistics(measured)
        with self.fixed_state(number, statistics) as scope, frozen:
            y_pred = self.task.network(data.x)
        states = [scope.get_current_value(state) for state in self.structure.states]
        added = tf.add_n([tf.cast(loss, self.dtype) for loss in scope.losses]) if scope.losses else None
        return Evaluation(data, y_pred, self.structure.cut(y_pred), added, states)

    def batch_statistics(self, data, number):
        """The statistics that BatchNormalization layers take of a piece, as pairs of a moving statistic and its tensor. Cost: one forward pass."""
        layers = self.structure.batch_normalizations
        if not layers:
            return []
        states = self.evaluate(data, number, measured=layers).states
        moving = {id(v) for layer in layers for v in (layer.moving_mean, layer.moving_variance)}
        return [(state, new) for state, new in zip(self.structure.states, states, strict=True) if id(state) in moving]

    def num_nonfinite_cases(self):
        """This replica's cases that hold a number that is not finite, a scalar."""
        return tf.cast(self._data.num_nonfinite_cases(), self.dtype)

    def fixed_state(self, number, values=()):
        """A scope in which piece `number` sees the same random numbers at every call of an update, and no state is changed.

        A seed generator's state is a seed and a counter of its calls, which no file of Keras holds. The optimizer's seed, which is saved, takes its
        place, moved by the update's number and the generator's place in the network, by multipliers (Knuth's and another) that keep neighbouring
        seeds apart; the piece's and the replica's numbers are the counter's upper bits, which leaves 2^12 calls within one pass.
        """
        if not self.task.seeds:
            return keras.StatelessScope(state_mapping=list(values), collect_losses=True)
        place = tf.cast(number, tf.int64) * 2**12 + tf.cast(replica_number(), tf.int64) * 2**28
        first = tf.cast(self.task.seed.value, tf.int64) + tf.cast(self.update_number, tf.int64) * 2654435761
        mapping = [
            (state, tf.cast(tf.stack([first + rank * 2246822519, place]), state.value.dtype))
            for rank, state in enumerate(self.task.seeds)
        ]
        return keras.StatelessScope(state_mapping=[*mapping, *values], collect_losses=True)

    def _piece(self, number, of_chunk):
        """Returns piece `number` as part of the chunk or of the batch."""
        return PieceFunction(self, self._data.take(self.pieces.indices(number)), number, of_chunk)

    def gradient_pass(self):
        """A `Pass` and its `Statistics` over all pieces; on the way, metrics of the outputs. Cost: one gradient."""
        task = self.task

        def add_piece(number, sums):
            sums, statistics = sums
            piece = self._piece(number, of_chunk=False)
            gradient, evaluation = piece.gradient()
            gradient = pack(gradient, self.dtype) / piece.loss_scale
            task.update_metrics(evaluation.data, evaluation.y_pred)
            states = [
                total + tf.cast(piece.share, total.dtype) * new
                if total.dtype.is_floating
                else tf.where(number == 0, new, total)
                for total, new in zip(sums.states, evaluation.states, strict=True)
            ]
            sums = Pass(sums.loss + piece.accurate_share(evaluation), sums.gradient + gradient, states)
            return sums, statistics.joined(self._statistics(piece.num_cases, evaluation.states))

        with tf.GradientTape() as tape:
            regularization = self._regularization()
        gradient = pack(dense(tape.gradient(regularization, task.variables), task.variables), self.dtype)
        states = [
            tf.zeros_like(value) if value.dtype.is_floating else value
            for value in map(tf.convert_to_tensor, self.structure.states)
        ]
        start = Pass(tf.cast(regularization, tf.float64), gradient, states)
        return _over_pieces(0, self.pieces.num_pieces, add_piece, (start, self._no_statistics()))

    def statistics(self):
        """The `Statistics` over all pieces at the weights as they are. Cost: one forward pass."""

        def add_piece(number, statistics):
            data = self._data.take(self.pieces.indices(number))
            return statistics.joined(self._statistics(data.num_cases, self.evaluate(data, number).states))

        return _over_pieces(0, self.pieces.num_pieces, add_piece, self._no_statistics())

    def _statistics(self, num_cases, states):
        """Finds the `Statistics` among states."""
        means, variances = (
            [tf.cast(states[place], self.dtype) for place in places]
            for places in list(zip(*self.structure.statistics, strict=True)) or [[], []]
        )
        return Statistics(tf.cast(num_cases, self.dtype), means, variances)

    def _no_statistics(self):
        """Those of no case."""
        return self._statistics(0, [tf.zeros(state.shape, self.dtype) for state in self.structure.states])

    def loss(self, of_chunk):
        """This replica's share of the loss over the chunk, or over the batch: float64 scalar. Cost: one forward pass."""

        def add_piece(number, total):
            piece = self._piece(number, of_chunk)
            return total + piece.accurate_share(piece.forward())

        last = self.pieces.num_chunk_pieces if of_chunk else self.pieces.num_pieces
        return _over_pieces(0, last, add_piece, tf.cast(self._regularization(), tf.float64))

    def sums_over_cases(self):
        """This replica's share of the loss, what its cases add to it without their signs, and the squares of that: sums, float64 `(3,)`.

        Cost: one forward pass.
        """

        def add_piece(number, total):
            piece = self._piece(number, of_chunk=False)
            shares = piece.case_shares(piece.forward())
            return total + tf.stack([tf.reduce_sum(sums) for sums in (shares, tf.abs(shares), shares**2)])

        start = tf.stack([tf.cast(self._regularization(), tf.float64), 0.0, 0.0])
        return _over_pieces(0, self.pieces.num_pieces, add_piece, start)

    def _regularization(self):
        """This replica's share of the regularizers' loss: none of a batch without cases, which is nothing to go by."""
        losses = [tf.cast(regularizer(variable), self.dtype) for variable, regularizer in self.task.regularizers]
        share = tf.cast(self.totals.num_cases > 0, self.dtype) / self._num_replicas
        return share * tf.add_n(losses) if losses else tf.zeros([], self.dtype)

    def regularization_product(self):
        """Gives `v -> Rv` on flat vectors, this replica's share of the regularizers' second derivative R."""
        if not self.task.regularizers:
            return tf.zeros_like
        product = DoubleBackward().hessian(self._regularization, self.task.variables)
        return lambda v: pack(product(unpack(v, self.task.variables)), self.dtype)

    def product(self, curvature):
        """Gives `v -> Gv` on flat vectors or rows of them, this replica's share over the chunk, regularizers included.

        The first piece is linearized now and kept; further pieces, if the chunk has them, are linearized anew in every product, so that memory is
        bounded by one piece's.
        """
        piece = self._piece(tf.constant(0), of_chunk=True)
        first = curvature.linearize(piece)
        regularization = self.regularization_product()

        def image(linearized, v):
            return _by_rows(lambda v: pack(linearized(unpack(v, self.task.variables)), self.dtype), v)

        def product(v):
            size = self._size(v)
            scaled = v / size

            def add_piece(number, total):
                return total + image(curvature.linearize(self._piece(number, of_chunk=True)), scaled)

            total = self._of_cases(image(first, scaled))
            if not self.structure.chunk_is_one_piece:
                total = _over_pieces(1, self.pieces.num_chunk_pieces, add_piece, total)
            return (size / piece.loss_scale) * total + _by_rows(regularization, v)

        # Checked on the kept piece: another linearization would take seconds to trace.
        return _LocalProduct(product, lambda v: self._sides(first, v))

    def _of_cases(self, sums):
        """Returns what the first piece of the chunk gave, a nest of tensors; zeros where it holds no case, as on a replica that got none.

        The mean over no case, which BatchNormalization takes, is no number, and would be none in a sum over replicas.
        """
        if self._num_replicas == 1:
            return sums
        return tf.nest.map_structure(
            lambda value: tf.where(self.pieces.chunk_size > 0, value, tf.zeros_like(value)), sums
        )

    def _size(self, v):
        """What a vector, or each row of some, is divided by before it goes through the network.

        1, but for float16, where CG's small vectors would be zeros.
        """
        if not self.structure.is_float16:
            return tf.ones([], self.dtype)
        largest = tf.reduce_max(tf.abs(v), -1, keepdims=v.shape.rank == 2)
        return tf.where(largest > 0, largest, tf.ones_like(largest))

    def _sides(self, linearized, v):
        """Both sides of `v'Gv = (Jv)'H(Jv)` and of `u'(Jv) = (J'u)'v` on a piece, u random, and the sizes of what they sum.

        Returns:
            List of triples of float64 scalars; `None` for a curvature without J.
        """
        if getattr(linearized, "factors", None) is None:
            return None
        tangents_of, hessian, pull_back = linearized.factors()
        v = unpack(v / self._size(v), self.task.variables)
        tangents, image = tangents_of(v), linearized(v)
        left, right = inner_product(v, image), inner_product(tangents, hessian(tangents))
        if linearized.added is not None:
            right += inner_product(v, linearized.added(v))
        # The last term: where curvature of both signs cancels, rounding is not small beside what is left.
        size = tf.abs(left) + tf.abs(right) + 1e-4 * tf.sqrt(inner_product(v, v) * inner_product(image, image))
        identity = left, right, size
        u = [
            tf.cast(tf.random.stateless_normal(tf.shape(tangent), [seed, 2], dtype=self.dtype), tangent.dtype)
            for seed, tangent in enumerate(tangents)
        ]
        left, right = inner_product(u, tangents), inner_product(pull_back(u), v)
        # Where tangents are lost altogether their size is zero, and the right side tells.
        size = tf.sqrt(inner_product(u, u) * inner_product(tangents, tangents)) + tf.abs(right)
        return self._of_cases([identity, (left, right, size)])

    def sum_over_chunk(self, function, num_cases):
        """This replica's part of `Objective.sum_over_chunk`."""
        pieces = self.pieces
        if num_cases is not None:
            most = -(-num_cases // self._num_replicas)
            pieces = pieces._replace(chunk_size=tf.minimum(pieces.chunk_size, most))

        def of_piece(number):
            indices = pieces.indices(number)
            # The number of the piece is no part of it: results must not depend on the size of pieces.
            seeds = [
                indices,
                tf.fill(tf.shape(indices), self.update_number),
                tf.fill(tf.shape(indices), replica_number()),
            ]
            piece = PieceFunction(self, self._data.take(indices), number, of_chunk=True)
            return function(piece.cases_apart(), tf.stack(seeds, 1))

        total = self._of_cases(of_piece(tf.constant(0)))
        if self.structure.chunk_is_one_piece:
            return total
        add_piece = lambda number, total: tf.nest.map_structure(tf.add, total, of_piece(number))  # noqa: E731
        return _over_pieces(1, pieces.num_chunk_pieces, add_piece, total)

    def squared_gradients(self, skipped=()):
        """This replica's share of the mean over cases of the squared gradient of a case's loss, `(n,)`. Cost: about two gradients.

        With f the sum of shares c_i of the cases, it is `N * sum_i (dc_i)^2`: for a mean over N cases, the mean of the cases' squared gradients.
        """

        def add_piece(number, total):
            piece = self._piece(number, of_chunk=False).cases_apart()
            squares = squared_gradients(piece, self.structure.captured, skipped)
            return total + pack(squares, self.dtype) / piece.loss_scale**2

        zeros = tf.zeros([num_weights(self.task.variables)], self.dtype)
        return self.totals.num_cases * _over_pieces(0, self.pieces.num_pieces, add_piece, zeros)


class _LocalProduct(NamedTuple):
    """One replica's share of a product `v -> Gv`, and the sides of what must hold of it; see `LocalObjective`."""

    product: Callable
    sides: Callable


class Product:
    """A product over all replicas. Called, it is `v -> Gv`; see `Objective.product`.

    Args:
        replicas: `replicas.Replicas`.
        parts: The `_LocalProduct` of every replica, as `replicas` holds them.
    """

    def __init__(self, replicas, parts):
        self._replicas, self._parts = replicas, parts

    def __call__(self, v):
        return self._replicas.sum(lambda part, v: part.product(v), self._parts, v)

    def errors(self, v):
        """Returns by how much `v'Gv = (Jv)'H(Jv)` and, for a random u, `u'(Jv) = (J'u)'v` fail, relative to both sides; `None` without a J.

        On the first piece of every replica. Where TensorFlow's second derivatives are wrong, or tangents are lost, J and J' are not each other's
        transposes, and both do not hold. Float64 `(2,)`. Cost: two products.
        """
        sides = self._replicas.sum(lambda part, v: part.sides(v), self._parts, v)
        if sides is None:
            return None
        return tf.stack([tf.math.divide_no_nan(tf.abs(left - right), size) for left, right, size in sides])


class Objective:
    """The objective over all replicas and cases: what an update minimises. Lives in cross-replica context.

    While it exists the weights are at their start, but for the duration of a `loss_at` or of a product by differences. Weights with constraints are
    projected: those of every candidate, so that what the loss is looked up at is what the weights become, and the start where it violates them.

    Args:
        replicas: `replicas.Replicas`.
        parts: The `LocalObjective` of every replica, as `replicas` holds them.
        task: `Task`.
        structure: `structure.Structure`.
        update_number: int32 scalar, updates made before this one.
        chunk_is_batch: Whether the curvature chunk is all of the batch.
    """

    def __init__(self, replicas, parts, task, structure, update_number, chunk_is_batch):
        self._replicas, self._parts, self._task, self.chunk_is_batch = replicas, parts, task, chunk_is_batch
        self.update_number = update_number
        self._structure = structure
        self.dtype = vector_dtype(task.variables)
        self.num_weights = num_weights(task.variables)
        self._start = [tf.convert_to_tensor(variable) for variable in task.variables]
        if any(task.constraints):
            self._start = [
                _where_violated(projected, value)
                for projected, value in zip(self._project(self._start), self._start, strict=True)
            ]
            assign(task.variables, self._start)
        self._start_vector = pack(self._start, self.dtype)
        # Backtracking, line search and checks call the same function: the graph, which takes seconds to make, then holds the loss once.
        self._losses = {}
        self.totals = replicas.sum(lambda part: part.counts(), parts)
        replicas.run(lambda part, totals: part.set_totals(totals, replicas.count), parts, self.totals)

    def loss_and_gradient(self):
        """Returns a `Pass` at the start: loss, gradient `(n,)` and the network's states after the pass. Cost: one gradient."""
        found = self._replicas.run(lambda part: part.gradient_pass(), self._parts)
        states = [tf.convert_to_tensor(state) for state in self._structure.states]
        means = [i for i, state in enumerate(states) if state.dtype.is_floating]
        others = [i for i, state in enumerate(states) if not state.dtype.is_floating]
        passes, statistics = found
        total = self._replicas.sum(lambda local: local._replace(states=[local.states[i] for i in means]), passes)
        # Not of a replica without cases, which has made no pass.
        first = self._replicas.first(
            [states[i] for i in others],
            lambda part, local: (part.pieces.num_cases > 0, [local.states[i] for i in others]),
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
        """Returns the network's states at the end of an update, those of BatchNormalization fitting the weights as they are by then.

        Moving averages would need thousands of steps, and the weights move far in one. So statistics are taken afresh of the cases used, at the new
        weights. Of a few cases alone (the rest of an epoch) they would be poor: in as far as there were more before, those are kept, moved by what
        the step changed on the few.

        Args:
            states: List of tensors, what `loss_and_gradient` returned.
            num_before: Scalar, the number of cases that the network's statistics stand for.

        Returns:
            List of tensors. Cost: one forward pass, none in networks without BatchNormalization.
        """
        places = self._structure.statistics
        if not places:
            return states
        new = self._with_statistics(states, self._replicas.run(lambda part: part.statistics(), self._parts))
        fresh = tf.math.divide_no_nan(self.totals.num_cases, tf.maximum(self.totals.num_cases, num_before))
        for place in [place for pair in places for place in pair]:
            old, start, end = (
                tf.cast(x, self.dtype) for x in (self._structure.states[place], states[place], new[place])
            )
            moved = old + end - start
            if place in [variance for _, variance in places]:
                # What falls does so in proportion: variances stay positive.
                moved = tf.where(end < start, old * tf.math.divide_no_nan(end, start), moved)
            value = tf.where(fresh < 1, fresh * end + (1 - fresh) * moved, end)
            value = tf.where(tf.reduce_all(tf.math.is_finite(value)), value, old)
            new[place] = tf.cast(value, states[place].dtype)
        return new

    def _with_statistics(self, states, statistics):
        """Returns states with the statistics of all replicas, from the `Statistics` of each."""
        places = self._structure.statistics
        if not places:
            return states
        share = lambda local: tf.math.divide_no_nan(local.num_cases, self.totals.num_cases)  # noqa: E731
        means = self._replicas.sum(lambda local: [share(local) * mean for mean in local.means], statistics)
        variances = self._replicas.sum(
            lambda local, means: [
                share(local) * (variance + (own - mean) ** 2)
                for variance, own, mean in zip(local.variances, local.means, means, strict=True)
            ],
            statistics,
            means,
        )
        states = list(states)
        for pair, found in zip(places, zip(means, variances, strict=True), strict=True):
            for place, value in zip(pair, found, strict=True):
                states[place] = tf.cast(value, states[place].dtype)
        return states

    def loss_at(self, step):
        """Returns the loss over the batch at start + step, float64. The weights are as before afterwards. Cost: one forward pass."""
        return self._loss_at(step, of_chunk=False)

    def chunk_loss_at(self, step):
        """Returns the loss over the curvature chunk at start + step, float64. Cost: one forward pass of the chunk."""
        return self._loss_at(step, of_chunk=True)

    def loss_and_variation_at(self, step):
        """Returns the loss over the batch at start + step, and the squared coefficient of variation of what cases add to it, regularizers apart.

        Float64 scalars. Cost: one forward pass.
        """
        loss, size, squares = tf.unstack(self._at(step, lambda part: part.sums_over_cases()))
        num_cases = tf.cast(self.totals.num_cases, tf.float64)
        return loss, tf.maximum(tf.math.divide_no_nan(num_cases * squares, size**2) - 1.0, 0.0)

    def _loss_at(self, step, of_chunk):
        if tf.executing_eagerly():
            return self._computed_loss(step, of_chunk)
        if of_chunk not in self._losses:
            self._losses[of_chunk] = tf.function(
                lambda step: self._computed_loss(step, of_chunk),
                autograph=False,
                experimental_attributes={"_noinline": True},
            )
        return self._losses[of_chunk](step)

    def _computed_loss(self, step, of_chunk):
        return self._at(step, lambda part: part.loss(of_chunk))

    def _at(self, step, function):
        """The sum over replicas of `function(part)` at start + step."""
        assign(self._task.variables, self.candidate(step))
        values = self._replicas.sum(function, self._parts)
        assign(self._task.variables, self._start)
        return values

    def candidate(self, step):
        """Returns the weights at start + step, a list of tensors."""
        return self._project(unpack(self._start_vector + step, self._task.variables))

    def start(self):
        """Returns the weights at the start, a list of tensors."""
        return self._start

    @property
    def start_vector(self):
        """The weights at the start as one vector `(n,)`."""
        return self._start_vector

    def num_nonfinite_cases(self):
        """Returns how many cases of the batch hold a number that is not finite, an int32 scalar."""
        return tf.cast(self._replicas.sum(lambda part: part.num_nonfinite_cases(), self._parts), tf.int32)

    def product(self, curvature):
        """Gives `v -> Gv`, the product over the chunk at the start, regularizers' second derivatives included.

        On a vector `(n,)`, or on every row of `(k, n)`, for which the pieces after the first are linearized once. Rows come
        one after the other: on a CPU, vectorised products took up to 3.7 times as long, and a third less at best.
        """
        curvature = curvature.fitted_to(self._structure, self._replicas.count)
        return Product(self._replicas, self._replicas.run(lambda part: part.product(curvature), self._parts))

    @property
    def rounding(self):
        """What two ways to compute the same may differ by, relative to it: Python float."""
        return self._structure.rounding

    @property
    def variables(self):
        """The trainable weights, a list of `tf.Variable`, in the order of flat vectors."""
        return self._task.variables

    @property
    def captured(self):
        """The layers whose inputs and pre-activations tell their gradients, a list of `keras.Layer`."""
        return self._structure.captured

    def sum_over_chunk(self, function, num_cases=None):
        """Returns a sum over pieces of the chunk, and over all replicas.

        Args:
            function: Callable `(piece, seeds) -> nest of tensors`, of a `PieceFunction` with batch statistics held constant and of int32
                `(cases, 3)`: three numbers for each of its cases that no other case and no other update has, whatever the pieces.
            num_cases: Integer, of so many of the chunk's cases at most; `None` = of all.
        """
        return self._replicas.sum(lambda part: part.sum_over_chunk(function, num_cases), self._parts)

    def squared_gradients(self, skipped=()):
        """Returns the mean over the batch's cases of the squared gradient of a case's loss, `(n,)`; regularizers outside.

        Args:
            skipped: List of captured layers whose weights get zeros, at no cost.
        """
        return self._replicas.sum(lambda part: part.squared_gradients(skipped), self._parts)

    def regularization_diagonal(self):
        """Returns the diagonal of the regularizers' second derivative, `(n,)`, where it is diagonal, as for L2; never negative."""
        ones = tf.ones([self.num_weights], self.dtype)
        return tf.maximum(self._replicas.sum(lambda part: part.regularization_product()(ones), self._parts), 0.0)

    def _project(self, values):
        return [
            value if constraint is None else constraint(value)
            for value, constraint in zip(values, self._task.constraints, strict=True)
        ]


def _over_pieces(first, stop, add_piece, sums):
    """Runs `sums = add_piece(number, sums)` for the pieces first..stop-1, one after the other: memory is one piece's."""
    _, sums = tf.while_loop(
        lambda number, _: number < stop,
        lambda number, sums: (number + 1, add_piece(number, sums)),
        (tf.constant(first), sums),
        parallel_iterations=1,
    )
    return sums


def _by_rows(function, v):
    """Applies `(n,) -> (n,)` to a vector, or to every row of `(k, n)`, one after the other: memory is one row's."""
    return function(v) if v.shape.rank == 1 else tf.map_fn(function, v, parallel_iterations=1)


def _where_violated(projected, value):
    """The projection where it is not the value itself to rounding: Keras' norms divide by a norm and a small number more."""
    size = tf.reduce_max(tf.abs(value))
    return tf.where(tf.reduce_any(tf.abs(projected - value) > 1e-5 * size), projected, value)
