"""Tables in CSV files: rows are dicts, all with the same columns, and lines end in one way, whoever wrote them."""

import csv


def write_rows(path, rows):
    """Writes a new file.

    Args:
        path: Path of the CSV file.
        rows: List of dicts, at least one. Their names, in order, are the header.

    Raises:
        ValueError: If a row has a column that the first one lacks.
    """
    with open(path, "w", newline="") as file:
        writer = _writer(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def add_row(path, row):
    """Adds a row, a dict with the columns of those before it, to a file that `write_rows` began."""
    with open(path, "a", newline="") as file:
        _writer(file, row).writerow(row)


def read_rows(path):
    """Returns the rows of a file of numbers: a list of dicts of floats."""
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _writer(file, columns):
    # Not Python's own "\r\n": a file that is read as text and written again, as `Recorder` does to go on, would mix both.
    return csv.DictWriter(file, columns, lineterminator="\n")
