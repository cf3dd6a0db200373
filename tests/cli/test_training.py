"""Training: the loss falls, a run stopped anywhere continues exactly, bad steps are skipped."""

import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.assertions import assert_same, assert_same_run
from tests.support.processes import train_in_two_processes
from tests.support.runs import log_of
from tests.support.train_small import GEOMETRY, SCHEDULE
from util.errors import UserError
from util.training import step as training
from util.training.ema import EMA
from util.training.log import RunLog
from util.training.optimizer import LRSchedule, make_optimizer
from util.weights import read_pickle


@pytest.mark.parametrize("stop", [5, 7], ids=["between epochs", "inside an epoch"])
def test_a_stopped_and_resumed_run_equals_the_unbroken_one_exactly(train, tmp_path, stop):
    whole, log = train(out="whole")
    train("--max_steps", stop, out="parts")
    resumed, log_of_parts = train("--resume", tmp_path / "parts", out="parts")
    assert_same_run(whole, resumed)
    assert [r["loss"] for r in log] == [r["loss"] for r in log_of_parts]
    assert [r["step"] for r in log_of_parts] == list(range(1, 21))


def test_a_stop_inside_an_epoch_leaves_a_checkpoint_of_the_epochs_before_it(train):
    content, _ = train("--max_steps", "7")
    assert content["epoch"] == 0  # one epoch of five steps is complete
    progress = {"step_in_epoch": 2, "step": 7, "images_per_step": 8, "images": 40, "skipped": 0}
    assert content["progress"] == progress


def test_a_checkpoint_of_the_original_continues_with_the_next_epoch(train, tmp_path):
    content, _ = train("--max_steps", "10")
    del content["progress"]
    torch.save(content, tmp_path / "out" / "checkpoint-last.pth")
    resumed, log = train("--resume", tmp_path / "out", "--max_steps", "11")
    assert resumed["progress"]["step"] == 11
    assert log[-1]["epoch"] == pytest.approx(2.2)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_trains_weights_that_stay_in_float32(train, tmp_path, dtype):
    _, exact = train("--max_steps", "6", out="exact")
    content, log = train("--max_steps", "6", "--dtype", dtype)
    assert {weight.dtype for weight in content["model"].values()} == {torch.float32}
    assert [r["loss"] for r in log] == pytest.approx([r["loss"] for r in exact], rel=0.05)
    assert [r["loss"] for r in log] != [r["loss"] for r in exact]
    resumed, _ = train("--resume", tmp_path / "out", "--max_steps", "7", "--dtype", dtype)
    assert resumed["scaler"]["_growth_tracker"] == (7 if dtype == "fp16" else 0)


def test_another_seed_gives_another_run(train):
    first, _ = train("--max_steps", "2", out="1")
    second, _ = train("--max_steps", "2", "--seed", "2", out="2")
    assert not torch.equal(first["model"]["z_proj.weight"], second["model"]["z_proj.weight"])


def test_in_memory_and_from_disk_are_the_same_run(train):
    memory, _ = train("--max_steps", "3", "--cache_in_memory", out="memory")
    disk, _ = train("--max_steps", "3", "--no-cache_in_memory", out="disk")
    assert_same(memory["model"], disk["model"])


def test_the_loss_falls_and_the_averages_lag_behind(train):
    content, log = train("--epochs", "12")
    assert np.mean([r["loss"] for r in log[-10:]]) < 0.8 * np.mean([r["loss"] for r in log[:5]])
    assert not torch.equal(content["model"]["z_proj.bias"], content["model_ema"]["z_proj.bias"])


def test_the_log_shows_the_warm_up(train):
    _, log = train("--max_steps", "6")
    peak = 0.3 * 8 / 256
    assert [r["lr"] for r in log] == pytest.approx([0, *(peak * i / 5 for i in range(1, 5)), peak])
    assert {"step", "epoch", "loss", "lr", "grad_norm", "images_per_s"} <= log[0].keys()


def test_without_a_checkpoint_resume_is_an_error_and_not_a_fresh_start(train, tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        train("--resume", tmp_path / "nowhere")


def test_another_batch_size_cannot_continue_inside_an_epoch(train, tmp_path):
    train("--max_steps", "7")
    with pytest.raises(UserError, match="8 images per step, this run has 4"):
        train("--resume", tmp_path / "out", "--batch_size", "4")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--class_num", "1"], "2 classes, the model 1: give --class_num 2"),
        (["--vae_embed_dim", "8"], r"moments \(8, 4, 4\), the model needs \(16, 4, 4\)"),
        (["--vae_stride", "3"], "not a multiple"),
        (["--batch_size", "64"], "40 images are too few"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused_before_training(train, flags, words):
    with pytest.raises(UserError, match=words):
        train(*flags)


class Line(nn.Module):
    """Loss = w * mean(latents)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, latents, labels):
        return (self.w * latents.mean()).sum()


@pytest.fixture
def line():
    model = Line()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = make_optimizer(model, 0.1, 0.0)
    state = training.TrainState(model, model, EMA(model, 0.5), optimizer, scaler)
    device = torch.device("cpu")
    config = training.StepConfig(LRSchedule(0.1), 3.0, 1, 0, device, torch.float32)

    def step(latents):
        return training.train_step(state, [(latents, torch.zeros(1))], 0.1, config)

    return step, state


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(line):
    step, state = line
    step(torch.ones(1))
    weights, average = state.model.w.clone(), state.ema.averages[0].clone()
    assert not torch.equal(weights, torch.ones(2))
    step(torch.full((1,), torch.nan))
    step(torch.full((1,), torch.inf))
    assert torch.equal(state.model.w, weights)
    assert torch.equal(state.ema.averages[0], average)
    assert (state.skipped, state.step) == (2, 3)
    step(torch.ones(1))
    assert not torch.equal(state.model.w, weights)
    assert state.skipped_in_a_row == 0


def test_twenty_bad_steps_in_a_row_end_the_run_with_a_sentence(line):
    step, state = line
    with pytest.raises(UserError, match="20 steps in a row without a finite loss"):
        for _ in range(30):
            step(torch.full((1,), torch.nan))
    assert state.step == 20


def test_gradients_are_clipped_but_reported_as_they_were(line):
    step, state = line
    result = step(torch.full((1,), 100.0))
    assert result.grad_norm.item() == pytest.approx(100 * 2**0.5)


def test_sigterm_saves_and_the_run_continues_exactly(train, tmp_path, monkeypatch):
    whole, _ = train(out="whole")
    write = RunLog.write

    def write_then_signal(log, step, **values):
        write(log, step, **values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", write_then_signal)
        stopped, _ = train(out="parts")
    assert stopped["progress"]["step"] == 3
    resumed, _ = train("--resume", tmp_path / "parts", out="parts")
    assert_same(whole["model_ema"], resumed["model_ema"])


NO_DROPOUT = ("--attn_dropout", "0", "--proj_dropout", "0")


def assert_follows(run, other):
    """The same loss curve and the same weights, within float noise."""
    (content, log), (other_content, other_log) = run, other
    assert len(log) == len(other_log)
    for name in ("loss", "grad_norm", "lr"):
        curves = [[line[name] for line in lines] for lines in (log, other_log)]
        assert curves[0] == pytest.approx(curves[1], rel=2e-5), name
    for name, weight in content["model_ema"].items():
        if not name.endswith("qkv.bias"):  # softmax ignores the keys' bias: Adam walks by rounding
            assert torch.allclose(weight, other_content["model_ema"][name], atol=2e-5), name


@pytest.mark.parametrize("count", [2, 4])
def test_accumulated_batches_follow_the_whole_batch(train, count):
    whole = train(*NO_DROPOUT, out="whole")
    parts = train(*NO_DROPOUT, "--batch_size", 8 // count, "--accum_iter", count, out="parts")
    assert_follows(whole, parts)
    assert parts[0]["progress"]["images_per_step"] == 8


def test_two_processes_with_half_the_batch_follow_one_with_the_whole(train, latents, tmp_path):
    whole = train(*NO_DROPOUT)
    flags = ["--use_cached", "--cached_path", latents, "--num_workers", 0]
    flags += ["--output_dir", tmp_path / "2", "--batch_size", 2, "--accum_iter", 2]
    train_in_two_processes(*GEOMETRY, *NO_DROPOUT, *SCHEDULE, *flags)
    content = read_pickle(tmp_path / "2" / "checkpoint-last.pth")
    assert not any(name.startswith("module.") for name in content["model"])
    assert_follows(whole, (content, log_of(tmp_path / "2")))
