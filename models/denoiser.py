"""PlainDenoiser: denoising runs of the diffusion head, from z to tokens, every step in full."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion
from models.adaln_mlp import SimpleMLPAdaLN
from models.graphs import compiled
from models.sampling_copy import sampling_linear

# Rows per product of a modulation table: enough for the full rate, few enough to stay in cache.
ROWS_AHEAD, ROWS_AHEAD_CPU = 512, 64

Column = tuple[int, str]  # a block and one of its adaLN outputs; the final layer is block -1
ADALN_OUTPUTS = ("shift", "scale", "gate")  # as they lie in the weights of a block
FINAL_COLUMNS: list[Column] = [(-1, "shift"), (-1, "scale")]


class ModulationTable:
    """adaLN outputs of a denoising run, computed ahead of its steps.

    They depend on z and on the step, not on x_t, so one product serves many steps; step by step, a
    few rows would read all these weights (60% of the head) at every step. Exact.
    """

    def __init__(self, net: SimpleMLPAdaLN, times: Tensor, columns: Sequence[Column]) -> None:
        """times (T, w): embedded timesteps, for width and dtype. Columns read alone come first."""
        self.times = times
        self.column = {column: place for place, column in enumerate(columns)}
        weights, biases = [], []
        for block, name in columns:
            layer = net.final_layer if block < 0 else net.res_blocks[block]
            linear = layer.adaLN_modulation[1]
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
        self, net: SimpleMLPAdaLN, diffusion: GaussianDiffusion, compile: bool = False
    ) -> None:
        """net: that of a sampling copy, or any other; compile: the network with torch.compile."""
        self.net = net
        self.diffusion = diffusion
        times = time_table(net, diffusion)
        self.times = times.flip(0)  # in the order of a run
        columns = [(b, name) for b in range(len(net.res_blocks)) for name in ADALN_OUTPUTS]
        self.modulations = ModulationTable(net, times, columns + FINAL_COLUMNS)
        self._network = compiled(self._step) if compile else self._step

    @torch.no_grad()
    def __call__(self, z: Tensor, noise: Tensor, cfg: float | Tensor, temperature: float) -> Tensor:
        """z (n, D), or with guidance (2n, D); noise (n, T+1, C) -> tokens (n, C)."""
        condition = self.net.cond_embed(z)
        ahead = self.modulations.ahead(condition, self.times, len(self.modulations.column))

        def model(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            return guide(self._network(x.contiguous(), next(ahead)).float(), len(x), cfg)[:2]

        return self.diffusion.sample(model, noise, temperature)

    def _step(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (n, C), modulation (r, columns, w) -> (r, 2C)."""
        hidden = self.net.embed_tokens(x, rows=modulation.shape[0])
        columns = modulation.unbind(1)
        for b, block in enumerate(self.net.res_blocks):
            shift, scale, gate = columns[3 * b : 3 * b + 3]
            hidden = torch.addcmul(hidden, gate, block.branch(hidden, shift, scale))
        return self.net.final_layer.output(hidden, *columns[-2:])


def time_table(net: SimpleMLPAdaLN, diffusion: GaussianDiffusion) -> Tensor:
    """Embedded timesteps (T, w) of a sampling run, row i for step i."""
    device = net.final_layer.linear.weight.device
    return net.time_embed(torch.tensor(diffusion.timestep_map, device=device))


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
