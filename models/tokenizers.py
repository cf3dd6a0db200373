"""Tokenizers by name: the autoencoders between images and latents."""

import math
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from models.detok import HEADS, DeTok, TransformerSize
from models.linear_tokenizer import LinearTokenizer
from models.vae import AutoencoderKL, DiagonalGaussianDistribution
from util.data.latent_stats import read_statistics
from util.weights import check_weights, load_state_dict_file


class Tokenizer(Protocol):
    """Images (B, 3, H, W) in [-1, 1] <=> latents (B, C, H / stride, W / stride)."""

    stride: int

    def encode(self, images: Tensor, /) -> DiagonalGaussianDistribution:
        """Images -> the posterior of their latents."""

    def decode(self, latents: Tensor, /) -> Tensor:
        """Latents -> images, about [-1, 1]."""

    def to(self, *args: Any, **kwargs: Any) -> "Tokenizer":
        """As torch.nn.Module.to."""


def load_tokenizer(
    kind: str, path: str | Path, embed_dim: int, stats_path: str | Path | None = None
) -> Tokenizer:
    """Frozen tokenizer on the CPU, in evaluation mode.

    Args:
        kind: "kl16" (AutoencoderKL of latent diffusion, stride 16), "linear" (LinearTokenizer) or
            "detok" (l-DeTok's).
        path: file of its weights.
        embed_dim: channels of its latents.
        stats_path: file of the latents' statistics, which detok needs.

    Raises:
        FileNotFoundError: no file. ValueError: unknown kind, or a file that does not fit.
    """
    tokenizer: AutoencoderKL | DeTok | LinearTokenizer
    if kind == "linear":
        tokenizer = LinearTokenizer.from_file(path)
        channels = tokenizer.channels
    elif kind == "kl16":
        tokenizer = AutoencoderKL(embed_dim, ch_mult=(1, 1, 2, 2, 4), ckpt_path=path)
        channels = embed_dim
    elif kind == "detok":
        if stats_path is None:
            raise ValueError("the tokenizer detok needs the statistics of its latents (stats_path)")
        tokenizer = load_detok(path, stats_path)
        channels = tokenizer.embed_dim
    else:
        raise ValueError(f"tokenizer '{kind}' is unknown; use kl16, linear or detok")
    if channels != embed_dim:
        raise ValueError(f"{path} has latents of {channels} channels, not of {embed_dim}")
    return tokenizer.eval().requires_grad_(False)


def load_detok(
    path: str | Path, stats_path: str | Path, heads: tuple[int, int] | None = None
) -> DeTok:
    """l-DeTok's tokenizer with the statistics of its latents, on the CPU; its file states its size.

    Args:
        path: weights in any layout that util.weights reads; averages are taken where there are some.
        stats_path: mean and std, written by `python -m util.checkpoint convert stats.pkl FILE`.
        heads: of encoder and decoder; without it those of l-DeTok's sizes of the same width.

    Raises:
        FileNotFoundError: no weights. ValueError: no statistics or those of another number of
            channels, a damaged or foreign file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} not found: fetch l-DeTok's with `python -m util.download detok_tokenizer`"
        )
    with torch.device("meta"):
        released = DeTok()  # names averages that are stored as a list
    # their training keeps the networks of its loss in the same file
    weights = load_state_dict_file(path, use_ema=None, like=released, surplus=("loss.",))
    try:
        tokenizer = _detok_of(weights, heads)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is not a file of l-DeTok's tokenizer: {error}") from error
    check_weights(tokenizer, weights, path)
    tokenizer.load_state_dict(weights)
    mean, std = read_statistics(stats_path)
    if len(mean) != tokenizer.embed_dim:
        raise ValueError(
            f"{stats_path} has statistics of {len(mean)} channels, but the latents of {path} have "
            f"{tokenizer.embed_dim}: convert those of this tokenizer"
        )
    tokenizer.set_statistics(mean, std)
    return tokenizer


def _detok_of(weights: dict[str, Tensor], heads: tuple[int, int] | None) -> DeTok:
    """A tokenizer of the size that the shapes of its weights state, with fresh weights."""
    sizes = []
    for i, part in enumerate(("encoder", "decoder")):
        length, width = weights[f"{part}.positional_embedding"].shape[1:]
        if heads is None and width not in HEADS:
            known = ", ".join(map(str, HEADS))
            raise ValueError(f"{part} has width {width}; l-DeTok's widths are {known}")
        layers = {name.split(".")[2] for name in weights if name.startswith(f"{part}.transformer.")}
        count = HEADS[width] if heads is None else heads[i]
        sizes.append(TransformerSize(width=width, layers=len(layers), heads=count))
    patch_size = weights["encoder.patch_embed.0.weight"].shape[-1]
    channels = len(weights["encoder.latent_head.bias"]) // 2
    return DeTok(math.isqrt(length) * patch_size, patch_size, channels, *sizes)


def latent_scale_of(tokenizer: Tokenizer | None, stated: float | None) -> float:
    """Factor from its latents to the model's: the stated one, else the tokenizer's own."""
    if stated is not None:
        return stated
    scale = getattr(tokenizer, "latent_scale", None)
    if scale is None:
        raise ValueError("this tokenizer states no latent scale: give it with --latent_scale")
    return float(scale)
