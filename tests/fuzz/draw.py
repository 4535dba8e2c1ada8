"""Random programs: a network, data, a loss, settings. Each line of the tables is a feature; `<name>` in it is drawn from `SLOTS`.

A feature of a network is an expression of the tensor `h`, then the layers `@0`, `@1` that it calls; a layer alone stands for its call on `h`.
"""

import re
import warnings

import keras
import numpy as np
import tensorflow as tf

SLOTS = {
    "units": ["1", "2", "3"],
    "activation": ["None", "'tanh'", "'sigmoid'", "'softplus'", "'gelu'", "'relu'", "'swish'", "'elu'"],
    "kernel": ["1", "2", "3"],
    "size": ["1", "2"],
    "padding": ["'same'", "'valid'"],
    "flag": ["False", "True"],
    "recurrent": ["LSTM", "GRU", "SimpleRNN"],
    "merge": ["'concat'", "'sum'"],
    "power": ["0.5", "2.0"],
}
EVERYWHERE = [
    "L.Dense(<units>, <activation>)",
    "L.Dense(<units>, <activation>, use_bias=False)",
    "L.LayerNormalization()",
    "L.BatchNormalization()",
    "L.BatchNormalization(scale=False)",
    "L.RMSNormalization()",
    "L.UnitNormalization()",
    "L.GroupNormalization(1)",
    "L.Activation(<activation>)",
    "L.PReLU()",
    "L.Rescaling(<power>)",
    "L.Softmax()",
    "L.Flatten()",
    "L.SpectralNormalization(L.Dense(<units>))",
    "L.Lambda(lambda h: tf.concat([h, tf.sin(h)], -1))",
    "L.Lambda(lambda h: tf.cumsum(h, -1))",
    "L.Lambda(lambda h: tf.reverse(h, [-1]))",
    "L.Lambda(lambda h: tf.where(h > 0.1, h, 0.3 * h * h))",
    "L.Lambda(lambda h: tf.stack([h[..., 0], 2 * h[..., -1]], -1))",
    "L.Lambda(lambda h: tf.pad(h, [[0, 0]] * (h.shape.rank - 1) + [[1, 0]]))",
    "L.Lambda(lambda h: tf.sort(h, -1))",
    "@1([h, @0(h)]) | L.Dense(<width>, <activation>) | L.Add()",
    "@1([h, @0(h)]) | L.Dense(<units>, <activation>) | L.Concatenate()",
    "@1([h, @0(h)]) | L.Dense(<width>, <activation>) | L.Multiply()",
    "@0(@0(h)) | L.Dense(<width>, 'tanh')",
    "@0(h) + @0(keras.ops.flip(h, -1)) | L.Dense(<units>, <activation>)",
    "keras.ops.tanh(@0(h)) * @1(h) | L.Dense(2) | L.Dense(2, 'sigmoid')",
    "keras.ops.concatenate([@0(h), keras.ops.max(h, -1, keepdims=True)], -1) | L.Dense(<units>)",
    "keras.ops.logsumexp(h, -1, keepdims=True) | ",
    "L.Dense(<units>, <activation>, kernel_regularizer=keras.regularizers.L2(0.1))",
    "L.Dense(<units>, <activation>, bias_regularizer=keras.regularizers.L1L2(0.1, 0.1))",
    "L.Dense(<units>, <activation>, activity_regularizer=keras.regularizers.L2(0.1))",
    "L.Dense(<units>, <activation>, trainable=False)",
]
BY_RANK = {
    2: [
        "L.Reshape((-1, 1))",
        "L.RepeatVector(<size>)",
        "L.EinsumDense('ab,bc->ac', <units>, bias_axes='c')",
    ],
    3: [
        "L.Conv1D(<units>, <kernel>, padding=<padding>)",
        "L.Conv1D(<units>, <kernel>, padding='causal', dilation_rate=<size>, activation=<activation>)",
        "L.Conv1D(<units>, <kernel>, strides=<size>, padding=<padding>)",
        "L.Conv1D(2, <kernel>, groups=2, padding='same')",
        "L.Conv1DTranspose(<units>, <kernel>, strides=<size>, padding=<padding>)",
        "L.DepthwiseConv1D(<kernel>, padding=<padding>, depth_multiplier=<size>)",
        "L.SeparableConv1D(<units>, <kernel>, padding=<padding>)",
        "L.MaxPooling1D(<size>)",
        "L.AveragePooling1D(<size>, padding=<padding>)",
        "L.GlobalMaxPooling1D()",
        "L.GlobalAveragePooling1D()",
        "L.UpSampling1D(<size>)",
        "L.ZeroPadding1D(1)",
        "L.Cropping1D((1, 0))",
        "L.Permute((2, 1))",
        "L.Masking()",
        "L.<recurrent>(<units>)",
        "L.<recurrent>(<units>, return_sequences=True)",
        "L.<recurrent>(<units>, return_sequences=<flag>, go_backwards=True)",
        "L.<recurrent>(<units>, return_sequences=<flag>, unroll=True)",
        "L.<recurrent>(<units>, return_sequences=True, activation='softplus', use_bias=<flag>)",
        "L.RNN([L.GRUCell(<units>), L.LSTMCell(<units>)], return_sequences=<flag>)",
        "L.Bidirectional(L.<recurrent>(<units>, return_sequences=<flag>), merge_mode=<merge>)",
        "L.TimeDistributed(L.Dense(<units>, <activation>))",
        "L.TimeDistributed(L.LayerNormalization())",
        "@0(h, h) | L.MultiHeadAttention(<size>, <size>)",
        "@0(h, h, use_causal_mask=True) | L.MultiHeadAttention(<size>, <size>)",
        "@0(h, h) | L.GroupQueryAttention(2, 2, <size>)",
        "@0([h, h]) | L.Attention(use_scale=<flag>)",
        "@0([h, h]) | L.AdditiveAttention()",
        "L.EinsumDense('abc,cd->abd', (None, <units>), bias_axes='d')",
        "@0([h, h]) | L.Dot(-1)",
    ],
    4: [
        "L.Conv2D(<units>, <kernel>, padding=<padding>, activation=<activation>)",
        "L.Conv2D(<units>, <kernel>, padding=<padding>, strides=<size>)",
        "L.Conv2D(2, <kernel>, groups=2, padding='same')",
        "L.Conv2DTranspose(<units>, <kernel>, strides=<size>, padding=<padding>)",
        "L.DepthwiseConv2D(<kernel>, padding=<padding>)",
        "L.SeparableConv2D(<units>, <kernel>, padding=<padding>)",
        "L.MaxPooling2D(<size>)",
        "L.AveragePooling2D(<size>, padding=<padding>)",
        "L.GlobalMaxPooling2D()",
        "L.GlobalAveragePooling2D()",
        "L.ZeroPadding2D(1)",
        "L.Cropping2D(((1, 0), (0, 0)))",
        "L.Permute((2, 1, 3))",
        "L.Reshape((-1, <width>))",
        "L.TimeDistributed(L.Conv1D(<units>, 1))",
        "L.TimeDistributed(L.<recurrent>(<units>))",
        "L.ConvLSTM1D(<units>, 1, return_sequences=<flag>)",
    ],
}
# What makes one case, and its inputs.
INPUTS = {
    "vectors": "rng.normal(size=(N, K))",
    "sequences": "rng.normal(size=(N, T, K))",
    "images": "rng.normal(size=(N, T, K + 1, K))",
    "tokens": "rng.integers(0, 4, size=(N, T))",
    "padded sequences": "rng.normal(size=(N, T, K)) * (np.arange(T)[:, None] <= rng.integers(0, T, size=(N, 1, 1)))",
}
REALS, POSITIVE, BITS = (
    "rng.normal(size={shape})",
    "rng.uniform(0.2, 2.0, size={shape})",
    "rng.integers(0, 2, size={shape})",
)
ONE_HOT = "np.eye({width})[rng.integers(0, {width}, size={shape}[:-1])]"
LABELS = "rng.integers(0, {width}, size={shape}[:-1])"
SIMPLEX = "rng.dirichlet(np.ones({width}), size={shape}[:-1])"
# Loss -> activation of the last layer, targets, where the loss is cut, how many units it needs.
LOSSES = {
    "'mse'": ("linear", REALS, "value", 1),
    "keras.losses.MeanSquaredError()": ("tanh", REALS, "value", 1),
    "keras.losses.MeanSquaredError(reduction='sum')": ("linear", REALS, "value", 1),
    "keras.losses.MeanSquaredError(reduction='mean_with_sample_weight')": ("linear", REALS, "value", 1),
    "keras.losses.MeanAbsoluteError()": ("linear", REALS, "value", 1),
    "keras.losses.Huber(0.5)": ("linear", REALS, "value", 1),
    "keras.losses.LogCosh()": ("linear", REALS, "value", 1),
    "keras.losses.MeanSquaredLogarithmicError()": ("softplus", POSITIVE, "value", 1),
    "keras.losses.Poisson()": ("softplus", POSITIVE, "value", 1),
    "keras.losses.SquaredHinge()": ("linear", BITS, "value", 1),
    "keras.losses.CosineSimilarity()": ("linear", REALS, "value", 2),
    "keras.losses.KLDivergence()": ("softmax", SIMPLEX, "value", 2),
    "keras.losses.BinaryCrossentropy()": ("sigmoid", BITS, "argument", 1),
    "keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.1)": ("linear", BITS, "value", 1),
    "keras.losses.BinaryFocalCrossentropy(from_logits=True)": ("linear", BITS, "value", 1),
    "keras.losses.CategoricalCrossentropy()": ("softmax", ONE_HOT, "argument", 2),
    "keras.losses.CategoricalCrossentropy(from_logits=True)": ("linear", ONE_HOT, "value", 2),
    "keras.losses.SparseCategoricalCrossentropy()": ("softmax", LABELS, "argument", 2),
    "keras.losses.SparseCategoricalCrossentropy(from_logits=True)": ("linear", LABELS, "value", 2),
    "keras.losses.Dice()": ("sigmoid", BITS, "value", 1),
    "keras_hf.Cauchy(0.5)": ("linear", REALS, "value", 1),
    "lambda y, p: tf.reduce_sum((tf.cast(y, p.dtype) - p) ** 4, -1)": ("linear", REALS, "value", 1),
    "lambda y, p: tf.reduce_mean(tf.cosh(tf.cast(y, p.dtype) - p)) ** 2": ("linear", REALS, "value", 1),
}
SQUARES = ("'mse'", "keras.losses.MeanSquaredError")
SOLVERS = [
    "keras_hf.DirectSolver()",
    "keras_hf.DirectSolver(order=1)",
    "keras_hf.ConjugateGradient()",
    "keras_hf.ConjugateGradient(preconditioner=keras_hf.Identity())",
    "keras_hf.ConjugateGradient(preconditioner=keras_hf.EmpiricalFisherDiagonal())",
    "keras_hf.ConjugateGradient(preconditioner=keras_hf.KroneckerFactored())",
    "keras_hf.ConjugateGradient(preconditioner=keras_hf.Nystrom(2))",
    "keras_hf.PreconditionedMomentum()",
    "keras_hf.PreconditionedMomentum(preconditioner=keras_hf.EmpiricalFisherDiagonal())",
]
WEIGHTS = ["None", "rng.uniform(0.5, 2.0, size=N)", "rng.integers(0, 2, size=N).astype(float)"]
FORMS = ["functional", "sequential", "subclassed"]
# Networks of more weights or positions take longer than they show.
MOST_WEIGHTS, MOST_ENTRIES = 120, 30


class Invalid(Exception):
    """A network that is not worth a draw."""


class Program:
    """The source of a program, and the features in it.

    Args:
        one_of: Callable, list -> one of its entries.
    """

    def __init__(self, one_of):
        self._one_of, self.features = one_of, set()
        self._built, self._layers, self._lines = [], [], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.source = self._drawn()

    def _feature(self, what, options):
        """One of the options, noted without the slots' values."""
        chosen = self._one_of(list(options))
        self.features.add(what + re.sub(r"<\w+>", "*", chosen))
        return chosen

    def _drawn(self):
        sizes = {name: int(self._one_of(options)) for name, options in {"N": "5612", "T": "3214", "K": "231"}.items()}
        self.features |= {f"{name} = 1" for name, size in sizes.items() if size == 1}
        kind = self._feature("", INPUTS)
        x = eval(INPUTS[kind], {"np": np, "rng": np.random.default_rng(0), **sizes})
        self._form = self._feature("", FORMS)
        h = keras.Input(x.shape[1:], dtype=x.dtype.name)
        if kind == "tokens":
            h = self._with(h, "L.Embedding(4, <units>, mask_zero=<flag>)")
        if kind == "padded sequences":
            h = self._with(h, "L.Masking()")
        for _ in range(self._one_of([1, 2, 3, 0, 4])):
            h = self._with(h, self._one_of(EVERYWHERE + BY_RANK.get(len(h.shape), [])))
        if len(h.shape) > 3 or (len(h.shape) == 3 and self._one_of([True, False])):
            h = self._with(h, "L.Flatten()")
        self.features.add("outputs of rank " + str(len(h.shape)))
        loss = self._feature("", LOSSES)
        activation, targets, self.cut, least = LOSSES[loss]
        width = max(least, int(self._one_of("123")))
        h = self._with(h, f"L.Dense({width})")
        if sum(layer.count_params() for layer in self._built) > MOST_WEIGHTS:
            raise Invalid
        weights = self._feature("weights ", WEIGHTS)
        self.solver = self._feature("", SOLVERS)
        self.has_squares = loss.startswith(SQUARES)
        targets = targets.format(shape=(sizes["N"], *h.shape[1:]), width=width)
        settings = f"damping=0.1, seed=0, solver={self.solver}"
        return "\n".join(
            [
                *(f"{name} = {size}" for name, size in sizes.items()),
                "rng = np.random.default_rng(0)",
                f"x = {INPUTS[kind]}",
                f"y = {targets}",
                f"sample_weight = {weights}",
                f"l = [{', '.join(self._layers)}]",
                f"top = L.Activation({activation!r})",
                "",
                "def body(h):",
                *(f"    {line}" for line in [*self._lines, "return h"]),
                "",
                *self._network(),
                "for variable in network.weights:",
                "    if 'float' in variable.dtype and 'moving' not in variable.name:",
                "        variable.assign(rng.normal(scale=0.6, size=variable.shape))",
                f"network.compile('sgd', loss={loss})",
                "model = keras_hf.HFModel(network)",
                f"model.compile(keras_hf.HessianFree({settings}), loss={loss})",
            ]
        )

    def _network(self):
        if self._form == "sequential":
            return ["network = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype.name), *l, top])"]
        if self._form == "functional":
            return [
                "inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)",
                "network = keras.Model(inputs, top(body(inputs)))",
            ]
        return [
            "class Network(keras.Model):",
            "    def __init__(self):",
            "        super().__init__()",
            "        self.l, self.top = l, top",
            "",
            "    def call(self, inputs):",
            "        return top(body(inputs))",
            "",
            "network = Network()",
            "network(x)",
        ]

    def _with(self, h, feature):
        """Adds a feature to the body, and returns the body's symbolic output; the same one where Keras does not take it."""
        text = re.sub(r"<(\w+)>", lambda s: str(h.shape[-1]) if s[1] == "width" else self._one_of(SLOTS[s[1]]), feature)
        expression, *layers = text.split(" | ") if " | " in text else ("@0(h)", text)
        layers = [layer for layer in layers if layer]
        if self._form == "sequential" and expression != "@0(h)":
            return h
        expression = re.sub(r"@(\d)", lambda place: f"l[{len(self._layers) + int(place[1])}]", expression)
        names = {"keras": keras, "L": keras.layers, "tf": tf, "h": h}
        try:
            built = [eval(layer, names) for layer in layers]
            output = eval(expression, {**names, "l": [*self._built, *built]})
        except (ValueError, TypeError, IndexError, tf.errors.OpError):
            return h
        shape = output.shape[1:]
        if not shape or None in shape or not 0 < np.prod(shape) <= MOST_ENTRIES:
            return h
        self._built += built
        self._layers += layers
        self._lines.append(f"h = {expression}")
        self.features.add(re.sub(r"<\w+>", "*", feature))
        return output
