"""A loss for targets of which some are far off."""

import keras

from keras_hf.common.checks import positive


@keras.saving.register_keras_serializable("keras_hf")
class Cauchy(keras.losses.Loss):
    """The loss `scale^2 log(1 + ((y_pred - y_true) / scale)^2)`, the mean over the last axis: outliers pull less the farther they are.

    Near zero it is the squared error. It is SciPy's `loss="cauchy"` with `f_scale=scale`, but for a factor, and with `scale = s sqrt(df)` the
    negative log-likelihood of Student's t distribution of `df` degrees of freedom and scale s, but for a factor and a constant.
    `keras.losses.Huber` and `LogCosh`, which grow as the absolute error, are convex, and pull back fits that start far off; this loss ignores gross
    errors entirely, and may have several minima.

    `DirectSolver` takes the loss's own second derivative in every case, zero where that is negative (Triggs et al. 2000, section 4.3): it needs no
    weights that are computed again between fits.

    Args:
        scale: Float > 0, in units of the targets: errors beyond it count as large. 2 to 3 standard deviations of the noise is usual.
        reduction: As in `keras.losses.Loss`.
        name: As in `keras.losses.Loss`.
        dtype: As in `keras.losses.Loss`.

    Raises:
        ValueError: If `scale` is not a finite number > 0.

    References:
        Triggs, McLauchlan, Hartley & Fitzgibbon (2000), *Bundle adjustment - a modern synthesis*.
    """

    def __init__(self, scale=1.0, reduction="sum_over_batch_size", name="cauchy", dtype=None):
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.scale = positive("scale", scale)

    def call(self, y_true, y_pred):
        """Returns the loss of every case, `(N, ...)` without the last axis."""
        y_pred = keras.ops.convert_to_tensor(y_pred)
        errors = (y_pred - keras.ops.cast(y_true, y_pred.dtype)) / self.scale
        return self.scale**2 * keras.ops.mean(keras.ops.log1p(keras.ops.square(errors)), axis=-1)

    def get_config(self):
        """Returns the arguments, a dict."""
        return {**super().get_config(), "scale": self.scale}
