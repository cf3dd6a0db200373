"""Damaged files of our own are named with a remedy, or mended where nothing is lost."""

import json

import pytest
import torch

from tests.support.assertions import refusal
from util import report
from util.data.checks import check_same_classes
from util.data.latents import check_note, write_note
from util.dist import Rendezvous
from util.evaluation.conditions import ClassLabels
from util.evaluation.run import score_only
from util.evaluation.run_folder import RunFolder
from util.files import read_json
from util.training.log import RunLog

DAMAGED = [
    b"", b"{", b"null", b"7", b'"text"', b"\x00\xff\xfe\x80", b"\x00" * 64, b"[" * 100_000,
    b'{"a": 1} x', "ä".encode("latin-1"),
]  # fmt: skip


@pytest.mark.parametrize("content", [*DAMAGED, b"[]"], ids=range(len(DAMAGED) + 1))
def test_a_note_of_the_tokenizer_that_is_damaged_is_named(tmp_path, content):
    tokenizer = tmp_path / "vae.safetensors"
    tokenizer.write_bytes(b"weights")
    write_note(tmp_path, [str(tokenizer)], 64)
    check_note(tmp_path, [str(tokenizer)], 64)
    (tmp_path / "tokenizer.json").write_bytes(content)
    said = refusal(lambda: check_note(tmp_path, [str(tokenizer)], 64))
    assert "tokenizer.json cannot be read" in said and "remove it" in said


@pytest.mark.parametrize("content", [*DAMAGED, b"{}"])
def test_a_list_of_classes_that_is_damaged_is_named(tmp_path, content):
    (tmp_path / "classes.json").write_bytes(content)
    said = refusal(lambda: check_same_classes(tmp_path, ["cat", "dog"]))
    assert "classes.json cannot be read" in said and "restore or remove it" in said


CALL = {"arguments": {}, "made": {"generated": 1, "computed": 1, "seconds": 1.0, "wall_seconds": 1}}
WRONG_MANIFESTS = [
    {"config": {}},
    {"config": {}, "calls": []},
    {"config": [], "calls": [CALL]},
    {"config": {}, "calls": [None]},
    {"config": {}, "calls": [{**CALL, "made": []}]},
    {"config": {}, "calls": [{**CALL, "made": {"generated": "all"}}]},
    {"config": {}, "calls": [{"arguments": []}]},
]


@pytest.mark.parametrize("content", [*DAMAGED, *(json.dumps(m).encode() for m in WRONG_MANIFESTS)])
def test_a_manifest_that_is_damaged_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(json.dumps({"config": {}, "calls": [CALL]}).encode())
    assert RunFolder(tmp_path).calls() == [CALL]
    (tmp_path / "manifest.json").write_bytes(content)
    assert "manifest.json" in refusal(RunFolder(tmp_path).manifest)


@pytest.mark.parametrize("content", [*DAMAGED, b"[]"], ids=range(len(DAMAGED) + 1))
def test_results_that_are_damaged_are_named_by_all_who_read_them(tmp_path, content):
    (tmp_path / "manifest.json").write_text(json.dumps({"config": {}, "calls": [CALL]}))
    (tmp_path / "results.json").write_bytes(content)
    assert "results.json cannot be read" in refusal(RunFolder(tmp_path).results)
    assert "results.json cannot be read" in refusal(lambda: RunFolder(tmp_path).open({}, CALL, 1))
    assert "results.json cannot be read" in refusal(lambda: report.load_run(tmp_path))
    asked = (tmp_path, None, 2, ClassLabels(2), Rendezvous(), torch.device("cpu"))
    # and not only after hours of scoring: there is no image and no request
    assert "results.json cannot be read" in refusal(lambda: score_only(*asked))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fid": "low"}, "the fid 'low', which is not a number"),
        ({"is_std": [1]}, "the is_std"),
        ({"num_images": -1}, "states num_images -1: score it again"),
        ({"num_images": None}, "states num_images None: score it again"),
        ({"method": ...}, "does not say its method"),
        ({"images_dir": ...}, "does not say its images_dir"),
    ],
)
def test_results_that_say_too_little_are_named(tmp_path, changes, words):
    whole = dict.fromkeys(report.NEEDED, 1) | {"fid": 1.0} | changes
    whole = {name: value for name, value in whole.items() if value is not ...}
    (tmp_path / "manifest.json").write_text(json.dumps({"config": {}}))
    (tmp_path / "results.json").write_text(json.dumps(whole))
    assert words in refusal(lambda: report.load_run(tmp_path))


def test_a_missing_document_and_a_folder_in_its_place_are_named(tmp_path):
    for path in (tmp_path / "gone.json", tmp_path):
        assert str(path) in refusal(lambda path=path: read_json(path, dict, "make it"))


LINE = b'{"step": 1, "loss": 0.5}\n'


@pytest.mark.parametrize(
    "tail",
    [
        b"\x00\xff\xfe\x80", b"\x00" * 512, b'{"step": 2, "lo', b'{"step": "two"}\n', b"[1]\n", b"\n",
        b'{"step": 2}', b'\x00\x00{"step": 2}\n', b'{"loss": 1}\n', b'{"step": -1}\n', b"[" * 9999 + b"\n",
        b'{"step": 2, "x": "\xe4"}\n', b"a\nb\nc\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("after", [b"", b'{"step": 2, "loss": 0.25}\n'], ids=["last", "middle"])
def test_damaged_lines_of_the_log_are_dropped_and_the_run_continues(tmp_path, capsys, tail, after):
    path = tmp_path / "log.jsonl"
    path.write_bytes(LINE + tail + (b"\n" if after and not tail.endswith(b"\n") else b"") + after)
    if after and tail == b'{"step": 2}':
        return  # a whole line then
    log = RunLog(tmp_path, tmp_path, step=2)
    log.write(3, loss=0.125)
    log.close()
    assert path.read_bytes() == LINE + after + b'{"step": 3, "loss": 0.125}\n'
    assert f"damaged line(s) of {path} are dropped" in capsys.readouterr().err


def test_a_complete_log_gets_no_note(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_bytes(LINE)
    RunLog(tmp_path, tmp_path, step=1).close()
    assert capsys.readouterr().err == ""
