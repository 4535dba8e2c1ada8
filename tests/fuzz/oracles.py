"""Dense matrices of small Keras networks, by plain tapes and NumPy. Imports nothing of the package that they judge."""

import contextlib

import keras
import numpy as np
import tensorflow as tf


def close(what, found, expected, rtol=1e-8, scale=0.0):
    """Raises an error unless two arrays agree, relative to the largest number of what is expected, or to `scale` if that is larger."""
    found, expected = np.asarray(found, "float64"), np.asarray(expected, "float64")
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    if expected.size == 0:
        return
    size = max(np.abs(expected).max(), scale, 1e-30)
    error = np.abs(found - expected).max() / size
    assert error <= rtol, f"{what}: off by {error:.1e} of {size:.3g}"


def flat(tensors):
    """One float64 vector of a list of tensors."""
    return np.concatenate([np.asarray(tensor, "float64").ravel() for tensor in tensors])


@contextlib.contextmanager
def kept(network):
    """Puts the states of a network back: statistics, seeds, hidden states."""
    before = [(v, v.numpy()) for v in network.variables]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


@contextlib.contextmanager
def arguments_of(layers):
    """Records what layers are called on, a list with one tensor for each, while it is open."""
    seen = [None] * len(layers)

    def recording(place, call):
        def recorded(z, *args, **kwargs):
            seen[place] = z
            return call(z, *args, **kwargs)

        return recorded

    for place, layer in enumerate(layers):
        layer.call = recording(place, layer.call)
    try:
        yield seen
    finally:
        for layer in layers:
            del layer.call


def gradients(tape, target, sources, seed=None):
    """The gradient of a tensor in a list of variables as one vector; zero where it does not depend on them."""
    found = tape.gradient(target, sources, output_gradients=seed, unconnected_gradients="zero")
    return flat([tf.convert_to_tensor(gradient) for gradient in found])


def jacobian_of(tape, target, sources):
    """The Jacobian of a flat tensor, row by row, without TensorFlow's vectorised loops."""
    rows = np.eye(int(tf.size(target)))
    return np.stack([gradients(tape, target, sources, tf.constant(row, target.dtype)) for row in rows])


def of_classes(class_weight, y, sample_weight):
    """The weights of cases: those of their classes, where these have weights."""
    if class_weight is None:
        return sample_weight
    classes = np.argmax(y, -1) if y.ndim == 2 and y.shape[1] > 1 else np.reshape(y, -1)
    return np.array([class_weight.get(int(number), 1.0) for number in classes])


def loss_of(network, x, y, sample_weight=None):
    """The loss of a compiled network in training mode, as Keras computes it."""
    with kept(network):
        return float(network.compute_loss(x, y, network(x, training=True), sample_weight, training=True))


class Dense:
    """The loss of a compiled network, its gradient, Jacobian and Gauss-Newton matrix.

    Args:
        network: Compiled Keras model.
        tops: List of its last layers, one an output.
        cuts: List of strings: whether the loss is cut at the "argument" or the "value" of these layers.
        x: Inputs.
        y: Targets.
        sample_weight: As in `fit`.
        decay: Float, the coefficient of half the sum of squared weights.

    Attributes:
        loss, gradient `(n,)`, jacobian `(rows, n)` of what the loss is cut at, loss_hessian `(rows, rows)`, curvature `(n, n)`.
    """

    def __init__(self, network, tops, cuts, x, y, sample_weight=None, decay=0.0):
        self._network, self._tops, self._cuts = network, tops, cuts
        self._x, self._y, self._sample_weight, self._decay = x, y, sample_weight, decay
        weights = [variable.value for variable in network.trainable_variables]
        with kept(network):
            with tf.GradientTape(persistent=True) as tape:
                outputs, cut = self._forward()
                loss = network.compute_loss(x, y, outputs, sample_weight, training=True)
                at_once = tf.concat([tf.reshape(tensor, [-1]) for tensor in cut], 0)
            w = flat(weights)
            self.loss = float(loss) + decay * w @ w / 2
            self.gradient = gradients(tape, loss, weights) + decay * w
            self.jacobian = jacobian_of(tape, at_once, weights)
            self.loss_hessian = self._loss_hessian(outputs, cut)
            self.curvature = self.jacobian.T @ self.loss_hessian @ self.jacobian + decay * np.eye(w.size)
            if network.losses:
                self.curvature += self._added_hessian(weights)

    def _forward(self):
        with arguments_of(self._tops) as seen:
            outputs = self._network(self._x, training=True)
        leaves = keras.tree.flatten(outputs)
        assert len(leaves) == len(seen)
        return outputs, [z if cut == "argument" else p for z, p, cut in zip(seen, leaves, self._cuts, strict=True)]

    def _loss_hessian(self, outputs, cut):
        """The second derivative of the compiled loss in what it is cut at."""
        masks = [getattr(leaf, "_keras_mask", None) for leaf in keras.tree.flatten(outputs)]
        cut = [tf.identity(tensor) for tensor in cut]
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(cut)
            with tf.GradientTape() as inner:
                inner.watch(cut)
                leaves = []
                for tensor, top, place, mask in zip(cut, self._tops, self._cuts, masks, strict=True):
                    leaf = top(tensor) if place == "argument" else tf.identity(tensor)
                    if mask is not None:
                        leaf._keras_mask = mask
                    leaves.append(leaf)
                again = keras.tree.pack_sequence_as(outputs, leaves)
                loss = self._network._compile_loss(self._y, again, self._sample_weight)
            found = inner.gradient(loss, cut, unconnected_gradients="zero")
            first = tf.concat([tf.reshape(tensor, [-1]) for tensor in found], 0)
        return jacobian_of(outer, first, cut)

    def _added_hessian(self, weights):
        """The second derivative of regularizers and added losses in the weights."""
        with tf.GradientTape(persistent=True) as outer:
            with tf.GradientTape() as inner:
                self._network(self._x, training=True)
                added = tf.add_n([tf.convert_to_tensor(value) for value in self._network.losses])
            found = inner.gradient(added, weights, unconnected_gradients="zero")
            found = tf.concat([tf.reshape(tf.convert_to_tensor(tensor), [-1]) for tensor in found], 0)
        return jacobian_of(outer, found, weights)

    def hessian(self):
        """The second derivative of the loss in the weights."""
        weights = [variable.value for variable in self._network.trainable_variables]
        with kept(self._network), tf.GradientTape(persistent=True) as outer:
            with tf.GradientTape() as inner:
                outputs = self._network(self._x, training=True)
                loss = self._network.compute_loss(self._x, self._y, outputs, self._sample_weight, training=True)
            found = inner.gradient(loss, weights, unconnected_gradients="zero")
            found = tf.concat([tf.reshape(tf.convert_to_tensor(tensor), [-1]) for tensor in found], 0)
        return jacobian_of(outer, found, weights) + self._decay * np.eye(self.gradient.size)

    def step(self, damping):
        """The exact damped step `-(G + damping I)^-1 g`."""
        return -np.linalg.solve(self.curvature + damping * np.eye(self.gradient.size), self.gradient)
