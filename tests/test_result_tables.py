"""The tables in README.md and docs are those that follow from the files of results."""

import pytest

from benchmarks import tables


def pages():
    return [tables.ROOT / "README.md", *sorted(tables.ROOT.glob("docs/*.md"))]


def test_tables_are_as_the_files_of_results_say():
    stale = [page.name for page in pages() if tables.filled(page.read_text()) != page.read_text()]
    assert stale == [], "run `make tables`"


def test_every_table_has_a_place():
    text = "".join(page.read_text() for page in pages())
    assert [name for name in tables.TABLES if f"<!-- table: {name} -->" not in text] == []


@pytest.mark.parametrize(
    "value, written",
    [(0, "0"), (0.5, "0.5"), (0.0123, "0.012"), (3.456, "3.5"), (456.7, "457"), (2.13e-11, "2.1e-11"), (1234, "1.2e3")],
)
def test_numbers_are_written_with_two_digits(value, written):
    assert tables.number(value) == written


def test_what_is_between_the_marks_is_replaced_and_nothing_else(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "nist", lambda: tables.table(["a"], [["1"]]))
    text = "x\n<!-- table: nist -->\n| old |\n<!-- end of table -->\ny\n"
    expected = "x\n<!-- table: nist -->\n| a |\n| --- |\n| 1 |\n<!-- end of table -->\ny\n"
    assert tables.filled(text) == expected == tables.filled(expected)
