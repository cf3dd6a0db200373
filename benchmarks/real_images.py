"""Models, and real images that no training has seen, for the measures that need both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.mar import MARHost
from models.vae import DiagonalGaussianDistribution
from util.data.datasets import CachedFolder, to_unit_range
from util.errors import UserError
from util.shapes import label_of, pictures


@dataclass(frozen=True)
class RealImages:
    """Latents (N, C, H, W) drawn as in training, on the model's scale; labels; what they are of."""

    latents: Tensor
    labels: list[int]
    name: str


@torch.no_grad()
def real_images(
    host: MARHost, tokenizer: Any, first: int, count: int, cached_path: Path | None
) -> RealImages:
    """Pictures first .. first + count - 1 of the shapes data set, or latents of main_cache.py.

    Image i draws its latents with seed i. UserError: too few latents.
    """
    scale = host.tokenizer.scale(tokenizer)
    if cached_path is None:
        device = next(tokenizer.parameters()).device
        indices = range(first, first + count)
        images = (to_unit_range(pictures(i, 1).to(device)) for i in indices)
        latents = [_draw(tokenizer.encode(image), i) for i, image in enumerate(images)]
        labels = [label_of(i) for i in indices]
        name = f"shapes {first} .. {first + count - 1}"
        return RealImages(torch.cat(latents) * scale, labels, name)
    channels, side = host.geometry.vae_embed_dim, host.geometry.latent_side
    folder = CachedFolder(cached_path, (2 * channels, side, side))
    if len(folder) < count:
        raise UserError(f"{cached_path} holds {len(folder)} latents, {count} are needed")
    spread = [folder[i * len(folder) // count, False] for i in range(count)]
    latents = [
        _draw(DiagonalGaussianDistribution(moments[None]), i)
        for i, (moments, _) in enumerate(spread)
    ]
    labels = [label for _, label in spread]
    return RealImages(torch.cat(latents) * scale, labels, f"{count} of {cached_path}")


def _draw(posterior: DiagonalGaussianDistribution, seed: int) -> Tensor:
    """Latents (1, C, H, W)."""
    return posterior.sample(generator=torch.Generator().manual_seed(seed))
