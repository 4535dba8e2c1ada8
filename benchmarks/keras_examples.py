"""Examples of keras.io, small: which train as they are, and how far, beside Adam at the settings of the example?

Networks, losses and batches are those of the examples; data are MNIST's digits or drawn here, and small. Each method has the same seconds of the
processor after its first update, validation included. `first_update_seconds`, in which it traces, come before, and are part of `cpu_seconds`.
Methods: `hf`, `HFModel` with its defaults and the example's batches; `whole`, the same without `batch_size`, which makes one batch of all cases;
`adam`, the example's own.

`loss`, `val_loss` and `val_metric` are those of the epoch of the least `val_loss`, which `EarlyStopping(restore_best_weights=True)` keeps.

    python -m benchmarks.keras_examples --csv benchmarks/results/keras_examples.csv

Rows that the file already holds are kept, so that an interrupted run goes on.
"""

import argparse
import functools
import itertools
import math
import time
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers, ops

from benchmarks import rows as results
from benchmarks.time_to_error import load_mnist_digits
from keras_hf import HFModel

KEYS = "example", "method", "seed"


class Example(NamedTuple):
    """An example: `network`; `compiled`, arguments of `compile`; training cases and others `(x, y)`; and the rest of `fit`."""

    network: Any
    compiled: dict
    cases: tuple
    others: tuple
    fit: dict
    learning_rate: float = 1e-3


def main():
    """Trains what is missing, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", nargs="+", choices=EXAMPLES, default=list(EXAMPLES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--cases", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=30.0, help="of the processor, after the first update")
    quick = {"examples": ["imbalanced", "recommender"], "cases": 400, "seconds": 3.0}
    args = results.parse(parser, quick)
    table = results.read(args.csv)
    done = {tuple(str(row[key]) for key in KEYS) for row in table}
    for seed, example, method in itertools.product(args.seeds, args.examples, args.methods):
        if (example, method, str(seed)) in done:
            continue
        table.append(train(example, method, seed, args.cases, args.seconds))
        print(" ".join(f"{column}={value}" for column, value in table[-1].items()), flush=True)
        if args.csv:
            results.write(args.csv, table)


def train(name, method, seed, num_cases, seconds):
    """Trains one example by one method; returns a row."""
    keras.utils.set_random_seed(seed)
    example = EXAMPLES[name](np.random.default_rng(seed), num_cases)
    model, clock, fit = example.network, Clock(seconds), dict(example.fit)
    if method == "adam":
        model.compile(keras.optimizers.Adam(example.learning_rate), **example.compiled)
    else:
        model = HFModel(model)
        model.compile(**example.compiled)
    if method == "whole":
        del fit["batch_size"]
    fit["callbacks"] = [*fit.get("callbacks", ()), clock]
    history = model.fit(*example.cases, epochs=10**6, validation_data=example.others, verbose=0, **fit).history
    best = min(range(len(history["val_loss"])), key=lambda epoch: _or_infinity(history["val_loss"][epoch]))
    metric = next((key for key in history if key.startswith("val_") and not key.endswith("loss")), "val_loss")
    return {
        "example": name,
        "method": method,
        "seed": seed,
        "cpu_seconds": f"{clock.elapsed:.1f}",
        "updates": clock.updates,
        "loss": f"{history['loss'][best]:.4g}",
        "val_loss": f"{history['val_loss'][best]:.4g}",
        "val_metric": f"{history[metric][best]:.4g}",
        "first_update_seconds": f"{clock.first:.1f}",
    }


def _or_infinity(value):
    return value if math.isfinite(value) else math.inf


class Clock(keras.callbacks.Callback):
    """Ends training so many seconds of the processor after the first update, and counts updates."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.updates, self.first, self.elapsed = seconds, 0, 0.0, 0.0
        self._start = time.process_time()

    def on_train_batch_end(self, batch, logs=None):
        """Counts an update."""
        self.updates += 1
        self.elapsed = time.process_time() - self._start
        self.first = self.first or self.elapsed
        if self.elapsed > self.first + self.seconds:
            self.model.stop_training = True


def images(rng, num_cases, shape=(28, 28, 1), classes=range(10)):
    """MNIST's digits of some classes: training cases and a quarter as many others, `(x, y), (x, y)`."""
    cases = load_mnist_digits(shape, 0)
    parts = []
    for x, y, number in (
        (cases.x_train, cases.y_train, num_cases),
        (cases.x_test, cases.y_test, num_cases // 4),
    ):
        chosen = rng.permutation(np.flatnonzero(np.isin(y, list(classes))))[:number]
        parts.append((x[chosen], y[chosen]))
    return parts


def split(x, y, num_cases):
    """Returns nests of arrays as `(x, y)` of the first cases and of the others."""
    return [
        keras.tree.map_structure(lambda array, part=part: array[part], (x, y))
        for part in (slice(num_cases), slice(num_cases, None))
    ]


# Examples.


def mnist_convnet(rng, num_cases):
    """Simple MNIST convnet."""
    cases, others = images(rng, num_cases)
    network = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10, "softmax"),
        ]
    )
    cases, others = [(x, keras.utils.to_categorical(y, 10)) for x, y in (cases, others)]
    compiled = {"loss": "categorical_crossentropy", "metrics": ["accuracy"]}
    return Example(network, compiled, cases, others, {"batch_size": 128})


def structured_data(rng, num_cases):
    """Structured data classification: a dict of numbers, integers and strings, encoded inside the network."""
    number = num_cases + num_cases // 4
    x = {name: rng.normal(mean, scale, number) for name, mean, scale in (("age", 54, 9), ("chol", 246, 52))}
    x |= {name: rng.integers(0, 4, number) for name in ("cp", "ca")}
    x["thal"] = rng.choice(["normal", "fixed", "reversible"], number)
    score = (x["age"] - 54) / 9 * np.where(x["cp"] == 0, 1, -1) + (x["chol"] - 246) / 52 + (x["thal"] == "fixed")
    y = (score + rng.normal(size=number) > 0.3).astype("float32")[:, None]
    x = {name: values[:, None] for name, values in x.items()}
    # Keras itself takes strings in tensors alone.
    x["thal"] = ops.convert_to_tensor(x["thal"])
    inputs, encoded = {}, []
    for name, values in x.items():
        if name == "thal":
            inputs[name] = keras.Input((1,), name=name, dtype="string")
            encoder = layers.StringLookup(output_mode="one_hot")
            encoder.adapt(values[:num_cases])
        elif name in ("cp", "ca"):
            inputs[name] = keras.Input((1,), name=name, dtype="int64")
            encoder = layers.CategoryEncoding(num_tokens=4, output_mode="one_hot")
        else:
            inputs[name] = keras.Input((1,), name=name)
            encoder = layers.Normalization()
            encoder.adapt(values[:num_cases])
        encoded.append(encoder(inputs[name]))
    hidden = layers.Dense(32, "relu")(layers.concatenate(encoded))
    network = keras.Model(inputs, layers.Dense(1, "sigmoid")(layers.Dropout(0.5)(hidden)))
    compiled = {"loss": "binary_crossentropy", "metrics": ["accuracy"]}
    return Example(network, compiled, *split(x, y, num_cases), {"batch_size": 32})


def imbalanced(rng, num_cases):
    """Imbalanced classification: credit card fraud, with class weights."""
    number = num_cases + num_cases // 4
    y = (rng.random(number) < 0.02).astype("float32")[:, None]
    x = rng.normal(size=(number, 30)) + 0.5 * y * rng.normal(size=30)
    hidden = [layers.Dense(256, "relu") for _ in range(3)]
    network = keras.Sequential(
        [keras.Input((30,)), hidden[0], hidden[1], layers.Dropout(0.3), hidden[2], layers.Dropout(0.3)]
    )
    network.add(layers.Dense(1, "sigmoid"))
    counts = np.bincount(y[:num_cases, 0].astype(int))
    compiled = {"loss": "binary_crossentropy", "metrics": [keras.metrics.AUC(curve="PR")]}
    fit = {"batch_size": 2048, "class_weight": {label: 1 / count for label, count in enumerate(counts)}}
    return Example(network, compiled, *split(x.astype("float32"), y, num_cases), fit, 1e-2)


def timeseries_classification(rng, num_cases):
    """Timeseries classification from scratch: engine noise, by convolutions with BatchNormalization."""
    number, times = num_cases + num_cases // 4, np.arange(100)
    y = rng.integers(0, 2, number)
    rates, phases = rng.uniform(0.1, 0.5, (number, 1)), rng.uniform(0, 6, (number, 1))
    x = (
        np.sin(rates * times + phases)
        + y[:, None] * 0.4 * np.sin(3 * rates * times)
        + rng.normal(scale=0.7, size=(number, 100))
    )
    inputs = outputs = keras.Input((100, 1))
    for _ in range(3):
        outputs = layers.Conv1D(64, 3, padding="same")(outputs)
        outputs = layers.ReLU()(layers.BatchNormalization()(outputs))
    network = keras.Model(inputs, layers.Dense(2, "softmax")(layers.GlobalAveragePooling1D()(outputs)))
    compiled = {"loss": "sparse_categorical_crossentropy", "metrics": ["sparse_categorical_accuracy"]}
    return Example(network, compiled, *split(x[..., None].astype("float32"), y, num_cases), {"batch_size": 32})


def weather(rng, num_cases):
    """Timeseries forecasting for weather prediction, by an LSTM."""
    number = num_cases + num_cases // 4
    noise = rng.normal(size=(number + 48, 7))
    series = np.zeros_like(noise)
    for step in range(1, len(noise)):
        series[step] = 0.95 * series[step - 1] + 0.3 * noise[step]
    series += np.sin(np.arange(len(noise))[:, None] * 2 * np.pi / 24 + np.arange(7))
    x = np.stack([series[start : start + 40 : 2] for start in range(number)]).astype("float32")
    y = series[46 : 46 + number, :1].astype("float32")
    network = keras.Sequential([keras.Input((20, 7)), layers.LSTM(32), layers.Dense(1)])
    return Example(network, {"loss": "mse"}, *split(x, y, num_cases), {"batch_size": 256})


def documents(rng, num_cases, length=100, num_words=2000):
    """Sentences of tokens, by how often what follows what: training cases and others, and 0 or 1 for each."""
    number = num_cases + num_cases // 4
    y = rng.integers(0, 2, number)
    x = rng.zipf(1.3, (number, length)) % num_words
    # A label shows in a few words of its own, in either order.
    own = rng.integers(200, num_words, (2, 60))
    for row, label in enumerate(y):
        places = rng.choice(length, 4, replace=False)
        x[row, places] = own[label if rng.random() < 0.9 else 1 - label, rng.integers(0, 60, 4)]
    return split(x.astype("int32"), y, num_cases)


def text_convolutions(rng, num_cases):
    """Text classification from scratch: an embedding and convolutions."""
    cases, others = documents(rng, num_cases)
    convolution = functools.partial(layers.Conv1D, 128, 7, padding="valid", activation="relu", strides=3)
    network = keras.Sequential(
        [
            keras.Input((100,), dtype="int64"),
            layers.Embedding(2000, 128),
            layers.Dropout(0.5),
            convolution(),
            convolution(),
            layers.GlobalMaxPooling1D(),
            layers.Dense(128, "relu"),
            layers.Dropout(0.5),
            layers.Dense(1, "sigmoid"),
        ]
    )
    return Example(network, {"loss": "binary_crossentropy", "metrics": ["accuracy"]}, cases, others, {"batch_size": 32})


class TransformerBlock(layers.Layer):
    """The block of the example."""

    def __init__(self, size, num_heads, width, rate=0.1):
        super().__init__()
        self.attention = layers.MultiHeadAttention(num_heads, size)
        self.dense = keras.Sequential([layers.Dense(width, "relu"), layers.Dense(size)])
        self.norms = [layers.LayerNormalization(epsilon=1e-6) for _ in range(2)]
        self.drops = [layers.Dropout(rate) for _ in range(2)]

    def call(self, inputs):
        """Attends to all times."""
        first = self.norms[0](inputs + self.drops[0](self.attention(inputs, inputs)))
        return self.norms[1](first + self.drops[1](self.dense(first)))


class TokenAndPosition(layers.Layer):
    """An embedding of tokens and their places."""

    def __init__(self, length, num_words, size):
        super().__init__()
        self.tokens, self.places = layers.Embedding(num_words, size), layers.Embedding(length, size)

    def call(self, x):
        """Adds both."""
        return self.tokens(x) + self.places(ops.arange(0, ops.shape(x)[-1]))


def text_transformer(rng, num_cases):
    """Text classification with Transformer."""
    cases, others = documents(rng, num_cases)
    inputs = keras.Input((100,))
    x = TransformerBlock(32, 2, 32)(TokenAndPosition(100, 2000, 32)(inputs))
    x = layers.Dropout(0.1)(layers.GlobalAveragePooling1D()(x))
    x = layers.Dropout(0.1)(layers.Dense(20, "relu")(x))
    network = keras.Model(inputs, layers.Dense(2, "softmax")(x))
    compiled = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}
    return Example(network, compiled, cases, others, {"batch_size": 32})


def denoising_autoencoder(rng, num_cases):
    """Convolutional autoencoder for image denoising."""
    cases, others = [
        (np.clip(x + 0.4 * rng.normal(size=x.shape), 0, 1).astype("float32"), x) for x, _ in images(rng, num_cases)
    ]
    same = {"activation": "relu", "padding": "same"}
    network = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, **same),
            layers.MaxPooling2D(2, padding="same"),
            layers.Conv2D(32, 3, **same),
            layers.MaxPooling2D(2, padding="same"),
            layers.Conv2DTranspose(32, 3, strides=2, **same),
            layers.Conv2DTranspose(32, 3, strides=2, **same),
            layers.Conv2D(1, 3, activation="sigmoid", padding="same"),
        ]
    )
    return Example(network, {"loss": "binary_crossentropy"}, cases, others, {"batch_size": 128})


class Sampling(layers.Layer):
    """Draws what encodes an image, and adds the divergence of its distribution to the loss."""

    def __init__(self, num_pixels):
        super().__init__()
        self.num_pixels, self.seed_generator = num_pixels, keras.random.SeedGenerator(1337)

    def call(self, inputs):
        """From mean and logarithm of the variance."""
        mean, log_var = inputs
        divergence = -0.5 * (1 + log_var - ops.square(mean) - ops.exp(log_var))
        # The loss is a mean over pixels.
        self.add_loss(ops.mean(ops.sum(divergence, axis=1)) / self.num_pixels)
        return mean + ops.exp(0.5 * log_var) * keras.random.normal(ops.shape(mean), seed=self.seed_generator)


def variational_autoencoder(rng, num_cases):
    """Variational autoencoder, its divergence by `add_loss` where the example has a `train_step`."""
    cases, others = [(x, x) for x, _ in images(rng, num_cases)]
    inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(32, 3, activation="relu", strides=2, padding="same")(inputs)
    x = layers.Conv2D(64, 3, activation="relu", strides=2, padding="same")(x)
    x = layers.Dense(16, "relu")(layers.Flatten()(x))
    x = Sampling(784)([layers.Dense(2)(x), layers.Dense(2)(x)])
    x = layers.Reshape((7, 7, 64))(layers.Dense(7 * 7 * 64, "relu")(x))
    x = layers.Conv2DTranspose(64, 3, activation="relu", strides=2, padding="same")(x)
    x = layers.Conv2DTranspose(32, 3, activation="relu", strides=2, padding="same")(x)
    network = keras.Model(inputs, layers.Conv2DTranspose(1, 3, activation="sigmoid", padding="same")(x))
    return Example(network, {"loss": "binary_crossentropy"}, cases, others, {"batch_size": 128})


def contrastive_loss(y_true, y_pred):
    """Of pairs: 1 if the classes differ."""
    return (1 - y_true) * ops.square(y_pred) + y_true * ops.square(ops.maximum(1 - y_pred, 0))


def siamese(rng, num_cases):
    """Image similarity estimation using a Siamese network with a contrastive loss."""

    def pairs(x, y):
        other = np.array([rng.choice(np.flatnonzero((y == label) == (row % 2 == 0))) for row, label in enumerate(y)])
        return [x, x[other]], (y != y[other]).astype("float32")[:, None]

    cases, others = [pairs(*part) for part in images(rng, num_cases)]
    embedding = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.BatchNormalization(),
            layers.Conv2D(4, 5, activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Conv2D(16, 5, activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.BatchNormalization(),
            layers.Dense(10, "tanh"),
        ]
    )
    inputs = [keras.Input((28, 28, 1)), keras.Input((28, 28, 1))]
    squares = ops.sum(ops.square(embedding(inputs[0]) - embedding(inputs[1])), axis=1, keepdims=True)
    distance = ops.sqrt(ops.maximum(squares, keras.config.epsilon()))
    network = keras.Model(inputs, layers.Dense(1, "sigmoid")(layers.BatchNormalization()(distance)))
    return Example(network, {"loss": contrastive_loss, "metrics": ["accuracy"]}, cases, others, {"batch_size": 16})


def tickets(rng, num_cases):
    """The functional API: a model with several inputs and outputs."""
    (title, _), _ = documents(rng, 4 * num_cases, 10, 1000)
    (body, urgent), _ = documents(rng, 4 * num_cases, 40, 1000)
    number = num_cases + num_cases // 4
    tags = rng.integers(0, 2, (number, 12)).astype("float32")
    department = (tags @ rng.normal(size=(12, 4))).argmax(1)
    x = {"title": title[:number], "body": body[:number], "tags": tags}
    y = {"priority": urgent[:number, None].astype("float32"), "department": keras.utils.to_categorical(department, 4)}
    inputs = {
        "title": keras.Input((None,), name="title"),
        "body": keras.Input((None,), name="body"),
        "tags": keras.Input((12,), name="tags"),
    }
    encoded = [layers.LSTM(size)(layers.Embedding(1000, 64)(inputs[n])) for n, size in (("title", 128), ("body", 32))]
    joined = layers.concatenate([*encoded, inputs["tags"]])
    outputs = {
        "priority": layers.Dense(1, name="priority")(joined),
        "department": layers.Dense(4, name="department")(joined),
    }
    losses = {
        "priority": keras.losses.BinaryCrossentropy(from_logits=True),
        "department": keras.losses.CategoricalCrossentropy(from_logits=True),
    }
    compiled = {"loss": losses, "loss_weights": {"priority": 1.0, "department": 0.2}}
    return Example(keras.Model(inputs, outputs), compiled, *split(x, y, num_cases), {"batch_size": 32})


class RecommenderNet(keras.Model):
    """Dot products of embeddings, as in the example."""

    def __init__(self, num_users, num_films, size):
        super().__init__()
        kind = functools.partial(
            layers.Embedding,
            embeddings_initializer="he_normal",
            embeddings_regularizer=keras.regularizers.L2(1e-6),
        )
        self.users, self.user_bias = kind(num_users, size), layers.Embedding(num_users, 1)
        self.films, self.film_bias = kind(num_films, size), layers.Embedding(num_films, 1)

    def call(self, inputs):
        """From pairs of numbers of a user and a film."""
        user, film = inputs[:, 0], inputs[:, 1]
        match = ops.sum(self.users(user) * self.films(film), axis=1, keepdims=True)
        return ops.sigmoid(match + self.user_bias(user) + self.film_bias(film))


def recommender(rng, num_cases):
    """Collaborative filtering for movie recommendations."""
    number = 5 * num_cases + num_cases // 4
    x = np.stack([rng.integers(0, 300, number), rng.integers(0, 500, number)], axis=1)
    users, films = rng.normal(size=(300, 3)), rng.normal(size=(500, 3))
    score = (users[x[:, 0]] * films[x[:, 1]]).sum(1) + films[x[:, 1], 0]
    y = np.round(4 / (1 + np.exp(-score)) + rng.normal(scale=0.5, size=number)).clip(0, 4)[:, None] / 4
    network = RecommenderNet(300, 500, 50)
    return Example(network, {"loss": "binary_crossentropy"}, *split(x, y, 5 * num_cases), {"batch_size": 64})


def frozen_base(rng, num_cases):
    """Transfer learning: a head on a frozen base, trained on other digits before."""
    base = keras.Sequential([keras.Input((28, 28, 1))])
    for filters in (16, 32):
        for layer in layers.Conv2D(filters, 3, strides=2), layers.BatchNormalization(), layers.ReLU():
            base.add(layer)
    base.add(layers.GlobalAveragePooling2D())
    first = keras.Sequential([base, layers.Dense(5, "softmax")])
    first.compile("adam", "sparse_categorical_crossentropy")
    first.fit(*images(rng, num_cases, classes=range(5))[0], batch_size=32, epochs=3, verbose=0)
    base.trainable = False
    inputs = keras.Input((28, 28, 1))
    x = layers.Dropout(0.2)(base(inputs, training=False))
    network = keras.Model(inputs, layers.Dense(5)(x))
    cases, others = [(x, y - 5) for x, y in images(rng, num_cases, classes=range(5, 10))]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Example(network, {"loss": loss, "metrics": ["accuracy"]}, cases, others, {"batch_size": 64})


def residual_network(rng, num_cases):
    """The functional API: a toy ResNet, on digits."""
    cases, others = images(rng, num_cases)
    inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(32, 3, activation="relu")(inputs)
    x = layers.Conv2D(64, 3, activation="relu")(x)
    x = layers.MaxPooling2D(3)(x)
    for _ in range(2):
        block = layers.Conv2D(64, 3, activation="relu", padding="same")(x)
        block = layers.Conv2D(64, 3, activation="relu", padding="same")(block)
        x = layers.add([layers.BatchNormalization()(block), x])
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(64, 3, activation="relu")(x))
    x = layers.Dropout(0.5)(layers.Dense(256, "relu")(x))
    network = keras.Model(inputs, layers.Dense(10)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Example(network, {"loss": loss, "metrics": ["acc"]}, cases, others, {"batch_size": 64})


class Patches(layers.Layer):
    """Cuts images into squares."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def call(self, images):
        """Returns a sequence of vectors for each image."""
        patches = ops.image.extract_patches(images, self.size)
        return ops.reshape(patches, (-1, patches.shape[1] * patches.shape[2], patches.shape[3]))


class PatchEncoder(layers.Layer):
    """Projects patches, and adds an embedding of their places."""

    def __init__(self, number, size):
        super().__init__()
        self.number, self.projection, self.places = number, layers.Dense(size), layers.Embedding(number, size)

    def call(self, patches):
        """Adds both."""
        return self.projection(patches) + self.places(ops.arange(self.number)[None])


def vision_transformer(rng, num_cases):
    """Image classification with Vision Transformer, on digits."""
    cases, others = images(rng, num_cases)

    def perceptron(x, units, rate):
        for width in units:
            x = layers.Dropout(rate)(layers.Dense(width, "gelu")(x))
        return x

    inputs = keras.Input((28, 28, 1))
    encoded = PatchEncoder(16, 32)(Patches(7)(inputs))
    for _ in range(2):
        x = layers.LayerNormalization(epsilon=1e-6)(encoded)
        x = layers.Add()([layers.MultiHeadAttention(4, 32, dropout=0.1)(x, x), encoded])
        encoded = layers.Add()([perceptron(layers.LayerNormalization(epsilon=1e-6)(x), [64, 32], 0.1), x])
    x = layers.Dropout(0.5)(layers.Flatten()(layers.LayerNormalization(epsilon=1e-6)(encoded)))
    network = keras.Model(inputs, layers.Dense(10)(perceptron(x, [128, 64], 0.5)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Example(network, {"loss": loss, "metrics": ["accuracy"]}, cases, others, {"batch_size": 256})


def bidirectional_lstm(rng, num_cases):
    """Bidirectional LSTM on reviews."""
    cases, others = documents(rng, num_cases)
    network = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(2000, 64),
            layers.Bidirectional(layers.LSTM(32, return_sequences=True)),
            layers.Bidirectional(layers.LSTM(32)),
            layers.Dense(1, "sigmoid"),
        ]
    )
    return Example(network, {"loss": "binary_crossentropy", "metrics": ["accuracy"]}, cases, others, {"batch_size": 32})


def sequence_addition(rng, num_cases):
    """Sequence to sequence learning for performing number addition: characters of "12+345 " to those of "357 "."""
    letters = "0123456789+ "
    number = 2 * num_cases + num_cases // 4
    a, b = 10 ** rng.uniform(0, 2, (2, number)) // 1
    texts = [(f"{x:.0f}+{y:.0f}".ljust(5)[::-1], f"{x + y:.0f}".ljust(3)) for x, y in zip(a, b, strict=True)]
    x, y = [
        np.eye(len(letters), dtype="float32")[[[*map(letters.index, text)] for text in part]]
        for part in zip(*texts, strict=True)
    ]
    network = keras.Sequential(
        [
            keras.Input((5, len(letters))),
            layers.LSTM(128),
            layers.RepeatVector(3),
            layers.LSTM(128, return_sequences=True),
            layers.Dense(len(letters), "softmax"),
        ]
    )
    compiled = {"loss": "categorical_crossentropy", "metrics": ["accuracy"]}
    return Example(network, compiled, *split(x, y, 2 * num_cases), {"batch_size": 32})


def anomaly_autoencoder(rng, num_cases):
    """Timeseries anomaly detection using an autoencoder: daily windows of a noisy seasonal series."""
    number = num_cases + num_cases // 4
    times = np.arange(number + 96)
    series = np.sin(times * 2 * np.pi / 96) + 0.5 * np.sin(times * 2 * np.pi / 32) * np.sin(times / 500)
    series += 0.2 * rng.normal(size=len(times))
    x = np.stack([series[start : start + 96] for start in range(number)])[..., None].astype("float32")
    same = {"kernel_size": 7, "padding": "same", "strides": 2, "activation": "relu"}
    network = keras.Sequential(
        [
            keras.Input((96, 1)),
            layers.Conv1D(32, **same),
            layers.Dropout(0.2),
            layers.Conv1D(16, **same),
            layers.Conv1DTranspose(16, **same),
            layers.Dropout(0.2),
            layers.Conv1DTranspose(32, **same),
            layers.Conv1DTranspose(1, 7, padding="same"),
        ]
    )
    return Example(network, {"loss": "mse"}, *split(x, x, num_cases), {"batch_size": 128})


def super_resolution(rng, num_cases):
    """Image super-resolution using an efficient sub-pixel CNN: digits of 14 x 14 pixels to 28 x 28."""
    number = num_cases // 4
    parts = [(x.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4)), x) for x, _ in images(rng, number)]
    same = {"activation": "relu", "kernel_initializer": "orthogonal", "padding": "same"}
    inputs = keras.Input((None, None, 1))
    x = layers.Conv2D(64, 5, **same)(inputs)
    x = layers.Conv2D(64, 3, **same)(x)
    x = layers.Conv2D(32, 3, **same)(x)
    x = layers.Conv2D(4, 3, **same)(x)
    network = keras.Model(inputs, PixelShuffle(2)(x))
    return Example(network, {"loss": "mse"}, *parts, {"batch_size": 8})


class PixelShuffle(layers.Layer):
    """Moves channels into space, as the example's `DepthToSpace`."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, inputs):
        """From `(n, h, w, c k^2)` to `(n, h k, w k, c)`."""
        _, height, width, channels = ops.shape(inputs)
        k, c = self.factor, channels // self.factor**2
        x = ops.reshape(inputs, (-1, height, width, k, k, c))
        return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, height * k, width * k, c))


@keras.saving.register_keras_serializable("keras_examples")
class Orthogonal(keras.regularizers.Regularizer):
    """Pulls a batch of matrices towards orthogonal ones."""

    def __init__(self, size, strength=0.001):
        self.size, self.strength = size, strength

    def __call__(self, x):
        """Of rows that are matrices."""
        x = ops.reshape(x, (-1, self.size, self.size))
        return ops.sum(self.strength * ops.square(ops.matmul(x, ops.swapaxes(x, 1, 2)) - ops.eye(self.size)))

    def get_config(self):
        """For Keras' serialization."""
        return {"size": self.size, "strength": self.strength}


def point_clouds(rng, num_cases):
    """Point cloud classification with PointNet: spheres, boxes, cylinders and cones, turned and noisy."""
    number, points = (num_cases + num_cases // 4) // 4, 64
    y = rng.integers(0, 4, number)
    x = rng.normal(size=(number, points, 3))
    length = lambda x, order=2: np.linalg.norm(x, order, -1, keepdims=True)  # noqa: E731
    height = rng.uniform(-1, 1, (number, points, 1))
    circle = x[..., :2] / length(x[..., :2])
    kinds = [x / length(x), x / length(x, np.inf), np.concatenate([circle, height], -1)]
    kinds.append(np.concatenate([circle * (1 - height) / 2, height], -1))
    x = np.choose(y[:, None, None], kinds)
    turns = np.linalg.qr(rng.normal(size=(number, 3, 3)))[0]
    x = (np.einsum("npi,nij->npj", x, turns) + 0.05 * rng.normal(size=x.shape)).astype("float32")

    def normalised(layer, x):
        return layers.Activation("relu")(layers.BatchNormalization(momentum=0.0)(layer(x)))

    def transformed(inputs, size):
        x = normalised(layers.Conv1D(32, 1), inputs)
        x = normalised(layers.Conv1D(64, 1), x)
        x = normalised(layers.Dense(32), layers.GlobalMaxPooling1D()(x))
        identity = keras.initializers.Constant(np.eye(size).flatten())
        x = layers.Dense(
            size**2, kernel_initializer="zeros", bias_initializer=identity, activity_regularizer=Orthogonal(size)
        )(x)
        return layers.Dot(axes=(2, 1))([inputs, layers.Reshape((size, size))(x)])

    inputs = keras.Input((points, 3))
    hidden = normalised(layers.Conv1D(32, 1), transformed(inputs, 3))
    hidden = transformed(hidden, 32)
    for filters in (32, 128):
        hidden = normalised(layers.Conv1D(filters, 1), hidden)
    hidden = layers.GlobalMaxPooling1D()(hidden)
    hidden = layers.Dropout(0.3)(normalised(layers.Dense(64), hidden))
    network = keras.Model(inputs, layers.Dense(4, "softmax")(hidden))
    compiled = {"loss": "sparse_categorical_crossentropy", "metrics": ["sparse_categorical_accuracy"]}
    return Example(network, compiled, *split(x, y, 4 * number // 5), {"batch_size": 32})


METHODS = "hf", "whole", "adam"
EXAMPLES = {
    example.__name__: example
    for example in (
        mnist_convnet,
        structured_data,
        imbalanced,
        timeseries_classification,
        weather,
        text_convolutions,
        text_transformer,
        denoising_autoencoder,
        variational_autoencoder,
        siamese,
        tickets,
        recommender,
        frozen_base,
        residual_network,
        vision_transformer,
        bidirectional_lstm,
        sequence_addition,
        anomaly_autoencoder,
        super_resolution,
        point_clouds,
    )
}


if __name__ == "__main__":
    main()
