"""DiffLoss: the diffusion head that models p(token | z) of one continuous token (MAR, section 3).

A small MLP with adaLN modulation predicts the noise of a token given the decoder's output z.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion import create_diffusion
from models.layers import LAYER_NORM_EPS


class DiffLoss(nn.Module):
    """Loss and sampler of tokens (n, target_channels) given z (n, z_channels).

    depth and width are the flags diffloss_d and diffloss_w; num_sampling_steps respaces the
    1000 training steps for sampling ("100", "ddim50"; see diffusion.schedule.space_timesteps).
    """

    def __init__(
        self,
        target_channels: int,
        z_channels: int,
        depth: int,
        width: int,
        num_sampling_steps: str,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = target_channels
        self.net = SimpleMLPAdaLN(
            target_channels, width, 2 * target_channels, z_channels, depth, grad_checkpointing
        )
        self.train_diffusion = create_diffusion("")
        self.gen_diffusion = create_diffusion(num_sampling_steps)

    @property
    def num_sampling_steps(self) -> int:
        """Denoising steps per token."""
        return self.gen_diffusion.num_timesteps

    def forward(self, target: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean loss of target (n, C) given z (n, D), weighted by mask (n,) if there is one."""
        steps = self.train_diffusion.num_timesteps
        t = torch.randint(0, steps, (target.shape[0],), device=target.device)
        loss = self.train_diffusion.training_losses(self.net, target, t, {"c": z})["loss"]
        if mask is None:
            return loss.mean()
        return (loss * mask).sum() / mask.sum()

    def sample(
        self,
        z: Tensor,
        temperature: float = 1.0,
        cfg: float = 1.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Tokens (n, C) for z (n, D); with cfg != 1, z is (2n, D): conditional rows, then unconditional.

        noise (n, T+1, C) as in ImageNoise.head, drawn from torch's generator if None.
        """
        rows = z.shape[0] if cfg == 1.0 else z.shape[0] // 2
        if noise is None:
            shape = (rows, self.num_sampling_steps + 1, self.in_channels)
            noise = torch.randn(shape, device=z.device)
        return PlainDenoiser(self)(z, noise, cfg, temperature)


class PlainDenoiser:
    """Denoising runs of the head, every step in full; born with one call of sample_tokens.

    It holds the embeddings of all denoising steps, which depend on nothing else.
    """

    def __init__(self, head: DiffLoss) -> None:
        self.net = head.net
        self.diffusion = head.gen_diffusion
        self.times = time_table(head)

    @torch.no_grad()
    def __call__(self, z: Tensor, noise: Tensor, cfg: float, temperature: float) -> Tensor:
        """z (n, D), or (2n, D) if cfg != 1; noise (n, T+1, C) -> tokens (n, C)."""
        condition = self.net.cond_embed(z)

        def model(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            embedding = F.silu(self.times[i] + condition)
            hidden = self.net.embed_tokens(x, rows=z.shape[0])
            for block in self.net.res_blocks:
                hidden = block(hidden, embedding)
            return guide(self.net.final_layer(hidden, embedding).float(), cfg)[:2]

        return self.diffusion.sample(model, noise, temperature)


def time_table(head: DiffLoss) -> Tensor:
    """Embedded timesteps (T, width) of a sampling run, row i for step i."""
    device = head.net.input_proj.weight.device
    return head.net.time_embed(torch.tensor(head.gen_diffusion.timestep_map, device=device))


def guide(output: Tensor, cfg: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Classifier-free guidance of head outputs (n, 2C), or (2n, 2C) if cfg != 1.

    -> (epsilon (n, C), variance fraction (n, C) of the conditional branch, and the guidance residual
    eps_c - eps_u (n, C), or None). eps = eps_u + cfg (eps_c - eps_u).
    """
    epsilon, fraction = output.chunk(2, dim=-1)
    if cfg == 1.0:
        return epsilon, fraction, None
    conditional, unconditional = epsilon.chunk(2)
    residual = conditional - unconditional
    return unconditional + cfg * residual, fraction.chunk(2)[0], residual


class TimestepEmbedder(nn.Module):
    """Sinusoids of a timestep (cosines first, maximum period 10000), then a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.half = frequencies // 2
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t (n,) -> (n, width)."""
        exponents = torch.arange(self.half, dtype=torch.float32, device=t.device) / self.half
        angles = t[:, None].float() * torch.exp(-math.log(10000.0) * exponents)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x (1 + scale) + shift (Peebles & Xie 2023)."""
    return x * (1 + scale) + shift


class ResBlock(nn.Module):
    """x + gate * mlp(modulate(LN(x), shift, scale)); (shift, scale, gate) from the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (n, w); embedding (n, w), its SiLU already taken -> (n, w)."""
        out, gate = self.branch(x, embedding)
        return x + gate * out

    def branch(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The MLP's output and its gate, each (n, w)."""
        shift, scale, gate = self.adaLN_modulation[1](embedding).chunk(3, dim=-1)
        return self.mlp(modulate(self.in_ln(x), shift, scale)), gate

    def gate_parameters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight (w, w) and bias (w,) of the gate alone: the last third of the modulation."""
        linear = self.adaLN_modulation[1]
        return linear.weight.chunk(3)[2].to(dtype), linear.bias.chunk(3)[2].to(dtype)


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
        self.res_blocks = nn.ModuleList(ResBlock(model_channels) for _ in range(num_res_blocks))
        self.final_layer = FinalLayer(model_channels, out_channels)
        self._initialize()

    def _initialize(self) -> None:
        """Xavier; time MLP normal 0.02; modulations and the output zero, so blocks start as identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        zeroed = [block.adaLN_modulation[1] for block in self.res_blocks]
        for layer in (*zeroed, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
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
