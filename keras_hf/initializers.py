"""Sparse initialization of Martens (2010): every unit has only a few non-zero incoming weights."""

import math

import keras
from keras import ops

from keras_hf.common.checks import count, positive


@keras.saving.register_keras_serializable(package="keras_hf")
class SparseNormal(keras.initializers.RandomNormal):
    """Normal weights on a few distinct inputs of every unit, and zeros elsewhere.

    Each unit of a layer gets `min(num_connections, fan_in)` incoming weights from
    N(0, stddev^2), at inputs drawn without replacement. The variance of a unit's total input
    therefore does not depend on the width of the layer, and the units of a layer respond to
    different inputs. Deep networks of logistic units train from the start with these weights,
    where dense initialization leaves them on a plateau. For tanh units Sutskever et al. (2013)
    use `stddev=0.25` and biases of 0.5; for logistic units the defaults and biases of 0.

    In recurrent layers it draws the recurrent kernel too, `recurrent_initializer=SparseNormal(spectral_radius=1.1)`: scaled so that the largest
    absolute eigenvalue is 1.1, hidden states neither die out nor explode over many steps.

    Units are the last axis of the kernel, their inputs all the others: `(fan_in, units)` in
    `Dense`, `(*spatial, channels, units)` in convolutions.

    Args:
        num_connections: Integer >= 1, the number of non-zero weights into each unit.
        stddev: Float > 0, the standard deviation of the non-zero weights.
        spectral_radius: Float > 0, the largest absolute eigenvalue that a square kernel is
            scaled to; `stddev` then does not matter. None leaves the kernel as it is drawn.
        seed: Integer, `keras.random.SeedGenerator` or None, as in every Keras initializer: an
            integer or None gives the same weights at each call, a generator new ones.

    Example:

    >>> layer = keras.layers.Dense(100, kernel_initializer=SparseNormal())
    >>> layer.build((None, 784))
    >>> int((layer.kernel.numpy() != 0).sum())
    1500

    References:
        Martens (2010), *Deep learning via Hessian-free optimization*, section 5.
        Sutskever, Martens, Dahl, Hinton (2013), *On the importance of initialization and
        momentum in deep learning*, sections 3.1 and 4.1.
    """

    def __init__(self, num_connections=15, stddev=1.0, seed=None, spectral_radius=None):
        super().__init__(mean=0.0, stddev=positive("stddev", stddev), seed=seed)
        self.num_connections = count("num_connections", num_connections)
        self.spectral_radius = None if spectral_radius is None else positive("spectral_radius", spectral_radius)

    def __call__(self, shape, dtype=None):
        """Draws the kernel.

        Args:
            shape: Tuple of integers `(..., units)` with at least two axes.
            dtype: String, the floating dtype; `keras.config.floatx()` when None.

        Returns:
            Tensor of `shape` and `dtype`.

        Raises:
            ValueError: If `shape` has fewer than two axes, as that of a bias, or is not square
                where a spectral radius is asked for.
        """
        if len(shape) < 2:
            raise ValueError(
                "`SparseNormal` draws kernels, of shape `(..., units)` with at least two axes. "
                f"Received: shape={tuple(shape)}. Initialize biases with another initializer, "
                'such as "zeros".'
            )
        *inputs, units = shape
        fan_in = math.prod(inputs)
        if self.spectral_radius is not None and fan_in != units:
            raise ValueError(
                "`spectral_radius` scales kernels that have eigenvalues, of shape `(units, units)`. "
                f"Received: shape={tuple(shape)}. Use it as `recurrent_initializer` of layers whose cell has one "
                "such kernel, such as `SimpleRNN`."
            )
        num_connections = min(self.num_connections, fan_in)
        dtype = dtype or keras.config.floatx()
        # Half precision has too few values to order the inputs without ties.
        draw_dtype = keras.backend.result_type(dtype, "float32")

        # One draw for both, since an integer seed gives the same numbers in every draw: the
        # largest `keys` of a unit choose its inputs, and `weights` are their weights.
        draws = super().__call__((units, fan_in + num_connections), draw_dtype)
        keys, weights = draws[:, :fan_in], draws[:, fan_in:]
        _, rows = ops.top_k(keys, num_connections)
        columns = ops.broadcast_to(ops.arange(units, dtype=rows.dtype)[:, None], rows.shape)
        kernel = ops.scatter(
            ops.reshape(ops.stack([rows, columns], axis=-1), (-1, 2)),
            ops.reshape(weights, (-1,)),
            (fan_in, units),
        )
        if self.spectral_radius is not None:
            largest = ops.max(ops.abs(ops.eig(kernel)[0]))
            # Few connections may make a kernel nilpotent: it has no other eigenvalue than 0.
            kernel = ops.where(largest > 0, self.spectral_radius / ops.cast(largest, kernel.dtype), 1.0) * kernel
        return ops.cast(ops.reshape(kernel, shape), dtype)

    def get_config(self):
        """Returns the arguments as a serializable dict."""
        config = super().get_config()
        del config["mean"]
        return {"num_connections": self.num_connections, "spectral_radius": self.spectral_radius, **config}
