"""The Janus family: text-to-image GPTs of transformers, with its full cache or LineAR's."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.base import Execution, Family, Host, Loaded, Preset, WeightsConfig, bundled
from engine.llamagen import build_line_ar
from models.gpt_images import GPTSampling
from models.line_config import LineARConfig
from util.config import FlagParser, Flags, setting
from util.errors import UserError
from util.evaluation.conditions import Conditions, Prompts
from util.evaluation.generation import ImageGenerator
from util.files import read_json, sha256_of

_TINY = bundled("janus_tiny")
_PUBLISHED: Preset = {"cfg": 5.0}  # Janus-Pro's generation_inference.py

PRESETS: dict[str, Preset] = {
    "janus_pro_1b": {**_PUBLISHED, "resume": "deepseek-community/Janus-Pro-1B"},
    "janus_pro_7b": {**_PUBLISHED, "resume": "deepseek-community/Janus-Pro-7B"},
    "janus_tiny": {
        "cfg": 2.0,
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
class JanusHost(Host):
    """A named Janus; resume is a folder that save_pretrained wrote, or a name on the Hub."""

    model: str
    sampling: GPTSampling
    image_size: int | None
    resume: str

    @property
    def class_num(self) -> int:
        raise UserError(f"--model {self.model} draws prompts, not classes")

    def conditions(self, prompts: str | None) -> Conditions:
        if prompts is None:
            raise UserError(
                f"--model {self.model} draws prompts: give --prompts FILE, one per line"
            )
        return Prompts.from_file(prompts)

    def load(self, device: torch.device) -> Loaded:
        janus = _transformers()
        try:
            model = janus.JanusForConditionalGeneration.from_pretrained(
                self.resume, use_safetensors=True, dtype=torch.float32
            )
            processor = janus.AutoProcessor.from_pretrained(self.resume)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--resume {self.resume} is not a Janus model of transformers ({reason}): fetch it "
                f"with `python -m util.download {self.model}`"
            ) from error
        return Loaded(model.to(device).eval(), processor, _describe(self.resume))

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

    def summary(self) -> dict[str, object]:
        return {
            "lazy_mar": False,
            "line_ar": self.sampling.line_ar is not None,
            "method": self.sampling.method,
            "num_iter": None,
            "cfg": self.sampling.cfg,
        }

    def run_name(self, num_images: int) -> str:
        return self.sampling.run_name(self.model, num_images)

    def flops_per_image(self, model: nn.Module) -> float:
        """With the full cache, prompts not counted."""
        janus: Any = model
        tokens = janus.config.vision_config.num_image_tokens
        branches = 2 if self.sampling.cfg > 1 else 1
        language = janus.model.language_model
        parts = (*language.layers, janus.model.generation_head)
        matrices = sum(p.numel() for part in parts for p in part.parameters() if p.dim() == 2)
        width, depth = janus.config.text_config.hidden_size, len(language.layers)
        attention = 4 * width * depth * tokens * (tokens + 1) / 2
        return float(branches * (2 * tokens * matrices + attention))


class JanusFamily(Family):
    """Janus-Pro-1B and 7B, and the bundled janus_tiny."""

    name = "Janus"
    presets = PRESETS

    def add_flags(self, parser: FlagParser) -> None:
        from_model = tuple({name for preset in PRESETS.values() for name in preset})
        shared: dict[str, Any] = {"owner": self.name, "from_model": from_model}
        parser.add(JanusImageConfig, "LlamaGen and Janus", **shared)
        parser.add(GPTSampling, "LlamaGen and Janus", **shared)
        parser.add(
            LineARConfig,
            "LineAR",
            prefix="line_",
            switch=("line_ar", "compress the key-value cache to a few lines"),
            **shared,
        )

    def host(self, model: str, flags: Flags, defaults: Preset) -> JanusHost:
        line_ar = build_line_ar(flags, defaults)
        return JanusHost(
            model=model,
            sampling=replace(flags.build(GPTSampling, defaults), line_ar=line_ar),
            image_size=flags.build(JanusImageConfig, defaults).image_size_eval,
            resume=flags.build(WeightsConfig, defaults).resume,
        )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "Janus models need transformers: install it with `pip install '.[transformers]'`"
        ) from error
    return transformers


def _pixels(model: Any) -> int:
    """Height and width of the model's images: tokens per side, times 2 per level of its tokenizer."""
    config = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    return int(side * 2 ** (len(config.vq_config.channel_multiplier) - 1))


def _describe(resume: str) -> str:
    """The folder and first digits of the sha256 of its weights, or the Hub's name."""
    folder = Path(resume)
    if not folder.is_dir():
        return resume
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(read_json(index, dict, "download it again")["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    return " ".join([folder.name, *(sha256_of(folder / name)[:16] for name in files)])
