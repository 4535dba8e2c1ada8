"""The prior precision and the noise that make the data most probable: MacKay's evidence, after training and within."""

import math

import keras
import numpy as np

from keras_hf.common.checks import finite, positive
from keras_hf.posterior.likelihood import likelihood_of

# Steps of the fixed point, and the change at which it ends.
_MOST_STEPS, _TOLERANCE = 500, 1e-10
# The ratio of prior precision to curvature is kept within these, relative to the mean eigenvalue.
_LIMITS = 1e-12, 1e12
# The first decay of training as a share of the loss, and the factor by which a later one may differ from the one before: the weights must follow.
_FIRST_SHARE, _MOST_CHANGE = 0.01, 3.0
# The noise is found from no less than this share of the residuals, though the data determine more weights.
_LEAST_FREE = 0.01
# Where the data determine more weights than this share of the values, the decay does not fall: residuals say too little of the noise, and less and
# less as they shrink, so that the fixed point ends in interpolation.
_MOST_DETERMINED = 0.5


def most_probable(spectrum, squared_weights, squares=None, num_values=None, variance=None):
    """Returns what makes the data most probable while the weights stay where they are: floats, the prior precision and the variance of the noise.

    The fixed point of `precision = gamma / w'w` and `variance = squares / (num_values - gamma)`, with gamma the number of weights that the data
    determine. The precision is relative to unit noise, as the spectrum is: that of the weights is it over the variance.

    Args:
        spectrum: Array `(n,)`, the eigenvalues of the curvature at unit noise.
        squared_weights: Float, w'w.
        squares: Float, the weighted sum of squared residuals; needed unless `variance` is given.
        num_values: Float, how many residuals there are.
        variance: Float, that of the noise; `None` = to be found.

    References:
        MacKay (1992), *A practical Bayesian framework for backpropagation networks*, section 3.3.
    """
    mean, is_given = spectrum.mean(), variance is not None
    if not is_given:
        variance = squares / num_values
    if not (np.isfinite(mean) and mean > 0 and squared_weights > 0):
        return 1.0, variance
    limits = [limit * mean for limit in _LIMITS]
    precision = np.clip(variance * len(spectrum) / squared_weights, *limits)
    for _ in range(_MOST_STEPS):
        before, gamma = precision, effective(spectrum, precision)
        if not is_given:
            variance = squares / max(num_values - gamma, 1.0)
        precision = np.clip(variance * gamma / squared_weights, *limits)
        if abs(precision - before) <= _TOLERANCE * before:
            break
    return float(precision), float(variance)


def noise_variance(spectrum, precision, squares, num_values):
    """Returns the variance of the noise of greatest evidence at a given prior precision, that of the weights; see `most_probable`."""
    variance = squares / num_values
    for _ in range(_MOST_STEPS):
        before = variance
        variance = squares / max(num_values - effective(spectrum, precision * variance), 1.0)
        if abs(variance - before) <= _TOLERANCE * before:
            break
    return float(variance)


def effective(spectrum, precision):
    """Returns gamma, how many weights the data determine, a float; the precision is relative to unit noise."""
    return np.sum(spectrum / (spectrum + precision))


class EvidenceRegularization(keras.callbacks.Callback):
    """Weight decay by evidence: makes the data most probable, on the training cases alone, while `fit` runs.

    With gamma the number of weights that the data determine, w'w the sum of their squares, and N values of the loss,

        weight_decay = 2 gamma loss / (w'w (N - gamma))      squares, the loss their mean without the decay
        weight_decay = gamma / (w'w N)                       cross-entropies

    are MacKay's fixed point, one prior precision for all weights; the noise has dropped out. Every few updates (5 with `DirectSolver`, 10 with
    `ConjugateGradient`, 50 with `PreconditionedMomentum`) gamma is computed, exactly with `DirectSolver`, else by Lanczos' method from a random
    vector, which has a standard deviation of about `sqrt(2 gamma)`, and the decay moves to what follows, by a factor of 3 at most. It begins as a
    hundredth of the loss, and does not fall while gamma exceeds N / 2, where residuals do not tell noise from a fit. What is not finite changes
    nothing. The decay is `optimizer.weight_decay`, state that is saved and resumed with the optimizer.

    `HessianFree(weight_decay="evidence")` adds this callback to every `fit`; compile it so where a run is to be resumed from a file in another
    process. Logs: `weight_decay` (of the update), `num_effective` (gamma; NaN in updates without), `data_loss` (without the decay),
    `squared_weights`, `batch_cases` (of the whole batch).

    Gamma counts weights at the present weights, not those by which the network has bent towards the noise before. Where the data determine few
    weights for each value, as of a curve by one layer, the minimum itself is the model to keep. Else the decay comes out too small, several times
    for networks of as many weights as values; it then makes what training on does to other cases less, and validation is still needed to stop.
    docs/error-bars.md says where it helps and where not.

    Cost: less than a fifth of the updates' time.

    Args:
        min_decay: Float >= 0, the smallest decay.
        max_decay: Float > 0, the largest decay.

    Raises:
        ValueError: If a limit is out of its range or `min_decay` exceeds `max_decay`; at the start of training, if the optimizer is
            another one, if the loss has no likelihood (see `HFModel.laplace`), or if a weight has a regularizer of its own.

    References:
        MacKay (1992), *A practical Bayesian framework for backpropagation networks*; Foresee & Hagan (1997), *Gauss-Newton approximation to Bayesian
        learning*, MATLAB's `trainbr`.
    """

    def __init__(self, min_decay=0.0, max_decay=math.inf):
        super().__init__()
        self.min_decay = finite("min_decay", min_decay, minimum=0)
        self.max_decay = max_decay if max_decay == math.inf else positive("max_decay", max_decay)
        if self.min_decay > self.max_decay:
            raise ValueError(
                f"`min_decay` must not exceed `max_decay`. Received: min_decay={min_decay}, max_decay={max_decay}."
            )
        self._likelihood, self._cases = None, 0

    def on_train_begin(self, logs=None):
        if not getattr(self.model.optimizer, "finds_decay", False):
            raise ValueError(
                "`EvidenceRegularization` assigns the weight decay of `HessianFree`. "
                f"Received: a model whose optimizer is {self.model.optimizer!r}. Train with `HFModel(network)` compiled with `HessianFree()`."
            )
        own = [variable.path for variable in self.model.trainable_variables if variable.regularizer is not None]
        if own:
            raise ValueError(
                f"`EvidenceRegularization` finds one decay for all weights. Received: regularizers of {', '.join(own)}. Leave them out."
            )
        self._likelihood = likelihood_of(self.model, "EvidenceRegularization")

    def on_epoch_begin(self, epoch, logs=None):
        self._cases = 0

    def on_train_batch_end(self, batch, logs=None):
        # Of several batches an epoch's cases count; the same batch, in several updates, once.
        # A growing part is a sample of its batch, which the decay is for: that of a part alone would be far too large, and hold deep networks back.
        num_cases, setup = int(logs["batch_cases"]), self.model.setup
        self._cases = self._cases + num_cases if setup is not None and setup.has_other_cases else num_cases
        decay = self.next_decay(logs, self._cases)
        if math.isfinite(decay):
            self.model.optimizer.weight_decay.assign(min(max(decay, self.min_decay), self.max_decay))

    def next_decay(self, logs, num_cases):
        """Returns the decay of the next update, NaN where that does not change.

        Args:
            logs: Dict of floats, those of an update.
            num_cases: Integer, how many cases the data are.
        """
        before, gamma, loss, squared = (
            float(logs[key]) for key in ("weight_decay", "num_effective", "data_loss", "squared_weights")
        )
        if not (math.isfinite(gamma) and math.isfinite(loss) and squared > 0 and loss >= 0):
            return math.nan
        if before == 0:
            return 2 * _FIRST_SHARE * loss / squared
        size = self.model.network.output_shape[-1]
        # How often the mean loss is the negative logarithm of the likelihood; of squares at unit noise, half of their number.
        values = self._likelihood.num_values((num_cases, int(np.prod(self.model.network.output_shape[1:]))), size)
        if self._likelihood.is_gaussian:
            found, share = (
                gamma * loss / (squared * max(values - gamma / 2, _LEAST_FREE * values)),
                gamma / (2 * values),
            )
        else:
            found, share = gamma / (squared * values), gamma / values
        if share > _MOST_DETERMINED and found < before:
            return math.nan
        return min(max(found, before / _MOST_CHANGE), before * _MOST_CHANGE)
