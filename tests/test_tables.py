"""Tables of the documents are copies: each cell stands in the result file that the table names.

A table with numbers is preceded by `<!-- from FILE.md ... -->`. Its headings are headings of a table in one
of these files, and each of its rows is a row there. Columns and rows may be left out.
"""

import re
from dataclasses import dataclass

import pytest

from engine.published import ROWS, tflops_at_64
from tests.support import DOCUMENTS, ROOT
from util import flops

TABLE = re.compile(r"(?:^<!-- from (.+) -->\n)?((?:^\|.*\n)+)", re.MULTILINE)
NUMBER = re.compile(r"[\d.,]+%?")
PUBLISHED = ("NAME", "method")  # README.md, checked against engine/published.py


@dataclass(frozen=True)
class Table:
    """head and rows as they stand; sources: the files it names."""

    sources: tuple[str, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(name: str) -> list[Table]:
    found = []
    for sources, block in TABLE.findall((ROOT / name).read_text() + "\n"):
        lines = [tuple(c.strip() for c in line[1:-1].split("|")) for line in block.splitlines()]
        found.append(Table(tuple(sources.split()), lines[0], tuple(lines[2:])))
    return found


def is_copy(row: tuple[str, ...], head: tuple[str, ...], source: Table) -> bool:
    """Whether a row of the source has these cells under these headings, in this order."""
    for theirs in source.rows:
        pairs = iter(zip(source.head, theirs, strict=True))
        if all(cell in pairs for cell in zip(head, row, strict=True)):
            return True
    return False


CITED = [(name, table) for name in DOCUMENTS for table in tables(name) if table.sources]


@pytest.mark.parametrize(("name", "table"), CITED, ids=lambda x: x if isinstance(x, str) else "")
def test_every_row_stands_in_the_result_file(name, table):
    sources = [found for source in table.sources for found in tables(source)]
    for row in table.rows:
        assert any(is_copy(row, table.head, source) for source in sources), row


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_table_with_numbers_names_its_result_file(name):
    for table in tables(name):
        if not table.sources and table.head[:2] != PUBLISHED:
            numbers = [cell for row in table.rows for cell in row if NUMBER.fullmatch(cell)]
            assert numbers == [], table.head


def test_the_published_rows_are_those_that_the_script_reproduces():
    (table,) = [table for table in tables("README.md") if table.head[:2] == PUBLISHED]
    counted = flops.tabulate(64)
    expected = []
    for name, row in ROWS.items():
        steps = re.search(r"--num_iter (\d+)", row.flags)[1]
        model = re.search(r"--model (?:detok_)?(\w+)", row.flags)[1]  # l-DeTok has the same shapes
        costs = ["-" if x is None else f"{x:.2f}" for x in (row.gpu_s, row.tflops)]
        mode = "LazyMAR" if "--lazy_mar" in row.flags else "MAR"
        ours = f"{counted[model][mode].published.total / 1e12:.2f}" if steps == "64" else "-"
        quality = ["-" if row.fid is None else f"{row.fid:.2f}"]
        quality += ["-" if row.inception is None else f"{row.inception:.1f}"]
        cells = [f"`{name}`", row.method, steps, *quality, *costs, "not run", ours]
        expected.append(tuple(cells))
    assert list(table.rows) == expected


def test_the_counted_operations_are_those_of_the_result_file():
    found = next(t for t in tables("benchmarks/results/flops.md") if t.head[0] == "published")
    counted = flops.tabulate(64)
    for name, *cells in found.rows:
        for lazy_mar, mode in ((False, "MAR"), (True, "LazyMAR")):
            stated, ours = tflops_at_64(name, lazy_mar), counted[name][mode].published.total / 1e12
            assert [f"{stated:.2f}", f"{ours / stated:.1%}"] == cells[2 * lazy_mar :][:2]


def test_a_wrong_cell_is_found():
    source = Table((), ("name", "FID", "s"), (("a", "1.0", "2.0"), ("b", "3.0", "4.0")))
    assert is_copy(("a", "2.0"), ("name", "s"), source)
    assert not is_copy(("a", "4.0"), ("name", "s"), source)
    assert not is_copy(("a", "2.0"), ("name", "FID"), source)
