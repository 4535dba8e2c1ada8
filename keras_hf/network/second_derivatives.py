"""Operations of which TensorFlow has no second derivative, or a wrong one: errors that name the layer and the cure."""

import contextlib
import re

_CURES = {
    "Softsign": "Use `lambda x: x / (1 + keras.ops.abs(x))` as the activation.",
    "ResizeBicubic": 'Use `interpolation="nearest"`, or `Conv2DTranspose`.',
    "CudnnRNNV3": "Set `use_cudnn=False`.",
}

# In TensorFlow 2.21 on CPUs; see `docs/support.md`.
_WRONG_IN_SOME_FORMS = {
    "ResizeBilinear": 'use `interpolation="nearest"`, or `Conv2DTranspose`.',
    "MaxPool": 'use `padding="valid"` or `strides=pool_size`, or average pooling.',
    "MaxPool3D": 'use `padding="valid"` or `strides=pool_size`, or average pooling.',
}


@contextlib.contextmanager
def second_derivatives_explained(layer_of_op):
    """Context in which TensorFlow's errors about missing second derivatives become errors that name the layer and the cure.

    Args:
        layer_of_op: Dict; see `structure.Structure`.
    """
    try:
        yield
    except (LookupError, NotImplementedError, TypeError, ValueError) as error:
        missing = re.search(r"gradient registry has no entry for: (\w+)", str(error))
        if missing:
            op = re.sub("Grad$|Backprop", "", missing[1])
            layer = layer_of_op.get(op)
            what = f"Layer {layer!r}" if layer else "A layer of the network, or the loss,"
            raise ValueError(
                f"{what} has no second derivative: TensorFlow has none for {op}, and every product needs one. "
                f"{_CURES.get(op, 'Write it in operations that can be differentiated twice.')}"
            ) from error
        if "recompute_grad" in str(error) or "keywords arguments only when eager" in str(error):
            raise ValueError(
                "A layer under `keras.RematScope` or `tf.recompute_grad` has no second derivative, and every product needs one. Take the scope away "
                "and bound memory by `HessianFree(micro_batch_size=...)`."
            ) from error
        raise


def cures_of_wrong_ones(layer_of_op):
    """Returns cures, a list of strings, for the layers of which TensorFlow computes some forms of second derivatives wrongly.

    Args:
        layer_of_op: Dict; see `structure.Structure`.
    """
    return [f"Layer '{layer_of_op[op]}': {cure}" for op, cure in _WRONG_IN_SOME_FORMS.items() if layer_of_op.get(op)]
