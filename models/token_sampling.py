"""From logits to codes: temperature, top-k, top-p, and a draw that is seeded per image."""

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

UNIFORM_BITS = 24  # a float32 holds k / 2^24 exactly, and never rounds it up to 1


def uniforms_from_seeds(seeds: Sequence[int], count: int) -> Tensor:
    """Numbers in [0, 1), (B, count) float32; row i is drawn from seeds[i] alone (0 <= seed).

    As in models/noise.py, numpy's RandomState is the same on every device and platform. Raises
    ValueError for a negative seed.
    """
    draws = np.empty((len(seeds), count), dtype=np.float32)
    for i, seed in enumerate(seeds):
        if int(seed) < 0:
            raise ValueError(f"seed {int(seed)} is negative; seeds are whole numbers from 0")
        stream = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(int(seed))))
        draws[i] = stream.randint(0, 2**UNIFORM_BITS, count) / 2**UNIFORM_BITS
    return torch.from_numpy(draws)


def check_settings(cfg: float, temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for settings of sample_tokens that make no sense."""
    if not (isinstance(cfg, Real) and math.isfinite(cfg)):
        raise ValueError(f"cfg is {cfg}; it must be a finite number")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be above 0 (or use greedy)")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be 0 (off) or a number of codes")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1], 1 is off")


class TokenSampler:
    """Turns logits of step i into codes.

    A draw inverts the cumulative distribution at the image's own i-th uniform number, so it needs
    one number per token, the same in any batch. Raises ValueError unless there is a seed per image.
    """

    def __init__(
        self,
        batch: int,
        num_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        greedy: bool,
        seeds: Sequence[int] | None,
        device: torch.device,
    ) -> None:
        if seeds is not None and len(seeds) != batch:
            raise ValueError(f"{len(seeds)} seeds for {batch} images; give one each")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.uniforms: Tensor | None = None  # (B, N)
        if not greedy and seeds is not None:
            self.uniforms = uniforms_from_seeds(seeds, num_tokens).to(device)
        elif not greedy:
            self.uniforms = torch.rand(batch, num_tokens, device=device)

    def __call__(self, logits: Tensor, i: int | Tensor) -> Tensor:
        """logits (B, vocab) float32 of token i, a number or (1,) int64 -> codes (B,) int64."""
        if self.uniforms is None:
            return logits.argmax(dim=-1)
        probs = self.distribution(logits)
        cumulative = probs.cumsum(dim=-1)
        at = i if isinstance(i, Tensor) else slice(i, i + 1)
        target = self.uniforms[:, at] * cumulative[:, -1:]
        hit = (cumulative > target) & (probs > 0)
        return hit.to(torch.uint8).argmax(dim=-1)  # the first one

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities (B, vocab) after temperature, top-k and top-p, in LlamaGen's order."""
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probs = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, order = probs.sort(dim=-1, descending=True)
            beyond = ordered.cumsum(dim=-1) - ordered > self.top_p  # without the code itself
            probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
        return probs
