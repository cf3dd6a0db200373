"""Sampler: many batches of images from one model, as fast as its device allows."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.decoding import Decoding
from models.graphs import compiled
from models.head_config import HeadConfig
from models.lazy_mar import LazyMARConfig
from models.noise import ImageNoise
from models.order import OrderConfig
from models.plan import DecodingPlan
from models.sampling_copy import sampling_copy

if TYPE_CHECKING:
    from models.mar import MAR


class Sampler:
    """Holds a copy of the model for sampling; MAR.sample_tokens makes one for a single batch.

    Make a new one after the weights have changed: the copy shares only some of them.
    """

    def __init__(
        self, model: "MAR", dtype: torch.dtype, *, compile: bool = False, graphs: bool = False
    ) -> None:
        """dtype: that of its matrix products (sums and norms keep the model's).

        compile: blocks and head with torch.compile. graphs (CUDA only): replay CUDA graphs from the
        second batch of the same settings on.
        """
        if graphs and model.fake_latent.device.type != "cuda":
            raise ValueError(f"graphs need a model on CUDA, not on {model.fake_latent.device}")
        self.model = sampling_copy(model, dtype, whole=model.diffloss, pack=not compile)
        self.device = model.fake_latent.device
        self.compile, self.graphs = compile, graphs
        if compile:
            for block in (*self.model.encoder_blocks, *self.model.decoder_blocks):
                block.finish = compiled(block.finish)
        self._last: tuple[object, Decoding] | None = None  # (what it decodes, its Decoding)

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
        """MAR.sample_tokens: latents (bsz, C, H, W). Raises ValueError for what does not fit."""
        model, order = self.model, OrderConfig.from_argument(order)
        if bsz < 1:
            raise ValueError(f"bsz is {bsz}; at least one image can be sampled")
        if not isinstance(head, HeadConfig | None):
            raise ValueError(f"head is {head!r}; give a HeadConfig or None")
        start = 0.0 if head is None else head.guidance_start
        plans = partial(
            DecodingPlan.create, model.seq_len, num_iter, cfg, cfg_schedule,
            guidance_start=start, order=order,
        )  # fmt: skip
        plan = plans()
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
        noise = noise.to(self.device)
        settings = (LazyMARConfig.from_argument(lazy_mar), temperature, head)
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device, torch.autocast(self.device.type, enabled=False):
            if known is None and known_mask is None:
                if order.kind != "random":
                    noise = noise.arranged(order)
                tokens = self._decoding(bsz, plan, *settings)(labels, noise, progress)
                return model.unpatchify(tokens)
            tokens, mask = check_known(model, bsz, known, known_mask)
            noise = noise.arranged(order, mask)
            assert known_mask is not None  # on the caller's device, so nothing waits for ours
            for count, images in images_by_count(known_mask.flatten(1)).items():
                plan = plans(known=count)
                if plan.steps:
                    some = None if labels is None else [labels[i] for i in images]
                    decoding = self._decoding(len(images), plan, *settings)
                    tokens[images] = decoding(some, noise.select(images), progress, tokens[images])
        return model.unpatchify(tokens)

    def _decoding(
        self,
        bsz: int,
        plan: DecodingPlan,
        lazy_mar: LazyMARConfig | None,
        temperature: float,
        head: HeadConfig | None,
    ) -> Decoding:
        """A Decoding of these; that of the last call, if it is the same."""
        what = (bsz, plan, lazy_mar, temperature, head)
        if self._last is None or self._last[0] != what:
            self._last = None  # free its memory first
            decoding = Decoding(self.model, *what, compile=self.compile, graphs=self.graphs)
            self._last = what, decoding
        return self._last[1]


def check_known(
    model: "MAR", bsz: int, known: Tensor | None, known_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """known (B, C, H, W), known_mask (B, g, g) -> a copy as tokens (B, L, c), mask (B, L) bool.

    Raises ValueError for what does not fit.
    """
    grid, side = model.grid_size, model.grid_size * model.patch_size
    want = (bsz, model.vae_embed_dim, side, side), (bsz, grid, grid)
    if not (isinstance(known, Tensor) and isinstance(known_mask, Tensor)):
        raise ValueError("known and known_mask come together: give two tensors, or none")
    if (tuple(known.shape), tuple(known_mask.shape)) != want or known_mask.dtype != torch.bool:
        raise ValueError(
            f"known is {tuple(known.shape)} and known_mask {tuple(known_mask.shape)} "
            f"{known_mask.dtype}; this call needs {want[0]} and {want[1]} of torch.bool"
        )
    tokens, mask = model.patchify(known.to(torch.float32)).clone(), known_mask.flatten(1)
    # On the caller's device, so nothing waits for ours.
    if not tokens[mask.to(tokens.device)].isfinite().all():
        raise ValueError("known holds numbers that are not finite where known_mask is true")
    return tokens.to(model.fake_latent.device), mask.to(model.fake_latent.device)


def images_by_count(mask: Tensor) -> dict[int, list[int]]:
    """mask (B, L): number of known tokens -> the images that know as many."""
    images: dict[int, list[int]] = {}
    for i, count in enumerate(mask.sum(dim=1).tolist()):
        images.setdefault(count, []).append(i)
    return images
