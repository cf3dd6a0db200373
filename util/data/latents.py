"""Cached latents on disk: one npz per image, and a note of the tokenizer they were made with.

CACHED/CLASS/NAME.npz holds `moments` and `moments_flip` (2C, h, w); CACHED/tokenizer.json holds the
digest of the tokenizer's file, because a model trained on latents of another tokenizer draws noise.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util.data.npz import read_arrays
from util.errors import UserError
from util.files import atomic_path, read_json, sha256_of, write_json

NOTE = "tokenizer.json"
MOMENTS = ("moments", "moments_flip")  # names in the npz, as in the original


def write_moments(path: Path, moments: Tensor, moments_flip: Tensor) -> None:
    """One cached image, float32 (2C, h, w) each, written atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, moments=moments.numpy(), moments_flip=moments_flip.numpy())


def read_moments(
    path: str | Path, names: Sequence[str] = MOMENTS, shape: tuple[int, ...] | None = None
) -> list[Tensor]:
    """Moments (2C, h, w) float32 of one cached image and of its mirror image, or those of `names`.

    UserError for another kind of file, or moments that are not finite or of another `shape`.
    """
    remedy = "remove it, and main_cache.py writes it again"
    found = read_arrays(Path(path), names, "cached latent", remedy)
    if any(array.dtype.kind not in "fiu" for array in found.values()):
        raise UserError(f"{path} is not a cached latent (it holds no numbers): {remedy}")
    arrays = [found[name].astype(np.float32) for name in names]
    for array in arrays:
        if array.shape != (shape or arrays[0].shape):
            raise UserError(
                f"{path} holds moments {array.shape}, the model needs {shape or arrays[0].shape}: "
                f"check --img_size, --vae_stride and --vae_embed_dim, or {remedy}"
            )
        if not np.isfinite(array).all():
            raise UserError(f"{path} holds NaN or infinity: {remedy}")
    return [torch.from_numpy(array) for array in arrays]


def _describe(tokenizer_files: Sequence[str], img_size: int) -> dict[str, object]:
    return {"sha256": " ".join(map(sha256_of, tokenizer_files)), "img_size": img_size}


def write_note(cached_path: str | Path, tokenizer_files: Sequence[str], img_size: int) -> None:
    """Write into `cached_path` which tokenizer made its latents; UserError if another one did."""
    check_note(cached_path, tokenizer_files, img_size)
    note = Path(cached_path) / NOTE
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, _describe(tokenizer_files, img_size))


def check_note(cached_path: str | Path, tokenizer_files: Sequence[str], img_size: int) -> None:
    """UserError if the latents are of another tokenizer or image size.

    It passes if the cache has no note (the original writes none) or the tokenizer's file is missing.
    """
    note = Path(cached_path) / NOTE
    if not note.is_file() or not all(Path(file).is_file() for file in tokenizer_files):
        return
    remedy = "remove it if the latents are of this tokenizer, or run main_cache.py again"
    if read_json(note, dict, remedy) != _describe(tokenizer_files, img_size):
        raise UserError(
            f"{cached_path} holds latents of another tokenizer or image size than {tokenizer_files[0]} "
            f"at {img_size} pixels: write them again into an empty folder with main_cache.py"
        )
