"""Which solver trains classifiers soonest: conjugate gradients, preconditioned momentum, or Keras' Adam; over networks and numbers of cases.

`HessianFree()`, which takes momentum on all of these, decides by these measurements. All have their defaults, Adam its rate of 1e-3 and batches of
128. MNIST's digits, synthetic rows of 20 numbers in five classes, a part of them mislabelled, and synthetic documents of two kinds. Seconds of the
processor in training until the cross-entropy of (at most 20,000 of) the training cases is at or below given losses; the clock stands still while they
are measured, and in the first update, which compiles.

    python -m benchmarks.classifier_solvers --csv benchmarks/results/classifier_solvers.csv
    python -m benchmarks.classifier_solvers --problems perceptron:5000 --seconds 15
"""

import argparse
from pathlib import Path

import keras
import numpy as np
from keras import layers

from benchmarks import rows as results
from benchmarks.clock import Clock
from benchmarks.keras_examples import documents
from benchmarks.time_to_error import Cases, convolutional_network, load_mnist_digits, multilayer_perceptron
from keras_hf import ConjugateGradient, HessianFree, HFModel, LevenbergMarquardt

LOSSES = 0.5, 0.2, 0.1, 0.05, 0.01, 0.001
GRID = (
    "perceptron:1000",
    "perceptron:5000",
    "perceptron:60000",
    "narrow:5000",
    "convolutions:2000",
    "convolutions:60000",
    "transformer:10000",
    "transformers:10000",
    "characters:2000",
    "recurrent:10000",
    "rows:2000",
    "rows:20000",
    "parity:10000",
    "words:4000",
)
SOLVERS = {"cg": ConjugateGradient(), "momentum": None, "adam": None}
MOST_MEASURED = 20_000
# Of the text: what follows it in Unicode counts as one character.
DOCS, NUM_CODES, CONTEXT = Path(__file__).resolve().parent.parent / "docs", 128, 48


def main():
    """Trains, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=GRID, help="NETWORK:CASES")
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--seconds", type=float, default=15.0, help="of training")
    parser.add_argument("--seed", type=int, default=1, help="of weights and batches")
    args = results.parse(parser, {"problems": ["rows:2000"], "seconds": 3.0})
    table = []
    for problem in args.problems:
        name, num_cases = problem.split(":")
        for solver in args.solvers:
            table.append({"network": name, "cases": int(num_cases), **train(name, int(num_cases), solver, args)})
            print(" ".join(f"{column}={value}" for column, value in table[-1].items()), flush=True)
            if args.csv:
                results.write(args.csv, table)


def train(name, num_cases, solver, args):
    """Trains one network by one method; returns a row of results."""
    keras.utils.set_random_seed(args.seed)
    network, cases = NETWORKS[name](num_cases)
    loss = "binary_crossentropy" if network.output_shape[-1] == 1 else "sparse_categorical_crossentropy"
    if solver == "adam":
        model, batch_size, callbacks = network, 128, []
        model.compile(keras.optimizers.Adam(), loss)
    else:
        model, batch_size, callbacks = HFModel(network), None, [LevenbergMarquardt()]
        model.compile(HessianFree(solver=SOLVERS[solver], seed=args.seed), loss)

    def look():
        """Training loss, test loss, and the share of test cases that are classified wrongly."""
        train_loss, _ = losses_of(network, cases.x_train[:MOST_MEASURED], cases.y_train)
        return train_loss, *losses_of(network, cases.x_test, cases.y_test)

    clock = Clock(args.seconds, look)
    callbacks = [*callbacks, clock]
    model.fit(
        cases.x_train, cases.y_train, epochs=10**6, batch_size=batch_size, shuffle=True, callbacks=callbacks, verbose=0
    )
    seconds_to = {
        f"seconds_to_{loss:g}": next((f"{look[0]:.1f}" for look in clock.looks if look[1] <= loss), "")
        for loss in LOSSES
    }
    last = clock.looks[-1]
    best = min(look[2] for look in clock.looks), min(look[3] for look in clock.looks)
    return {
        "weights": network.count_params(),
        "solver": solver,
        "updates": clock.num_updates,
        **seconds_to,
        "last_loss": f"{last[1]:.5f}",
        "least_test_loss": f"{best[0]:.4f}",
        "least_test_errors": f"{best[1]:.4f}",
    }


def losses_of(network, x, y):
    """Returns the mean cross-entropy of cases, and the share that is classified wrongly."""
    probabilities = network.predict(x, batch_size=5000, verbose=0)
    if probabilities.shape[-1] == 1:
        probabilities = np.concatenate([1 - probabilities, probabilities], axis=-1)
    y = y[: len(x)]
    of_class = np.maximum(np.take_along_axis(probabilities, y[..., None], -1), 1e-30)
    return -np.log(of_class).mean(), (probabilities.argmax(-1) != y).mean()


def perceptron(num_cases):
    """784-500-300-10 on digits."""
    return multilayer_perceptron(0.0, False), digits((784,), num_cases)


def narrow(num_cases):
    """784-32-10 on digits."""
    dense = layers.Dense(32, "relu", kernel_initializer="he_normal")
    return keras.Sequential([keras.Input((784,)), dense, layers.Dense(10, "softmax")]), digits((784,), num_cases)


def convolutions(num_cases):
    """Two convolutions on digits."""
    return convolutional_network(0.0, False), digits((28, 28, 1), num_cases)


def transformer(num_cases, num_blocks=1):
    """One encoder block on digits as sequences of 28 rows."""
    rows = keras.Input((28, 28))
    tokens = layers.Dense(64)(rows) + layers.Dense(64, use_bias=False)(_positions(rows))
    for _ in range(num_blocks):
        tokens = _block(tokens, use_causal_mask=False)
    pooled = layers.GlobalAveragePooling1D()(tokens)
    return keras.Model(rows, layers.Dense(10, "softmax")(pooled)), digits((28, 28), num_cases)


def transformers(num_cases):
    """Two encoder blocks."""
    return transformer(num_cases, num_blocks=2)


def characters(num_cases):
    """One causal block that predicts the next characters of the pages in docs/, from 48 characters at most."""
    text = "".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md")))
    codes = np.minimum([ord(character) for character in text], NUM_CODES - 1).astype("int32")
    windows = np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)[::CONTEXT]
    windows = np.random.default_rng(0).permutation(windows)
    before = keras.Input((CONTEXT,), dtype="int32")
    places = keras.ops.arange(CONTEXT) + keras.ops.zeros_like(before)
    tokens = layers.Embedding(NUM_CODES, 64)(before) + layers.Embedding(CONTEXT, 64)(places)
    network = keras.Model(before, layers.Dense(NUM_CODES, "softmax")(_block(tokens, use_causal_mask=True)))
    train, test = windows[:num_cases], windows[num_cases : num_cases + 500]
    return network, Cases(train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:])


def _block(tokens, use_causal_mask):
    attention = layers.MultiHeadAttention(4, 16)(tokens, tokens, use_causal_mask=use_causal_mask)
    attended = layers.LayerNormalization()(tokens + attention)
    widened = layers.Dense(64)(layers.Dense(128, "gelu")(attended))
    return layers.LayerNormalization()(attended + widened)


def recurrent(num_cases):
    """A GRU on digits as sequences of 28 rows."""
    stack = [keras.Input((28, 28)), layers.GRU(64), layers.Dense(10, "softmax")]
    return keras.Sequential(stack), digits((28, 28), num_cases)


def _positions(rows):
    return keras.ops.zeros_like(rows) + keras.ops.eye(28)


def rows(num_cases):
    """20-64-64-5 on synthetic rows of numbers."""
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(20, 30)), generator.normal(size=(30, 5))
    x = generator.normal(size=(num_cases + 5000, 20)).astype("float32")
    scores = np.tanh(x @ first / 3) @ second
    y = (scores + 0.5 * generator.normal(size=scores.shape)).argmax(1)
    widths = [layers.Dense(64, "tanh"), layers.Dense(64, "tanh"), layers.Dense(5, "softmax")]
    cases = Cases(x[:num_cases], y[:num_cases], x[num_cases:], y[num_cases:])
    return keras.Sequential([keras.Input((20,)), *widths]), cases


def parity(num_cases):
    """Odd digits or even ones, by two convolutions and a binary cross-entropy."""
    stack = [layers.Conv2D(filters, 3, strides=2, activation="relu") for filters in (16, 32)]
    stack += [layers.Flatten(), layers.Dense(64, "relu"), layers.Dense(1, "sigmoid")]
    cases = digits((28, 28, 1), num_cases)
    return keras.Sequential([keras.Input((28, 28, 1)), *stack]), cases._replace(
        y_train=cases.y_train % 2, y_test=cases.y_test % 2
    )


def words(num_cases):
    """Documents of two kinds by the mean of an embedding of their words, and a binary cross-entropy."""
    (x, y), (x_test, y_test) = documents(np.random.default_rng(0), num_cases)
    stack = [layers.Embedding(2000, 16), layers.GlobalAveragePooling1D(), layers.Dense(1, "sigmoid")]
    return keras.Sequential([keras.Input((100,), dtype="int32"), *stack]), Cases(x, y, x_test, y_test)


def digits(shape, num_cases):
    """The first digits of MNIST, and all of its test set."""
    cases = load_mnist_digits(shape, 0)
    return cases._replace(x_train=cases.x_train[:num_cases], y_train=cases.y_train[:num_cases])


NETWORKS = {
    f.__name__: f
    for f in (
        perceptron,
        narrow,
        convolutions,
        transformer,
        transformers,
        characters,
        recurrent,
        rows,
        parity,
        words,
    )
}

if __name__ == "__main__":
    main()
