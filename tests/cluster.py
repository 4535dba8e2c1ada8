"""Starts processes of `worker.py` that train together on this machine, on ports of their own, and ends them whatever happens."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("worker.py")
# Seconds, to stop what hangs: a slow machine needs less than a tenth of them.
LONGEST = 3600


def free_addresses(num_workers):
    """Addresses of this machine that nothing listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(num_workers)]
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


def start(addresses, number, *arguments):
    """Starts one worker; its output is a pipe."""
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": number}}
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_CONFIG": json.dumps(config)}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(num_workers, folder, *jobs):
    """Has a cluster do its jobs, and returns of each worker what it wrote and exited with."""
    addresses = free_addresses(num_workers)
    processes = [start(addresses, number, folder, *jobs) for number in range(num_workers)]
    try:
        return [(process.communicate(timeout=LONGEST)[0], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def run(num_workers, folder, *jobs):
    """Runs a cluster to its end, which must be good."""
    for output, code in ended(num_workers, folder, *jobs):
        assert code == 0, output[-3000:]
