"""The support matrix: which layers, constructs and losses of Keras have right Gauss-Newton products, in every way to differentiate.

One row a layer, variant or loss; `test_support.py` measures each against a dense oracle. `PYTHONPATH=. python tests/support.py` writes them to
docs/support.md.
"""

import inspect
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import oracles
import tensorflow as tf
from keras import layers
from oracles import NUM_CASES

from examples.precision import precision
from keras_hf import DoubleBackward, ForwardAccumulation, GaussNewton

# Sums of a dozen terms, whose rounding is 1e-16 of them in float64 and 1e-7 in float32: what is wrong is wrong in the first digits.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5}
DOCS = Path(__file__).parents[1] / "docs" / "support.md"

WAYS = {
    "DoubleBackward": GaussNewton(DoubleBackward()),
    "ForwardAccumulation": GaussNewton(ForwardAccumulation()),
}
DOUBLE, FORWARD = WAYS

# The cells of the table, which docs/support.md explains.
RIGHT, WRONG, FLAT, NOT_A_NUMBER, REJECTED = "right", "**wrong**", "no curvature", "NaN, rejected", "rejected"
NESTED, NO_SECOND, UNEXPLAINED = "refused", "no second derivative", "TensorFlow's error"
# What the error says that comes instead of a product, the more special first.
ERRORS = {
    NESTED: "ValueError: `ForwardAccumulation` gives wrong products",
    NO_SECOND: "ValueError: .*has no second derivative",
    UNEXPLAINED: "",
}


def everywhere(cell):
    """The same in both ways."""
    return dict.fromkeys(WAYS, cell)


LOOPS = {FORWARD: NESTED}
# Classes and constructs that do what another one does, but for the function of an entry or the way entries are put together.
ALIKE = {
    *("Activation", "ELU", "Identity", "InputLayer", "Lambda", "LeakyReLU", "Pipeline", "PReLU", "Rescaling"),
    *("Average", "Concatenate", "Minimum", "Multiply", "Subtract", "Flatten", "Permute", "RepeatVector"),
    *("AdaptiveAveragePooling2D", "AdaptiveMaxPooling2D", "GlobalAveragePooling2D", "GlobalMaxPooling2D"),
    *("CenterCrop", "Cropping2D", "AlphaDropout", "GaussianDropout", "GaussianNoise", "SpatialDropout2D"),
    *("GroupNormalization", "RMSNormalization", "UnitNormalization"),
    *("AdditiveAttention", "DepthwiseConv2D", "GroupQueryAttention", "RNN", "a derivative in its own input"),
    *("keras.ops.cond", "keras.ops.fori_loop", "keras.ops.scan", "tf.switch_case", "a dict of outputs"),
    *("CategoricalFocalCrossentropy", "CategoricalGeneralizedCrossEntropy", "CategoricalHinge", "Hinge"),
    *("KLDivergence", "LogCosh", "MeanAbsolutePercentageError", "MeanSquaredLogarithmicError", "Poisson"),
    *("SquaredHinge", "Tversky"),
}


class Row(NamedTuple):
    """One line of the table."""

    name: str  # Class of Keras or construct, then what sets the variant apart.
    x: object  # Shape of one case, filled with normal numbers, or callable `(rng) -> x`.
    network: Callable  # Symbolic x -> outputs of the network, or the network itself.
    expected: dict = {}  # Way -> cell, where it is not `RIGHT`; `None` where it is not measured.
    note: str = ""  # For the docs.
    loss: object = "mse"  # For `compile`, or callable without arguments named `<lambda>` that makes it.
    y: Callable | None = None  # `(rng) -> y`; normal numbers shaped as the output where `None`.
    sample_weight: Callable | None = None  # As y, or `None`.
    through_logits: str = (
        ""  # The last layer, an activation, at whose argument the loss is cut, or "both": there and at its value.
    )
    warning: str | None = None  # Regular expression of the warning that the package gives.
    is_random: bool = False  # Whether the network draws random numbers, which the oracle then shares with the package.
    floatx: str = "float64"  # Of weights and losses; "float32" for layers that have no float64 kernel.
    is_slow: bool = False  # Whether a cell takes seconds, or others of its kind stand for it.
    is_indefinite: bool = False  # Whether the loss is not convex in what it is cut at.

    @property
    def cells(self):
        """Dict, way that is measured -> what is expected."""
        return {way: cell for way, cell in (everywhere(RIGHT) | self.expected).items() if cell}

    @property
    def covers(self):
        """Name of the class of Keras, or of the construct, that this is about."""
        return self.name.split(",")[0]


# How rows are made: networks of a few dozen weights, with one or two outputs.


def head(x):
    """The last layer of most networks."""
    return layers.Dense(1)(layers.Flatten()(x))


def mean(x):
    """A last layer that heeds masks."""
    return layers.Dense(1)(layers.GlobalAveragePooling1D()(x))


def hidden(x):
    """A layer with weights, beside the one that is asked about."""
    return layers.Dense(2, "tanh")(x)


def row(name, x, body, after=head, **fields):
    """The row of a network of a body and what comes after."""
    return Row(name, x, lambda inputs: after(body(inputs)), **fields)


def on(name, x, *arguments, of=None, before=lambda x: x, after=head, **options):
    """The row of a layer on data: of the class that the name begins with.

    Options that are fields of `Row` are the row's, the others the layer's; `of` makes its first argument.
    """
    fields = {field: options.pop(field) for field in Row._fields if field in options}
    make = lambda: getattr(layers, name.split(",")[0])(*([of()] if of else []), *arguments, **options)  # noqa: E731
    return row(name, x, lambda inputs: make()(before(inputs)), after, **fields)


behind = partial(on, before=hidden)
merging = partial(on, before=lambda x: [hidden(x), layers.Dense(2, "sigmoid")(x)])
attending = partial(on, x=(3, 2), before=lambda x: [layers.Dense(2)(x), layers.Dense(2)(x)])


def computing(name, function, **fields):
    """The row of a layer that computes `function(x, w)` of its inputs and its weight."""
    return row(name, (3,), lambda x: Own(function)(hidden(x)), **fields)


def around(name, function, **fields):
    """The row of a layer that computes `function(x, layer)` of its inputs and a layer that it wraps."""
    return row(name, (3,), lambda x: Around(layers.Dense(2, "tanh"), function)(hidden(x)), **fields)


class Own(layers.Layer):
    """Computes `function(x, w)` of its inputs and its weight."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return self.function(x, self.scale)


class Around(layers.Wrapper):
    """Computes `function(x, layer)` of its inputs and a layer of its own."""

    def __init__(self, layer, function):
        super().__init__(layer)
        self.function = function

    def call(self, x):
        return self.function(x, self.layer)


def integers(*shape, below=3, first=0):
    """Makes inputs of whole numbers."""
    return lambda rng: rng.integers(first, below, size=(NUM_CASES, *shape))


def strings(*cases):
    """Makes inputs of strings."""
    return lambda rng: tf.constant(cases)[:, None]


def ragged(rng):
    """Makes sequences (4, 3, 2) padded by zeros."""
    x = rng.normal(size=(NUM_CASES, 3, 2))
    x[0, 2:] = x[1, 1:] = 0
    return x


# Layers.


def of_activations():
    """The rows of the activations of Keras, aliases once."""
    functions = sorted(vars(keras.activations).items(), reverse=True)
    names = {function: name for name, function in functions if inspect.isfunction(function)}.values()
    threshold = partial(keras.activations.threshold, threshold=0.1, default_value=0.0)
    for name in sorted(set(names) - {"get", "serialize", "deserialize"}):
        # `Dense` does not know that `glu` halves its input.
        after = (lambda x: head(layers.Lambda(keras.activations.glu, output_shape=(2,))(x))) if name == "glu" else head
        activation = {"glu": None, "threshold": threshold}.get(name, name)
        expected = everywhere(NO_SECOND) if name == "softsign" else {}
        yield behind(f"Dense, {name}", (3,), 4, activation, after=after, expected=expected)


def written_and_read(x, **options):
    """Words that are read from an embedding and written by it."""
    embedding = layers.ReversibleEmbedding(3, 2, **options)
    return embedding(hidden(embedding(x)), reverse=True)


def of_convolutions(dims, size):
    """The rows of convolutions in some dimensions, and of their transposes."""
    name, small, options = f"Conv{dims}D", [2] * dims, {"kernel_size": 2, "activation": "tanh"}
    yield on(name, (*size, 2), 2, **options)
    yield on(f"{name}, same, strides", (*size, 1), 2, strides=2, padding="same", **options)
    yield on(f"{name}, dilation", (*size, 1), 2, dilation_rate=2, padding="same", **options)
    yield on(f"{name}, groups", (*size, 2), 2, groups=2, expected=LOOPS, **options)
    yield on(f"{name}Transpose", (*small, 2), 1, **options)
    yield on(f"{name}Transpose, same, strides", (*small, 1), 1, strides=2, padding="same", **options)


def of_depthwise_convolutions(name, size, **options):
    """The rows of convolutions whose channels are apart."""
    options |= {"x": (*size, 2), "kernel_size": 2, "activation": "tanh"}
    yield on(name, **options)
    yield on(f"{name}, same, strides", strides=2, padding="same", **options)
    yield on(f"{name}, dilation", dilation_rate=2, padding="same", **options)
    yield on(f"{name}, depth_multiplier", depth_multiplier=2, **options)


def of_pools(dims, size):
    """The rows of pools in some dimensions, and of layers that repeat, add and cut places."""
    shape, floatx = (*size, 2), "float32" if dims == 3 else "float64"
    # By `ForwardAccumulation` the three-dimensional maximum is wrong in one run and right in the next: which buffer TensorFlow writes its second
    # derivative to depends on what other threads still hold.
    adaptive = {DOUBLE: REJECTED, FORWARD: None} if dims == 3 else {}
    for kind, *expected in (("Max", {DOUBLE: REJECTED}, adaptive), ("Average", {}, {})):
        name = f"{kind}Pooling{dims}D"
        yield behind(name, shape, 2, floatx=floatx)
        yield behind(f"{name}, overlapping", shape, 2, 1, floatx=floatx)
        yield behind(f"{name}, same, overlapping", shape, 2, 1, "same", floatx=floatx, expected=expected[0])
        yield behind(f"Global{name}", shape)
        yield behind(f"Adaptive{name}", shape, 2, floatx=floatx, expected=expected[1])
    yield behind(f"UpSampling{dims}D", shape)
    yield behind(f"ZeroPadding{dims}D", shape)
    yield behind(f"Cropping{dims}D", (*(n + 1 for n in size), 2))


class Cell(layers.Layer):
    """A recurrent cell of one unit."""

    state_size = 1

    def __init__(self):
        super().__init__()
        self.inputs, self.states = layers.Dense(1), layers.Dense(1)
        self.inputs.build((None, 2))
        self.states.build((None, 1))

    def call(self, x, states):
        state = tf.tanh(self.inputs(x) + self.states(states[0]))
        return state, [state]


def saved_and_loaded(x):
    """A network that was saved, in another."""
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(2, "tanh")])
    with tempfile.TemporaryDirectory() as folder:
        inner.export(folder, verbose=False)
        return hidden(layers.TFSMLayer(folder)(x))


# Of every kind of layer one, on sequences.
ON_SEQUENCES = {
    "Dense": lambda: layers.Dense(2, "tanh"),
    "EinsumDense": lambda: layers.EinsumDense("...c,cd->...d", output_shape=2, activation="tanh"),
    "Softmax": lambda: layers.Softmax(),
    "Conv1D": lambda: layers.Conv1D(2, 2, activation="tanh"),
    "Conv1DTranspose": lambda: layers.Conv1DTranspose(2, 2, activation="tanh"),
    "MaxPooling1D": lambda: layers.MaxPooling1D(2),
    "GlobalAveragePooling1D": lambda: layers.GlobalAveragePooling1D(keepdims=True),
    "UpSampling1D": lambda: layers.UpSampling1D(),
    "Permute": lambda: layers.Permute((2, 1)),
    "BatchNormalization": lambda: layers.BatchNormalization(),
    "LayerNormalization": lambda: layers.LayerNormalization(),
    "ActivityRegularization": lambda: layers.ActivityRegularization(l2=0.1),
    "Dropout": lambda: layers.Dropout(0.5),
    "SimpleRNN": lambda: layers.SimpleRNN(2, return_sequences=True),
    "LSTM": lambda: layers.LSTM(1, return_sequences=True),
    "GRU": lambda: layers.GRU(1, return_sequences=True),
    "Bidirectional": lambda: layers.Bidirectional(layers.SimpleRNN(1, return_sequences=True)),
    "TimeDistributed": lambda: layers.TimeDistributed(layers.Dense(2, "tanh")),
}
# Sequences that recurrent layers put out.
SEQUENCES = {
    "SimpleRNN": lambda x: ON_SEQUENCES["SimpleRNN"]()(x),
    "LSTM": lambda x: ON_SEQUENCES["LSTM"]()(x),
    "GRU, backwards, masked": lambda x: layers.GRU(1, return_sequences=True, go_backwards=True)(layers.Masking()(x)),
    "own cell": lambda x: layers.RNN(Cell(), return_sequences=True)(x),
    "Bidirectional, LSTM": lambda x: layers.Bidirectional(ON_SEQUENCES["LSTM"]())(x),
}


def of_pairs():
    """The rows of recurrent layers with every kind of layer behind and before one, and in `TimeDistributed`."""
    for kind, make in ON_SEQUENCES.items():
        pair = {"is_slow": True, "expected": {FORWARD: None}, "is_random": kind == "Dropout"}
        between = lambda x, make=make: layers.SimpleRNN(1)(make()(layers.SimpleRNN(2, return_sequences=True)(x)))  # noqa: E731
        is_indefinite = kind == "ActivityRegularization"  # Keras leaves its loss out within `TimeDistributed`.
        yield row(f"SimpleRNN, twice, between them {kind}", (3, 2), between, is_indefinite=is_indefinite, **pair)
        yield on(f"TimeDistributed, {kind}", (2, 3, 2), of=make, before=hidden, **pair)


LOOP = {"expected": LOOPS, "is_slow": True}
RANDOM = {"is_random": True}
DROPOUT = {"dropout": 0.5, "recurrent_dropout": 0.5}
LINEAR = {"interpolation": "bilinear", "floatx": "float32", "expected": everywhere(REJECTED)}
CURVED = {"floatx": "float32", "expected": everywhere(NO_SECOND)}
EXACT = {"note": "Its exact Hessian is used.", "is_indefinite": True}
# What stands in front of the weights is no more than data.
DATA = {"expected": {FORWARD: None}, "note": "Comes before all weights.", "is_slow": True}
ENCODED = {"after": lambda x: head(hidden(x)), **DATA}
HOT = {"output_mode": "multi_hot", **ENCODED}
UNIT, HALF, FIXED = {"value_range": (0, 1)}, {"factor": 0.5}, {"is_random": False}
# What changes images, with its arguments.
IMAGES = {
    **dict.fromkeys(["AutoContrast", "Equalization", "Solarization"], UNIT | FIXED),
    **dict.fromkeys(["ContrastLimitedAdaptiveHistogramEqualization", "RandomGaussianBlur", "RandomInvert"], UNIT),
    **dict.fromkeys("CutMix MixUp RandomElasticTransform RandomErasing RandomFlip RandomPerspective".split(), {}),
    **dict.fromkeys("RandomBrightness RandomContrast RandomHue RandomSaturation RandomSharpness".split(), HALF | UNIT),
    **dict.fromkeys(["RandomColorDegeneration", "RandomGrayscale"], HALF),
    "RandAugment": UNIT | {"floatx": "float32"},
    "RandomColorJitter": UNIT | {"brightness_factor": 0.5},
    "RandomCrop": {"height": 3, "width": 3},
    "RandomPosterization": UNIT | {"factor": 4},
    "RandomRotation": HALF | {"floatx": "float32"},
    "RandomShear": {"x_factor": 0.5, "y_factor": 0.5},
    "RandomTranslation": {"height_factor": 0.3, "width_factor": 0.3},
    "RandomZoom": {"height_factor": 0.3},
}


def on_images(name):
    """The row of a layer that changes images, in front of the weights."""
    images = lambda rng: rng.uniform(0.1, 1, size=(NUM_CASES, 4, 4, 3))  # noqa: E731
    after = lambda x: layers.Dense(1)(layers.GlobalAveragePooling2D()(layers.Conv2D(1, 2, activation="tanh")(x)))  # noqa: E731
    return on(name, images, after=after, **DATA, **{"is_random": True} | IMAGES[name])


LAYERS = [
    # Core layers.
    on("Dense", (3,), 3),
    on("Dense, on sequences", (2, 3), 3, "tanh"),
    on("Dense, low rank", (3,), 3, "tanh", lora_rank=2, floatx="float32"),
    *of_activations(),
    on("EinsumDense", (2, 3), "abc,cd->abd", output_shape=(2, 2), bias_axes="d", activation="tanh"),
    on("EinsumDense, over time", (2, 3), "abc,bd->adc", output_shape=(2, 3), activation="tanh"),
    on("Embedding", integers(2), 3, 2, after=lambda x: head(hidden(x))),
    on("Embedding, mask_zero, GRU", integers(3), 3, 2, mask_zero=True, after=lambda x: head(layers.GRU(1)(x)), **LOOP),
    Row("ReversibleEmbedding", integers(2), written_and_read),
    Row("ReversibleEmbedding, untied", integers(2), partial(written_and_read, tie_weights=False)),
    behind("Activation", (3,), "tanh"),
    behind("Identity", (3,)),
    behind("Lambda", (3,), keras.ops.sin),
    computing("Layer, subclassed", lambda x, w: tf.tanh(x * w)),
    around("Wrapper, subclassed", lambda x, layer: layer(x) + x),
    Row(
        "InputLayer",
        (3,),
        lambda x: keras.Sequential([layers.InputLayer((3,)), layers.Dense(3, "tanh"), layers.Dense(1)]),
    ),
    on("Masking", ragged, after=lambda x: head(layers.GRU(1)(x)), **LOOP),
    on("Masking, LSTM, unroll", ragged, after=lambda x: head(layers.LSTM(1, unroll=True)(x))),
    # Activation layers.
    *(behind(name, (3,)) for name in ("ELU", "LeakyReLU", "PReLU", "ReLU")),
    behind("ReLU, max_value, threshold", (3,), max_value=0.5, negative_slope=0.1, threshold=0.1),
    behind("Softmax", (3,)),
    # Merging layers.
    *(merging(name, (3,)) for name in ("Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply", "Subtract")),
    merging("Dot", (2, 3), axes=1),
    merging("Dot, normalize", (2, 3), axes=-1, normalize=True),
    # Convolutions.
    *of_convolutions(1, (4,)),
    *of_convolutions(2, (3, 3)),
    *of_convolutions(3, (2, 2, 2)),
    # TensorFlow has the others on GPUs alone.
    on("Conv3D, channels_first", (2, 2, 2, 2), 2, 2, data_format="channels_first", activation="tanh", expected=LOOPS),
    on("Conv1D, causal", (4, 1), 2, 2, padding="causal", dilation_rate=2, activation="tanh"),
    on("Conv2DTranspose, output_padding", (2, 2, 1), 1, 3, strides=2, output_padding=1, activation="tanh"),
    *of_depthwise_convolutions("DepthwiseConv1D", (4,)),
    *of_depthwise_convolutions("SeparableConv1D", (4,), filters=2),
    *of_depthwise_convolutions("DepthwiseConv2D", (3, 3)),
    *of_depthwise_convolutions("SeparableConv2D", (3, 3), filters=2),
    # Pooling and resizing.
    *of_pools(1, (4,)),
    *of_pools(2, (4, 3)),
    *of_pools(3, (2, 3, 2)),
    behind("UpSampling2D, bilinear", (2, 2, 2), **LINEAR),
    *(behind(f"UpSampling2D, {i}", (2, 2, 2), interpolation=i, **CURVED) for i in ("bicubic", "lanczos3", "lanczos5")),
    behind("Resizing, bilinear", (2, 2, 2), 3, 3, **LINEAR),
    *(
        behind(f"Resizing, {i}", (2, 2, 2), 3, 3, interpolation=i, **CURVED)
        for i in ("nearest", "bicubic", "area", "lanczos3")
    ),
    behind("CenterCrop", (3, 3, 2), 2, 2),
    # Reshaping layers.
    behind("Flatten", (3,)),
    behind("Permute", (2, 3), (2, 1)),
    behind("RepeatVector", (3,), 2),
    behind("Reshape", (2, 3), (4, 1)),
    # Normalization layers.
    behind("BatchNormalization", (3,)),
    behind("BatchNormalization, on sequences", (2, 3)),
    behind("BatchNormalization, frozen", (3,), trainable=False),
    behind("BatchNormalization, renorm", (3,), renorm=True),
    behind("LayerNormalization", (3,)),
    behind("GroupNormalization", (2, 2, 3), groups=1),
    behind("RMSNormalization", (3,)),
    behind("UnitNormalization", (3,)),
    behind("SpectralNormalization", (3,), of=lambda: layers.Dense(2, "tanh"), expected=LOOPS),
    # Regularization layers.
    behind("ActivityRegularization", (3,), l2=0.1, **EXACT),
    on("Dense, activity_regularizer", (3,), 3, "tanh", activity_regularizer=keras.regularizers.L2(0.1), **EXACT),
    *(behind(name, (3,), 0.5, **RANDOM) for name in ("Dropout", "AlphaDropout", "GaussianDropout", "GaussianNoise")),
    *(behind(f"SpatialDropout{dims}D", (*[2] * dims, 2), 0.5, **RANDOM) for dims in (1, 2, 3)),
    # Attention.
    attending("Attention", use_scale=True),
    attending("Attention, concat", score_mode="concat"),
    attending("Attention, dropout", dropout=0.5, **RANDOM),
    attending("AdditiveAttention"),
    row("MultiHeadAttention", (3, 2), lambda x: layers.MultiHeadAttention(2, 1)(x, x)),
    row("MultiHeadAttention, causal", (3, 2), lambda x: layers.MultiHeadAttention(1, 2)(x, x, use_causal_mask=True)),
    row("MultiHeadAttention, dropout", (3, 2), lambda x: layers.MultiHeadAttention(1, 2, dropout=0.5)(x, x), **RANDOM),
    row("GroupQueryAttention", (3, 2), lambda x: layers.GroupQueryAttention(1, 2, 1)(x, x)),
    row("GroupQueryAttention, use_gate", (3, 2), lambda x: layers.GroupQueryAttention(1, 2, 1, use_gate=True)(x, x)),
    # Recurrent layers.
    on("SimpleRNN", (3, 2), 2, expected=LOOPS),
    on("SimpleRNN, unroll", (3, 2), 2, unroll=True),
    on("LSTM", (3, 2), 2, **LOOP),
    on("LSTM, unroll", (3, 2), 2, unroll=True),
    on("GRU", (3, 2), 2, **LOOP),
    on("GRU, unroll", (3, 2), 2, unroll=True),
    on("LSTM, return_sequences, go_backwards", (3, 1), 1, return_sequences=True, go_backwards=True, **LOOP),
    on("LSTM, dropout", (3, 1), 1, **DROPOUT, **RANDOM, **LOOP),
    on("GRU, dropout, unroll", (3, 1), 1, unroll=True, **DROPOUT, **RANDOM),
    Row(
        "GRU, stateful",
        (3, 2),
        lambda x: keras.Model(
            x := keras.Input(batch_shape=(NUM_CASES, 3, 2)), layers.Dense(1)(layers.GRU(1, stateful=True)(x))
        ),
        **LOOP,
    ),
    row("GRU, initial state", (3, 2), lambda x: layers.GRU(1)(x, initial_state=layers.Dense(1)(x[:, 0])), **LOOP),
    row("SimpleRNNCell, in RNN", (3, 2), lambda x: layers.RNN(layers.SimpleRNNCell(1))(x), **LOOP),
    row("LSTMCell, in RNN", (3, 2), lambda x: layers.RNN(layers.LSTMCell(1))(x), **LOOP),
    row("GRUCell, in RNN", (3, 2), lambda x: layers.RNN(layers.GRUCell(1))(x), **LOOP),
    row(
        "StackedRNNCells, in RNN", (2, 1), lambda x: layers.RNN([layers.GRUCell(1), layers.SimpleRNNCell(1)])(x), **LOOP
    ),
    on("RNN, own cell", (3, 2), of=Cell, expected=LOOPS),
    on("RNN, own cell, unroll", (3, 2), of=Cell, unroll=True),
    on("Bidirectional, LSTM", (2, 1), of=lambda: layers.LSTM(1), **LOOP),
    on("Bidirectional, GRU, unroll", (2, 1), of=lambda: layers.GRU(1, unroll=True)),
    *(on(f"ConvLSTM{dims}D", (2, *[2] * dims, 1), 1, 1, **LOOP) for dims in (1, 2, 3)),
    on("ConvLSTM1D, unroll", (2, 2, 1), 1, 2, padding="same", unroll=True),
    on("TimeDistributed", (2, 3), of=lambda: layers.Dense(2, "tanh")),
    *(
        on(f"TimeDistributed, behind {name}", ragged, before=recurrent, of=lambda: layers.Dense(1), after=mean, **LOOP)
        for name, recurrent in SEQUENCES.items()
    ),
    *of_pairs(),
    # Preprocessing, as part of the network.
    behind("Rescaling", (3,), 0.5, 0.1),
    behind("Normalization", (3,), mean=[0.1, 0.2], variance=[1.0, 2.0]),
    behind("STFTSpectrogram", (8, 1), frame_length=4, mode="log", is_slow=True),
    on(
        "MelSpectrogram",
        (4,),
        before=lambda x: layers.Dense(6, "tanh")(x),
        # The number of frames is not known beforehand.
        after=lambda x: head(layers.GlobalAveragePooling1D("channels_first")(x)),
        **{"fft_length": 4, "sequence_stride": 2, "num_mel_bins": 2, "floatx": "float32", "is_slow": True},
    ),
    behind("Pipeline", (3,), of=lambda: [layers.Rescaling(0.5), layers.Rescaling(2.0, 0.1)]),
    on("Discretization", (3,), bin_boundaries=[-0.5, 0.0, 0.5], output_mode="one_hot", **DATA),
    on("CategoryEncoding", integers(2), 3, **ENCODED),
    on("IntegerLookup", integers(2), vocabulary=[0, 1, 2], **HOT),
    on("Hashing", integers(2, below=9), 3, **HOT),
    on(
        "HashedCrossing",
        lambda rng: (integers(1)(rng), integers(1)(rng)),
        **{"num_bins": 4, "output_mode": "one_hot", **ENCODED},
    ),
    on("StringLookup", strings("a", "b", "c", "a"), vocabulary=["a", "b", "c"], **HOT),
    on("TextVectorization", strings("a b", "b", "c a", "a"), vocabulary=["a", "b"], **HOT),
    *map(on_images, sorted(IMAGES)),
    row("TFSMLayer", (3,), saved_and_loaded, expected=LOOPS, note="A SavedModel inside the network."),
]

# Constructs.


class Subclassed(keras.Model):
    """A model that calls its layers itself."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = layers.Dense(2, "tanh"), layers.Dense(1)

    def call(self, x):
        hidden = self.hidden(x)
        return self.head(hidden * hidden)


def rematerialized(x):
    """A layer that is made under `keras.RematScope`."""
    with keras.RematScope(mode="full"):
        return hidden(x)


def derivative(function, x):
    """The derivative of the sum of a function's values."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return tape.gradient(value, x)


def with_derivative(x, layer, twice=False):
    """A small network of x, plus its derivative in x, or its second derivative."""
    network = lambda x: tf.reduce_sum(layer(x), -1, keepdims=True)  # noqa: E731
    once = partial(derivative, network)
    return network(x) + (derivative(once, x) if twice else once(x))


def two_outputs(x):
    """Outputs of different sizes."""
    x = hidden(x)
    return {"a": layers.Dense(1)(x), "b": layers.Dense(2)(x)}


def solved(x):
    """Solves with a matrix made of the input."""
    square = tf.eye(2, dtype=x.dtype) + x[:, :, None] * x[:, None, :]
    return tf.linalg.cholesky_solve(tf.linalg.cholesky(square), x[..., None])


def of_product(function):
    """The function of inputs and weight that is a function of their product."""
    return lambda x, w: function(x * w)


# What a layer computes of its inputs and its weight.
FUNCTIONS = {
    "tf.cond": lambda x, w: tf.cond(tf.reduce_sum(x) > -9, lambda: tf.tanh(x * w), lambda: x),
    "keras.ops.cond": lambda x, w: keras.ops.cond(tf.reduce_sum(x) > -9, lambda: tf.tanh(x * w), lambda: x),
    "tf.switch_case": lambda x, w: tf.switch_case(tf.shape(x)[1] - 2, [lambda: tf.tanh(x * w), lambda: x]),
    "tf.while_loop": lambda x, w: tf.while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, tf.tanh(x * w)), (0, x))[1],
    "keras.ops.fori_loop": lambda x, w: keras.ops.fori_loop(0, 2, lambda i, x: tf.tanh(x * w), x),
    "tf.map_fn": lambda x, w: tf.map_fn(lambda case: tf.tanh(case * w), x),
    "tf.scan": lambda x, w: tf.transpose(tf.scan(lambda carry, x: tf.tanh(carry * w[0] + x), tf.transpose(x))),
    "keras.ops.scan": lambda x, w: tf.transpose(
        keras.ops.scan(lambda carry, x: (tf.tanh(carry * w[0] + x),) * 2, x[:, 0], tf.transpose(x))[1]
    ),
    "tf.vectorized_map": lambda x, w: tf.vectorized_map(lambda case: tf.tanh(case * w), x),
    "nested tf.function": lambda x, w: tf.function(lambda x: tf.tanh(x * w))(x),
    "nested tf.function, jit_compile": lambda x, w: tf.function(lambda x: tf.tanh(x * w), jit_compile=True)(x),
    "tf.where": of_product(lambda x: tf.where(x > 0, tf.tanh(x), x * x)),
    "tf.custom_gradient": of_product(tf.custom_gradient(lambda x: (tf.tanh(x), lambda dy: dy * (1 - tf.tanh(x) ** 2)))),
    "tf.custom_gradient, straight through": of_product(tf.custom_gradient(lambda x: (tf.sign(x), lambda dy: dy))),
    "tf.stop_gradient": of_product(lambda x: x * tf.stop_gradient(tf.tanh(x))),
    "tf.recompute_grad": lambda x, w: tf.recompute_grad(lambda x: tf.tanh(x * w))(x),
}
# Of their product, operations whose second derivatives are of their own kind.
OPERATIONS = {
    "tf.sort": lambda x: tf.sort(x, -1) * x,
    "tf.math.top_k": lambda x: tf.math.top_k(x, 1)[0],
    "tf.cumsum, cumprod": lambda x: tf.cumsum(x, -1) + tf.math.cumprod(x, -1),
    "tf.gather": lambda x: tf.gather(x, [1, 0, 0], axis=-1) * 2,
    "tf.norm": lambda x: x / tf.norm(x, axis=-1, keepdims=True),
    "tf.reduce_logsumexp": lambda x: x - tf.reduce_logsumexp(x, -1, keepdims=True),
    "tf.linalg.cholesky, solve": solved,
    "tf.linalg.svd": lambda x: tf.linalg.svd(x[:, None] * [[1.0], [2.0]] + [[1.0, 0.0], [0.0, 1.0]], compute_uv=False),
    "tf.signal.fft": lambda x: tf.abs(tf.signal.fft(tf.cast(x, tf.complex128))),
    "tf.math.segment_sum": lambda x: tf.reshape(tf.math.segment_sum(tf.transpose(x), [0, 0]), (-1, 1)),
    "tf.clip_by_value": lambda x: tf.clip_by_value(x, -0.5, 0.5),
    "tf.math.igamma": lambda x: tf.math.igamma(tf.constant(2.0, x.dtype), x * x),
    "tf.nn.local_response_normalization": lambda x: tf.cast(tf.nn.lrn(tf.cast(x, tf.float32)[:, None, None]), x.dtype),
}
NOT_RIGHT = {
    **dict.fromkeys(["tf.cond", "keras.ops.cond", "tf.switch_case", "tf.map_fn", "tf.scan", "tf.while_loop"], LOOPS),
    **dict.fromkeys(["nested tf.function", "nested tf.function, jit_compile"], LOOPS),
    **dict.fromkeys(["keras.ops.fori_loop", "keras.ops.scan"], LOOPS),
    "tf.custom_gradient, straight through": {FORWARD: REJECTED},
    "tf.recompute_grad": everywhere(NO_SECOND),
    "tf.nn.local_response_normalization": everywhere(NO_SECOND),
}


CONSTRUCTS = [
    *(computing(name, function, expected=NOT_RIGHT.get(name, {})) for name, function in FUNCTIONS.items()),
    row("keras.RematScope", (3,), rematerialized, expected=everywhere(UNEXPLAINED)),
    around("a derivative in its own input", with_derivative, note="As in physics-informed networks."),
    around("two derivatives in its own input", partial(with_derivative, twice=True)),
    row("shared layer", (2,), lambda x: (layer := layers.Dense(2, "tanh"))(layer(x))),
    row("nested model", (3,), lambda x: keras.Sequential([keras.Input((2,)), layers.Dense(2, "tanh")])(hidden(x))),
    row("frozen layer", (3,), lambda x: hidden(layers.Dense(2, "tanh", trainable=False)(x))),
    Row("subclassed model", (3,), lambda x: Subclassed()),
    Row("several outputs", (3,), lambda x: list(two_outputs(x).values()), loss=["mse", "mse"]),
    Row("a dict of outputs", (3,), two_outputs, loss={"a": "mse", "b": "mse"}),
    Row("an output without a loss", (3,), two_outputs, loss={"a": "mse", "b": None}),
    *(
        computing(name, of_product(function), expected=NOT_RIGHT.get(name, {}), is_slow=True)
        for name, function in OPERATIONS.items()
    ),
]


# Losses.

TARGETS = {
    "reals": lambda rng: rng.normal(size=(NUM_CASES, 3)),
    "bits": lambda rng: rng.integers(0, 2, size=(NUM_CASES, 3)).astype("float64"),
    "signs": lambda rng: 2.0 * rng.integers(0, 2, size=(NUM_CASES, 3)) - 1,
    "labels": lambda rng: np.array([0, 1, 2, 1]),
    "pairs": lambda rng: np.array([0, 1, 0, 1]),
    "one-hot": lambda rng: np.eye(3)[[0, 1, 2, 1]],
    "distributions": lambda rng: rng.dirichlet(np.ones(3), size=NUM_CASES),
    "sequences": lambda rng: rng.normal(size=(NUM_CASES, 3, 1)),
    "words": integers(2, first=1),
}


def inner_probabilities(x):
    """Probabilities that Keras finds no logits of."""
    return 0.1 + 0.2 * tf.sigmoid(x)


def on_loss(name, targets, activation="linear", **options):
    """The row of the loss whose class the name begins with, on a network 2-4-3; options that are fields of `Row` are the row's."""
    fields = {
        "x": (2,),
        "network": lambda x: layers.Activation(activation)(layers.Dense(3)(layers.Dense(4, "tanh")(x))),
        "loss": lambda: getattr(keras.losses, name.split(",")[0])(**options),
    }
    fields |= {field: options.pop(field) for field in Row._fields if field in options}
    return Row(name=name, y=TARGETS[targets], **fields)


def both(name, targets, activation, cut, **options):
    """The rows of a loss from logits, and from probabilities: then it is cut at these, at their logits, or at both if it looks at both."""
    yield on_loss(f"{name}, from logits", targets, from_logits=True, **options)
    yield on_loss(f"{name}, from {activation}", targets, activation, through_logits=cut, **options)


def quartic(y, y_pred):
    """The fourth power of errors."""
    return (y - y_pred) ** 4


class Quartic(keras.losses.Loss):
    """Means of the fourth power of errors."""

    def call(self, y, y_pred):
        return tf.reduce_mean(quartic(y, y_pred), -1)


WHOLE = {"warning": "cannot be put together"}
MSE, REDUCTIONS = "MeanSquaredError", ("sum_over_batch_size", "sum", "mean", "mean_with_sample_weight")
NO_CURVATURE = {"expected": everywhere(FLAT), "warning": "no curvature|no second derivative"}
NAN = {"expected": everywhere(NOT_A_NUMBER)}
SMOOTHED = {"label_smoothing": 0.1}
# Networks of their own: one whose mask weighs the losses of its outputs, and one that labels sequences.
MASKED = {"x": ragged, "network": lambda x: layers.Dense(1)(hidden(layers.Masking()(x)))}
LABELLED = {
    "x": (4, 2),
    "network": lambda x: layers.Dense(3)(layers.Dense(3, "tanh")(x)),
    "expected": everywhere(NO_SECOND),
}
LOSSES = [
    *both("BinaryCrossentropy", "bits", "sigmoid", "sigmoid"),
    *both("BinaryCrossentropy, label_smoothing", "bits", "sigmoid", "sigmoid", **SMOOTHED),
    on_loss("BinaryCrossentropy, from other outputs", "bits", inner_probabilities),
    *both("CategoricalCrossentropy", "one-hot", "softmax", "softmax"),
    *both("CategoricalCrossentropy, label_smoothing", "one-hot", "softmax", "softmax", **SMOOTHED),
    # Keras divides these by their sum.
    on_loss("CategoricalCrossentropy, from other outputs", "one-hot", inner_probabilities, is_indefinite=True),
    *both("BinaryFocalCrossentropy", "bits", "sigmoid", "both"),
    *both("BinaryFocalCrossentropy, label_smoothing", "bits", "sigmoid", "both", **SMOOTHED),
    on_loss("BinaryFocalCrossentropy, from other outputs", "bits", inner_probabilities),
    *both("CategoricalFocalCrossentropy", "one-hot", "softmax", ""),
    *both("CategoricalFocalCrossentropy, label_smoothing", "one-hot", "softmax", "", **SMOOTHED),
    *both("SparseCategoricalCrossentropy", "labels", "softmax", "softmax"),
    *both("SparseCategoricalCrossentropy, ignore_class", "labels", "softmax", "", ignore_class=1),
    on_loss("CategoricalGeneralizedCrossEntropy", "labels", "softmax"),
    on_loss("MeanSquaredError", "reals"),
    on_loss("MeanSquaredError, on sigmoid", "bits", "sigmoid"),
    on_loss("MeanSquaredLogarithmicError", "bits", "softplus"),
    on_loss("Huber", "reals", delta=0.5),
    on_loss("LogCosh", "reals"),
    on_loss("Poisson", "bits", "softplus"),
    on_loss("KLDivergence", "distributions", "softmax"),
    on_loss("CosineSimilarity", "reals", is_indefinite=True),
    on_loss("Dice", "bits", "sigmoid", is_indefinite=True, **WHOLE),
    on_loss("Dice, axis", "bits", "sigmoid", axis=-1, is_indefinite=True),
    on_loss("Tversky", "bits", "sigmoid", is_indefinite=True, **WHOLE),
    on_loss("SquaredHinge", "signs"),
    on_loss("Circle", "pairs", "sigmoid", gamma=2.0, is_indefinite=True, is_slow=True, **WHOLE),
    on_loss("Circle, a class with one case", "labels", "sigmoid", gamma=2.0, **NAN, **WHOLE),
    on_loss("MeanAbsoluteError", "reals", **NO_CURVATURE),
    on_loss("MeanAbsolutePercentageError", "reals", **NO_CURVATURE),
    on_loss("Hinge", "signs", **NO_CURVATURE),
    on_loss("CategoricalHinge", "one-hot", **NO_CURVATURE),
    on_loss("Loss, subclassed", "reals", loss=lambda: Quartic()),
    on_loss("Loss, a function, (N,)", "reals", loss=lambda: lambda y, y_pred: tf.reduce_sum(quartic(y, y_pred), -1)),
    on_loss("Loss, a function, (N, T)", "reals", loss=lambda: quartic),
    on_loss("Loss, a function, scalar", "reals", loss=lambda: lambda *y: tf.reduce_mean(quartic(*y)) ** 2, **WHOLE),
    *(
        on_loss(f"{MSE}, {reduction}{weighted}", "reals", reduction=reduction, sample_weight=weights)
        for reduction in REDUCTIONS
        for weighted, weights in (("", None), (", weighted", lambda rng: rng.uniform(0.5, 2, size=NUM_CASES)))
    ),
    *(
        on_loss(f"{MSE}, {reduction}, masked", "sequences", reduction=reduction, **MASKED)
        for reduction in REDUCTIONS[:2]
    ),
    on_loss("CTC", "words", **LABELLED),
]
# An older Keras lacks some.
LAYERS = [row for row in LAYERS if hasattr(layers, row.covers)]
LOSSES = [row for row in LOSSES if hasattr(keras.losses, row.covers)]
# The rows that stand for the others: the first of every class that is like no other one; of what comes in one to three dimensions the second.
FIRST = {row.covers: row for row in reversed(LAYERS + CONSTRUCTS + LOSSES) if not re.search("[13]D", row.name)}
TYPICAL = [row.name for row in FIRST.values() if not row.is_slow and row.covers not in ALIKE]
ALL_ROWS = LAYERS + CONSTRUCTS + LOSSES
ROWS = {row.name: row for row in ALL_ROWS}


# Measuring.


def measure(row, ways):
    """Measures a row in some ways: a dict, way -> cell and what came; and whether the matrix has negative eigenvalues.

    Ways of which products are expected are traced together: if one raises, its error is that of all.
    """
    found, expected = {}, None
    together = [way for way in ways if row.cells[way] not in ERRORS]
    apart = [[way] for way in ways if way not in together]
    with precision(row.floatx):
        try:
            model, data = oracles.prepare(row)
        except Exception as error:
            return dict.fromkeys(ways, refused(error)), False
        for group in [together, *apart] if together else apart:
            curvatures = [WAYS[way] for way in group] + [oracles.DenseJacobian()] * row.is_random
            try:
                products = oracles.traced_matrices(model, data, curvatures)
            except Exception as error:
                found |= dict.fromkeys(group, refused(error))
                continue
            if expected is None:
                expected = products[-1] if row.is_random else oracles.oracle(row, model, data)
            found |= {
                way: compared(product, expected, row.floatx) for way, product in zip(group, products, strict=False)
            }
        for way, (cell, words) in found.items():
            if cell == WRONG and oracles.is_rejected(model, data, WAYS[way]):
                found[way] = REJECTED, words
    values = [0.0] if expected is None or not np.isfinite(expected).all() else np.linalg.eigvalsh(expected)
    return found, values[0] < -1e-4 * values[-1]


def refused(error):
    """The cell of an exception, and its words."""
    words = f"{type(error).__name__}: {error}"
    return next(cell for cell, said in ERRORS.items() if re.search(said, words, re.DOTALL)), words


def compared(product, expected, floatx):
    """Compares a matrix of products with the oracle's; returns a cell, and the largest error relative to the largest entry."""
    if not np.isfinite(product).all():
        return NOT_A_NUMBER, "not finite"
    largest = np.abs(expected).max()
    if largest == 0:
        return (WRONG if product.any() else FLAT), f"{np.abs(product).max():.0e} where the oracle is zero"
    error = np.abs(product - expected).max() / largest
    return (RIGHT if error < TOLERANCES[floatx] else WRONG), f"{error:.0e}"


# The docs.


def table(rows):
    """Rows in Markdown: those that are right in every way in a sentence, others in a table with a line for all that are alike."""
    alike = {}
    for row in rows:
        notes = [
            row.note,
            "In float32: there is no float64 kernel." * (row.floatx == "float32"),
            "Indefinite." * row.is_indefinite,
            "In one micro-batch." * (row.warning == WHOLE["warning"]),
        ]
        cells = tuple(row.cells.get(way, "") for way in WAYS)
        alike.setdefault((cells, " ".join(filter(None, notes))), []).append(row.name)
    right = alike.pop(((RIGHT,) * len(WAYS), ""))
    lines = [
        f"Right in both ways: {together(right)}.",
        "",
        f"| | {' | '.join(WAYS)} | |",
        f"| --- |{' --- |' * len(WAYS)} --- |",
    ]
    for (cells, notes), names in alike.items():
        lines.append(" | ".join([f"| {together(names)}", *cells, f"{notes} |"]))
    return "\n".join(lines)


def together(names):
    """Names in one line, the variants of a layer in brackets."""
    variants = {}
    for name in names:
        base, _, variant = name.partition(", ")
        variants.setdefault(base, []).append(variant)
    return "; ".join(base if found == [""] else f"{base} ({variants_of(found)})" for base, found in variants.items())


def variants_of(found):
    """The variants of a layer, of which the empty one is the layer as it is."""
    named = "; ".join(variant for variant in found if variant)
    return f"also: {named}" if "" in found else named


def document(text):
    """The page docs/support.md with the tables of today, from its text: what stands before and after them is kept."""
    head, *_, rest = text.split("\n## ")
    versions = f"Keras {keras.__version__}, TensorFlow {tf.__version__}, CPUs"
    head = re.sub(r"Keras \S+, TensorFlow \S+, CPUs", versions, head)
    tables = {"Layers": LAYERS, "Constructs": CONSTRUCTS, "Losses": LOSSES}
    return "\n## ".join([head, *(f"{title}\n\n{table(rows)}\n" for title, rows in tables.items()), rest])


if __name__ == "__main__":
    DOCS.write_text(document(DOCS.read_text()))
