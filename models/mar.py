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
from models.lazy_mar import LazyMARConfig
from models.noise import ImageNoise, TrainingNoise
from models.presets import PRESETS
from models.sampler import Sampler
from models.sampling_copy import sampling_dtype
from models.transformer import MaskedTransformer


class MAR(MaskedTransformer):
    """Trains with `forward(latents, labels)`, generates with `sample_tokens(...)`.

    L = (img_size / vae_stride / patch_size)^2 tokens of vae_embed_dim * patch_size^2 channels.
    Constructor names and defaults are those of the original. One is l-DeTok's, for training:
    no_dropout_in_mlp: proj_dropout in the attention alone.
    Three are ours, for short trainings of small models; their defaults change nothing:
    masked_keep: share of the masked tokens that a training step decodes (CrossMAE, Fu et al. 2024).
    pos_init: "sincos" starts the position tables as 2-D sines (MAE, He et al. 2022).
    aux_weight: weight of a squared error that asks z for the token itself, read out through the
        transposed z_proj, so that context is learned before the head makes use of it.
    """

    def __init__(
        self,
        img_size: int = 256,
        vae_stride: int = 16,
        patch_size: int = 1,
        encoder_embed_dim: int = 1024,
        encoder_depth: int = 16,
        encoder_num_heads: int = 16,
        decoder_embed_dim: int = 1024,
        decoder_depth: int = 16,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        vae_embed_dim: int = 16,
        mask_ratio_min: float = 0.7,
        label_drop_prob: float = 0.1,
        class_num: int = 1000,
        attn_dropout: float = 0.1,
        proj_dropout: float = 0.1,
        buffer_size: int = 64,
        diffloss_d: int = 3,
        diffloss_w: int = 1024,
        num_sampling_steps: str = "100",
        diffusion_batch_mul: int = 4,
        grad_checkpointing: bool = False,
        masked_keep: float = 1.0,
        pos_init: str = "normal",
        aux_weight: float = 0.0,
        no_dropout_in_mlp: bool = False,
    ) -> None:
        if not 0 <= mask_ratio_min < 1:
            raise ValueError(f"mask_ratio_min is {mask_ratio_min}; it must be in [0, 1)")
        if not 0 < masked_keep <= 1:
            raise ValueError(f"masked_keep is {masked_keep}; it must be in (0, 1]")
        if aux_weight and encoder_embed_dim != decoder_embed_dim:
            raise ValueError(
                f"aux_weight needs equal widths, not {encoder_embed_dim} and {decoder_embed_dim}"
            )
        super().__init__(
            img_size=img_size,
            vae_stride=vae_stride,
            patch_size=patch_size,
            encoder_embed_dim=encoder_embed_dim,
            encoder_depth=encoder_depth,
            encoder_num_heads=encoder_num_heads,
            decoder_embed_dim=decoder_embed_dim,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
            mlp_ratio=mlp_ratio,
            vae_embed_dim=vae_embed_dim,
            class_num=class_num,
            attn_dropout=attn_dropout,
            proj_dropout=proj_dropout,
            buffer_size=buffer_size,
            grad_checkpointing=grad_checkpointing,
            pos_init=pos_init,
            no_dropout_in_mlp=no_dropout_in_mlp,
        )
        self.label_drop_prob = label_drop_prob
        self.diffusion_batch_mul = diffusion_batch_mul
        self.masked_keep = masked_keep
        self.aux_weight = aux_weight
        # MAR's code: mask ratio from a normal of mean 1 and standard deviation 0.25, cut to [min, 1]
        self.mask_ratio = truncnorm((mask_ratio_min - 1.0) / 0.25, 0, loc=1.0, scale=0.25)
        self.diffloss = DiffLoss(
            self.token_dim,
            decoder_embed_dim,
            diffloss_d,
            diffloss_w,
            num_sampling_steps,
            grad_checkpointing,
        )

    def training_noise(self, bsz: int, seed: int | None = None) -> TrainingNoise:
        """Draw what a training step of `bsz` images needs, from torch's generator without a seed."""
        device, length = self.fake_latent.device, self.seq_len
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        ratio = float(self.mask_ratio.ppf(random.Random(seed).random()))
        masked = min(length, max(1, math.ceil(length * ratio)))
        known = length - masked
        stop = known + max(1, round(masked * self.masked_keep))
        chance = torch.Generator(device).manual_seed(seed)
        side = self.grid_size * self.patch_size
        draws = (bsz, self.diffusion_batch_mul, stop - known)
        levels = self.diffloss.train_diffusion.num_timesteps
        on = {"generator": chance, "device": device}
        return TrainingNoise(
            known,
            stop,
            orders=torch.rand(bsz, length, **on).argsort(dim=1),
            dropped=torch.rand(bsz, **on) < self.label_drop_prob,
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
            return x[:, None].expand(-1, self.diffusion_batch_mul, -1, -1).flatten(0, 2)

        levels, head = noise.timesteps.flatten(), noise.head.flatten(0, 2)
        loss = self.diffloss(each_level(target), each_level(z), t=levels, noise=head)
        if self.aux_weight:
            read_out = F.linear(z, self.z_proj.weight.t())  # (B, n, c)
            loss = loss + self.aux_weight * F.mse_loss(read_out.float(), target)
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
    ) -> Tensor:
        """Generate latents (bsz, C, H, W) of labels (bsz,), or of no class (None).

        num_iter steps; guidance cfg by cfg_schedule "linear" or "constant"; temperature scales the
        noise of the head. lazy_mar: None or False plain, True LazyMAR's defaults, or a
        LazyMARConfig. noise: the images' own randomness (None: seeds from torch's generator).
        Raises ValueError for arguments that do not fit.
        """
        return Sampler(self, sampling_dtype(self)).sample_tokens(
            bsz, num_iter, cfg, cfg_schedule, labels, temperature, progress,
            lazy_mar=lazy_mar, noise=noise,
        )  # fmt: skip


def compile_for_training(model: MAR) -> None:
    """torch.compile blocks and head in place; names of weights stay. Before a DDP is put around it.

    Token counts change with every step's mask ratio, so shapes are compiled as variables.
    """
    for part in (*model.encoder_blocks, *model.decoder_blocks, model.diffloss.net):
        part.compile(dynamic=True)


def mar_base(**kwargs: Any) -> MAR:
    """MAR-B: 207.9M parameters with diffloss_d=6, diffloss_w=1024."""
    return MAR(**_widths(768, 12, 12), **kwargs)


def mar_large(**kwargs: Any) -> MAR:
    """MAR-L: 478.3M parameters with diffloss_d=8, diffloss_w=1280."""
    return MAR(**_widths(1024, 16, 16), **kwargs)


def mar_huge(**kwargs: Any) -> MAR:
    """MAR-H: 942.4M parameters with diffloss_d=12, diffloss_w=1536."""
    return MAR(**_widths(1280, 20, 16), **kwargs)


def mar_tiny(**kwargs: Any) -> MAR:
    """The bundled model of 64x64 shapes: its geometry is PRESETS["mar_tiny"], unless overridden."""
    preset = PRESETS["mar_tiny"]
    geometry = {
        "img_size": preset.img_size,
        "vae_stride": preset.vae_stride,
        "vae_embed_dim": preset.vae_embed_dim,
        "patch_size": preset.patch_size,
        "class_num": preset.class_num,
        "buffer_size": preset.buffer_size,
        "diffloss_d": preset.diffloss_d,
        "diffloss_w": preset.diffloss_w,
        "num_sampling_steps": preset.num_sampling_steps,
    }
    return MAR(**{**_widths(96, 5, 3), "encoder_depth": 3, **geometry, **kwargs})


def _widths(dim: int, depth: int, heads: int) -> dict[str, int]:
    """Encoder and decoder of the same width, depth and heads (MAR's code, models/mar.py)."""
    return {
        "encoder_embed_dim": dim,
        "encoder_depth": depth,
        "encoder_num_heads": heads,
        "decoder_embed_dim": dim,
        "decoder_depth": depth,
        "decoder_num_heads": heads,
    }
