"""What a second worker brings: one process pinned to a core against two pinned to one each, on the autoencoder of the paper.

Strong scaling divides the same cases, so that workers make the updates of one process, the same numbers; weak scaling gives each worker as many cases
as the one has. `apart` are two processes that know nothing of each other, on as many cases each as in strong scaling: what the machine allows.
Seconds are the median over updates after the first, which traces; bytes are what the loopback device carried, per update; memory is the most that a
worker ever held.

    python -m benchmarks.scaling --csv benchmarks/results/scaling.csv
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import rows as results
from examples.distributed import free_addresses


def main():
    """Measures each setting in processes of its own, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=[2000, 8000], help="of one process")
    parser.add_argument("--size", choices=("demo", "full"), default="full", help="of the network")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = results.parse(parser, {"cases": [1000], "size": "demo", "updates": 4})
    if args.one:
        measure(**json.loads(args.one))
        return
    rows = []
    for cases in args.cases:
        settings = {
            "one": [[cases]],
            "apart": [[cases // 2], [cases // 2]],
            "strong": [[cases, cases]],
            "weak": [[2 * cases, 2 * cases]],
        }
        for name, clusters in settings.items():
            rows.append({"cases": cases, "setting": name, **run(args, clusters)})
            print(rows[-1], flush=True)
    if args.csv:
        results.write(args.csv, rows)


def run(args, clusters):
    """Runs clusters side by side, each a list of the cases that its workers are given, and returns a row of the slowest worker's numbers."""
    with tempfile.TemporaryDirectory() as folder:
        processes, core = [], 0
        for workers in clusters:
            addresses = free_addresses(len(workers))
            for number, cases in enumerate(workers):
                config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": number}}
                environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_CONFIG": json.dumps(config)}
                if len(workers) == 1:
                    del environment["TF_CONFIG"]
                what = {"cases": cases, "size": args.size, "updates": args.updates, "core": core}
                path = Path(folder, f"{core}.json")
                command = [sys.executable, "-m", "benchmarks.scaling", "--one", json.dumps({**what, "path": str(path)})]
                processes.append((path, subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)))
                core += 1
        for _, process in processes:
            if process.wait():
                raise SystemExit(f"A worker ended with {process.returncode}.")
        found = [json.loads(path.read_text()) for path, _ in processes]
    return {name: max(each[name] for each in found) for name in found[0]}


def measure(cases, size, updates, core, path):
    """Trains as one worker on one core, and writes what an update took."""
    os.sched_setaffinity(0, {core})
    import keras
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)

    from examples.autoencoder import SETTINGS, build_autoencoder, cross_entropy
    from examples.datasets import synthetic_curves
    from keras_hf import HessianFree, HFModel, LevenbergMarquardt, multi_worker_strategy

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.start = time.perf_counter(), loopback_bytes()

        def on_train_batch_end(self, batch, logs=None):
            seconds.append(time.perf_counter() - self.start[0])
            sent.append(loopback_bytes() - self.start[1])
            iterations.append(logs["cg_iterations"])

    seconds, sent, iterations = [], [], []
    images = synthetic_curves(cases, 0)
    strategy = multi_worker_strategy()
    with strategy.scope():
        model = HFModel(build_autoencoder(SETTINGS["curves", size].widths, 2e-5, 0))
        model.compile(HessianFree(damping=45.0, growing_batch=None, seed=0), loss=cross_entropy)
    model.fit(images, images, epochs=updates, callbacks=[LevenbergMarquardt(), Clock()], verbose=0)
    found = {
        "seconds": round(statistics.median(seconds[1:]), 4),
        "seconds_of_all": round(sum(seconds[1:]), 3),
        "cg_iterations": int(sum(iterations[1:])),
        "megabytes_sent": round(sum(sent[1:]) / len(sent[1:]) / 1e6, 2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    Path(path).write_text(json.dumps(found))


def loopback_bytes():
    """Returns how many bytes the loopback device has sent."""
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


if __name__ == "__main__":
    main()
