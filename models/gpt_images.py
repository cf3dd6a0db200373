"""From labels and seeds to images: LlamaGen's GPT, its tokenizer's decoder, resizing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from models.gpt_sampler import GPTSampler
from models.line_config import LineARConfig
from models.line_methods import METHODS
from models.llamagen import GPT
from models.token_sampling import check_settings
from models.vq import VQModel
from util.config import setting


@dataclass(frozen=True)
class GPTSampling:
    """How codes are sampled: the arguments of GPT.sample_tokens that a whole run shares.

    Raises ValueError if they make no sense.
    """

    cfg: float = setting(1.0, "guidance scale, 1.0 for none")
    temperature: float = setting(1.0, "temperature of the codes", least=0)
    top_k: int = setting(0, "draw from the most likely codes, 0 for all", least=0)
    top_p: float = setting(1.0, "draw from this share of probability")
    cfg_interval: int = setting(-1, "last guided step, -1 for all")
    line_ar: LineARConfig | None = None

    def __post_init__(self) -> None:
        check_settings(self.cfg, self.temperature, self.top_k, self.top_p)

    @property
    def method(self) -> str:
        """The cache in words: full cache, h2o 1/4, LineAR 1/6 and what differs from its defaults."""
        config = self.line_ar
        if config is None or config.method == "none":
            return "full cache"
        simple = Fraction(config.budget).limit_denominator(64)
        budget = simple if float(simple) == config.budget else f"{config.budget:g}"
        name = "LineAR" if config.method == "linear" else config.method
        changed = [
            f"{field} {getattr(config, field)}"
            for field in METHODS[config.method].settings
            if getattr(config, field) != getattr(LineARConfig(), field)
        ]
        return ", ".join([f"{name} {budget}", *changed])

    def run_name(self, model: str, num_images: int) -> str:
        """Folder name of a run, such as gpt_xl-line_ar_1-6-cfg1.75-50000."""
        method = self.method.lower().replace("linear", "line_ar").replace("/", "-")
        parts = [model, method.replace(", ", "-").replace(" ", "_"), f"cfg{self.cfg:g}"]
        plain = GPTSampling(self.cfg)
        for name in (field.name for field in fields(self) if field.name not in ("cfg", "line_ar")):
            if getattr(self, name) != getattr(plain, name):
                parts.append(f"{name}{getattr(self, name):g}")
        return "-".join([*parts, str(num_images)])


class GPTGenerator:
    """A GPT and its tokenizer as an ImageGenerator, in the precision of each."""

    def __init__(
        self,
        model: GPT,
        tokenizer: VQModel,
        sampling: GPTSampling,
        size: int,
        vae_bsz: int | None = None,
        fast: bool = False,
    ) -> None:
        """size: pixels per side of the images; vae_bsz: images decoded at once, default all.

        fast: torch.compile and CUDA graphs, see models.gpt_sampler.GPTSampler.
        """
        self.sampler = GPTSampler(model, compile=fast, graphs=fast)
        self.execution = {"compile": fast, "cuda_graphs": fast}
        self.tokenizer, self.sampling = tokenizer, sampling
        self.size, self.vae_bsz = size, vae_bsz

    def prepare(
        self, labels: Sequence[int], seeds: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Nothing has to be done ahead: an image draws one number per code."""
        return labels, seeds

    @torch.no_grad()
    def generate(self, prepared: tuple[Sequence[int], Sequence[int]]) -> Tensor:
        """Images (B, 3, size, size) float32, about [-1, 1], each from its own label and seed.

        The tokenizer decodes in its own precision. An image that the GPT could not compute is NaN.
        """
        labels, seeds = prepared
        codes = self.sampler.sample_tokens(torch.tensor(labels), **vars(self.sampling), seeds=seeds)
        grid = self.sampler.model.grid
        return pictures(self.tokenizer.decode, codes.unflatten(1, grid), self.size, self.vae_bsz)


def pictures(
    decode: Callable[[Tensor], Tensor], codes: Tensor, size: int, vae_bsz: int | None = None
) -> Tensor:
    """Images (B, 3, size, size) of codes (B, h, w); a code below 0 gives NaN.

    decode: the tokenizer's, for vae_bsz images at once. Images of another size are resized by bicubic
    interpolation before they are clamped (LlamaGen, sample_c2i_ddp.py).
    """
    parts = []
    for part in codes.split(vae_bsz or max(1, len(codes))):
        broken = (part < 0).any((1, 2))[:, None, None, None]
        images = decode(part.clamp(min=0)).float().masked_fill(broken, torch.nan)
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bicubic")
        parts.append(images)
    return torch.cat(parts)
