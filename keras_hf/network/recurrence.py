"""Recurrent layers whose derivative is a loop of its own, for products with the Gauss-Newton matrix.

TensorFlow differentiates a loop twice by loops over lists of everything that the first two loops computed: twelve gradients and gigabytes for a
product of a small network over 100 steps. The Gauss-Newton matrix needs less: `J'u`, and `Jv` as its derivative in u. Both are linear recurrences,
which run backwards and forwards through the steps. Here they are written as such, and given to TensorFlow as the derivatives of the layer
(`tf.custom_gradient`, twice). What is kept between them are the states before every step. There is no other second derivative: an exact Hessian needs
Keras' own loops.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_hf.common.keras_private import takes_training
from keras_hf.common.loops import stacked
from keras_hf.common.passes import graph_function
from keras_hf.common.replaced import replaced
from keras_hf.common.vectors import dense

# Activations of which each entry is a function of one entry.
_ENTRYWISE = (keras.activations.linear, keras.activations.tanh, keras.activations.sigmoid, keras.activations.relu)
# Cells that depend on their inputs, states and weights alone. A cell of the user's may hold on to other tensors.
_CELLS = (keras.layers.SimpleRNNCell, keras.layers.GRUCell, keras.layers.LSTMCell)


class _Linearized(NamedTuple):
    """A function of tensors with its derivative.

    Attributes:
        results: List of tensors.
        pull: Callable, list of tensors shaped as the results, u -> J'u, a list of tensors shaped as the arguments.
        push: Callable, list of tensors shaped as the arguments, v -> Jv, a list of tensors shaped as the results.
    """

    results: list
    pull: Callable
    push: Callable


@contextlib.contextmanager
def linear_derivatives(layers):
    """Context in which recurrent layers of Keras' cells have derivatives that are linear recurrences; others, and unrolled ones, stay as they are.

    Args:
        layers: List of `keras.layers.RNN`.
    """

    def inner_loop(layer):
        return functools.partial(_inner_loop, layer)

    with replaced(*[(layer, "inner_loop", inner_loop(layer)) for layer in layers if _is_known(layer)]):
        yield


@contextlib.contextmanager
def recorded_loops(layers):
    """Records the operations of those layers whose derivatives `linear_derivatives` writes while it is open, in the set that it gives.

    Args:
        layers: List of `keras.layers.RNN`.
    """
    operations = set()

    def inner_loop(layer):
        original = layer.inner_loop

        def recorded(*args, **kwargs):
            graph = tf.compat.v1.get_default_graph()
            num_before = len(graph.get_operations())
            results = original(*args, **kwargs)
            operations.update(graph.get_operations()[num_before:])
            return results

        return recorded

    with replaced(*[(layer, "inner_loop", inner_loop(layer)) for layer in layers if _is_known(layer)]):
        yield operations


def _is_known(layer):
    cell = layer.cell
    cells = cell.cells if type(cell) is keras.layers.StackedRNNCells else [cell]
    # Dropout: the masks of a call are gone when its derivative is asked for.
    return not layer.unroll and all(
        type(of_stack) in _CELLS and not (of_stack.dropout or of_stack.recurrent_dropout) for of_stack in cells
    )


def _inner_loop(layer, sequences, initial_state, mask, training=False):
    """Does what `keras.layers.RNN.inner_loop` does, and returns all outputs whatever the layer's `return_sequences`."""
    cell = layer.cell
    initial_state = initial_state if isinstance(initial_state, list | tuple) else [initial_state]
    arguments = {"training": training} if takes_training(cell) else {}
    variables = cell.weights
    states = keras.tree.flatten(initial_state)
    mask = mask[0] if isinstance(mask, list | tuple) else mask
    x = _by_time(sequences)
    masks = None if mask is None else tf.cast(_by_time(tf.reshape(mask, [*_shape(sequences)[:2], 1])), tf.bool)
    if layer.go_backwards:
        x, masks = tf.reverse(x, [0]), None if masks is None else tf.reverse(masks, [0])

    def step(x, mask, carried, weights):
        """One step on lists of tensors, as a function of them alone."""
        states = keras.tree.pack_sequence_as(initial_state, carried[: len(carried) - has_last])
        with keras.StatelessScope(state_mapping=list(zip(variables, weights, strict=True))):
            output, new = cell(x, states, **arguments)
        new = keras.tree.flatten(new)
        if mask is None:
            return output, new
        before = carried[-1] if has_last else tf.zeros_like(output)
        new = [tf.where(mask, after, state) for after, state in zip(new, carried, strict=False)]
        output = tf.where(mask, output, before)
        return output, [*new, output][: len(carried)]

    if type(cell) is keras.layers.SimpleRNNCell and masks is None and cell.activation in _ENTRYWISE:
        weights = [tf.convert_to_tensor(variable.value) for variable in variables]
        outputs, last = _linear(functools.partial(_simple_recurrence, cell.activation), [x, *states, *weights])
        return last, _by_time(outputs), keras.tree.pack_sequence_as(initial_state, [last])

    # Under a mask the last output comes again.
    has_last = masks is not None and not layer.zero_output_for_mask
    weights = [tf.convert_to_tensor(variable.value) for variable in variables]
    if has_last:
        states.append(tf.zeros_like(_first_output(cell, x[0], initial_state, arguments)))
    run = functools.partial(_recurrence, step, masks, len(states))
    outputs, *last = _linear(run, [x, *states, *weights])
    states = keras.tree.pack_sequence_as(initial_state, last[: len(last) - has_last])
    return outputs[-1], _by_time(outputs), states


def _first_output(cell, x, states, arguments):
    """The output of a cell's first step, for its shape and type."""
    with keras.StatelessScope():
        return cell(x, keras.tree.map_structure(tf.identity, states), **arguments)[0]


def _by_time(tensor):
    """Exchanges the first two axes, cases and times."""
    return tf.transpose(tensor, [1, 0, *range(2, tensor.shape.rank)])


def _shape(tensor):
    """The shape of a tensor, a list of integers where they are known, else of scalars."""
    dynamic = tf.shape(tensor)
    return [dynamic[axis] if length is None else length for axis, length in enumerate(tensor.shape)]


def _linear(run, arguments):
    """Returns the results of a function, differentiable once, and once more in what is pulled back.

    Args:
        run: Callable, tensors -> `_Linearized`.
        arguments: List of tensors.
    """

    @tf.custom_gradient
    def function(*arguments):
        found = run(*arguments)

        def gradient(*u):
            @tf.custom_gradient
            def pulled(*u):
                return found.pull(list(u)), lambda *v: found.push(list(v))

            return pulled(*u)

        return found.results, gradient

    return function(*arguments)


def _recurrence(step, masks, num_states, x, *rest):
    """Runs a step over all times; its derivative is that of every step.

    Args:
        step: Callable `(x, mask, states, weights) -> (output, states)`, of one time.
        masks: Bool tensor `(times, cases, 1)`, or `None`.
        num_states: Integer, the number of states.
        x: Tensor `(times, cases, ...)`.
        *rest: Tensors, first states and weights.

    Returns:
        A `_Linearized` with the results outputs `(times, cases, ...)` and last states.
    """
    states, weights = list(rest[:num_states]), list(rest[num_states:])
    times = _shape(x)[0]
    mask_at = lambda time: None if masks is None else masks[time]  # noqa: E731

    def forwards(time, states, outputs, before):
        output, new = step(x[time], mask_at(time), states, weights)
        before = [array.write(time, state) for array, state in zip(before, states, strict=True)]
        return time + 1, new, outputs.write(time, output), before

    first, _ = step(x[0], mask_at(0), states, weights)  # for its shape and type
    arrays = [tf.TensorArray(state.dtype, times, element_shape=state.shape) for state in states]
    outputs = tf.TensorArray(first.dtype, times, element_shape=first.shape)
    _, last, outputs, before = _loop(times, forwards, (0, states, outputs, arrays))
    # The states before every step: all that the derivative needs.
    before = [stacked(array, times) for array in before]

    def at(time):
        return [x[time], *[of_state[time] for of_state in before], *weights]

    def step_of(time):
        def run(arguments):
            output, new = step(arguments[0], mask_at(time), arguments[1 : 1 + num_states], arguments[1 + num_states :])
            return [output, *new]

        return run

    def pull(u):
        def backwards(turn, of_states, of_weights, of_x):
            time = times - 1 - turn
            arguments = at(time)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(arguments)
                results = step_of(time)(arguments)
            gradients = tape.gradient(results, arguments, output_gradients=[u[0][time], *of_states])
            gradients = dense(gradients, arguments)
            of_weights = [a + b for a, b in zip(of_weights, gradients[1 + num_states :], strict=True)]
            return turn + 1, gradients[1 : 1 + num_states], of_weights, of_x.write(time, gradients[0])

        zeros = [tf.zeros_like(weight) for weight in weights]
        of_x = tf.TensorArray(x.dtype, times, element_shape=x.shape[1:])
        _, of_states, of_weights, of_x = _loop(times, backwards, (0, list(u[1:]), zeros, of_x))
        return [stacked(of_x, times), *of_states, *of_weights]

    def push(v):
        of_weights = list(v[1 + num_states :])

        def forwards(time, of_states, outputs):
            arguments = at(time)
            tangents = _tangents(step_of(time), arguments, [v[0][time], *of_states, *of_weights])
            return time + 1, tangents[1:], outputs.write(time, tangents[0])

        outputs = tf.TensorArray(first.dtype, times, element_shape=first.shape)
        _, of_states, outputs = _loop(times, forwards, (0, list(v[1 : 1 + num_states]), outputs))
        return [stacked(outputs, times), *of_states]

    return _Linearized([stacked(outputs, times), *last], graph_function(pull), graph_function(push))


def _simple_recurrence(activation, x, start, kernel, recurrent_kernel, bias=None):
    """Runs `h_t = activation(x_t kernel + h_(t-1) recurrent_kernel + bias)`, with all in one matrix product that need not be in the loop.

    Args:
        activation: Callable on every entry.
        x: Tensor `(times, cases, inputs)`.
        start: Tensor `(cases, units)`.
        kernel: Tensor `(inputs, units)`.
        recurrent_kernel: Tensor `(units, units)`.
        bias: Tensor `(units,)`, or `None`.

    Returns:
        A `_Linearized` with the results outputs `(times, cases, units)` and the last of them.
    """
    times = _shape(x)[0]

    def by_kernel(x, kernel):
        # Not by the shape of x: that of a tangent may be lost.
        rows = tf.matmul(tf.reshape(x, [-1, kernel.shape[0]]), kernel)
        return tf.reshape(rows, [*_shape(x)[:2], kernel.shape[1]])

    def states(step, state, backwards=False):
        """Returns the values that a step puts out in every turn, `(times, cases, units)`, and the last state."""

        def turn(number, state, values):
            time = times - 1 - number if backwards else number
            state, value = step(time, state)
            return number + 1, state, values.write(time, value)

        values = tf.TensorArray(start.dtype, times, element_shape=start.shape)
        _, state, values = _loop(times, turn, (0, state, values))
        return stacked(values, times), state

    driven = by_kernel(x, kernel) if bias is None else by_kernel(x, kernel) + bias

    def forwards(time, state):
        preactivation = driven[time] + tf.matmul(state, recurrent_kernel)
        return activation(preactivation), preactivation

    preactivations, last = states(forwards, start)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(preactivations)
        outputs = activation(preactivations)
    (slopes,) = dense([tape.gradient(outputs, preactivations)], [preactivations])
    before = tf.concat([start[None], outputs[:-1]], 0)

    def pull(u):
        def backwards(time, pulled):
            d = slopes[time] * (u[0][time] + pulled)
            return tf.matmul(d, recurrent_kernel, transpose_b=True), d

        d, of_start = states(backwards, u[1], backwards=True)
        rows = lambda values: tf.reshape(values, [-1, values.shape[-1]])  # noqa: E731
        of_kernels = [tf.matmul(rows(values), rows(d), transpose_a=True) for values in (x, before)]
        of_bias = [] if bias is None else [tf.reduce_sum(d, [0, 1])]
        return [by_kernel(d, tf.transpose(kernel)), of_start, *of_kernels, *of_bias]

    def push(v):
        of_x, of_start, of_kernel, of_recurrent_kernel, *of_bias = v
        driven = by_kernel(x, of_kernel) + by_kernel(before, of_recurrent_kernel) + by_kernel(of_x, kernel)
        driven = driven + of_bias[0] if of_bias else driven

        def forwards(time, tangent):
            tangent = slopes[time] * (driven[time] + tf.matmul(tangent, recurrent_kernel))
            return tangent, tangent

        return list(states(forwards, of_start))

    return _Linearized([outputs, last], graph_function(pull), graph_function(push))


def _tangents(function, arguments, v):
    """Returns Jv of a function of a list of tensors: the derivative of `<J'u, v>` in u."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(arguments)
        results = function(arguments)
    u = [tf.zeros_like(result) for result in results]
    with tf.GradientTape(watch_accessed_variables=False) as transposing:
        transposing.watch(u)
        pulled = dense(tape.gradient(results, arguments, output_gradients=u), arguments)
    return dense(transposing.gradient(pulled, u, output_gradients=v), results)


def _loop(times, body, values):
    """Runs a loop over the times."""
    return tf.while_loop(lambda time, *_: time < times, body, values, parallel_iterations=1, maximum_iterations=times)
