"""Threads are chosen, compilation is only tried where it wins, hardware has its name."""

import platform

import pytest
import torch

from engine import cli
from util import device
from util.device import can_compile, device_name, set_threads


def test_a_cpu_is_named_by_its_model(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast CPU\nmodel name\t: Slow\n")
    monkeypatch.setattr(device, "Path", lambda path: cpuinfo)
    assert device_name(torch.device("cpu")) == "Fast CPU"
    for text in ("processor: 0\n", None):  # as on ARM, as on macOS
        cpuinfo.write_text(text) if text else cpuinfo.unlink()
        assert device_name(torch.device("cpu")) in (platform.processor(), platform.machine())


@pytest.mark.parametrize(("stated", "expected"), [(3, 3), (None, 1)])
def test_threads_do_not_depend_on_the_machine_or_the_launcher(monkeypatch, stated, expected):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    set_threads(stated)
    assert asked == [expected]


def test_nothing_is_compiled_on_a_cpu(capsys):
    assert not can_compile(torch.device("cpu"), show=True)
    assert capsys.readouterr().err == ""


def test_a_missing_compiler_is_one_sentence(monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("no C compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(torch, "ones", lambda *args, **kwargs: ())
    assert not can_compile(torch.device("cuda"), show=False)
    assert (
        capsys.readouterr().err
        == "torch.compile does not work here (no C compiler); running without it\n"
    )


@pytest.mark.parametrize(("bf16", "told"), [(83e9, True), (133e9, False), (400e9, False)])
def test_a_cpu_that_is_slower_in_bf16_is_reported_with_both_rates(monkeypatch, capsys, bf16, told):
    rates = {torch.float32: 133e9, torch.bfloat16: bf16}
    monkeypatch.setattr(device, "_matrix_rate", rates.__getitem__)
    threads = torch.get_num_threads()
    cli.place(cli.named("mar_tiny", dtype="bf16", device="cpu").flags)
    torch.set_num_threads(threads)
    err = capsys.readouterr().err
    assert err.count("\n") == told
    assert ("bf16 matrices at 83 GFLOP/s and float32 ones at 133" in err) == told


@pytest.mark.parametrize("dtype", [None, "float32", "fp16"])
def test_nothing_is_measured_unless_bf16_was_asked_for(monkeypatch, dtype):
    monkeypatch.setattr(device, "_matrix_rate", lambda dtype: 1 / 0)
    assert device.slow_bf16(torch.device("cpu"), dtype) is None
    assert device.slow_bf16(torch.device("cuda"), "bf16") is None


def test_a_rate_is_measured():
    assert device._matrix_rate(torch.bfloat16, repeats=1) > 0
