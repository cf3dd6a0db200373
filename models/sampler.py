"""Sampler: MAR's decoding loop, plain or with LazyMAR, on a copy of the model made for it.

The loop knows a predictor, which writes z for the tokens of a step, and a denoiser, which samples
those tokens given z. Every count comes from the DecodingPlan: nothing waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from models.denoiser import PlainDenoiser
from models.lazy_head import LazyDenoiser
from models.lazy_mar import LazyMARConfig
from models.lazy_predictor import LazyPredictor
from models.noise import ImageNoise
from models.plan import DecodingPlan
from models.predictor import PlainPredictor
from models.sampling_copy import sampling_copy


class Sampler:
    """Samples many batches with one copy of the model; MAR.sample_tokens makes one for one batch.

    The weights are those of the moment it was made.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        """model: a MAR; dtype: that of its matrix products (sums and norms keep the model's)."""
        self.model = sampling_copy(model, dtype, whole=model.diffloss)
        self.device = model.fake_latent.device
        self.net = self.model.diffloss.net
        self.diffusion = model.diffloss.gen_diffusion

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
        """MAR.sample_tokens: latents (bsz, C, H, W). Raises ValueError for what does not fit."""
        model = self.model
        if bsz < 1:
            raise ValueError(f"bsz is {bsz}; at least one image can be sampled")
        plan = DecodingPlan.create(model.seq_len, num_iter, cfg, cfg_schedule)
        model.check_labels(labels)
        if noise is None:
            noise = model.image_noise(torch.randint(0, 2**32, (bsz,)).tolist())
        noise.check(bsz, model.seq_len, self.diffusion.num_timesteps, model.token_dim)
        noise = noise.to(self.device)
        config = LazyMARConfig.of(lazy_mar)
        with torch.autocast(self.device.type, enabled=False):
            tokens = self._decode(plan, labels, temperature, progress, config, noise)
        return model.unpatchify(tokens)

    def _decode(
        self,
        plan: DecodingPlan,
        labels: Tensor | Sequence[int] | None,
        temperature: float,
        progress: bool,
        config: LazyMARConfig | None,
        noise: ImageNoise,
    ) -> Tensor:
        """Tokens (B, L, c) in raster order."""
        model, bsz = self.model, len(noise.orders)
        order = noise.orders.flip(1)  # decoding order: the front of `orders` comes last
        embedding = model.class_embedding(labels, bsz)
        if plan.guided:  # conditional rows, then unconditional ones
            embedding = torch.cat([embedding, model.class_embedding(None, bsz)])
        predictor = PlainPredictor(model, order, embedding)
        if config is not None:
            predictor = LazyPredictor(model, order, embedding, plan, config)
        denoiser = PlainDenoiser(self.net, self.diffusion)
        if config is not None and config.head_cache:
            denoiser = LazyDenoiser(self.net, self.diffusion, config)

        tokens = torch.zeros(bsz, model.seq_len, model.token_dim, device=self.device)
        for step in tqdm(plan.steps, disable=not progress, leave=False):
            z = predictor(step, tokens)  # (branches * B, n, D)
            now = order[:, step.start : step.stop, None, None].expand(-1, -1, *noise.head.shape[2:])
            step_noise = noise.head.gather(1, now).flatten(0, 1)  # (B * n, T+1, c)
            if step.cfg == 1.0:
                z = z[:bsz]
            sampled = denoiser(z.flatten(0, 1), step_noise, step.cfg, temperature)
            tokens[:, step.start : step.stop] = sampled.unflatten(0, (bsz, -1))
        in_raster = torch.empty_like(tokens)
        return in_raster.scatter_(1, order[:, :, None].expand_as(tokens), tokens)
