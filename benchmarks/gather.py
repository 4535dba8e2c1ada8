"""Gathers a folder of runs in one CSV file, or makes the folder from the file again.

    python -m benchmarks.gather runs/recurrent benchmarks/results/recurrent.csv
    python -m benchmarks.gather benchmarks/results/recurrent.csv runs/recurrent

The programs write a file for each run, `PROBLEM/METHOD-seedSEED.csv`, to go on from and to draw. `benchmarks/results` keeps one file for each
question: the rows of all runs, after the columns `problem`, `method` and `seed`, and blanks where a run lacks a column. The origins of the runs,
which `examples.origins` notes, go along: those that differ in nothing but the time become one, with the first and the last date, that names its
`runs` where it is not that of all.
"""

import argparse
import json
from pathlib import Path

from benchmarks import rows as results
from examples import origins
from examples.tables import write_rows


def main(arguments=None):
    """Gathers, or makes a folder of runs.

    Args:
        arguments: List of strings, as on the command line; None takes those.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of runs, or a CSV file")
    parser.add_argument("target", type=Path, help="CSV file, or a folder")
    args = parser.parse_args(arguments)
    runs = results.read_runs(args.source)
    if not any(map(any, runs)):
        parser.error(
            f"SOURCE must hold runs: a folder of PROBLEM/METHOD-seedSEED.csv, or a file made of one. Received: {args.source}."
        )
    (gather if args.source.is_dir() else scatter)(args.source, runs, args.target)


def gather(folder, runs, path):
    """Writes the runs of a folder, as `read_runs` returns them, into a CSV file."""
    of_runs = {}
    for run in runs:
        file = results.file_of(run, folder)
        found = origins.read(file.parent).get(file.name)
        if found is None:
            raise SystemExit(
                f"Every run must have an origin in {origins.NAME} beside it. Received: {file}. Run it again."
            )
        of_runs[run] = found
    named = [name for name, values in zip(results.RUN, zip(*runs, strict=True), strict=True) if any(values)]
    columns = dict.fromkeys(name for rows in runs.values() for name in rows[0])
    table = [
        {
            **{name: value for name, value in zip(results.RUN, run, strict=True) if name in named},
            **dict.fromkeys(columns, ""),
            **row,
        }
        for run, rows in runs.items()
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, table)
    origins.keep(path.parent, {path.name: merged(of_runs)})


def scatter(path, runs, folder):
    """Writes the runs of a CSV file, as `read_runs` returns them, into a folder."""
    known = origins.read(path.parent)[path.name]
    for run, rows in runs.items():
        file = results.file_of(run, folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(file, rows)
        of_run = [origin for origin in known if name_of(run) in origin.get("runs", [name_of(run)])]
        origins.keep(
            file.parent,
            {file.name: [{key: value for key, value in origin.items() if key != "runs"} for origin in of_run]},
        )


def name_of(run):
    """Returns a run's name in a list of runs, that of its file."""
    return str(results.file_of(run, Path()).with_suffix(""))


def merged(of_runs):
    """Returns the origins of a file, a list of dicts.

    Args:
        of_runs: Dict from runs (problem, method, seed) to lists of their origins.
    """
    alike = {}
    for run, found in of_runs.items():
        for origin in found:
            rest = {key: value for key, value in origin.items() if key != "date"}
            _, dates, names = alike.setdefault(json.dumps(rest, sort_keys=True), (rest, [], []))
            dates += origin["date"].split(" to ")
            names.append(name_of(run))
    return [
        {
            "date": " to ".join(dict.fromkeys([min(dates), max(dates)])),
            **rest,
            **({"runs": names} if len(alike) > 1 else {}),
        }
        for rest, dates, names in alike.values()
    ]


if __name__ == "__main__":
    main()
