"""Tokenizers by name: images to latents and back, whichever autoencoder a model was trained on."""

from pathlib import Path

from torch import nn

from models.linear_tokenizer import LinearTokenizer
from models.vae import AutoencoderKL


def load_tokenizer(kind: str, path: str | Path, embed_dim: int) -> nn.Module:
    """Frozen tokenizer with `encode` (posterior) and `decode`, on the CPU, in evaluation mode.

    Args:
        kind: "kl16" (AutoencoderKL of latent diffusion, stride 16) or "linear" (LinearTokenizer).
        path: file of its weights.
        embed_dim: channels of its latents.

    Raises:
        FileNotFoundError: no file. ValueError: unknown kind, or a file that does not fit.
    """
    if kind == "linear":
        tokenizer = LinearTokenizer.from_file(path)
        if tokenizer.channels != embed_dim:
            raise ValueError(
                f"{path} has latents of {tokenizer.channels} channels, not of {embed_dim}"
            )
    elif kind == "kl16":
        tokenizer = AutoencoderKL(embed_dim, ch_mult=(1, 1, 2, 2, 4), ckpt_path=path)
    else:
        raise ValueError(f"tokenizer '{kind}' is unknown; use kl16 or linear")
    return tokenizer.eval().requires_grad_(False)


def latent_scale_of(tokenizer: nn.Module, stated: float | None) -> float:
    """Factor from its latents to the model's: the stated one, else the tokenizer's own."""
    if stated is not None:
        return stated
    scale = getattr(tokenizer, "latent_scale", None)
    if scale is None:
        raise ValueError("this tokenizer states no latent scale: give it with --latent_scale")
    return float(scale)
