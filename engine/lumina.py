"""The Lumina family: Lumina-mGPT, text-to-image on transformers' Chameleon."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.base import Execution, Family, Loaded, Preset, WeightsConfig, require_file
from engine.gpt import add_sampling_flags, build_line_ar
from engine.text_to_image import TextToImageHost
from models.chameleon_vq import ChameleonVQ
from models.gpt_images import GPTSampling
from util.config import FlagParser, Flags, setting
from util.errors import UserError
from util.evaluation.generation import ImageGenerator
from util.files import sha256_of
from util.weights import load_into

_FOLDER = "pretrained_models/lumina"
STRIDE = 16  # pixels per code and side
PIXELS_PER_SIZE = 32  # of the tokens that say height and width

PRESETS: dict[str, Preset] = {
    f"lumina_mgpt_{size}": {
        "cfg": 4.0,  # Lumina-mGPT's README: guidance and top-k of image tokens
        "top_k": 2000,
        "img_size": size,
        "resume": f"{_FOLDER}/Lumina-mGPT-7B-{size}",
        "vae_path": f"{_FOLDER}/vqgan.ckpt",
    }
    for size in (512, 768, 1024)
}


@dataclass(frozen=True)
class LuminaImageConfig:
    """Size of the images, and their tokenizer. UserError for a size that the model cannot name."""

    img_size: int = setting(768, "height and width that the model draws, pixels", least=1)
    image_size_eval: int | None = setting(
        None, "height and width of the saved images, pixels; default the model's", least=1
    )
    vae_path: str = setting(f"{_FOLDER}/vqgan.ckpt", "weights of the tokenizer", metavar="FILE")

    def __post_init__(self) -> None:
        if self.img_size % PIXELS_PER_SIZE:
            raise UserError(
                f"--img_size is {self.img_size}; it must be a multiple of {PIXELS_PER_SIZE} for this model"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Lines, and codes per line."""
        return self.img_size // STRIDE, self.img_size // STRIDE


@dataclass(frozen=True)
class LuminaHost(TextToImageHost):
    """A named Lumina-mGPT."""

    images: LuminaImageConfig

    @property
    def remedy(self) -> str:
        return f"download Alpha-VLLM/{Path(self.resume).name} from the Hugging Face Hub into it"

    def open(self, folder: Path) -> tuple[Any, Any]:
        from transformers import AutoTokenizer

        from models.lumina import ImageVocabulary, open_lumina

        require_file(
            self.images.vae_path,
            "--vae_path: the tokenizer",
            "get Chameleon's vqgan.ckpt from Meta",
        )
        model = open_lumina(folder)
        ImageVocabulary.from_model(model)
        vq = ChameleonVQ().eval().requires_grad_(False)
        load_into(vq, self.images.vae_path, use_ema=False, surplus=("loss.",))
        return model, (AutoTokenizer.from_pretrained(folder), vq)

    def grid(self, model: Any) -> tuple[int, int]:
        lines, width = self.images.grid
        return lines, width + 1  # a newline ends the line

    def generator(self, loaded: Loaded, execution: Execution) -> ImageGenerator:
        from models.lumina import LuminaGenerator

        model: Any = loaded.model.to(execution.dtype)
        text, vq = loaded.tokenizer
        images, vae_bsz = self.images, execution.config.vae_bsz
        vq = vq.to(execution.device)
        return LuminaGenerator(model, text, vq, self.sampling, images.grid, self._size, vae_bsz)

    @property
    def _size(self) -> int:
        return self.images.image_size_eval or self.images.img_size

    def config(self, loaded: Loaded, dtype: torch.dtype) -> dict[str, object]:
        return {
            "img_size": self.images.img_size,
            "image_size_eval": self._size,
            "tokenizer": f"chameleon {sha256_of(self.images.vae_path)[:16]}",
            "vae_dtype": "float32",
            **asdict(self.sampling),
        }

    def flops_per_image(self, model: nn.Module) -> float:
        """With the full cache; the head computes the logits of image codes alone."""
        chameleon: Any = model
        config, layers = chameleon.config, chameleon.model.layers
        lines, tokens = self.grid(model)
        codes = config.vq_config.num_embeddings * config.hidden_size * lines * self.images.grid[1]
        branches = 2 if self.sampling.cfg > 1 else 1
        return branches * 2 * codes + self.flops(
            layers, len(layers), config.hidden_size, lines * tokens
        )


class LuminaFamily(Family):
    """Lumina-mGPT at 512, 768 and 1024 pixels."""

    name = "Lumina"
    presets = PRESETS

    def add_flags(self, parser: FlagParser) -> None:
        add_sampling_flags(parser, self, LuminaImageConfig)

    def host(self, model: str, flags: Flags, defaults: Preset) -> LuminaHost:
        line_ar = build_line_ar(flags, defaults)
        return LuminaHost(
            model=model,
            sampling=replace(flags.build(GPTSampling, defaults), line_ar=line_ar),
            resume=flags.build(WeightsConfig, defaults).resume,
            images=flags.build(LuminaImageConfig, defaults),
        )
