"""The support matrix: which layers, constructs and losses of Keras have right Gauss-Newton products, in every way to differentiate twice.

One entry a layer, variant or loss; `test_support.py` holds each against a dense oracle. `python tests/support.py` writes docs/support.md from what it
measures: about ten minutes.
"""

import contextlib
import inspect
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from problems import compiled, jacobian, model_data, with_objective

from keras_hf import DoubleBackward, ForwardAccumulation, GaussNewton
from keras_hf.problem.curvature import Curvature
from keras_hf.problem.fixed_network import Data

NUM_CASES = 4
# Sums of a dozen terms, whose rounding is 1e-16 of them in float64 and 1e-7 in float32: what is wrong is wrong in the first digits.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5}
DOCS = Path(__file__).parents[1] / "docs" / "support.md"

WAYS = {
    "automatic": None,
    "DoubleBackward": DoubleBackward(),
    "DoubleBackward, XLA": DoubleBackward(jit_compile=True),
    "ForwardAccumulation": ForwardAccumulation(),
    "ForwardAccumulation, XLA": ForwardAccumulation(jit_compile=True),
}
AUTOMATIC, DOUBLE, DOUBLE_XLA, FORWARD, FORWARD_XLA = WAYS


class Outcome(NamedTuple):
    """What a cell of the table says.

    Attributes:
        name: The cell in the docs.
        meaning: For the docs.
        error: Exception that comes instead of a product, or `None`.
        match: Regular expression that the exception's message matches.
    """

    name: str
    meaning: str
    error: type | None = None
    match: str = ""


RIGHT = Outcome("right", "The product equals that of the dense matrix.")
FLAT = Outcome("no curvature", "The loss has no second derivative, the product is zero, and the package warns.")
WRONG = Outcome("**wrong**", "The product is not that of the dense matrix.")
REJECTED = Outcome(
    "rejected",
    "TensorFlow's second derivative is wrong: the first update of `fit` detects it, leaves the weights unchanged, and raises an error that says so.",
)
NOT_A_NUMBER = Outcome("NaN, rejected", "TensorFlow's second derivative is NaN; `fit` rejects the step.")
NESTED = Outcome(
    "refused",
    "`ForwardAccumulation` refuses nested functions, loops and branches, in which it loses tangents.",
    ValueError,
    "`ForwardAccumulation` gives wrong products",
)
REDRAWS = Outcome(
    "refused: random",
    "The forward pass would be re-run under XLA, which draws other random numbers.",
    ValueError,
    "re-runs the forward pass of this network under XLA",
)
NO_SECOND = Outcome(
    "no second derivative",
    "TensorFlow has none; the error names the layer and the cure.",
    ValueError,
    "has no second derivative",
)
NO_XLA = Outcome(
    "not under XLA", "XLA cannot compile it; the error is TensorFlow's.", Exception, "XLA|[Tt]ensor ?[Ll]ist|compile"
)
UNEXPLAINED = Outcome("TensorFlow's error", "TensorFlow's own error, which does not name a cure.", Exception, "")
OUTCOMES = [RIGHT, FLAT, NESTED, REDRAWS, NO_SECOND, NO_XLA, UNEXPLAINED, NOT_A_NUMBER, REJECTED, WRONG]


def everywhere(outcome):
    """The same outcome in all ways."""
    return dict.fromkeys(WAYS, outcome)


LOOPS = {FORWARD: NESTED, FORWARD_XLA: NESTED}
LOOPS_NOT_XLA = {**LOOPS, DOUBLE_XLA: NO_XLA}
NOT_XLA = {DOUBLE_XLA: NO_XLA, FORWARD_XLA: NO_XLA}
RANDOM = {FORWARD_XLA: REDRAWS}
RANDOM_LOOPS = {**LOOPS, DOUBLE_XLA: REDRAWS}


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: Class, then what sets the variant apart.
        network: Callable that makes the network.
        x: Shape of one case, filled with normal numbers, or callable `(rng) -> x`.
        expected: Dict, way -> `Outcome`, where it is not `RIGHT`.
        note: For the docs.
        loss: For `compile`, or callable without arguments named `<lambda>` that makes it.
        y: Callable `(rng) -> y`; normal numbers shaped as the output where `None`.
        sample_weight: As x, or `None`.
        through_logits: The network's last layer, an activation, at whose argument the loss is cut instead of its value; `"both"` if at both.
        warning: Regular expression of the warning that the package gives, or `None`.
        is_random: Whether the network draws random numbers, which the oracle then must share with the package.
        dtype: Of weights and losses; "float32" for layers that have no float64 kernel.
        ways: Those to measure: what stands in front of the weights is no more than data.
        is_indefinite: Whether the loss is not convex in what it is cut at.
        is_slow: Whether a cell takes seconds, or others of its kind stand for it.
    """

    name: str
    network: Callable
    x: object
    expected: dict = {}
    note: str = ""
    loss: object = "mse"
    y: Callable | None = None
    sample_weight: Callable | None = None
    through_logits: str = ""
    warning: str | None = None
    is_random: bool = False
    dtype: str = "float64"
    ways: tuple = tuple(WAYS)
    is_slow: bool = False
    is_indefinite: bool = False

    @property
    def outcomes(self):
        """Dict, way -> the outcome that is expected."""
        return {way: self.expected.get(way, RIGHT) for way in self.ways}

    @property
    def covers(self):
        """Name of the class of Keras, or of the construct, that this is about."""
        return self.name.split(",")[0]


# How the rows' networks are built: float64, a few dozen weights, one or two outputs.


def chain(shape, *parts, units=1):
    """A network of these layers in a row, and a head."""
    return keras.Sequential([keras.Input(shape), *parts, layers.Flatten(), layers.Dense(units)])


def between(shape, part):
    """A network with the layer between two of weights: for layers without."""
    return chain(shape, layers.Dense(2, "tanh"), part)


def merged(shape, merge):
    """A network with the layer on two branches of one input."""
    x = keras.Input(shape)
    together = merge([layers.Dense(2, "tanh")(x), layers.Dense(2, "sigmoid")(x)])
    return keras.Model(x, layers.Dense(1)(layers.Flatten()(together)))


def called(shape, function):
    """A network of a function of its input, and a head."""
    x = keras.Input(shape)
    return keras.Model(x, layers.Dense(1)(layers.Flatten()(function(x))))


def integers(*shape, below=3, first=0):
    """Makes inputs of whole numbers."""
    return lambda rng: rng.integers(first, below, size=(NUM_CASES, *shape))


def positive(*shape):
    """Makes inputs between 0.1 and 1."""
    return lambda rng: rng.uniform(0.1, 1, size=(NUM_CASES, *shape))


def ragged(rng):
    """Makes sequences (4, 3, 2) padded by zeros."""
    x = rng.normal(size=(NUM_CASES, 3, 2))
    x[0, 2:] = x[1, 1:] = 0
    return x


def words(*vocabulary):
    """Makes inputs of strings, (4, 1)."""
    return lambda rng: tf.constant(vocabulary)[:, None]


def image(shape, part):
    """A network of a layer on images, in front of the weights."""
    return keras.Sequential(
        [
            keras.Input(shape),
            part,
            layers.Conv2D(1, 2, activation="tanh"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(1),
        ]
    )


_IMAGE = (4, 4, 3)


def of_layers():
    """The rows of `keras.layers`."""
    rows = []

    def row(name, network, x, **rest):
        rows.append(Row(name, network, x, **rest))

    def on(shape, name, part, **rest):
        row(name, lambda: chain(shape, part()), shape, **rest)

    def inside(shape, name, part, **rest):
        row(name, lambda: between(shape, part()), shape, **rest)

    def joining(name, merge, shape=(3,), **rest):
        row(name, lambda: merged(shape, merge()), shape, **rest)

    # Their first rows are measured under XLA; these compile for ten seconds.
    loops = {"expected": LOOPS, "is_slow": True, "ways": (AUTOMATIC, DOUBLE, FORWARD)}
    random = {"expected": RANDOM, "is_random": True}

    # Core layers.
    on((3,), "Dense", lambda: layers.Dense(3))
    on((2, 3), "Dense, on sequences", lambda: layers.Dense(3, "tanh"))
    on((3,), "Dense, low rank", low_rank_dense, dtype="float32")
    for activation in activations():
        inside(
            (3,),
            f"Dense, {activation}",
            lambda activation=activation: activated_dense(activation),
            expected=everywhere(NO_SECOND) if activation == "softsign" else {},
        )
    on(
        (2, 3),
        "EinsumDense",
        lambda: layers.EinsumDense("abc,cd->abd", output_shape=(2, 2), bias_axes="d", activation="tanh"),
    )
    on(
        (2, 3),
        "EinsumDense, over time",
        lambda: layers.EinsumDense("abc,bd->adc", output_shape=(2, 3), activation="tanh"),
    )
    row("Embedding", lambda: chain((2,), layers.Embedding(3, 2), layers.Dense(2, "tanh")), integers(2))
    row(
        "Embedding, mask_zero, GRU",
        lambda: chain((3,), layers.Embedding(3, 2, mask_zero=True), layers.GRU(1)),
        integers(3),
        **loops,
    )
    row("ReversibleEmbedding", lambda: reversed_embedding(True), integers(2))
    row("ReversibleEmbedding, untied", lambda: reversed_embedding(False), integers(2))
    inside((3,), "Activation", lambda: layers.Activation("tanh"))
    inside((3,), "Identity", layers.Identity)
    inside((3,), "Lambda", lambda: layers.Lambda(lambda x: keras.ops.sin(x)))
    inside((3,), "Layer, subclassed", Scaled)
    inside((3,), "Wrapper, subclassed", lambda: Wrapping(layers.Dense(2, "tanh")))
    row(
        "InputLayer",
        lambda: keras.Sequential([layers.InputLayer(shape=(3,)), layers.Dense(3, "tanh"), layers.Dense(1)]),
        (3,),
    )
    row("Masking", lambda: chain((3, 2), layers.Masking(), layers.GRU(1)), ragged, **loops)
    row("Masking, LSTM, unroll", lambda: chain((3, 2), layers.Masking(), layers.LSTM(1, unroll=True)), ragged)

    # Activation layers.
    inside((3,), "ELU", layers.ELU)
    inside((3,), "LeakyReLU", layers.LeakyReLU)
    inside((3,), "PReLU", layers.PReLU)
    inside((3,), "ReLU", layers.ReLU)
    inside((3,), "ReLU, max_value, threshold", lambda: layers.ReLU(max_value=0.5, negative_slope=0.1, threshold=0.1))
    inside((3,), "Softmax", layers.Softmax)

    # Merging layers.
    for merge in (
        layers.Add,
        layers.Average,
        layers.Concatenate,
        layers.Maximum,
        layers.Minimum,
        layers.Multiply,
        layers.Subtract,
    ):
        joining(merge.__name__, merge)
    joining("Dot", lambda: layers.Dot(axes=1), (2, 3))
    joining("Dot, normalize", lambda: layers.Dot(axes=-1, normalize=True), (2, 3))

    # Convolutions.
    for dims, size in ((1, (4,)), (2, (3, 3)), (3, (2, 2, 2))):
        convolution = getattr(layers, f"Conv{dims}D")
        name = convolution.__name__
        on((*size, 2), name, lambda c=convolution: c(2, 2, activation="tanh"))
        on(
            (*size, 1),
            f"{name}, same, strides",
            lambda c=convolution: c(2, 2, strides=2, padding="same", activation="tanh"),
        )
        on(
            (*size, 1),
            f"{name}, dilation",
            lambda c=convolution: c(2, 2, dilation_rate=2, padding="same", activation="tanh"),
        )
        on((*size, 2), f"{name}, groups", lambda c=convolution: c(2, 2, groups=2, activation="tanh"), expected=LOOPS)
        convolution = getattr(layers, f"Conv{dims}DTranspose")
        name = convolution.__name__
        on((*[2] * dims, 2), name, lambda c=convolution: c(1, 2, activation="tanh"))
        on(
            (*[2] * dims, 1),
            f"{name}, same, strides",
            lambda c=convolution: c(1, 2, strides=2, padding="same", activation="tanh"),
        )
    # TensorFlow has the others on GPUs alone.
    on(
        (2, 2, 2, 2),
        "Conv3D, channels_first",
        lambda: layers.Conv3D(2, 2, data_format="channels_first", activation="tanh"),
        expected=LOOPS,
    )
    on((4, 1), "Conv1D, causal", lambda: layers.Conv1D(2, 2, padding="causal", dilation_rate=2, activation="tanh"))
    on(
        (2, 2, 1),
        "Conv2DTranspose, output_padding",
        lambda: layers.Conv2DTranspose(1, 3, strides=2, output_padding=1, activation="tanh"),
    )
    for dims, size in ((1, (4,)), (2, (3, 3))):
        for kind in ("Depthwise", "Separable"):
            convolution = getattr(layers, f"{kind}Conv{dims}D")
            size_of = {"filters": 2} if kind == "Separable" else {}
            for variant, options in (
                ("", {}),
                (", same, strides", {"strides": 2, "padding": "same"}),
                (", dilation", {"dilation_rate": 2, "padding": "same"}),
                (", depth_multiplier", {"depth_multiplier": 2}),
            ):
                options = {"kernel_size": 2, "activation": "tanh", **size_of, **options}
                on((*size, 2), convolution.__name__ + variant, lambda c=convolution, options=options: c(**options))

    # Pooling and resizing.
    for dims, size in ((1, (4,)), (2, (4, 3)), (3, (2, 3, 2))):
        for kind in ("Max", "Average"):
            name, dtype = f"{kind}Pooling{dims}D", "float32" if dims == 3 else "float64"
            pool = getattr(layers, name)
            # XLA has the second derivative of maxima in float32 alone.
            maximum = NOT_XLA if kind == "Max" and dims < 3 else {}
            inside((*size, 2), name, lambda p=pool: p(2), dtype=dtype, expected=maximum)
            inside((*size, 2), f"{name}, overlapping", lambda p=pool: p(2, 1), dtype=dtype, expected=maximum)
            inside(
                (*size, 2),
                f"{name}, same, overlapping",
                lambda p=pool: p(2, 1, padding="same"),
                dtype=dtype,
                expected={} if kind == "Average" else everywhere(REJECTED) | maximum,
            )
            inside((*size, 2), f"Global{name}", getattr(layers, f"Global{name}"))
            inside(
                (*size, 2),
                f"Adaptive{name}",
                lambda name=name: getattr(layers, f"Adaptive{name}")(2),
                dtype=dtype,
                expected={AUTOMATIC: REJECTED, DOUBLE: REJECTED} if kind == "Max" and dims == 3 else maximum,
                # By `ForwardAccumulation` the three-dimensional maximum is wrong in one run and right in the next: which buffer TensorFlow writes
                # its second derivative to depends on what other threads still hold.
                ways=tuple(way for way in WAYS if way != FORWARD) if kind == "Max" and dims == 3 else tuple(WAYS),
            )
        inside((*size, 2), f"UpSampling{dims}D", getattr(layers, f"UpSampling{dims}D"))
        inside((*size, 2), f"ZeroPadding{dims}D", getattr(layers, f"ZeroPadding{dims}D"))
        inside((*(n + 1 for n in size), 2), f"Cropping{dims}D", getattr(layers, f"Cropping{dims}D"))
    for interpolation in ("bilinear", "bicubic", "lanczos3", "lanczos5"):
        inside(
            (2, 2, 2),
            f"UpSampling2D, {interpolation}",
            lambda i=interpolation: layers.UpSampling2D(interpolation=i),
            dtype="float32",
            expected=everywhere(REJECTED if interpolation == "bilinear" else NO_SECOND),
        )
    for interpolation in ("bilinear", "nearest", "bicubic", "area", "lanczos3"):
        inside(
            (2, 2, 2),
            f"Resizing, {interpolation}",
            lambda i=interpolation: layers.Resizing(3, 3, interpolation=i),
            dtype="float32",
            expected=everywhere(REJECTED if interpolation == "bilinear" else NO_SECOND),
        )
    inside((3, 3, 2), "CenterCrop", lambda: layers.CenterCrop(2, 2))

    # Reshaping layers.
    inside((3,), "Flatten", layers.Flatten)
    inside((2, 3), "Permute", lambda: layers.Permute((2, 1)))
    inside((3,), "RepeatVector", lambda: layers.RepeatVector(2))
    inside((2, 3), "Reshape", lambda: layers.Reshape((4, 1)))

    # Normalization layers.
    inside((3,), "BatchNormalization", layers.BatchNormalization)
    inside((2, 3), "BatchNormalization, on sequences", layers.BatchNormalization)
    inside((3,), "BatchNormalization, frozen", lambda: layers.BatchNormalization(trainable=False))
    inside((3,), "BatchNormalization, renorm", lambda: layers.BatchNormalization(renorm=True))
    inside((3,), "LayerNormalization", layers.LayerNormalization)
    inside((2, 2, 3), "GroupNormalization", lambda: layers.GroupNormalization(groups=1))
    inside((3,), "RMSNormalization", layers.RMSNormalization)
    inside((3,), "UnitNormalization", layers.UnitNormalization)
    inside((3,), "SpectralNormalization", lambda: layers.SpectralNormalization(layers.Dense(2, "tanh")), expected=LOOPS)

    # Regularization layers.
    inside(
        (3,),
        "ActivityRegularization",
        lambda: layers.ActivityRegularization(l2=0.1),
        note="Its exact Hessian is used.",
        is_indefinite=True,
    )
    on(
        (3,),
        "Dense, activity_regularizer",
        lambda: layers.Dense(3, "tanh", activity_regularizer=keras.regularizers.L2(0.1)),
        note="Its exact Hessian is used.",
        is_indefinite=True,
    )
    for dropout in (layers.Dropout, layers.AlphaDropout, layers.GaussianDropout, layers.GaussianNoise):
        inside((3,), dropout.__name__, lambda d=dropout: d(0.5), **random)
    for dims in (1, 2, 3):
        inside(
            (*[2] * dims, 2),
            f"SpatialDropout{dims}D",
            lambda d=dims: getattr(layers, f"SpatialDropout{d}D")(0.5),
            **random,
        )

    # Attention.
    def attending(name, attention, **rest):
        def network():
            return called((3, 2), lambda x: attention()([layers.Dense(2)(x), layers.Dense(2)(x)]))

        row(name, network, (3, 2), **rest)

    attending("Attention", lambda: layers.Attention(use_scale=True))
    attending("Attention, concat", lambda: layers.Attention(score_mode="concat"))
    attending("Attention, dropout", lambda: layers.Attention(dropout=0.5), **random)
    attending("AdditiveAttention", layers.AdditiveAttention)
    row("MultiHeadAttention", lambda: called((3, 2), lambda x: layers.MultiHeadAttention(2, 1)(x, x)), (3, 2))
    row(
        "MultiHeadAttention, causal",
        lambda: called((3, 2), lambda x: layers.MultiHeadAttention(1, 2)(x, x, use_causal_mask=True)),
        (3, 2),
    )
    row(
        "MultiHeadAttention, dropout",
        lambda: called((3, 2), lambda x: layers.MultiHeadAttention(1, 2, dropout=0.5)(x, x)),
        (3, 2),
        **random,
    )
    row("GroupQueryAttention", lambda: called((3, 2), lambda x: layers.GroupQueryAttention(1, 2, 1)(x, x)), (3, 2))
    row(
        "GroupQueryAttention, use_gate",
        lambda: called((3, 2), lambda x: layers.GroupQueryAttention(1, 2, 1, use_gate=True)(x, x)),
        (3, 2),
    )

    # Recurrent layers.
    for recurrent in (layers.SimpleRNN, layers.LSTM, layers.GRU):
        name = recurrent.__name__
        on((3, 2), name, lambda r=recurrent: r(2), expected=LOOPS, is_slow=recurrent is not layers.SimpleRNN)
        on((3, 2), f"{name}, unroll", lambda r=recurrent: r(2, unroll=True))
    on(
        (3, 1),
        "LSTM, return_sequences, go_backwards",
        lambda: layers.LSTM(1, return_sequences=True, go_backwards=True),
        **loops,
    )
    on(
        (3, 1),
        "LSTM, dropout",
        lambda: layers.LSTM(1, dropout=0.5, recurrent_dropout=0.5),
        expected=RANDOM_LOOPS,
        is_random=True,
        is_slow=True,
    )
    on(
        (3, 1),
        "GRU, dropout, unroll",
        lambda: layers.GRU(1, dropout=0.5, recurrent_dropout=0.5, unroll=True),
        **random,
    )
    row("GRU, stateful", stateful, (3, 2), **loops)
    row(
        "GRU, initial state",
        lambda: called((3, 2), lambda x: layers.GRU(1)(x, initial_state=layers.Dense(1)(x[:, 0]))),
        (3, 2),
        **loops,
    )
    for cell in (layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell):
        on((3, 2), f"{cell.__name__}, in RNN", lambda c=cell: layers.RNN(c(1)), **loops)
    on(
        (2, 1),
        "StackedRNNCells, in RNN",
        lambda: layers.RNN(layers.StackedRNNCells([layers.GRUCell(1), layers.SimpleRNNCell(1)])),
        **loops,
    )
    on((3, 2), "RNN, own cell", lambda: layers.RNN(Cell()), expected=LOOPS)
    on((3, 2), "RNN, own cell, unroll", lambda: layers.RNN(Cell(), unroll=True))
    on((2, 1), "Bidirectional, LSTM", lambda: layers.Bidirectional(layers.LSTM(1)), **loops)
    on((2, 1), "Bidirectional, GRU, unroll", lambda: layers.Bidirectional(layers.GRU(1, unroll=True)))
    for dims in (1, 2, 3):
        on((2, *[2] * dims, 1), f"ConvLSTM{dims}D", lambda d=dims: getattr(layers, f"ConvLSTM{d}D")(1, 1), **loops)
    on((2, 2, 1), "ConvLSTM1D, unroll", lambda: layers.ConvLSTM1D(1, 2, padding="same", unroll=True))
    on((2, 3), "TimeDistributed", lambda: layers.TimeDistributed(layers.Dense(2, "tanh")))
    on((2, 3, 1), "TimeDistributed, Conv1D", lambda: layers.TimeDistributed(layers.Conv1D(2, 2, activation="tanh")))

    # Preprocessing, as part of the network.
    inside((3,), "Rescaling", lambda: layers.Rescaling(0.5, 0.1))
    inside((3,), "Normalization", lambda: layers.Normalization(mean=[0.1, 0.2], variance=[1.0, 2.0]))
    row(
        "STFTSpectrogram",
        lambda: chain((8, 1), layers.Dense(2, "tanh"), layers.STFTSpectrogram(frame_length=4, mode="log")),
        (8, 1),
        is_slow=True,
    )
    row("MelSpectrogram", mel_spectrogram, (4,), dtype="float32", is_slow=True)
    inside((3,), "Pipeline", lambda: layers.Pipeline([layers.Rescaling(0.5), layers.Rescaling(2.0, 0.1)]))
    front = {"note": "Comes before all weights.", "ways": (AUTOMATIC,), "is_slow": True}
    on(
        (3,),
        "Discretization",
        lambda: layers.Discretization(bin_boundaries=[-0.5, 0.0, 0.5], output_mode="one_hot"),
        **front,
    )
    for name, part, x in (
        ("CategoryEncoding", lambda: layers.CategoryEncoding(3), integers(2)),
        ("IntegerLookup", lambda: layers.IntegerLookup(vocabulary=[0, 1, 2], output_mode="multi_hot"), integers(2)),
        ("Hashing", lambda: layers.Hashing(3, output_mode="multi_hot"), integers(2, below=9)),
    ):
        row(name, lambda part=part: chain((2,), part(), layers.Dense(2, "tanh")), x, **front)
    row("HashedCrossing", hashed_crossing, lambda rng: {name: integers(1)(rng) for name in "ab"}, **front)
    for name, vocabulary, x in (
        ("StringLookup", ["a", "b", "c"], words("a", "b", "c", "a")),
        ("TextVectorization", ["a", "b"], words("a b", "b", "c a", "a")),
    ):
        row(
            name,
            lambda n=name, v=vocabulary: of_strings(getattr(layers, n)(vocabulary=v, output_mode="multi_hot")),
            x,
            **front,
        )
    for name, options in IMAGES.items():
        row(
            name,
            lambda name=name, options=options: image(_IMAGE, getattr(layers, name)(**options)),
            positive(*_IMAGE),
            **front,
            is_random=name not in ("AutoContrast", "Equalization", "Solarization"),
            dtype="float32" if name in ("RandAugment", "RandomRotation") else "float64",
        )
    row("TFSMLayer", saved_and_loaded, (3,), expected=LOOPS, note="A SavedModel inside the network.")
    return rows


IMAGES = {
    "AutoContrast": {"value_range": (0, 1)},
    "ContrastLimitedAdaptiveHistogramEqualization": {"value_range": (0, 1)},
    "CutMix": {},
    "Equalization": {"value_range": (0, 1)},
    "MixUp": {},
    "RandAugment": {"value_range": (0, 1)},
    "RandomBrightness": {"factor": 0.5, "value_range": (0, 1)},
    "RandomColorDegeneration": {"factor": 0.5},
    "RandomColorJitter": {"value_range": (0, 1), "brightness_factor": 0.5},
    "RandomContrast": {"factor": 0.5, "value_range": (0, 1)},
    "RandomCrop": {"height": 3, "width": 3},
    "RandomElasticTransform": {},
    "RandomErasing": {},
    "RandomFlip": {},
    "RandomGaussianBlur": {"value_range": (0, 1)},
    "RandomGrayscale": {"factor": 0.5},
    "RandomHue": {"factor": 0.5, "value_range": (0, 1)},
    "RandomInvert": {"value_range": (0, 1)},
    "RandomPerspective": {},
    "RandomPosterization": {"factor": 4, "value_range": (0, 1)},
    "RandomRotation": {"factor": 0.5},
    "RandomSaturation": {"factor": 0.5, "value_range": (0, 1)},
    "RandomSharpness": {"factor": 0.5, "value_range": (0, 1)},
    "RandomShear": {"x_factor": 0.5, "y_factor": 0.5},
    "RandomTranslation": {"height_factor": 0.3, "width_factor": 0.3},
    "RandomZoom": {"height_factor": 0.3},
    "Solarization": {"value_range": (0, 1)},
}

# Classes without a row, each by the reason.
OUTSIDE = {
    "AugMix": "is a different function in every trace, because it uses Python's `random`; apply it in the data pipeline",
    "FlaxLayer": "holds a network of another framework",
    "JaxLayer": "holds a network of another framework",
    "TorchModuleWrapper": "holds a network of another framework",
    "MaxNumBoundingBoxes": "preprocessing of bounding boxes, outside the network",
}


def activations():
    """Names of the activations of Keras, aliases once."""
    found = {}
    for name, value in sorted(vars(keras.activations).items()):
        if inspect.isfunction(value) and name not in ("get", "serialize", "deserialize"):
            found.setdefault(value, name)
    return list(found.values())


def activated_dense(activation):
    """A dense layer with the activation, called with the arguments that it needs."""
    function = getattr(keras.activations, activation)
    if activation == "threshold":
        return layers.Dense(4, lambda x: function(x, 0.1, 0.0))
    if activation == "glu":  # halves its input, which `Dense` does not know
        return keras.Sequential([layers.Dense(4), layers.Lambda(function, output_shape=(2,))])
    return layers.Dense(4, function)


def low_rank_dense():
    """A `Dense` whose own weights are frozen by `enable_lora`."""
    part = layers.Dense(3, "tanh")
    part.build((None, 3))
    part.enable_lora(2)
    return part


class Scaled(layers.Layer):
    """Multiplies by a weight; `of` is what is made of the product."""

    def __init__(self, of=tf.tanh):
        super().__init__()
        self.of = of

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return self.of(x * self.scale)


class Wrapping(layers.Wrapper):
    """Calls the layer that it wraps."""

    def call(self, x):
        return self.layer(x) + x


class Cell(layers.Layer):
    """A recurrent cell of one unit."""

    state_size = 1

    def __init__(self):
        super().__init__()
        self.inputs, self.states = layers.Dense(1), layers.Dense(1)

    def build(self, shape):
        self.inputs.build(shape)
        self.states.build((None, 1))

    def call(self, x, states):
        state = tf.tanh(self.inputs(x) + self.states(states[0]))
        return state, [state]


def stateful():
    """A GRU that keeps its state between batches."""
    x = keras.Input(batch_shape=(NUM_CASES, 3, 2))
    return keras.Model(x, layers.Dense(1)(layers.GRU(1, stateful=True)(x)))


def reversed_embedding(tied):
    """A network that reads words from an embedding and writes them by it."""
    x = keras.Input((2,), dtype="int32")
    embedding = layers.ReversibleEmbedding(3, 2, tie_weights=tied)
    return keras.Model(x, embedding(layers.Dense(2, "tanh")(embedding(x)), reverse=True))


def mel_spectrogram():
    """A network on the means of a spectrogram, whose number of frames Keras does not know beforehand."""
    spectrogram = layers.MelSpectrogram(fft_length=4, sequence_stride=2, num_mel_bins=2)
    means = layers.Lambda(lambda x: tf.reduce_mean(x, -1), output_shape=(2,))
    return chain((4,), layers.Dense(6, "tanh"), spectrogram, means)


def hashed_crossing():
    """A network on the hashed pair of two features."""
    a, b = (keras.Input((1,), dtype="int64", name=name) for name in "ab")
    crossed = layers.HashedCrossing(4, output_mode="one_hot")((a, b))
    return keras.Model({"a": a, "b": b}, layers.Dense(1)(layers.Dense(2, "tanh")(crossed)))


def of_strings(part):
    """A network on strings."""
    x = keras.Input((1,), dtype="string")
    return keras.Model(x, layers.Dense(1)(layers.Dense(2, "tanh")(part(x))))


def saved_and_loaded():
    """A network that holds a saved one."""
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(2, "tanh")])
    with tempfile.TemporaryDirectory() as folder:
        inner.export(folder, verbose=False)
        return chain((3,), layers.TFSMLayer(folder), layers.Dense(2, "tanh"))


def of_constructs():
    """The rows of what a network may be made of beside layers."""
    rows = []

    def row(name, network, x=(3,), **rest):
        rows.append(Row(name, network, x, **rest))

    def computing(name, of, shape=(3,), **rest):
        """A layer that computes `of(product of its weight and its input)`."""
        row(name, lambda: between(shape, Scaled(of)), shape, **rest)

    def reading(name, call, **rest):
        """A layer that computes `call(layer, x)`, and reads its weight `layer.scale` there."""
        row(name, lambda: between((3,), Reading(call)), **rest)

    reading(
        "tf.cond",
        lambda self, x: tf.cond(tf.reduce_sum(x) > -9, lambda: tf.tanh(x * self.scale), lambda: x),
        expected=LOOPS,
    )
    reading(
        "keras.ops.cond",
        lambda self, x: keras.ops.cond(tf.reduce_sum(x) > -9, lambda: tf.tanh(x * self.scale), lambda: x),
        expected=LOOPS,
    )
    reading(
        "tf.switch_case",
        lambda self, x: tf.switch_case(tf.shape(x)[1] - 2, [lambda: tf.tanh(x * self.scale), lambda: x]),
        expected=LOOPS,
    )
    reading("tf.while_loop", while_loop, expected=LOOPS_NOT_XLA)
    reading(
        "keras.ops.fori_loop",
        lambda self, x: keras.ops.fori_loop(0, 2, lambda i, x: tf.tanh(x * self.scale), x),
        expected=LOOPS_NOT_XLA,
    )
    reading("tf.map_fn", lambda self, x: tf.map_fn(lambda case: tf.tanh(case * self.scale), x), expected=LOOPS)
    reading(
        "tf.scan",
        lambda self, x: tf.transpose(tf.scan(lambda carry, row: tf.tanh(carry * self.scale[0] + row), tf.transpose(x))),
        expected=LOOPS,
    )
    reading("keras.ops.scan", scan, expected=LOOPS_NOT_XLA)
    reading(
        "tf.vectorized_map",
        lambda self, x: tf.vectorized_map(lambda case: tf.tanh(case * self.scale), x),
        expected={FORWARD_XLA: REJECTED},
    )
    reading("nested tf.function", nested, expected=LOOPS)
    reading("nested tf.function, jit_compile", nested_under_xla, expected=LOOPS)
    computing("tf.where", lambda x: tf.where(x > 0, tf.tanh(x), x * x))
    computing("tf.custom_gradient", doubly_differentiable)
    computing(
        "tf.custom_gradient, straight through", straight_through, expected={FORWARD: REJECTED, FORWARD_XLA: REJECTED}
    )
    computing("tf.stop_gradient", lambda x: x * tf.stop_gradient(tf.tanh(x)))
    row("tf.recompute_grad", lambda: between((3,), Recomputing()), expected=everywhere(NO_SECOND))
    row("keras.RematScope", Rematerialized, expected=everywhere(UNEXPLAINED))
    row(
        "a derivative in its own input",
        lambda: between((3,), Differentiating()),
        note="As in physics-informed networks.",
    )
    row("two derivatives in its own input", lambda: between((3,), Differentiating(twice=True)))
    row("shared layer", shared, (2,))
    row("nested model", lambda: between((3,), keras.Sequential([keras.Input((2,)), layers.Dense(2, "tanh")])))
    row("frozen layer", frozen)
    row("subclassed model", Subclassed)
    row("several outputs", lambda: several_outputs(list), loss=["mse", "mse"])
    row("a dict of outputs", lambda: several_outputs(dict), loss={"a": "mse", "b": "mse"})
    row("an output without a loss", lambda: several_outputs(dict), loss={"a": "mse", "b": None})
    # Operations whose second derivatives are of their own kind.
    own = {"is_slow": True}
    computing("tf.sort", lambda x: tf.sort(x, -1) * x, **own)
    computing("tf.math.top_k", lambda x: tf.math.top_k(x, 1)[0], **own)
    computing("tf.cumsum, cumprod", lambda x: tf.cumsum(x, -1) + tf.math.cumprod(x, -1), **own)
    computing("tf.gather", lambda x: tf.gather(x, [1, 0, 0], axis=-1) * 2, **own)
    computing("tf.norm", lambda x: x / tf.norm(x, axis=-1, keepdims=True), **own)
    computing("tf.reduce_logsumexp", lambda x: x - tf.reduce_logsumexp(x, -1, keepdims=True), **own)
    computing("tf.linalg.cholesky, solve", solved, expected=NOT_XLA, **own)
    computing(
        "tf.linalg.svd",
        lambda x: tf.linalg.svd(x[:, None] * [[1.0], [2.0]] + [[1.0, 0.0], [0.0, 1.0]], compute_uv=False),
        **own,
    )
    computing("tf.signal.fft", lambda x: tf.abs(tf.signal.fft(tf.cast(x, tf.complex128))), **own)
    computing(
        "tf.math.segment_sum",
        lambda x: tf.reshape(tf.math.segment_sum(tf.transpose(x), [0, 0]), (-1, 1)),
        expected={FORWARD_XLA: NO_XLA},
        **own,
    )
    computing("tf.clip_by_value", lambda x: tf.clip_by_value(x, -0.5, 0.5), **own)
    computing("tf.math.igamma", lambda x: tf.math.igamma(tf.constant(2.0, x.dtype), x * x), **own)
    computing(
        "tf.nn.local_response_normalization",
        lambda x: tf.cast(tf.nn.lrn(tf.cast(x, tf.float32)[:, None, None]), x.dtype),
        expected=everywhere(NO_SECOND),
        **own,
    )
    return rows


class Reading(Scaled):
    """Computes `call(self, x)`."""

    def __init__(self, call):
        super().__init__()
        self._call = call

    def call(self, x):
        return self._call(self, x)


def while_loop(self, x):
    """Applies the layer's weight twice."""
    return tf.while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, tf.tanh(x * self.scale)), (0, x))[1]


def scan(self, x):
    """Goes over the inputs with the layer's weight."""

    def step(carry, row):
        carry = tf.tanh(carry * self.scale[0] + row)
        return carry, carry

    return tf.transpose(keras.ops.scan(step, x[:, 0], tf.transpose(x))[1])


def nested(self, x):
    """Reads the layer's weight in a function of its own."""
    if not hasattr(self, "nested"):
        self.nested = tf.function(lambda x: tf.tanh(x * self.scale))
    return self.nested(x)


def nested_under_xla(self, x):
    """Reads the layer's weight in a function of its own, under XLA."""
    if not hasattr(self, "nested"):
        self.nested = tf.function(lambda x: tf.tanh(x * self.scale), jit_compile=True)
    return self.nested(x)


@tf.custom_gradient
def doubly_differentiable(x):
    """The hyperbolic tangent, with its derivative by hand."""
    return tf.tanh(x), lambda upstream: upstream * (1 - tf.tanh(x) ** 2)


@tf.custom_gradient
def straight_through(x):
    """The sign, with the derivative of the identity."""
    return tf.sign(x), lambda upstream: upstream


def solved(x):
    """Solves with a matrix made of the input."""
    square = tf.eye(2, dtype=x.dtype) + x[:, :, None] * x[:, None, :]
    return tf.linalg.cholesky_solve(tf.linalg.cholesky(square), x[..., None])


class Recomputing(Scaled):
    """Multiplies by a weight under `tf.recompute_grad`."""

    def call(self, x):
        return tf.recompute_grad(lambda x: tf.tanh(x * self.scale))(x)


class Rematerialized(keras.Model):
    """A model whose hidden layer is made under `keras.RematScope`."""

    def __init__(self):
        super().__init__()
        with keras.RematScope(mode="full"):
            self.hidden = layers.Dense(2, "tanh")
        self.head = layers.Dense(1)

    def call(self, x):
        return self.head(self.hidden(x))


class Differentiating(layers.Layer):
    """Adds to a small network of its input that network's derivative, or second derivative, in the input."""

    def __init__(self, twice=False):
        super().__init__()
        self.hidden, self.twice = layers.Dense(2, "tanh"), twice

    def build(self, shape):
        self.hidden.build(shape)

    def call(self, x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                u = tf.reduce_sum(self.hidden(x), -1, keepdims=True)
            of_x = tape.gradient(u, x)
        return u + (outer.gradient(of_x, x) if self.twice else of_x)


def shared():
    """A network that calls one layer twice."""
    x, hidden = keras.Input((2,)), layers.Dense(2, "tanh")
    return keras.Model(x, layers.Dense(1)(hidden(hidden(x))))


def frozen():
    """A network whose first layer is not trained."""
    network = chain((3,), layers.Dense(2, "tanh"), layers.Dense(2, "tanh"))
    network.layers[0].trainable = False
    return network


class Subclassed(keras.Model):
    """A model that calls its layers itself."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = layers.Dense(2, "tanh"), layers.Dense(1)

    def call(self, x):
        hidden = self.hidden(x)
        return self.head(hidden * hidden)


def several_outputs(kind):
    """A network with two outputs of different sizes."""
    x = keras.Input((3,))
    hidden = layers.Dense(2, "tanh")(x)
    a, b = layers.Dense(1, name="a")(hidden), layers.Dense(2, name="b")(hidden)
    return keras.Model(x, [a, b] if kind is list else {"a": a, "b": b})


def of_losses():
    """The rows of `keras.losses`, on a network 2-4-3."""
    rows = []
    losses = keras.losses

    def row(name, loss, y, activation=None, **rest):
        """The loss is cut at the activation's argument if `through_logits`, and at its value if not."""
        # The ways differ in the network's derivatives: variants of a loss are measured without XLA.
        ways = (AUTOMATIC, DOUBLE, FORWARD) if "," in name else tuple(WAYS)
        rows.append(Row(name, lambda: for_losses(activation), (2,), loss=loss, y=y, ways=ways, **rest))

    def both(name, loss, y, activation, logits=True):
        """From logits, and from probabilities: through the logits, unless the loss looks at the probabilities themselves, or `"both"`."""
        row(f"{name}, from logits", lambda: loss(from_logits=True), y)
        through = "both" if logits == "both" else activation if logits else ""
        row(f"{name}, from {activation}", loss, y, activation, through_logits=through)

    def smoothed(loss):
        return lambda **arguments: loss(label_smoothing=0.1, **arguments)

    for name, y, activation in (
        ("BinaryCrossentropy", bits, "sigmoid"),
        ("CategoricalCrossentropy", one_hot, "softmax"),
    ):
        loss = getattr(losses, name)
        both(name, loss, y, activation)
        both(f"{name}, label_smoothing", smoothed(loss), y, activation)
        # Keras divides these of several classes by their sum.
        row(f"{name}, from other outputs", loss, y, inner_probabilities, is_indefinite=activation == "softmax")
    both("BinaryFocalCrossentropy", losses.BinaryFocalCrossentropy, bits, "sigmoid", logits="both")
    both(
        "BinaryFocalCrossentropy, label_smoothing",
        smoothed(losses.BinaryFocalCrossentropy),
        bits,
        "sigmoid",
        logits="both",
    )
    row("BinaryFocalCrossentropy, from other outputs", losses.BinaryFocalCrossentropy, bits, inner_probabilities)
    both("CategoricalFocalCrossentropy", losses.CategoricalFocalCrossentropy, one_hot, "softmax", logits=False)
    both(
        "CategoricalFocalCrossentropy, label_smoothing",
        smoothed(losses.CategoricalFocalCrossentropy),
        one_hot,
        "softmax",
        logits=False,
    )
    both("SparseCategoricalCrossentropy", losses.SparseCategoricalCrossentropy, labels, "softmax")
    both(
        "SparseCategoricalCrossentropy, ignore_class",
        lambda **rest: losses.SparseCategoricalCrossentropy(ignore_class=1, **rest),
        labels,
        "softmax",
        logits=False,
    )
    row("CategoricalGeneralizedCrossEntropy", losses.CategoricalGeneralizedCrossEntropy, labels, "softmax")
    row("MeanSquaredError", losses.MeanSquaredError, reals)
    row("MeanSquaredError, on sigmoid", losses.MeanSquaredError, bits, "sigmoid")
    row("MeanSquaredLogarithmicError", losses.MeanSquaredLogarithmicError, bits, "softplus")
    row("Huber", lambda: losses.Huber(delta=0.5), reals)
    row("LogCosh", losses.LogCosh, reals)
    row("Poisson", losses.Poisson, bits, "softplus")
    row("KLDivergence", losses.KLDivergence, probabilities, "softmax")
    row("CosineSimilarity", losses.CosineSimilarity, reals, is_indefinite=True)
    row("Dice", losses.Dice, bits, "sigmoid", is_indefinite=True, warning="cannot be put together")
    row("Dice, axis", lambda: losses.Dice(axis=-1), bits, "sigmoid", is_indefinite=True)
    row("Tversky", losses.Tversky, bits, "sigmoid", is_indefinite=True, warning="cannot be put together")
    row("SquaredHinge", losses.SquaredHinge, signs)
    row(
        "Circle",
        lambda: losses.Circle(gamma=2.0),
        pairs,
        "sigmoid",
        is_indefinite=True,
        is_slow=True,
        warning="cannot be put together",
    )
    row(
        "Circle, a class with one case",
        lambda: losses.Circle(gamma=2.0),
        labels,
        "sigmoid",
        warning="cannot be put together",
        expected=everywhere(NOT_A_NUMBER),
    )
    for name, y in (
        ("MeanAbsoluteError", reals),
        ("MeanAbsolutePercentageError", reals),
        ("Hinge", signs),
        ("CategoricalHinge", one_hot),
    ):
        row(name, getattr(losses, name), y, expected=everywhere(FLAT), warning="no curvature|no second derivative")
    row("Loss, subclassed", lambda: Quartic(), reals)
    row("Loss, a function, (N,)", lambda: by_case, reals)
    row("Loss, a function, (N, T)", lambda: by_output, reals)
    row("Loss, a function, scalar", lambda: of_all, reals, warning="cannot be put together")
    for reduction in ("sum_over_batch_size", "sum", "mean", "mean_with_sample_weight"):
        row(f"MeanSquaredError, {reduction}", lambda r=reduction: losses.MeanSquaredError(reduction=r), reals)
        row(
            f"MeanSquaredError, {reduction}, weighted",
            lambda r=reduction: losses.MeanSquaredError(reduction=r),
            reals,
            sample_weight=case_weights,
        )
    for reduction in ("sum_over_batch_size", "sum"):
        loss = lambda r=reduction: losses.MeanSquaredError(reduction=r)  # noqa: E731
        rows.append(Row(f"MeanSquaredError, {reduction}, masked", masked, ragged, loss=loss, y=sequences))
    rows.append(Row("CTC", for_ctc, (4, 2), loss=losses.CTC, y=integers(2, first=1), expected=everywhere(NO_SECOND)))
    return rows


def for_losses(activation):
    """The network 2-4-3 of a loss' row, its last layer the activation."""
    return keras.Sequential(
        [keras.Input((2,)), layers.Dense(4, "tanh"), layers.Dense(3), layers.Activation(activation or "linear")]
    )


def for_ctc():
    """A network that labels sequences."""
    return keras.Sequential([keras.Input((4, 2)), layers.Dense(3, "tanh"), layers.Dense(3)])


def sequences(rng):
    """Targets of sequences."""
    return rng.normal(size=(NUM_CASES, 3, 1))


def masked():
    """A network whose outputs carry a mask, which weighs the loss."""
    return keras.Sequential([keras.Input((3, 2)), layers.Masking(), layers.Dense(2, "tanh"), layers.Dense(1)])


def inner_probabilities(x):
    """Probabilities that Keras finds no logits of."""
    return 0.1 + 0.2 * tf.sigmoid(x)


class Quartic(keras.losses.Loss):
    """The fourth power of errors."""

    def call(self, y, y_pred):
        return tf.reduce_mean((y - y_pred) ** 4, -1)


def by_case(y, y_pred):
    """One value a case."""
    return tf.reduce_sum((y - y_pred) ** 4, -1)


def by_output(y, y_pred):
    """One value an output of a case."""
    return (y - y_pred) ** 4


def of_all(y, y_pred):
    """One value for all cases."""
    return tf.reduce_mean((y - y_pred) ** 4) ** 2


def reals(rng):
    """Targets of regression."""
    return rng.normal(size=(NUM_CASES, 3))


def bits(rng):
    """Targets 0 or 1."""
    return rng.integers(0, 2, size=(NUM_CASES, 3)).astype("float64")


def signs(rng):
    """Targets -1 or 1."""
    return 2 * bits(rng) - 1


def labels(rng):
    """Classes."""
    return np.array([0, 1, 2, 1])


def pairs(rng):
    """Classes of two cases each."""
    return np.array([0, 1, 0, 1])


def one_hot(rng):
    """Classes, one-hot."""
    return np.eye(3)[labels(rng)]


def probabilities(rng):
    """Distributions over three classes."""
    return rng.dirichlet(np.ones(3), size=NUM_CASES)


def case_weights(rng):
    """Weights of cases."""
    return rng.uniform(0.5, 2, size=NUM_CASES)


# Measuring.


class DenseJacobian(Curvature):
    """The oracle for networks that draw random numbers: `J'HJ` of the mean squared error, J by `GradientTape.jacobian` of the piece itself."""

    def fitted_to(self, structure, num_replicas=1):
        return self

    def linearize(self, piece):
        with tf.GradientTape(persistent=True) as tape:
            output = tf.concat([tf.reshape(output, [-1]) for output in piece.forward().outputs], 0)
        j = tape.jacobian(output, piece.variables, experimental_use_pfor=False, unconnected_gradients="zero")
        size = tf.cast(tf.size(output), output.dtype)

        def product(v):
            tangent = tf.add_n([tf.tensordot(part, u, u.shape.rank) for part, u in zip(j, v, strict=True)])
            return [tf.tensordot(2 / size * tangent, part, 1) for part in j]

        return product


@contextlib.contextmanager
def precision(dtype):
    """Makes this dtype Keras' default while it is open."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


class Measured(NamedTuple):
    """What was measured of a row.

    Attributes:
        outcomes: Dict, way -> `Outcome`.
        remarks: Dict, way -> what came, in words.
        is_indefinite: Whether the matrix has negative eigenvalues.
    """

    outcomes: dict
    remarks: dict
    is_indefinite: bool


def measure(row, ways=None):
    """Measures a row.

    Args:
        row: `Row`.
        ways: Some of the row's; all where `None`.

    Returns:
        A `Measured`.
    """
    ways = row.ways if ways is None else ways
    outcomes, remarks, expected, chosen = {}, {}, None, []
    with precision(row.dtype):
        try:
            model, data = prepare(row)
        except Exception as error:  # whatever comes is what the cells say
            return Measured(*(dict.fromkeys(ways, what) for what in refused(error)), False)
        for way in ways:
            if way == AUTOMATIC and len(ways) > 1:
                continue  # one of the others
            try:
                product = matrix(model, data, GaussNewton(WAYS[way]), chosen)
            except Exception as error:
                outcomes[way], remarks[way] = refused(error)
                continue
            if expected is None:
                expected = (
                    matrix(model, data, DenseJacobian(DoubleBackward())) if row.is_random else oracle(row, model, data)
                )
            outcomes[way], remarks[way] = compared(product, expected, row.dtype)
            if outcomes[way] is WRONG and is_rejected(model, data, GaussNewton(WAYS[way])):
                outcomes[way] = REJECTED
    if AUTOMATIC in ways and len(ways) > 1:
        way = chosen[-1] if chosen else DOUBLE
        outcomes[AUTOMATIC], remarks[AUTOMATIC] = outcomes[way], way
    is_indefinite = False
    if expected is not None and np.isfinite(expected).all():
        values = np.linalg.eigvalsh(expected.astype("float64"))
        is_indefinite = bool(values[0] < -1e-4 * values[-1])
    return Measured(outcomes, remarks, is_indefinite)


def refused(error):
    """The `Outcome` of an exception, and its words."""
    outcome = next(o for o in OUTCOMES if o.error and isinstance(error, o.error) and re.search(o.match, str(error)))
    return outcome, f"{type(error).__name__}: {error}"


def compared(product, expected, dtype):
    """Holds a matrix of products against the oracle's; returns an `Outcome` and the largest error, relative to the largest entry."""
    if not np.isfinite(product).all():
        return NOT_A_NUMBER, "not finite"
    largest = np.abs(expected).max()
    if largest == 0:
        return (WRONG if product.any() else FLAT), f"{np.abs(product).max():.0e} where the oracle is zero"
    error = np.abs(product - expected).max() / largest
    return (RIGHT if error < TOLERANCES[dtype] else WRONG), f"{error:.0e}"


def is_rejected(model, data, curvature):
    """Whether an update sees that products are wrong, by that of the gradient."""
    model.optimizer.curvature = curvature

    def error(objective):
        gradient = objective.loss_and_gradient().gradient
        return tf.reduce_max(objective.product(model._choice.curvature).errors(gradient)) > objective.rounding

    return bool(with_objective(model, data, error))


def prepare(row):
    """Makes the model of a row, with weights that are neither zero nor symmetric, and the data."""
    keras.utils.set_random_seed(1234)
    rng = np.random.default_rng(5)
    network = row.network()
    model = compiled(network, row.loss() if callable(row.loss) else row.loss)
    x = row.x(rng) if callable(row.x) else rng.normal(size=(NUM_CASES, *row.x))
    x = keras.tree.map_structure(
        lambda leaf: tf.cast(leaf, row.dtype) if leaf.dtype == "float64" else tf.convert_to_tensor(leaf), x
    )
    outputs = network(x)
    y = row.y(rng) if row.y else keras.tree.map_structure(lambda output: rng.normal(size=output.shape), outputs)
    data = model_data(model, x, y, row.sample_weight and row.sample_weight(rng))
    for weight in network.trainable_weights:
        weight.assign(rng.normal(scale=0.7, size=weight.shape))
    return model, data


def dense_matrix(product, num_weights, dtype):
    """The matrix of a product."""
    return tf.transpose(tf.map_fn(product, tf.eye(num_weights, dtype=dtype)))


def matrix(model, data, curvature, chosen=None):
    """The matrix of the curvature's products, from a function that was traced for any number of cases, as `fit` traces it.

    The list `chosen` is given the way that the package would choose by itself.
    """
    leaves = [leaf for leaf in tf.nest.flatten(tuple(data)) if leaf is not None]
    signature = [tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype) for leaf in leaves]
    # One piece: what is linearized is the same in every further piece.
    model.optimizer.curvature_batch_size = model.optimizer.micro_batch_size = NUM_CASES
    model.optimizer.curvature = curvature

    def of(objective, structure):
        if chosen is not None:
            way = GaussNewton().fitted_to(structure).linearization
            chosen.append(
                next(
                    name
                    for name, given in WAYS.items()
                    if given and given.get_config() == way.get_config() and type(given) is type(way)
                )
            )
        return dense_matrix(objective.product(model._choice.curvature), objective.num_weights, objective.dtype)

    @tf.function(autograph=False, input_signature=signature)
    def compute(*given):
        given = iter(given)
        cases = [None if leaf is None else next(given) for leaf in tf.nest.flatten(tuple(data))]
        cases = Data(*tf.nest.pack_sequence_as(tuple(data), cases))
        return model._with_objective(cases, of)

    return compute(*leaves).numpy()


def oracle(row, model, data):
    """The dense matrix of a row, `(n, n)`, by another road than the package: first derivatives by `GradientTape.jacobian`, eagerly.

    Nothing that the pass would change is changed: batch statistics and the like stay as the package finds them.
    """
    variables = [variable.value for variable in model.trainable_variables]
    j = first_derivative(row, model, data)
    return j.T @ loss_hessian(row, model, data) @ j + second_derivative(lambda: _added_loss(model, data), variables)


def first_derivative(row, model, data):
    """The derivative in the weights of the tensor that a row's loss is cut at, made flat."""
    variables = [variable.value for variable in model.trainable_variables]
    return jacobian(lambda: _flat(_cut_tensors(row, model, data)), variables)


def numerical_derivative(row, model, data, width=1e-6):
    """`first_derivative` by central differences."""
    columns = []
    for variable in model.trainable_variables:
        value = variable.numpy()
        for i in range(value.size):
            ends = []
            for step in (width, -width):
                moved = value.copy()
                moved.flat[i] += step
                variable.assign(moved)
                ends.append(_flat(_cut_tensors(row, model, data)).numpy())
            columns.append((ends[0] - ends[1]) / (2 * width))
        variable.assign(value)
    return np.stack(columns, 1)


def loss_hessian(row, model, data):
    """The second derivative of a row's loss in the tensor that it is cut at, made flat."""
    if callable(row.loss):
        loss, cut = loss_at(row, model, data)
        cut = tf.Variable(cut)
        return second_derivative(lambda: loss(cut), [cut])
    # Means of squares, one an output.
    losses = keras.tree.flatten(row.loss) if isinstance(row.loss, list | dict) else [row.loss]
    sizes = [int(tf.size(leaf)) for leaf in _cut_tensors(row, model, data)]
    return np.diag(
        np.concatenate([np.full(size, 2 / size if loss else 0.0) for size, loss in zip(sizes, losses, strict=True)])
    )


def loss_at(row, model, data):
    """The Keras loss as a function, eagerly, of the tensor that it is cut at; and that tensor."""
    cuts = _cut_tensors(row, model, data)
    mask, loss = getattr(cuts[0], "_keras_mask", None), row.loss()
    if row.through_logits == "both":
        shape, size = cuts[0].shape, int(tf.size(cuts[0]))

        def of_both(cut):
            y_pred, logits = tf.reshape(cut[:size], shape), tf.reshape(cut[size:], shape)
            y_pred._keras_logits = logits
            return loss(data.y, y_pred, data.sample_weight)

        return of_both, _flat(cuts)
    (cut,) = cuts

    def of(cut):
        # Not Keras' activations, from whose outputs its losses find the logits.
        y_pred = {"": tf.identity, "sigmoid": tf.sigmoid, "softmax": tf.nn.softmax}[row.through_logits](cut)
        y_pred._keras_mask = mask
        if isinstance(loss, keras.losses.Loss):
            return loss(data.y, y_pred, data.sample_weight)
        return tf.reduce_mean(loss(data.y, y_pred))

    return of, cut


def second_derivative(function, variables):
    """The dense second derivative of a scalar function of variables."""
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            value = function()
        gradients = inner.gradient(value, variables, unconnected_gradients="zero")
        gradient = _flat([tf.convert_to_tensor(g) for g in gradients])
    rows = outer.jacobian(gradient, variables, experimental_use_pfor=False, unconnected_gradients="zero")
    return np.concatenate([row.numpy().reshape(len(gradient), -1) for row in rows], 1)


def _cut_tensors(row, model, data):
    network = model.network
    with keras.StatelessScope():
        if row.through_logits:
            y_pred = data.x
            for layer in network.layers[:-1]:
                y_pred = layer(y_pred)
            if row.through_logits == "both":
                y_pred = [network.layers[-1](y_pred), y_pred]
        else:
            y_pred = model(data.x, training=True)
    return keras.tree.flatten(y_pred)


def _added_loss(model, data):
    with keras.StatelessScope(collect_losses=True) as scope:
        model(data.x, training=True)
    return tf.add_n(scope.losses) if scope.losses else tf.zeros([], keras.backend.floatx())


def _flat(tensors):
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)


# An older Keras lacks some.
LAYERS = [row for row in of_layers() if hasattr(layers, row.covers)]
CONSTRUCTS = of_constructs()
LOSSES = [row for row in of_losses() if hasattr(keras.losses, row.covers)]
ALL_ROWS = LAYERS + CONSTRUCTS + LOSSES
ROWS = {row.name: row for row in ALL_ROWS}


def classes(module, base):
    """The classes of a module of Keras that are `base` or derived of it, by the name of each, aliases once."""
    found = {value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, base)}
    names = {
        value: name
        for name, value in sorted(vars(module).items(), reverse=True)
        if inspect.isclass(value) and value in found
    }
    return sorted(value.__name__ if hasattr(module, value.__name__) else name for value, name in names.items())


# The docs.


def document(measured):
    """Writes docs/support.md.

    Args:
        measured: Dict, name of a row -> pair (dict way -> `Outcome`, whether the matrix is indefinite).

    Returns:
        The text.
    """
    seen = {outcome for outcomes, _ in measured.values() for outcome in outcomes.values()}
    legend = [f"| {outcome.name} | {outcome.meaning} |" for outcome in OUTCOMES if outcome in seen]
    parts = [
        HEAD.format(keras=keras.__version__, tensorflow=tf.__version__),
        "| cell | meaning |\n| --- | --- |",
        *legend,
    ]
    for title, rows in (("Layers", LAYERS), ("Constructs", CONSTRUCTS), ("Losses", LOSSES)):
        parts += [f"\n## {title}\n", f"| | {' | '.join(WAYS)} | |", f"| --- |{' --- |' * len(WAYS)} --- |"]
        for row in rows:
            outcomes, is_indefinite = measured[row.name]
            notes = [row.note] if row.note else []
            notes += ["In float32: there is no float64 kernel."] if row.dtype == "float32" else []
            notes += ["Indefinite."] if is_indefinite else []
            notes += ["In one piece."] if row.warning == "cannot be put together" else []
            parts.append(
                f"| {row.name} | {' | '.join(outcomes[way].name if way in outcomes else '' for way in WAYS)} | {' '.join(notes)} |"
            )
    parts += [
        "\n## Without a row\n",
        "| | |\n| --- | --- |",
        *(f"| {name} | {reason} |" for name, reason in OUTSIDE.items()),
    ]
    return "\n".join(parts) + "\n"


def by_the_table():
    """What the table says should be measured: the argument of `document`."""
    return {row.name: (row.outcomes, row.is_indefinite) for row in ROWS.values()}


HEAD = """# What works with which layer and loss

Gauss-Newton products of small networks (a few dozen weights each), compared with dense matrices in float64.
Keras {keras}, TensorFlow {tensorflow}, CPUs. This is the table of `tests/support.py`; the slow tests measure every cell again.

The columns are the ways to differentiate: `GaussNewton()`, which chooses automatically, then `GaussNewton(DoubleBackward())` and so on; XLA means
`jit_compile=True`. A row is a layer of Keras, or a variant of one, in a network with dense layers and the mean squared error; a construct that a
layer uses; or a loss. *Indefinite*: the loss is not convex in the network's outputs, and the matrix is not positive semi-definite. *In one piece*:
the loss of a batch does not follow from the losses of its parts; `fit` warns and takes the batch as one piece, and `DirectSolver` refuses the loss. A
blank cell was not measured.
"""


def main():
    """Measures all and writes the docs."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    warnings.simplefilter("ignore", UserWarning)  # the tests see to the package's
    measured = {}
    for row in ROWS.values():
        found = measure(row)
        measured[row.name] = found.outcomes, found.is_indefinite
        for way, outcome in found.outcomes.items():
            if outcome != row.outcomes[way]:
                print(f"{row.name}, {way}: {outcome.name} ({found.remarks[way][:300]})")
    DOCS.parent.mkdir(exist_ok=True)
    DOCS.write_text(document(measured))


if __name__ == "__main__":
    main()
