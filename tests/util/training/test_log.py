"""The log of a training run: lines that are whole, a full disk, TensorBoard's curves and pictures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from util.errors import UserError
from util.training import log as run_log
from util.training.log import RunLog
from util.training.monitor import memory_gb


@pytest.fixture(autouse=True)
def no_board(monkeypatch):
    monkeypatch.setattr(run_log, "SummaryWriter", None)


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint_and_what_was_cut_off(tmp_path):
    log = RunLog(tmp_path, tmp_path)
    for step in range(1, 6):
        log.write(step, loss=1.0)
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    log = RunLog(tmp_path, tmp_path, step=3)
    assert steps_of(tmp_path) == [1, 2, 3]
    log.write(4, loss=2.0)
    log.close()
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_a_full_disk_loses_log_lines_and_is_reported_once(tmp_path, capsys):
    log = RunLog(tmp_path, tmp_path)
    log._file.close()
    with open("/dev/full", "w") as full:
        log._file = full
        log.write(1, loss=1.0)
        log.write(2, loss=1.0)
        log.close()
    printed = capsys.readouterr()
    assert printed.err.count("note: the log cannot be written") == 1
    assert "No space left" in printed.err
    assert printed.out.count("loss 1") == 2


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="choose another --output_dir"):
        RunLog(tmp_path / "out", tmp_path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_memory_is_the_process_peak_in_gigabytes():
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert memory_gb(torch.device("cpu")) == pytest.approx(int(peak) * 1024 / 1e9, rel=0.02)


def test_tensorboard_gets_every_number_and_the_pictures(tmp_path, monkeypatch):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(run_log, "SummaryWriter", writer)
    log = RunLog(tmp_path, tmp_path / "board")
    values = {"loss": 1.5, "lr": 0.1, "grad_norm": 2.0, "images_per_s": 30.0, "memory_gb": 0.5}
    log.write(7, **values)
    log.show(7, "samples", np.zeros((4, 5, 3), dtype=np.uint8))
    log.close()
    board = events.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    for name, value in values.items():
        (event,) = board.Scalars(name)
        assert (event.step, event.value) == (7, pytest.approx(value))
    (picture,) = board.Images("samples")
    assert (picture.step, picture.height, picture.width) == (7, 4, 5)
