"""Where results come from: beside CSV files a file `origins.json` says of each by which command, when, and with which versions it was made.

It holds a list of origins for each file, by the file's name. Where a program went on with a file, each says of which `rows` it is true ("1-5, 9-9",
counted from 1), and in a file that was gathered from runs (`benchmarks/gather.py`) of which `runs`. `note` writes what is true of this process. Needs
nothing but Python, so that peers in environments of their own write the same files.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None

NAME = "origins.json"
# By the names under which they are installed; those that are not are left out.
LIBRARIES = (
    "keras_hf",
    "tensorflow",
    "keras",
    "numpy",
    "scikit-learn",
    "scipy",
    "jax",
    "jaxlib",
    "optimistix",
    "lineax",
    "jaxopt",
    "ssbroyden-optimistix",
    "kfac-jax",
    "optax",
    "torch",
    "curvlinops-for-pytorch",
    "backpack-for-pytorch",
)


def note(path):
    """Writes by what a CSV file was made: this process, now."""
    path = Path(path)
    keep(path.parent, {path.name: [made_with()]})


def note_more(path, num_before, num_rows):
    """Writes that this process, now, made the rows of a CSV file after the first ones, whose origins stay.

    Args:
        path: Path of the CSV file.
        num_before: Integer, the rows that were there.
        num_rows: Integer, the rows that are there now.
    """
    ours = made_with()
    *others, last = read(path.parent)[path.name]
    rows = last.get("rows", f"1-{num_before}")
    if all(last.get(key) == value for key, value in ours.items() if key != "date"):
        # The last ones were ours, too.
        date = f"{last['date'].partition(' to ')[0]} to {ours['date']}"
        known = [*others, {**last, "date": date, "rows": f"{rows.rpartition('-')[0]}-{num_rows}"}]
    else:
        known = [*others, {**last, "rows": rows}, {**ours, "rows": f"{num_before + 1}-{num_rows}"}]
    keep(path.parent, {path.name: known})


def made_with():
    """Returns a dict of strings, a number and a dict: `date` (UTC), `command`, `cores`, `processor`, `python`, `versions`."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(["python", *_command()]),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": {name: version for name in LIBRARIES if (version := _version(name))},
    }


def read(folder):
    """Returns the origins of the files in a folder: dict from names to lists of dicts; an empty one if there are none."""
    path = Path(folder) / NAME
    return json.loads(path.read_text()) if path.exists() else {}


def keep(folder, origins):
    """Adds origins of files to those in a folder, in place of what was there of the same files.

    Args:
        folder: Path.
        origins: Dict from names of files to lists of dicts.
    """
    # Runs side by side end at the same time: each reads and writes while the other waits.
    with open(Path(folder) / NAME, "a+") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = json.loads(file.read() or "{}")
        file.truncate(0)
        file.write(json.dumps(dict(sorted({**known, **origins}.items())), indent=1) + "\n")


def _command():
    """What stood after `python`: modules are run with -m."""
    path = Path(sys.argv[0])
    root = Path(__file__).parents[1]
    if path.is_absolute() and path.is_relative_to(root):
        return ["-m", ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__"), *sys.argv[1:]]
    return [path.name, *sys.argv[1:]]


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # Not Linux.
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
