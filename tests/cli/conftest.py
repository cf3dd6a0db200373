"""A scored run, and trainings of a model of a few thousand weights in this process."""

import subprocess
import sys

import numpy as np
import pytest

import main_mar
from models import mar
from tests.support import ROOT
from tests.support.runs import SCORED, flags_for, log_of
from tests.support.train_small import GEOMETRY, SCHEDULE, WIDTHS
from util import dist
from util.weights import LAST, read_pickle


@pytest.fixture(scope="session")
def scored(weights, tmp_path_factory) -> tuple[list[str], subprocess.CompletedProcess]:
    """The flags of a scored run with two images per class, and what the command printed."""
    out = tmp_path_factory.mktemp("scored")
    argv = flags_for(weights / "official", out, *SCORED)
    command = [sys.executable, "eval.py", *argv]
    return argv, subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """Twenty latents of each of two classes: five steps of eight."""
    root = tmp_path_factory.mktemp("latents")
    random = np.random.default_rng(0)
    for label, name in enumerate(("a", "b")):
        (root / name).mkdir()
        for i in range(20):
            moments = random.normal(label, 0.1, (8, 4, 4)).astype(np.float32)
            np.savez(root / name / f"{i}.npz", moments=moments, moments_flip=moments[..., ::-1])
    return root


@pytest.fixture
def small_model(monkeypatch):
    for name in ("mar_tiny", "mar_large"):
        monkeypatch.setitem(mar.SIZES, name, WIDTHS)


@pytest.fixture
def train(latents, tmp_path, small_model):
    """Runs main_mar on the latents; returns the checkpoint and the lines of the log."""

    def run(*flags, out="out"):
        words = [*GEOMETRY, *SCHEDULE, "--use_cached", "--cached_path", latents]
        words += ["--num_workers", 0, "--output_dir", tmp_path / out, *flags]
        main_mar.run(main_mar.parse([str(word) for word in words]), dist.Rendezvous())
        return read_pickle(tmp_path / out / LAST, mmap=False), log_of(tmp_path / out)

    return run
