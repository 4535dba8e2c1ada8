"""Pretraining of deep autoencoders, layer by layer, by restricted Boltzmann machines: Hinton & Salakhutdinov (2006).

Each layer of the encoder, with its mirror in the decoder, is one machine, whose visible units are what the layers below
make of the data. Contrastive divergence trains the machines one after the other; then they are unrolled: the encoder gets
a machine's weights and the biases of its hidden units, the decoder the same weights, transposed, and the biases of its
visible units. Constants are those of the paper's supplement and of the authors' released code.
"""

import numpy as np
import tensorflow as tf

BATCH_SIZE = 100
LEARNING_RATE, LINEAR_LEARNING_RATE = 0.1, 0.001  # The second where units on either side are linear.
WEIGHT_DECAY = 2e-4  # Of the weights, not of the biases.
MOMENTA, SLOW_EPOCHS = (0.5, 0.9), 5  # The first one for so many epochs.
INITIAL_STDDEV = 0.1


class BoltzmannMachine:
    """A restricted Boltzmann machine, whose visible units are joined to hidden ones by `W`.

    The energy of binary units v and h is `-v'Wh - b'v - c'h`, so that each is 1 with the probability `sigmoid` of what
    comes in. Linear units are normal around what comes in, with variance 1: half the square of each is added.

    Args:
        num_visible: Integer.
        num_hidden: Integer.
        linear_visible: Boolean.
        linear_hidden: Boolean.
        seed: Integer or list of integers, of weights, order of cases and noise.

    Attributes:
        weights: `tf.Variable` W `(num_visible, num_hidden)`.
        visible_bias: `tf.Variable` b `(num_visible,)`.
        hidden_bias: `tf.Variable` c `(num_hidden,)`.
    """

    def __init__(self, num_visible, num_hidden, linear_visible=False, linear_hidden=False, seed=0):
        self.linear_visible, self.linear_hidden = linear_visible, linear_hidden
        self._rng = np.random.default_rng(seed)
        weights = INITIAL_STDDEV * self._rng.normal(size=(num_visible, num_hidden))
        self.weights = tf.Variable(weights, dtype=tf.float32)
        self.visible_bias = tf.Variable(tf.zeros([num_visible]))
        self.hidden_bias = tf.Variable(tf.zeros([num_hidden]))

    def hidden_means(self, visible):
        """Returns the means of the hidden units, `(N, num_hidden)`, given visible ones, `(N, num_visible)`."""
        inputs = tf.matmul(visible, self.weights) + self.hidden_bias
        return inputs if self.linear_hidden else tf.sigmoid(inputs)

    def visible_means(self, hidden):
        """Returns the means of the visible units, `(N, num_visible)`, given hidden ones, `(N, num_hidden)`."""
        inputs = tf.matmul(hidden, self.weights, transpose_b=True) + self.visible_bias
        return inputs if self.linear_visible else tf.sigmoid(inputs)

    def contrastive_divergence(self, visible, seed):
        """Estimates the gradient of the log-likelihood by one step of Gibbs sampling.

        Hidden states are drawn once; reconstructions, and what the hidden units make of them, are means.

        Args:
            visible: Tensor `(N, num_visible)`.
            seed: int32 `(2,)`, of the hidden states.

        Returns:
            Tensors shaped as `weights`, `visible_bias` and `hidden_bias`, averaged over cases.
        """
        hidden = self.hidden_means(visible)
        if self.linear_hidden:
            states = hidden + tf.random.stateless_normal(tf.shape(hidden), seed)
        else:
            states = tf.cast(tf.random.stateless_uniform(tf.shape(hidden), seed) < hidden, tf.float32)
        reconstruction = self.visible_means(states)
        again = self.hidden_means(reconstruction)
        of_data, of_model = (tf.matmul(v, h, transpose_a=True) for v, h in ((visible, hidden), (reconstruction, again)))
        return (
            (of_data - of_model) / tf.cast(tf.shape(visible)[0], tf.float32),
            tf.reduce_mean(visible - reconstruction, 0),
            tf.reduce_mean(hidden - again, 0),
        )

    def fit(self, x, epochs, batch_size=BATCH_SIZE):
        """Trains by contrastive divergence with momentum, on batches drawn without replacement.

        Args:
            x: Array or tensor `(N, num_visible)`, in [0, 1] for binary units. What does not fill a batch waits for
                another epoch.
            epochs: Integer.
            batch_size: Integer.
        """
        x = tf.convert_to_tensor(x)
        batch_size = min(batch_size, len(x))
        num_batches = len(x) // batch_size
        rate = LINEAR_LEARNING_RATE if self.linear_visible or self.linear_hidden else LEARNING_RATE
        parameters = [self.weights, self.visible_bias, self.hidden_bias]
        velocities = [tf.Variable(tf.zeros_like(parameter)) for parameter in parameters]

        @tf.function(jit_compile=True)
        def pass_over(batches, seeds, momentum):
            for i in tf.range(num_batches):
                gradients = self.contrastive_divergence(tf.gather(x, batches[i]), seeds[i])
                decays = WEIGHT_DECAY * self.weights, 0.0, 0.0
                for parameter, velocity, gradient, decay in zip(parameters, velocities, gradients, decays, strict=True):
                    velocity.assign(momentum * velocity + rate * (gradient - decay))
                    parameter.assign_add(velocity)

        for epoch in range(epochs):
            order = self._rng.permutation(len(x))[: num_batches * batch_size]
            batches = tf.constant(order.reshape(num_batches, batch_size), tf.int32)
            seeds = tf.constant(self._rng.integers(2**31, size=(num_batches, 2)), tf.int32)
            pass_over(batches, seeds, tf.constant(MOMENTA[epoch >= SLOW_EPOCHS]))


def pretrained(network, x, epochs, seed):
    """Gives an autoencoder the weights of machines trained layer by layer.

    Args:
        network: `keras.Sequential` of Dense layers, as `build_autoencoder` makes it: sigmoid or linear, with a decoder
            that mirrors the encoder.
        x: Array `(N, d)`, the training cases.
        epochs: Integer, the passes over the cases for each machine.
        seed: Integer.

    Returns:
        The network.
    """
    layers, x = network.layers, tf.convert_to_tensor(x)
    pairs = list(zip(layers, reversed(layers), strict=True))[: len(layers) // 2]
    for number, (encoder, decoder) in enumerate(pairs):
        linear_visible, linear_hidden = (_is_linear(layer) for layer in (decoder, encoder))
        machine = BoltzmannMachine(*encoder.kernel.shape, linear_visible, linear_hidden, seed=[seed, number])
        machine.fit(x, epochs)
        encoder.set_weights([machine.weights.numpy(), machine.hidden_bias.numpy()])
        decoder.set_weights([machine.weights.numpy().T, machine.visible_bias.numpy()])
        x = machine.hidden_means(x)
    return network


def _is_linear(layer):
    return layer.activation.__name__ == "linear"
