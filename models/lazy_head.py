"""LazyDenoiser: denoising runs of the diffusion head with LazyMAR's cache inside the head.

The published code has this cache, its README does not name it; without it the published speed is not
reached. Stands in for models.denoiser.PlainDenoiser and drives the same, untouched network.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion
from models.adaln_mlp import SimpleMLPAdaLN
from models.denoiser import ADALN_OUTPUTS, FINAL_COLUMNS, ModulationTable, guide, time_table
from models.graphs import compiled
from models.lazy_mar import LazyMARConfig

Segment = tuple[bool, list[int]]  # (skipped, blocks)


class HeadCache:
    """Memory of one denoising run, conditional rows."""

    def __init__(self) -> None:
        # By segment (n, w): output - input of those skipped, output of the MLP of the others.
        self.parts: list[Tensor] = []
        self.modulation: Tensor | None = None  # of the last full step (n, columns, w)
        self.residual: Tensor | None = None  # eps_c - eps_u (n, C)


class LazyDenoiser:
    """Each call is one denoising run with its own HeadCache."""

    def __init__(
        self,
        net: SimpleMLPAdaLN,
        diffusion: GaussianDiffusion,
        config: LazyMARConfig,
        compile: bool = False,
    ) -> None:
        """As PlainDenoiser; config says which steps and blocks are read from the cache."""
        self.net = net
        self.diffusion = diffusion
        self.segments = _segments(len(net.res_blocks), config.head_skip)

        # A lazy step reads a prefix of the columns: gates, and while warm shifts and scales too.
        kept = [blocks[0] for skipped, blocks in self.segments if not skipped]
        rest = [b for b in range(len(net.res_blocks)) if b not in kept]
        gates = FINAL_COLUMNS + [(b, "gate") for b in kept]
        warm = gates + [(b, name) for b in kept for name in ("shift", "scale")]
        full = warm + [(b, name) for b in rest for name in ADALN_OUTPUTS]
        self.reuse_adaln = config.head_reuse_adaln
        times = time_table(net, diffusion)
        self.modulations = ModulationTable(net, times, full)

        steps = diffusion.num_timesteps
        self.kinds: list[str] = []  # of step i
        for i in range(steps):
            lazy = "warm" if config.is_warm(i, steps) else "cold"
            self.kinds.append("full" if config.is_full(i, steps) else lazy)
        self.columns = {"full": len(full), "warm": len(warm), "cold": len(gates)}
        self.times = {kind: _times_of(kind, self.kinds, times) for kind in self.columns}
        self._full_step, self._lazy_step = self._full, self._lazy
        if compile:
            self._full_step = compiled(self._full)
            self._lazy_step = compiled(self._lazy)

    @torch.no_grad()
    def __call__(self, z: Tensor, noise: Tensor, cfg: float | Tensor, temperature: float) -> Tensor:
        """z (n, D), or with guidance (2n, D); noise (n, T+1, C) -> tokens (n, C)."""
        n = len(noise)
        condition = self.net.cond_embed(z)
        rows = {"full": condition, "warm": condition[:n], "cold": condition[:n]}
        ahead = {
            kind: self.modulations.ahead(rows[kind], self.times[kind], count)
            for kind, count in self.columns.items()
        }
        cache = HeadCache()

        def model(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            kind, x = self.kinds[i], x.contiguous()
            reused = self.reuse_adaln and kind != "full"
            modulation = cache.modulation if reused else next(ahead[kind])
            if kind == "full":
                cache.modulation = modulation[:n]
                output, cache.parts = self._full_step(x, modulation)
                epsilon, fraction, cache.residual = guide(output.float(), n, cfg)
                return epsilon, fraction
            output, cache.parts = self._lazy_step(x, modulation, cache.parts, kind == "warm")
            epsilon, fraction = output.float().chunk(2, dim=-1)
            if cache.residual is not None:  # eps_u = eps_c - residual
                epsilon = epsilon + (cfg - 1.0) * cache.residual
            return epsilon, fraction

        return self.diffusion.sample(model, noise, temperature)

    def _full(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x (n, C), all columns (r, columns, w), both branches -> (r, 2C) and what to remember."""
        n, column = len(x), self.modulations.column
        hidden = self.net.embed_tokens(x, rows=len(modulation))
        parts = []
        for skipped, blocks in self.segments:
            before = hidden
            for b in blocks:
                shift, scale, gate = (modulation[:, column[b, name]] for name in ADALN_OUTPUTS)
                out = self.net.res_blocks[b].branch(hidden, shift, scale)
                hidden = torch.addcmul(hidden, gate, out)
            # A view of `out` would keep the unconditional half alive.
            parts.append(hidden[:n] - before[:n] if skipped else out[:n].clone())
        return self._final(hidden, modulation), parts

    def _lazy(
        self, x: Tensor, modulation: Tensor, parts: Sequence[Tensor], warm: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """x (n, C), columns (n, columns, w) of a lazy step -> (n, 2C) and what to remember."""
        column = self.modulations.column
        hidden = self.net.embed_tokens(x, rows=len(x))
        renewed = []
        for (skipped, blocks), part in zip(self.segments, parts, strict=True):
            if skipped:
                hidden = hidden + part
            else:
                b = blocks[0]
                if warm:
                    shift, scale = (modulation[:, column[b, name]] for name in ("shift", "scale"))
                    part = self.net.res_blocks[b].branch(hidden, shift, scale)
                hidden = torch.addcmul(hidden, modulation[:, column[b, "gate"]], part)
            renewed.append(part)
        return self._final(hidden, modulation), renewed

    def _final(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        """(r, w) -> (r, 2C); the final layer's columns come first."""
        return self.net.final_layer.output(hidden, modulation[:, 0], modulation[:, 1])


def _times_of(kind: str, kinds: Sequence[str], times: Tensor) -> Tensor:
    """Rows of times (T, w) of the steps of this kind, in the order of a run."""
    steps = [i for i in reversed(range(len(kinds))) if kinds[i] == kind]
    return times[torch.tensor(steps, dtype=torch.long, device=times.device)]


def _segments(depth: int, skip: tuple[int, ...]) -> list[Segment]:
    """Blocks 0..depth-1 in their order: neighbours that are skipped together, others alone."""
    segments: list[Segment] = []
    for b in range(depth):
        if b in skip and segments and segments[-1][0]:
            segments[-1][1].append(b)
        else:
            segments.append((b in skip, [b]))
    return segments
