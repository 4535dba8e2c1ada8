"""Directional derivatives of a network on one piece of data: `Jv`, `J'u` and what is made of them.

Two ways, both exact. Forward accumulation re-runs the forward pass in every product; double backward runs it once and keeps it. Pearlmutter
(1994) for Hessian products, Schraudolph (2002) for Gauss-Newton ones; forward mode from two backward ones: `Jv` is the derivative of `<J'u, v>` in u.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_hf.common.checks import flag
from keras_hf.common.part import Part
from keras_hf.common.replaced import replaced

# Where XLA's fusing of elementwise operations outweighs its slower matrix products on CPUs, and a case is work enough to pay for seconds of
# compiling: `benchmarks/linearization_choice.py`.
_JIT_MAX_INTENSITY, _JIT_MIN_BYTES_PER_CASE = 40.0, 2**16


class Linearized(NamedTuple):
    """A curvature on one piece of data, at the weights. Called, it is the product.

    Attributes:
        product: Callable `v -> Gv`, on lists of tensors shaped as the weights.
        factors: Callable `() -> (v -> Jv, u -> Hu, u -> J'u)`, what a matrix `J'HJ` is made of, without XLA: products are held against these. They
            share what the product keeps, if it keeps anything. `None` for a matrix made otherwise.
        added: Callable `v -> Av`, what the product holds beside `J'HJ`, or `None`.
    """

    product: Callable
    factors: Callable | None = None
    added: Callable | None = None

    def __call__(self, v):
        return self.product(v)

    def plus(self, added):
        """Returns the sum with another matrix, `v -> Av`."""
        product = self.product
        return self._replace(product=lambda v: [a + b for a, b in zip(product(v), added(v), strict=True)], added=added)


class Linearization(Part):
    """A way to differentiate twice. Immutable settings.

    Args:
        jit_compile: Whether XLA compiles the products. Faster where a network is made of many small elementwise operations; each size of a piece is
            compiled anew, for seconds.

    Raises:
        ValueError: If `jit_compile` is no bool.
    """

    def __init__(self, jit_compile=False):
        self.jit_compile = flag("jit_compile", jit_compile)

    def gauss_newton(self, forward, hessian_at, variables):
        """Gives `v -> J'H(Jv)`.

        Args:
            forward: Callable `() -> (outputs, rest)`: one forward pass; `outputs` is the list of tensors that J is the derivative of.
            hessian_at: Callable `(outputs, rest) -> (u -> Hu)`, on lists shaped as `outputs`.
            variables: List of `tf.Variable`.

        Returns:
            A `Linearized`.
        """
        raise NotImplementedError

    def hessian(self, loss, variables):
        """Gives `v -> (second derivative of the scalar loss()) v`, on lists shaped as `variables`."""
        raise NotImplementedError

    def fitted_to(self, structure):
        """Returns this way as it is right for a network, or raises.

        Args:
            structure: `structure.Structure`, what the traced network told.

        Raises:
            ValueError: If it would be wrong for the network.
        """
        if self.jit_compile and structure.is_random and self._recomputes(structure):
            raise ValueError(
                f"`{type(self).__name__}(jit_compile=True)` re-runs the forward pass of this network under XLA, which draws other random numbers. "
                "Received: a network with random layers, such as `Dropout`. Use `jit_compile=False`."
            )
        return self

    def _recomputes(self, structure):
        """Whether products re-run the forward pass."""
        raise NotImplementedError

    def get_config(self):
        return {"jit_compile": self.jit_compile}


@keras.saving.register_keras_serializable("keras_hf")
class DoubleBackward(Linearization):
    """Reverse over reverse: right for everything that has a right second derivative in TensorFlow.

    The tapes are built once, at the call, and every product is two backward passes through what they keep: about 1.2 gradients, and about twice the
    activations of one gradient held as long as the products are wanted.

    Args:
        jit_compile: See `Linearization`.
    """

    # XLA takes no TensorLists from outside, in which loops keep their activations: there the forward pass is part of what is compiled.
    _keeps_under_jit = True

    def fitted_to(self, structure):
        fitted = copy.copy(super().fitted_to(structure))
        fitted._keeps_under_jit = not structure.nesting_ops
        return fitted

    def _recomputes(self, structure):
        return bool(structure.nesting_ops)

    def gauss_newton(self, forward, hessian_at, variables):
        def linearize():
            outputs, rest, tangents, pull_back = _transposed_twice(forward, variables)
            hessian = hessian_at(outputs, rest)
            return Linearized(lambda v: pull_back(hessian(tangents(v))), lambda: (tangents, hessian, pull_back))

        if self.jit_compile and not self._keeps_under_jit:
            return Linearized(_jit(lambda v: linearize()(v)), lambda: linearize().factors())
        linearized = linearize()
        return linearized._replace(product=_jit(linearized.product)) if self.jit_compile else linearized

    def hessian(self, loss, variables):
        def linearize():
            with tf.GradientTape(persistent=True) as outer:
                with tf.GradientTape() as inner:
                    value = loss()
                gradients = dense(inner.gradient(value, variables), variables)

            def product(v):
                return dense(outer.gradient(gradients, variables, output_gradients=v), variables)

            return product

        if not self.jit_compile:
            return linearize()
        return _jit(linearize() if self._keeps_under_jit else lambda v: linearize()(v))


@keras.saving.register_keras_serializable("keras_hf")
class ForwardAccumulation(Linearization):
    """`tf.autodiff.ForwardAccumulator` for `Jv`, a `tf.GradientTape` for `J'u`, in one forward pass per product.

    Memory stays near that of one gradient. Wrong, in silence, where a variable is read inside a nested function, loop or branch (recurrent layers
    without `unroll`, grouped convolutions, `tf.cond`): such a network is refused, and an update whose products break the identity
    `v'Gv = (Jv)'H(Jv)` is rejected.

    Args:
        jit_compile: See `Linearization`.
    """

    def gauss_newton(self, forward, hessian_at, variables):
        def product(v):
            with tf.GradientTape() as tape:
                outputs, rest, tangents = self._tangents(forward, variables, v)
            curved = hessian_at(outputs, rest)(tangents)
            return dense(tape.gradient(outputs, variables, output_gradients=curved), variables)

        def factors():
            with tf.GradientTape(persistent=True) as tape:
                outputs, rest = forward()

            def pull_back(u):
                return dense(tape.gradient(outputs, variables, output_gradients=u), variables)

            return lambda v: self._tangents(forward, variables, v)[-1], hessian_at(outputs, rest), pull_back

        return Linearized(_jit(product) if self.jit_compile else product, factors)

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

        return _jit(product) if self.jit_compile else product

    def fitted_to(self, structure):
        if structure.nesting_ops:
            raise ValueError(
                "`ForwardAccumulation` gives wrong products for a network that reads weights inside nested functions, loops or branches. "
                f"Received: a network with the operations {structure.nesting_ops}. Leave the curvature's `linearization` at its default, or use "
                "`DoubleBackward()`."
            )
        return super().fitted_to(structure)

    def _recomputes(self, structure):
        return True


def _transposed_twice(forward, variables):
    """Runs the forward pass once; gives outputs, the rest, `v -> Jv`, the derivative of `<J'u, v>` in u, and `u -> J'u`."""
    with tf.GradientTape(persistent=True) as tape:
        outputs, rest = forward()

    def pull_back(u):
        return dense(tape.gradient(outputs, variables, output_gradients=u), variables)

    cotangents = [tf.zeros_like(output) for output in outputs]
    # The forward pass has no part in a derivative in u: recorded here, too, its loops would take seconds more to trace.
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as transposing:
        transposing.watch(cotangents)
        pulled_back = pull_back(cotangents)

    def tangents(v):
        return dense(transposing.gradient(pulled_back, cotangents, output_gradients=v), outputs)

    return outputs, rest, tangents, pull_back


def choose_linearization(structure, num_replicas):
    """Returns the fastest right way for a network, by measured rule.

    Double backward with kept tapes is right wherever there is a second derivative, and nowhere measured slower than forward accumulation. XLA pays on
    CPUs where elementwise operations outweigh matrix products, and nothing in the network is known to be slow or missing there.

    Args:
        structure: `structure.Structure`.
        num_replicas: Integer; XLA's functions read the variables of one device only.
    """
    pays = structure.arithmetic_intensity < _JIT_MAX_INTENSITY and structure.bytes_per_case >= _JIT_MIN_BYTES_PER_CASE
    # Not measured on GPUs, so not chosen there.
    pays &= structure.is_fusible and not tf.config.list_logical_devices("GPU")
    return DoubleBackward(jit_compile=pays and num_replicas == 1)


@contextlib.contextmanager
def without_fused_kernels(layers):
    """Makes recurrent layers run without cuDNN's fused kernels, which have no second derivative, while it is open."""
    with replaced(*[(layer, "use_cudnn", False) for layer in layers if hasattr(layer, "use_cudnn")]):
        yield


def _jit(product):
    return tf.function(product, autograph=False, jit_compile=True)


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
