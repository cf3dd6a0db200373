"""LazyDenoiser: denoising runs of the diffusion head with LazyMAR's cache inside the head.

The published code has this cache, its README does not name it; without it the published speed is not
reached. Stands in for models.diffloss.PlainDenoiser and drives the same, untouched network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.diffloss import DiffLoss, guide, time_table
from models.lazy_mar import LazyMARConfig


class HeadCache:
    """Memory of one denoising run, conditional rows: by segment, its change or its MLP output."""

    def __init__(self) -> None:
        self.change: dict[int, Tensor] = {}  # first block of a skipped run -> output - input (n, w)
        self.mlp: dict[int, Tensor] = {}  # block -> output of its MLP (n, w)
        self.residual: Tensor | None = None  # eps_c - eps_u (n, C)


class LazyDenoiser:
    """Born with one call of sample_tokens; each call is one denoising run with its own HeadCache."""

    def __init__(self, head: DiffLoss, config: LazyMARConfig) -> None:
        self.net = head.net
        self.diffusion = head.gen_diffusion
        self.times = time_table(head)
        steps = head.num_sampling_steps
        self.full = [config.is_full(i, steps) for i in range(steps)]
        self.warm = [config.is_warm(i, steps) for i in range(steps)]
        self.segments = _segments(len(head.net.res_blocks), config.head_skip)
        # Cast once: autocast would cast these slices anew at every denoising step.
        dtype = self.times.dtype
        self.gates = [block.gate_parameters(dtype) for block in head.net.res_blocks]

    @torch.no_grad()
    def __call__(self, z: Tensor, noise: Tensor, cfg: float, temperature: float) -> Tensor:
        """z (n, D), or (2n, D) if cfg != 1; noise (n, T+1, C) -> tokens (n, C)."""
        condition = self.net.cond_embed(z)
        cache = HeadCache()

        def model(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            if self.full[i]:
                return self._full(i, x, condition, cfg, cache)
            return self._lazy(i, x, condition[: x.shape[0]], cfg, cache)

        return self.diffusion.sample(model, noise, temperature)

    def _full(
        self, i: int, x: Tensor, condition: Tensor, cfg: float, cache: HeadCache
    ) -> tuple[Tensor, Tensor]:
        """Both branches through all blocks; fills the cache."""
        n = x.shape[0]
        embedding = F.silu(self.times[i] + condition)
        hidden = self.net.embed_tokens(x, rows=condition.shape[0])
        for skipped, blocks in self.segments:
            before = hidden
            for b in blocks:
                out, gate = self.net.res_blocks[b].branch(hidden, embedding)
                hidden = hidden + gate * out
            if skipped:
                cache.change[blocks[0]] = hidden[:n] - before[:n]
            else:
                # A view would keep the unconditional half alive.
                cache.mlp[blocks[0]] = out[:n].clone() if len(out) > n else out
        output = self.net.final_layer(hidden, embedding).float()
        epsilon, fraction, cache.residual = guide(output, cfg)
        return epsilon, fraction

    def _lazy(
        self, i: int, x: Tensor, condition: Tensor, cfg: float, cache: HeadCache
    ) -> tuple[Tensor, Tensor]:
        """The conditional branch, its blocks from the cache."""
        embedding = F.silu(self.times[i] + condition)
        hidden = self.net.embed_tokens(x, rows=x.shape[0])
        for skipped, blocks in self.segments:
            first = blocks[0]
            block = self.net.res_blocks[first]
            if skipped:
                hidden = hidden + cache.change[first]
            elif self.warm[i]:
                cache.mlp[first], gate = block.branch(hidden, embedding)
                hidden = hidden + gate * cache.mlp[first]
            else:
                hidden = hidden + F.linear(embedding, *self.gates[first]) * cache.mlp[first]
        epsilon, fraction = self.net.final_layer(hidden, embedding).float().chunk(2, dim=-1)
        if cache.residual is not None:  # eps_u = eps_c - residual
            epsilon = epsilon + (cfg - 1.0) * cache.residual
        return epsilon, fraction


def _segments(depth: int, skip: tuple[int, ...]) -> list[tuple[bool, list[int]]]:
    """Blocks 0..depth-1 as [(skipped, blocks)]: neighbours that are skipped together, others alone."""
    segments: list[tuple[bool, list[int]]] = []
    for b in range(depth):
        if b in skip and segments and segments[-1][0]:
            segments[-1][1].append(b)
        else:
            segments.append((b in skip, [b]))
    return segments
