"""Sampler: many batches of images from one model, as fast as its device allows."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from models.decoding import Decoding
from models.graphs import compiled
from models.lazy_mar import LazyMARConfig
from models.noise import ImageNoise
from models.plan import DecodingPlan
from models.sampling_copy import sampling_copy


class Sampler:
    """Holds a copy of the model for sampling; MAR.sample_tokens makes one for a single batch.

    Make another one after the weights have changed: the copy shares some and holds others.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dtype: torch.dtype,
        *,
        compile: bool = False,
        graphs: bool = False,
    ) -> None:
        """model: a MAR; dtype: that of its matrix products (sums and norms keep the model's).

        compile: blocks and head with torch.compile. graphs (CUDA alone): from the second batch of a
        kind on, replay CUDA graphs; batches of another kind make their own.
        """
        if graphs and model.fake_latent.device.type != "cuda":
            raise ValueError(f"graphs need a model on CUDA, not on {model.fake_latent.device}")
        self.model = sampling_copy(model, dtype, whole=model.diffloss, pack=not compile)
        self.device = model.fake_latent.device
        self.compile, self.graphs = compile, graphs
        if compile:
            for block in (*self.model.encoder_blocks, *self.model.decoder_blocks):
                block.finish = compiled(block.finish)
        self._last: tuple[tuple, Decoding] | None = None  # (what it decodes, its Decoding)

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
        noise.check(bsz, model.seq_len, model.diffloss.num_sampling_steps, model.token_dim)
        if labels is not None:
            labels = torch.as_tensor(labels)
            if labels.shape != (bsz,):
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)}; this batch needs ({bsz},)"
                )
            labels = labels.tolist()
        what = (bsz, plan, LazyMARConfig.of(lazy_mar), temperature)
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device, torch.autocast(self.device.type, enabled=False):
            if self._last is None or self._last[0] != what:
                self._last = None  # free its memory first
                self._last = what, Decoding(model, *what, self.compile, self.graphs)
            tokens = self._last[1](labels, noise.to(self.device), progress)
        return model.unpatchify(tokens)
