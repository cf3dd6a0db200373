"""LazyDenoiser: denoising runs of the diffusion head with LazyMAR's cache inside the head.

The cache is in the published code, but not in its README; the published speed needs it. LazyDenoiser
replaces models.denoiser.PlainDenoiser and uses the same network.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, groupby

import torch
from torch import Tensor

from models.adaln_mlp import SimpleMLPAdaLN
from models.denoiser import ADALN_OUTPUTS, FINAL_COLUMNS, ModulationTable, guide, time_table
from models.graphs import compiled
from models.head_config import DenoisingRun
from models.lazy_mar import LazyMARConfig

Segment = tuple[bool, list[int]]  # (skipped, blocks)


class HeadCache:
    """Cache of one denoising run, conditional branch."""

    def __init__(self) -> None:
        # By segment (n, w): output - input of those skipped, output of the MLP of the others.
        self.parts: list[Tensor] = []
        self.modulation: Tensor | None = None  # of the last full step (n, columns, w)
        self.residual: Tensor | None = None  # eps_c - eps_u (n, C)
        # Of the full step before the last one, for a forecast.
        self.parts_before: list[Tensor] = []
        self.residual_before: Tensor | None = None

    def forecast(
        self, segments: Sequence[Segment], age: float
    ) -> tuple[list[Tensor], Tensor | None]:
        """Parts and residual of a lazy step: those remembered, or extrapolated by LazyRun.ages."""
        parts, residual = self.parts, self.residual
        if age:
            both = zip(segments, self.parts_before, self.parts, strict=True)
            parts = [
                torch.lerp(before, last, 1.0 + age) if skipped else last
                for (skipped, _), before, last in both
            ]
            if residual is not None and self.residual_before is not None:
                residual = torch.lerp(self.residual_before, residual, 1.0 + age)
        return parts, residual


class LazyRun:
    """What each denoising step i of a run computes.

    ages: for a lazy step, its distance from the last full step, divided by the distance of the last two
    full steps; 0 without a forecast, and until there are two full steps.
    """

    def __init__(
        self, run: DenoisingRun, config: LazyMARConfig, own_steps: int, times: Tensor
    ) -> None:
        """own_steps: the model's number of denoising steps; times (N, w): embedded timesteps."""
        self.solver, self.guided = run.solver, run.guided
        self.kinds = config.head_kinds(run.guided, own_steps)
        self.times: dict[str, Tensor] = {}
        for kind in ("full", "warm", "cold"):
            steps = [i for i in reversed(range(len(self.kinds))) if self.kinds[i] == kind]
            self.times[kind] = times[torch.tensor(steps, dtype=torch.long, device=times.device)]
        # Full steps without guidance come before and behind those with it.
        full = [g for g, kind in zip(run.guided, self.kinds, strict=True) if kind == "full"][::-1]
        phases = [(g, len([*steps])) for g, steps in groupby(full)]
        parts = self.times["full"].split([count for _, count in phases])
        self.full_phases = [(g, part) for (g, _), part in zip(phases, parts, strict=True)]
        self.ages = _ages(self.kinds) if config.forecast_order else [0.0] * len(self.kinds)


class LazyDenoiser:
    """Each call is one denoising run with its own HeadCache."""

    def __init__(
        self,
        net: SimpleMLPAdaLN,
        runs: Sequence[DenoisingRun],
        config: LazyMARConfig,
        own_steps: int,
        compile: bool = False,
    ) -> None:
        """As PlainDenoiser; config says which steps and blocks are read from the cache.

        own_steps: the model's number of denoising steps, to which head_interval belongs.
        """
        self.net = net
        self.segments = _segments(len(net.res_blocks), config.head_skip)

        # A lazy step reads a prefix of the columns: gates, and while warm shifts and scales too.
        kept = [blocks[0] for skipped, blocks in self.segments if not skipped]
        rest = [b for b in range(len(net.res_blocks)) if b not in kept]
        gates = FINAL_COLUMNS + [(b, "gate") for b in kept]
        warm = gates + [(b, name) for b in kept for name in ("shift", "scale")]
        full = warm + [(b, name) for b in rest for name in ADALN_OUTPUTS]
        self.reuse_adaln = config.head_reuse_adaln
        self.columns = {"full": len(full), "warm": len(warm), "cold": len(gates)}
        tables = [time_table(net, run.solver) for run in runs]
        self.modulations = ModulationTable(net, tables[0], full)
        self.runs = {
            run.num_steps: LazyRun(run, config, own_steps, times)
            for run, times in zip(runs, tables, strict=True)
        }
        self._full_step, self._lazy_step = self._full, self._lazy
        if compile:
            self._full_step = compiled(self._full)
            self._lazy_step = compiled(self._lazy)

    @torch.no_grad()
    def __call__(self, z: Tensor, noise: Tensor, cfg: float | Tensor, temperature: float) -> Tensor:
        """z (n, D), or with guidance (2n, D); noise (n, N+1, C) of a run of N steps -> tokens (n, C)."""
        n, run = len(noise), self.runs[noise.shape[1] - 1]
        condition = self.net.cond_embed(z)
        ahead: dict[str, Iterator[Tensor]] = {
            kind: self.modulations.ahead(condition[:n], run.times[kind], self.columns[kind])
            for kind in ("warm", "cold")
        }
        ahead["full"] = chain.from_iterable(
            self.modulations.ahead(
                condition if guided else condition[:n], times, self.columns["full"]
            )
            for guided, times in run.full_phases
        )
        cache = HeadCache()

        def model(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            kind, x = run.kinds[i], x.contiguous()
            reused = self.reuse_adaln and kind != "full"
            modulation = cache.modulation if reused else next(ahead[kind])
            assert modulation is not None  # the first step is full
            if kind == "full":
                cache.modulation = modulation[:n]
                cache.parts_before, cache.residual_before = cache.parts, cache.residual
                output, cache.parts = self._full_step(x, modulation)
                epsilon, fraction, cache.residual = guide(output.float(), n, cfg)
                return epsilon, fraction
            parts, residual = cache.forecast(self.segments, run.ages[i])
            output, parts = self._lazy_step(x, modulation, parts, kind == "warm")
            if kind == "warm":  # MLPs are new; changes of skipped blocks stay those of full steps
                both = zip(self.segments, cache.parts, parts, strict=True)
                cache.parts = [old if skipped else new for (skipped, _), old, new in both]
            epsilon, fraction = output.float().chunk(2, dim=-1)
            if residual is not None and run.guided[i]:  # eps_u = eps_c - residual
                epsilon = epsilon + (cfg - 1.0) * residual
            return epsilon, fraction

        return run.solver.sample(model, noise, temperature)

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


def _ages(kinds: Sequence[str]) -> list[float]:
    """LazyRun.ages of the steps of these kinds."""
    ages, full = [0.0] * len(kinds), []
    for i in reversed(range(len(kinds))):
        if kinds[i] == "full":
            full.append(i)
        elif len(full) > 1:
            ages[i] = (full[-1] - i) / (full[-2] - full[-1])
    return ages


def _segments(depth: int, skip: tuple[int, ...]) -> list[Segment]:
    """Blocks 0..depth-1 in their order: neighbours that are skipped together, others alone."""
    segments: list[Segment] = []
    for b in range(depth):
        if b in skip and segments and segments[-1][0]:
            segments[-1][1].append(b)
        else:
            segments.append((b in skip, [b]))
    return segments
