"""Weight decay by evidence, found while `fit` runs."""

import math

import keras

from keras_hf.common.checks import finite, positive
from keras_hf.posterior.likelihood import likelihood_of

# The first decay of training as a share of the loss, and the factor by which a later one may differ from the one before: the weights must follow.
_FIRST_SHARE, _MOST_CHANGE = 0.01, 3.0
# The noise is found from no less than this share of the residuals, though the data determine more weights.
_LEAST_FREE = 0.01
# Where the data determine more weights than this share of the values, the decay does not fall: residuals say too little of the noise, and less and
# less as they shrink, so that the fixed point ends in interpolation.
_MOST_DETERMINED = 0.5


class EvidenceRegularization(keras.callbacks.Callback):
    """Weight decay by evidence: makes the data most probable, on the training cases alone, while `fit` runs.

    With gamma the number of weights that the data determine, w'w the sum of their squares, and N the number of values that were observed, those under
    a mask or of weight 0 not,

        weight_decay = 2 gamma loss / (w'w (N - gamma))      squares, the loss without the decay
        weight_decay = gamma / (w'w M)                       cross-entropies; M times the loss is the negative log-likelihood

    are MacKay's fixed point, one prior precision for all weights; the noise has dropped out. Every few updates (5 with `DirectSolver`, 10 with
    `ConjugateGradient`, 50 with `PreconditionedMomentum`) gamma is computed, exactly with `DirectSolver`, else by Lanczos' method from a random
    vector, which has a standard deviation of about `sqrt(2 gamma)`, and the decay moves to what follows, by a factor of 3 at most. It begins as a
    hundredth of the loss, and does not fall while gamma exceeds N / 2, where residuals do not tell noise from a fit. What is not finite changes
    nothing. The decay is `optimizer.weight_decay`, state that is saved and resumed with the optimizer.

    `HessianFree(weight_decay="evidence")` adds this callback to every `fit`; compile it so where a run is to be resumed from a file in another
    process. Logs: `weight_decay` (of the update), `data_loss` (without the decay), `squared_weights`, and, NaN in updates without, `num_effective`
    (gamma), `num_values` (N) and `loss_multiplier` (M), both of the whole batch. Of several batches, N and M are those of the batches so far in the
    epoch times the number of batches. The values of all groups, such as columns, are taken to have one noise, as they have in the loss.

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
            another one, if the loss has no likelihood (see `HFModel.laplace`), if the network adds losses, if a weight has a regularizer of its own,
            or if `steps_per_execution` is not 1.

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
        self._likelihood, self._counted, self._batches, self._batches_before = None, [], 0, None

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
        if self.model.steps_per_execution != 1:
            raise ValueError(
                "`EvidenceRegularization` sees the logs of every update. "
                f"Received: steps_per_execution={self.model.steps_per_execution}. Compile with `steps_per_execution=1`."
            )
        self._likelihood = likelihood_of(self.model, "EvidenceRegularization")
        self._batches_before = None

    def on_epoch_begin(self, epoch, logs=None):
        self._counted, self._batches = [], 0

    def on_epoch_end(self, epoch, logs=None):
        self._batches_before = self._batches

    def on_train_batch_end(self, batch, logs=None):
        self._batches += 1
        counted = float(logs["num_values" if self._likelihood.is_gaussian else "loss_multiplier"])
        if math.isfinite(counted):
            self._counted.append(counted)
        decay = self.next_decay(logs, self._num_values())
        if math.isfinite(decay):
            self.model.optimizer.weight_decay.assign(min(max(decay, self.min_decay), self.max_decay))

    def _num_values(self):
        """Returns how many values the whole data are, a float: those of the batches so far times the number of batches; NaN where it is not known."""
        setup, known = self.model.setup, (self.params or {}).get("steps")
        # The same batch, in several updates, counts once. Where Keras does not know how many batches there are, the epoch before tells.
        is_one = setup is None or not setup.has_other_cases
        num_batches = 1 if is_one else known or self._batches_before or math.nan
        return num_batches * sum(self._counted) / len(self._counted) if self._counted else math.nan

    def next_decay(self, logs, num_values):
        """Returns the decay of the next update, NaN where that does not change.

        Args:
            logs: Dict of floats, those of an update.
            num_values: Float, how many values the data are: for squares their number, for cross-entropies by what the loss is multiplied to be the
                negative log-likelihood.
        """
        before, gamma, loss, squared = (
            float(logs[key]) for key in ("weight_decay", "num_effective", "data_loss", "squared_weights")
        )
        if not (math.isfinite(gamma) and math.isfinite(loss) and squared > 0 and loss >= 0):
            return math.nan
        if before == 0:
            return 2 * _FIRST_SHARE * loss / squared
        if not num_values > 0:
            return math.nan
        if self._likelihood.is_gaussian:
            found = 2 * gamma * loss / (squared * max(num_values - gamma, _LEAST_FREE * num_values))
        else:
            found = gamma / (squared * num_values)
        if gamma / num_values > _MOST_DETERMINED and found < before:
            return math.nan
        return min(max(found, before / _MOST_CHANGE), before * _MOST_CHANGE)
