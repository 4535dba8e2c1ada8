"""What an update holds in memory, against one gradient of the same network on the same cases: over cases, weights, solvers and linearizations.

Every number is the most that the tensors of a fresh process ever took in two updates, the first included, as TensorFlow's allocator counts them
(`tf.config.experimental.get_memory_info`; it keeps such a count on GPUs, and on CPUs with oneDNN): weights, states, data and constants are in it.
Tensors below 256 KiB are not counted: of small problems only `resident` says something.
`resident` is the most that the process held, less what it held before the first update; Python's graphs are in that one, about 200 MiB.

Over cases: 6 layers of 64 units, CG of 3 iterations, micro-batches of at most 100,000 cases. Over weights: 5 layers, 256 cases, CG of 25 iterations.
`ratio` is what the update took, less the kept iterates, over what the gradient took.

    python -m benchmarks.memory --csv benchmarks/results/memory.csv     # goes on where it stopped
    python -m benchmarks.memory --quick
"""

import argparse
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import rows as results

# Solver, linearization, preconditioner, and the bound of the kept iterates.
WAYS = {
    "forward": ("cg", "forward", "identity", None),
    "double": ("cg", "double", "identity", None),
    "forward, diagonal": ("cg", "forward", "diagonal", None),
    "double, diagonal": ("cg", "double", "diagonal", None),
    "forward, kronecker": ("cg", "forward", "kronecker", None),
    "double, kronecker": ("cg", "double", "kronecker", None),
    "double, 2 kept": ("cg", "double", "identity", 2),
    "double, kronecker, 2 kept": ("cg", "double", "kronecker", 2),
    "momentum": ("momentum", "double", "kronecker", None),
    "direct": ("direct", "double", "none", None),
}
GRADIENT = ("gradient", "none", "none", None)
CASES, WEIGHTS = (10**3, 10**4, 10**5, 10**6), (10**4, 10**5, 10**6, 10**7, 3 * 10**7)
OVER_CASES = ("forward", "double", "double, kronecker", "momentum")
OVER_WEIGHTS = tuple(way for way in WAYS if way != "direct")
COLUMNS = (
    "over source cases weights solver linearization preconditioner max_kept kept peak_mib gradient_mib iterates_mib ratio resident_mib"
).split()
MIB = 2**20
MICRO_BATCH = 100_000
QUICK = {"cases": [10**4], "weights": [10**6], "direct": [], "ways": ["double, kronecker"]}


def main(arguments=None):
    """Measures what the file does not hold yet, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="*", default=list(CASES))
    parser.add_argument("--weights", type=int, nargs="*", default=list(WEIGHTS))
    parser.add_argument("--direct", type=int, nargs="*", default=[10**3, 10**4], help="cases for DirectSolver")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = results.parse(parser, QUICK, arguments)
    if args.one:
        print(json.dumps(measure(*json.loads(args.one))))
        return
    rows = _read(args.csv)
    known = {_key(row) for row in rows}
    gradients = {}
    for over, source, cases, size, way in jobs(args):
        key = (over, source, str(cases), *map(str, WAYS[way]))
        if (*key, str(size)) in known:
            continue
        problem = (over, "arrays", cases, size)
        if problem not in gradients:
            gradients[problem] = in_a_process(*problem, GRADIENT)
        found, gradient = in_a_process(over, source, cases, size, WAYS[way]), gradients[problem]
        if found is None or gradient is None:
            continue
        iterates = found["kept"] * 4 * found["weights"] / MIB
        row = dict(zip(COLUMNS, (over, source, cases, found["weights"], *WAYS[way]), strict=False))
        row |= {
            "kept": found["kept"],
            "peak_mib": f"{found['peak']:.1f}",
            "gradient_mib": f"{gradient['peak']:.1f}",
            "iterates_mib": f"{iterates:.1f}",
            "ratio": f"{(found['peak'] - iterates) / gradient['peak']:.2f}" if gradient["peak"] else "",
            "resident_mib": f"{found['resident']:.0f}",
        }
        print(*row.values(), sep="  ", flush=True)
        if args.csv:
            rows.append(row)
            results.write(args.csv, rows)


def jobs(args):
    """Yields what is to be measured: over what, the source of the cases, their number, the number of weights, and the way."""
    chosen = lambda ways: [way for way in ways if way in args.ways]  # noqa: E731
    for cases in args.cases:
        for way in chosen(OVER_CASES):
            yield "cases", "arrays", cases, 0, way
        if cases > MICRO_BATCH and "double" in args.ways:
            yield "cases", "dataset", cases, 0, "double"
    for weights in args.weights:
        for way in chosen(OVER_WEIGHTS):
            yield "weights", "arrays", 256, weights, way
    for cases in args.direct:
        for way in chosen(("direct",)):
            yield "direct", "arrays", cases, 300, way


def in_a_process(*job):
    """Returns the measurement of one job in a process of its own; `None`, after a line, if it failed."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})
    if done.returncode:
        print(f"{job}: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measure(over, source, num_cases, size, way):
    """Returns peaks in MiB, the number of weights and of kept iterates, a dict."""
    import numpy as np
    import tensorflow as tf

    from keras_hf import ConstantDamping, HFModel

    network = build(over, size)
    x = np.random.default_rng(0).normal(size=(num_cases, 20)).astype("float32")
    y = np.sin(x[:, :1])
    weights = network.count_params()
    micro_batch = min(num_cases, MICRO_BATCH)
    kept = 0
    if tuple(way) == GRADIENT:
        run = gradient_of(network, x, y, micro_batch)
        before = _start()
        run()
    else:
        model = HFModel(network)
        model.compile(optimizer_of(way, micro_batch, max_iterations=25 if over == "weights" else 3), "mse")
        cases = (x, y)
        if source == "dataset":
            cases = (tf.data.Dataset.from_tensor_slices(cases).batch(num_cases),)
        before = _start()
        model.fit(*cases, epochs=2, callbacks=[ConstantDamping()], verbose=0)
        kept = len(model.last_trace.get("iterate_numbers", ()))
    peak = tf.config.experimental.get_memory_info("CPU:0")["peak"]
    return {
        "weights": weights,
        "kept": kept,
        "peak": peak / MIB,
        "resident": _status("VmHWM") - before,
    }


def build(over, size):
    """Returns the network: of about `size` weights, but for the one over cases."""
    import keras

    keras.utils.set_random_seed(0)
    layers, units = 6, 64
    if over == "weights":
        layers, units = 5, round(math.sqrt(size / 4))
    if over == "direct":
        layers, units = 2, round(math.sqrt(size)) - 5
    hidden = [keras.layers.Dense(units, "tanh") for _ in range(layers)]
    return keras.Sequential([keras.Input((20,)), *hidden, keras.layers.Dense(1)])


def gradient_of(network, x, y, micro_batch):
    """Returns a function without arguments that computes the gradient of the mean squared error, summed over micro-batches, twice."""
    import tensorflow as tf

    x, y = tf.constant(x), tf.constant(y)
    variables = [variable.value for variable in network.trainable_variables]

    def of_micro_batch(start, sums):
        with tf.GradientTape() as tape:
            error = network(x[start : start + micro_batch]) - y[start : start + micro_batch]
            loss = tf.reduce_sum(error**2) / len(x)
        gradient = tape.gradient(loss, variables)
        return start + micro_batch, gradient if micro_batch == len(x) else [
            a + b for a, b in zip(sums, gradient, strict=True)
        ]

    @tf.function(autograph=False)
    def gradient():
        if micro_batch == len(x):
            return of_micro_batch(0, None)[1]
        start = (tf.constant(0), [tf.zeros(variable.shape) for variable in variables])
        return tf.while_loop(lambda start, _: start < len(x), of_micro_batch, start, parallel_iterations=1)[1]

    return lambda: [gradient() for _ in range(2)][1]


def optimizer_of(way, micro_batch, max_iterations):
    """Returns `HessianFree` with a solver, a linearization and a preconditioner by their names."""
    from keras_hf import (
        ConjugateGradient,
        DirectSolver,
        DoubleBackward,
        EmpiricalFisherDiagonal,
        ForwardAccumulation,
        GaussNewton,
        HessianFree,
        Identity,
        KroneckerFactored,
        PreconditionedMomentum,
        RelativeProgress,
    )

    solver, linearization, preconditioner, max_kept = way
    if solver == "direct":
        return HessianFree(1e-3, DirectSolver(), micro_batch_size=micro_batch, seed=0)
    curvature = GaussNewton({"double": DoubleBackward, "forward": ForwardAccumulation}[linearization]())
    if solver == "momentum":
        solver = PreconditionedMomentum()
    else:
        parts = {"identity": Identity, "diagonal": EmpiricalFisherDiagonal, "kronecker": KroneckerFactored}
        # CG is to make all its iterations.
        solver = ConjugateGradient(
            parts[preconditioner](), RelativeProgress(1e-9), max_iterations, max_kept_iterates=max_kept
        )
    return HessianFree(1e-3, solver, curvature=curvature, growing_batch=None, micro_batch_size=micro_batch, seed=0)


def _start():
    """Forgets earlier peaks, and returns what the process holds in MiB."""
    import gc

    import tensorflow as tf

    gc.collect()
    tf.config.experimental.reset_memory_stats("CPU:0")
    return _status("VmRSS")


def _status(name):
    """Returns a size of Linux's `/proc/self/status` in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def _key(row):
    """What identifies a row: all that was asked for, with the number of weights as the nearest of those asked for."""
    weights = int(row["weights"])
    size = {"cases": 0, "direct": 300}.get(row["over"])
    if size is None:
        size = min(WEIGHTS, key=lambda size: abs(math.log(size / weights)))
    names = ("over", "source", "cases", "solver", "linearization", "preconditioner", "max_kept")
    return *[row[name] or "None" for name in names], str(size)


def _read(path):
    if not path or not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
