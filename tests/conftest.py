"""A small random model in every format, and eval.py called in this process."""

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import eval as eval_script
from engine import cli
from tests.support import ROOT
from tests.support.runs import flags_for, random_mar
from util.errors import run_main
from util.weights import save_safetensors


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Folder with one model in every format: official/, ema.pth, ema.safetensors, plain.pth."""
    folder = tmp_path_factory.mktemp("weights")
    plain, ema = (random_mar(seed).state_dict() for seed in (0, 1))
    (folder / "official").mkdir()
    content = {
        "model": plain,
        "model_ema": ema,
        "optimizer": {},
        "epoch": 1,
        "scaler": {},
        "args": argparse.Namespace(model="mar_tiny", lr=None, output_dir="./output_dir"),
    }
    torch.save(content, folder / "official" / "checkpoint-last.pth")
    torch.save(ema, folder / "ema.pth")
    torch.save(plain, folder / "plain.pth")
    save_safetensors(folder / "ema.safetensors", ema)
    return folder


@pytest.fixture
def one_thread(monkeypatch):
    """From the repository's root, where the bundled files are, and in one thread."""
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def document_of(monkeypatch, capsys):
    """Calls the main of a module with these words as command line; returns its last line, parsed."""

    def call(module: ModuleType, *words: object) -> dict:
        monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *map(str, words)])
        capsys.readouterr()
        module.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


@pytest.fixture
def run(one_thread, monkeypatch, capsys, weights, tmp_path):
    """Calls eval.py in this process, by default without scoring; returns its last line, parsed."""
    monkeypatch.setattr(cli, "slow_bf16", lambda *_: None)  # a note where bf16 is measured as slow

    def call(*flags: object, resume: object = None, out: Path = tmp_path / "out") -> dict:
        argv = flags_for(resume or weights / "official", out, *flags)
        monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
        capsys.readouterr()
        run_main(eval_script.main)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


@pytest.fixture
def refused(run, capsys, tmp_path):
    """Calls eval.py with something wrong; returns the one sentence after `error: `."""

    def call(*flags: object, resume: object = None, out: Path = tmp_path / "refused") -> str:
        before = sorted(out.rglob("*.png"))
        with pytest.raises(SystemExit) as exit_info:
            run(*flags, resume=resume, out=out)
        assert exit_info.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert sorted(out.rglob("*.png")) == before
        return captured.err.removeprefix("error: ").rstrip("\n")

    return call
