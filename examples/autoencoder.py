"""Deep autoencoders trained by Hessian-free optimization and, for the same time, by first-order methods.

The experiment of Martens (2010): an encoder of logistic layers down to a few linear code units, a decoder that mirrors it
with weights of its own, cross-entropy as the loss and squared error per case as the measure. Run from the root of the
repository:

    python -m examples.autoencoder
    python -m examples.autoencoder --size full --method recipe --updates 70 --seconds inf --trace trace.csv

The first trains a small network on 10,000 synthetic curves, as the demo does. The second trains the network of the paper
on 20,000 of them by the recipe of the paper, and traces each update; `hf` is the package with its defaults, `hf-momentum`
the same with `PreconditionedMomentum`, `standard` what was known as Hessian-free optimization before. Real-valued patches
of faces have linear outputs and squared error as the loss. Written into `--out`: one CSV file per method, a figure of the
errors against time, and one of test images over their reconstructions. All methods train on the same cases and the same
loss, from the same sparse weights (but for `adam-glorot`, which has Keras' default ones), for the same time.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import keras
import matplotlib
import numpy as np
from keras import ops

from examples import origins
from examples.baselines import (
    BASELINES,
    LABELS,
    Recorder,
    fit_compiled,
    fit_lbfgs,
    fit_nonlinear_cg,
    fit_trust_region,
    recipe,
    standard_hessian_free,
)
from examples.datasets import face_patches, mnist, synthetic_curves
from examples.pretraining import pretrained
from keras_hf import HessianFree, HFModel, LevenbergMarquardt, PreconditionedMomentum, SparseNormal

matplotlib.use("Agg")
from matplotlib import pyplot, ticker  # noqa: E402

NUM_PIXELS = 784
NUM_TRAINING_FACES = 250
HESSIAN_FREE = ("hf", "hf-momentum", "recipe", "standard")
BY_SCIPY = {"lbfgs": fit_lbfgs, "ncg": fit_nonlinear_cg, "trust-region": fit_trust_region}
# What is told of each update. `loss` and `damping` are those that it started from.
TRACE_NAMES = (
    "num_cases",
    "total_cg_iterations",
    "cost",
    "cg_iterations",
    "cg_step",
    "step_size",
    "reduction_ratio",
    "damping",
    "loss",
)
METHODS = (*HESSIAN_FREE, *BY_SCIPY, *BASELINES)
DEMO_METHODS = ("hf", "adam", "nag")
DAMPING = 45.0  # At the start, that of Martens (2010).


class Setting(NamedTuple):
    """An experiment's size.

    Attributes:
        widths: Tuple of integers, the encoder's layers after the input; the last is the code.
        num_cases: Integer, training cases.
        curvature_batch_size: Integer, the cases of a curvature product; None for all.
        num_pixels: Integer.
        is_real: Boolean, whether pixels are any real numbers, or else in [0, 1].
    """

    widths: tuple
    num_cases: int
    curvature_batch_size: int | None
    num_pixels: int = NUM_PIXELS
    is_real: bool = False


SETTINGS = {
    ("curves", "demo"): Setting((100, 50, 25, 12, 6), 10_000, None),
    ("curves", "full"): Setting((400, 200, 100, 50, 25, 6), 20_000, 5_000),
    ("mnist", "demo"): Setting((200, 100, 50, 30), 2_000, None),
    ("mnist", "full"): Setting((1000, 500, 250, 30), 60_000, 7_500),
    ("faces", "demo"): Setting((200, 100, 50, 30), 2_500, None, 625, is_real=True),
    ("faces", "full"): Setting((2000, 1000, 500, 30), 103_500, 5_175, 625, is_real=True),
}


def main(arguments=None):
    """Trains with each method, prints a table and writes the figures.

    Args:
        arguments: List of strings, as on the command line; None takes those.

    Returns:
        Dict from the labels of the methods to what each reached, the last row of its `Recorder`.
    """
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    x_train, x_test = load_images(args)
    form = args.setting.num_pixels, args.setting.is_real
    if args.pretrain:
        start = build_autoencoder(args.setting.widths, args.l2, args.seed, True, *form)
        start = pretrained(start, x_train, args.pretrain, args.seed).get_weights()
    recorders, networks = {}, {}
    for method in args.method:
        print(f"\n{LABELS[method]}: {args.seconds:g} seconds on {len(x_train):,} images of {args.dataset}")
        keras.utils.set_random_seed(args.seed)
        sparse = method not in BASELINES or BASELINES[method].sparse
        network = build_autoencoder(args.setting.widths, args.l2, args.seed, sparse, *form)
        if args.pretrain:
            network.set_weights(start)
        trace = args.trace if method in HESSIAN_FREE else None
        recorder = train(args, method, network, x_train, x_test, trace or args.out / f"{method}.csv")
        recorders[method], networks[method] = recorder, network
    print_table(recorders)
    plot_errors(recorders, args.out / "errors.png")
    plot_reconstructions(networks, x_test[:12], args.out / "reconstructions.png")
    print(f"\nFigures and errors against time: {args.out}")
    return {LABELS[method]: recorder.rows[-1] for method, recorder in recorders.items()}


def parse(arguments):
    """Reads the command line, and fills in what the setting decides."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", choices=("curves", "mnist", "faces"), default="curves")
    parser.add_argument("--size", choices=("demo", "full"), default="demo")
    parser.add_argument(
        "--method", choices=METHODS, nargs="+", default=DEMO_METHODS, help=f"default: {' '.join(DEMO_METHODS)}"
    )
    parser.add_argument("--num-cases", type=int, help="training images, if not as many as the size has")
    parser.add_argument("--seconds", type=float, default=40.0, help="of training, for each method")
    parser.add_argument(
        "--updates",
        type=int,
        default=100_000,
        help="after which training ends even earlier: first-order methods make ten at a time",
    )
    parser.add_argument("--seed", type=int, default=0, help="of images, weights and batches")
    parser.add_argument("--data", type=Path, help="path of mnist.npz or olivettifaces.mat; default: Keras' copy")
    parser.add_argument("--pretrain", type=int, default=0, help="epochs of each layer's Boltzmann machine, beforehand")
    parser.add_argument("--interval", type=float, help="seconds between two rows; default: every update, or 60 rows")
    parser.add_argument("--learning-rate", type=float, help="of first-order methods, if not the method's own")
    parser.add_argument("--out", type=Path, help="folder for what is written; default: runs/DATASET-SIZE")
    parser.add_argument("--trace", type=Path, help="CSV file of the updates; default: METHOD.csv in the folder")
    parser.add_argument("--l2", type=float, default=2e-5, help="c in c/2 ||w||^2, biases included; for all methods")
    options = parser.add_argument_group("Hessian-free")
    options.add_argument(
        "--damping",
        type=float,
        help=f"at the start, on the loss summed over pixels; default: the first update finds it, of older methods {DAMPING:g}",
    )
    options.add_argument("--curvature-batch-size", type=int, help="of the recipe, if not the size's own")
    options.add_argument("--micro-batch-size", type=int)
    args = parser.parse_args(arguments)
    args.setting = setting = SETTINGS[args.dataset, args.size]
    args.loss = squared_error if setting.is_real else cross_entropy
    args.num_cases = args.num_cases or setting.num_cases
    args.curvature_batch_size = args.curvature_batch_size or setting.curvature_batch_size
    args.out = args.out or Path("runs", f"{args.dataset}-{args.size}")
    return args


def load_images(args):
    """Returns training and test images, `(num_cases, num_pixels)` and as many again, but 10,000 at most.

    Of faces `num_cases / 250` patches each, of 250 for training and of 100 for testing.
    """
    if args.dataset == "faces":
        x_train, _, x_test = face_patches(args.seed, max(1, args.num_cases // NUM_TRAINING_FACES), args.data)
        return x_train, x_test
    num_test = min(args.num_cases, 10_000)
    if args.dataset == "curves":
        images = synthetic_curves(args.num_cases + num_test, args.seed)
        return images[: args.num_cases], images[args.num_cases :]
    x_train, x_test = mnist(args.data)
    order = np.random.default_rng(args.seed).permutation(len(x_train))
    return x_train[order[: args.num_cases]], x_test[:num_test]


def build_autoencoder(widths, l2, seed, sparse=True, num_pixels=NUM_PIXELS, linear_output=False):
    """Builds an autoencoder of images: logistic layers, but for the linear code in the middle.

    Args:
        widths: Tuple of integers, the encoder's layers after the input; the decoder mirrors them.
        l2: Float c of the penalty `c/2 ||w||^2` on all weights, biases included.
        seed: Integer.
        sparse: Boolean, whether weights start sparse, or else as Keras starts them (Glorot).
        num_pixels: Integer.
        linear_output: Boolean, whether the outputs are linear, too.

    Returns:
        A `keras.Sequential` that maps `(N, num_pixels)` to `(N, num_pixels)`.
    """
    seeds = keras.random.SeedGenerator(seed)  # One for all layers: an integer would draw the same numbers for each.
    initializer = SparseNormal(seed=seeds) if sparse else keras.initializers.GlorotUniform(seed=seeds)
    network = keras.Sequential([keras.Input((num_pixels,))])
    linear = {len(widths) - 1} | ({2 * len(widths) - 1} if linear_output else set())
    for layer, units in enumerate((*widths, *widths[-2::-1], num_pixels)):
        network.add(
            keras.layers.Dense(
                units,
                activation="linear" if layer in linear else "sigmoid",
                kernel_initializer=initializer,
                kernel_regularizer=keras.regularizers.L2(l2 / 2),
                bias_regularizer=keras.regularizers.L2(l2 / 2),
            )
        )
    return network


def train(args, method, network, x_train, x_test, path, state_path=None):
    """Trains an autoencoder by a method, for the time and the updates that the options give.

    Args:
        args: The command line's options, as `parse` returns them.
        method: String, one of `METHODS`.
        network: Keras model, as `build_autoencoder` makes it.
        x_train: Array `(N, d)`.
        x_test: Array `(M, d)`.
        path: Path of the CSV file that is written.
        state_path: Path of the run's state, with which a run that was cut short goes on; see `Recorder`.

    Returns:
        The `Recorder`.
    """
    names = TRACE_NAMES if method in HESSIAN_FREE else ("cost",)
    interval = args.interval if args.interval is not None else (0 if method in HESSIAN_FREE else args.seconds / 60)
    recorder = Recorder(network, x_train, x_test, path, args.seconds, args.updates, interval, names, state_path)
    if method in HESSIAN_FREE:
        fit_hessian_free(args, method, network, x_train, recorder)
    elif method in BY_SCIPY:
        BY_SCIPY[method](network, args.loss, x_train, x_train, recorder)
    else:
        baseline = BASELINES[method]
        optimizer = baseline.optimizer(args.learning_rate or baseline.learning_rates[args.size])
        cases = x_train, x_train, baseline.batch_size
        fit_compiled(network, optimizer, args.loss, *cases, recorder, baseline.cosine_decay, args.seed)
    origins.note(path)
    return recorder


def fit_hessian_free(args, method, network, x, recorder):
    """Trains an autoencoder by Hessian-free optimization until `recorder` ends it.

    Args:
        args: The command line's options.
        method: String, "hf" for the package's defaults, "hf-momentum" for those of `PreconditionedMomentum`, "recipe" or "standard".
        network: Keras model that maps `(N, d)` to `(N, d)`.
        x: Array `(N, d)`, the training images.
        recorder: A `Recorder`.
    """
    damping = DAMPING if args.damping is None else args.damping
    if method == "recipe":
        sizes = {"curvature_batch_size": args.curvature_batch_size, "micro_batch_size": args.micro_batch_size}
        optimizer, damping_rule = recipe(damping, **sizes)
    elif method == "standard":
        optimizer, damping_rule = standard_hessian_free(damping, micro_batch_size=args.micro_batch_size)
    else:
        solver = PreconditionedMomentum() if method == "hf-momentum" else None
        optimizer = HessianFree(args.damping, solver, micro_batch_size=args.micro_batch_size)
        damping_rule = LevenbergMarquardt()
    model = HFModel(network)
    model.compile(optimizer=optimizer, loss=args.loss, metrics=[squared_error])
    model.fit(x, x, epochs=args.updates, callbacks=[damping_rule, recorder], verbose=0)


def cross_entropy(y_true, y_pred):
    """Binary cross-entropy summed over pixels, `(N,)`: the scale in which the literature gives damping and L2."""
    return NUM_PIXELS * keras.losses.binary_crossentropy(y_true, y_pred)


def squared_error(y_true, y_pred):
    """Squared error summed over pixels, `(N,)`."""
    return ops.sum(ops.square(y_true - y_pred), axis=-1)


def print_table(recorders):
    """Prints what each method reached.

    Args:
        recorders: Dict from a method's name to its `Recorder`.
    """
    print("\nSquared error per case, summed over pixels:\n")
    print("| method | seconds | updates | training | test |\n| --- | --- | --- | --- | --- |")
    for method, recorder in recorders.items():
        last = recorder.rows[-1]
        cells = (
            f"{last['seconds']:.1f}",
            f"{last['update']:,}",
            f"{last['train_error']:.3f}",
            f"{last['test_error']:.3f}",
        )
        print(f"| {' | '.join([LABELS[method], *cells])} |")


def plot_errors(recorders, path):
    """Draws the error of each method against the time of its training.

    Args:
        recorders: Dict from a method's name to its `Recorder`.
        path: Path of the PNG file.
    """
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for method, recorder in recorders.items():
        seconds, train, test = (
            [row[name] for row in recorder.rows] for name in ("seconds", "train_error", "test_error")
        )
        (line,) = axes.semilogy(seconds, train, label=LABELS[method], linewidth=2)
        axes.semilogy(seconds, test, color=line.get_color(), linestyle=":")
    mean_image = recorder.x_train.var(axis=0, dtype="float64").sum()
    axes.axhline(mean_image, color="gray", linestyle="--", linewidth=1, label="mean image", zorder=0)
    axes.set(xlabel="seconds of training", ylabel="squared error per case")
    # The start is ten or a hundred times as high as what there is to see.
    axes.set_ylim(top=2 * mean_image)
    axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_title(f"autoencoder: {len(recorder.x_train):,} training images (lines), other images (dotted)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_reconstructions(networks, x, path):
    """Draws images, one above the other with what each method makes of them.

    Args:
        networks: Dict from a method's name to its trained network.
        x: Array `(n, d)`, the images, square ones.
        path: Path of the PNG file.
    """
    side = math.isqrt(x.shape[1])
    rows = {"input": x} | {method: ops.convert_to_numpy(network(x)) for method, network in networks.items()}
    figure, axes = pyplot.subplots(len(rows), figsize=(len(x) * 0.8, len(rows) * 0.8))
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        axis.imshow(np.hstack(images.reshape(-1, side, side)), cmap="gray", vmin=x.min(), vmax=x.max())
        axis.set_ylabel(LABELS.get(name, name), rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
