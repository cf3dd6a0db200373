"""One line where bf16 on a CPU would be slower than float32."""

import pytest
import torch

from engine import cli
from util import device


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
