"""The network of the diffusion head: a small MLP with adaLN modulation (MAR, section 3)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import LAYER_NORM_EPS, ModuleList, linear_at


class TimestepEmbedder(nn.Module):
    """Sinusoids of a timestep (cosines first, maximum period 10000), then a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t (n,) -> (n, width)."""
        half = self.frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t[:, None].float() * torch.exp(-math.log(10000.0) * exponents)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(linear_at(self.mlp, 0).weight.dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x * scale + shift, where scale has its 1 added (Peebles & Xie 2023)."""
    return torch.addcmul(shift, x, scale)


class ResBlock(nn.Module):
    """x + gate * mlp(modulate(LN(x), shift, 1 + scale)); (shift, scale, gate) from the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (n, w); embedding (n, w), its SiLU already taken -> (n, w)."""
        shift, scale, gate = self.adaLN_modulation[1](embedding).chunk(3, dim=-1)
        return x + gate * self.branch(x, shift, 1 + scale)

    def branch(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """The MLP's output (n, w); scale has its 1 added."""
        return self.mlp(modulate(self.in_ln(x), shift, scale))


class FinalLayer(nn.Module):
    """LayerNorm without affine, modulation, Linear to (epsilon, variance fraction)."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=LAYER_NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (n, w); embedding (n, w), its SiLU already taken -> (n, 2C)."""
        shift, scale = self.adaLN_modulation[1](embedding).chunk(2, dim=-1)
        return self.output(x, shift, 1 + scale)

    def output(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x (n, w) -> (n, 2C); scale has its 1 added."""
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SimpleMLPAdaLN(nn.Module):
    """The noise predictor: (x_t (n, C), t (n,), c = z (n, D)) -> (n, 2C)."""

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        z_channels: int,
        num_res_blocks: int,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = grad_checkpointing
        self.time_embed = TimestepEmbedder(model_channels)
        self.cond_embed = nn.Linear(z_channels, model_channels)
        self.input_proj = nn.Linear(in_channels, model_channels)
        self.res_blocks: ModuleList[ResBlock] = ModuleList(
            ResBlock(model_channels) for _ in range(num_res_blocks)
        )
        self.final_layer = FinalLayer(model_channels, out_channels)
        self._initialize()

    def _initialize(self) -> None:
        """Xavier; time MLP normal 0.02; modulations and the output zero, so blocks start as identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for index in (0, 2):
            nn.init.normal_(linear_at(self.time_embed.mlp, index).weight, std=0.02)
        modulated = (*self.res_blocks, self.final_layer)
        zeroed = [linear_at(part.adaLN_modulation, 1) for part in modulated]
        for layer in (*zeroed, self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    def embed_tokens(self, x: Tensor, rows: int) -> Tensor:
        """x (n, C) -> (rows, w); with rows = 2n both guidance branches start from the same x."""
        hidden = self.input_proj(x.to(self.input_proj.weight.dtype))
        return hidden if rows == hidden.shape[0] else hidden.repeat(2, 1)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """x (n, C), t (n,), c (n, D) -> epsilon and variance fraction (n, 2C)."""
        embedding = F.silu(self.time_embed(t) + self.cond_embed(c))
        hidden = self.embed_tokens(x, rows=x.shape[0])
        for block in self.res_blocks:
            if self.grad_checkpointing and self.training:
                hidden = checkpoint(block, hidden, embedding, use_reentrant=False)
            else:
                hidden = block(hidden, embedding)
        return self.final_layer(hidden, embedding)
