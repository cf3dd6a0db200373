"""What the benchmarks refuse before they measure: results that would be lost, flags that make no sense."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import (
    latency,
    launches,
    line_ablation,
    line_latency,
    line_quality,
    redundancy,
    tiny_references,
    training,
    waterfall,
)
from benchmarks.common import prepare_output, stored_rows, write_result
from tests.support import ROOT
from tests.support.runs import snapshot
from util.errors import UserError

SCRIPTS = (latency, waterfall, training, line_latency)
BUNDLED = (line_ablation, line_quality, tiny_references, redundancy)


@pytest.fixture
def command(monkeypatch):
    """Makes the words the command line of a benchmark."""

    def set_command(script: object, *flags: object) -> None:
        name = f"{script.__name__.removeprefix('benchmarks.')}.py"
        device = [] if script in (tiny_references, launches) else ["--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [name, *device, *map(str, flags)])

    return set_command


def test_a_folder_that_cannot_be_made_is_reported_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="result cannot be written"):
        prepare_output(tmp_path / "file" / "result")


@pytest.mark.parametrize("content", ["", '{"rows": [', "[]", "{}", '{"about": [], "rows": []}'])
def test_damaged_results_of_an_earlier_call_are_named(tmp_path, content):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError, match=r"rows\.json .*: remove it"):
        stored_rows(tmp_path / "rows", {})


@pytest.mark.parametrize("output", ["", "."])
def test_an_output_without_a_name_is_refused(output):
    with pytest.raises(UserError, match="--output . names no file"):
        prepare_output(Path(output))


def test_a_dot_in_the_name_of_a_result_stays(command, tmp_path):
    command(latency)
    document = {"about": {"command": "python -m benchmarks.other", "weights": "a"}, "rows": []}
    write_result(tmp_path / "lazy_0.9", document, "text")
    write_result(tmp_path / "lazy.json", document, "text\n")
    assert sorted(snapshot(tmp_path)) == ["lazy.json", "lazy.md", "lazy_0.9.json", "lazy_0.9.md"]
    assert "text\n\n    command: " in (tmp_path / "lazy_0.9.md").read_text()
    assert snapshot(tmp_path)["lazy.md"] == snapshot(tmp_path)["lazy_0.9.md"]


@pytest.mark.parametrize("script", BUNDLED)
def test_committed_results_are_written_only_on_request(command, monkeypatch, tmp_path, script):
    monkeypatch.chdir(tmp_path)
    command(script)
    parsed = script.parse()  # redundancy gives a selection of eval.py's flags beside it
    output = parsed[-1] if isinstance(parsed, tuple) else parsed.output
    assert output.parent == Path("output_dir/benchmarks")
    assert str(output) in script.__doc__.replace("MODEL*", "mar_tiny")


@pytest.mark.parametrize(
    ("script", "flags", "reason"),
    [
        (latency, "--repeats 0", "--repeats is 0; it must be at least 1"),
        (latency, "--warmup -1", "--warmup is -1; it must be at least 0"),
        (latency, "--batches 8,0", "--batches 8,0 must be numbers of images"),
        (latency, "--models gpt_b", "--models gpt_b is unknown; use some of mar_base"),
        (waterfall, "--batch 0", "--batch is 0; it must be at least 1"),
        (training, "--rows x", "--rows x is unknown; use some of eager"),
        (line_latency, "--model gpt_xl_t2i_256", "invalid choice: 'gpt_xl_t2i_256'"),
        (line_latency, "--lines 0", "--lines is 0; it must be at least 1"),
        (line_latency, "--budgets 1/0", "--budgets 1/0: "),
        (launches, "--cfg 0.5", "--cfg is 0.5; it must be at least 1"),
        (line_quality, "--top_p 2", "top_p is 2.0"),
        (line_quality, "--recent 3", "too small"),
        (tiny_references, "--num_images 99", "--num_images is 99; it must be at least 100"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_anything_is_measured(
    command, tmp_path, script, flags, reason
):
    command(script, *flags.split(), "--output", tmp_path / "result")
    with pytest.raises(UserError) as refusal:
        script.main()
    assert reason in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def quality(command, monkeypatch, tmp_path):
    """Runs line_quality without a model; returns the names of the rows that it made."""
    monkeypatch.chdir(ROOT)
    made = []
    score = {"fid": 0.5, "is_mean": 8.0, "is_std": 0.1, "is_splits": 10, "accuracy": 0.9}
    monkeypatch.setattr(line_quality, "load_tiny", lambda *_: (None, None, "weights"))
    monkeypatch.setattr(
        line_quality.Run, "images", lambda run, model, vq, sampling: made.append(sampling.method)
    )
    monkeypatch.setattr(line_quality.Run, "score", lambda run, images: score)
    monkeypatch.setattr(line_quality, "picture", lambda *args: np.zeros((4, 4, 3), np.uint8))

    def run(*flags: object) -> list[str]:
        made.clear()
        words = ("--methods", "h2o", "--budgets", "1/2,1/4", "--output", tmp_path / "quality")
        command(line_quality, *words, *flags)
        line_quality.main()
        return list(made)

    return run


def test_the_same_command_continues_with_the_rows_of_its_file(quality, monkeypatch, tmp_path):
    every = ["full cache", "h2o 1/2", "h2o 1/4"]
    assert quality() == every
    path = tmp_path / "quality.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "rows": document["rows"][:2]}))
    assert quality() == every[2:]
    assert len(json.loads(path.read_text())["rows"]) == 3
    names = ["quality.json", "quality.md", "quality.png", "quality_fid.png"]
    assert sorted(snapshot(tmp_path)) == names
    with monkeypatch.context() as patch:
        patch.setattr(line_quality, "load_tiny", lambda *_: (None, None, "others"))
        assert quality() == every
    assert quality("--seed", 2) == every
    assert quality("--seed", 2) == []
