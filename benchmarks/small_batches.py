"""Small batches: what the damping must be where a batch holds few cases, and what finds it.

The loss on other cases after three epochs, on four problems and five sizes of batches. Rules: `optimism`, the default; `ratio`, the reduction ratio
alone, which sees the cases that a step was fitted to; `floor`, the same with the first damping as the least; `constant`, the first damping; and
Keras' Adam with its defaults. Problems: MNIST's digits by a perceptron 784-64-10 and by two convolutions with BatchNormalization, an autoencoder of
these images, and a regression on 8 inputs with noise of variance 0.09.

    python -m benchmarks.small_batches --csv benchmarks/results/small_batches.csv

Rows that the file already holds are kept, so that an interrupted run goes on.
"""

import argparse
import itertools
import time

import keras
import numpy as np
from keras import layers

from benchmarks import rows as results
from benchmarks.time_to_error import load_mnist_digits
from keras_hf import ConstantDamping, HFModel, LevenbergMarquardt

CLASSES = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
KEYS = "problem", "batch", "rule", "seed"


def main():
    """Trains what is missing, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 64, 128, 256, 1000])
    parser.add_argument("--rules", nargs="+", choices=[*RULES, "adam"], default=[*RULES, "adam"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--cases", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=3)
    args = results.parse(
        parser, {"problems": ["regression"], "batches": [64], "seeds": [1], "cases": 500, "rules": ["optimism", "adam"]}
    )
    table = results.read(args.csv)
    done = {tuple(str(row[key]) for key in KEYS) for row in table}
    for run in itertools.product(args.seeds, args.problems, args.batches, args.rules):
        seed, problem, batch, rule = run
        if tuple(map(str, (problem, batch, rule, seed))) in done:
            continue
        table.append(train(problem, batch, rule, seed, args.cases, args.epochs))
        print(" ".join(f"{column}={value}" for column, value in table[-1].items()), flush=True)
        if args.csv:
            results.write(args.csv, table)


def train(problem, batch, rule, seed, num_cases, num_epochs):
    """Trains one network; returns a row: losses on training and on other cases after every epoch, and the seconds of the processor."""
    keras.utils.set_random_seed(seed)
    network, loss, x, y = PROBLEMS[problem](np.random.default_rng(seed), num_cases + 5000)
    if rule == "adam":
        model = network
        model.compile("adam", loss)
    else:
        model = HFModel(network)
        model.compile(loss=loss)
    callbacks, losses, start = [] if rule == "adam" else [RULES[rule]()], [], time.process_time()
    for _ in range(num_epochs):
        model.fit(x[:num_cases], y[:num_cases], batch_size=batch, callbacks=callbacks, verbose=0)
        parts = ((x[part], y[part]) for part in (slice(min(num_cases, 5000)), slice(num_cases, None)))
        losses.append([model.evaluate(*part, batch_size=1000, verbose=0) for part in parts])
    row = {"problem": problem, "batch": batch, "rule": rule, "seed": seed}
    for epoch, (training, other) in enumerate(losses, 1):
        row |= {f"training_{epoch}": f"{training:.4g}", f"other_{epoch}": f"{other:.4g}"}
    return {**row, "seconds": round(time.process_time() - start, 1)}


class Ratio(LevenbergMarquardt):
    """By the reduction ratio alone, the limits set by rounding apart."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.optimizer.damping.assign(self.within_limits(self.next_damping(logs["damping"], logs)))


class Floor(Ratio):
    """The same, and not below the damping that the first update found."""

    def on_train_batch_end(self, batch, logs=None):
        self.min_damping = self.min_damping or logs["damping"]
        super().on_train_batch_end(batch, logs)


RULES = {"optimism": LevenbergMarquardt, "ratio": Ratio, "floor": Floor, "constant": ConstantDamping}


def digits(rng, num_cases):
    """A perceptron."""
    x, y = _images(rng, num_cases, (784,))
    return keras.Sequential([keras.Input((784,)), layers.Dense(64, "relu"), layers.Dense(10)]), CLASSES, x, y


def convolutions(rng, num_cases):
    """Two convolutions, normalised by the cases of a batch."""
    blocks = [
        layer
        for filters in (8, 16)
        for layer in (layers.Conv2D(filters, 3, strides=2), layers.BatchNormalization(), layers.ReLU())
    ]
    network = keras.Sequential([keras.Input((28, 28, 1)), *blocks, layers.Flatten(), layers.Dense(10)])
    return network, CLASSES, *_images(rng, num_cases, (28, 28, 1))


def regression(rng, num_cases):
    """A function of 8 numbers, with noise."""
    x, direction = rng.normal(size=(num_cases, 8)), rng.normal(size=8)
    y = np.sin(x @ direction) + 0.5 * x[:, 0] * x[:, 1] + 0.3 * rng.normal(size=num_cases)
    hidden = layers.Dense(64, "gelu"), layers.Dense(64, "gelu")
    return keras.Sequential([keras.Input((8,)), *hidden, layers.Dense(1)]), "mse", x, y[:, None]


def autoencoder(rng, num_cases):
    """Eight numbers for an image."""
    x, _ = _images(rng, num_cases, (784,))
    hidden = [layers.Dense(units, "sigmoid") for units in (128, 32)]
    back = [layers.Dense(units, "sigmoid") for units in (32, 128)]
    network = keras.Sequential([keras.Input((784,)), *hidden, layers.Dense(8), *back, layers.Dense(784)])
    return network, keras.losses.BinaryCrossentropy(from_logits=True), x, x


def _images(rng, num_cases, shape):
    cases = load_mnist_digits(shape, 0)
    chosen = rng.permutation(len(cases.x_train))[:num_cases]
    return cases.x_train[chosen], cases.y_train[chosen]


PROBLEMS = {"digits": digits, "convolutions": convolutions, "regression": regression, "autoencoder": autoencoder}


if __name__ == "__main__":
    main()
