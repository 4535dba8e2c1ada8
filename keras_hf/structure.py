"""What one trace of the network tells before the first update: where to cut it, what it is made of, what it changes, how large it is.

The trace is a scratch graph, never run.
"""

from typing import NamedTuple

import keras
import tensorflow as tf

from keras_hf.capture import is_capturable, recorded_uses

# Bytes that a kept linearization holds for one byte that the forward pass and the loss compute: 1.6 to 1.8 measured on dense autoencoders.
_KEPT_PER_BYTE = 2
# Memory in bytes for the kept piece, from which `micro_batch_size=None` picks the size.
_PIECE_MEMORY = 2 * 2**30


class Structure(NamedTuple):
    """Facts of the traced network, all Python values.

    Attributes:
        cuts: Tuple, for every output leaf "logits", "output" or "unused": where the loss is cut.
        states: List of `keras.Variable`, those of the candidates that a forward pass changes.
        has_added_loss: Whether layers add losses in `call`.
        op_types: Frozenset of the types of operation in the forward pass.
        bytes_per_case: Integer, memory of a kept linearization per case.
        is_masked: Whether an output carries a Keras mask.
        has_curvature: Whether the compiled loss has a second derivative in any output.
        captured: List of `keras.Layer`, those whose squared gradients `capture` gets from inputs and pre-activation gradients.
        batch_normalizations: List of `keras.layers.BatchNormalization` that normalize by the piece's statistics.
        chunk_is_one_piece: Whether the curvature chunk is one piece whatever batch comes.
    """

    cuts: tuple
    states: list
    has_added_loss: bool
    op_types: frozenset
    bytes_per_case: int
    is_masked: bool
    has_curvature: bool
    captured: list
    batch_normalizations: list
    chunk_is_one_piece: bool = False

    def cut(self, y_pred):
        """Returns the tensors, in a list, that the loss is a function of: logits where it goes through them, else outputs."""
        leaves = keras.tree.flatten(y_pred)
        taken = [(leaf, cut) for leaf, cut in zip(leaves, self.cuts, strict=True) if cut != "unused"]
        return [leaf._keras_logits if cut == "logits" else leaf for leaf, cut in taken]

    @property
    def default_piece_size(self):
        """Cases whose kept linearization takes about 2 GiB: what `micro_batch_size=None` means."""
        return min(max(1, _PIECE_MEMORY // self.bytes_per_case), 2**30)


def trace_structure(task, data):
    """Traces network and loss once and returns a `Structure`.

    Args:
        task: `objective.Task`.
        data: `objective.Data`, of which only types and shapes are used.
    """
    graph = tf.__internal__.FuncGraph("structure")
    with graph.as_default():
        x, y, sample_weight = keras.tree.map_structure(_placeholder, tuple(data))
        capturable = [layer for layer in task.layers if is_capturable(layer) and layer.trainable_variables]
        with keras.StatelessScope(collect_losses=True) as scope, recorded_uses(capturable) as uses:
            y_pred = task.network(x)
        forward = graph.get_operations()
        op_types = frozenset(operation.type for operation in forward)
        leaves = keras.tree.flatten(y_pred)
        logits = [getattr(leaf, "_keras_logits", None) for leaf in leaves]
        cuts, has_curvature = ["unused"] * len(leaves), False
        if task.loss is not None:
            sources = [tensor for tensor in leaves + logits if tensor is not None]
            with tf.GradientTape(persistent=True) as outer:
                outer.watch(sources)
                with tf.GradientTape() as tape:
                    tape.watch(sources)
                    with keras.StatelessScope():
                        loss = task.loss(x, y, y_pred, sample_weight)
                forward = graph.get_operations()
                gradients = iter(tape.gradient(loss, sources))
            by_output = [next(gradients) for _ in leaves]
            by_logits = [None if tensor is None else next(gradients) for tensor in logits]
            for i, (of_output, of_logits) in enumerate(zip(by_output, by_logits, strict=True)):
                if of_output is not None:
                    cuts[i], cut, gradient = "output", leaves[i], of_output
                elif of_logits is not None:
                    cuts[i], cut, gradient = "logits", logits[i], of_logits
                else:
                    continue
                has_curvature |= outer.gradient(gradient, cut) is not None
        num_bytes = [_bytes_per_case(output) for operation in forward for output in operation.outputs]
    # A layer's weights that are read anywhere but in its calls (tied weights, say) have gradients that its inputs don't tell.
    captured = [
        layer
        for layer in capturable
        if all(variable.trainable and _num_reads(graph, variable) == len(uses[layer]) for variable in layer.weights)
    ]
    states = [state for state in task.states if scope.get_current_value(state) is not None]
    changed = {id(state) for state in states}
    return Structure(
        cuts=tuple(cuts),
        states=states,
        has_added_loss=bool(scope.losses),
        op_types=op_types,
        bytes_per_case=max(1, _KEPT_PER_BYTE * sum(num_bytes)),
        is_masked=any(getattr(leaf, "_keras_mask", None) is not None for leaf in leaves),
        has_curvature=has_curvature,
        captured=captured,
        batch_normalizations=[
            layer
            for layer in task.layers
            if isinstance(layer, keras.layers.BatchNormalization) and id(layer.moving_mean) in changed
        ],
    )


def _num_reads(graph, variable):
    """How often a graph reads a `keras.Variable`, a nested function counting once."""
    return sum(len(inner.consumers()) for outer, inner in graph.captures if outer is variable.value.handle)


def _placeholder(leaf):
    return None if leaf is None else tf.compat.v1.placeholder(leaf.dtype, leaf.shape)


def _bytes_per_case(tensor):
    """Bytes of a float tensor per case, if its first axis is the case (its length unknown); else 0."""
    shape = tensor.shape
    if not tensor.dtype.is_floating or not shape.rank or shape[0] is not None:
        return 0
    others = shape[1:].num_elements()
    return (others or 0) * tensor.dtype.size
