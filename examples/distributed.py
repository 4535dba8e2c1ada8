"""Trains a deep autoencoder by Hessian-free optimization on several workers.

    python -m examples.distributed --workers 2 --updates 30

starts two processes on this machine, each with its share of the cores and of the images, and shows the progress bar of
the first. They make the updates that one process would make. Every update is backed up: if a process dies, all are
started again and go on from there. On a cluster, every machine runs `train` below: its `TF_CONFIG`, or the resolver of
Slurm or Kubernetes, says who is there.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import keras

from examples.autoencoder import SETTINGS, build_autoencoder, cross_entropy, squared_error
from examples.datasets import synthetic_curves
from keras_hf import HessianFree, HFModel, LevenbergMarquardt, UpdateRecorder, multi_worker_strategy

NUM_TEST = 1000


def train(args):
    """Trains on one worker, and returns the squared error on test images.

    Args:
        args: The command line's options, as `parse` returns them.
    """
    strategy = multi_worker_strategy()
    setting = SETTINGS["curves", args.size]
    images = synthetic_curves(args.num_cases + NUM_TEST, args.seed)
    x_train, x_test = images[: args.num_cases], images[args.num_cases :]
    with strategy.scope():
        network = build_autoencoder(setting.widths, l2=2e-5, seed=args.seed)
        model = HFModel(network)
        model.compile(HessianFree(damping=45.0, seed=args.seed), loss=cross_entropy, metrics=[squared_error])
    callbacks = [
        LevenbergMarquardt(),
        keras.callbacks.BackupAndRestore(args.out / "backup"),
        UpdateRecorder(args.out / "updates.jsonl"),
    ]
    model.fit(x_train, x_train, epochs=args.updates, callbacks=callbacks)
    model.save(args.out / "model.keras")
    return model.evaluate(x_test, x_test, batch_size=NUM_TEST, verbose=0, return_dict=True)["squared_error"]


def launch(args):
    """Runs all workers on this machine, again if one of them dies, and returns the exit status of the last attempt.

    Args:
        args: The command line's options.
    """
    for _ in range(args.restarts + 1):
        addresses = free_addresses(args.workers)
        processes = [start(args, addresses, number) for number in range(args.workers)]
        try:
            status = wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if status == 0:
            break
        print(f"\nA worker ended with {status}; logs are in {args.out}.", flush=True)
    return status


def start(args, addresses, number):
    """Starts a worker: the first writes to this terminal, the others to files."""
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": number}}
    threads = str(max(1, (os.cpu_count() or 1) // args.workers))
    environment = {"TF_CONFIG": json.dumps(config), "TF_NUM_INTRAOP_THREADS": threads}
    command = [sys.executable, "-m", "examples.distributed", "--is-worker", *args.arguments]
    log = open(args.out / f"worker-{number}.log", "w") if number else None
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)


def wait(processes):
    """Waits until all processes have ended well, or one has not, and returns its exit status."""
    while True:
        statuses = [process.poll() for process in processes]
        if any(statuses):
            return next(status for status in statuses if status)
        if all(status == 0 for status in statuses):
            return 0
        time.sleep(0.1)


def free_addresses(count):
    """Returns addresses of this machine at which nothing listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return addresses


def parse(arguments):
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2, help="processes on this machine")
    parser.add_argument("--size", choices=("demo", "full"), default="demo", help="of the network")
    parser.add_argument("--num-cases", type=int, default=2000, help="training images")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--restarts", type=int, default=3, help="after which a failure ends the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs", "distributed"), help="folder for what is written")
    parser.add_argument("--is-worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.arguments = sys.argv[1:] if arguments is None else list(arguments)
    return args


def main(arguments=None):
    """Starts the workers, or is one of them.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.is_worker:
        sys.exit(launch(args))
    error = train(args)
    print(f"Squared error per test image, summed over pixels: {error:.3f}")


if __name__ == "__main__":
    main()
