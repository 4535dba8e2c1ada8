"""Squared gradients of single cases, from layer inputs and pre-activation gradients where a layer's form allows, else case by case.

For a Dense layer on vectors the gradient of case i is `a_i d_i'`, a its input and d the gradient in its pre-activation, so that the sum of squares
is `(a^2)'(d^2)`: no case's gradient is ever formed (Martens' released code; Goodfellow 2015, *Efficient per-example gradient computations*).
Where weights are shared within a case (Dense on sequences, convolutions, a layer called twice), the places of a case are summed before squaring,
a block of cases at a time. An Embedding is a Dense layer on one-hot inputs: only the rows of a case's tokens are summed. Any other weight takes its
gradients case by case, vectorised over a block, or an unbiased estimate from blocks of cases with random signs (Bekas, Kokiopoulou & Saad 2007)
where TensorFlow cannot vectorise.
"""

import contextlib
import itertools
import math
import re

import keras
import tensorflow as tf

from keras_hf.common.replaced import replaced
from keras_hf.problem.linearization import dense

# Floats in the largest temporary of a block of cases.
_BLOCK_FLOATS = 2**22

# Blocks of cases with random signs: the estimate's standard deviation is about a fifth of itself, little beside the exponent of the preconditioner.
_SIGNED_BLOCKS = 32

_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


class _Use:
    """One call of a layer: its input and its pre-activation."""

    def __init__(self, inputs):
        self.inputs, self.preactivation = inputs, None


def is_capturable(layer):
    """Whether the layer's squared gradients follow from its inputs and pre-activation gradients."""
    # Subclasses may compute anything; adapters (LoRA) and quantized kernels are not the kernel itself.
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return False
    if type(layer) is keras.layers.EinsumDense:
        return _num_summed_axes(layer) > 0
    if type(layer) in (keras.layers.Dense, keras.layers.Embedding):
        return True
    return type(layer) in _CONVOLUTIONS and layer.groups == 1


def has_tokens(layer):
    """Whether a capturable layer's inputs are indices of one-hot vectors."""
    return type(layer) is keras.layers.Embedding


def kernel_and_bias(layer):
    """Returns the weights of a capturable layer that is built: a list of its kernel and, if it has one, its bias."""
    kernel, bias = layer.embeddings if has_tokens(layer) else layer.kernel, getattr(layer, "bias", None)
    return [kernel] if bias is None else [kernel, bias]


def matrix_shape(layer):
    """Returns fan-in and units, the shape of a capturable layer's kernel as a matrix."""
    shape = kernel_and_bias(layer)[0].shape
    num_inputs = _num_summed_axes(layer) if type(layer) is keras.layers.EinsumDense else len(shape) - 1
    return math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])


def _num_summed_axes(layer):
    """Counts the axes that an EinsumDense sums over, if it is a Dense layer but for its shapes; else 0.

    Such are places and then features in inputs and outputs alike, features of the input and then of the output in the kernel, and no bias or one
    number for every feature of the output: "abc,cde->abde" with `bias_axes="de"`.
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
    """Records the calls of `layers` while it is open, in the dict from layer to list of uses that it gives.

    Args:
        layers: List of `keras.Layer`, see `is_capturable`.
        tape: `tf.GradientTape` to watch the pre-activations, or `None`.
    """
    uses = {layer: [] for layer in layers}

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

    calls = [(layer, "call", call(layer)) for layer in layers]
    activations = [(layer, "activation", activation(layer)) for layer in layers if hasattr(layer, "activation")]
    with replaced(*calls, *activations):
        yield uses


@contextlib.contextmanager
def constant_statistics(layers):
    """Makes these BatchNormalization layers use their moving statistics, also in training mode, while it is open."""

    def call(layer):
        original = layer.call
        return lambda inputs, training=None, mask=None: original(inputs, training=False, mask=mask)

    with replaced(*[(layer, "call", call(layer)) for layer in layers]):
        yield


@contextlib.contextmanager
def own_statistics(layers):
    """Makes these BatchNormalization layers assign the statistics of their inputs, and no moving averages of them, while it is open.

    Of a layer that is called again, the mean over its calls, as moving averages tend to.
    """

    def call(layer):
        original, calls = layer.call, itertools.count()

        def counted(*args, **kwargs):
            number = next(calls)
            layer.momentum = number / (number + 1)
            return original(*args, **kwargs)

        return counted

    momenta = [(layer, "momentum", layer.momentum) for layer in layers]  # put back as they are
    with replaced(*momenta, *[(layer, "call", call(layer)) for layer in layers]):
        yield


def squared_gradients(piece, layers, skipped=()):
    """Sums over the cases of a piece the squared gradients of each case's share of the compiled loss.

    Cost: a forward and a backward pass and, per captured layer, about one more weight gradient; for other layers about another gradient.

    Args:
        piece: `piece.PieceFunction`.
        layers: List of the layers to capture, see `is_capturable`; their weights must be read nowhere else.
        skipped: List of layers whose weights get zeros, at no cost.

    Returns:
        List of tensors shaped as `piece.variables`.
    """
    squares = {id(weight.value): tf.zeros_like(weight.value) for layer in skipped for weight in layer.trainable_weights}
    layers = [layer for layer in layers if layer not in skipped]
    if layers:
        with tf.GradientTape() as tape, recorded_uses(layers, tape) as uses:
            share = piece.loss(piece.forward())
        layers = [layer for layer in layers if uses[layer]]
        preactivations = [use.preactivation for layer in layers for use in uses[layer]]
        gradients = iter(dense(tape.gradient(share, preactivations), preactivations))
        for layer in layers:
            of_uses = [_aligned(layer, use.inputs, at_least_float32(next(gradients))) for use in uses[layer]]
            found = (_embedding_squares if has_tokens(layer) else _layer_squares)(layer, of_uses)
            for weight, square in zip(kernel_and_bias(layer), found, strict=False):
                squares[id(weight.value)] = square
    others = [variable for variable in piece.variables if id(variable) not in squares]
    if others:
        method = _case_by_case if piece.is_vectorizable else _in_signed_blocks
        squares.update(zip(map(id, others), method(piece, others), strict=True))
    return [tf.reshape(squares[id(variable)], variable.shape) for variable in piece.variables]


def at_least_float32(tensor):
    """Squares of 16-bit numbers would fall out of their range."""
    return tf.cast(tensor, tf.float32) if tensor.dtype.size == 2 else tensor


def _layer_squares(layer, uses):
    """Sums squared gradients over cases: the kernel's as (fan_in, units), the bias's as (units,).

    Args:
        layer: Dense, EinsumDense or a convolution.
        uses: List of what `_aligned` gives for every use.
    """
    fan_in, units = matrix_shape(layer)
    if len(uses) == 1 and uses[0][1].shape[1:-1].num_elements() == 1 and type(layer) not in _CONVOLUTIONS:
        inputs, gradient = uses[0]
        squared = gradient[:, 0] ** 2
        return tf.matmul(inputs[:, 0] ** 2, squared, transpose_a=True), tf.reduce_sum(squared, 0)

    num_cases = tf.shape(uses[0][1], tf.int64)[0]
    num_places = tf.add_n([tf.size(gradient, tf.int64) for _, gradient in uses]) // (units * tf.maximum(num_cases, 1))
    block = tf.maximum(_BLOCK_FLOATS // tf.maximum(num_places * max(fan_in, units), fan_in * units), 1)

    def add_block(start, kernel, bias):
        block_uses = [(a[start : start + block], d[start : start + block]) for a, d in uses]
        of_kernel, of_bias = [], []
        for inputs, gradient in block_uses:
            places = _places(layer, inputs, tf.shape(gradient))
            d = tf.reshape(gradient, [tf.shape(gradient)[0], 1, -1, units])
            of_kernel.append(tf.matmul(places, d, transpose_a=True))
            of_bias.append(tf.reduce_sum(d, [1, 2]))
        kernel += tf.reshape(tf.reduce_sum(tf.add_n(of_kernel) ** 2, 0), [fan_in, units])
        return start + block, kernel, bias + tf.reduce_sum(tf.add_n(of_bias) ** 2, 0)

    dtype = uses[0][1].dtype
    zeros = (tf.zeros([], tf.int64), tf.zeros([fan_in, units], dtype), tf.zeros([units], dtype))
    _, kernel, bias = tf.while_loop(lambda start, *_: start < num_cases, add_block, zeros, parallel_iterations=1)
    return kernel, bias


def _embedding_squares(layer, uses):
    """Sums squared gradients over cases: a list of the kernel's alone, (tokens, units); arguments as `_layer_squares`."""
    vocabulary, units = matrix_shape(layer)
    tokens, gradient = (tf.concat(parts, 1) for parts in zip(*uses, strict=True))
    # A number for every token of every case.
    ids = tokens + vocabulary * tf.range(tf.shape(tokens, tf.int64)[0])[:, None]
    ids, places = tf.unique(tf.reshape(ids, [-1]))
    of_token = tf.math.unsorted_segment_sum(tf.reshape(gradient, [-1, units]), places, tf.size(ids))
    return [tf.math.unsorted_segment_sum(of_token**2, ids % vocabulary, vocabulary)]


def second_moments(layer, inputs, gradient):
    """Sums aa' and dd' over the cases and places of one use of a layer: a is what a place sees, with a 1 appended for a bias, d its gradient.

    Places to which nothing comes back (`d = 0`: under a mask, say) do not count.

    Args:
        layer: `keras.Layer`, see `is_capturable`.
        inputs: Tensor (cases, ...), the layer's input.
        gradient: Tensor of the pre-activation's shape (cases, ...).

    Returns:
        Tensors (fan_in, fan_in), with a bias (fan_in + 1, fan_in + 1), or of one-hot inputs, whose aa' is diagonal, its diagonal (fan_in,);
        (units, units); and a scalar, the number of places.
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

        def add_block(start, products, sums):
            of_block = slice(start, start + block)
            places = _places(layer, inputs[of_block], tf.shape(gradient[of_block]))
            a = tf.reshape(tf.transpose(places, [0, 2, 1, 3]), [-1, fan_in])
            found = moments(a, counts[start * num_places : (start + block) * num_places])
            return start + block, products + found[0], sums + found[1]

        zeros = (tf.zeros([], tf.int64), tf.zeros([fan_in, fan_in], d.dtype), tf.zeros([fan_in], d.dtype))
        _, products, sums = tf.while_loop(lambda start, *_: start < num_cases, add_block, zeros, parallel_iterations=1)
    if len(kernel_and_bias(layer)) == 2:
        products = tf.concat([products, sums[None]], 0)
        products = tf.concat([products, tf.concat([sums, count[None]], 0)[:, None]], 1)
    return products, s, count


def _aligned(layer, inputs, gradient):
    """Brings the input of a use and the gradient in its pre-activation into the gradient's dtype, and into one shape for all layers of a kind.

    Returns:
        Tensors (cases, places, fan_in), tokens (cases, places) or, of a convolution, (cases, ..., channels); and (cases, places, units) or, of a
        convolution, (cases, ..., units).
    """
    fan_in, units = matrix_shape(layer)
    if has_tokens(layer):
        # Indices below zero count from the end.
        tokens = tf.cast(inputs, tf.int64)[..., None] % fan_in
        return _by_place(tokens, 1, 1)[..., 0], _by_place(gradient, 1, units)
    inputs = tf.cast(inputs, gradient.dtype)
    if type(layer) in _CONVOLUTIONS:
        if layer.data_format == "channels_last":
            return inputs, gradient
        order = [0, *range(2, inputs.shape.rank), 1]
        return tf.transpose(inputs, order), tf.transpose(gradient, order)
    num_inputs = _num_summed_axes(layer) if type(layer) is keras.layers.EinsumDense else 1
    num_outputs = len(layer.kernel.shape) - num_inputs
    return _by_place(inputs, num_inputs, fan_in), _by_place(gradient, num_outputs, units)


def _by_place(tensor, num_features, size):
    """Reshapes to (cases, places, size): the last `num_features` axes become one, and those between them and the first."""
    last = tensor.shape.rank - num_features
    num_places = tensor.shape[1:last].num_elements()
    if num_places is None:
        num_places = tf.reduce_prod(tf.shape(tensor)[1:last])
    return tf.reshape(tensor, [tf.shape(tensor)[0], num_places, size])


def _places(layer, inputs, output_shape):
    """Gives what each place of the pre-activation sees of the input: (cases, taps, places, channels); a tap is an entry of a convolution's window.

    Strided slices, one a tap: `tf.image.extract_patches` takes up to six times as long.
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
        else:  # TensorFlow's "same": as much as the last window needs, the odd one at the end
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


def _case_by_case(piece, variables):
    """Sums squared gradients over cases for any weights, by one vectorised gradient per case. Temporaries: a block of cases times the weights."""
    num_weights = sum(variable.shape.num_elements() for variable in variables)
    largest = tf.maximum(tf.constant(num_weights, tf.int64), piece.floats_per_case)
    block = tf.cast(tf.maximum(_BLOCK_FLOATS // largest, 1), tf.int32)

    def squares_of(index):
        case = piece.cases(index[None])
        with tf.GradientTape() as tape:
            share = case.loss(case.forward())
        return [gradient**2 for gradient in dense(tape.gradient(share, variables), variables)]

    def add_block(start, sums):
        by_case = tf.vectorized_map(squares_of, tf.range(start, tf.minimum(start + block, piece.num_cases)))
        return start + block, [total + tf.reduce_sum(squares, 0) for total, squares in zip(sums, by_case, strict=True)]

    sums = [tf.zeros(variable.shape, variable.dtype) for variable in variables]
    _, sums = tf.while_loop(
        lambda start, _: start < piece.num_cases, add_block, (tf.constant(0), sums), parallel_iterations=1
    )
    return sums


def _in_signed_blocks(piece, variables):
    """Estimates the sum over cases of squared gradients by squares of sums with random signs over blocks: exact where a block is one case.

    Cost: one gradient of the piece, in 32 parts.
    """
    block = tf.maximum((piece.num_cases + _SIGNED_BLOCKS - 1) // _SIGNED_BLOCKS, 1)

    def add_block(start, sums):
        cases = piece.cases(tf.range(start, tf.minimum(start + block, piece.num_cases)))
        with tf.GradientTape() as tape:
            evaluation = cases.forward()
            outputs = evaluation.outputs
        with tf.GradientTape() as loss_tape:
            loss_tape.watch(outputs)
            share = cases.loss(evaluation)
        # A case's gradient is what its own row of outputs pulls back.
        pulls = [
            gradient * tf.cast(_spread(cases.signs(start), gradient), gradient.dtype)
            for gradient in dense(loss_tape.gradient(share, outputs), outputs)
        ]
        gradients = dense(tape.gradient(outputs, variables, output_gradients=pulls), variables)
        return start + block, [total + gradient**2 for total, gradient in zip(sums, gradients, strict=True)]

    sums = [tf.zeros(variable.shape, variable.dtype) for variable in variables]
    _, sums = tf.while_loop(
        lambda start, _: start < piece.num_cases, add_block, (tf.constant(0), sums), parallel_iterations=1
    )
    return sums


def _spread(vector, like):
    """Reshapes `(cases,)` to multiply a tensor of cases."""
    return tf.reshape(vector, [-1, *[1] * (like.shape.rank - 1)])
