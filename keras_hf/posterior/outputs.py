"""The outputs of a network in evaluation mode and their Jacobian with respect to some weights, in pieces of cases."""

import copy
import functools

import numpy as np
import tensorflow as tf

from keras_hf.common import checks
from keras_hf.common.loops import mapped
from keras_hf.common.vectors import dense, num_weights, pack
from keras_hf.network.capture import recorded_uses, second_moments
from keras_hf.network.fixed_network import Data

# Numbers of a Jacobian that are formed at a time (256 MiB in float64).
_PIECE_FLOATS = 2**25


class Outputs:
    """A network's outputs as functions of cases; what is computed at its present weights.

    Args:
        network: `keras.Model`.
        variables: List of `tf.Variable`, with respect to which the Jacobian is.
        wanted: Callable, the network's outputs -> a tensor of what is wanted of them, `(cases, ...)`; k numbers a case.
        is_vectorizable: Whether TensorFlow can vectorise single cases.
    """

    def __init__(self, network, variables, wanted, is_vectorizable=True):
        self.network, self._variables, self._wanted = network, variables, wanted
        self._is_vectorizable, self._call = is_vectorizable, functools.partial(network, training=False)
        self._programs = {}

    def _as_matrix(self, y_pred):
        """What is wanted, as `(cases, k)`."""
        found = self._wanted(y_pred)
        return tf.reshape(found, [tf.shape(found)[0], -1])

    @functools.cached_property
    def at_points(self):
        """The same for the solution that a `PINN` is made of, a function of points; of other networks these."""
        if not hasattr(self.network, "solution"):
            return self
        found = copy.copy(self)
        found._call, found._programs = self.network.solution, {}
        return found

    def shape(self, x):
        """Returns the shape of the outputs of these cases, a tuple; raises an error about cases that the network does not take."""
        try:
            first = self._wanted(self._call(tf.nest.map_structure(lambda tensor: tensor[:1], x)))
        except (ValueError, tf.errors.InvalidArgumentError) as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tf.nest.flatten(x))
            raise ValueError(
                "`x` must hold cases as the network takes them; the first axis is the case. "
                f"Received: x of shape {shapes}. One case alone is `x[None]`. The network says: {error}"
            ) from error
        return (tf.nest.flatten(x)[0].shape[0], *first.shape[1:])

    def tensors(self, x):
        """Returns inputs as tensors."""
        checks.num_cases(x)
        return Data(x, None, None).tensors().x

    def pieces(self, x, size):
        """Yields slices of cases, with outputs `(m, k)` and their Jacobian `(m, k, n)`, float64 arrays.

        Args:
            x: Nest of tensors.
            size: Integer, k.
        """
        num_cases = tf.nest.flatten(x)[0].shape[0]
        length = max(1, _PIECE_FLOATS // (size * num_weights(self._variables)))
        for first in range(0, num_cases, length):
            cases = slice(first, min(first + length, num_cases))
            part = tf.nest.map_structure(lambda tensor: tensor[cases], x)  # noqa: B023
            values, jacobian = self._run(self._jacobian_of, part)
            yield cases, values.numpy(), jacobian.numpy()

    def _run(self, function, x):
        """Runs a function of cases as a program: traced once for any number of them, which TensorFlow does not count as tracing in a loop."""
        specs = _specs(x)
        key = function.__name__, *tf.nest.flatten(specs)
        if key not in self._programs:
            self._programs[key] = tf.function(function, autograph=False).get_concrete_function(specs)
        return self._programs[key](x)

    def _jacobian_of(self, x):
        def of_row(args):
            case, u = args
            with tf.GradientTape() as tape:
                values = self._as_matrix(self._call(tf.nest.map_structure(lambda t: t[None], case)))[0]
            gradients = dense(tape.gradient(values, self._variables, output_gradients=u), self._variables)
            return tf.concat([tf.cast(values, tf.float64), pack(gradients, tf.float64)], 0)

        values = self._as_matrix(self._call(x))
        num_cases, size = tf.shape(values)[0], tf.shape(values)[1]
        units = tf.tile(tf.eye(size, dtype=values.dtype), [num_cases, 1])
        cases = tf.nest.map_structure(lambda t: tf.repeat(t, size, axis=0), x)
        rows = mapped(of_row, (cases, units), tf.float64, self._is_vectorizable)
        return tf.reshape(rows[:, :size], [num_cases, size, size])[:, 0], tf.reshape(
            rows[:, size:], [num_cases, size, num_weights(self._variables)]
        )

    def moments(self, x, roots, layers):
        """Returns sums for the Kronecker factors of every layer: of `aa'` and `dd'` over positions, arrays, and the number of positions.

        a is the layer's input with a 1 for its bias, d the derivative of `L'` times the outputs with respect to the pre-activation, one for each
        column of L; see `likelihood.Likelihood.roots`. Cost: a backward pass for each.

        Args:
            x: Nest of tensors.
            roots: Array `(cases, k, columns)`, L of every case, weights included.
            layers: List of layers; see `capture.is_capturable`.
        """

        @functools.partial(tf.function, autograph=False)
        def sums(x, root):
            with (
                tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape,
                recorded_uses(layers, tape) as uses,
            ):
                outputs = self._as_matrix(self._call(x))
            preactivations = [use.preactivation for layer in layers for use in uses[layer]]
            found = None
            for u in tf.unstack(tf.cast(root, outputs.dtype), axis=2):
                gradients = iter(dense(tape.gradient(outputs, preactivations, output_gradients=u), preactivations))
                of_column = []
                for layer in layers:
                    of_uses = [second_moments(layer, use.inputs, next(gradients)) for use in uses[layer]]
                    of_column.append([tf.add_n(terms) for terms in zip(*of_uses, strict=True)])
                found = of_column if found is None else tf.nest.map_structure(tf.add, found, of_column)
            return found

        num_cases, total = tf.nest.flatten(x)[0].shape[0], None
        sums = sums.get_concrete_function(_specs(x), _specs(tf.constant(roots)))
        for first in range(0, num_cases, 1000):
            piece = tf.nest.map_structure(lambda tensor: tensor[first : first + 1000], x)  # noqa: B023
            found = sums(piece, tf.constant(roots[first : first + 1000]))
            found = [[term.numpy().astype("float64") for term in terms] for terms in found]
            total = found if total is None else tf.nest.map_structure(np.add, total, found)
        return total


def _specs(x):
    """Returns the types of cases like these, of any number."""
    return tf.nest.map_structure(lambda tensor: tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype), x)
