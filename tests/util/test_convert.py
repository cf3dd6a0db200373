"""Sharing: a checkpoint as safetensors and JSON, and back, bit for bit; never the wrong weights."""

import json
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tests.support.assertions import assert_same
from tests.support.checkpoints import Run
from util.checkpoint import convert, main
from util.errors import UserError, run_main
from util.files import sha256_of
from util.weights import LAST, load_into, load_state_dict_file, read_pickle, save_safetensors

ARGS = {"model": "mar_tiny", "diffloss_w": 16, "num_sampling_steps": "100", "lr": None}
PRIVATE = {"data_path": "/home/someone/data", "output_dir": "out", "keep": [1]}


@pytest.fixture
def run(tmp_path):
    """A training run's folder; its averages differ from its weights."""
    run = Run()
    for average in run.ema.averages:
        average += torch.randn_like(average)
    run.save(tmp_path / "run" / LAST, {"step": 7}, **ARGS, **PRIVATE)
    return tmp_path / "run"


@pytest.mark.parametrize("use_ema", [True, False])
def test_converting_back_gives_the_same_bits_in_the_official_dict(run, tmp_path, use_ema):
    key = "model_ema" if use_ema else "model"
    expected = read_pickle(run / LAST)[key]
    shared = tmp_path / "shared" / "a.safetensors"
    convert(run, shared, use_ema)
    assert_same(load_state_dict_file(shared, use_ema), expected)
    convert(shared, tmp_path / "back.pth")  # the file knows which weights it holds
    back = read_pickle(tmp_path / "back.pth")
    assert_same(back[key], expected)
    assert_same(back["model"], expected)  # the original fills its model from it first
    assert ("model_ema" in back) == use_ema
    assert (back["epoch"], vars(back["args"])) == (2, ARGS)
    convert(tmp_path / "back.pth", tmp_path / "again.safetensors", use_ema)
    assert (tmp_path / "again.safetensors").read_bytes() == shared.read_bytes()


def test_the_json_says_what_the_weights_are_and_names_no_folder(run, tmp_path):
    written = [tmp_path / "a.safetensors", tmp_path / "a.json"]
    assert convert(run, written[0], True) == written
    about = json.loads((tmp_path / "a.json").read_text())
    assert about == {
        "weights": "model_ema",
        "parameters": 8,
        "sha256": sha256_of(tmp_path / "a.safetensors"),
        "epoch": 2,
        "step": 7,
        "args": ARGS,
    }
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"weights": "model_ema"}


def test_the_file_or_the_user_says_whether_weights_are_averaged(run, tmp_path):
    bare = tmp_path / "bare.safetensors"
    save_safetensors(bare, load_state_dict_file(run))
    for source, words in ((run, "say --ema or --no_ema"), (bare, "does not say whether")):
        with pytest.raises(UserError, match=words):
            convert(source, tmp_path / "x.pth")
    convert(bare, tmp_path / "bare.pth", True)
    convert(run, tmp_path / "plain.safetensors", False)
    convert(run, tmp_path / "ema.safetensors", True)
    with pytest.raises(UserError, match="not averaged ones"):
        convert(tmp_path / "plain.safetensors", tmp_path / "x.pth", True)
    with pytest.raises(UserError, match="holds model_ema: remove --no_ema"):
        convert(tmp_path / "ema.safetensors", tmp_path / "x.pth", False)
    assert not (tmp_path / "x.pth").exists()


def test_plain_weights_are_not_evaluated_in_the_place_of_averages(run, tmp_path):
    convert(run, tmp_path / "plain.safetensors", False)
    convert(tmp_path / "plain.safetensors", tmp_path / "plain.pth")
    for name in ("plain.safetensors", "plain.pth"):
        with pytest.raises(UserError, match="averaged"):
            load_into(nn.Linear(3, 2), tmp_path / name)


def test_the_command_writes_both_files_and_keeps_existing_ones(run, tmp_path, monkeypatch, capsys):
    def call(*words):
        command = ["py", "convert", str(run), *map(str, words)]
        monkeypatch.setattr(sys, "argv", command)
        run_main(main)

    target = tmp_path / "a.safetensors"
    call(target, "--ema")
    assert capsys.readouterr().out.splitlines() == [f"wrote {target}", f"wrote {tmp_path}/a.json"]
    before = target.read_bytes()
    for words in ((target, "--no_ema"), (tmp_path / "a.bin", "--ema"), (tmp_path / "b.pth",)):
        with pytest.raises(SystemExit) as exit_info:
            call(*words)
        assert exit_info.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert target.read_bytes() == before
    call(target, "--no_ema", "--overwrite")
    assert target.read_bytes() != before
