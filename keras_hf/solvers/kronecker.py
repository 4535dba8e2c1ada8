"""Kronecker-factored preconditioner: each layer's Gauss-Newton block as the Kronecker product of an input and an output factor.

For a Dense layer, the block of the Gauss-Newton matrix is the sum over cases of `aa' x J'HJ` (x the Kronecker product). Here a is the layer's input
with a 1 appended for the bias, J the derivative of the network's outputs with respect to the pre-activation, and H the second derivative of the loss
with respect to the outputs. Martens & Grosse treat the two factors as independent: `mean(aa') x sum(J'HJ)`. One backward pass estimates the second
factor: it takes vectors u with `E[uu'] = H`, for which `E[(J'u)(J'u)'] = J'HJ`.

Where weights serve several positions of a case, the block is the expectation of `gg'`, where g is u pulled back to the weights of the layer, the sum
of `a (J'u)'` over the positions of a case. With g as a matrix G, `sum(GG') x sum(G'G) / sum(|G|^2)` has the trace of the block and is close to the
nearest Kronecker product, to which it is one step of power iteration from the identity. Neither is it assumed that positions are independent, as they
are in a loss of every position, nor that they have one gradient, as they have before a mean over positions.
"""

import functools
import math
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_hf.common.checks import below_one, count, count_or_share
from keras_hf.common.part import all_finite
from keras_hf.common.vectors import dense, epsilon, num_weights, vector_dtype
from keras_hf.differentiation.curvature import loss_hessian
from keras_hf.network.capture import (
    at_least_float32,
    has_bias_row,
    has_places,
    has_tokens,
    is_capturable,
    is_transposed,
    kernel_and_bias,
    matrix_shape,
    moments_of_cases,
    recorded_uses,
    second_moments,
)
from keras_hf.network.time_steps import has_time_steps
from keras_hf.solvers.preconditioners import EmpiricalFisherDiagonal, Preconditioner, due, never_made

# Size of the outputs' last axis up to which H is formed column by column; above, only its diagonal. Columns cost passes through the loss only.
_MAX_COLUMNS = 32
# Rows of a factor up to which it is inverted: this size takes 1.5 seconds on one core, twice the size eight times as long.
_MAX_ROWS = 4096
# Rows up to which an inverse is a solve for the identity: above, matrix products are faster.
_MAX_SOLVED = 256
# Of a token, in multiples of the mean, in its damping: one that was not seen has it, too.
_LEAST_FREQUENCY = 0.02
# Averaged factors are estimated anew in each of the first updates, which change much.
_FIRST_ESTIMATES = 3


@keras.saving.register_keras_serializable("keras_hf")
class KroneckerFactored(Preconditioner):
    """Kronecker-factored preconditioner: `M = (A + pi sqrt(damping) I) x (S + sqrt(damping) / pi I)` for each layer, kernel and bias together.

    A is the mean of aa' over cases, where a is the layer's input with a 1 appended for its bias. S is the sum over cases of dd', where d is a random
    vector u, back-propagated from the outputs to the layer's pre-activation; u is drawn so that `E[uu'] = H`, the second derivative of the loss. (The
    gradients of the loss would not do: they vanish where the loss is fitted, while the curvature does not.) `pi^2 = (tr A / dim A) / (tr S / dim S)`
    divides the damping between the factors. For a network of one layer and a loss of constant H, `A x S` is the Gauss-Newton matrix itself.

    Use it for deep networks. CG needs a third to a half of the iterations that it needs with the diagonal (`benchmarks/preconditioners.py`); the
    earlier CG is stopped, the larger the gain. To full convergence it is no faster.

    These trained layers are factored:

    - Dense;
    - Conv1D, Conv2D and Conv3D with one group, and their transposes, whose biases are left to the diagonal;
    - EinsumDense that is a Dense layer except for its shapes, as "abc,cde->abde" with `bias_axes="de"`: features are last in inputs and outputs, and
      there is no bias or one number per feature. This includes the projections of MultiHeadAttention and GroupQueryAttention;
    - Embedding, a Dense layer on one-hot inputs: A is diagonal (the frequency of each token), whatever the size of the vocabulary. Its damping is
      multiplied, for each token, by the root of its frequency over the mean frequency, at least the root of 0.02. With one damping for all,
      networks learn texts by heart (our own choice, measured in docs/measured-solvers.md);
    - SimpleRNN, LSTM and GRU, with kernel, recurrent kernel and biases as one matrix: of one cell, not unrolled, without dropout, and for a GRU with
      `reset_after=True`.

    All other weights get the diagonal of `EmpiricalFisherDiagonal()`: weights of other layers and of subclasses of these, under LoRA or quantization,
    used outside of their layer's calls (tied embeddings), or in a layer with more than 4,096 inputs (tokens excepted) or units.

    Where weights serve several positions of a case (Dense on sequences, convolutions, time steps, a layer that is called again), the factors are
    those of G, the sum of ad' over the positions of a case: A is the sum over cases of GG', S that of G'G, divided by that of |G|^2, which is the
    trace of both. So positions whose effects on the loss add up, as before a mean over positions, count as one, and positions with a loss of their
    own count as many; which of the two it is need not be said. In the layer that produces the outputs, positions are independent: A is the mean over
    them and S the sum, and positions that receive no gradient, because they are masked, do not count. Regularizers raise a layer's damping by the
    mean of their second derivative over its weights (2c for `L2(c)` on all of them). Under BatchNormalization the batch statistics count as
    constants.

    H is computed by products with it, so any Keras loss works, with its weights and masks. If the outputs' last axis has up to 32 entries, its whole
    block is formed, and `u = Le` with the Cholesky factor L and random signs e. If it has more, `u = sqrt(|diag H|) e`. This is all of H for losses
    that are sums over entries (squares, binary cross-entropy); for a softmax over more classes it leaves out the coupling between classes. Negative
    curvature of a loss that is not convex counts as zero in the first case, as positive in the second. In the layer that produces the outputs, if
    their last axis is its units, the expectation over signs is computed exactly.

    On minibatches, whose few cases do not tell the factors of wide layers, average them over estimates (`decay`). The average of k estimates weighs
    each by 1/k, until that is less than `1 - decay`; from then on it is exponential. In each of the first three updates factors are estimated anew.

    Cost: every `interval` updates about 1.5 gradients of `num_cases` cases, for a layer with m inputs, k units and T positions `T m k + m k (m + k)`
    multiplications a case or `T (m^2 + k^2) + T^2 (m + k)`, and the inverses (m^3 for a factor with m rows). In every application, as
    in a CG iteration, `m k (m + k)` multiplications for a layer with m inputs and k units, `m k^2` for m tokens. Inverses that are kept for several
    updates keep the damping that they were computed with. This affects only the speed of CG, not its solution. Memory: two numbers for each entry of
    a factor, if both averages and inverses are kept.

    Args:
        num_cases: The cases used to estimate the factors, at most. Integer >= 1: of the curvature chunk; `None`: all of it. Float in (0, 1]: a share
            of the cases of the update. If there are fewer cases than rows in a factor, the remaining directions have only the damping.
        interval: Integer >= 1, the number of updates for which factors and their inverses are used. Above 1 the inverses are kept, and saved with the
            optimizer.
        decay: Float in [0, 1), the weight of the earlier estimates in the average, once there are many; 0 (default) = no average.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        Martens & Grosse (2015), *Optimizing neural networks with Kronecker-factored approximate curvature*, sections 3 and 6.3; Eschenhagen et al.
        (2023), *Kronecker-factored approximate curvature for modern neural network architectures*, on positions; Morwani et al. (2024), *A new
        perspective on Shampoo's preconditioner*, on factors of G.
    """

    def __init__(self, num_cases=1000, interval=1, decay=0.0):
        self.num_cases = count_or_share("num_cases", num_cases)
        self.interval = count("interval", interval)
        self.decay = below_one("decay", decay)

    def initial_state(self, variables, layers):
        dtype, state = vector_dtype(variables), {}
        if self.interval > 1:
            state |= {"others": tf.ones([num_weights(variables)], dtype), **never_made()}
        if self.decay:
            state["num_averaged"] = tf.zeros([], dtype)
        for layer in factored_layers(layers, variables):
            rows, units = factored_shape(layer)
            name = _name(layer, variables)
            a = tf.ones([rows], dtype) if has_tokens(layer) else tf.eye(rows, dtype=dtype)
            s = tf.eye(units, dtype=dtype)
            if self.interval > 1:
                state |= {f"{name}_a": a, f"{name}_s": s}
            if self.decay:
                state |= {f"{name}_mean_a": tf.zeros_like(a), f"{name}_mean_s": tf.zeros_like(s)}
        return state

    def inverse(self, objective, linearize, damping, state):
        del linearize
        layers = [layer for layer in objective.captured if _is_factored(layer)]
        sizes = [variable.shape.num_elements() for variable in objective.variables]
        places = {id(variable): place for place, variable in enumerate(objective.variables)}
        of_layers = [[places[id(weight.value)] for weight in kernel_and_bias(layer)] for layer in layers]
        is_complete = sum(map(len, of_layers)) == len(sizes)
        names = [_name(layer, objective.variables) for layer in layers]

        def made(state):
            factors, state = self._averaged(self._factors(objective, layers), names, state)
            return self._inverses(objective, damping, layers, of_layers, is_complete, factors), state

        if self.interval == 1:
            (others, blocks, _), state = made(state)
        else:
            others, blocks, state = self._kept_inverses(made, names, objective.update_number, state)

        def precondition(residual):
            residuals = tf.split(residual, sizes)
            parts = list(residuals) if is_complete else tf.split(others * residual, sizes)
            for layer, own, (a, s) in zip(layers, of_layers, blocks, strict=True):
                matrix = tf.reshape(tf.concat([residuals[place] for place in own], 0), factored_shape(layer))
                solved = tf.reshape(_between(a, matrix, s), [-1])
                for place, part in zip(own, tf.split(solved, [sizes[place] for place in own]), strict=True):
                    parts[place] = part
            return tf.concat(parts, 0)

        return precondition, state

    def _inverses(self, objective, damping, layers, of_layers, is_complete, factors):
        """Returns the multiplier of the residual of other weights, `(n,)`, the inverses of every layer's factors, and which of these are sound.

        The last is a list of bool scalars, for the other weights and every layer: whether they were computed from finite numbers.
        """
        others = tf.ones([objective.num_weights], objective.dtype)
        if not is_complete:
            others = EmpiricalFisherDiagonal().inverse(_Others(objective, layers), None, damping, {})[0](others)
        blocks, sound = [], [all_finite([others])]
        if layers:
            regularization = tf.split(
                objective.regularization_diagonal(), [v.shape.num_elements() for v in objective.variables]
            )
            damped = []
            for moments, own in zip(factors, of_layers, strict=True):
                curvature = tf.reduce_mean(tf.concat([regularization[place] for place in own], 0))
                damped += _damped(moments, damping + curvature)
                sound.append(all_finite([moments.a, moments.s]))
            inverses = iter(_all_inverses(objective, damped))
            blocks = list(zip(inverses, inverses, strict=True))
        return others, blocks, objective.agreed(sound)

    def _averaged(self, factors, names, state):
        """Returns the factors averaged with those of earlier estimates, and the next state.

        Of k estimates, all weigh the same until 1 / k is less than 1 - decay: an average from zero would be biased towards zero.
        """
        if not self.decay:
            return factors, state
        number = state["num_averaged"] + 1
        weight = tf.maximum(1 / number, tf.constant(1 - self.decay, number.dtype))
        means, next_state, all_sound = [], dict(state), []
        for name, (a, s, places) in zip(names, factors, strict=True):
            is_sound, of_layer = all_finite([a, s]), []
            for key, factor in ((f"{name}_mean_a", a), (f"{name}_mean_s", s)):
                old = tf.linalg.diag_part(state[key]) if factor.shape.rank < state[key].shape.rank else state[key]
                # An estimate that is not finite would stay for long.
                of_layer.append(tf.where(is_sound, old + weight * (factor - old), old))
                next_state[key] = of_layer[-1] if old is state[key] else tf.linalg.diag(of_layer[-1])
            means.append(_Moments(*of_layer, places))
            all_sound.append(is_sound)
        next_state["num_averaged"] = tf.where(tf.reduce_all([True, *all_sound]), number, number - 1)
        return means, next_state

    def _kept_inverses(self, make, names, update_number, state):
        """Returns the others' multiplier and the blocks, of the state if they are still valid, else made by `make(state)`; and the next state."""
        # Whether the second factor of a layer is diagonal: known once it has been made; eagerly, only in an update that makes it.
        diagonal = []

        def made():
            (others, blocks, sound), next_state = make(state)
            diagonal.extend(s.shape.rank == 1 for _, s in blocks)
            # Results that are not finite are replaced by the previous ones, and not kept for an interval: the next update tries again.
            new = {"others": (others, sound[0]), "made_at": (update_number, tf.reduce_all(sound))}
            for name, (a, s), is_sound in zip(names, blocks, sound[1:], strict=True):
                s = tf.linalg.diag(s) if s.shape.rank == 1 else s
                new |= {f"{name}_a": (a, is_sound), f"{name}_s": (s, is_sound)}
            return {
                **next_state,
                **{name: tf.where(is_sound, value, state[name]) for name, (value, is_sound) in new.items()},
            }

        is_due = due(state, update_number, self.interval)
        if self.decay:
            # The first averages change much.
            is_due |= state["num_averaged"] < _FIRST_ESTIMATES
        state = tf.cond(is_due, made, lambda: dict(state))
        blocks = [
            (state[f"{name}_a"], tf.linalg.diag_part(s) if is_diagonal else s)
            for name, is_diagonal in zip(names, diagonal or [False] * len(names), strict=True)
            for s in [state[f"{name}_s"]]
        ]
        return state["others"], blocks, state

    def _factors(self, objective, layers):
        """Returns A and S of every layer, in the type of flat vectors."""
        sums, num_cases = objective.sum_over_chunk(
            lambda micro_batch, seeds: (
                _moments(micro_batch, layers, seeds),
                tf.cast(micro_batch.num_cases, objective.dtype),
            ),
            self.num_cases,
        )
        # S is a sum over cases, each with the loss's own 1/N: scaled up to the cases that were left out.
        share = tf.math.divide_no_nan(objective.totals.chunk_cases, num_cases)
        return [
            _Moments(
                tf.math.divide_no_nan(tf.cast(a, objective.dtype), tf.cast(places, objective.dtype)),
                share * tf.cast(s, objective.dtype),
                places,
            )
            for a, s, places in sums
        ]


class _Moments(NamedTuple):
    """Second moments of one layer: of inputs and of output factors (vectors where they are diagonal), and by what the first are divided."""

    a: tf.Tensor
    s: tf.Tensor
    places: tf.Tensor


class _Others:
    """An objective for the diagonal preconditioner that leaves out the weights of some layers."""

    def __init__(self, objective, layers):
        self.squared_gradients = lambda: objective.squared_gradients(skipped=layers)
        self.regularization_diagonal = objective.regularization_diagonal


def _is_factored(layer):
    if not (is_capturable(layer) or has_time_steps(layer)) or not layer.built:
        return False
    rows, units = factored_shape(layer)
    # The factor of one-hot inputs is diagonal.
    return (has_tokens(layer) or rows <= _MAX_ROWS) and units <= _MAX_ROWS


def factored_layers(layers, variables):
    """Returns the layers that have factors, of those whose weights are all among `variables`, tensors or variables."""
    trained = {id(variable) for variable in variables}
    return [
        layer
        for layer in layers
        if _is_factored(layer) and all(id(weight.value) in trained for weight in kernel_and_bias(layer))
    ]


def num_factored_weights(layers, variables):
    """Returns how many of the weights `variables` have Kronecker factors, an integer."""
    return sum(math.prod(factored_shape(layer)) for layer in factored_layers(layers, variables))


def _name(layer, variables):
    """Names a layer by the index of its kernel among the weights, which is the same in a model that was saved and loaded."""
    kernel = kernel_and_bias(layer)[0].value
    return next(f"factor_{place}" for place, variable in enumerate(variables) if variable is kernel)


def factored_shape(layer):
    """Returns rows and columns of a layer's weights as one matrix, with the bias as its last row."""
    fan_in, units = matrix_shape(layer)
    return fan_in + has_bias_row(layer), units


def _moments(micro_batch, layers, seeds):
    """Sums the moments of every layer over the cases of a micro-batch."""
    with tf.GradientTape(watch_accessed_variables=False) as tape, recorded_uses(layers, tape) as uses:
        outputs = (evaluation := micro_batch.forward()).outputs
    pulls, expected = _square_roots(micro_batch, evaluation, seeds)
    preactivations = [use.preactivation for layer in layers for use in uses[layer]]
    gradients = tape.gradient(outputs, preactivations, output_gradients=pulls) if preactivations else []
    gradients = iter(dense(gradients, preactivations))
    found = []
    for layer in layers:
        of_uses = [(use.inputs, next(gradients)) for use in uses[layer]]
        rows, units = factored_shape(layer)
        is_output = len(outputs) == len(of_uses) == 1 and uses[layer][0].preactivation is outputs[0]
        # Of a transposed convolution the outputs are in windows: positions are not independent.
        is_output &= not is_transposed(layer)
        if not of_uses:
            a = tf.zeros([rows] if has_tokens(layer) else [rows, rows])
            s, places = tf.zeros([units, units]), tf.zeros([])
        elif has_places(layer, of_uses) and not is_output:
            a, s, places = moments_of_cases(layer, of_uses)
        else:
            a, s, places = second_moments(layer, *of_uses[0])
        # The outputs' last axis may be less than all units.
        if is_output and expected[0].shape[-1] == units and getattr(layer, "data_format", None) != "channels_first":
            s = expected[0]
        found.append(_Moments(a, s / tf.cast(micro_batch.loss_scale, s.dtype), places))
    return found


def _square_roots(micro_batch, evaluation, seeds):
    """Draws u with `E[uu'] = H` for every case, H the second derivative of the micro-batch's loss with respect to the outputs where it is cut.

    Returns:
        List of tensors u shaped as the outputs, and a list of the expected sums of `uu'` over cases and positions: (k, k) for outputs whose last axis
        has k entries or, where H is treated as diagonal, the diagonal (k,).
    """
    outputs = evaluation.outputs
    hessian = loss_hessian(lambda: micro_batch.loss(evaluation), outputs)
    pulls, expected = [], []
    for number, output in enumerate(outputs):

        def product(u, number=number):
            vectors = [tf.zeros_like(output) for output in outputs]
            vectors[number] = tf.cast(u, vectors[number].dtype)
            return at_least_float32(hessian(vectors)[number])

        if output.shape.rank > 1 and output.shape[-1] <= _MAX_COLUMNS:
            (signs,) = _signs(output, seeds, [2 * number])
            root = _cholesky(product, output)
            pull = tf.linalg.matvec(root, at_least_float32(signs))
            rows = tf.reshape(root, [-1, *root.shape[-2:]])
            mean = tf.einsum("nij,nkj->ik", rows, rows)
        else:
            signs, others = map(at_least_float32, _signs(output, seeds, [2 * number, 2 * number + 1]))
            diagonal = tf.abs(others * product(others))
            pull = tf.sqrt(diagonal) * signs
            mean = tf.reduce_sum(diagonal, range(max(output.shape.rank - 1, 1)))
        pulls.append(tf.cast(pull, output.dtype))
        expected.append(mean)
    return pulls, expected


def _cholesky(product, like):
    """Returns L (..., k, k) with `LL' = H`, from products with H; pivots below zero, by rounding or negative curvature, count as zero."""
    size = like.shape[-1]
    rounding = size * epsilon(like.dtype)
    first = at_least_float32(tf.zeros_like(like))

    def add_column(k, root):
        unit = tf.one_hot(k, size, dtype=first.dtype)
        column = product(first + unit)
        pivot_of_h = column[..., k]
        column -= tf.linalg.matvec(root, root[..., k, :])
        pivot = column[..., k]
        is_positive = pivot > rounding * tf.abs(pivot_of_h)
        scale = tf.where(is_positive, tf.math.rsqrt(tf.where(is_positive, pivot, tf.ones_like(pivot))), 0.0)
        below = tf.cast(tf.range(size) >= k, first.dtype)
        return k + 1, root + (scale[..., None] * below * column)[..., None] * unit

    start = (tf.constant(0), tf.zeros_like(first)[..., None] + tf.zeros([size], first.dtype))
    return tf.while_loop(lambda k, _: k < size, add_column, start, parallel_iterations=1)[1]


def _signs(like, seeds, salts):
    """Returns random signs for every entry of `like`, for each salt, as a function of the case's seeds and the entry's position in the case."""
    # A hash: streams of TensorFlow's stateless generators depend on how many cases are drawn together.
    of_case = tf.constant([salts], tf.uint32)
    for seed in tf.split(_mixed(tf.bitcast(seeds, tf.uint32) + 1), seeds.shape[1], axis=1):
        of_case = _mixed(tf.bitwise.bitwise_xor(of_case, seed))
    of_entry = _mixed(tf.cast(tf.range(tf.size(like) // tf.maximum(tf.shape(like)[0], 1)), tf.uint32))
    bits = _mixed(of_case[:, :, None] + of_entry)
    signs = tf.cast(1 - 2 * tf.cast(bits >= 2**31, tf.int8), like.dtype)
    return [tf.reshape(of_salt, tf.shape(like)) for of_salt in tf.unstack(signs, axis=1, num=len(salts))]


def _mixed(bits):
    """Mixes 32 bits: the finalizer of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        shifted = tf.bitwise.right_shift(bits, tf.constant(shift, tf.uint32))
        bits = tf.bitwise.bitwise_xor(bits, shifted) * tf.constant(factor, tf.uint32)
    return bits


def _damped(moments, damping):
    """Returns both factors of a layer, each with its part of the damping: tuples of a factor and a scalar, of tokens a vector."""
    means = [
        tf.reduce_mean(factor if factor.shape.rank == 1 else tf.linalg.diag_part(factor))
        for factor in (moments.a, moments.s)
    ]
    pi = tf.sqrt(means[0] / means[1])
    # A layer whose inputs or gradients are all zero, or not finite.
    pi = tf.where(tf.math.is_finite(pi) & (pi > 0), pi, tf.ones_like(pi))
    root = tf.sqrt(damping)
    of_inputs = pi * root
    if moments.a.shape.rank == 1:
        of_inputs *= tf.sqrt(tf.maximum(tf.math.divide_no_nan(moments.a, means[0]), _LEAST_FREQUENCY))
    return [(moments.a, of_inputs), (moments.s, root / pi)]


def _all_inverses(objective, damped):
    """Inverts factors with their dampings; replicas share the large ones out, which take longer to invert than to send."""
    is_large = [factor.shape.rank == 2 and factor.shape[0] > _MAX_SOLVED for factor, _ in damped]
    large = [each for each, large in zip(damped, is_large, strict=True) if large]
    shared = iter(objective.shared_out(_inverse, large, [float(factor.shape[0]) ** 3 for factor, _ in large]))
    return [next(shared) if large else _inverse(*each) for each, large in zip(damped, is_large, strict=True)]


def _inverse(factor, damping):
    """Inverts factor + damping I by Cholesky; where that fails, returns the inverse of its diagonal, 1 where that is not positive."""
    if factor.shape.rank == 1:
        return _reciprocal(factor + damping)
    size = factor.shape[0]
    invert = _inverse_of_matrix if size > _MAX_SOLVED else _of_any_size(factor.dtype)
    return tf.ensure_shape(invert(factor, damping), factor.shape)


@functools.cache
def _of_any_size(dtype):
    """`_inverse_of_matrix` for all small factors of one type, traced once."""
    specs = tf.TensorSpec([None, None], dtype), tf.TensorSpec([], dtype)
    return tf.function(_inverse_of_matrix, specs, autograph=False, experimental_attributes={"_noinline": True})


def _inverse_of_matrix(factor, damping):
    # Without damping, a factor of fewer cases than rows is singular, with eigenvalues below zero by rounding.
    jitter = 4 * epsilon(factor.dtype) * tf.linalg.trace(factor)
    damped = factor + (damping + jitter) * tf.eye(tf.shape(factor)[0], dtype=factor.dtype)
    # NaN where the matrix is not positive definite.
    inverse = _inverse_from_root(tf.linalg.cholesky(damped))
    inverse = (inverse + tf.transpose(inverse)) / 2
    is_right = tf.reduce_all(tf.math.is_finite(inverse))
    return tf.where(is_right, inverse, tf.linalg.diag(_reciprocal(tf.linalg.diag_part(damped))))


def _inverse_from_root(root):
    """Returns `(LL')^-1` of a lower triangular L, by recursion on halves.

    With X the lower left block times the inverse of the upper left one, and P the inverse for the lower right block alone, the blocks are the inverse
    for the upper left block alone plus `X'PX`, `-X'P`, and P. This takes 16 ms for 785 rows on one core, a solve for the identity 23 ms.
    """
    size = root.shape[-1]
    if size is None or size <= _MAX_SOLVED:
        return tf.linalg.cholesky_solve(root, tf.eye(tf.shape(root)[0], dtype=root.dtype))
    half = size // 2
    upper, lower = root[:half, :half], root[half:, half:]
    x = tf.linalg.triangular_solve(upper, tf.transpose(root[half:, :half]), adjoint=True)  # X'
    p = _inverse_from_root(lower)
    right = -tf.matmul(x, p)
    left = _inverse_from_root(upper) - tf.matmul(right, x, transpose_b=True)
    return tf.concat([tf.concat([left, right], 1), tf.concat([tf.transpose(right), p], 1)], 0)


def _reciprocal(diagonal):
    is_right = tf.math.is_finite(diagonal) & (diagonal > 0)
    return tf.where(is_right, 1 / tf.where(is_right, diagonal, tf.ones_like(diagonal)), tf.ones_like(diagonal))


def _between(a, matrix, s):
    """Product of three matrices, the first and last of which may be given by their diagonals."""
    matrix = a[:, None] * matrix if a.shape.rank == 1 else tf.matmul(a, matrix)
    return matrix * s if s.shape.rank == 1 else tf.matmul(matrix, s)
