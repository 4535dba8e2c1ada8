"""Starts processes of `worker.py` that train together on this machine, on ports of their own, and ends them whatever happens."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("worker.py")


def free_addresses(num_workers):
    """Addresses of this machine that nothing listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(num_workers)]
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


def start(addresses, number, *arguments, **environment):
    """Starts one worker; its output is a pipe."""
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": number}}
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_CONFIG": json.dumps(config), **environment}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@contextlib.contextmanager
def workers(num_workers, *arguments):
    """The processes of a cluster, which are killed in the end."""
    addresses = free_addresses(num_workers)
    processes = [start(addresses, number, *arguments) for number in range(num_workers)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def ended(processes, timeout):
    """Waits for all processes, and returns what each exited with and wrote."""
    return [(process.communicate(timeout=timeout)[0], process.returncode) for process in processes]


def run(num_workers, *arguments, timeout=300):
    """Runs a cluster to its end, which must be good, and returns what the workers wrote."""
    with workers(num_workers, *arguments) as processes:
        found = ended(processes, timeout)
    for output, code in found:
        assert code == 0, output[-3000:]
    return [output for output, _ in found]
