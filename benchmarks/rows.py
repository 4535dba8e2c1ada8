"""Results of benchmarks: rows in a CSV file, or runs in a folder; of each file `examples.origins` says what it was made with.

`write("runs/bench/nystrom.csv", rows)` writes that file, and notes in `runs/bench/origins.json` the date, the command, the cores, and the versions of
Python and of the libraries that are installed. Needs neither Keras nor NumPy, so that peers in environments of their own write the same files.
"""

import argparse
import csv
import re
from pathlib import Path

from examples import origins
from examples.tables import write_rows

# The columns that tell the runs of a file apart.
RUN = ("problem", "method", "seed")


def write(path, rows):
    """Writes rows as `examples.tables.write_rows` does, and notes what they were made with: where a file is gone on with, of those that are new.

    Args:
        path: Path of the CSV file, or a string; its folder is made.
        rows: List of dicts, at least one, all with the same names.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = read(path)
    write_rows(path, rows)
    is_longer = len(before) < len(rows) and read(path)[: len(before)] == before
    if is_longer and path.name in origins.read(path.parent):
        origins.note_more(path, len(before), len(rows))
    else:
        origins.note(path)


def read(path):
    """Returns the rows of a CSV file, dicts of strings; none where `path` is `None` or there is no file."""
    if not path or not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_runs(path):
    """Returns the runs in a folder, or in a file that `benchmarks.gather` wrote: dict from (problem, method, seed) to rows.

    All are strings, as they stand in the columns; columns that a run leaves blank are left out of its rows.

    Args:
        path: Path of a folder, in which a run is `PROBLEM/METHOD-seedSEED.csv`, or of a CSV file. CSV files beside the folders of problems are tables
            of the runs, and left out. A folder without others is that of one problem, without a name.
    """
    if not path.is_dir():
        runs = {}
        for row in read(path):
            runs.setdefault(tuple(row.pop(name, "") for name in RUN), []).append(row)
        return {run: _without_blanks(rows) for run, rows in runs.items()}
    files = sorted(path.glob("*/**/*.csv")) or sorted(path.glob("*.csv"))
    return {run_of(file, path): read(file) for file in files}


def run_of(file, folder):
    """Returns (problem, method, seed) of a run's file in a folder."""
    method, seed = re.fullmatch(r"(.+?)(?:-seed(\d+))?", file.stem).groups(default="")
    return "/".join(file.relative_to(folder).parts[:-1]), method, seed


def file_of(run, folder):
    """Returns the path of the file of a run (problem, method, seed) in a folder."""
    problem, method, seed = run
    return folder / problem / f"{method}{seed and f'-seed{seed}'}.csv"


def _without_blanks(rows):
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    return [{name: row[name] for name in columns} for row in rows]


def parse(parser, quick, arguments=None):
    """Parses a benchmark's command line, to which it adds `--csv` and `--quick`.

    Args:
        parser: An `argparse.ArgumentParser`.
        quick: Dict of the defaults under `--quick`, by the names of arguments. What the command line says wins.
        arguments: List of strings, as on the command line; `None` takes those.

    Returns:
        An `argparse.Namespace`.
    """
    parser.add_argument("--csv", help=f"file for the results; {origins.NAME} beside it says what they were made with")
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
