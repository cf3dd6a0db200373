"""util.report compares finished runs, and only those."""

import json
import sys

import numpy as np
import pytest

from tests.support.runs import write_run
from util import report
from util.errors import UserError
from util.images import png_name, read_image, save_png


def make_run(path, lazy_mar, seconds, pixels, **changes):
    results = {"lazy_mar": lazy_mar, "method": "LazyMAR" if lazy_mar else "MAR"}
    results |= {"fid": 1.25, "is_mean": 9.0, "is_std": 0.5, "accuracy": 0.99}
    images = [np.full((8, 8, 3), pixels, np.uint8)] * 3
    return write_run(path, images, changes, {**results, "sec_per_image": seconds, **changes})


def table_of(*paths):
    return report.table(report.compare([report.load_run(path) for path in paths]))


def test_paired_runs_get_speed_up_and_psnr(tmp_path, monkeypatch, capsys):
    plain = make_run(tmp_path / "a", False, 2.0, 100)
    lazy = make_run(tmp_path / "b", True, 0.5, 110)
    sheet, table = tmp_path / "sheet.png", tmp_path / "table.md"
    numbers = tmp_path / "table.json"
    arguments = [str(plain), str(lazy), "--sheet", str(sheet), "--table", str(table)]
    arguments += ["--json", str(numbers)]
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    report.main()
    printed = capsys.readouterr().out
    assert table.read_text().strip() in printed
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert rows[1] == "| MAR | 99.0% | 2.000 | 1.00 | - |"
    assert rows[2] == "| LazyMAR | 99.0% | 0.500 | 4.00 | 28.1 |"
    assert read_image(sheet).shape[1] > 3 * 8
    first, second = json.loads(numbers.read_text())["rows"]
    assert (first["speedup"], first["psnr"], first["lpips"]) == (1.0, None, None)
    assert (second["speedup"], second["fid"], second["lazy_mar"]) == (4.0, 1.25, True)
    assert second["psnr"] == pytest.approx(28.13, abs=0.01)


def test_fid_is_shown_where_there_are_enough_images(tmp_path, monkeypatch):
    plain = make_run(tmp_path / "a", False, 2.0, 100)
    monkeypatch.setattr(report, "FEWEST_FOR_FID", 3)
    assert "| MAR | 1.250 | 9.00 ± 0.50 | 99.0% | 2.000 | 1.00 | - |" in table_of(plain)


def test_rows_name_the_settings_in_which_they_differ(tmp_path):
    plain, fewer = (make_run(tmp_path / str(n), False, 1.0, 100, num_iter=n) for n in (64, 32))
    rows = table_of(plain, fewer).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:4]] == [f"| MAR, num_iter {n}" for n in (64, 32)]
    assert table_of(plain, plain).splitlines()[2].startswith("| MAR | ")


def test_identical_images_are_reported_and_not_in_the_mean(tmp_path):
    plain = make_run(tmp_path / "a", False, 2.0, 100)
    lazy = make_run(tmp_path / "b", True, 1.0, 100)
    assert table_of(plain, lazy).splitlines()[3].endswith("| 2.00 | identical |")
    save_png(lazy / "images" / png_name(1), np.full((8, 8, 3), 110, np.uint8))
    assert table_of(plain, lazy).splitlines()[3].endswith("| 2.00 | 28.1 (67% identical) |")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"weights": "other"},
        {"seed_mode": "rank"},
        {"images_dir": None},
        {"order": {"kind": "halton"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_runs_of_other_seeds_weights_or_orders_or_without_images_have_no_psnr(tmp_path, change):
    plain = make_run(tmp_path / "a", False, 2.0, 100)
    other = make_run(tmp_path / "b", True, 0.5, 110, **change)
    text = table_of(plain, other)
    assert text.splitlines()[3].endswith("| 4.00 | - |")


def test_lpips_is_a_column_where_it_is_available(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "make_lpips", lambda: lambda a, b: 0.25)
    runs = [make_run(tmp_path / name, name == "b", 1.0, 100) for name in "ab"]
    rows = table_of(*runs).splitlines()
    assert rows[0].endswith("| PSNR to the first, dB | LPIPS to the first |")
    assert (rows[2].split(" | ")[-1], rows[3].split(" | ")[-1]) == ("- |", "0.250 |")


def test_scores_against_different_references_are_marked_as_not_comparable(tmp_path):
    runs = [make_run(tmp_path / name, False, 1.0, 100, reference=f"toy {name}") for name in "ab"]
    assert "are not comparable: toy a and toy b." in table_of(*runs)
    assert "compare" not in table_of(runs[0], runs[0])


def test_a_folder_that_is_not_a_finished_run_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        report.load_run(tmp_path)
