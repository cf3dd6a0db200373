"""Which positions a lazy step computes behind the probe layer (LazyMARConfig.token_selection)."""

import torch
from torch import Tensor

# SplitMix64's multipliers (Steele et al. 2014), as signed 64-bit numbers; products wrap around.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def lowest(score: Tensor, always: slice, count: int) -> Tensor:
    """`count` positions (rows, count): those of `always` first, then the lowest scores (rows, n).

    The score is changed in place.
    """
    score[:, always] = float("inf")
    fixed = torch.arange(always.start, always.stop, device=score.device).expand(len(score), -1)
    others = score.topk(count - fixed.shape[1], dim=1, largest=False).indices
    return torch.cat([fixed, others], dim=1)


def random_score(order: Tensor, buffer_size: int, step: int) -> Tensor:
    """Numbers in [0, 1) (rows, buffer + L) float32, a function of an image's own order and the step.

    order (rows, L) int64 identifies the image, so they depend on neither batch nor device.
    """
    length = order.shape[1]
    places = torch.arange(buffer_size + length, device=order.device)
    image = _mixed(order + length * places[:length]).sum(dim=1, keepdim=True)  # (rows, 1)
    bits = _mixed(_mixed(image + step) + places)
    return _shifted(bits, 40).float() / 2**24


def _mixed(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64, element by element (int64)."""
    x = x * _GOLDEN
    x = (x ^ _shifted(x, 30)) * _MIX[0]
    x = (x ^ _shifted(x, 27)) * _MIX[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits without its sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
