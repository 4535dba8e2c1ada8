"""Whether the default linearization is the fastest one: six networks, every right way, in one process.

The time of a product as CG asks for it, over one micro-batch in float32, in rounds that take each way in turn so that a machine that drifts drifts
for all; medians over the rounds. The ratio is to the fastest way: that of the default, double backward, should stay below 1.1.

    python -m benchmarks.linearization_choice --csv benchmarks/results/linearization_choice.csv
"""

import argparse
import time

import keras
import numpy as np
import tensorflow as tf

from benchmarks import rows as results
from benchmarks.product_cost import small_cnn
from examples.autoencoder import SETTINGS, build_autoencoder, cross_entropy
from keras_hf import DoubleBackward, ForwardAccumulation, GaussNewton, HessianFree, HFModel
from keras_hf.network.fixed_network import Data
from keras_hf.training.setup import with_objective

WAYS = {
    "double backward": GaussNewton(DoubleBackward()),
    "forward accumulation": GaussNewton(ForwardAccumulation()),
}
FIELDS = ("network", "cases", "way", "seconds", "ratio to the fastest")
# Products per timing.
REPEATS = 10


def lstm():
    """Rows of an image, one after the other."""
    return keras.Sequential([keras.Input((28, 28)), keras.layers.LSTM(64), keras.layers.Dense(10)])


def transformer(width=32, depth=2):
    """A small encoder."""
    inputs = keras.Input((28, 28))
    x = keras.layers.Dense(width)(inputs)
    for _ in range(depth):
        x = keras.layers.LayerNormalization()(x + keras.layers.MultiHeadAttention(4, width // 4)(x, x))
        hidden = keras.layers.Dense(2 * width, "gelu")(x)
        x = keras.layers.LayerNormalization()(x + keras.layers.Dense(width)(hidden))
    return keras.Model(inputs, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling1D()(x)))


def networks():
    """Name -> network, loss, cases."""
    labels = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    curves, mnist = (build_autoencoder(SETTINGS[name, "full"].widths, l2=0.0, seed=0) for name in ("curves", "mnist"))
    return {
        "CURVES autoencoder": (curves, cross_entropy, 2000),
        "MNIST autoencoder": (mnist, cross_entropy, 1000),
        "small CNN": (small_cnn(), labels, 500),
        "LSTM": (lstm(), labels, 500),
        "transformer encoder": (transformer(), labels, 300),
        "wide transformer encoder": (transformer(256, 1), labels, 100),
    }


def main():
    """Times and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--networks", nargs="+", help="some of the names in `networks`; default: all")
    args = results.parse(parser, {"rounds": 3, "networks": ["CURVES autoencoder", "transformer encoder"]})
    rows = []
    for name, (network, loss, cases) in networks().items():
        if args.networks and name not in args.networks:
            continue
        rows += measure(name, network, loss, cases, args.rounds)
        if args.csv:
            results.write(args.csv, rows)


def measure(name, network, loss, cases, rounds):
    """Times, prints and returns the rows of one network as dicts."""
    model = HFModel(network)
    model.compile(optimizer=HessianFree(micro_batch_size=cases), loss=loss)
    x = tf.random.stateless_uniform([cases, *network.input_shape[1:]], seed=[0, 0])
    y = x if loss is cross_entropy else tf.random.stateless_uniform([cases], [0, 1], maxval=10, dtype=tf.int32)
    model._maybe_symbolic_build(data_batch=(x, y))
    structure = model.setup_for(Data(x, y, None)).structure
    ways = {}
    for way, curvature in WAYS.items():
        try:
            fitted = curvature.fitted_to(structure)
        except ValueError as error:
            print(f"  {way}: {str(error)[:90]}...")
            continue
        ways[way] = repeated_products(model, x, y, fitted)
    seconds = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            seconds[way].append(run())
    medians = {way: float(np.median(values)) for way, values in seconds.items()}
    fastest = min(medians.values())
    print(f"{name}: {cases} cases", flush=True)
    rows = []
    for way, median in medians.items():
        print(f"  {way:28s} {1e3 * median:8.1f} ms {median / fastest:6.2f}", flush=True)
        values = (name, cases, way, f"{median:.5f}", f"{median / fastest:.3f}")
        rows.append(dict(zip(FIELDS, values, strict=True)))
    return rows


def repeated_products(model, x, y, curvature):
    """Returns a callable that gives the seconds of one product."""
    v = tf.random.stateless_normal([model.count_params()], seed=[0, 0])

    def repeated(objective, count):
        product = objective.product(curvature)
        # Scaled down, since repeated products would overflow.
        return tf.while_loop(lambda i, _: i < count, lambda i, v: (i + 1, 1e-3 * product(v)), (0, v))[1]

    @tf.function(autograph=False)
    def run(count):
        data = Data(x, y, None)
        return with_objective(model.setup_for(data), data, lambda objective: repeated(objective, count))

    def seconds(count):
        start = time.perf_counter()
        np.asarray(run(tf.constant(count)))
        return time.perf_counter() - start

    seconds(1)
    return lambda: (seconds(REPEATS) - seconds(0)) / REPEATS


if __name__ == "__main__":
    main()
