"""Threads are chosen, compilation is only tried where it wins."""

import os

import pytest
import torch

from util.device import can_compile, set_threads

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.fixture
def threads(monkeypatch):
    """What set_threads asked for, in an environment without a word about it."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return asked


@pytest.mark.parametrize(
    ("stated", "environment", "expected"),
    [
        (3, {"OMP_NUM_THREADS": "1"}, [3]),
        (None, {}, [CORES]),
        (None, {"OMP_NUM_THREADS": "1"}, []),
        (None, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "1"}, [CORES]),
        (None, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(2 * CORES)}, [1]),
    ],
    ids=["stated", "alone", "the user's", "torchrun", "more processes than cores"],
)
def test_a_process_takes_its_share_of_the_cores(
    monkeypatch, threads, stated, environment, expected
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    set_threads(stated)
    assert threads == expected


def test_nothing_is_compiled_on_a_cpu(capsys):
    assert not can_compile(torch.device("cpu"), show=True)
    assert capsys.readouterr().err == ""


def test_a_missing_compiler_is_one_sentence(monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("no C compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(torch, "ones", lambda *args, **kwargs: ())
    assert not can_compile(torch.device("cuda"), show=True)
    assert (
        capsys.readouterr().err
        == "torch.compile does not work here (no C compiler); going on without\n"
    )
