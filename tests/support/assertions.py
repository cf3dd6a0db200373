"""Comparisons that several tests make."""

import pytest
import torch

from util.errors import UserError


def assert_same(a, b):
    """Equal bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(a, b):
    """Checkpoints of one training."""
    for key in ("model", "model_ema", "optimizer", "epoch", "progress"):
        assert_same(a[key], b[key])


def refusal(call) -> str:
    """The message of the UserError that call() raises; it must be one line."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)
