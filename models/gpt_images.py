"""From labels and seeds to pictures: LlamaGen's GPT, then its tokenizer's decoder, then its resizing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.line_cache import LineARConfig
from models.llamagen import GPT
from models.token_sampling import check_settings
from models.vq import VQModel


@dataclass(frozen=True)
class GPTSampling:
    """How codes are sampled: the arguments of GPT.sample_tokens that a whole run shares.

    Raises ValueError if they make no sense.
    """

    cfg: float
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cfg_interval: int = -1
    line_ar: LineARConfig | None = None

    def __post_init__(self) -> None:
        check_settings(self.cfg, self.temperature, self.top_k, self.top_p)


@torch.no_grad()
def generate(
    model: GPT,
    tokenizer: VQModel,
    labels: Sequence[int],
    seeds: Sequence[int],
    sampling: GPTSampling,
    size: int,
) -> Tensor:
    """Pictures (B, 3, size, size), about [-1, 1], each from its own label and seed.

    The tokenizer decodes in its own precision. Pictures of another size are resized by bicubic
    interpolation before they are clamped (LlamaGen, sample_c2i_ddp.py).
    """
    codes = model.sample_tokens(
        torch.tensor(labels),
        sampling.cfg,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.cfg_interval,
        line_ar=sampling.line_ar,
        seeds=seeds,
    )
    images = tokenizer.decode(codes.unflatten(1, model.grid)).float()
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, size=(size, size), mode="bicubic")
    return images
