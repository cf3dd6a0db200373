"""Every number in a table of the documents stands in a committed result file, or is counted anew.

A new table has to be entered here, with its file. Numbers count as equal when they are rounded alike.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import pytest

from tests.support import ROOT
from util import flops
from util.published import ROWS, tflops_at_64

RESULTS = ROOT / "benchmarks" / "results"
README, BENCHMARKS = "README.md", "benchmarks/README.md"
TINY, TINY_GPT = (f"pretrained_models/{name}/README.md" for name in ("mar_tiny", "gpt_tiny"))
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?%?")

# (document, beginning of the heading): result files that hold the table line by line.
VERBATIM = {
    (README, "| | FID | IS | accuracy | s / image | speed-up | PSNR to the first, dB |"): [
        "demo.md",
        "tiny_1000.md",
    ],
    (README, "| FID (full cache: 0.244)"): ["line_quality.md"],
    (BENCHMARKS, "| bf16 | s / image | gain | against eager |"): ["waterfall_cpu_bf16.md"],
}
# (document, beginning of the heading): result files, keys whose equality makes rows of a file one row.
NUMBERS = {
    (README, "| caches | FID"): (["ablations_mar_tiny_caches"], ["name"]),
    (README, "| method | FID"): (["ablations_mar_tiny_frontier"], ["name"]),
    (README, "| | dtype | s / image"): (["latency_cpu_f32", "latency_cpu_bf16"], ["dtype", "mode"]),
    (README, "| | 1/2 | 1/4 | 1/6 | 1/8 |"): (
        ["line_ablation"],
        ["method", "anchors", "recent", "pooling"],
    ),
    (README, "| budget | slots | keys and values, GB"): (["line_sizes_gpt_xl"], ["budget"]),
    (BENCHMARKS, "| dtype | mode | s / image"): (
        ["latency_cpu_f32", "latency_cpu_bf16"],
        ["dtype", "mode"],
    ),
    (TINY, "| channel | 0"): (["tiny_references"], []),
    (TINY, "| 5,000 pictures"): (["tiny_references"], ["name"]),
    (TINY, "| | FID | IS | accuracy |"): (
        ["retraining_one", "retraining_two", "tiny_1000_mar_tiny-mar"],
        ["commit"],
    ),
    (TINY_GPT, "| guidance | top-p"): (["gpt_tiny_guidance"], ["cfg", "top_p"]),
}
COUNTED = [(BENCHMARKS, "| TFLOPs | MAR: encoder")]
PUBLISHED = [(README, "| published | steps")]
WITHOUT_NUMBERS = [
    (README, "| cache | idea"),
    (BENCHMARKS, "| script | measures"),
    (BENCHMARKS, "| results | of"),
    (BENCHMARKS, "| group | what"),
    (TINY, "| file | what it is"),
    (TINY_GPT, "| file | what it is"),
]


@dataclass(frozen=True)
class Table:
    """A table of a document: lines as they stand there."""

    document: str
    lines: tuple[str, ...]

    @property
    def body(self) -> list[list[str]]:
        """Cells of each row."""
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in self.lines[2:]]


@cache
def tables() -> list[Table]:
    found = []
    for document in (README, BENCHMARKS, TINY, TINY_GPT):
        text = (ROOT / document).read_text()
        found += [
            Table(document, tuple(block.splitlines()))
            for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
        ]
    return found


def of(document: str, heading: str) -> list[Table]:
    return [t for t in tables() if t.document == document and t.lines[0].startswith(heading)]


def leaves(value: object) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return []
    if isinstance(value, dict):
        value = list(value.values())
    return [x for part in value for x in leaves(part)] if isinstance(value, list) else [value]


def stands_in(shown: str, values: Iterable[float]) -> bool:
    """Whether one of the values, or a thousandth or hundredth of it, rounds to what is shown."""
    number = shown.strip("%").replace(",", "")
    half = 0.5 * 10.0 ** -len(number.partition(".")[2]) * (1 + 1e-6)
    scales = (100,) if shown.endswith("%") else (1, 1000)
    return any(abs(scale * value - float(number)) <= half for value in values for scale in scales)


def units(names: list[str], keys: list[str]) -> list[list[float]]:
    """Numbers of the files' rows, together where the rows agree in the keys."""
    found: dict[object, list[float]] = {}
    for name in names:
        document = json.loads((RESULTS / f"{name}.json").read_text())
        for row in document.get("rows", [document]) if keys else [document]:
            found.setdefault(tuple(row.get(key) for key in keys), []).extend(leaves(row))
    return list(found.values())


@pytest.mark.parametrize("table", tables(), ids=lambda t: f"{t.document}: {t.lines[0][:40]}")
def test_every_table_has_a_source(table):
    known = [*VERBATIM, *NUMBERS, *COUNTED, *PUBLISHED, *WITHOUT_NUMBERS]
    hits = [key for key in known if table in of(*key)]
    assert len(hits) == 1, f"tell where the table comes from, {table.lines[0]!r}"


@pytest.mark.parametrize("key", VERBATIM, ids=str)
def test_tables_that_are_copies_are_exact(key):
    copies, files = of(*key), VERBATIM[key]
    assert len(copies) == len(files)
    for table, name in zip(copies, files, strict=True):
        lines = (RESULTS / name).read_text().splitlines()
        assert [line for line in table.lines[2:] if line not in lines] == []


@pytest.mark.parametrize("key", NUMBERS, ids=str)
def test_the_numbers_of_each_row_stand_in_one_row_of_the_results(key):
    (table,), (names, keys) = of(*key), NUMBERS[key]
    sources = units(names, keys)
    for name, *cells in table.body:
        shown = [number for cell in cells for number in NUMBER.findall(cell)]
        assert any(all(stands_in(x, unit) for x in shown) for unit in sources), (name, shown)


def test_the_table_of_operations_is_what_is_counted():
    ((table,),) = [of(*key) for key in COUNTED]
    counted = flops.tabulate(64)
    for name, cells in zip(flops.MODELS, table.body, strict=True):
        plain, lazy = (counted[name][mode] for mode in ("MAR", "LazyMAR"))
        stated = [tflops_at_64(name, lazy_mar) for lazy_mar in (False, True)]
        expected = []
        for work in (plain.published, lazy.published):
            expected += [work.encoder, work.decoder, work.head, work.total]
        expected = [value / 1e12 for value in expected]
        expected += [plain.published.total / lazy.published.total]
        expected += [*stated, stated[0] / stated[1]]
        executed = plain.executed.total / 1e12, lazy.executed.total / 1e12
        expected += [*executed, executed[0] / executed[1]]
        shown = [number for cell in cells[1:] for number in NUMBER.findall(cell)]
        assert shown == [f"{value:.2f}" for value in expected]


def test_the_table_of_published_rows_is_that_of_the_scripts():
    ((table,),) = [of(*key) for key in PUBLISHED]
    for (script, row), cells in zip(ROWS.items(), table.body, strict=True):
        method = ("LazyMAR" if row.lazy_mar else "MAR") + f"-{row.model[4].upper()}"
        costs = (row.gpu_s, row.cpu_s, row.tflops)
        assert cells == [
            method + (", no guidance" if row.cfg == 1 else ""),
            str(row.num_iter),
            f"{row.fid:.2f}",
            f"{row.inception:.1f}",
            *("-" if value is None else f"{value:.2f}" for value in costs),
            f"`scripts/{script}.sh`",
        ]


def test_a_number_that_is_not_in_the_results_is_found():
    assert stands_in("28.9", [28.94]) and not stands_in("28.9", [28.96])
    assert stands_in("99.3%", [0.993]) and not stands_in("99.3%", [0.9936, 99.3])
    assert stands_in("8.7", [0.0087]) and not stands_in("8.7", [0.008])
    assert stands_in("1,355", [1355.4])
