"""Squared per-case gradients, from layer inputs and pre-activation gradients where the form of a layer allows, else case by case.

For a Dense layer on vectors the gradient of case i is `a_i d_i'`, where a is the layer's input and d the gradient with respect to its
pre-activation. The sum of squares over cases is therefore `(a^2)'(d^2)`, and no per-case gradient is ever formed (Martens' released code; Goodfellow
2015, *Efficient per-example gradient computations*). Where weights are shared within a case (Dense on sequences, convolutions, a layer called twice),
the contributions of all positions (`places` in the code) are summed before squaring, one block of cases at a time. An Embedding is a Dense layer on
one-hot inputs: only the rows of the case's tokens are summed. For any other weight the gradients are computed case by case, vectorised over a block.
Where TensorFlow cannot vectorise, their squares are estimated without bias from blocks of cases with random signs (Bekas, Kokiopoulou & Saad 2007).
"""

import contextlib
import itertools
import math
import re

import keras
import tensorflow as tf

from keras_hf.common.loops import mapped, sum_over_blocks
from keras_hf.common.replaced import replaced
from keras_hf.common.vectors import dense
from keras_hf.network.time_steps import has_time_steps, num_units, recorded_steps, weights_by_rows

# Number of floats in the largest temporary tensor of a block of cases.
_BLOCK_FLOATS = 2**22

# Number of blocks of cases with random signs. The standard deviation of the estimate is about a fifth of its value, which matters little under the
# exponent of the preconditioner.
_SIGNED_BLOCKS = 32

_TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D, *_TRANSPOSED)


class _Use:
    """One call of a layer: its input and its pre-activation."""

    def __init__(self, inputs):
        self.inputs, self.preactivation = inputs, None


def is_capturable(layer):
    """Whether the squared gradients of a layer follow from its inputs and pre-activation gradients."""
    # A subclass may compute anything. With an adapter (LoRA) or quantization, the layer multiplies with something other than its kernel.
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return False
    if type(layer) is keras.layers.EinsumDense:
        return _num_summed_axes(layer) > 0
    if type(layer) in (keras.layers.Dense, keras.layers.Embedding):
        return True
    return type(layer) in _CONVOLUTIONS and getattr(layer, "groups", 1) == 1


def is_transposed(layer):
    """Whether a layer is a transposed convolution. Its kernel is that of the convolution that leads back from its pre-activation to its input.

    Of a case's gradient, `ad'` summed over places, a is then a window of the gradient with respect to the pre-activation, and d the input there. The
    bias does not fit into it.
    """
    return type(layer) in _TRANSPOSED


def has_tokens(layer):
    """Whether the inputs of a capturable layer are indices, which stand for one-hot vectors."""
    return type(layer) is keras.layers.Embedding


def kernel_and_bias(layer):
    """Returns the weights of a capturable, built layer: a list of its kernel and, if there is one, its bias.

    Of a layer that has time steps: its kernel, its recurrent kernel, and if there is one, its bias. Of a transposed convolution: its kernel.
    """
    if has_time_steps(layer):
        return weights_by_rows(layer)
    if is_transposed(layer):
        return [layer.kernel]
    kernel, bias = layer.embeddings if has_tokens(layer) else layer.kernel, getattr(layer, "bias", None)
    return [kernel] if bias is None else [kernel, bias]


def matrix_shape(layer):
    """Returns fan-in and units, the shape of a capturable layer's kernel as a matrix; of all weights for a layer that has time steps."""
    if has_time_steps(layer):
        units = num_units(layer)
        return sum(math.prod(weight.shape) for weight in weights_by_rows(layer)) // units, units
    shape = kernel_and_bias(layer)[0].shape
    num_inputs = _num_summed_axes(layer) if type(layer) is keras.layers.EinsumDense else len(shape) - 1
    return math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])


def has_bias_row(layer):
    """Whether the weights of a capturable layer as one matrix have a row more than `matrix_shape` says, for the bias."""
    return not has_time_steps(layer) and len(kernel_and_bias(layer)) == 2


def _num_summed_axes(layer):
    """Returns the number of axes that an EinsumDense sums over, if it is a Dense layer in all but its shapes; else 0.

    It is one if inputs and outputs have axes of positions followed by axes of features, if the kernel has the features of the input followed by those
    of the output, and if there is no bias or one number per feature of the output: "abc,cde->abde" with `bias_axes="de"`.
    """
    inputs, kernel, outputs = re.split(",|->", layer.equation.replace("...", "."))
    for number in range(1, len(kernel)):
        places, units = inputs.removesuffix(kernel[:number]), kernel[number:]
        is_product = places != inputs and places and outputs == places + units and _are_distinct(places + kernel)
        if is_product and (not layer.bias_axes or set(layer.bias_axes) == set(units)):
            return number
    return 0


def _are_distinct(letters):
    return len(set(letters)) == len(letters)


@contextlib.contextmanager
def recorded_uses(layers, tape=None):
    """Context that records the calls of `layers`. It gives a dict from each layer to the list of its uses.

    Args:
        layers: List of `keras.Layer`, capturable ones and such that have time steps. Of the latter, the pre-activations that are recorded are zeros
            added to these.
        tape: `tf.GradientTape` that is to watch the pre-activations, or `None`.
    """
    uses = {layer: [] for layer in layers}
    recurrent = [layer for layer in layers if has_time_steps(layer)]
    layers = [layer for layer in layers if not has_time_steps(layer)]

    def watched(layer, preactivation):
        if tape is not None:
            tape.watch(preactivation)
        uses[layer][-1].preactivation = preactivation
        return preactivation

    def call(layer):
        original = layer.call

        def recorded(inputs, *args, **kwargs):
            uses[layer].append(_Use(inputs))
            outputs = original(inputs, *args, **kwargs)
            return outputs if hasattr(layer, "activation") else watched(layer, outputs)

        return recorded

    def activation(layer):
        original = layer.activation or tf.identity
        return lambda preactivation: original(watched(layer, preactivation))

    def of_steps(layer, zeros):
        uses[layer].append(_Use(None))
        watched(layer, zeros)
        return uses[layer][-1]

    calls = [(layer, "call", call(layer)) for layer in layers]
    activations = [(layer, "activation", activation(layer)) for layer in layers if hasattr(layer, "activation")]
    with replaced(*calls, *activations), recorded_steps(recurrent, of_steps):
        yield uses


def squared_gradients(micro_batch, layers, skipped=()):
    """Returns the sum over the cases of a micro-batch of the squared gradient of each case's share of the compiled loss.

    Cost: one forward and one backward pass, about one more weight gradient for each captured layer, and about one more gradient for all other layers.

    Args:
        micro_batch: `micro_batch.MicroBatch`.
        layers: List of the layers to capture; see `is_capturable`. Their weights must not be read anywhere else.
        skipped: List of layers whose `kernel_and_bias` get zeros, at no cost.

    Returns:
        List of tensors shaped as `micro_batch.variables`.
    """
    squares = {id(weight.value): tf.zeros_like(weight.value) for layer in skipped for weight in kernel_and_bias(layer)}
    layers = [layer for layer in layers if is_capturable(layer) and (layer not in skipped or _has_bias_apart(layer))]
    if layers:
        with tf.GradientTape() as tape, recorded_uses(layers, tape) as uses:
            share = micro_batch.loss(micro_batch.forward())
        layers = [layer for layer in layers if uses[layer]]
        preactivations = [use.preactivation for layer in layers for use in uses[layer]]
        gradients = iter(dense(tape.gradient(share, preactivations), preactivations))
        for layer in layers:
            of_uses = [_aligned(layer, use.inputs, at_least_float32(next(gradients))) for use in uses[layer]]
            if _has_bias_apart(layer):
                of_cases = tf.add_n([tf.reduce_sum(d, range(1, d.shape.rank - 1)) for d, _ in of_uses])
                squares[id(layer.bias.value)] = tf.reduce_sum(of_cases**2, 0)
            if layer in skipped:
                continue
            found = (_embedding_squares if has_tokens(layer) else _layer_squares)(layer, of_uses)
            for weight, square in zip(kernel_and_bias(layer), found, strict=False):
                squares[id(weight.value)] = square
    others = [variable for variable in micro_batch.variables if id(variable) not in squares]
    if others:
        method = _case_by_case if micro_batch.is_vectorizable else _in_signed_blocks
        squares.update(zip(map(id, others), method(micro_batch, others), strict=True))
    return [tf.reshape(squares[id(variable)], variable.shape) for variable in micro_batch.variables]


def _has_bias_apart(layer):
    return is_transposed(layer) and layer.bias is not None


def at_least_float32(tensor):
    """Returns a tensor of 16-bit numbers as float32, since their squares would leave their range; other tensors unchanged."""
    return tf.cast(tensor, tf.float32) if tensor.dtype.size == 2 else tensor


def _layer_squares(layer, uses):
    """Returns the squared gradients summed over cases: of the kernel, (fan_in, units), and of the bias, (units,).

    Args:
        layer: Dense, EinsumDense or a convolution.
        uses: List of the results of `_aligned` for every use.
    """
    fan_in, units = matrix_shape(layer)
    if len(uses) == 1 and uses[0][1].shape[1:-1].num_elements() == 1 and type(layer) not in _CONVOLUTIONS:
        inputs, gradient = uses[0]
        squared = gradient[:, 0] ** 2
        return tf.matmul(inputs[:, 0] ** 2, squared, transpose_a=True), tf.reduce_sum(squared, 0)

    num_cases = tf.shape(uses[0][1], tf.int64)[0]
    block = tf.maximum(_BLOCK_FLOATS // tf.maximum(_num_places(uses, units) * max(fan_in, units), fan_in * units), 1)

    def terms(first, last):
        of_kernel, of_bias = [], []
        for inputs, gradient in [(a[first:last], d[first:last]) for a, d in uses]:
            places = _places(layer, inputs, tf.shape(gradient))
            d = tf.reshape(gradient, [tf.shape(gradient)[0], 1, -1, units])
            of_kernel.append(tf.matmul(places, d, transpose_a=True))
            of_bias.append(tf.reduce_sum(d, [1, 2]))
        kernel = tf.reshape(tf.reduce_sum(tf.add_n(of_kernel) ** 2, 0), [fan_in, units])
        return kernel, tf.reduce_sum(tf.add_n(of_bias) ** 2, 0)

    dtype = uses[0][1].dtype
    return sum_over_blocks(num_cases, block, terms, (tf.zeros([fan_in, units], dtype), tf.zeros([units], dtype)))


def _embedding_squares(layer, uses):
    """Returns the squared gradients of an Embedding summed over cases, a list of one tensor (tokens, units); arguments as in `_layer_squares`."""
    of_token, tokens = _gradients_of_tokens(layer, uses)
    return [tf.math.unsorted_segment_sum(of_token**2, tokens, matrix_shape(layer)[0])]


def second_moments(layer, inputs, gradient):
    """Returns the sums of aa' and dd' over the cases and positions of one use of a layer, and the number of these positions.

    At each position a is the part of the input that the layer multiplies, with a 1 appended if there is a bias, and d is the gradient with respect to
    the pre-activation. Positions with `d = 0`, such as those under a mask, do not count.

    Args:
        layer: `keras.Layer`; see `is_capturable`.
        inputs: Tensor (cases, ...), the layer's input.
        gradient: Tensor (cases, ...) of the shape of the pre-activation.

    Returns:
        The sum of aa', a tensor (fan_in, fan_in), or with a bias (fan_in + 1, fan_in + 1), or for one-hot inputs, where it is diagonal, its diagonal
        (fan_in,); the sum of dd', (units, units); and a scalar, the number of positions.
    """
    inputs, gradient = _aligned(layer, inputs, at_least_float32(gradient))
    fan_in, units = matrix_shape(layer)
    d = tf.reshape(gradient, [-1, units])
    counts = tf.cast(tf.reduce_any(d != 0, 1), d.dtype)
    count, s = tf.reduce_sum(counts), tf.matmul(d, d, transpose_a=True)
    if has_tokens(layer):
        return tf.math.unsorted_segment_sum(counts, tf.reshape(inputs, [-1]), fan_in), s, count

    def moments(a, counts):
        return tf.matmul(a * counts[:, None], a, transpose_a=True), tf.linalg.matvec(a, counts, transpose_a=True)

    if type(layer) not in _CONVOLUTIONS:
        products, sums = moments(tf.reshape(inputs, [-1, fan_in]), counts)
    else:
        num_cases = tf.shape(gradient, tf.int64)[0]
        num_places = tf.size(gradient, tf.int64) // (units * tf.maximum(num_cases, 1))
        block = tf.maximum(_BLOCK_FLOATS // tf.maximum(num_places * fan_in, 1), 1)

        def terms(first, last):
            places = _places(layer, inputs[first:last], tf.shape(gradient[first:last]))
            a = tf.reshape(tf.transpose(places, [0, 2, 1, 3]), [-1, fan_in])
            return moments(a, counts[first * num_places : last * num_places])

        zeros = tf.zeros([fan_in, fan_in], d.dtype), tf.zeros([fan_in], d.dtype)
        products, sums = sum_over_blocks(num_cases, block, terms, zeros)
    if len(kernel_and_bias(layer)) == 2:
        products = tf.concat([products, sums[None]], 0)
        products = tf.concat([products, tf.concat([sums, count[None]], 0)[:, None]], 1)
    return products, s, count


def has_places(layer, uses):
    """Whether the weights of a layer may serve several positions of a case, as far as the shapes tell.

    Args:
        layer: `keras.Layer`; see `is_capturable`.
        uses: List of pairs, input and gradient with respect to the pre-activation, of every use of the layer.
    """
    return len(uses) > 1 or any(_aligned(layer, *use)[1].shape[1:-1].num_elements() != 1 for use in uses)


def moments_of_cases(layer, uses):
    """Returns the sums over cases of GG', of G'G and of |G|^2, where G is the gradient of a case with respect to the layer's weights as one matrix.

    G is the sum of `ad'` over the positions of a case; see `second_moments`. If there is a bias, it is the last row.

    Args:
        layer: `keras.Layer`; see `is_capturable`.
        uses: As in `has_places`.

    Returns:
        Tensors (rows, rows), or for one-hot inputs the diagonal of it (rows,), (units, units), and a scalar.
    """
    uses = [_aligned(layer, inputs, at_least_float32(gradient)) for inputs, gradient in uses]
    if has_tokens(layer):
        of_token, tokens = _gradients_of_tokens(layer, uses)
        squares = tf.reduce_sum(of_token**2, 1)
        rows = tf.math.unsorted_segment_sum(squares, tokens, matrix_shape(layer)[0])
        return rows, tf.matmul(of_token, of_token, transpose_a=True), tf.reduce_sum(squares)
    fan_in, units = matrix_shape(layer)
    rows = fan_in + has_bias_row(layer)
    num_cases = tf.shape(uses[0][1], tf.int64)[0]
    num_places = _num_places(uses, units)
    # G itself takes `places rows units` multiplications and its products `rows units (rows + units)`. Where positions are few, inner products of
    # positions are fewer.
    of_places = num_places * (rows**2 + units**2) + num_places**2 * (rows + units)
    is_long = of_places > num_places * rows * units + rows * units * (rows + units)
    largest = tf.maximum(
        num_places * max(rows, units), tf.where(is_long, tf.cast(rows * units, tf.int64), num_places**2)
    )
    block = tf.maximum(_BLOCK_FLOATS // tf.maximum(largest, 1), 1)

    def products(a, d):
        g = tf.matmul(a, d, transpose_a=True)
        return tf.einsum("nij,nkj->ik", g, g), tf.einsum("nij,nik->jk", g, g)

    def products_by_places(a, d):
        flat = lambda tensor: tf.reshape(tensor, [-1, tensor.shape[-1]])  # noqa: E731
        coupled_a = tf.matmul(tf.matmul(d, d, transpose_b=True), a)
        coupled_d = tf.matmul(tf.matmul(a, a, transpose_b=True), d)
        return tf.matmul(flat(a), flat(coupled_a), transpose_a=True), tf.matmul(
            flat(d), flat(coupled_d), transpose_a=True
        )

    def terms(first, last):
        by_use = [_by_places(layer, a[first:last], d[first:last]) for a, d in uses]
        a, d = (tf.concat(parts, 1) for parts in zip(*by_use, strict=True))
        return tf.cond(is_long, lambda: products(a, d), lambda: products_by_places(a, d))

    dtype = uses[0][1].dtype
    a, s = sum_over_blocks(num_cases, block, terms, (tf.zeros([rows, rows], dtype), tf.zeros([units, units], dtype)))
    return a, s, tf.linalg.trace(s)


def _by_places(layer, inputs, gradient):
    """Returns what a layer multiplies at each position, with a 1 appended if there is a bias, (cases, places, rows), and (cases, places, units)."""
    fan_in, units = matrix_shape(layer)
    num_cases = tf.shape(gradient)[0]
    places = tf.transpose(_places(layer, inputs, tf.shape(gradient)), [0, 2, 1, 3])
    a, d = tf.reshape(places, [num_cases, -1, fan_in]), tf.reshape(gradient, [num_cases, -1, units])
    return (tf.concat([a, tf.ones_like(a[..., :1])], 2) if has_bias_row(layer) else a), d


def _num_places(uses, units):
    """The number of positions of a case in all uses together, an int64 scalar."""
    num_cases = tf.shape(uses[0][1], tf.int64)[0]
    return tf.add_n([tf.size(gradient, tf.int64) for _, gradient in uses]) // (units * tf.maximum(num_cases, 1))


def _gradients_of_tokens(layer, uses):
    """Returns the rows of the gradients of all cases, (n, units), one for each token that a case has, and these tokens, (n,)."""
    vocabulary, units = matrix_shape(layer)
    tokens, gradient = (tf.concat(parts, 1) for parts in zip(*uses, strict=True))
    # A separate number for each token of each case.
    ids = tokens + vocabulary * tf.range(tf.shape(tokens, tf.int64)[0])[:, None]
    ids, places = tf.unique(tf.reshape(ids, [-1]))
    return tf.math.unsorted_segment_sum(tf.reshape(gradient, [-1, units]), places, tf.size(ids)), ids % vocabulary


def _aligned(layer, inputs, gradient):
    """Returns the input of a use and the gradient with respect to its pre-activation, in the gradient's dtype, in one shape per kind of layer.

    Returns:
        The input, a tensor (cases, places, fan_in), for tokens (cases, places), for a convolution (cases, ..., channels); and the gradient, a tensor
        (cases, places, units), for a convolution (cases, ..., units). For a transposed convolution the other way round.
    """
    fan_in, units = matrix_shape(layer)
    if has_tokens(layer):
        # Negative indices count from the end.
        tokens = tf.cast(inputs, tf.int64)[..., None] % fan_in
        return _by_place(tokens, 1, 1)[..., 0], _by_place(gradient, 1, units)
    inputs = tf.cast(inputs, gradient.dtype)
    if has_time_steps(layer):
        return inputs, gradient
    if type(layer) in _CONVOLUTIONS:
        if layer.data_format != "channels_last":
            order = [0, *range(2, inputs.shape.rank), 1]
            inputs, gradient = tf.transpose(inputs, order), tf.transpose(gradient, order)
        return (gradient, inputs) if is_transposed(layer) else (inputs, gradient)
    num_inputs = _num_summed_axes(layer) if type(layer) is keras.layers.EinsumDense else 1
    num_outputs = len(layer.kernel.shape) - num_inputs
    return _by_place(inputs, num_inputs, fan_in), _by_place(gradient, num_outputs, units)


def _by_place(tensor, num_features, size):
    """Reshapes to (cases, places, size): the last `num_features` axes become one axis, and so do those between them and the first."""
    last = tensor.shape.rank - num_features
    num_places = tensor.shape[1:last].num_elements()
    if num_places is None:
        num_places = tf.reduce_prod(tf.shape(tensor)[1:last])
    return tf.reshape(tensor, [tf.shape(tensor)[0], num_places, size])


def _places(layer, inputs, output_shape):
    """Returns the part of the input that each position of the pre-activation depends on: (cases, taps, places, channels).

    A tap is an entry of a convolution's window. There is one strided slice per tap: `tf.image.extract_patches` takes up to six times as long.
    """
    num_cases, channels = tf.shape(inputs)[0], inputs.shape[-1]
    if type(layer) not in _CONVOLUTIONS:
        return inputs[:, None]
    sizes, strides, rates = layer.kernel_size, layer.strides, layer.dilation_rate
    outputs = [output_shape[1 + axis] for axis in range(layer.rank)]
    if layer.padding != "valid":
        reach = [rate * (size - 1) for rate, size in zip(rates, sizes, strict=True)]
        if layer.padding == "causal":
            padding = [(width, 0) for width in reach]
        else:  # TensorFlow's "same": as much as the last window needs, and if that is odd, one more at the end
            lacking = [
                tf.maximum((output - 1) * stride + width + 1 - tf.shape(inputs)[1 + axis], 0)
                for axis, (output, stride, width) in enumerate(zip(outputs, strides, reach, strict=True))
            ]
            padding = [(total // 2, total - total // 2) for total in lacking]
        inputs = tf.pad(inputs, [(0, 0), *padding, (0, 0)])

    def tap(place):
        window = [
            slice(start * rate, start * rate + (output - 1) * stride + 1, stride)
            for start, rate, output, stride in zip(place, rates, outputs, strides, strict=True)
        ]
        return tf.reshape(inputs[(slice(None), *window)], [num_cases, -1, channels])

    return tf.stack([tap(place) for place in itertools.product(*map(range, sizes))], 1)


def _case_by_case(micro_batch, variables):
    """Returns the squared gradients of any weights summed over cases, by one vectorised gradient per case.

    Memory: the gradients of one block of cases.
    """
    num_weights = sum(variable.shape.num_elements() for variable in variables)
    largest = tf.maximum(tf.constant(num_weights, tf.int64), micro_batch.floats_per_case)
    block = tf.cast(tf.maximum(_BLOCK_FLOATS // largest, 1), tf.int32)

    def squares_of(index):
        case = micro_batch.cases(index[None])
        with tf.GradientTape() as tape:
            share = case.loss(case.forward())
        return [gradient**2 for gradient in dense(tape.gradient(share, variables), variables)]

    def terms(first, last):
        by_case = mapped(squares_of, tf.range(first, last), [v.dtype for v in variables])
        return [tf.reduce_sum(squares, 0) for squares in by_case]

    return sum_over_blocks(micro_batch.num_cases, block, terms, [tf.zeros(v.shape, v.dtype) for v in variables])


def _in_signed_blocks(micro_batch, variables):
    """Estimates the squared gradients summed over cases: adds the gradients of a block with random signs and squares the sum.

    Exact if each block is one case. Cost: one gradient of the micro-batch, in 32 parts.
    """
    block = tf.maximum((micro_batch.num_cases + _SIGNED_BLOCKS - 1) // _SIGNED_BLOCKS, 1)

    def terms(first, last):
        cases = micro_batch.cases(tf.range(first, last))
        with tf.GradientTape() as tape:
            evaluation = cases.forward()
            outputs = evaluation.outputs
        with tf.GradientTape() as loss_tape:
            loss_tape.watch(outputs)
            share = cases.loss(evaluation)
        # Pulling back a case's own row of the outputs' gradient gives the gradient of that case.
        pulls = [
            gradient * tf.cast(_spread(cases.signs(first), gradient), gradient.dtype)
            for gradient in dense(loss_tape.gradient(share, outputs), outputs)
        ]
        gradients = dense(tape.gradient(outputs, variables, output_gradients=pulls), variables)
        return [gradient**2 for gradient in gradients]

    return sum_over_blocks(micro_batch.num_cases, block, terms, [tf.zeros(v.shape, v.dtype) for v in variables])


def _spread(vector, like):
    """Reshapes `(cases,)` to multiply a tensor of cases."""
    return tf.reshape(vector, [-1, *[1] * (like.shape.rank - 1)])
