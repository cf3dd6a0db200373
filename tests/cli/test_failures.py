"""What stops a training leaves a checkpoint of the last complete step, and a failed score stops nothing."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch

import main_mar
from tests.support import ROOT
from tests.support.assertions import assert_same_run
from tests.support.train_small import GEOMETRY, SCHEDULE
from util import checkpoint
from util.data import datasets
from util.errors import UserError, sentence_of
from util.evaluation.run_folder import RunFolder
from util.training import step as training
from util.training.signals import StopRequest
from util.weights import read_pickle

STEPS = 5  # per epoch


@pytest.fixture
def train(train):
    """Trains for two epochs; returns the checkpoint."""
    return lambda *flags, **out: train("--epochs", 2, *flags, **out)[0]


def assert_goes_on(train, tmp_path, step):
    """The run in "out" has a checkpoint of `step`, from which it equals the unbroken one."""
    content = read_pickle(tmp_path / "out" / "checkpoint-last.pth", mmap=False)
    assert content["progress"]["step"] == step
    assert_same_run(train(out="whole"), train("--resume", tmp_path / "out"))


def fail_at(monkeypatch, target, name, call, error):
    """The `call`-th call of target.name raises."""
    calls, original = [], getattr(target, name)

    def failing(*arguments, **options):
        calls.append(None)
        if len(calls) == call:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(target, name, failing)


ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory."),
    OSError(12, "Cannot allocate memory"),
    UserError("a.npz is not a cached latent"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", [3, 6], ids=["inside an epoch", "between epochs"])
def test_a_failure_in_a_step_keeps_the_steps_before_it(train, tmp_path, monkeypatch, error, call):
    with monkeypatch.context() as patch:
        fail_at(patch, training, "train_step", call, error)
        with pytest.raises(type(error)):
            train()
    assert_goes_on(train, tmp_path, step=call - 1)


def test_a_failure_in_the_middle_of_an_update_is_not_saved(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, training.EMA, "update", 7, MemoryError())
        with pytest.raises(MemoryError):
            train("--save_last_freq", 1)
    assert_goes_on(train, tmp_path, step=STEPS)  # that of the first epoch


def test_a_run_that_diverged_keeps_the_checkpoint_before_it(train, tmp_path):
    train("--max_steps", 2)
    nan = ["--lr", 1e30, "--warmup_epochs", 0, "--grad_clip", 1e30, "--epochs", 30]
    with pytest.raises(UserError, match="without a finite loss"):
        train("--resume", tmp_path / "out", *nan)
    content = read_pickle(tmp_path / "out" / "checkpoint-last.pth", mmap=False)
    assert content["progress"]["step"] < 22


def test_a_failure_before_the_first_step_leaves_the_checkpoint_alone(train, tmp_path, monkeypatch):
    train("--max_steps", 3)
    before = (tmp_path / "out" / "checkpoint-last.pth").stat().st_mtime_ns
    fail_at(monkeypatch, training, "train_step", 1, MemoryError())
    with pytest.raises(MemoryError):
        train("--resume", tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint-last.pth").stat().st_mtime_ns == before


def test_a_disk_that_refuses_the_rescue_does_not_hide_what_failed(train, tmp_path, monkeypatch):
    fail_at(monkeypatch, training, "train_step", 3, UserError("a.npz is not a cached latent"))
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"a\.npz"):
        train()


# ---- signals and workers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "USR2", "XCPU"])
def test_a_signal_stops_at_the_next_step_and_only_term_and_int_insist(name):
    number = signal.Signals[f"SIG{name}"]
    with StopRequest() as request:
        os.kill(os.getpid(), number)
        assert request.requested
        if number in (signal.SIGTERM, signal.SIGINT):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        else:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)


def test_nohup_keeps_a_run_alive(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.requested
    finally:
        signal.signal(signal.SIGHUP, before)


class Dying(torch.utils.data.Dataset):
    """The process that reads item 9 is killed; `holding` names the lock that it has taken."""

    def __init__(self, holding=None):
        self.holding = holding

    def __len__(self):
        return 20

    def __getitem__(self, pick):
        if pick[0] == 9:
            frame = sys._getframe()
            while frame.f_code.co_name != "_worker_loop":
                frame = frame.f_back
            queue, event = frame.f_locals["data_queue"], frame.f_locals["done_event"]
            locks = {"of results": queue._wlock, "of the end": getattr(event, "_cond", None)}
            if lock := locks.get(self.holding):
                lock.acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(pick[0]), 0


@pytest.fixture
def alarm():
    """What waits for a minute fails."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("holding", [None, "of results", "of the end"])
def test_the_death_of_a_worker_is_raised_where_batches_are_read(holding):
    handler = signal.getsignal(signal.SIGCHLD)
    picks = [[(i, False)] for i in range(20)]
    source = iter(datasets.batches(Dying(holding), picks, num_workers=2))
    read = []
    with pytest.raises(UserError, match=r"has died \(exit code -9\).*--num_workers"):
        for images, _ in source:
            assert signal.getsignal(signal.SIGCHLD) == handler
            read.append(images.item())
    assert read == list(range(len(read)))
    assert len(read) < 10


class Large(torch.utils.data.Dataset):
    """Items that the shared memory of a worker, which is limited, does not hold."""

    def __getitem__(self, pick):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        return torch.zeros(3, 64, 64), 0


def test_shared_memory_that_is_full_is_one_sentence_with_a_remedy():
    with pytest.raises(RuntimeError) as caught:
        list(datasets.batches(Large(), [[(0, False)]], num_workers=1))
    said = sentence_of(caught.value)
    assert said is not None
    assert said.startswith("RuntimeError: unable to resize file </torch_")
    assert "/dev/shm" in said and "\n" not in said


def test_batches_are_pinned_without_a_thread_that_could_print(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 100)
    read = []
    for images, _ in datasets.batches(Dying(), [[(3, False)], [(4, False)]], 1, pin_memory=True):
        assert not [thread for thread in threading.enumerate() if "pin" in thread.name]
        read.append(images.item())
    assert read == [103, 104]


def started(latents, out, *flags):
    words = [*GEOMETRY, *SCHEDULE, "--use_cached", "--cached_path", latents]
    words += ["--output_dir", out, *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.train_small", *map(str, words)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def children_of(pid):
    return [int(word) for word in open(f"/proc/{pid}/task/{pid}/children").read().split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_a_killed_worker_ends_the_run_with_a_sentence_and_a_checkpoint(latents, tmp_path):
    out = tmp_path / "out"
    flags = ["--cache_in_memory", "false", "--num_workers", 2, "--batch_size", 1]
    process = started(latents, out, *flags, "--epochs", 100000)
    try:
        while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        deadline = time.monotonic() + 120
        while process.poll() is None:  # at the end of an epoch, workers are not needed
            assert time.monotonic() < deadline
            for worker in children_of(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            time.sleep(0.01)
        _, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 2
    assert "Traceback" not in err
    note, error = err.splitlines()[-2:]
    assert error.startswith("error: a process that reads data has died")
    saved = read_pickle(out / "checkpoint-last.pth", mmap=False)["progress"]["step"]
    assert f"up to step {saved}" in note
    assert saved == json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]


# ---- evaluations during training ---------------------------------------------------------------------

ONLINE = ["--online_eval", "--eval_freq", 1, "--num_images", 2, "--eval_bsz", 2, "--num_iter", 2]
ONLINE += ["--num_sampling_steps", "2", "--no_score"]


class Tokenizer(torch.nn.Module):
    stride = 4

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.fixture
def tokenizer(monkeypatch):
    host = main_mar.MARHost
    monkeypatch.setattr(host, "open_tokenizer", lambda self, device: Tokenizer())
    config = host.config

    def without_file(self, loaded, dtype):
        vae_path = self.tokenizer.__class__(vae_path=__file__, latent_scale=1.0)
        object.__setattr__(self, "tokenizer", vae_path)
        return config(self, loaded, dtype)

    monkeypatch.setattr(host, "config", without_file)


@pytest.mark.parametrize(
    "error", [UserError("2 of 2 decoded images contain NaN"), MemoryError(), ValueError("svd")]
)
@pytest.mark.usefixtures("tokenizer")
def test_a_failed_evaluation_is_a_note_and_training_continues(
    train, tmp_path, monkeypatch, capsys, error
):
    whole = train(out="whole")
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: (_ for _ in ()).throw(error))
    train(*ONLINE, "--epochs", 1)
    resumed = train(*ONLINE, "--resume", tmp_path / "out")  # evaluates epoch 1 again first
    assert_same_run(whole, resumed)
    notes = [line for line in capsys.readouterr().err.splitlines() if "evaluation after" in line]
    assert [note.split()[4] for note in notes] == ["1", "1", "2"]
    assert not list(tmp_path.rglob("images/*.png"))


@pytest.mark.usefixtures("tokenizer")
def test_an_evaluation_that_failed_once_succeeds_after_a_resume(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, Tokenizer, "decode", 1, UserError("no space left"))
        train(*ONLINE, "--epochs", 1)
        (run,) = (tmp_path / "out" / "epoch0001").iterdir()
        assert not RunFolder(run).results()
    train(*ONLINE, "--epochs", 1, "--resume", tmp_path / "out")
    assert RunFolder(run).results()


@pytest.mark.usefixtures("tokenizer")
def test_an_evaluation_alone_raises_its_error(train, tmp_path, monkeypatch):
    train("--max_steps", 1)
    monkeypatch.setattr(Tokenizer, "decode", lambda self, x: torch.full((2, 3, 16, 16), torch.nan))
    with pytest.raises(UserError, match="contain NaN"):
        train("--evaluate", *ONLINE[2:], "--resume", tmp_path / "out")
