"""What the tables of examples and benchmarks promise: one kind of file, whoever wrote it."""

import math

import pytest

from examples.tables import add_row, read_rows, write_rows


def test_rows_are_read_back_as_numbers_and_with_the_other_line_ends_too(tmp_path):
    rows = [{"update": 1, "error": 0.1 + 0.2}, {"update": 2, "error": math.inf}]
    write_rows(tmp_path / "table.csv", rows)
    assert read_rows(tmp_path / "table.csv") == rows
    (tmp_path / "table.csv").write_bytes(b"update,error\r\n1,0.5\r\n")
    assert read_rows(tmp_path / "table.csv") == [{"update": 1.0, "error": 0.5}]


def test_a_table_is_the_same_written_at_once_or_row_by_row(tmp_path):
    rows = [{"name": "a, b", "value": number} for number in range(3)]
    write_rows(tmp_path / "at-once.csv", rows)
    write_rows(tmp_path / "row-by-row.csv", rows[:1])
    for row in rows[1:]:
        add_row(tmp_path / "row-by-row.csv", row)
    written = (tmp_path / "at-once.csv").read_bytes()
    assert written == (tmp_path / "row-by-row.csv").read_bytes()
    assert written == b'name,value\n"a, b",0\n"a, b",1\n"a, b",2\n'


def test_a_row_with_a_column_of_its_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fields not in fieldnames: 'other'"):
        write_rows(tmp_path / "table.csv", [{"value": 1}, {"value": 2, "other": 3}])
