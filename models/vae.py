"""KL-16, MAR's tokenizer: a convolutional variational autoencoder between pixels and latents.

`encode` turns an image in [-1, 1] into one Gaussian per latent value, 16x16 pixels to one latent
position; `decode` inverts it. Architecture: Rombach et al., "High-Resolution Image Synthesis
with Latent Diffusion Models" (CVPR 2022), section 3.1; parameter names are those of its weights.
"""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.weights import load_into

NORM_GROUPS = 32
NORM_EPS = 1e-6
DECODER_EXTRA_BLOCKS = 1  # latent diffusion: the decoder has one residual block more per level
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # latent diffusion's bounds: the deviation stays finite


class DiagonalGaussianDistribution:
    """Independent Gaussians, one per latent value.

    `parameters` is (B, 2C, h, w): means first, then log variances, which are clamped to [-30, 20].
    `mean`, `logvar`, `std` and `var` are (B, C, h, w).
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(
        self, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """One draw, (B, C, h, w), by `noise` of that shape, or by a generator on any device."""
        if noise is None:
            device = self.mean.device if generator is None else generator.device
            mean = self.mean
            noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The most likely latents, (B, C, h, w)."""
        return self.mean

    def kl(self) -> Tensor:
        """Divergence from the standard normal in nats per image, (B,)."""
        return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).flatten(1).sum(1)


def group_norm(channels: int, groups: int = NORM_GROUPS) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), (B, in, h, w) => (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = NORM_GROUPS) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Residual single-head self-attention over all positions, (B, C, h, w) => (B, C, h, w)."""

    def __init__(self, channels: int, groups: int = NORM_GROUPS) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            proj(h).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, h*w, C)
            for proj in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve height and width; the stride-2 window is padded at right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class MidBlock(nn.Module):
    """The lowest resolution of both halves: residual block, attention, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class DownLevel(nn.Module):
    """Residual blocks of one resolution, with attention if asked; halved unless it is the last."""

    def __init__(
        self, in_channels: int, out_channels: int, num_res_blocks: int, attention: bool, last: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_res_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(
            AttnBlock(out_channels) if attention else nn.Identity() for _ in self.block
        )
        self.downsample = nn.Identity() if last else Downsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))
        return self.downsample(x)


class UpLevel(nn.Module):
    """Residual blocks of one resolution; doubled unless it is the full one."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, full: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))
        self.upsample = nn.Identity() if full else Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(x)


class Encoder(nn.Module):
    """Image to moments, (B, 3, H, W) => (B, 2*z, H/f, W/f), f = 2^(levels-1).

    attention: in the blocks of the last level. variational=False: latents of z channels.
    """

    def __init__(
        self,
        ch: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        z_channels: int,
        attention: bool = True,
        variational: bool = True,
    ) -> None:
        super().__init__()
        widths = [ch] + [ch * m for m in ch_mult]
        last = len(ch_mult) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(widths[i], widths[i + 1], num_res_blocks, attention and i == last, i == last)
            for i in range(len(ch_mult))
        )
        self.mid = MidBlock(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], (1 + variational) * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents to image, (B, z, h, w) => (B, 3, h*f, w*f). Level 0 is the full resolution."""

    def __init__(
        self, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, z_channels: int
    ) -> None:
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = MidBlock(widths[-1])
        num_blocks = num_res_blocks + DECODER_EXTRA_BLOCKS
        below = widths[1:] + widths[-1:]  # the width that arrives from the next lower resolution
        self.up = nn.ModuleList(
            UpLevel(below[i], widths[i], num_blocks, full=i == 0) for i in range(len(widths))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """The tokenizer: `encode` images in [-1, 1] to Gaussians over latents, `decode` them to images.

    MAR's KL-16 is `AutoencoderKL(embed_dim=16, ch_mult=(1, 1, 2, 2, 4), ckpt_path=...)`: 66.5M
    parameters in 312 tensors, stride 2^(len(ch_mult)-1) = 16.

    embed_dim: latent channels. ch, ch_mult: width of each resolution is ch * ch_mult[level], a
    multiple of 32. z_channels: width inside the 1x1 quantization convolutions (None: embed_dim).
    use_variational=False: quant_conv gives means only, and the log variance is its lower bound.

    Raises ValueError if a width is not a multiple of 32, or if the weights do not fit;
    FileNotFoundError if ckpt_path does not exist.
    """

    def __init__(
        self,
        embed_dim: int,
        ch_mult: tuple[int, ...],
        use_variational: bool = True,
        ckpt_path: str | Path | None = None,
        *,
        ch: int = 128,
        num_res_blocks: int = 2,
        z_channels: int | None = None,
    ) -> None:
        super().__init__()
        ch_mult = tuple(ch_mult)
        for width in (ch, *(ch * m for m in ch_mult)):
            if width <= 0 or width % NORM_GROUPS:
                raise ValueError(
                    f"AutoencoderKL normalizes in {NORM_GROUPS} groups, so every width must be a "
                    f"multiple of {NORM_GROUPS}: ch={ch} with ch_mult={ch_mult} gives {width}."
                )
        z_channels = embed_dim if z_channels is None else z_channels
        self.embed_dim = embed_dim
        self.stride = 2 ** (len(ch_mult) - 1)
        self.use_variational = use_variational
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, z_channels)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, (1 + use_variational) * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        if ckpt_path is not None:
            if not Path(ckpt_path).is_file():
                raise FileNotFoundError(
                    f"Tokenizer weights {ckpt_path} not found: fetch them with "
                    "`python -m util.download vae`."
                )
            # latent diffusion keeps its discriminator and perceptual network in the same file
            load_into(self, ckpt_path, use_ema=False, surplus=("loss.",))

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """(B, 3, H, W) in [-1, 1] => Gaussians over latents (B, embed_dim, H/f, W/f)."""
        moments = self.quant_conv(self.encoder(x))
        if not self.use_variational:
            moments = torch.cat([moments, torch.full_like(moments, LOGVAR_MIN)], dim=1)
        return DiagonalGaussianDistribution(moments)

    def decode(self, z: Tensor) -> Tensor:
        """(B, embed_dim, h, w), unscaled latents => images (B, 3, h*f, w*f), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def forward(
        self, x: Tensor, sample_posterior: bool = True
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruction (B, 3, H, W) from a draw or the mode of the posterior; the posterior."""
        posterior = self.encode(x)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior
