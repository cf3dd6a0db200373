"""DeTok, l-DeTok's tokenizer: two plain vision transformers between pixels and latents.

Yang et al., "Latent Denoising Makes Good Visual Tokenizers" (arXiv 2507.15856). One token per patch
of 16x16 pixels, a Gaussian per latent value. Raw latent channels differ in mean and deviation, so the
tokenizer applies the channel statistics of its training images: all latents outside it are normalized.
Parameter names are those of the published weights.
"""

import math
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Attention
from models.vae import LOGVAR_MAX, LOGVAR_MIN, DiagonalGaussianDistribution

COLOURS = 3
NORM_EPS = 1e-6
HIDDEN_RATIO = 2 / 3 * 4  # SwiGLU: two thirds of the usual factor of 4, as it has three matrices
ROPE_MAX, ROPE_RANGE = 7.0, 1e-4  # l-DeTok's code: waves per image, from 7 down to 7e-4


class TransformerSize(TypedDict):
    """Size of an encoder or decoder."""

    width: int
    layers: int
    heads: int


BASE = TransformerSize(width=768, layers=12, heads=12)  # encoder and decoder of DeTok-BB
HEADS = {512: 8, 768: 12, 1024: 16, 1152: 16}  # by width, of l-DeTok's sizes S, B, L and XL


def rope_table(grid_size: int, head_dim: int) -> Tensor:
    """(L, 2 d) float32: cosines, then sines of the angles of each channel at each of L positions.

    With n = d / 4 frequencies f, channels [0, 2n) hold row * f twice, [2n, 4n) column * f twice; rows
    and columns run from 0 to 1.
    """
    count = head_dim // 4
    exponents = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
    frequencies = 2 * math.pi * ROPE_MAX * ROPE_RANGE**exponents
    angles = torch.linspace(0, 1, grid_size, dtype=torch.float64)[:, None] * frequencies  # (g, n)
    rows = angles[:, None].expand(-1, grid_size, -1)
    columns = angles[None].expand(grid_size, -1, -1)
    table = torch.cat([rows, rows, columns, columns], dim=2).flatten(0, 1)  # (L, d)
    return torch.cat([table.cos(), table.sin()], dim=1).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Queries or keys (B, H, L, d) times the factors of `rope_table`.

    Pairs are neighbours (2j, 2j + 1) while the frequencies are in blocks, so the channels of a pair have
    different angles. That is not a rotation, but the weights were trained with it.
    """
    cosines, sines = rope.chunk(2, dim=1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x * cosines + swapped * sines).to(x.dtype)


class SwiGLU(nn.Module):
    """w3(silu(a) * b), where a and b are the halves of w12(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(HIDDEN_RATIO * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class RotaryBlock(nn.Module):
    """x + attention(norm1(x)) with rotary factors, then x + mlp(norm2(x)); (B, L, D) => (B, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=NORM_EPS)
        self.norm2 = nn.RMSNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        h = self.norm1(x)
        k, v = self.attn.keys_values(h)
        x = x + self.attn.attend(rotate(self.attn.queries(h), rope), rotate(k, rope), v)
        return x + self.mlp(self.norm2(x))


class RotaryTransformer(nn.Module):
    """Position table, blocks and the norms around them, which encoder and decoder share."""

    rope_tensor: Tensor

    def __init__(self, grid_size: int, size: TransformerSize) -> None:
        super().__init__()
        width, heads = size["width"], size["heads"]
        if width % (4 * heads):
            raise ValueError(
                f"the rotary factors need heads of 4 n channels: width {width} with {heads} heads "
                f"gives {width / heads:g}"
            )
        self.size = size
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(1, grid_size**2, width))
        self.register_buffer("rope_tensor", rope_table(grid_size, width // heads), persistent=False)

    def add_blocks(self) -> None:
        """Register the blocks, behind the layer before them: averages may be stored in this order."""
        width, heads = self.size["width"], self.size["heads"]
        self.ln_pre = nn.RMSNorm(width, eps=NORM_EPS)
        layers = range(self.size["layers"])
        self.transformer = nn.ModuleList(RotaryBlock(width, heads) for _ in layers)
        self.ln_post = nn.RMSNorm(width, eps=NORM_EPS)

    def run_blocks(self, x: Tensor) -> Tensor:
        """Tokens in raster order (B, L, D) => (B, L, D)."""
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer:
            x = block(x, self.rope_tensor)
        return self.ln_post(x)


class Encoder(RotaryTransformer):
    """Image to raw moments, (B, 3, H, W) => (B, 2C, H/p, W/p)."""

    def __init__(self, grid_size: int, patch: int, channels: int, size: TransformerSize) -> None:
        super().__init__(grid_size, size)
        width = size["width"]
        self.patch_embed = nn.Sequential(nn.Conv2d(COLOURS, width, patch, patch))
        self.add_blocks()
        self.latent_head = nn.Linear(width, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)  # (B, D, h, w)
        moments = self.latent_head(self.run_blocks(x.flatten(2).transpose(1, 2)))  # (B, L, 2C)
        return moments.transpose(1, 2).unflatten(2, x.shape[2:])


class Decoder(RotaryTransformer):
    """Raw latents to image, (B, C, h, w) => (B, 3, h*p, w*p)."""

    def __init__(self, grid_size: int, patch: int, channels: int, size: TransformerSize) -> None:
        super().__init__(grid_size, size)
        self.patch_size = patch
        width = size["width"]
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))  # of the training only
        self.decoder_embed = nn.Linear(channels, width)
        self.add_blocks()
        self.ffn = nn.Sequential(nn.Identity(), nn.Conv2d(width, patch**2 * COLOURS, 1))
        self.conv_out = nn.Conv2d(COLOURS, COLOURS, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.run_blocks(self.decoder_embed(z.flatten(2).transpose(1, 2)))  # (B, L, D)
        x = self.ffn(x.transpose(1, 2).unflatten(2, z.shape[2:]))  # (B, p p 3, h, w)
        x = x.unflatten(1, (self.patch_size, self.patch_size, COLOURS))
        x = x.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)  # (B, 3, h, p, w, p) => pixels
        return self.conv_out(x)


class DeTok(nn.Module):
    """The tokenizer: `encode` images in [-1, 1] to Gaussians over latents, `decode` them to images.

    The defaults are DeTok-BB: 171.7M parameters in 257 tensors, stride 16. Both calls need
    `set_statistics` first: without it a model trained on normalized latents gets nonsense.

    img_size: pixels on a side of all images. patch_size: the stride. token_channels: of a latent.
    Raises ValueError if img_size is not a multiple of patch_size, or a head's width not a multiple of 4.
    """

    latent_scale = 1.0  # of normalized latents
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        img_size: int = 256,
        patch_size: int = 16,
        token_channels: int = 16,
        encoder: TransformerSize = BASE,
        decoder: TransformerSize = BASE,
    ) -> None:
        super().__init__()
        if img_size < patch_size or img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        self.img_size = img_size
        self.stride = patch_size
        self.embed_dim = token_channels
        grid_size = img_size // patch_size
        self.encoder = Encoder(grid_size, patch_size, token_channels, encoder)
        self.decoder = Decoder(grid_size, patch_size, token_channels, decoder)
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("std", None, persistent=False)

    def set_statistics(self, mean: Tensor | float, std: Tensor | float) -> None:
        """Mean and standard deviation of raw latents: per channel, (C,), or one for all of them."""
        device = self.decoder.mask_token.device
        values = []
        for name, value in (("mean", mean), ("std", std)):
            value = torch.as_tensor(value, dtype=torch.float32, device=device)
            if value.shape not in ((), (self.embed_dim,)):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; this tokenizer has "
                    f"({self.embed_dim},) latent channels"
                )
            if not value.isfinite().all() or (name == "std" and (value <= 0).any()):
                raise ValueError(f"{name} must be finite, and std positive")
            values.append(value.expand(self.embed_dim).clone()[:, None, None])  # (C, 1, 1)
        self.mean, self.std = values

    def _statistics(self) -> tuple[Tensor, Tensor]:
        if self.mean is None or self.std is None:
            raise ValueError(
                "DeTok needs the statistics of its latents: call set_statistics(mean, std) first"
            )
        return self.mean, self.std

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """(B, 3, H, W) in [-1, 1] => Gaussians over normalized latents (B, C, H/p, W/p)."""
        mean, std = self._statistics()
        if tuple(x.shape[1:]) != (COLOURS, self.img_size, self.img_size):
            raise ValueError(
                f"images are {tuple(x.shape)}; this tokenizer takes "
                f"(B, 3, {self.img_size}, {self.img_size})"
            )
        raw_mean, raw_logvar = self.encoder(x).chunk(2, dim=1)
        logvar = raw_logvar.clamp(LOGVAR_MIN, LOGVAR_MAX) - 2 * std.log()
        return DiagonalGaussianDistribution(torch.cat([(raw_mean - mean) / std, logvar], dim=1))

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w), normalized latents => images (B, 3, h*p, w*p), about [-1, 1]."""
        mean, std = self._statistics()
        side = self.img_size // self.stride
        if tuple(z.shape[1:]) != (self.embed_dim, side, side):
            raise ValueError(
                f"latents are {tuple(z.shape)}; this tokenizer takes "
                f"(B, {self.embed_dim}, {side}, {side})"
            )
        return self.decoder(z * std + mean)
