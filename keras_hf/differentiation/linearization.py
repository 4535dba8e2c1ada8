"""Directional derivatives of a network on one micro-batch of data: `Jv`, `J'u` and the curvature-vector products formed from them.

There are two ways, both exact. Forward accumulation re-runs the forward pass in every product; double backward runs it once and keeps it. Hessian
products follow Pearlmutter (1994), Gauss-Newton products Schraudolph (2002). Two backward passes replace forward mode: `Jv` is the derivative of
`<J'u, v>` in u.
"""

from collections.abc import Callable
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_hf.common.part import Part
from keras_hf.common.vectors import dense


class Linearized(NamedTuple):
    """The linearized curvature on one micro-batch of data, at the current weights. Calling it computes the product.

    Attributes:
        product: Callable `v -> Gv`, on lists of tensors shaped as the weights. Further arguments go to H; see `Linearization.gauss_newton`.
        factors: Callable `() -> (v -> Jv, u -> Hu, u -> J'u)`, the factors of a matrix `J'HJ`, against which products are checked. They use the
            tapes that the product keeps, if any. `None` for a matrix of another form.
        added: Callable `v -> Av`, the part of the product besides `J'HJ`, or `None`.
        is_of_factors: Whether the product is made of the factors, so that it is right if they are.
    """

    product: Callable
    factors: Callable | None = None
    added: Callable | None = None
    is_of_factors: bool = False

    def __call__(self, v, *more):
        return self.product(v, *more)

    def plus(self, added):
        """Returns the sum with another matrix, `v -> Av`."""
        product = self.product

        def summed(v, *more):
            return [a + b for a, b in zip(product(v, *more), added(v), strict=True)]

        return self._replace(product=summed, added=added)


class Linearization(Part):
    """A way to differentiate twice. Immutable settings."""

    @classmethod
    def from_config(cls, config):
        """Creates the linearization from the result of `get_config`, or from a file of version 0.2, which says whether XLA compiled products."""
        return super().from_config({name: value for name, value in config.items() if name != "jit_compile"})

    def gauss_newton(self, forward, hessian_at, variables):
        """Returns `v -> J'H(Jv)`.

        Args:
            forward: Callable `() -> (outputs, rest)`: one forward pass; `outputs` is the list of tensors whose derivative is J.
            hessian_at: Callable `(outputs, rest) -> (u -> Hu)`, on lists shaped as `outputs`. H may depend on scalars, further arguments of the
                product.
            variables: List of `tf.Variable`.

        Returns:
            A `Linearized`.
        """
        raise NotImplementedError

    def hessian(self, loss, variables):
        """Returns `v -> (second derivative of the scalar loss()) v`, on lists shaped as `variables`."""
        raise NotImplementedError

    def fitted_to(self, structure):
        """Returns this linearization adapted to a network.

        Args:
            structure: `structure.Structure` of the traced network.

        Raises:
            ValueError: If its products would be wrong for the network.
        """
        del structure
        return self


@keras.saving.register_keras_serializable("keras_hf")
class DoubleBackward(Linearization):
    """Reverse over reverse mode: right for everything whose second derivative is right in TensorFlow.

    The tapes are built once, when the network is linearized, and every product is two backward passes through them. Cost: about 1.2 gradients per
    product, and memory of about twice the activations of one gradient while the products are in use.
    """

    def gauss_newton(self, forward, hessian_at, variables):
        outputs, rest, tangents, pull_back = _transposed_twice(forward, variables)
        hessian = hessian_at(outputs, rest)
        return Linearized(
            lambda v, *more: pull_back(hessian(tangents(v), *more)),
            lambda: (tangents, hessian, pull_back),
            is_of_factors=True,
        )

    def hessian(self, loss, variables):
        with tf.GradientTape(persistent=True) as outer:
            with tf.GradientTape() as inner:
                value = loss()
            gradients = dense(inner.gradient(value, variables), variables)
        return lambda v: dense(outer.gradient(gradients, variables, output_gradients=v), variables)


@keras.saving.register_keras_serializable("keras_hf")
class ForwardAccumulation(Linearization):
    """`tf.autodiff.ForwardAccumulator` for `Jv`, a `tf.GradientTape` for `J'u`, in one forward pass per product.

    Memory stays close to that of one gradient. TensorFlow's accumulator silently gives wrong results if a variable is read inside a nested function,
    loop or branch (recurrent layers without `unroll`, grouped convolutions, `tf.cond`). Such a network is refused, and an update whose products
    violate `u'(Jv) = (J'u)'v` is rejected.
    """

    def gauss_newton(self, forward, hessian_at, variables):
        def product(v, *more):
            with tf.GradientTape() as tape:
                outputs, rest, tangents = self._tangents(forward, variables, v)
            curved = hessian_at(outputs, rest)(tangents, *more)
            return dense(tape.gradient(outputs, variables, output_gradients=curved), variables)

        def factors():
            outputs, rest = forward()

            def pull_back(u):
                # A forward pass of its own: a tape outside would keep the activations.
                with tf.GradientTape() as tape:
                    again, _ = forward()
                return dense(tape.gradient(again, variables, output_gradients=u), variables)

            return lambda v: self._tangents(forward, variables, v)[-1], hessian_at(outputs, rest), pull_back

        return Linearized(product, factors)

    def _tangents(self, forward, variables, v):
        with tf.autodiff.ForwardAccumulator(variables, v) as accumulator:
            outputs, rest = forward()
        return outputs, rest, dense([accumulator.jvp(output) for output in outputs], outputs)

    def hessian(self, loss, variables):
        def product(v):
            with tf.autodiff.ForwardAccumulator(variables, v) as accumulator:
                with tf.GradientTape() as tape:
                    value = loss()
                gradients = dense(tape.gradient(value, variables), variables)
            return dense([accumulator.jvp(gradient) for gradient in gradients], variables)

        return product

    def fitted_to(self, structure):
        if structure.nesting_ops:
            raise ValueError(
                "`ForwardAccumulation` gives wrong products for a network that reads weights inside nested functions, loops or branches. "
                f"Received: a network with the operations {structure.nesting_ops}. Leave the curvature's `linearization` at its default, or use "
                "`DoubleBackward()`."
            )
        return self


def _transposed_twice(forward, variables):
    """Runs the forward pass once; returns outputs, the rest, `v -> Jv` (as the derivative of `<J'u, v>` in u) and `u -> J'u`."""
    with tf.GradientTape(persistent=True) as tape:
        outputs, rest = forward()

    def pull_back(u):
        return dense(tape.gradient(outputs, variables, output_gradients=u), variables)

    cotangents = [tf.zeros_like(output) for output in outputs]
    # Only u is watched: the derivative in u does not involve the forward pass, and recording its loops here would add seconds of tracing.
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as transposing:
        transposing.watch(cotangents)
        pulled_back = pull_back(cotangents)

    def tangents(v):
        return dense(transposing.gradient(pulled_back, cotangents, output_gradients=v), outputs)

    return outputs, rest, tangents, pull_back
