"""The Janus family: text-to-image GPTs of transformers, with its full cache or LineAR's."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.base import Execution, Family, Loaded, Preset, WeightsConfig, bundled
from engine.gpt import add_sampling_flags, build_line_ar
from engine.text_to_image import TextToImageHost
from models.gpt_images import GPTSampling
from util.config import FlagParser, Flags, setting
from util.evaluation.generation import ImageGenerator

_TINY = bundled("janus_tiny")
_PUBLISHED: Preset = {"cfg": 5.0}  # Janus-Pro's generation_inference.py

PRESETS: dict[str, Preset] = {
    "janus_pro_1b": {**_PUBLISHED, "resume": "pretrained_models/janus/Janus-Pro-1B"},
    "janus_pro_7b": {**_PUBLISHED, "resume": "pretrained_models/janus/Janus-Pro-7B"},
    "janus_tiny": {
        "cfg": 1.5,
        "line_recent": 1,  # of 16 lines, few are kept
        "resume": _TINY,
        "features": "prompts",
        "features_path": f"{_TINY}/prompt_classifier.safetensors",
        "fid_stats": f"{_TINY}/fid_stats.npz",
        "metrics": ("fid",),
    },
}


@dataclass(frozen=True)
class JanusImageConfig:
    """Size of the saved images."""

    image_size_eval: int | None = setting(
        None, "height and width of the saved images, pixels; default the model's", least=1
    )


@dataclass(frozen=True)
class JanusHost(TextToImageHost):
    """A named Janus; resume may also be a folder in deepseek-ai's own layout."""

    image_size: int | None

    @property
    def remedy(self) -> str:
        if self.model == "janus_tiny":
            return "make it with scripts/train_tiny_janus.sh"
        return f"get the published model with `python -m util.download {self.model}`"

    def open(self, folder: Path) -> tuple[Any, Any]:
        from transformers import AutoProcessor, JanusForConditionalGeneration

        from models.janus import special_tokens
        from models.janus_original import ABSENT, is_original, open_original
        from models.transformers_models import from_folder

        if is_original(folder):
            return open_original(folder)
        model = from_folder(JanusForConditionalGeneration, folder, ABSENT)
        special_tokens(model)
        return model, AutoProcessor.from_pretrained(folder)

    def grid(self, model: Any) -> tuple[int, int]:
        from models.janus import image_grid

        return image_grid(model)

    def generator(self, loaded: Loaded, execution: Execution) -> ImageGenerator:
        from models.janus import JanusGenerator

        model: Any = loaded.model.to(execution.dtype)
        vae_bsz = execution.config.vae_bsz
        return JanusGenerator(model, loaded.tokenizer, self.sampling, self._size(model), vae_bsz)

    def _size(self, model: Any) -> int:
        return self.image_size or _pixels(model)

    def config(self, loaded: Loaded, dtype: torch.dtype) -> dict[str, object]:
        return {
            "img_size": _pixels(loaded.model),
            "image_size_eval": self._size(loaded.model),
            "vae_dtype": str(dtype).removeprefix("torch."),
            **asdict(self.sampling),
        }

    def flops_per_image(self, model: nn.Module) -> float:
        janus: Any = model
        tokens = janus.config.vision_config.num_image_tokens
        language = janus.model.language_model
        parts = (*language.layers, janus.model.generation_head)
        width = janus.config.text_config.hidden_size
        return self.flops(parts, len(language.layers), width, tokens)


class JanusFamily(Family):
    """Janus-Pro-1B and 7B, and the bundled janus_tiny."""

    name = "Janus"
    presets = PRESETS

    def add_flags(self, parser: FlagParser) -> None:
        add_sampling_flags(parser, self, JanusImageConfig)

    def host(self, model: str, flags: Flags, defaults: Preset) -> JanusHost:
        line_ar = build_line_ar(flags, defaults)
        return JanusHost(
            model=model,
            sampling=replace(flags.build(GPTSampling, defaults), line_ar=line_ar),
            image_size=flags.build(JanusImageConfig, defaults).image_size_eval,
            resume=flags.build(WeightsConfig, defaults).resume,
        )


def _pixels(model: Any) -> int:
    """Height and width of the model's images: tokens per side, times 2 per level of its tokenizer."""
    config = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    return int(side * 2 ** (len(config.vq_config.channel_multiplier) - 1))
