"""Evaluation in the middle of training: what it leaves, that it can be interrupted, that nothing moves."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

import main_mar
from tests.support.assertions import assert_same
from tests.support.processes import train_in_two_processes
from tests.support.runs import log_of
from util.errors import run_main
from util.evaluation import generation
from util.images import read_image
from util.shapes import export
from util.weights import read_pickle

FLAGS = ["--model", "mar_tiny", "--device", "cpu", "--diffloss_d", "1", "--diffloss_w", "16"]
FLAGS += ["--num_sampling_steps", "ddim5", "--num_iter", "2", "--num_images", "12"]
FLAGS += ["--eval_bsz", "4", "--batch_size", "5", "--num_workers", "0", "--log_freq", "1"]
FLAGS += ["--warmup_epochs", "0", "--lr", "0.01", "--ema_rate", "0.5", "--epochs", "3"]
FLAGS += ["--online_eval", "--eval_freq", "2", "--cfg", "2", "--save_last_freq", "3"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten pictures of the ten shapes, 64 pixels each."""
    root = tmp_path_factory.mktemp("pictures")
    export(root, 10)
    return root


@pytest.fixture
def train(one_thread, small_model, monkeypatch, pictures, tmp_path, capsys):
    """Calls main_mar.py in this process; returns the output folder and what it printed."""

    def call(*flags, out="out"):
        out = tmp_path / out
        words = [*FLAGS, "--data_path", pictures, "--output_dir", out, *flags]
        monkeypatch.setattr(sys, "argv", ["main_mar.py", *map(str, words)])
        run_main(main_mar.main)
        return out, capsys.readouterr()

    return call


def results_of(out: Path) -> dict[str, dict]:
    files = sorted(out.glob("epoch*/*/results.json"))
    return {str(file.parent.relative_to(out)): json.loads(file.read_text()) for file in files}


NAMES = [f"epoch000{epoch}/mar_tiny-mar-iter2-cfg{cfg}-12" for epoch in (2, 3) for cfg in (1, 2)]


def test_an_evaluation_scores_with_and_without_guidance_and_keeps_a_sheet(train):
    out, _ = train()
    results = results_of(out)
    assert list(results) == NAMES  # every second epoch, and the last
    assert all(r["fid"] > 0 and r["images_dir"] is None for r in results.values())
    assert not list(out.rglob("images/*"))
    first, last = (read_image(out / "samples" / f"epoch000{epoch}.png") for epoch in (2, 3))
    assert first.shape == last.shape
    assert not np.array_equal(first, last)
    scores = [line for line in log_of(out) if "fid_cfg1" in line]
    assert [(line["step"], line["epoch"]) for line in scores] == [(4, 2), (6, 3)]
    assert scores[0]["fid_cfg2"] == results[NAMES[1]]["fid"]
    assert [line["step"] for line in log_of(out) if "loss" in line] == list(range(1, 7))


def test_an_evaluation_changes_nothing_in_the_training_around_it(train):
    plain, _ = train("--eval_freq", "100", "--max_steps", "5", out="plain")
    scored, _ = train("--max_steps", "5", out="scored")
    a, b = (read_pickle(out / "checkpoint-last.pth") for out in (plain, scored))
    for key in ("model", "model_ema", "optimizer"):
        assert_same(a[key], b[key])


def test_after_sigterm_in_an_evaluation_resume_completes_it_exactly(train, tmp_path, monkeypatch):
    whole, _ = train(out="whole")
    take, taken = generation.PngSink.take, []

    def take_then_signal(sink, job, first, images):
        take(sink, job, first, images)
        taken.append(job)
        if len(taken) == 4:  # the first batch with guidance
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(generation.PngSink, "take", take_then_signal)
        out, printed = train(out="parts")
    assert "stopped in an evaluation; continue with --resume" in printed.out
    assert list(results_of(out)) == NAMES[:1]
    assert read_pickle(out / "checkpoint-last.pth")["epoch"] == 1  # saved although not yet due
    made = results_of(out)[NAMES[0]]
    train("--resume", tmp_path / "parts", out="parts")
    assert results_of(out)[NAMES[0]] == {**made, "images_dir": None}  # not made again
    assert results_of(out).keys() == results_of(whole).keys()
    for name, results in results_of(whole).items():
        assert results["fid"] == results_of(out)[name]["fid"]
    for epoch in (2, 3):
        a, b = (read_image(o / "samples" / f"epoch000{epoch}.png") for o in (whole, out))
        assert np.array_equal(a, b)
    a, b = (read_pickle(o / "checkpoint-last.pth") for o in (whole, out))
    assert_same(a["model_ema"], b["model_ema"])
    times = {"images_per_s", "memory_gb"}
    logs = [
        [{k: v for k, v in line.items() if k not in times} for line in log_of(o)]
        for o in (whole, out)
    ]
    assert logs[0] == logs[1]


def test_a_finished_run_says_so_and_evaluates_nothing_again(train, tmp_path):
    out, _ = train("--epochs", "2")

    def times():
        files = [p for p in out.rglob("*") if p.name != "log.jsonl" and "tfevents" not in p.name]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    _, printed = train("--epochs", "2", "--resume", out)
    assert "has 2 epochs, --epochs is 2: nothing is left to train" in printed.err
    after = times()
    assert {p.name for p in after if after[p] != before[p]} <= {"classes.json", "out"}


def test_without_saving_or_scoring_the_rest_is_reported(train):
    out, _ = train("--epochs", "2", "--no_save", out="a")
    assert list(results_of(out)) == NAMES[:2]
    assert not list(out.rglob("*.png"))
    out, _ = train("--epochs", "2", "--no_score", out="b")
    assert [r["fid"] for r in results_of(out).values()] == [None, None]
    assert (out / "samples" / "epoch0002.png").is_file()


def test_two_processes_evaluate_together(pictures, tmp_path):
    flags = ["--data_path", pictures, "--output_dir", tmp_path, "--epochs", 2]
    train_in_two_processes(*FLAGS, *flags)
    results = results_of(tmp_path)
    assert list(results) == NAMES[:2]
    assert [r["processes"] for r in results.values()] == [2, 2]
    assert [line["epoch"] for line in log_of(tmp_path)] == [1, 2, 2]
    assert (tmp_path / "samples" / "epoch0002.png").is_file()
