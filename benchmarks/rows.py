"""Results of benchmarks: rows in a CSV file and, beside it, a JSON file that says what they were made with.

`write("runs/bench/nystrom.csv", rows)` writes that file and `runs/bench/nystrom.json`: the date, the command, the cores, and the versions of Python
and of the libraries that are installed. Needs neither Keras nor NumPy, so that peers in environments of their own write the same files.
"""

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

from examples.tables import write_rows

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


def write(path, rows):
    """Writes rows as `examples.tables.write_rows` does, and what they were made with beside them.

    Args:
        path: Path of the CSV file, or a string; its folder is made.
        rows: List of dicts, at least one, all with the same names.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows)
    note(path)


def read(path):
    """Returns the rows of a CSV file, dicts of strings; none where `path` is `None` or there is no file."""
    if not path or not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def note(path):
    """Writes what a CSV file was made with: the JSON file of the same name."""
    Path(path).with_suffix(".json").write_text(json.dumps(made_with(), indent=1) + "\n")


def made_with():
    """Returns a dict of strings, a number and a dict: `date` (UTC), `command`, `cores`, `processor`, `python`, `versions`."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(["python", *_command()]),
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": {name: version for name in LIBRARIES if (version := _version(name))},
    }


def parse(parser, quick, arguments=None):
    """Parses a benchmark's command line, to which it adds `--csv` and `--quick`.

    Args:
        parser: An `argparse.ArgumentParser`.
        quick: Dict of the defaults under `--quick`, by the names of arguments. What the command line says wins.
        arguments: List of strings, as on the command line; `None` takes those.

    Returns:
        An `argparse.Namespace`.
    """
    parser.add_argument("--csv", help="file for the results; a JSON file beside it says what they were made with")
    add_quick(parser)
    # Before the rest is read: required arguments may be among those that have a default now.
    known = argparse.ArgumentParser(add_help=False)
    add_quick(known)
    if known.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args(arguments)


def add_quick(parser):
    """Adds the option `--quick`, the same in all benchmarks."""
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, under a minute: that it runs, and a first impression"
    )


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
