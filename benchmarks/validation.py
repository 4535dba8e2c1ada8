"""Which model is the best on other cases, after how much time, and whether weight decay by evidence makes validation needless.

Nine data sets in three parts, for training, validation and test, and a network for each (`PROBLEMS`). Methods:

    hf               `HessianFree()`, nothing set
    hf 0.0001 ...    the same with a fixed weight decay
    hf evidence      the same with `weight_decay="evidence"`
    hf all           the same on the cases of training and validation, since it needs none of the latter
    adam 0.001 ...   Keras' Adam at a rate, batches of 64, ten of them in a call
    adamw 0.01 ...   Keras' AdamW with a decay, at the rate of Adam that had the least validation loss; times the rate it is what a step takes off

    python -m benchmarks.validation --csv benchmarks/results/validation.csv

writes rows at ever rarer times (`look`) and, at the end of a run, of three models: the one of least validation loss (`best`), with the time at which
it was found; the one that `EarlyStopping(patience=10, restore_best_weights=True)` keeps (`kept`), with the time at which that stops; the last
(`end`). Hessian-free methods are looked at after every update, Adam after every epoch, of ten batches at least. Seconds are those of the processor in
`fit`, without the first epoch, which is traced, and without the looks. Losses are without the decay; `error` is what people look at: the share of
wrong classes, 1 - AUC of the rare class, the squared error of an image. `cost` is the share of the time that the evidence takes.

Settings of a grid, by validation, are chosen on each seed. Runs that the file already holds are kept.

Two more methods, on the first two data sets, ask whether cases that an update does not use tell when to stop, without any validation:

    hf part          `ConjugateGradient` on a part of the cases that grows until it is all of them, the default of larger networks
    hf half          the same on half of the cases at most, so that there are always others

Rows of theirs: `grown`, when the part became the whole batch; `unseen`, the model at which the loss of unseen cases, a mean over ten updates, is
least, and `transfer`, the model after which ten updates together lowered the loss of unseen cases no more.

    python -m benchmarks.validation --csv benchmarks/results/validation.csv --table
    python -m benchmarks.validation --csv benchmarks/results/validation.csv --figure docs/images/validation.png
"""

import argparse
import math
import re
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from matplotlib.figure import Figure

from benchmarks import rows as results
from benchmarks.small_batches import regression
from benchmarks.time_to_error import load_mnist_digits
from examples.autoencoder import build_autoencoder
from examples.datasets import synthetic_curves
from keras_hf import ConjugateGradient, GrowingBatch, HessianFree, HFModel

DECAYS, RATES, DECOUPLED = (1e-4, 1e-3, 1e-2, 1e-1), (1e-3, 1e-2), (1e-2, 1e-1, 1.0)
PATIENCE, BATCH, CALL = 10, 64, 10
METHODS = (
    *("hf", "hf evidence", "hf all", *(f"hf {decay:g}" for decay in DECAYS)),
    *(f"adam {rate:g}" for rate in RATES),
    *(f"adamw {decay:g}" for decay in DECOUPLED),
    *("hf part", "hf half"),
)


class Problem(NamedTuple):
    """A data set and a network.

    Attributes:
        build: Callable without arguments that returns the network, with weights of Keras' global seed.
        loss: A Keras loss.
        parts: Arrays x and y of training, validation and test.
        error: Callable from targets and outputs, arrays, to what people look at, a float.
        scale: Float, what decays of the grid are divided by: a mean over many pixels is a small number for its weights.
    """

    build: object
    loss: object
    parts: tuple
    error: object
    scale: float = 1.0


def main(arguments=None):
    """Trains what is missing, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--seconds", type=float, help="of training; default: 5 to 40, by data set")
    parser.add_argument(
        "--table", action="store_true", help="print the table of what the file holds, and train nothing"
    )
    parser.add_argument("--figure", type=Path, help="draw what the file holds, and train nothing")
    args = results.parse(
        parser, {"problems": ["tanh"], "seeds": [1], "seconds": 0.3, "methods": ["hf evidence", "adam 0.01"]}, arguments
    )
    table = results.read(args.csv)
    if args.table:
        print(markdown(table))
    elif args.figure:
        draw(table).savefig(args.figure)
    else:
        for seed in args.seeds:
            for problem in args.problems:
                if seed == args.seeds[0] or problem not in ONCE:
                    run(problem, seed, args, table)


def run(problem, seed, args, table):
    """Trains by every method that the table lacks, and adds the rows."""
    for method in METHODS:
        done = any((row["dataset"], row["method"], int(row["seed"])) == (problem, method, seed) for row in table)
        is_asked = method not in PARTS or problem in ASKED
        if done or not is_asked or method not in args.methods:
            continue
        rate = best_of(table, problem, seed, [f"adam {rate:g}" for rate in RATES])
        found = train(problem, method, seed, args.seconds or SECONDS[problem], rate)
        table += found
        for row in (row for row in found if row["event"] != "look"):
            print(" ".join(f"{column}={value}" for column, value in row.items()), flush=True)
        if args.csv:
            results.write(args.csv, table)


def train(problem, method, seed, max_seconds, rate=None):
    """Trains one network; returns rows.

    Args:
        problem: String, one of `PROBLEMS`.
        method: String, one of `METHODS`.
        seed: Integer, of the data, their parts and the weights.
        max_seconds: Float.
        rate: String, the method of Adam whose rate AdamW takes.
    """
    case, (kind, _, setting) = PROBLEMS[problem](seed), method.partition(" ")
    keras.utils.set_random_seed(seed)
    network = case.build()
    x, y = case.parts[0]
    if setting == "all":
        x, y = (np.concatenate(part) for part in zip(*case.parts[:2], strict=True))
    watch = (Witness if method in PARTS else Watch)(case, network, max_seconds)
    if method in PARTS:
        model = HFModel(network)
        part = PARTS[method](min(250, len(x) // 4))
        model.compile(HessianFree(solver=ConjugateGradient(), growing_batch=part, seed=seed), case.loss)
        model.fit(x, y, epochs=10**6, callbacks=[watch], verbose=0)
    elif kind == "hf":
        decay = {"": None, "evidence": "evidence", "all": "evidence"}.get(setting, setting)
        decay = float(decay) / case.scale if decay == setting and setting[:1].isdigit() else decay
        model = HFModel(network)
        model.compile(HessianFree(weight_decay=decay, seed=seed), case.loss)
        model.fit(x, y, epochs=10**6, callbacks=[watch], verbose=0)
    else:
        if kind == "adam":
            optimizer = keras.optimizers.Adam(float(setting))
        else:
            optimizer = keras.optimizers.AdamW(float((rate or "adam 0.001").split()[1]), weight_decay=float(setting))
        network.compile(optimizer, case.loss, steps_per_execution=CALL)
        # An endless stream: an epoch of arrays costs as much as many updates of a small network.
        data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed).repeat().batch(min(BATCH, len(x)))
        calls = max(1, round(len(x) / BATCH / CALL))
        network.fit(
            data.prefetch(CALL), epochs=10**6, steps_per_epoch=CALL * calls, callbacks=[watch], shuffle=False, verbose=0
        )
    return [{"dataset": problem, "method": method, "seed": seed, **row} for row in watch.rows()]


class Watch(keras.callbacks.Callback):
    """Looks at the losses after every epoch, the clock standing still, and ends training when its time is over or the run has converged.

    Args:
        case: `Problem`.
        network: The network that is trained.
        max_seconds: Float.
    """

    def __init__(self, case, network, max_seconds):
        super().__init__()
        self._case, self._network, self._max_seconds = case, network, max_seconds
        self._outputs = tf.function(lambda x: network(x, training=False))
        self._looks, self._best, self._stopped = [], (math.inf, None), None
        self._seconds, self._updates, self._waited, self._logs = 0.0, 0, 0, {}
        self._begun_at, self._times, self._next = None, [], 0.0

    def on_train_batch_end(self, batch, logs=None):
        self._logs = dict(logs)
        self._updates += 1 if "num_cases" in logs else CALL

    def on_epoch_end(self, epoch, logs=None):
        now = time.process_time()
        if self._begun_at is not None:
            self._seconds += now - self._begun_at
            self._times.append((now - self._begun_at, math.isfinite(float(self._logs.get("num_effective", math.nan)))))
        validation = self._losses(1)[0]
        is_better, self._waited = validation < self._best[0], self._waited + 1
        row = None
        if is_better:
            row, self._waited = self._row("best"), 0
            self._best = validation, (row, self._network.get_weights())
        is_over = self._seconds > self._max_seconds or bool(self._logs.get("converged"))
        if self._stopped is None and self._best[1] and (self._waited >= PATIENCE or is_over):
            kept, weights = self._best[1]
            self._stopped = {**kept, "event": "kept", "seconds": self._seconds, "updates": self._updates}, weights
        if is_over or self._seconds >= self._next:
            self._next = max(1.2 * self._seconds, self._seconds + 0.02)
            self._looks.append(self._filled(self._row("look"), self._network.get_weights()))
        self.model.stop_training = is_over
        self._begun_at = time.process_time()

    def rows(self):
        """Returns rows, dicts: looks, and of the models that are best, kept and last. The last weights are the network's again."""
        last = self._network.get_weights()
        models = [(self._row("end"), last), *([] if self._best[1] is None else [self._stopped, self._best[1]])]
        rows = [self._filled(row, weights) for row, weights in models]
        self._network.set_weights(last)
        rows[0]["cost"] = round(self._cost(), 3)
        return [*self._looks, *rows[::-1]]

    def _row(self, event):
        decay = float(self._logs.get("weight_decay", math.nan))
        return {"event": event, "updates": self._updates, "seconds": self._seconds, "decay": decay}

    def _filled(self, row, weights):
        """A row with the losses of a model of these weights."""
        self._network.set_weights(weights)
        (training, _), (validation, _), (test, error) = (self._losses(part) for part in range(3))
        row = {**row, "training": training, "validation": validation, "test": test, "error": error}
        return {name: value if isinstance(value, (int, str)) else f"{value:.4g}" for name, value in row.items()} | {
            "cost": ""
        }

    def _losses(self, part):
        x, y = self._case.parts[part]
        outputs = np.concatenate([self._outputs(x[start : start + 2000]) for start in range(0, len(x), 2000)])
        loss = keras.losses.get(self._case.loss)
        loss = loss if callable(loss) and not isinstance(loss, keras.losses.Loss) else loss.call
        return float(np.mean(loss(y, outputs))), float(self._case.error(y, outputs)) if part == 2 else math.nan

    def _cost(self):
        """The share of the time that epochs with evidence take more than those before and after."""
        times = self._times
        more = [times[i][0] - (times[i - 1][0] + times[i + 1][0]) / 2 for i in range(1, len(times) - 1) if times[i][1]]
        return float(np.median(more) * len(more) / sum(each for each, _ in times)) if more else 0.0


class Watched(GrowingBatch):
    """A growing part that keeps what an update gained on the cases used and on others."""

    def initial_state(self, variables, layers):
        unknown = {name: tf.constant(math.nan, tf.float64) for name in ("gain", "before", "after")}
        return {**super().initial_state(variables, layers), **unknown}

    def next_state(self, state, num_used, seen_reduction, trial, num_cases, turn):
        after = super().next_state(state, num_used, seen_reduction, trial, num_cases, turn)
        known = trial.num_cases > 0
        numbers = {"gain": seen_reduction, "before": trial.loss_before, "after": trial.loss_after}
        return {**after, **{name: tf.where(known, value, math.nan) for name, value in numbers.items()}}


class Half(Watched):
    """The same, of half of the cases at most."""

    def next_state(self, state, num_used, seen_reduction, trial, num_cases, turn):
        after = super().next_state(state, num_used, seen_reduction, trial, num_cases, turn)
        return {**after, "size": tf.minimum(after["size"], num_cases // 2)}


class Witness(Watch):
    """Looks at what updates do to cases that they do not use, too."""

    def __init__(self, *args):
        super().__init__(*args)
        self._recent, self._found, self._least = [], {}, math.inf

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        state = self.model.optimizer.state().growing_batch
        before, after = (float(state[name]) for name in ("before", "after"))
        model = self._row(""), self._network.get_weights()
        if math.isnan(after):
            self._found.setdefault("grown", model)
            return
        self._recent = [*self._recent, (before, after, model)][-PATIENCE:]
        if len(self._recent) == PATIENCE:
            mean = np.mean([each[1] for each in self._recent])
            if mean < self._least:
                self._least, self._found["unseen"] = mean, model
            if sum(each[0] - each[1] for each in self._recent) <= 0:
                self._found.setdefault("transfer", self._recent[0][2])
        self._begun_at = time.process_time()

    def rows(self):
        found = super().rows()
        last = self._network.get_weights()
        found[-3:-3] = [self._filled({**row, "event": name}, weights) for name, (row, weights) in self._found.items()]
        self._network.set_weights(last)
        return found


def best_of(table, problem, seed, names):
    """Returns that of these methods whose best model has the least validation loss; `None` where the table has none of them."""
    found = {
        row["method"]: float(row["validation"])
        for row in table
        if (row["dataset"], int(row["seed"]), row["event"]) == (problem, seed, "best") and row["method"] in names
    }
    return min(found, key=found.get, default=None)


# What the rows say.

# The methods of the table and the figure: names, and those among which validation chooses.
SHOWN = {
    "`HessianFree()`": ("hf",),
    "with a decay chosen by validation": tuple(f"hf {decay:g}" for decay in DECAYS),
    'with `weight_decay="evidence"`': ("hf evidence",),
    "the same, trained on the validation cases too": ("hf all",),
    "Adam, rate chosen by validation": tuple(f"adam {rate:g}" for rate in RATES),
    "AdamW, decay chosen by validation": tuple(f"adamw {decay:g}" for decay in DECOUPLED),
}


def chosen(table):
    """Yields data set, label and the runs of a method, a list for every seed: of a grid, the one of least validation loss."""
    for dataset in dict.fromkeys(row["dataset"] for row in table):
        for label, names in SHOWN.items():
            seeds = sorted({int(row["seed"]) for row in table if row["dataset"] == dataset})
            best = {seed: best_of(table, dataset, seed, names) for seed in seeds}
            runs = [
                [row for row in table if (row["dataset"], row["method"], int(row["seed"])) == (dataset, name, seed)]
                for seed, name in best.items()
                if name
            ]
            if runs:
                yield dataset, label, runs


def markdown(table):
    """Returns a table of medians over seeds, a string."""
    lines = [
        "| data | method | best validation loss, after s | test loss, model kept, after s | test loss at the end | error kept, at the end |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for dataset, label, runs in chosen(table):
        best, kept, end = (
            [next(row for row in run if row["event"] == event) for run in runs] for event in ("best", "kept", "end")
        )
        value = lambda rows, name: f"{np.median([float(row[name]) for row in rows]):.3g}"  # noqa: E731
        cells = (
            dataset,
            label,
            "" if "too" in label else f"{value(best, 'validation')}, {value(best, 'seconds')}",
            "" if "too" in label else f"{value(kept, 'test')}, {value(kept, 'seconds')}",
            value(end, "test"),
            value(end, "error") if "too" in label else f"{value(kept, 'error')}, {value(end, 'error')}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(table):
    """Returns a figure: a panel for each data set, the test loss of the first seed against seconds."""
    # What is trained on the validation cases as well is another comparison.
    found = [(dataset, label, runs[0]) for dataset, label, runs in chosen(table) if "too" not in label]
    datasets, colors = (
        list(dict.fromkeys(dataset for dataset, *_ in found)),
        {label: f"C{i}" for i, label in enumerate(SHOWN)},
    )
    columns = min(3, len(datasets))
    figure = Figure(figsize=(4 * columns, 3 * math.ceil(len(datasets) / columns) + 0.8), layout="constrained")
    panels = list(figure.subplots(math.ceil(len(datasets) / columns), columns, squeeze=False).flat)
    lines = {}
    for axes, dataset in zip(panels, datasets, strict=False):
        of_dataset = [(label, run) for of, label, run in found if of == dataset]
        for label, run in of_dataset:
            looks = [row for row in run if row["event"] == "look"]
            course = [[max(float(row[name]), 0.01) for row in looks] for name in ("seconds", "test")]
            (lines[label],) = axes.loglog(*course, color=colors[label])
        lowest = min(float(row["test"]) for _, run in of_dataset for row in run)
        axes.set(title=dataset, ylim=(0.95 * lowest, 3 * lowest), xlabel="seconds", ylabel="test loss")
        axes.grid(alpha=0.3, which="both")
    for axes in panels[len(datasets) :]:
        axes.set_axis_off()
    names = [label.replace("`", "") for label in lines]
    figure.legend(lines.values(), names, loc="outside lower center", ncols=3, fontsize="small")
    return figure


# Data sets. Inputs and targets are standardized by the training part.


def of_regression(seed):
    """Eight inputs, noise of variance 0.09, 8,000 cases: `benchmarks.small_batches.regression`; the function is that of the seed."""
    network, loss, x, y = regression(np.random.default_rng(seed), 8000 + 2000 + 10_000)
    config = network.get_config()
    return Problem(lambda: keras.Sequential.from_config(config), loss, split(x, y, 8000, 2000), squares)


def of_tanh(seed):
    """sin(4x) exp(-x) on [-1, 1] with noise of 0.2, 60 points, by 50 units."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, size=(60 + 30 + 2000, 1))
    y = np.sin(4 * x) * np.exp(-x) + 0.2 * rng.normal(size=x.shape)
    return Problem(lambda: dense(1, (50, "tanh"), (1, None)), "mse", split(x, y, 60, 30), squares)


def of_diabetes(seed):
    """scikit-learn's diabetes: progression of a disease from ten measurements, 442 people."""
    from sklearn.datasets import load_diabetes

    return real(seed, *load_diabetes(return_X_y=True))


def of_linnerud(seed):
    """scikit-learn's linnerud: three measurements of 20 men from three exercises."""
    from sklearn.datasets import load_linnerud

    return real(seed, *load_linnerud(return_X_y=True))


def of_wine(seed):
    """scikit-learn's wine: the alcohol of 178 wines from twelve other analyses."""
    from sklearn.datasets import load_wine

    table, _ = load_wine(return_X_y=True)
    return real(seed, table[:, 1:], table[:, 0])


def real(seed, x, y):
    """A table in three parts, 60 %, 20 % and 20 %, and a network of 20-20 tanh units."""
    order, y = np.random.default_rng(seed).permutation(len(x)), y.reshape(len(y), -1).astype(float)
    sizes = round(0.6 * len(x)), round(0.2 * len(x))
    parts = split(x[order], y[order], *sizes)
    return Problem(lambda: dense(x.shape[1], (20, "tanh"), (20, "tanh"), (y.shape[1], None)), "mse", parts, squares)


def of_rare(seed):
    """Synthetic rows of 20 numbers, of which about 4 % are positive, 4,000 cases."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4000 + 2000 + 20_000, 20))
    logit = -7.5 + 1.5 * x[:, 0] * x[:, 1] + 2 * np.sin(x[:, 2] + x[:, 3]) + 1.5 * x[:, 4] + x[:, 5] ** 2
    y = (rng.random(len(x)) < 1 / (1 + np.exp(-logit))).astype("float32")[:, None]
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    return Problem(
        lambda: dense(20, (32, "gelu"), (32, "gelu"), (1, None)), loss, split(x, y, 4000, 2000, True, False), misranked
    )


def of_text(seed):
    """Sentences of Python's own help (`pydoc_data.topics`): from which of its seven longest topics, by the words that occur in them."""
    longest = sorted(topics, key=lambda name: (-len(topics[name]), name))[:7]
    pairs = {}
    for label, name in enumerate(longest):
        for sentence in re.split(r"(?<=[.:])\s+", topics[name]):
            pairs.setdefault(" ".join(re.findall(r"[a-z_]+", sentence.lower())), []).append(label)
    # Topics share paragraphs.
    pairs = [
        (sentence, labels[0]) for sentence, labels in pairs.items() if len(labels) == 1 and sentence.count(" ") >= 4
    ]
    order = np.random.default_rng(seed).permutation(len(pairs))
    sentences, y = np.array([pairs[i][0] for i in order]), np.array([[pairs[i][1]] for i in order], "int32")
    sizes = round(0.6 * len(y)), round(0.2 * len(y))
    words = layers.TextVectorization(1000, output_mode="multi_hot", standardize=None)
    words.adapt(sentences[: sizes[0]])
    x = np.asarray(words(sentences))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    build = lambda: dense(x.shape[1], (32, "relu"), (7, None))  # noqa: E731
    return Problem(build, loss, split(x, y, *sizes, False, False), misclassified)


def of_digits(seed):
    """MNIST's digits by 784-64-10, 6,000 cases."""
    cases = load_mnist_digits((784,), 0)
    order = np.random.default_rng(seed).permutation(len(cases.x_train))[:8000]
    x, y = cases.x_train[order], cases.y_train[order, None]
    parts = ((x[:6000], y[:6000]), (x[6000:], y[6000:]), (cases.x_test, cases.y_test[:, None]))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Problem(lambda: dense(784, (64, "relu"), (10, None)), loss, parts, misclassified)


def of_autoencoder(seed):
    """The demo's autoencoder, sparse weights, 10,000 synthetic curves; the loss is a mean over the 784 pixels."""
    images = synthetic_curves(14_000, seed)
    parts = tuple((part, part) for part in np.split(images, (10_000, 12_000)))

    def build():
        network = build_autoencoder((100, 50, 25, 12, 6), 0.0, seed)
        for weight in network.trainable_variables:
            # A regularizer of nothing.
            weight.regularizer = None
        return network

    return Problem(build, "binary_crossentropy", parts, lambda y, z: np.square(y - z).sum(1).mean(), scale=784.0)


def dense(num_inputs, *sizes):
    """Returns a network of dense layers, each as units and activation."""
    return keras.Sequential([keras.Input((num_inputs,)), *[layers.Dense(*size) for size in sizes]])


def split(x, y, num_training, num_validation, of_inputs=True, of_targets=True):
    """Returns three parts, float32 where numbers are standardized, by mean and deviation of the first; False leaves them."""
    ends = num_training, num_training + num_validation
    standard = lambda a: ((a - a[:num_training].mean(0)) / a[:num_training].std(0)).astype("float32")  # noqa: E731
    x, y = standard(x) if of_inputs else x.astype("float32"), standard(y) if of_targets else y
    return tuple(zip(np.split(x, ends), np.split(y, ends), strict=True))


def squares(y, z):
    """The mean squared error."""
    return np.mean(np.square(y - z))


def misclassified(y, z):
    """The share of wrong classes."""
    return np.mean(z.argmax(1) != y[:, 0])


def misranked(y, z):
    """1 - AUC: the share of pairs of a positive and a negative case that are in the wrong order."""
    ranks = np.argsort(np.argsort(z[:, 0]))
    positive = y[:, 0] > 0
    num_positive = positive.sum()
    ahead = ranks[positive].sum() - num_positive * (num_positive - 1) / 2
    return 1 - ahead / (num_positive * (len(y) - num_positive))


PROBLEMS = {
    "regression": of_regression,
    "tanh": of_tanh,
    "diabetes": of_diabetes,
    "linnerud": of_linnerud,
    "wine": of_wine,
    "rare": of_rare,
    "text": of_text,
    "digits": of_digits,
    "autoencoder": of_autoencoder,
}
SECONDS = dict(zip(PROBLEMS, (10, 2, 2, 2, 2, 5, 5, 5, 20), strict=True))
PARTS, ASKED = {"hf part": Watched, "hf half": Half}, ("regression", "tanh")
# One seed only.
ONCE = "digits", "autoencoder"


if __name__ == "__main__":
    main()
