"""One micro-batch of data as a function of the weights, which curvatures linearize and preconditioners inspect."""

import copy
from typing import NamedTuple

import tensorflow as tf

from keras_hf.common.vectors import assign, dense
from keras_hf.network.fixed_network import Data
from keras_hf.problem.observations import observations


class Totals(NamedTuple):
    """Numbers of cases and denominators of the loss terms `(terms,)`, of batch and chunk, over all replicas; in the weights' dtype."""

    num_cases: tf.Tensor
    denominators: tf.Tensor
    chunk_cases: tf.Tensor
    chunk_denominators: tf.Tensor


class MicroBatch:
    """One micro-batch of data as a function of the weights, which curvatures linearize and preconditioners inspect.

    Args:
        network: `FixedNetwork`.
        totals: `Totals`.
        data: `Data`, its cases.
        number: int32 scalar, the micro-batch's number.
        of_chunk: Whether the micro-batch is part of the mean over the curvature chunk, or of that over the batch.
        statistics: See `FixedNetwork.evaluate`.

    Attributes:
        variables: List of `tf.Variable`.
        has_added_loss: Whether the network adds losses of its own.
        has_hidden_states: Whether the damping has hidden states in it; see `structural_damping.StructuralDamping`.
        num_cases: int32 scalar.
        all_cases: Scalar, the number of cases of the chunk or the batch, including other micro-batches and replicas.
        share: Scalar, the micro-batch's fraction of all cases.
        loss_scale: Scalar, the factor by which `loss`, `added_loss` and their derivatives exceed the micro-batch's shares, as in mixed-precision
            training; results are divided by it. 1, except for float16, whose range the derivatives of a mean would leave: there, the number of all
            cases.
    """

    def __init__(self, network, totals, data, number, of_chunk, statistics=()):
        self.variables = network.task.variables
        self.has_added_loss = network.structure.has_added_loss
        self.has_hidden_states = bool(network.structure.hidden_layers)
        self.num_cases = data.num_cases
        self.all_cases = totals.chunk_cases if of_chunk else totals.num_cases
        self.share = tf.math.divide_no_nan(tf.cast(self.num_cases, network.dtype), self.all_cases)
        is_scaled = network.structure.is_float16 and "sum" not in network.structure.combinations
        self.loss_scale = self.all_cases if is_scaled else tf.ones([], network.dtype)
        self._network, self._totals, self._data, self._number, self._of_chunk = network, totals, data, number, of_chunk
        self._statistics = statistics

    @property
    def tensors(self):
        """All tensors of which the micro-batch is made, a nest; see `of_tensors`."""
        return (
            self._network.update_number,
            self._totals,
            tuple(self._data),
            self._number,
            [new for _, new in self._statistics],
        )

    def of_tensors(self, tensors):
        """Returns the micro-batch that is made of other tensors, as a function of the graph has them in place of these."""
        update_number, totals, data, number, statistics = tensors
        network = copy.copy(self._network)
        network.update_number = update_number
        statistics = [(state, new) for (state, _), new in zip(self._statistics, statistics, strict=True)]
        return MicroBatch(network, Totals(*totals), Data(*data), number, self._of_chunk, statistics)

    def forward(self, weights=None, for_products=False):
        """Runs the network once and returns an `Evaluation`. Nothing is assigned: every call sees the same random numbers and statistics.

        Args:
            weights: List of tensors, the weights of this pass; `None` = those of the variables. With them the pass can be vectorised over weights.
            for_products: See `FixedNetwork.evaluate`.
        """
        return self._network.evaluate(
            self._data, self._number, self._statistics, weights=weights, for_products=for_products
        )

    def cases(self, indices):
        """Returns the function of only the micro-batch's cases at `indices`, int32 `(k,)`."""
        return self._of(self._data.take(indices), self._statistics)

    def cases_apart(self):
        """Returns the micro-batch with its batch statistics held constant, so that each case has its own gradient."""
        return self._of(self._data, self._network.batch_statistics(self._data, self._number))

    def _of(self, data, statistics):
        return MicroBatch(self._network, self._totals, data, self._number, self._of_chunk, statistics)

    def signs(self, salt):
        """Returns a random sign per case, float32 `(cases,)`; the signs depend on the update and on the int32 `salt`."""
        seed = tf.stack([self._network.update_number, 65536 * self._number + salt])
        return 2.0 * tf.cast(tf.random.stateless_uniform([self.num_cases], seed) < 0.5, tf.float32) - 1.0

    @property
    def hessian_is_diagonal(self):
        """Whether the second derivative of `loss` with respect to the outputs is diagonal."""
        return self._network.structure.is_entrywise

    @property
    def is_vectorizable(self):
        """Whether TensorFlow can vectorise the network over cases."""
        return self._network.structure.is_vectorizable

    @property
    def has_vectorizable_rows(self):
        """Whether TensorFlow can vectorise passes for products, and their first derivatives, over cases and weights."""
        return self._network.structure.has_vectorizable_rows

    @property
    def static_num_cases(self):
        """Number of cases where it is known before they come, else `None`."""
        return self._data.static_num_cases

    @property
    def floats_per_case(self):
        """About how many floats a gradient of one case computes: an integer, or an int64 scalar if lengths are known only at run time."""
        return self._network.structure.bytes_of(self._data) // 4

    def loss(self, evaluation):
        """The micro-batch's share of the compiled loss, times `loss_scale`, a scalar."""
        dtype = self._network.dtype
        return self.loss_scale * self._sum_of_terms(evaluation, lambda term: tf.cast(term.value(), dtype), dtype)

    def added_loss(self, evaluation):
        """The micro-batch's share of the added losses, times `loss_scale`, a scalar."""
        return self.loss_scale * self.share * evaluation.added_loss

    def whole_loss(self, evaluation):
        """The micro-batch's share of the compiled loss and of the added losses, times `loss_scale`, a scalar."""
        loss = self.loss(evaluation)
        return loss + self.added_loss(evaluation) if self.has_added_loss else loss

    def gradient(self):
        """Returns the gradient of `whole_loss`, a list of tensors, and the `Evaluation`. Cost: one gradient."""
        with tf.GradientTape() as tape:
            evaluation = self.forward()
            loss = self.whole_loss(evaluation)
        return dense(tape.gradient(loss, self.variables), self.variables), evaluation

    def gradient_at(self, weights):
        """Returns the gradient of `whole_loss` at other weights, a list of tensors, and restores the weights. Cost: one gradient."""
        before = [tf.convert_to_tensor(variable) for variable in self.variables]
        assign(self.variables, weights)
        gradient, _ = self.gradient()
        assign(self.variables, before)
        return gradient

    def accurate_share(self, evaluation):
        """The micro-batch's share of the whole loss, a float64 scalar."""
        loss = self._sum_of_terms(evaluation, lambda term: term.accurate_value(), tf.float64)
        return loss + tf.cast(self.share * evaluation.added_loss, tf.float64) if self.has_added_loss else loss

    def case_shares(self, evaluation):
        """Each case's share of the whole loss, float64 `(cases,)`; equal for all cases if only their sum is known."""
        evenly = lambda sum_: tf.fill([self.num_cases], tf.cast(sum_, tf.float64) / tf.cast(self.num_cases, tf.float64))  # noqa: E731

        def shares(term):
            losses = term.case_losses()
            return evenly(term.accurate_value()) if losses is None else losses

        of_terms = self._sum_of_terms(evaluation, shares, tf.float64, [self.num_cases])
        return of_terms + evenly(self.share * evaluation.added_loss) if self.has_added_loss else of_terms

    def observed(self, evaluation):
        """Returns sums over the values that the micro-batch observed, float64 `(3,)`: 1, their weights, and their coefficients in the loss.

        For one loss that is a likelihood; the coefficients of squared errors are halved.
        """
        with self._network.fixed_state(self._number):
            found = observations(self._network.task, evaluation.data, evaluation.y_pred)
        number = tf.reduce_sum(tf.cast(found.coefficients != 0, tf.float64))
        in_loss = lambda term: tf.reduce_sum(tf.cast(term.counts()[0], tf.float64))  # noqa: E731
        coefficients = self._sum_of_terms(evaluation, in_loss, tf.float64)
        return tf.stack([number, tf.reduce_sum(found.weights), coefficients])

    def _sum_of_terms(self, evaluation, value_of, dtype, shape=()):
        """Returns the sum of the terms of the compiled loss, each scaled by its fraction of the total denominator."""
        network, totals = self._network, self._totals
        scaled = [tf.zeros(shape, dtype)]
        with network.fixed_state(self._number):
            terms = network.task.loss_terms(evaluation.data, evaluation.y_pred)
            for i, (term, combination) in enumerate(zip(terms, network.structure.combinations, strict=True)):
                value = value_of(term)
                if combination == "sum":
                    # The sum over the chunk estimates the sum over the batch.
                    scale = totals.num_cases / totals.chunk_cases if self._of_chunk else 1.0
                elif combination == "data":
                    denominators = totals.chunk_denominators if self._of_chunk else totals.denominators
                    scale = tf.math.divide_no_nan(tf.cast(term.denominator(), network.dtype), denominators[i])
                else:
                    scale = self.share
                scaled.append(tf.cast(scale, dtype) * value)
        return tf.add_n(scaled)
