"""Trains an autoencoder by K-FAC as kfac-jax has it; see `benchmarks.peers.minibatches`, which runs this.

Needs a JAX of its time: kfac-jax 0.0.8 unpacks what `get_bind_params` returned until JAX 0.9.1, and fails with JAX 0.10.2. Each run writes
`OUT/kfac-jax-SETTING-seedSEED.csv` with the columns of `benchmarks.time_to_error`, and the damping; a run whose file is complete is not made again.
What counts as time is the same, too: tracing and compiling do not, for the first updates are undone, and the clock stands still while errors are
measured. Estimates of the curvature before the first update do count. `cost` is in gradients of the training set, as
`keras_hf.callbacks.recorder.update_cost` counts it: 1 for a gradient, 1/3 for a loss, 5/3 for the two forward derivatives of an adaptive update;
estimates of the factors and their inverses are left out.

`GRID` has two kinds of settings. The first is that of kfac-jax's own example of this network, which has tanh units and trains on all cases: learning
rate and momentum from the exact quadratic, damping by Levenberg and Marquardt. The second has a fixed learning rate, momentum and damping, as
kfac-jax advises for minibatches. Damping, learning rate and L2 are for a loss summed over pixels.
"""

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
import optax

from benchmarks.peers import handover
from examples import origins
from examples.tables import add_row, write_rows

PIECE_SIZE = 5000
MOMENTUM = 0.9
ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "linear": lambda x: x}


class Setting(NamedTuple):
    """What kfac-jax is told.

    Attributes:
        batch_size: Integer, the cases of an update.
        damping: Float, at the start; it stays where the learning rate is fixed.
        learning_rate: Float, with a momentum of 0.9; None has both, and the damping, adapted.
        l2: Float c of the penalty `c/2 ||w||^2` on all weights, biases included.
    """

    batch_size: int
    damping: float
    learning_rate: float | None = None
    l2: float = 1e-5

    @property
    def is_adaptive(self):
        """Whether learning rate, momentum and damping are adapted."""
        return self.learning_rate is None


# The number of a setting is its place: append.
GRID = [
    Setting(1_000, damping=150.0),
    Setting(4_000, damping=150.0),
    Setting(60_000, damping=150.0),
    Setting(1_000, damping=1e-2, learning_rate=1e-2),
    Setting(1_000, damping=1.0, learning_rate=3e-2),
    Setting(1_000, damping=10.0, learning_rate=1e-1),
]


class Start(NamedTuple):
    """Where runs of a seed start from.

    Attributes:
        x_train: Array `(N, d)`.
        x_test: Array `(M, d)`.
        weights: List of dicts of arrays, of each layer `kernel` `(inputs, units)` and `bias` `(units,)`.
        activations: List of strings, of each layer its activation.
    """

    x_train: np.ndarray
    x_test: np.ndarray
    weights: list
    activations: list


def read_start(path):
    """Reads what `benchmarks.peers.minibatches` hands over.

    Raises:
        ValueError: If the network's outputs are not logistic: the loss is computed from their total inputs.
    """
    layers, arrays = handover.load(path)
    weights = [{"kernel": layer.kernel, "bias": layer.bias} for layer in layers]
    activations = [layer.activation for layer in layers]
    if activations[-1] != "sigmoid":
        raise ValueError(f"The outputs must be logistic. Received: activation='{activations[-1]}'.")
    return Start(arrays["x_train"], arrays["x_test"], weights, activations)


def total_inputs(weights, activations, x):
    """Returns the total inputs of the output units `(N, d)`."""
    for layer, activation in zip(weights[:-1], activations[:-1], strict=True):
        x = ACTIVATIONS[activation](jnp.dot(x, layer["kernel"]) + layer["bias"])
    return jnp.dot(x, weights[-1]["kernel"]) + weights[-1]["bias"]


def make_loss(activations, l2):
    """Returns the function that is minimised, `(weights, x) -> loss`: the mean over cases, and the penalty."""

    def loss(weights, x):
        logits = total_inputs(weights, activations, x)
        kfac_jax.register_sigmoid_cross_entropy_loss(logits, x)
        of_cases = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, x), axis=-1)
        return jnp.mean(of_cases) + l2 / 2 * kfac_jax.utils.inner_product(weights, weights)

    return loss


def make_optimizer(setting, loss):
    """Returns the `kfac_jax.Optimizer` of a setting, which else is that of kfac-jax's example of the autoencoder."""
    adaptive = {}
    if setting.is_adaptive:
        adaptive = {
            "use_adaptive_learning_rate": True,
            "use_adaptive_momentum": True,
            "use_adaptive_damping": True,
            "initial_damping": setting.damping,
            "damping_adaptation_decay": 0.95,
            "damping_adaptation_interval": 5,
            "min_damping": 1e-5,
            "max_damping": 1000.0,
        }
    return kfac_jax.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=setting.l2,
        inverse_update_period=5,
        curvature_ema=0.95,
        num_burnin_steps=5,
        **adaptive,
    )


def batches_of_cases(x, batch_size, rng):
    """Yields arrays `(batch_size, d)`: one permutation of all cases after the other. All cases stay in their order."""
    # Arrays of numpy: kfac-jax gives away the memory of batches that it gets as arrays of JAX.
    if batch_size == len(x):
        while True:
            yield x
    cases = np.empty(0, int)
    while True:
        if len(cases) < batch_size:
            cases = np.concatenate([cases, rng.permutation(len(x))])
        yield x[cases[:batch_size]]
        cases = cases[batch_size:]


class Training:
    """A run of kfac-jax, which can begin anew without compiling again.

    Args:
        setting: A `Setting`.
        start: A `Start`.
        seed: Integer, of the order of cases and of random estimates.
    """

    def __init__(self, setting, start, seed):
        self._setting, self._start, self._seed = setting, start, seed
        self.batch_size = min(setting.batch_size, len(start.x_train))
        self._fixed = {}
        if not setting.is_adaptive:
            self._fixed = {
                "learning_rate": setting.learning_rate,
                "momentum": MOMENTUM,
                "damping": setting.damping,
            }
        self._optimizer = make_optimizer(setting, make_loss(start.activations, setting.l2))
        self.begin()
        # Where the damping is adapted, every fifth update is another program.
        for _ in range(5 if setting.is_adaptive else 1):
            self.update()
        self.begin()

    def begin(self):
        """Takes everything back to the start."""
        self._batches = batches_of_cases(self._start.x_train, self.batch_size, np.random.default_rng([self._seed, 0]))
        self._key = jax.random.PRNGKey(self._seed)
        # Copies: updates give away the memory of the weights that they get.
        self.weights = jax.tree_util.tree_map(lambda array: jnp.array(array, copy=True), self._start.weights)
        self._state = self._optimizer.init(self.weights, self._next_key(), next(self._batches))
        self.num_updates, self.cost, self.damping = 0, 0.0, self._setting.damping

    def update(self):
        """Makes an update, and waits for its end."""
        self.weights, self._state, stats = self._optimizer.step(
            self.weights,
            self._state,
            self._next_key(),
            data_iterator=self._batches,
            global_step_int=self.num_updates,
            **self._fixed,
        )
        jax.block_until_ready(self.weights)
        self.damping = float(stats["damping"])
        self.num_updates += 1
        if self._setting.is_adaptive:
            passes = 1 + 5 / 3 + (1 / 3 if self.num_updates % 5 == 0 else 0)
        else:
            passes = 1
        self.cost += passes * self.batch_size / len(self._start.x_train)

    def _next_key(self):
        self._key, key = jax.random.split(self._key)
        return key


def make_errors(start, l2):
    """Returns a function of weights: the errors that a row holds, a dict, added up in float64."""

    @jax.jit
    def of_cases(weights, x):
        logits = total_inputs(weights, start.activations, x)
        squares = jnp.sum(jnp.square(jax.nn.sigmoid(logits) - x), axis=-1)
        return squares, jnp.sum(optax.sigmoid_binary_cross_entropy(logits, x), axis=-1)

    def means(weights, x):
        pieces = [of_cases(weights, x[first : first + PIECE_SIZE]) for first in range(0, len(x), PIECE_SIZE)]
        return [_sum(parts) / len(x) for parts in zip(*pieces, strict=True)]

    def errors(weights):
        train_error, train_loss = means(weights, start.x_train)
        test_error, _ = means(weights, start.x_test)
        penalty = l2 / 2 * _sum(np.square(array) for array in jax.tree_util.tree_leaves(weights))
        return {"train_error": train_error, "test_error": test_error, "train_loss": train_loss + penalty}

    return errors


def _sum(arrays):
    """Sums in float64, which JAX does not have unless it is told to."""
    return float(sum(np.sum(np.asarray(array), dtype="float64") for array in arrays))


def run(path, setting, start, seed, max_seconds, max_updates=math.inf):
    """Trains once, unless there is the file: writes it, as `.partial` until it is complete.

    Rows lie as far apart as those of `benchmarks.time_to_error.Curve`. Training also ends where the error is no number.

    Args:
        path: Path of the CSV file.
        setting: A `Setting`.
        start: A `Start`.
        seed: Integer, of the order of cases and of random estimates.
        max_seconds: Float, the time of training.
        max_updates: Integer, the updates after which training ends even if time is left.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    training, errors = Training(setting, start, seed), make_errors(start, setting.l2)

    def row(num_cases, seconds):
        counts = {"update": training.num_updates, "num_cases": num_cases, "cost": training.cost}
        return {**counts, "seconds": round(seconds, 3), **errors(training.weights), "damping": training.damping}

    last = row(0, 0.0)
    write_rows(partial_path, [last])
    is_over, paused = False, 0.0
    clock = time.perf_counter()
    while not is_over:
        training.update()
        seconds = time.perf_counter() - clock - paused
        is_over = seconds >= max_seconds or training.num_updates >= max_updates
        interval = min(max(0.1 * last["seconds"], max_seconds / 200), max_seconds / 40)
        if is_over or seconds >= last["seconds"] + interval:
            last = row(training.batch_size, seconds)
            add_row(partial_path, last)
            is_over = is_over or not math.isfinite(last["train_error"])
            paused = time.perf_counter() - clock - seconds
    partial_path.rename(path)
    origins.note(path)
    print(f"  train {last['train_error']:.4f} test {last['test_error']:.4f} updates {last['update']}", flush=True)


def main(arguments=None):
    """Runs as the command line says.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--setting", type=int, nargs="+", default=range(len(GRID)), help="by number; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the order of cases and of random estimates")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, of each setting")
    parser.add_argument("--updates", type=int, default=math.inf, help="after which training ends even earlier")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args(arguments)
    start = read_start(args.file)
    for number in args.setting:
        print(f"kfac-jax {number} {GRID[number]} seed {args.seed}", flush=True)
        path = args.out / f"kfac-jax-{number}-seed{args.seed}.csv"
        run(path, GRID[number], start, args.seed, args.seconds, args.updates)


if __name__ == "__main__":
    main()
