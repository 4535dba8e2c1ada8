"""How the losses of pieces combine: what Keras divides by when it reduces a loss."""

import contextlib

import keras
import tensorflow as tf

_BY_CASES = ("sum_over_batch_size", "mean")


class Denominator:
    """The denominator of a compiled loss, as a function of the cases.

    Args:
        kind: "cases" (a mean over cases), "weights" (a mean by sample weight), "sum" (no denominator) or "unknown": then the loss of several pieces
            cannot be put together and a batch must be one piece.
        is_linear: Whether the loss is linear in sample weights, and weights of 1 are as good as none.
    """

    def __init__(self, kind, is_linear=False):
        self.kind, self.is_linear = kind, is_linear

    @property
    def is_sum(self):
        """Whether the loss is a sum over cases."""
        return self.kind == "sum"

    @property
    def needs_data(self):
        """Whether `of` looks at the cases, beyond their number."""
        return self.kind == "weights"

    def of(self, data, num_cases):
        """Returns the denominator for these cases, a scalar.

        Args:
            data: `objective.Data`; may be `None` unless `needs_data`.
            num_cases: int32 scalar.
        """
        if self.kind == "weights" and data.sample_weight is not None:
            return tf.reduce_sum(data.sample_weight)
        return num_cases


def denominator_of(loss, is_masked, is_weighted, value_ranks):
    """Finds the `Denominator` of a Keras loss.

    Args:
        loss: What `compile` was given: a name, a function, a `keras.losses.Loss`, or a nest of those.
        is_masked: Whether an output carries a Keras mask, by whose sum Keras then divides.
        is_weighted: Whether sample weights came.
        value_ranks: Set of ranks of what the loss functions returned, before reduction.
    """
    losses = [leaf for leaf in keras.tree.flatten(loss) if leaf is not None]
    reductions = {leaf.reduction if isinstance(leaf, keras.losses.Loss) else "sum_over_batch_size" for leaf in losses}
    if 0 in value_ranks or not reductions:
        return Denominator("unknown")
    if reductions == {"sum"}:
        return Denominator("sum", is_linear=True)
    if is_masked:
        return Denominator("unknown")
    if reductions <= set(_BY_CASES):
        return Denominator("cases", is_linear=True)
    if reductions <= {*_BY_CASES, "mean_with_sample_weight"} and not is_weighted:
        return Denominator("cases")
    if reductions == {"mean_with_sample_weight"} and len(losses) == 1:
        return Denominator("weights")
    return Denominator("unknown")


@contextlib.contextmanager
def recorded_ranks(losses):
    """Records, while it is open, the ranks of what these `keras.losses.Loss` objects return before reduction, in the set that it gives."""
    ranks = set()

    def recording(call):
        def recorded(*args, **kwargs):
            values = call(*args, **kwargs)
            ranks.add(values.shape.rank)
            return values

        return recorded

    for loss in losses:
        loss.call = recording(loss.call)
    try:
        yield ranks
    finally:
        for loss in losses:
            del loss.call
