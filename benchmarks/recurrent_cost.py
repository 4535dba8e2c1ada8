"""What a Gauss-Newton product of a recurrent network costs beside a gradient: loops, unrolled, by both linearizations.

Network: SimpleRNN(100) without biases, a trained first state, a softmax on every step; or a GRU or an LSTM of as many units. Sequences are those of
`memory-20`. Seconds are the least of several rounds, of products in a loop as CG makes them; memory is the most that the process ever held, less
what it held before tracing.

    python -m benchmarks.recurrent_cost --lengths 100 200 --cases 300 1000 --csv benchmarks/results/recurrent_cost.csv
    python -m benchmarks.recurrent_cost --cells gru lstm --ways "loop, double" --csv benchmarks/results/recurrent_cost_gated.csv
"""

import argparse
import functools
import itertools
import json
import os
import resource
import subprocess
import sys
import time

from benchmarks import rows as results

WAYS = {
    "loop, double": (False, "double"),
    "unrolled, double": (True, "double"),
    "unrolled, forward": (True, "forward"),
}
CELLS = {"simple": None, "gru": "GRU", "lstm": "LSTM"}
PRODUCTS, ROUNDS = 5, 4


def main():
    """Measures each way in a process of its own, prints a table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--cases", type=int, nargs="+", default=[300, 1000])
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--cells", choices=CELLS, nargs="+", default=["simple"])
    parser.add_argument("--units", type=int, default=100)
    parser.add_argument("--no-structural", action="store_true", help="products without hidden states in them")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = results.parse(parser, {"lengths": [50], "cases": [100], "ways": ["loop, double", "unrolled, forward"]})
    if args.one:
        print(json.dumps(measure(*json.loads(args.one))))
        return
    rows = []
    for cell, length, cases, way in itertools.product(args.cells, args.lengths, args.cases, args.ways):
        what = json.dumps([length, cases, args.units, cell, way, not args.no_structural])
        command = [sys.executable, "-m", "benchmarks.recurrent_cost", "--one", what]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{cell}, T={length}, {cases} cases, {way}: {done.stderr.splitlines()[-1]}", flush=True)
            continue
        measured = json.loads(done.stdout.splitlines()[-1])
        rows.append({"cell": cell, "length": length, "cases": cases, "way": way, **measured})
        print(rows[-1], flush=True)
    if args.csv and rows:
        results.write(args.csv, rows)


def measure(length, cases, units, cell, way, structural):
    """Returns seconds and MiB of one way, a dict."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import numpy as np
    import tensorflow as tf

    from examples.recurrent import build_network
    from examples.recurrent_problems import PROBLEMS
    from keras_hf import (
        ConjugateGradient,
        DoubleBackward,
        ForwardAccumulation,
        GaussNewton,
        HessianFree,
        HFModel,
        Identity,
        StructuralDamping,
    )
    from keras_hf.network.fixed_network import Data
    from keras_hf.training.setup import with_objective

    unroll, kind = WAYS[way]
    problem = PROBLEMS["memory-20"](length)
    x, y = problem.draw(cases, np.random.default_rng(0))
    layer = CELLS[cell] and functools.partial(getattr(keras.layers, CELLS[cell]), unroll=unroll)
    network = build_network(problem, x.shape[1:], units, 0, layer, unroll)
    linearization = {"double": DoubleBackward, "forward": ForwardAccumulation}[kind]()
    model = HFModel(network)
    optimizer = HessianFree(
        solver=ConjugateGradient(Identity()),
        curvature=GaussNewton(linearization),
        growing_batch=None,
        micro_batch_size=cases,
        structural_damping=StructuralDamping() if structural else None,
    )
    model.compile(optimizer, problem.loss)
    data = Data(tf.constant(x), tf.constant(y), None)
    model._maybe_symbolic_build(data_batch=tuple(data))

    def products(count):
        def compute(objective):
            product = objective.product(optimizer.curvature)
            damped = product.with_hidden_states(tf.constant(0.1))
            v = tf.ones([objective.num_weights])

            def body(i, v):
                return i + 1, v / tf.norm(v) + 1e-3 * damped(v)

            return tf.while_loop(lambda i, v: i < count, body, (tf.constant(0), v), parallel_iterations=1)[1]

        return with_objective(model.setup_for(data), data, compute)

    compiled = tf.function(products, autograph=False)
    before = _mebibytes()
    start = time.perf_counter()
    compiled(tf.constant(1))
    first = time.perf_counter() - start
    memory = _mebibytes() - before

    @tf.function(autograph=False)
    def gradient():
        return with_objective(model.setup_for(data), data, lambda objective: objective.loss_and_gradient().gradient)

    gradient()
    seconds = {name: [] for name in ("none", "some", "gradient")}
    for _ in range(ROUNDS):
        for name, function in (
            ("none", lambda: compiled(tf.constant(0))),
            ("some", lambda: compiled(tf.constant(PRODUCTS))),
            ("gradient", gradient),
        ):
            start = time.perf_counter()
            function().numpy()
            seconds[name].append(time.perf_counter() - start)
    least = {name: min(values) for name, values in seconds.items()}
    product = (least["some"] - least["none"]) / PRODUCTS
    return {
        "product": round(product, 4),
        "gradient": round(least["gradient"], 4),
        "gradients": round(product / least["gradient"], 2),
        "linearization": round(least["none"], 4),
        "first_call": round(first, 1),
        "MiB": round(memory),
    }


def _mebibytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
