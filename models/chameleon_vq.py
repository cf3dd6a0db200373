"""Chameleon's image tokenizer (Meta, arXiv 2405.09818): the VQGAN of taming transformers.

transformers has only its encoder; the decoder is KL-16's (models/vae.py). Keys of the state_dict are
those of the official `vqgan.ckpt`, under "state_dict", without its `loss.*`.
"""

from torch import Tensor, nn

from models.vae import Decoder, Encoder


class Codes(nn.Module):
    """K vectors of C channels, used as they are."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, channels)

    def nearest(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> codes (B, h, w) int64, of the least distance."""
        z, vectors = z.movedim(1, -1), self.embedding.weight
        distance = vectors.square().sum(-1) - 2 * z @ vectors.T  # without |z|^2, the same for all
        return distance.argmin(dim=-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> latents (B, C, h, w)."""
        return self.embedding(codes).movedim(-1, 1)


class ChameleonVQ(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] => codes (B, H/f, W/f) int64 => images, about [-1, 1].

    The defaults are the official model's: 8192 codes of 256 channels, stride f = 16. ch * ch_mult are
    the widths, multiples of 32; z_channels is the width around the codebook.
    """

    def __init__(
        self,
        codebook_size: int = 8192,
        embed_dim: int = 256,
        ch: int = 128,
        ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
    ) -> None:
        super().__init__()
        self.stride = 2 ** (len(ch_mult) - 1)
        self.encoder = Encoder(
            ch, ch_mult, num_res_blocks, z_channels, attention=False, variational=False
        )
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, z_channels)
        self.quantize = Codes(codebook_size, embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] => codes (B, H/f, W/f) int64."""
        return self.quantize.nearest(self.quant_conv(self.encoder(x)))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) int64 => images (B, 3, h*f, w*f), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(self.quantize.lookup(codes)))
