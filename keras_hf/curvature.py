"""Curvatures: the matrix whose products CG asks for. A curvature knows one piece of data, no damping and no CG."""

import copy

import keras
import tensorflow as tf

from keras_hf.checks import part
from keras_hf.linearization import Linearization, choose_linearization, dense, inner_product
from keras_hf.part import Part


class Curvature(Part):
    """What a curvature promises.

    Args:
        linearization: A `Linearization`, the way second derivatives are formed: `DoubleBackward()` (right for every network that has second
            derivatives) or `ForwardAccumulation()` (less memory, refused where it would be wrong). `None` chooses for the network what is right, and
            of that what is fastest; the choice is logged at INFO.

    Raises:
        TypeError: If `linearization` is no such object.
    """

    def __init__(self, linearization=None):
        if linearization is not None:
            part("linearization", linearization, Linearization, "DoubleBackward()")
        self.linearization = linearization

    def fitted_to(self, structure, num_replicas=1):
        """Returns this curvature with a linearization that is right for a network, or raises.

        Args:
            structure: `structure.Structure`, what the traced network told.
            num_replicas: Integer.

        Raises:
            ValueError: If the linearization asked for would be wrong.
        """
        linearization = self.linearization or choose_linearization(structure, num_replicas)
        return self.by(linearization.fitted_to(structure))

    def by(self, linearization):
        """Returns this curvature by another linearization."""
        other = copy.copy(self)
        other.linearization = linearization
        return other

    def linearize(self, piece):
        """Prepares the products of one piece of data.

        Args:
            piece: An `objective.PieceFunction`: `variables`, `forward()`, `loss(evaluation)`, `added_loss(evaluation)`.

        Returns:
            Callable `v -> Gv` on lists of tensors shaped as `piece.variables`.
        """
        raise NotImplementedError

    def quadratic(self, piece):
        """Prepares `v -> v'Gv` by another road than `linearize`, to hold its products against; `None` where there is none.

        Args:
            piece: As in `linearize`.

        Returns:
            Callable from a list of tensors to a float64 scalar, or `None`.
        """
        del piece

    def tangents(self, piece):
        """Gives `v -> Jv` on a piece's outputs, which products are made of, or `None` for a curvature made otherwise.

        Args:
            piece: As in `linearize`.

        Returns:
            Callable from a list of tensors to a list of tensors, or `None`.
        """
        del piece

    def get_config(self):
        """Returns the constructor's arguments as a dict."""
        return {"linearization": self.linearization and keras.saving.serialize_keras_object(self.linearization)}

    @classmethod
    def from_config(cls, config):
        """Makes the curvature from what `get_config` returned."""
        linearization = config.get("linearization")
        return cls(
            **{**config, "linearization": linearization and keras.saving.deserialize_keras_object(linearization)}
        )


@keras.saving.register_keras_serializable("keras_hf")
class GaussNewton(Curvature):
    """The generalised Gauss-Newton matrix `G = J'HJ`, averaged over cases as the loss is.

    J is the derivative of the network's outputs in the weights, H the second derivative of the Keras loss in those outputs. Where the loss goes
    through the logits (`BinaryCrossentropy` on sigmoid, `CategoricalCrossentropy` on softmax), outputs are the logits: then the loss is convex in
    them and G positive semi-definite, a matching loss in Schraudolph's sense. A loss that goes through both (`BinaryFocalCrossentropy`) is cut at
    both. G is the Hessian of the loss when the network is replaced by its
    linearization. Losses added in `call` and activity regularizers enter with their exact Hessian, which need not be positive semi-definite.
    Cost of a product: about 1.2 gradients of the same cases.

    Args:
        linearization: See `Curvature`.

    References:
        Schraudolph (2002), *Fast curvature matrix-vector products for second-order gradient descent*; Martens (2010), section 4.2.
    """

    def linearize(self, piece):
        product = self.linearization.gauss_newton(*_through_outputs(piece), piece.variables)
        if not piece.has_added_loss:
            return product
        added = self._added(piece)
        return lambda v: [a + b for a, b in zip(product(v), added(v), strict=True)]

    def quadratic(self, piece):
        quadratic = self.linearization.gauss_newton_quadratic(*_through_outputs(piece), piece.variables)
        if not piece.has_added_loss:
            return quadratic
        added = self._added(piece)
        return lambda v: quadratic(v) + inner_product(v, added(v))

    def tangents(self, piece):
        return self.linearization.tangents(_through_outputs(piece)[0], piece.variables)

    def _added(self, piece):
        return self.linearization.hessian(lambda: piece.added_loss(piece.forward()), piece.variables)


@keras.saving.register_keras_serializable("keras_hf")
class Hessian(Curvature):
    """The Hessian itself, by Pearlmutter's exact products.

    Indefinite away from a minimum: CG stops where it meets negative curvature and the logs say so. Gauss-Newton works better in practice; this is
    for comparison and for networks whose outputs' curvature matters. Cost of a product: about two gradients.

    Args:
        linearization: See `Curvature`.

    References:
        Pearlmutter (1994), *Fast exact multiplication by the Hessian*.
    """

    def linearize(self, piece):
        def loss():
            evaluation = piece.forward()
            value = piece.loss(evaluation)
            return value + piece.added_loss(evaluation) if piece.has_added_loss else value

        return self.linearization.hessian(loss, piece.variables)


def _through_outputs(piece):
    """Gives `forward() -> (outputs, evaluation)` and `hessian_at(outputs, evaluation) -> (u -> Hu)` of a piece's compiled loss."""

    def forward():
        evaluation = piece.forward()
        return evaluation.outputs, evaluation

    def hessian_at(outputs, evaluation):
        hessian = loss_hessian(lambda: piece.loss(evaluation), outputs)
        if not piece.hessian_is_diagonal:
            return hessian
        # Once, instead of a dozen operations on the outputs in every product.
        diagonal = hessian([tf.ones_like(output) for output in outputs])
        return lambda u: [d * entry for d, entry in zip(diagonal, u, strict=True)]

    return forward, hessian_at


def loss_hessian(loss, outputs):
    """Gives `u -> Hu`, H the second derivative of `loss()` in the list `outputs`."""
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(outputs)
        with tf.GradientTape() as inner:
            inner.watch(outputs)
            value = loss()
        gradients = inner.gradient(value, outputs)
    # None: the loss is linear in that output.
    curved = [(gradient, i) for i, gradient in enumerate(gradients) if gradient is not None]
    first = [gradient for gradient, _ in curved]

    def product(u):
        if not first:
            return [tf.zeros_like(output) for output in outputs]
        return dense(outer.gradient(first, outputs, output_gradients=[u[i] for _, i in curved]), outputs)

    return product
