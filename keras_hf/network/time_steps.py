"""Recurrent layers as layers with positions, the time steps: what their weights multiply, and the gradient with respect to the product.

The weights of a `SimpleRNN`, `LSTM` or `GRU` are one matrix: the kernel, below it the recurrent kernel, below that the biases. At every time step it
multiplies the input of the step and the state before it, with a 1 for the bias. In a `GRU` the input's part of the product and the state's enter the
step apart: there, every step is two positions.
"""

import contextlib

import keras
import tensorflow as tf

from keras_hf.common.loops import stacked
from keras_hf.common.replaced import replaced

_NUM_GATES = {keras.layers.SimpleRNNCell: 1, keras.layers.LSTMCell: 4, keras.layers.GRUCell: 3}


def has_time_steps(layer):
    """Whether a layer is a recurrent one of Keras whose time steps can be recorded: of one cell, without dropout, and as a loop.

    A GRU must apply its reset gate after the matrix product, as is Keras' default.
    """
    if type(layer) not in (keras.layers.RNN, keras.layers.SimpleRNN, keras.layers.LSTM, keras.layers.GRU):
        return False
    cell = layer.cell
    return (
        type(cell) in _NUM_GATES
        and not (layer.unroll or cell.dropout or cell.recurrent_dropout)
        and (type(cell) is not keras.layers.GRUCell or cell.reset_after)
    )


def weights_by_rows(layer):
    """Returns the weights of a layer that has time steps, in the order of their rows in one matrix."""
    cell = layer.cell
    return [cell.kernel, cell.recurrent_kernel, *([] if cell.bias is None else [cell.bias])]


def num_units(layer):
    """The number of columns of the weights of a layer that has time steps, as one matrix."""
    return _NUM_GATES[type(layer.cell)] * layer.cell.units


@contextlib.contextmanager
def recorded_steps(layers, record):
    """Context in which layers that have time steps run as loops whose products are recorded.

    Args:
        layers: List of layers that have time steps.
        record: Callable `(layer, zeros) -> use`. `zeros`, `(cases, positions, units)`, is what is added to the products of the weights;
            `use.preactivation` is added in its place. `use.inputs` is set to what the weights multiply, `(cases, positions, rows)`.
    """

    def inner_loop(layer):
        def recorded(sequences, initial_state, mask, training=False):
            del training
            return _run(layer, sequences, initial_state, mask, lambda zeros: record(layer, zeros))

        return recorded

    with replaced(*[(layer, "inner_loop", inner_loop(layer)) for layer in layers]):
        yield


def _run(layer, sequences, initial_state, mask, record):
    """Does what `keras.layers.RNN.inner_loop` does, and returns all outputs whatever the layer's `return_sequences`."""
    cell, x = layer.cell, _by_time(sequences)
    start = [tf.convert_to_tensor(state) for state in keras.tree.flatten(initial_state)]
    mask = mask[0] if isinstance(mask, list | tuple) else mask
    masks = tf.ones(tf.shape(x)[:2], bool) if mask is None else tf.cast(tf.transpose(mask), bool)
    if layer.go_backwards:
        x, masks = tf.reverse(x, [0]), tf.reverse(masks, [0])
    times, num_cases, units = tf.shape(x)[0], tf.shape(x)[1], num_units(layer)
    parts = 2 if type(cell) is keras.layers.GRUCell else 1
    use = record(tf.zeros([num_cases, parts * times, units], x.dtype))
    # First the positions of the inputs, then those of the states.
    added = [_by_time(part) for part in tf.split(use.preactivation, parts, 1)]
    kernel, recurrent_kernel, *bias = [tf.cast(weight.value, x.dtype) for weight in weights_by_rows(layer)]
    biases = tf.reshape(bias[0], [parts, units]) if bias else tf.zeros([parts, units], x.dtype)
    by_input = tf.tensordot(x, kernel, 1) + biases[0] + added[0]
    by_input = tf.TensorArray(x.dtype, times).unstack(by_input)
    by_state = [tf.TensorArray(x.dtype, times).unstack(part + biases[1]) for part in added[1:]]

    def step(time, states, output, outputs, before):
        of_state = tf.add_n([tf.matmul(states[0], recurrent_kernel), *[part.read(time) for part in by_state]])
        new = _step(cell, by_input.read(time), of_state, states)
        is_on = masks[time][:, None]
        kept = [tf.where(is_on, after, state) for after, state in zip(new, states, strict=True)]
        last = tf.zeros_like(output) if layer.zero_output_for_mask else output
        output = tf.where(is_on, new[0], last)
        return time + 1, kept, output, outputs.write(time, output), before.write(time, states[0])

    shape = [sequences.shape[0], cell.units]
    arrays = [tf.TensorArray(x.dtype, times, element_shape=shape) for _ in range(2)]
    first = tf.zeros([num_cases, cell.units], x.dtype)
    first.set_shape(shape)
    _, states, output, outputs, before = tf.while_loop(
        lambda time, *_: time < times, step, (0, start, first, *arrays), maximum_iterations=times
    )
    use.inputs = _rows(_by_time(x), _by_time(stacked(before, x.shape[0])), parts, bool(bias))
    return output, _by_time(stacked(outputs, x.shape[0])), keras.tree.pack_sequence_as(initial_state, states)


def _step(cell, by_input, by_state, states):
    """Returns the states after a step of a cell, the first of which is its output, from the two parts of its matrix product."""
    if type(cell) is keras.layers.SimpleRNNCell:
        return [cell.activation(by_input + by_state)]
    if type(cell) is keras.layers.LSTMCell:
        entered, kept, candidate, shown = tf.split(by_input + by_state, 4, 1)
        carry = cell.recurrent_activation(kept) * states[1]
        carry += cell.recurrent_activation(entered) * cell.activation(candidate)
        return [cell.recurrent_activation(shown) * cell.activation(carry), carry]
    gates, candidate = tf.split(by_input, [2 * cell.units, cell.units], 1)
    gates_of_state, candidate_of_state = tf.split(by_state, [2 * cell.units, cell.units], 1)
    update, reset = tf.split(cell.recurrent_activation(gates + gates_of_state), 2, 1)
    candidate = cell.activation(candidate + reset * candidate_of_state)
    return [update * states[0] + (1 - update) * candidate]


def _rows(x, before, parts, has_bias):
    """Returns what the weights multiply at each position, `(cases, positions, rows)`."""
    ones = [tf.ones_like(x[..., :1])] if has_bias else []
    if parts == 1:
        return tf.concat([x, before, *ones], 2)
    zeros = [tf.zeros_like(one) for one in ones]
    return tf.concat(
        [
            tf.concat([x, tf.zeros_like(before), *ones, *zeros], 2),
            tf.concat([tf.zeros_like(x), before, *zeros, *ones], 2),
        ],
        1,
    )


def _by_time(tensor):
    """Exchanges the first two axes, cases and times."""
    return tf.transpose(tensor, [1, 0, 2])
