"""Curvatures: matrices that CG multiplies with. A curvature handles one micro-batch of data; it knows neither damping nor CG."""

import copy

import keras
import tensorflow as tf

from keras_hf.common.checks import part
from keras_hf.common.part import Part
from keras_hf.common.vectors import dense, epsilon, inner_product
from keras_hf.differentiation.linearization import DoubleBackward, Linearization
from keras_hf.differentiation.structural_damping import with_hidden_states


class Curvature(Part):
    """Base class of curvatures.

    Args:
        linearization: A `Linearization`, the way second derivatives are computed: `DoubleBackward()` (correct for every network that has second
            derivatives) or `ForwardAccumulation()` (less memory; refused where it would be wrong). `None` = `DoubleBackward()`.

    Raises:
        TypeError: If `linearization` is not a `Linearization`.

    Attributes:
        takes_hidden_states: Whether products can have the hidden states of `StructuralDamping` in them.
    """

    takes_hidden_states = False

    def __init__(self, linearization=None):
        if linearization is not None:
            part("linearization", linearization, Linearization, "DoubleBackward()")
        self.linearization = linearization

    def fitted_to(self, structure):
        """Returns this curvature with a linearization that is correct for a network, or raises.

        Args:
            structure: `structure.Structure` of the traced network.

        Raises:
            ValueError: If the linearization that was asked for would be wrong.
        """
        # It is right wherever there is a second derivative, and was nowhere measured to be slower than forward accumulation.
        linearization = self.linearization or DoubleBackward()
        return self.by(linearization.fitted_to(structure))

    def by(self, linearization):
        """Returns this curvature with another linearization."""
        other = copy.copy(self)
        other.linearization = linearization
        return other

    def prepared(self, objective, state):
        """Returns the curvature of one update, and the next state.

        A curvature with state declares `initial_state`, and returns here a copy of itself that holds what it needs of the state.

        Args:
            objective: `objective.Objective`.
            state: Dict of tensors, the state after the previous update; see `Part.initial_state`.
        """
        del objective
        return self, state

    def linearize(self, micro_batch):
        """Prepares the products of one micro-batch of data.

        Args:
            micro_batch: A `micro_batch.MicroBatch`: `variables`, `forward()`, `loss(evaluation)`, `added_loss(evaluation)`.

        Returns:
            Callable `v -> Gv` on lists of tensors shaped as `micro_batch.variables`. Of a `linearization.Linearized`, updates check the products.
            Where `micro_batch.has_hidden_states`, it is a callable `(v, strength) -> Gv + strength G_S v`; see
            `structural_damping.StructuralDamping`.
        """
        raise NotImplementedError


class _ThroughOutputs(Curvature):
    """Curvatures `J'HJ`: J is the derivative of the network's outputs with respect to the weights, H a matrix on these outputs.

    The outputs are the tensors at which the loss is cut. Losses added in `call` and activity regularizers enter with their exact Hessian.
    """

    takes_hidden_states = True

    def _through_outputs(self, micro_batch):
        """Returns `forward() -> (outputs, evaluation)` and `hessian_at(outputs, evaluation) -> (u -> Hu)` of a micro-batch's compiled loss."""
        raise NotImplementedError

    def linearize(self, micro_batch):
        forward, hessian_at = self._through_outputs(micro_batch)
        if micro_batch.has_hidden_states:
            forward, hessian_at = with_hidden_states(micro_batch, forward, hessian_at)
        linearized = self.linearization.gauss_newton(forward, hessian_at, micro_batch.variables)
        if not micro_batch.has_added_loss:
            return linearized
        return linearized.plus(
            self.linearization.hessian(lambda: micro_batch.added_loss(micro_batch.forward()), micro_batch.variables)
        )


@keras.saving.register_keras_serializable("keras_hf")
class GaussNewton(_ThroughOutputs):
    """The generalised Gauss-Newton matrix `G = J'HJ`, averaged over cases as the loss is.

    J is the derivative of the network's outputs with respect to the weights, H the second derivative of the Keras loss with respect to those outputs.
    G is the Hessian of the loss when the network is replaced by its linearization.

    Where the loss is computed from the logits (`BinaryCrossentropy` on sigmoid, `CategoricalCrossentropy` on softmax), the outputs are the logits.
    Then the loss is convex in them and G positive semi-definite: a matching loss in Schraudolph's sense. A loss that uses both logits and predictions
    (`BinaryFocalCrossentropy`) is cut at both. Losses added in `call` and activity regularizers enter with their exact Hessian, which need not be
    positive semi-definite. Cost of a product: about 1.2 gradients of the same cases.

    Args:
        linearization: See `Curvature`.

    References:
        Schraudolph (2002), *Fast curvature matrix-vector products for second-order gradient descent*; Martens (2010), section 4.2.
    """

    def _through_outputs(self, micro_batch):
        def hessian_at(outputs, evaluation):
            hessian = loss_hessian(lambda: micro_batch.loss(evaluation), outputs)
            if not micro_batch.hessian_is_diagonal:
                return hessian
            # Computed once: every product would need a dozen operations on the outputs.
            diagonal = hessian([tf.ones_like(output) for output in outputs])
            return lambda u: [d * entry for d, entry in zip(diagonal, u, strict=True)]

        return _forward(micro_batch), hessian_at


@keras.saving.register_keras_serializable("keras_hf")
class EmpiricalFisher(_ThroughOutputs):
    """The empirical Fisher matrix `F = mean of g_i g_i'` over cases, where g_i is the gradient of the loss of case i without regularizers.

    F is `J'HJ` with H the outer product of each case's loss gradient with respect to its own outputs. A product therefore costs as much as with
    Gauss-Newton: about 1.2 gradients of the same cases. F is positive semi-definite, with a rank of at most the number of cases. Where Gauss-Newton
    has the curvature of the loss, F has the square of its slope, and vanishes where cases are fitted. Gauss-Newton works better in practice; this
    class is for comparison. Under BatchNormalization, where the gradient of a single case is not defined, the batch statistics count as constants. A
    loss summed over N cases counts as the mean of N times each case's loss. Regularizers and added losses enter with their exact Hessian, as in
    `GaussNewton`.

    Args:
        linearization: See `Curvature`.

    References:
        Martens (2010), talk on *Deep learning via Hessian-free optimization*; Kunstner, Hennig & Balles (2019), *Limitations of the empirical Fisher
        approximation for natural gradient descent*.
    """

    def _through_outputs(self, micro_batch):
        apart = micro_batch.cases_apart()
        # The micro-batch's loss is the sum of its cases' shares, whose gradients are `g_i / all_cases`: the product of two has that factor once too
        # often.
        scale = micro_batch.all_cases / micro_batch.loss_scale

        def hessian_at(outputs, evaluation):
            with tf.GradientTape() as tape:
                tape.watch(outputs)
                loss = apart.loss(evaluation)
            gradients = dense(tape.gradient(loss, outputs), outputs)

            def outer_product(u):
                slopes = [_sum_over_outputs(d * entry, scale.dtype) for d, entry in zip(gradients, u, strict=True)]
                slope = scale * tf.add_n(slopes)
                return [d * _spread(tf.cast(slope, d.dtype), d.shape.rank) for d in gradients]

            return outer_product

        return _forward(apart), hessian_at


@keras.saving.register_keras_serializable("keras_hf")
class Hessian(Curvature):
    """The Hessian itself, by Pearlmutter's exact products.

    The Hessian is indefinite away from a minimum. CG stops where it meets negative curvature, and the logs report it. Gauss-Newton works better in
    practice; this class is for comparison, and for networks in which the curvature of the outputs matters. Cost of a product: about two gradients.

    Args:
        linearization: See `Curvature`.

    References:
        Pearlmutter (1994), *Fast exact multiplication by the Hessian*.
    """

    def linearize(self, micro_batch):
        return self.linearization.hessian(lambda: micro_batch.whole_loss(micro_batch.forward()), micro_batch.variables)


@keras.saving.register_keras_serializable("keras_hf")
class FiniteDifferenceHessian(Curvature):
    """The Hessian by differences of gradients: `Hv = (g(w + h v) - g(w - h v)) / 2h` with `h = eps^(1/3) / norm(v)`.

    `Hessian` costs the same and is exact. This class is for comparison, and for networks without a second derivative in TensorFlow. The weights move
    by `eps^(1/3)`, where eps is the machine epsilon of their float type. At this distance the error of truncation, of the order of h^2, balances that
    of rounding, of the order of eps / h. The distance is usually chosen proportional to the norm of the weights. Here it is not, because units
    saturate by the absolute change of their inputs. On the deep autoencoders of `examples/autoencoder.py`, in float32, the relative error of a
    product was below 4e-4 along the gradient and below 1e-2 along random vectors; with steps proportional to `1 + norm(w)` it was up to 0.7 along the
    gradient. Along a vector with almost no curvature, the result may be rounding error alone. Networks that compute in 16 bits are refused.
    Regularizers enter with their exact second derivative. Cost of a product: two gradients.

    References:
        Martens (2010), talk on *Deep learning via Hessian-free optimization*, on finite differences; Nocedal & Wright (2006), *Numerical
        Optimization*, section 8.1.
    """

    def __init__(self):
        super().__init__()

    def fitted_to(self, structure):
        coarse = sorted(structure.float_types & {"bfloat16", "float16"})
        if coarse:
            raise ValueError(
                "`FiniteDifferenceHessian` needs gradients in float32 or float64: the difference of coarser ones is rounding. "
                f"Received: a network that computes in {coarse[0]}. Use `Hessian()`."
            )
        return self

    def linearize(self, micro_batch):
        weights = [tf.convert_to_tensor(variable) for variable in micro_batch.variables]
        roundoff = max(epsilon(weight.dtype) for weight in weights)
        distance = tf.constant(roundoff ** (1 / 3), tf.float64)  # How far the weights move, whatever the length of v.

        def product(v):
            length = tf.sqrt(inner_product(v, v))
            step = tf.math.divide_no_nan(distance, length)

            def gradient_at(step):
                return micro_batch.gradient_at(
                    [w + tf.cast(step, w.dtype) * d for w, d in zip(weights, v, strict=True)]
                )

            slope = length / (2 * distance)
            differences = zip(gradient_at(step), gradient_at(-step), strict=True)
            return [tf.cast(slope, after.dtype) * (after - before) for after, before in differences]

        return product


def _forward(micro_batch):
    """Returns `() -> (outputs, evaluation)`, one forward pass on a micro-batch."""

    def forward():
        evaluation = micro_batch.forward(for_products=True)
        return evaluation.outputs, evaluation

    return forward


def _sum_over_outputs(tensor, dtype):
    """Sums a tensor of cases over all its other axes: `(cases,)`."""
    return tf.cast(tf.reduce_sum(tensor, list(range(1, tensor.shape.rank))), dtype)


def _spread(vector, rank):
    """Reshapes `(cases,)` to multiply a tensor of cases of that rank."""
    return tf.reshape(vector, [-1, *[1] * (rank - 1)])


def loss_hessian(loss, outputs):
    """Returns `u -> Hu`, where H is the second derivative of `loss()` with respect to the list `outputs`."""
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(outputs)
        with tf.GradientTape() as inner:
            inner.watch(outputs)
            value = loss()
        gradients = inner.gradient(value, outputs)
    # `None` where the loss is linear in that output.
    curved = [(gradient, i) for i, gradient in enumerate(gradients) if gradient is not None]
    first = [gradient for gradient, _ in curved]

    def product(u):
        if not first:
            return [tf.zeros_like(output) for output in outputs]
        return dense(outer.gradient(first, outputs, output_gradients=[u[i] for _, i in curved]), outputs)

    return product
