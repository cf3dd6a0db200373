"""VQ-16, LlamaGen's tokenizer: images to codes of a codebook and back (Esser et al., CVPR 2021).

A convolutional encoder and decoder around a codebook of K unit vectors: each latent becomes the
code nearest to its direction (Yu et al., arXiv 2110.04627). Keys of the state_dict are those of the
published file.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vae import (
    DECODER_EXTRA_BLOCKS,
    NORM_GROUPS,
    AttnBlock,
    Downsample,
    ResnetBlock,
    Upsample,
    group_norm,
)

USAGE_WINDOW = 65536  # LlamaGen's record of codes used in training; it has no part in the result


class Level(nn.Module):
    """Residual blocks of one resolution, attention behind each if asked, then maybe a resampling."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, attention: bool, groups: int
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.res = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels, groups) for _ in self.res if attention)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for resample in self.children():
            if isinstance(resample, Downsample | Upsample):
                x = resample(x)
        return x


def _mid(channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        ResnetBlock(channels, channels, groups),
        AttnBlock(channels, groups),
        ResnetBlock(channels, channels, groups),
    )


class Encoder(nn.Module):
    """Image to latents, (B, 3, H, W) => (B, z, H/f, W/f), f = 2^(levels - 1)."""

    def __init__(
        self, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, z_channels: int, groups: int
    ) -> None:
        super().__init__()
        widths = [ch] + [ch * m for m in ch_mult]
        last = len(ch_mult) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i in range(len(ch_mult)):
            level = Level(widths[i], widths[i + 1], num_res_blocks, i == last, groups)
            if i != last:
                level.downsample = Downsample(widths[i + 1])
            self.conv_blocks.append(level)
        self.mid = _mid(widths[-1], groups)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.conv_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents to image, (B, z, h, w) => (B, 3, h*f, w*f). Level 0 is the lowest resolution."""

    def __init__(
        self, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, z_channels: int, groups: int
    ) -> None:
        super().__init__()
        out = [ch * m for m in reversed(ch_mult)]
        last = len(ch_mult) - 1
        self.conv_in = nn.Conv2d(z_channels, out[0], 3, padding=1)
        self.mid = _mid(out[0], groups)
        self.conv_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip([out[0], *out[:-1]], out, strict=True)):
            blocks = num_res_blocks + DECODER_EXTRA_BLOCKS
            level = Level(before, width, blocks, i == 0, groups)
            if i != last:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(out[-1], groups)
        self.conv_out = nn.Conv2d(out[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in self.conv_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Codebook(nn.Module):
    """K vectors of C channels, normalized to unit length whenever they are used."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("codebook_used", torch.zeros(USAGE_WINDOW))
        self.embedding = nn.Embedding(size, channels)

    def vectors(self) -> Tensor:
        """Unit vectors (K, C)."""
        return F.normalize(self.embedding.weight, dim=-1)

    def nearest(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> codes (B, h, w) int64: on the unit sphere, the least distance."""
        directions = F.normalize(z.movedim(1, -1), dim=-1)
        return (directions @ self.vectors().T).argmax(dim=-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> unit latents (B, C, h, w)."""
        return self.vectors()[codes].movedim(-1, 1)


class VQModel(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] => codes (B, H/f, W/f) int64 => images, about [-1, 1].

    The defaults are VQ-16: 71.9M parameters, stride f = 2^(len(ch_mult) - 1) = 16.

    codebook_size, codebook_embed_dim: K and C. ch, ch_mult: width of each resolution is
    ch * ch_mult[level]. num_res_blocks: of each encoder level; the decoder has one more.
    z_channels: width around the codebook. norm_groups: groups of every normalization; a width that
    they do not divide is a ValueError.
    """

    def __init__(
        self,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        ch: int = 128,
        ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        norm_groups: int = NORM_GROUPS,
    ) -> None:
        super().__init__()
        for width in (ch, *(ch * m for m in ch_mult)):
            if width <= 0 or width % norm_groups:
                raise ValueError(
                    f"VQModel normalizes in {norm_groups} groups, so every width must be a "
                    f"multiple of {norm_groups}: ch={ch} with ch_mult={tuple(ch_mult)} gives {width}"
                )
        self.stride = 2 ** (len(ch_mult) - 1)
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, z_channels, norm_groups)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, z_channels, norm_groups)
        self.quantize = Codebook(codebook_size, codebook_embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_embed_dim, z_channels, 1)

    def latents(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) => latents (B, C, H/f, W/f) before the codebook."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] => codes (B, H/f, W/f) int64."""
        return self.quantize.nearest(self.latents(x))

    def decode_latents(self, z: Tensor) -> Tensor:
        """Unit latents (B, C, h, w) => images (B, 3, h*f, w*f)."""
        return self.decoder(self.post_quant_conv(z))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) int64 => images (B, 3, h*f, w*f), about [-1, 1]."""
        return self.decode_latents(self.quantize.lookup(codes))


def vq16() -> VQModel:
    """LlamaGen's tokenizer for class-conditional models, vq_ds16_c2i.pt."""
    return VQModel()


def vq_tiny() -> VQModel:
    """The bundled tokenizer of 64x64 shapes: 512 codes, stride 4."""
    # groups of four channels, as in the narrowest levels of VQ-16: groups of one would lose the colour
    return VQModel(512, 8, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=32, norm_groups=8)
