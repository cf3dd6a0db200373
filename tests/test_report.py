"""util.report compares finished runs, and only those."""

import json
import sys

import numpy as np
import pytest

from util import report
from util.errors import UserError
from util.images import png_name, read_image, save_png


def make_run(path, lazy_mar, seconds, pixels, **changes):
    config = {"model": "mar_tiny", "weights": "w", "num_images": 3, "class_num": 3, "seed": 1}
    results = {
        "model": "mar_tiny", "lazy_mar": lazy_mar, "num_images": 3, "num_iter": 4, "cfg": 3.0,
        "sec_per_image": seconds, "fid": 1.25, "is_mean": 9.0, "is_std": 0.5, "accuracy": 0.99,
        "eval_bsz": 3, "threads": 1, "processes": 1, "commit": "abc", "command": "eval.py",
        "method": "LazyMAR" if lazy_mar else "MAR", "device": "cpu", "dtype": "float32", "torch": "2",
    }  # fmt: skip
    (path / "images").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    (path / "results.json").write_text(json.dumps({**results, **changes}))
    for index in range(3):
        save_png(path / "images" / png_name(index), np.full((8, 8, 3), pixels, np.uint8))
    return path


def test_paired_runs_get_speed_up_and_psnr(tmp_path, monkeypatch, capsys):
    plain = make_run(tmp_path / "a", False, 2.0, 100)
    lazy = make_run(tmp_path / "b", True, 0.5, 110)
    sheet, table = tmp_path / "sheet.png", tmp_path / "table.md"
    arguments = [str(plain), str(lazy), "--sheet", str(sheet), "--table", str(table)]
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    report.main()
    printed = capsys.readouterr().out
    assert table.read_text().strip() in printed
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert rows[1] == "| MAR | 1.250 | 9.00 ± 0.50 | 99.0% | 2.000 | 1.00 | - |"
    assert rows[2] == "| LazyMAR | 1.250 | 9.00 ± 0.50 | 99.0% | 0.500 | 4.00 | 28.1 |"
    assert read_image(sheet).shape[1] > 3 * 8


@pytest.mark.parametrize("change", [{"seed": 2}, {"weights": "other"}])
def test_runs_of_other_seeds_or_weights_have_no_psnr(tmp_path, change):
    plain = make_run(tmp_path / "a", False, 2.0, 100)
    other = make_run(tmp_path / "b", True, 0.5, 110, **change)
    assert report.mean_psnr(report.load_run(other), report.load_run(plain)) is None


def test_a_folder_that_is_no_finished_run_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        report.load_run(tmp_path)
