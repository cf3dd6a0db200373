"""PlainDenoiser: denoising runs of the diffusion head, from z to tokens, every step in full."""

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.adaln_mlp import SimpleMLPAdaLN
from models.graphs import compiled
from models.head_config import DenoisingRun, Solver
from models.layers import linear_at
from models.sampling_copy import sampling_linear

# Rows per product of a modulation table: enough for the full rate, few enough to stay in cache.
ROWS_AHEAD, ROWS_AHEAD_CPU = 512, 64

Column = tuple[int, str]  # a block and one of its adaLN outputs; the final layer is block -1
ADALN_OUTPUTS = ("shift", "scale", "gate")  # order in the weights of a block
FINAL_COLUMNS: list[Column] = [(-1, "shift"), (-1, "scale")]


class Denoiser(Protocol):
    """Samples the tokens of a decoding step, given their z."""

    def __call__(self, z: Tensor, noise: Tensor, cfg: float | Tensor, temperature: float) -> Tensor:
        """z (n, D), or with guidance (2n, D); noise (n, N+1, C) of a run of N steps -> tokens (n, C)."""


class ModulationTable:
    """adaLN outputs of a denoising run, computed ahead of its steps; exact.

    They depend on z and on the step, not on x_t, so one matrix product covers many steps. Step by step, a
    small batch would read all these weights (60% of the head) every time.
    """

    def __init__(self, net: SimpleMLPAdaLN, times: Tensor, columns: Sequence[Column]) -> None:
        """times (T, w): embedded timesteps, for width and dtype. Columns read alone come first."""
        self.column = {column: place for place, column in enumerate(columns)}
        weights, biases = [], []
        for block, name in columns:
            layer = net.final_layer if block < 0 else net.res_blocks[block]
            linear = linear_at(layer.adaLN_modulation, 1)
            third = ADALN_OUTPUTS.index(name)
            rows = slice(third * times.shape[1], (third + 1) * times.shape[1])
            weights.append(linear.weight[rows])
            biases.append(linear.bias[rows] + (name == "scale"))  # 1 + scale
        self.linear = sampling_linear(torch.cat(weights), torch.cat(biases), times.dtype)

    def ahead(self, condition: Tensor, times: Tensor, count: int) -> Iterator[Tensor]:
        """The first `count` columns (r, count, w) at each of the steps times (S, w), one by one.

        condition (r, w).
        """
        rows, width = condition.shape
        most = ROWS_AHEAD_CPU if condition.device.type == "cpu" else ROWS_AHEAD
        chunk = max(1, most // rows)
        for some in times.split(chunk):
            embedding = F.silu(some[:, None] + condition)  # (k, r, w)
            outputs = self.linear(embedding, slice(0, count * width))
            yield from outputs.unflatten(2, (count, width))


class PlainDenoiser:
    """Every denoising step in full; holds what all runs of one sampling share."""

    def __init__(
        self, net: SimpleMLPAdaLN, runs: Sequence[DenoisingRun], compile: bool = False
    ) -> None:
        """net: that of a sampling copy, or any other; runs of different numbers of steps.

        compile: the network with torch.compile.
        """
        self.net = net
        self.runs = {run.num_steps: run for run in runs}
        # In the order of a run: neighbouring steps with or without guidance, and their times.
        self.phases: dict[int, list[tuple[bool, Tensor]]] = {}
        for run in runs:
            times = time_table(net, run.solver).flip(0)
            phases = [(g, len([*steps])) for g, steps in groupby(reversed(run.guided))]
            parts = times.split([count for _, count in phases])
            self.phases[run.num_steps] = [
                (guided, part) for (guided, _), part in zip(phases, parts, strict=True)
            ]
        columns = [(b, name) for b in range(len(net.res_blocks)) for name in ADALN_OUTPUTS]
        self.modulations = ModulationTable(net, times, columns + FINAL_COLUMNS)
        self._network = compiled(self._step) if compile else self._step

    @torch.no_grad()
    def __call__(self, z: Tensor, noise: Tensor, cfg: float | Tensor, temperature: float) -> Tensor:
        """z (n, D), or with guidance (2n, D); noise (n, N+1, C) of a run of N steps -> tokens (n, C)."""
        condition, steps = self.net.cond_embed(z), noise.shape[1] - 1
        count, n = len(self.modulations.column), len(noise)
        ahead = chain.from_iterable(
            self.modulations.ahead(condition if guided else condition[:n], times, count)
            for guided, times in self.phases[steps]
        )

        def model(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            return guide(self._network(x.contiguous(), next(ahead)).float(), len(x), cfg)[:2]

        return self.runs[steps].solver.sample(model, noise, temperature)

    def _step(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (n, C), modulation (r, columns, w) -> (r, 2C)."""
        hidden = self.net.embed_tokens(x, rows=modulation.shape[0])
        columns = modulation.unbind(1)
        for b, block in enumerate(self.net.res_blocks):
            shift, scale, gate = columns[3 * b : 3 * b + 3]
            hidden = torch.addcmul(hidden, gate, block.branch(hidden, shift, scale))
        return self.net.final_layer.output(hidden, *columns[-2:])


def time_table(net: SimpleMLPAdaLN, solver: Solver) -> Tensor:
    """Embedded timesteps (N, w) of a sampling run, row i for step i."""
    device = net.final_layer.linear.weight.device
    return net.time_embed(torch.tensor(solver.timestep_map, device=device))


def guide(output: Tensor, rows: int, cfg: float | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Classifier-free guidance of head outputs (2 rows, 2C); (rows, 2C) are left unguided.

    -> (epsilon (rows, C), variance fraction (rows, C) of the conditional branch, and the guidance
    residual eps_c - eps_u (rows, C), or None). eps = eps_u + cfg (eps_c - eps_u).
    """
    epsilon, fraction = output.chunk(2, dim=-1)
    if len(output) == rows:
        return epsilon, fraction, None
    conditional, unconditional = epsilon.chunk(2)
    residual = conditional - unconditional
    return unconditional + cfg * residual, fraction.chunk(2)[0], residual
