"""The objective: network and loss on given cases as functions of one flat vector of all trainable weights `(n,)`.

Each replica holds a `LocalObjective`, its own cases worked through in pieces; the `Objective` adds over replicas, adds what concerns the weights
alone (regularizers), packs and unpacks the flat vector, and assigns candidate weights and restores them. It knows no damping and no CG.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_hf.capture import constant_statistics, squared_gradients
from keras_hf.linearization import DoubleBackward, dense
from keras_hf.replicas import replica_number


class Task(NamedTuple):
    """What the Keras room hands over: the model as plain functions.

    Attributes:
        network: Callable `x -> y_pred`, the network in training mode.
        loss: Callable `(x, y, y_pred, sample_weight) -> scalar`, the compiled loss without regularizers and added losses; the mean over cases, or
            their sum where `denominator` says so. `None` if the model has only added losses.
        denominator: A `denominator.Denominator`: how losses of pieces combine.
        regularizers: List of `(tf.Variable, callable variable -> scalar)`, the losses that depend on one weight alone.
        update_metrics: Callable `(data, y_pred)`, called once per piece with its outputs before the update.
        variables: List of `tf.Variable`, the trainable weights.
        states: List of `keras.Variable`, the non-trainable values that a forward pass may change, seeds apart.
        seeds: List of `keras.Variable`, the states of the network's seed generators.
        layers: List of `keras.Layer`, all layers of the network.
    """

    network: Callable
    loss: Callable
    denominator: Any
    regularizers: list
    update_metrics: Callable
    variables: list
    states: list
    seeds: list
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
        states: List of tensors, what the pass would make of `Structure.states`.
    """

    data: Data
    y_pred: Any
    outputs: list
    added_loss: Any
    states: list


class Scales(NamedTuple):
    """By what a piece's losses enter a mean over cases: `loss` for the compiled loss, `cases` for added losses and batch statistics."""

    loss: tf.Tensor
    cases: tf.Tensor


class Totals(NamedTuple):
    """Numbers of cases and denominators of the loss over all replicas, of the batch and of the chunk; in the weights' dtype."""

    num_cases: tf.Tensor
    denominator: tf.Tensor
    chunk_cases: tf.Tensor
    chunk_denominator: tf.Tensor


class Pass(NamedTuple):
    """Sums of one pass over all pieces: loss in float64, gradient `(n,)`, the network's states after the pass."""

    loss: tf.Tensor
    gradient: tf.Tensor
    states: list


def num_weights(variables):
    """Returns n, the number of all weights."""
    return sum(variable.shape.num_elements() for variable in variables)


def pack(tensors, dtype):
    """Joins tensors into one flat vector `(n,)`."""
    return tf.concat([tf.reshape(tf.cast(tensor, dtype), [-1]) for tensor in tensors], 0)


def unpack(vector, variables):
    """Cuts a flat vector `(n,)` into tensors shaped and typed as `variables`."""
    parts = tf.split(vector, [variable.shape.num_elements() for variable in variables])
    return [tf.cast(tf.reshape(part, v.shape), v.dtype) for part, v in zip(parts, variables, strict=True)]


def vector_dtype(variables):
    """The dtype of flat vectors: float64 if any weight is, else float32."""
    return tf.float64 if any(variable.dtype == tf.float64 for variable in variables) else tf.float32


class PieceFunction:
    """One piece of data as a function of the weights: what a curvature linearizes and a preconditioner looks into.

    Attributes:
        variables: List of `tf.Variable`.
        has_added_loss: Whether the network adds losses of its own.
        scales: `Scales`, by which this piece enters the sum.
        num_cases: int32 scalar.
    """

    def __init__(self, local, data, number, scales, statistics=()):
        self.variables = local.task.variables
        self.has_added_loss = local.structure.has_added_loss
        self.scales, self.num_cases = scales, data.num_cases
        self._local, self._data, self._number, self._statistics = local, data, number, statistics

    def forward(self):
        """Runs the network once and returns an `Evaluation`. Nothing is assigned: every call sees the same random numbers and statistics."""
        return self._local.evaluate(self._data, self._number, self._statistics)

    def case(self, index):
        """Returns the function of the piece's case at `index`, int32 scalar, alone."""
        data = self._data.take(index[None])
        scales = self._local.scales(data, of_chunk=False)
        return PieceFunction(self._local, data, self._number, scales, self._statistics)

    @property
    def floats_per_case(self):
        """Floats that a gradient of one case computes, about."""
        return self._local.structure.bytes_per_case // 4

    def loss(self, evaluation):
        """The piece's share of the compiled loss, a scalar."""
        return self.scales.loss * self._local.compiled_loss(evaluation, self._number)

    def added_loss(self, evaluation):
        """The piece's share of the added losses, a scalar."""
        return self.scales.cases * evaluation.added_loss

    def accurate_share(self, evaluation):
        """The piece's share of the whole loss, a float64 scalar."""
        share = tf.cast(self.scales.loss, tf.float64) * self._local.accurate_loss(evaluation, self._number)
        return share + tf.cast(self.added_loss(evaluation), tf.float64) if self.has_added_loss else share


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
        self._data, self._update_number = data, update_number
        self._totals = self._num_replicas = None

    def counts(self):
        """This replica's parts of `Totals`."""
        chunk = self._data.take(self.pieces.chunk_indices()) if self.task.denominator.needs_data else None
        of = self.task.denominator.of
        return Totals(
            tf.cast(self.pieces.num_cases, self.dtype),
            tf.cast(of(self._data, self.pieces.num_cases), self.dtype),
            tf.cast(self.pieces.chunk_size, self.dtype),
            tf.cast(of(chunk, self.pieces.chunk_size), self.dtype),
        )

    def set_totals(self, totals, num_replicas):
        """Tells this replica the sums of `counts` over all of them, and how many they are."""
        self._totals, self._num_replicas = totals, num_replicas

    def evaluate(self, data, number, statistics=()):
        """Runs the network on a piece.

        Args:
            data: `Data`, the piece's cases.
            number: int32 scalar, the piece's number, which its random numbers depend on.
            statistics: Pairs of a moving statistic of BatchNormalization and the value it has, as a constant, instead of the piece's.

        Returns:
            An `Evaluation`.
        """
        frozen = constant_statistics(self.structure.batch_normalizations if statistics else [])
        with self._fixed_state(number, statistics) as scope, frozen:
            y_pred = self.task.network(data.x)
        states = [scope.get_current_value(state) for state in self.structure.states]
        added = tf.add_n([tf.cast(loss, self.dtype) for loss in scope.losses]) if scope.losses else None
        return Evaluation(data, y_pred, self.structure.cut(y_pred), added, states)

    def compiled_loss(self, evaluation, number):
        """The compiled loss of a piece: mean or sum over its cases, a scalar."""
        if self.task.loss is None:
            return tf.zeros([], self.dtype)
        data = evaluation.data
        with self._fixed_state(number):
            loss = self.task.loss(data.x, data.y, evaluation.y_pred, data.sample_weight)
        return tf.cast(loss, self.dtype)

    def batch_statistics(self, data, number):
        """The statistics that BatchNormalization layers take of a piece, as pairs of a moving statistic and its tensor. Cost: one forward pass."""
        layers = self.structure.batch_normalizations
        if not layers:
            return []
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.momentum = 0.0  # what the layer then assigns is the piece's own statistic
        try:
            states = self.evaluate(data, number).states
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
        moving = {id(v) for layer in layers for v in (layer.moving_mean, layer.moving_variance)}
        return [(state, new) for state, new in zip(self.structure.states, states, strict=True) if id(state) in moving]

    def accurate_loss(self, evaluation, number):
        """`compiled_loss` as a float64 scalar, summed over cases in float64 where the loss is linear in sample weights.

        A float32 sum over thousands of cases is off by 1e-7 of itself, which late in training is as much as an update wins. The loss of a case is
        the derivative in its weight, which Keras' reduction hands back unsummed.
        """
        data = evaluation.data
        if self.task.loss is None or not self.task.denominator.is_linear:
            return tf.cast(self.compiled_loss(evaluation, number), tf.float64)
        weight = tf.ones([data.num_cases, 1], self.dtype) if data.sample_weight is None else data.sample_weight
        weight = keras.tree.map_structure(lambda leaf: None if leaf is None else tf.cast(leaf, self.dtype), weight)
        leaves = [leaf for leaf in keras.tree.flatten(weight) if leaf is not None]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(leaves)
            loss = self.compiled_loss(evaluation._replace(data=data._replace(sample_weight=weight)), number)
        losses = tape.gradient(loss, leaves)
        if any(loss_of_case is None for loss_of_case in losses):  # a `compute_loss` that looks at no weights
            return tf.cast(loss, tf.float64)
        return tf.add_n([tf.reduce_sum(tf.cast(w * loss, tf.float64)) for w, loss in zip(leaves, losses, strict=True)])

    def _fixed_state(self, number, values=()):
        """A scope in which piece `number` sees the same random numbers at every call of an update, and no state is changed.

        A seed generator's state is its own seed and a counter of its calls. The update's number moves the seed, by a multiplier (Knuth's) that keeps
        neighbouring seeds apart; the piece's and the replica's numbers go into the counter's upper bits, which leaves 2^12 calls within one pass.
        """
        place = tf.cast(number, tf.int64) * 2**12 + tf.cast(replica_number(), tf.int64) * 2**28
        offset = tf.stack([tf.cast(self._update_number, tf.int64) * 2654435761, place])
        mapping = [
            (seed, tf.cast(tf.cast(seed.value, tf.int64) + offset, seed.value.dtype)) for seed in self.task.seeds
        ]
        return keras.StatelessScope(state_mapping=[*mapping, *values], collect_losses=True)

    def _piece(self, number, of_chunk):
        """Returns piece `number` with its scales in the mean over the chunk or over the batch."""
        data = self._data.take(self.pieces.indices(number))
        return PieceFunction(self, data, number, self.scales(data, of_chunk))

    def scales(self, data, of_chunk):
        """Returns the `Scales` of these cases in the mean over the chunk or over the batch."""
        num_cases = data.num_cases
        totals = self._totals
        all_cases = totals.chunk_cases if of_chunk else totals.num_cases
        all_denominators = totals.chunk_denominator if of_chunk else totals.denominator
        cases = tf.math.divide_no_nan(tf.cast(num_cases, self.dtype), all_cases)
        if self.task.denominator.is_sum:
            # A sum over the chunk stands for the sum over the batch.
            loss = tf.math.divide_no_nan(totals.num_cases, all_cases)
        else:
            loss = tf.math.divide_no_nan(
                tf.cast(self.task.denominator.of(data, num_cases), self.dtype), all_denominators
            )
        return Scales(loss, cases)

    def cases_apart(self, number):
        """Returns piece `number` of the batch with batch statistics held constant, so that each case has a gradient of its own."""
        data = self._data.take(self.pieces.indices(number))
        statistics = self.batch_statistics(data, number)
        return PieceFunction(self, data, number, self.scales(data, of_chunk=False), statistics)

    def _share(self, piece, evaluation):
        loss = piece.loss(evaluation)
        return loss + piece.added_loss(evaluation) if piece.has_added_loss else loss

    def gradient_pass(self):
        """Loss, gradient and states over all pieces, and the metrics of the outputs seen on the way. Cost: one gradient."""
        task = self.task

        def add_piece(number, sums):
            piece = self._piece(number, of_chunk=False)
            with tf.GradientTape() as tape:
                evaluation = piece.forward()
                share = self._share(piece, evaluation)
            gradient = pack(dense(tape.gradient(share, task.variables), task.variables), self.dtype)
            task.update_metrics(evaluation.data, evaluation.y_pred)
            states = [
                total + tf.cast(piece.scales.cases, total.dtype) * new
                if total.dtype.is_floating
                else tf.where(number == 0, new, total)
                for total, new in zip(sums.states, evaluation.states, strict=True)
            ]
            return Pass(sums.loss + piece.accurate_share(evaluation), sums.gradient + gradient, states)

        with tf.GradientTape() as tape:
            regularization = self._regularization()
        gradient = pack(dense(tape.gradient(regularization, task.variables), task.variables), self.dtype)
        states = [tf.zeros(state.shape, state.value.dtype) for state in self.structure.states]
        start = Pass(tf.cast(regularization, tf.float64), gradient, states)
        return _over_pieces(0, self.pieces.num_pieces, add_piece, start)

    def loss(self, of_chunk):
        """This replica's share of the loss over the chunk, or over the batch: float64 scalar. Cost: one forward pass."""

        def add_piece(number, total):
            piece = self._piece(number, of_chunk)
            return total + piece.accurate_share(piece.forward())

        last = self.pieces.num_chunk_pieces if of_chunk else self.pieces.num_pieces
        return _over_pieces(0, last, add_piece, tf.cast(self._regularization(), tf.float64))

    def _regularization(self):
        """This replica's share of the regularizers' loss."""
        losses = [tf.cast(regularizer(variable), self.dtype) for variable, regularizer in self.task.regularizers]
        return tf.add_n(losses) / self._num_replicas if losses else tf.zeros([], self.dtype)

    def regularization_product(self):
        """Gives `v -> Rv` on flat vectors, this replica's share of the regularizers' second derivative R."""
        if not self.task.regularizers:
            return tf.zeros_like
        product = DoubleBackward().hessian(self._regularization, self.task.variables)
        return lambda v: pack(product(unpack(v, self.task.variables)), self.dtype)

    def product(self, curvature):
        """Gives `v -> Gv` on flat vectors, this replica's share over the chunk, regularizers included.

        The first piece is linearized now and kept; further pieces, if the chunk has them, are linearized anew in every product, so that memory is
        bounded by one piece's.
        """
        first = curvature.linearize(self._piece(tf.constant(0), of_chunk=True))
        regularization = self.regularization_product()

        def product(v):
            tangents = unpack(v, self.task.variables)

            def add_piece(number, total):
                linearized = curvature.linearize(self._piece(number, of_chunk=True))
                return total + pack(linearized(tangents), self.dtype)

            total = pack(first(tangents), self.dtype) + regularization(v)
            if self.structure.chunk_is_one_piece:
                return total
            return _over_pieces(1, self.pieces.num_chunk_pieces, add_piece, total)

        return product

    def squared_gradients(self):
        """This replica's share of the mean over cases of the squared gradient of a case's loss, `(n,)`. Cost: about two gradients.

        With f the sum of shares c_i of the cases, it is `N * sum_i (dc_i)^2`: for a mean over N cases, the mean of the cases' squared gradients.
        """

        def add_piece(number, total):
            squares = squared_gradients(self.cases_apart(number), self.structure.captured)
            return total + pack(squares, self.dtype)

        zeros = tf.zeros([num_weights(self.task.variables)], self.dtype)
        return self._totals.num_cases * _over_pieces(0, self.pieces.num_pieces, add_piece, zeros)


class Objective:
    """The objective over all replicas and cases: what an update minimises. Lives in cross-replica context.

    While it exists the weights are at their start, but for the duration of a `loss_at`.

    Args:
        replicas: `replicas.Replicas`.
        parts: The `LocalObjective` of every replica, as `replicas` holds them.
        task: `Task`.
        chunk_is_batch: Whether the curvature chunk is all of the batch.
    """

    def __init__(self, replicas, parts, task, chunk_is_batch):
        self._replicas, self._parts, self._task, self.chunk_is_batch = replicas, parts, task, chunk_is_batch
        self.dtype = vector_dtype(task.variables)
        self.num_weights = num_weights(task.variables)
        self._start = [tf.convert_to_tensor(variable) for variable in task.variables]
        self._start_vector = pack(self._start, self.dtype)
        self.totals = replicas.sum(lambda part: part.counts(), parts)
        replicas.run(lambda part, totals: part.set_totals(totals, replicas.count), parts, self.totals)

    def loss_and_gradient(self):
        """Returns a `Pass` at the start: loss, gradient `(n,)` and the network's states after the pass. Cost: one gradient."""
        return self._replicas.sum(lambda part: part.gradient_pass(), self._parts)

    def loss_at(self, step):
        """Returns the loss over the batch at start + step, float64. The weights are as before afterwards. Cost: one forward pass."""
        return self._loss_at(step, of_chunk=False)

    def chunk_loss_at(self, step):
        """Returns the loss over the curvature chunk at start + step, float64. Cost: one forward pass of the chunk."""
        return self._loss_at(step, of_chunk=True)

    def _loss_at(self, step, of_chunk):
        self._assign(self.candidate(step))
        loss = self._replicas.sum(lambda part: part.loss(of_chunk), self._parts)
        self._assign(self._start)
        return loss

    def candidate(self, step):
        """Returns the weights at start + step, a list of tensors."""
        return unpack(self._start_vector + step, self._task.variables)

    def start(self):
        """Returns the weights at the start, a list of tensors."""
        return self._start

    def product(self, curvature):
        """Gives `v -> Gv`, `(n,) -> (n,)`, the product over the chunk at the start, regularizers' second derivatives included."""
        products = self._replicas.run(lambda part: part.product(curvature), self._parts)
        return lambda v: self._replicas.sum(lambda local_product, v: local_product(v), products, v)

    def squared_gradients(self):
        """Returns the mean over the batch's cases of the squared gradient of a case's loss, `(n,)`; regularizers outside."""
        return self._replicas.sum(lambda part: part.squared_gradients(), self._parts)

    def regularization_diagonal(self):
        """Returns the diagonal of the regularizers' second derivative, `(n,)`, where it is diagonal, as for L2; never negative."""
        ones = tf.ones([self.num_weights], self.dtype)
        return tf.maximum(self._replicas.sum(lambda part: part.regularization_product()(ones), self._parts), 0.0)

    def _assign(self, values):
        for variable, value in zip(self._task.variables, values, strict=True):
            variable.assign(value)


def _over_pieces(first, stop, add_piece, sums):
    """Runs `sums = add_piece(number, sums)` for the pieces first..stop-1, one after the other: memory is one piece's."""
    _, sums = tf.while_loop(
        lambda number, _: number < stop,
        lambda number, sums: (number + 1, add_piece(number, sums)),
        (tf.constant(first), sums),
        parallel_iterations=1,
    )
    return sums
