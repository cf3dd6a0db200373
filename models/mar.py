"""MAR: masked autoregressive image generation over continuous tokens (Li et al., NeurIPS 2024).

The transformer writes a condition z for every token that is not known yet, a diffusion head samples
each token given its z. Generation decodes the tokens in a random order, several per step.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import truncnorm
from torch import Tensor

from models.diffloss import DiffLoss
from models.head_config import HeadConfig
from models.lazy_mar import LazyMARConfig
from models.mar_config import MARConfig
from models.noise import ImageNoise, TrainingNoise
from models.order import OrderConfig
from models.sampler import Sampler
from models.sampling_copy import sampling_dtype
from models.transformer import MaskedTransformer


def _transformer(width: int, encoder_depth: int, decoder_depth: int, heads: int) -> dict[str, Any]:
    """Encoder and decoder of the same width and heads."""
    return {
        "encoder_embed_dim": width,
        "encoder_depth": encoder_depth,
        "encoder_num_heads": heads,
        "decoder_embed_dim": width,
        "decoder_depth": decoder_depth,
        "decoder_num_heads": heads,
    }


class MAR(MaskedTransformer):
    """Trains with `forward(latents, labels)`, generates with `sample_tokens(...)`."""

    def __init__(self, **options: Any) -> None:
        """options: the fields of MARConfig by name. Raises ValueError for values that do not work."""
        config = MARConfig(**options)
        super().__init__(config)
        # MAR's code: mask ratio from a normal of mean 1 and standard deviation 0.25, cut to [min, 1]
        least = (config.mask_ratio_min - 1.0) / 0.25
        self.mask_ratio = truncnorm(least, 0, loc=1.0, scale=0.25)
        self.diffloss = DiffLoss(
            self.token_dim,
            config.decoder_embed_dim,
            config.diffloss_d,
            config.diffloss_w,
            config.num_sampling_steps,
            config.grad_checkpointing,
        )

    def training_noise(self, bsz: int, seed: int | None = None) -> TrainingNoise:
        """Draw what a training step of `bsz` images needs, from torch's generator without a seed."""
        device, length = self.fake_latent.device, self.seq_len
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        ratio = float(self.mask_ratio.ppf(random.Random(seed).random()))
        masked = min(length, max(1, math.ceil(length * ratio)))
        known = length - masked
        stop = known + max(1, round(masked * self.config.masked_keep))
        chance = torch.Generator(device).manual_seed(seed)
        side = self.grid_size * self.patch_size
        draws = (bsz, self.config.diffusion_batch_mul, stop - known)
        levels = self.diffloss.train_diffusion.num_timesteps
        on: dict[str, Any] = {"generator": chance, "device": device}
        return TrainingNoise(
            known,
            stop,
            orders=torch.rand(bsz, length, **on).argsort(dim=1),
            dropped=torch.rand(bsz, **on) < self.config.label_drop_prob,
            latents=torch.randn(bsz, self.vae_embed_dim, side, side, **on),
            timesteps=torch.randint(levels, draws, **on),
            head=torch.randn(*draws, self.token_dim, **on),
        )

    def forward(
        self, latents: Tensor, labels: Tensor, noise: TrainingNoise | None = None
    ) -> Tensor:
        """Latents (B, C, H, W), labels (B,) int64 -> the scalar diffusion loss on masked tokens.

        noise: of these images, drawn by `training_noise` without it.
        """
        side = self.grid_size * self.patch_size
        if tuple(latents.shape[1:]) != (self.vae_embed_dim, side, side):
            raise ValueError(
                f"latents are {tuple(latents.shape)}; this model trains on "
                f"(B, {self.vae_embed_dim}, {side}, {side})"
            )
        noise = self.training_noise(len(latents)) if noise is None else noise
        known, order = noise.known, noise.orders[:, : noise.stop]
        embedding = self.class_embedding(labels, len(latents))
        embedding = torch.where(noise.dropped[:, None], self.fake_latent, embedding)
        tokens = self.patchify(latents)  # (B, L, c)
        tokens = tokens.gather(1, order[:, :, None].expand(-1, -1, self.token_dim))
        z = self.predict(tokens[:, :known], order, noise.stop, embedding)  # (B, n, D)
        target = tokens[:, known:]

        def each_level(x: Tensor) -> Tensor:  # (B, n, .) -> (B * m * n, .)
            return x[:, None].expand(-1, self.config.diffusion_batch_mul, -1, -1).flatten(0, 2)

        levels, head = noise.timesteps.flatten(), noise.head.flatten(0, 2)
        loss = self.diffloss(each_level(target), each_level(z), t=levels, noise=head)
        if self.config.aux_weight:
            read_out = F.linear(z, self.z_proj.weight.t())  # (B, n, c)
            loss = loss + self.config.aux_weight * F.mse_loss(read_out.float(), target)
        return loss

    def image_noise(self, seeds: Sequence[int]) -> ImageNoise:
        """The noise of one image per seed, shaped for this model and on its device."""
        steps = self.diffloss.num_sampling_steps
        return ImageNoise.from_seeds(
            seeds, self.seq_len, steps, self.token_dim, self.fake_latent.device
        )

    @torch.no_grad()
    def sample_tokens(
        self,
        bsz: int,
        num_iter: int = 64,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        labels: Tensor | Sequence[int] | None = None,
        temperature: float = 1.0,
        progress: bool = False,
        *,
        lazy_mar: LazyMARConfig | bool | None = None,
        noise: ImageNoise | None = None,
        head: HeadConfig | None = None,
        order: OrderConfig | str | None = None,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
    ) -> Tensor:
        """Generate latents (bsz, C, H, W) of labels (bsz,), or of no class (None).

        num_iter steps; guidance cfg by cfg_schedule "linear" or "constant"; temperature scales the
        noise of the head. lazy_mar: None or False plain, True LazyMAR's defaults, or a
        LazyMARConfig. noise: the images' own randomness (None: seeds from torch's generator).
        head: steps, solver and guidance of the head; order: random, halton, gtr or an OrderConfig
        (None: MAR's). Editing: latents known (bsz, C, H, W) are kept where known_mask (bsz, g, g) bool,
        over the grid of tokens, is true; the others are generated, in as many of the num_iter steps as
        a whole image takes from there on.
        Raises ValueError for arguments that do not fit.
        """
        return Sampler(self, sampling_dtype(self)).sample_tokens(
            bsz, num_iter, cfg, cfg_schedule, labels, temperature, progress,
            lazy_mar=lazy_mar, noise=noise, head=head, order=order, known=known, known_mask=known_mask,
        )  # fmt: skip


def compile_for_training(model: MAR) -> None:
    """torch.compile blocks and head in place; names of weights stay. Before a DDP is put around it.

    Token counts change with every step's mask ratio, so shapes are compiled as variables.
    """
    for part in (*model.encoder_blocks, *model.decoder_blocks, model.diffloss.net):
        part.compile(dynamic=True)


# Widths and depths by name (MAR's code, models/mar.py), and all of the bundled model of 64x64 shapes.
SIZES: dict[str, dict[str, Any]] = {
    "mar_base": _transformer(768, 12, 12, 12),
    "mar_large": _transformer(1024, 16, 16, 16),
    "mar_huge": _transformer(1280, 20, 20, 16),
    "mar_tiny": _transformer(96, 4, 10, 3),
}
TINY: dict[str, Any] = {
    "img_size": 64,
    "vae_stride": 4,
    "vae_embed_dim": 8,
    "class_num": 10,
    "buffer_size": 8,
    "diffloss_d": 6,
    "diffloss_w": 192,
    "num_sampling_steps": "ddim100",  # starts at t=990: a small head is not accurate at t=999
}


def mar_base(**options: Any) -> MAR:
    """MAR-B: 207.9M parameters with diffloss_d=6, diffloss_w=1024."""
    return MAR(**{**SIZES["mar_base"], **options})


def mar_large(**options: Any) -> MAR:
    """MAR-L: 478.3M parameters with diffloss_d=8, diffloss_w=1280."""
    return MAR(**{**SIZES["mar_large"], **options})


def mar_huge(**options: Any) -> MAR:
    """MAR-H: 942.4M parameters with diffloss_d=12, diffloss_w=1536."""
    return MAR(**{**SIZES["mar_huge"], **options})


def mar_tiny(**options: Any) -> MAR:
    """The bundled model: TINY, unless overridden."""
    return MAR(**{**SIZES["mar_tiny"], **TINY, **options})
