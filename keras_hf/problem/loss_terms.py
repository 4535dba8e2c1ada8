"""The compiled loss as a sum of terms, one an output, and how the values of a term on micro-batches of the data combine.

Keras reduces every term by itself, dividing by what its reduction says: the number of cases, the sum of their weights, of a mask, or nothing. The
value on all cases follows from those on micro-batches only through that denominator.
"""

import contextlib
import inspect

import keras
import tensorflow as tf

from keras_hf.common import checks, keras_private
from keras_hf.common.replaced import replaced

_MEANS = ("sum_over_batch_size", "mean")


def compares_cases(loss):
    """Whether the value of a case depends on other cases, though there is one per case: Keras' `Circle`, which compares every case with all others.

    Args:
        loss: `keras.losses.Loss`. If it stands for the user's, as `compiled_model.checked` makes one, its `__wrapped__`, or that of its function, is
            the user's.
    """
    loss = inspect.unwrap(loss)
    return inspect.unwrap(getattr(loss, "fn", loss)) is keras.losses.circle


def overrides_compute_loss(model):
    """Whether the class of a model overrides `compute_loss`."""
    return type(model).compute_loss is not keras.Model.compute_loss


class LossTerm:
    """One term of the compiled loss on given cases.

    Args:
        loss: `keras.losses.Loss`.
        loss_weight: Float, by which `compile(loss_weights=...)` multiplies the term, or `None`.
        y: Tensor, the targets.
        y_pred: Tensor, the predictions, with their Keras mask, if any.
        sample_weight: Tensor of the cases' weights, or `None`.
        num_replicas: Integer; Keras divides means by it.

    Attributes:
        loss, y_pred: As above.
    """

    def __init__(self, loss, loss_weight, y, y_pred, sample_weight, num_replicas):
        self.loss, self._loss_weight = loss, 1.0 if loss_weight is None else loss_weight
        self._y, self.y_pred, self._sample_weight = y, y_pred, sample_weight
        self._num_replicas = num_replicas
        self._values = self._is_evaluated = None

    @property
    def name(self):
        """The loss' name."""
        return self.loss.name

    def combination(self):
        """Says what the values of micro-batches combine by.

        Returns:
            "cases" (a mean over cases), "data" (a mean by `denominator()`), "sum" (no denominator) or "unknown": then the loss of several
            micro-batches cannot be put together and a batch must be one micro-batch.

        Raises:
            ValueError: If the loss is not reduced, or weights do not fit its values.
        """
        reduction = self.loss.reduction
        if reduction in (None, "none"):
            raise ValueError(
                f"The loss '{self.name}' must be reduced to one number, which an update minimises. Received: reduction={reduction!r}. "
                'Use `reduction="sum_over_batch_size"` or `"sum"`.'
            )
        values = self._unreduced()
        if values is None or values.shape.rank == 0 or values.shape[0] != self.y_pred.shape[0]:
            return "unknown"
        checks.sample_weight(self.name, self._sample_weight, values)
        if compares_cases(self.loss):
            return "unknown"
        if reduction == "sum":
            return "sum"
        is_masked = self._mask(values) is not None
        is_weighted = reduction == "mean_with_sample_weight" and self._sample_weight is not None
        return "data" if is_masked or is_weighted else "cases"

    def value(self):
        """The term, a scalar."""
        return self._scaled(*self._evaluate(self._sample_weight))

    def accurate_value(self):
        """The term as a float64 scalar, summed over cases in float64 where it is linear in sample weights.

        A float32 sum over thousands of cases is off by 1e-7 of itself, which late in training is as much as an update wins. The loss of a case is
        the derivative in its weight, which Keras' reduction hands back unsummed.
        """
        losses = self.case_losses()
        if losses is None:
            return tf.cast(self._scaled(*self._evaluate(self._sample_weight)), tf.float64)
        return tf.reduce_sum(losses)

    def case_losses(self):
        """What each case adds to the term, its weight included, float64 `(cases,)`; `None` where only the whole is known."""
        values = self._unreduced()
        if values is None or values.shape.rank == 0 or self.loss.reduction not in (*_MEANS, "sum"):
            return None
        if self._sample_weight is None:
            weight = tf.ones([tf.shape(values)[0], *[1] * (values.shape.rank - 1)], values.dtype)
        else:
            weight = tf.cast(self._sample_weight, values.dtype)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weight)
            # Of the values that are there: only how Keras reduces them depends on the weight.
            with replaced((self.loss, "call", lambda *args, **kwargs: values)):
                value = self._scaled(self.loss(self._y, self.y_pred, weight), values)
        losses = tape.gradient(value, weight, unconnected_gradients="zero")
        return tf.reduce_sum(tf.cast(weight * losses, tf.float64), list(range(1, weight.shape.rank)))

    def counts(self):
        """Returns by how much the term grows with each of the values that the loss reduces, and the sample weight behind that, 0 under a mask.

        Both have the shape of the values, those of cases or steps; scalars, where the loss is one number.
        """
        values = self._unreduced()

        def slopes(value_of, *replacements):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(values)
                with replaced((self.loss, "call", lambda *args, **kwargs: values), *replacements):
                    value = value_of(self.loss(self._y, self.y_pred, self._sample_weight))
            return tape.gradient(value, values)

        # A sum divides by nothing: what it multiplies a value by is the weight.
        return slopes(lambda loss: self._scaled(loss, values)), slopes(tf.reduce_sum, (self.loss, "reduction", "sum"))

    def denominator(self):
        """What Keras divides this term by where it depends on the data, a scalar: the sum of the mask, of the weights, or of their product."""
        values = self._unreduced()
        mask = self._mask(values)
        weight = self._sample_weight if self.loss.reduction == "mean_with_sample_weight" else None
        if mask is None or weight is None:
            return tf.reduce_sum(tf.cast(weight if mask is None else mask, values.dtype))
        weight, mask = tf.cast(weight, values.dtype), tf.cast(mask, values.dtype)
        if weight.shape.rank == mask.shape.rank + 1:
            weight = tf.squeeze(weight, -1)
        return tf.reduce_sum(weight * mask)

    def _evaluate(self, sample_weight):
        """The loss as Keras reduces it, and the values that it reduces."""
        values = []
        call = self.loss.call

        def recording(*args, **kwargs):
            values.append(call(*args, **kwargs))
            return values[-1]

        with replaced((self.loss, "call", recording)):
            loss = self.loss(self._y, self.y_pred, sample_weight)
        self._values, self._is_evaluated = values[-1] if values else None, True
        return loss, self._values

    def _unreduced(self):
        """The values that the loss reduces: any will do that were seen already, where only their form and their mask count."""
        if not self._is_evaluated:
            self._evaluate(self._sample_weight)
        return self._values

    def _scaled(self, loss, values):
        is_divided = values is not None and values.shape.rank != 0 and self.loss.reduction != "sum"
        # Not `tf.cast`, which takes a Python number through float32.
        return loss * tf.constant(self._loss_weight * (self._num_replicas if is_divided else 1), loss.dtype)

    def _mask(self, values):
        masks = [keras_private.mask(tensor) for tensor in (self.y_pred, values)]
        masks = [tf.cast(mask, tf.bool) for mask in masks if mask is not None]
        return masks[0] & masks[1] if len(masks) == 2 else masks[0] if masks else None


class WholeLoss:
    """A loss of which nothing is known but its value, as an overridden `compute_loss` gives: one term, to be taken in one micro-batch.

    Args:
        value: Callable `() -> scalar`.
    """

    name, loss, y_pred = "compute_loss", None, None

    def __init__(self, value):
        self.value = value

    def combination(self):
        """See `LossTerm`."""
        return "unknown"

    def accurate_value(self):
        """The term as a float64 scalar."""
        return tf.cast(self.value(), tf.float64)

    def case_losses(self):
        """`None`: only the whole is known."""
        return None

    def counts(self):
        """See `LossTerm`."""
        return tf.ones([]), tf.ones([])


@contextlib.contextmanager
def recorded_terms(compile_loss, num_replicas):
    """Records the terms that a compiled loss is called on while it is open, instead of computing them, in the list that it gives.

    Keras' own matching of outputs, targets, weights and losses is what finds them.

    Args:
        compile_loss: Keras' `CompileLoss`, built.
        num_replicas: Integer.
    """
    terms = []

    def recording(loss, loss_weight):
        def call(y, y_pred, sample_weight=None):
            terms.append(LossTerm(loss, loss_weight, y, y_pred, sample_weight, num_replicas))
            return tf.zeros([], keras.backend.floatx())

        return call

    with keras_private.losses_called_by(compile_loss, recording):
        yield terms
