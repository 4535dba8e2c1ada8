"""What a product costs, beside a compiled gradient and beside the work of an update that is no pass over data.

Networks: the CURVES autoencoder 784-400-200-100-50-25-6 and mirror, 842,340 weights, on synthetic curves, and a small convolutional classifier on
noise. One micro-batch, float32. Everything is timed in one process, in rounds that take each quantity in turn, so that a machine that drifts drifts
for all; medians over the rounds are printed, and written as CSV.

    python -m benchmarks.product_cost --cases 5000 --csv benchmarks/results/product_cost.csv
"""

import argparse
import time

import keras
import numpy as np
import tensorflow as tf

from benchmarks import rows as results
from examples.autoencoder import SETTINGS, build_autoencoder, cross_entropy
from examples.datasets import synthetic_curves
from keras_hf import DoubleBackward, ForwardAccumulation, GaussNewton, Hessian, HessianFree, HFModel, conjugate_gradient
from keras_hf.network.fixed_network import Data
from keras_hf.solvers.stopping import StoppingRule
from keras_hf.training.setup import with_objective

PRODUCTS = {
    "Gauss-Newton, double backward": GaussNewton(DoubleBackward()),
    "Gauss-Newton, forward accumulation": GaussNewton(ForwardAccumulation()),
    "Hessian, double backward": Hessian(DoubleBackward()),
}
FIELDS = ("network", "cases", "quantity", "seconds", "gradients")
# Products and CG iterations per timing.
REPEATS = 10


class StopAfter(StoppingRule):
    """Stops after a number of iterations, an int32 scalar tensor, and for no other reason."""

    def __init__(self, num_iterations):
        self.num_iterations = num_iterations

    def should_stop(self, iteration, value_at, residual_norm, b_norm):
        return iteration >= self.num_iterations


def main():
    """Times and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    args = results.parse(parser, {"cases": 1000, "rounds": 3})

    x = tf.constant(synthetic_curves(args.cases, seed=0))
    model = HFModel(build_autoencoder(SETTINGS["curves", "full"].widths, l2=2e-5, seed=0))
    model.compile(optimizer=HessianFree(micro_batch_size=args.cases), loss=cross_entropy)
    rows = measure("autoencoder", model, x, x, args.rounds)
    images = tf.random.stateless_normal([args.cases, 28, 28, 1], seed=[1, 0])
    labels = tf.random.stateless_uniform([args.cases], seed=[1, 1], maxval=10, dtype=tf.int32)
    model = HFModel(small_cnn())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=HessianFree(micro_batch_size=args.cases), loss=loss)
    rows += measure("small CNN", model, images, labels, args.rounds)
    if args.csv:
        results.write(args.csv, rows)


def measure(network, model, x, y, rounds):
    """Times, prints and returns the rows of one network as dicts."""
    model._maybe_symbolic_build(data_batch=(x, y))
    quantities = timed_quantities(model, x, y)
    seconds = {name: [] for name in quantities}
    for _ in range(rounds):
        for name, run in quantities.items():
            seconds[name].append(run())
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    print(f"{network}: {len(x)} cases, {model.count_params():,} weights, medians of {rounds} rounds")
    for name, median in medians.items():
        print(f"  {name:40s} {1e3 * median:9.1f} ms {median / medians['gradient']:7.3f} gradients")
    vectors, product = medians["vector work of a CG iteration"], medians["Gauss-Newton, double backward"]
    print(f"  vector work is {vectors / (vectors + product):.1%} of a CG iteration")
    values = [
        (network, len(x), name, f"{median:.5f}", f"{median / medians['gradient']:.4f}")
        for name, median in medians.items()
    ]
    return [dict(zip(FIELDS, row, strict=True)) for row in values]


def small_cnn():
    """Two convolutions and a classifier, 13,000 weights."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def compiled_gradient(model, x, y):
    """Returns a function without arguments: the gradient of the loss as one array `(n,)`, compiled as Keras compiles it."""
    variables = [variable.value for variable in model.trainable_variables]

    @tf.function
    def gradient():
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model.network(x, training=True))
        return tf.concat([tf.reshape(g, [-1]) for g in tape.gradient(loss, variables)], 0)

    gradient()
    return lambda: gradient().numpy()


def timed_quantities(model, x, y):
    """Returns a dict from name to a callable that gives the seconds of one."""
    v = tf.random.stateless_normal([model.count_params()], seed=[0, 0])
    diagonal = 0.1 + tf.random.stateless_uniform([model.count_params()], seed=[0, 1])

    data = Data(x, y, None)

    def on_objective(function):
        compiled = tf.function(autograph=False)(
            lambda count: with_objective(model.setup_for(data), data, lambda objective: function(objective, count))
        )
        return lambda count=1: compiled(tf.constant(count))

    def products(curvature):
        def repeated(objective, count):
            product = objective.product(curvature)
            # Scaled down, since repeated products would overflow.
            return tf.while_loop(lambda i, _: i < count, lambda i, v: (i + 1, 1e-3 * product(v)), (0, v))[1]

        return on_objective(repeated)

    @tf.function(autograph=False)
    def cg(count):
        def one_product(v):
            return v * diagonal

        # A product that is one multiplication and the preconditioner's division: what is left is CG's own work.
        precondition = lambda residual: residual / (1 + diagonal)  # noqa: E731
        return conjugate_gradient(one_product, v, precondition=precondition, stopping=StopAfter(count)).iterates

    def once(run):
        run()
        return lambda: _seconds(run)

    def per_repeat(run):
        run(0), run(REPEATS)
        return lambda: (_seconds(lambda: run(REPEATS)) - _seconds(lambda: run(0))) / REPEATS

    loss_at = on_objective(lambda objective, count: objective.loss_at(tf.zeros_like(v)))
    squares = on_objective(lambda objective, count: objective.squared_gradients())
    return {
        "gradient": once(compiled_gradient(model, x, y)),
        "loss": once(loss_at),
        "squared gradients of all cases": once(squares),
        **{name: per_repeat(products(curvature)) for name, curvature in PRODUCTS.items()},
        "vector work of a CG iteration": per_repeat(lambda count: cg(tf.constant(count + 1))),
    }


def _seconds(run):
    start = time.perf_counter()
    np.asarray(run())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
