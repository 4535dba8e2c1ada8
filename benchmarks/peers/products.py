"""What a Gauss-Newton product costs here, in JAX and in PyTorch: seconds, and gradients of the same library.

Networks, all float32, weights and cases handed over: the CURVES autoencoder 784-400-200-100-50-25-6 and mirror (cross-entropy, synthetic curves) and
a small network 20-64-64-1 (squares). JAX: `jax.linearize` and `jax.vjp`, both outside the loop of products, which is one program, as ours is.
PyTorch: `curvlinops.GGNLinearOperator` and BackPACK's `ggn_vector_product`, both eager. Each library has a process of its own, one after the other;
medians over rounds. `difference` is that of the product from ours, relative, in the L2 norm.

    make peers
    python -m benchmarks.peers.products
    python -m benchmarks.gather runs/peers_products benchmarks/results/peers_products.csv
"""

import argparse
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from benchmarks import rows as results
from benchmarks.linearization_choice import repeated_products
from benchmarks.peers import handover, timings
from benchmarks.product_cost import compiled_gradient
from examples.autoencoder import SETTINGS, build_autoencoder, cross_entropy
from examples.datasets import synthetic_curves
from keras_hf import GaussNewton, HessianFree, HFModel
from keras_hf.network.fixed_network import Data
from keras_hf.training.setup import with_objective

PEERS = {"jax": "products_in_jax", "torch": "products_in_torch"}


def autoencoder(num_cases):
    """The CURVES autoencoder: network, loss, inputs and targets."""
    x = synthetic_curves(num_cases, 0)
    return build_autoencoder(SETTINGS["curves", "full"].widths, l2=0.0, seed=0), cross_entropy, x, x


def small_network(num_cases):
    """A small regression: network, loss, inputs and targets."""
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(64, "tanh") for _ in range(2)]
    x = np.random.default_rng(0).normal(size=(num_cases, 20)).astype("float32")
    return keras.Sequential([keras.Input((20,)), *hidden, keras.layers.Dense(1)]), "mse", x, np.sin(x[:, :1])


PROBLEMS = {"autoencoder": autoencoder, "small": small_network}


def main(arguments=None):
    """Times ours, hands over, and has the peers timed.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", choices=PEERS, nargs="*", default=list(PEERS))
    parser.add_argument("--out", type=Path, default=Path("runs", "peers_products"), help="folder of the results")
    args = results.parse(parser, {"cases": [1000], "rounds": 3}, arguments)
    rows, paths = [], []
    for name, make in PROBLEMS.items():
        for cases in args.cases:
            paths.append(handover.FOLDER / f"{name}-{cases}.npz")
            rows.append(measure(name, *make(cases), args.rounds, paths[-1]))
            print(rows[-1], flush=True)
    results.write(args.out / "keras_hf.csv", rows)
    handover.run_all(
        (peer, PEERS[peer], *paths, "--rounds", args.rounds, "--csv", args.out / f"{peer}.csv") for peer in args.peers
    )


def measure(name, network, loss, x, y, rounds, path):
    """Times a gradient and a product, hands over, and returns a row of the table as a dict."""
    model = HFModel(network)
    model.compile(HessianFree(micro_batch_size=len(x)), loss)
    data = Data(tf.constant(x), tf.constant(y), None)
    model._maybe_symbolic_build(data_batch=data[:2])
    curvature = GaussNewton().fitted_to(model.setup_for(data).structure)
    v = np.random.default_rng(1).normal(size=model.count_params()).astype("float32")

    @tf.function(autograph=False)
    def product_with_v():
        return with_objective(
            model.setup_for(data), data, lambda objective: objective.product(curvature)(tf.constant(v))
        )

    gradient = compiled_gradient(model, data.x, data.y)
    product = repeated_products(model, data.x, data.y, curvature)
    handover.save(
        path,
        network.layers,
        x=x,
        y=y.astype("float32"),
        v=v,
        product=product_with_v().numpy(),
        loss="squares" if loss == "mse" else "cross-entropy",
    )
    gradient_seconds, product_seconds = np.median([(timings.seconds_of(gradient), product()) for _ in range(rounds)], 0)
    return timings.row(name, len(x), len(v), "keras_hf", gradient_seconds, product_seconds, 0.0)


if __name__ == "__main__":
    main()
