"""The tokenizer of mar_tiny: principal components of patches, with an autoencoder's interface.

Encoding projects each patch of stride x stride x 3 pixels onto its first C principal components;
decoding is the least-squares estimate of a patch from the 3x3 latents around it. One convolution
each way, fitted in closed form. The latents are whitened by half: component k is divided by
sqrt(std_k), not by std_k. Most patches of a flat picture have no detail at all, so at unit variance
the few that do lie 9 deviations out, far for a small diffusion head; by half, all stay within 6.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vae import DiagonalGaussianDistribution
from util.weights import check_weights, read_safetensors

COLOURS = 3
NEIGHBOURHOOD = 3  # latents on a side that the decoder sees: +3.4 dB over 1 on util.shapes, C = 8
FIT_CHUNK = 256  # images whose patches are float64 at one time
LATENT_NOISE = 0.05  # deviation of the errors the decoder expects in generated latents (ridge)
POSTERIOR_STD = 0.07  # of latents scaled to unit variance: on util.shapes 39 dB in decoded images


class LinearTokenizer(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <=> latents (B, C, H / stride, W / stride).

    `latent_scale` times the latents has unit variance over all channels together. The weights are
    constants: `from_file` reads them, `fit` computes them.
    """

    def __init__(self, channels: int = 8, stride: int = 4, latent_scale: float = 1.0) -> None:
        super().__init__()
        size = COLOURS * stride * stride
        if not 1 <= channels <= size:
            raise ValueError(f"channels must be 1..{size} at stride {stride}, got {channels}")
        if not (math.isfinite(latent_scale) and latent_scale > 0):
            raise ValueError(f"latent_scale must be positive, got {latent_scale}")
        self.channels, self.stride, self.latent_scale = channels, stride, latent_scale
        self.encoder = nn.Conv2d(COLOURS, channels, stride, stride)
        self.decoder = nn.Conv2d(
            channels, size, NEIGHBOURHOOD, padding=NEIGHBOURHOOD // 2, padding_mode="replicate"
        )
        self.requires_grad_(False)

    def encode(self, images: Tensor) -> DiagonalGaussianDistribution:
        """(B, 3, H, W) in [-1, 1] => a posterior of one deviation, moments (B, 2C, h, w).

        The spread is for training. Tokens of flat pictures follow from their neighbours; without it
        a diffusion head must undo the last bit of noise exactly, unlike on natural images.
        """
        height, width = images.shape[-2:]
        if images.shape[1] != COLOURS or height % self.stride or width % self.stride:
            raise ValueError(
                f"images must be (B, 3, H, W) with H and W multiples of {self.stride}, "
                f"got {tuple(images.shape)}"
            )
        latents = self.encoder(images)  # (B, C, h, w)
        logvar = torch.full_like(latents, 2 * math.log(POSTERIOR_STD / self.latent_scale))
        return DiagonalGaussianDistribution(torch.cat([latents, logvar], dim=1))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) => images (B, 3, H, W); values may leave [-1, 1] a little."""
        return F.pixel_shuffle(self.decoder(latents), self.stride)  # (B, 3 s s, h, w) => pixels

    @classmethod
    def fit(cls, images: Tensor, channels: int = 8, stride: int = 4) -> "LinearTokenizer":
        """The tokenizer of `images` (N, 3, H, W) in [-1, 1]: least squared error, in two steps."""
        tokenizer = cls(channels, stride)
        std = _fit_encoder(tokenizer.encoder, images)
        # Channel k has variance std_k^2 / std_k after whitening by half.
        tokenizer.latent_scale = 1 / math.sqrt(std.mean().item())
        _fit_decoder(tokenizer, images)
        return tokenizer

    @classmethod
    def from_file(cls, path: str | Path) -> "LinearTokenizer":
        """Read the weights and the metadata (channels, stride, latent_scale) of a safetensors file.

        Raises FileNotFoundError, or ValueError when the file is damaged or another model's.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no tokenizer file at {path}")
        weights, metadata = read_safetensors(path)
        try:
            channels, stride, latent_scale = (
                json.loads(metadata[key]) for key in ("channels", "stride", "latent_scale")
            )
            tokenizer = cls(channels, stride, latent_scale)
            check_weights(tokenizer, weights, path)
        except (KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is not a linear tokenizer's file: {reason}") from error
        tokenizer.load_state_dict(weights)
        return tokenizer


def _patches(images: Tensor, stride: int) -> Tensor:
    """(n, 3, H, W) => float64 (n h w, 3 stride stride)."""
    return F.unfold(images.double(), stride, stride=stride).transpose(1, 2).flatten(0, 1)


def _fit_encoder(encoder: nn.Conv2d, images: Tensor) -> Tensor:
    """Set the encoder to the principal components; their standard deviations, (C,)."""
    stride = encoder.stride[0]
    size = COLOURS * stride * stride
    count, first, second = 0, torch.zeros(size).double(), torch.zeros(size, size).double()
    for chunk in images.split(FIT_CHUNK):
        patches = _patches(chunk, stride)
        count += len(patches)
        first += patches.sum(0)
        second += patches.T @ patches
    mean = first / count
    variances, vectors = torch.linalg.eigh(second / count - torch.outer(mean, mean))  # ascending
    variances = variances.flip(0)[: encoder.out_channels]
    components = vectors.T.flip(0)[: encoder.out_channels]  # (C, 3 s s)
    if variances[-1] <= 1e-9 * variances[0]:
        raise ValueError(f"the images vary in fewer than {encoder.out_channels} directions")
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    std = variances.sqrt()
    weight = components * largest.sign() / std.sqrt()[:, None]  # a component's sign is free
    _set(encoder, weight, -weight @ mean)
    return std


def _fit_decoder(tokenizer: LinearTokenizer, images: Tensor) -> None:
    """Set the decoder to the least-squares map from latent neighbourhoods to patches."""
    decoder, pad = tokenizer.decoder, NEIGHBOURHOOD // 2
    around_size = decoder.in_channels * NEIGHBOURHOOD**2 + 1
    count, gram = 0, torch.zeros(around_size, around_size, dtype=torch.float64)
    cross = torch.zeros(around_size, decoder.out_channels, dtype=torch.float64)
    for chunk in images.split(FIT_CHUNK):
        latents = F.pad(tokenizer.encoder(chunk), (pad,) * 4, mode="replicate")
        around = F.unfold(latents.double(), NEIGHBOURHOOD).transpose(1, 2).flatten(0, 1)
        around = F.pad(around, (0, 1), value=1.0)  # (n h w, 9 C + 1): the last one is the bias
        count += len(around)
        gram += around.T @ around
        cross += around.T @ _patches(chunk, tokenizer.stride)
    gram.diagonal()[:-1] += count * LATENT_NOISE**2
    solution = torch.linalg.solve(gram, cross).T  # (3 s s, 9 C + 1)
    _set(decoder, solution[:, :-1], solution[:, -1])


def _set(layer: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """weight (out, in k k), bias (out,)."""
    layer.load_state_dict({"weight": weight.reshape(layer.weight.shape), "bias": bias})
