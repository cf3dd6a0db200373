"""Models and real images of the measures that need both: latents that no training has seen."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import mar
from models.presets import PRESETS, ModelPreset
from models.tokenizers import latent_scale_of, load_tokenizer
from util import checkpoint
from util.data import CachedFolder
from util.errors import UserError
from util.shapes import ShapesDataset


@dataclass(frozen=True)
class RealImages:
    """Latents (N, C, H, W) on the model's scale, labels, and what they are of."""

    latents: Tensor
    labels: list[int]
    name: str


def real_images(
    model: mar.MAR, preset: ModelPreset, first: int, count: int, cached_path: Path | None
) -> RealImages:
    """Pictures first .. first + count - 1 of the shapes data set, or latents of main_cache.py.

    UserError: no tokenizer, or too few latents.
    """
    try:
        tokenizer = load_tokenizer(preset.tokenizer, preset.vae_path, preset.vae_embed_dim)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    scale = latent_scale_of(tokenizer, preset.latent_scale)
    if cached_path is None:
        pictures, labels = zip(*ShapesDataset(first, count), strict=True)
        parts = (torch.stack(pictures).float() / 127.5 - 1).split(100)
        latents = torch.cat([tokenizer.encode(part).mode() for part in parts])
        return RealImages(latents * scale, list(labels), f"shapes {first} .. {first + count - 1}")
    side = model.grid_size * model.patch_size
    folder = CachedFolder(cached_path, (2 * model.vae_embed_dim, side, side))
    if len(folder) < count:
        raise UserError(f"{cached_path} holds {len(folder)} latents, {count} are needed")
    spread = [folder[i * len(folder) // count, False] for i in range(count)]
    means = torch.stack([moments[: model.vae_embed_dim] for moments, _ in spread])
    return RealImages(means * scale, [label for _, label in spread], f"{count} of {cached_path}")


def load_model(name: str, resume: str | None) -> tuple[mar.MAR, str]:
    """The model of a preset with its averaged weights, and which these are."""
    preset = PRESETS[name]
    fields = ("img_size", "vae_stride", "vae_embed_dim", "patch_size", "class_num", "buffer_size")
    fields += ("diffloss_d", "diffloss_w", "num_sampling_steps")
    model = mar.__dict__[name](**{field: getattr(preset, field) for field in fields})
    path = resume or preset.resume
    checkpoint.load_into(model, path, use_ema=True)
    return model.eval().requires_grad_(False), checkpoint.describe(path, use_ema=True)
