"""Directional derivatives of a network on one piece of data: `Jv`, `J'u` and what is made of them.

Two ways, both exact. Forward accumulation re-runs the forward pass in every product; double backward runs it once and keeps it. Pearlmutter
(1994) for Hessian products, Schraudolph (2002) for Gauss-Newton ones; forward mode from two backward ones: `Jv` is the derivative of `<J'u, v>` in u.
"""

import keras
import tensorflow as tf

from keras_hf.part import Part

# A tf.Variable captured by a nested function, loop or branch has no tangent in `tf.autodiff.ForwardAccumulator`'s graph mode, and nothing says so.
_UNSAFE_OPS = (
    "PartitionedCall",
    "StatefulPartitionedCall",
    "While",
    "StatelessWhile",
    "If",
    "StatelessIf",
    "Case",
    "StatelessCase",
)


class Linearization(Part):
    """A way to differentiate twice. Immutable settings."""

    def gauss_newton(self, forward, hessian_at, variables):
        """Gives `v -> J'H(Jv)`.

        Args:
            forward: Callable `() -> (outputs, rest)`: one forward pass; `outputs` is the list of tensors that J is the derivative of.
            hessian_at: Callable `(outputs, rest) -> (u -> Hu)`, on lists shaped as `outputs`.
            variables: List of `tf.Variable`.

        Returns:
            Callable from a list of tensors shaped as `variables` to such a list.
        """
        raise NotImplementedError

    def hessian(self, loss, variables):
        """Gives `v -> (second derivative of the scalar loss()) v`, on lists shaped as `variables`."""
        raise NotImplementedError

    def check(self, op_types):
        """Raises if the way is wrong for a forward pass made of these types of operation."""


@keras.saving.register_keras_serializable("keras_hf")
class DoubleBackward(Linearization):
    """Reverse over reverse: right for everything that has a second derivative.

    The tapes are built once, at the call, and every product is two backward passes through what they keep: about 1.2 gradients, and about twice the
    activations of one gradient held as long as the products are wanted.
    """

    def gauss_newton(self, forward, hessian_at, variables):
        with tf.GradientTape(persistent=True) as transposing:
            with tf.GradientTape(persistent=True) as tape:
                outputs, rest = forward()
            cotangents = [tf.zeros_like(output) for output in outputs]
            transposing.watch(cotangents)
            pulled_back = dense(tape.gradient(outputs, variables, output_gradients=cotangents), variables)
        hessian = hessian_at(outputs, rest)

        def product(v):
            tangents = transposing.gradient(pulled_back, cotangents, output_gradients=v)
            curved = hessian(dense(tangents, outputs))
            return dense(tape.gradient(outputs, variables, output_gradients=curved), variables)

        return product

    def hessian(self, loss, variables):
        with tf.GradientTape(persistent=True) as outer:
            with tf.GradientTape() as inner:
                value = loss()
            gradients = dense(inner.gradient(value, variables), variables)

        def product(v):
            return dense(outer.gradient(gradients, variables, output_gradients=v), variables)

        return product


@keras.saving.register_keras_serializable("keras_hf")
class ForwardAccumulation(Linearization):
    """`tf.autodiff.ForwardAccumulator` for `Jv`, a `tf.GradientTape` for `J'u`, in one forward pass per product.

    Memory stays near that of one gradient. Wrong, in silence, where a variable is read inside a nested function, loop or branch (recurrent layers
    without `unroll`, grouped convolutions, `tf.cond`): such a network is refused.
    """

    def gauss_newton(self, forward, hessian_at, variables):
        def product(v):
            with tf.GradientTape() as tape, tf.autodiff.ForwardAccumulator(variables, v) as accumulator:
                outputs, rest = forward()
            tangents = dense([accumulator.jvp(output) for output in outputs], outputs)
            curved = hessian_at(outputs, rest)(tangents)
            return dense(tape.gradient(outputs, variables, output_gradients=curved), variables)

        return product

    def hessian(self, loss, variables):
        def product(v):
            with tf.autodiff.ForwardAccumulator(variables, v) as accumulator:
                with tf.GradientTape() as tape:
                    value = loss()
                gradients = dense(tape.gradient(value, variables), variables)
            return dense([accumulator.jvp(gradient) for gradient in gradients], variables)

        return product

    def check(self, op_types):
        unsafe = sorted(set(op_types) & set(_UNSAFE_OPS))
        if unsafe:
            raise ValueError(
                "`ForwardAccumulation` gives wrong products for a network that reads weights inside nested functions, loops or branches. "
                f"Received: a network with the operations {unsafe}. Leave the curvature's `linearization` at its default, `DoubleBackward()`."
            )


def dense(gradients, sources):
    """Gradients as tensors of their sources' shapes: zeros for None, sparse ones made dense, lost static shapes restored."""

    def of(gradient, source):
        if gradient is None:
            return tf.zeros_like(source)
        gradient = tf.convert_to_tensor(gradient)
        # Only where needed: `tf.autodiff.ForwardAccumulator` cannot differentiate `tf.ensure_shape`.
        same = gradient.shape.as_list() == source.shape.as_list() if gradient.shape.rank is not None else False
        return gradient if same else tf.ensure_shape(gradient, source.shape)

    return [of(gradient, source) for gradient, source in zip(gradients, sources, strict=True)]
