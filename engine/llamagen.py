"""The LlamaGen family: GPTs over VQ codes, with the full key-value cache or LineAR's."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.base import (
    Execution,
    Family,
    Loaded,
    Preset,
    WeightsConfig,
    bundled,
    require_file,
)
from engine.gpt import GPTHost, add_sampling_flags, build_line_ar
from models import llamagen, vq
from models.gpt_images import GPTGenerator, GPTSampling
from util.config import FlagParser, Flags, setting
from util.errors import UserError
from util.evaluation.generation import ImageGenerator
from util.files import hub_weights, sha256_of
from util.weights import describe, find_checkpoint, load_into

ROPE_TABLE = "freqs_cis"  # some published files hold it; ours is computed
TOKENIZERS = {"vq16": vq.vq16, "vq_tiny": vq.vq_tiny}

_TINY, _SHAPES = bundled("gpt_tiny"), bundled("mar_tiny")
_LLAMAGEN = "pretrained_models/llamagen"
_T5 = "pretrained_models/t5/flan-t5-xl"


def _published(name: str, cfg: float) -> Preset:
    """A published 384-pixel model; cfg of LlamaGen's best FID (its repository's table)."""
    return {"cfg": cfg, "resume": f"{_LLAMAGEN}/c2i_{name}_384.pt"}


PRESETS: dict[str, Preset] = {
    "gpt_b": _published("B", 2.0),
    "gpt_l": _published("L", 2.0),
    "gpt_xl": _published("XL", 1.75),
    "gpt_xxl": _published("XXL", 1.75),
    "gpt_3b": _published("3B", 1.65),
    **{
        f"gpt_xl_t2i_{size}": {
            "img_size": size,
            "image_size_eval": None,
            "cfg": 7.5,  # LlamaGen, sample_t2i.py: cfg-scale and top-k
            "top_k": 1000,
            "resume": f"{_LLAMAGEN}/t2i_XL_stage{stage}_{size}.pt",
            "vae_path": f"{_LLAMAGEN}/vq_ds16_t2i.pt",
            "t5_path": _T5,  # it draws captions
        }
        for stage, size in ((1, 256), (2, 512))
    },
    "gpt_tiny": {
        "img_size": 64,
        "image_size_eval": None,
        "vae_stride": 4,
        "class_num": 10,
        "cfg": 1.5,
        "top_p": 0.95,  # an hour's training leaves unlikely codes too likely
        "line_recent": 1,  # of 16 lines, few are kept: benchmarks/results/line_ablation.md
        "tokenizer": "vq_tiny",
        "vae_path": f"{_TINY}/tokenizer.safetensors",
        "resume": f"{_TINY}/model.safetensors",
        "features": "shapes",
        "features_path": f"{_SHAPES}/classifier.safetensors",
        "fid_stats": f"{_SHAPES}/fid_stats.npz",
    },
}


@dataclass(frozen=True)
class GPTImageConfig:
    """Geometry of the images, and their tokenizer. UserError if a line is not a whole number of codes."""

    img_size: int = setting(384, "height and width that the model draws, pixels", least=1)
    image_size_eval: int | None = setting(256, "size of the saved images, pixels", least=1)
    vae_stride: int = setting(16, "pixels per code and side", least=1)
    class_num: int = setting(1000, "number of classes", least=1)
    tokenizer: str = setting("vq16", "kind of the tokenizer", choices=tuple(TOKENIZERS))
    vae_path: str = setting(
        f"{_LLAMAGEN}/vq_ds16_c2i.pt", "weights of the tokenizer", metavar="FILE"
    )

    def __post_init__(self) -> None:
        if self.img_size % self.vae_stride:
            raise UserError(
                f"--img_size is {self.img_size}; it must be a multiple of --vae_stride "
                f"{self.vae_stride}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Lines, and codes per line."""
        side = self.img_size // self.vae_stride
        return side, side


@dataclass(frozen=True)
class LlamaGenHost(GPTHost):
    """A named GPT."""

    images: GPTImageConfig

    @property
    def class_num(self) -> int | None:
        return self.images.class_num

    @property
    def builder(self) -> str:
        """The function of models/llamagen.py that makes the model."""
        return self.model

    def load(self, device: torch.device) -> Loaded:
        find_checkpoint(self.resume)
        lines, line = self.images.grid
        with torch.device("meta"):  # drawing billions of weights takes minutes
            build = getattr(llamagen, self.builder)
            model = build(block_size=lines * line, num_classes=self.images.class_num)
        model = model.to_empty(device="cpu")
        load_into(model, self.resume, use_ema=False, surplus=(ROPE_TABLE,))
        weights = describe(self.resume, use_ema=False)
        return Loaded(model.to(device).eval(), self.open_tokenizer(device), weights)

    def open_tokenizer(self, device: torch.device) -> nn.Module:
        """The tokenizer on the device. UserError if its file is missing or does not fit."""
        images = self.images
        remedy = "fetch LlamaGen's with `python -m util.download vq16`"
        require_file(images.vae_path, "--vae_path: the tokenizer", remedy)
        tokenizer = TOKENIZERS[images.tokenizer]().eval().requires_grad_(False)
        load_into(tokenizer, images.vae_path, use_ema=False)
        if tokenizer.stride != images.vae_stride:
            raise UserError(
                f"the tokenizer {images.vae_path} has stride {tokenizer.stride}, but --vae_stride is "
                f"{images.vae_stride}: give the tokenizer that the model was trained with"
            )
        return tokenizer.to(device)

    def generator(self, loaded: Loaded, execution: Execution) -> ImageGenerator:
        assert isinstance(loaded.model, llamagen.GPT)
        assert isinstance(loaded.tokenizer, vq.VQModel)
        images = self.images
        size = images.image_size_eval or images.img_size
        model, vae_bsz = loaded.model.to(execution.dtype), execution.config.vae_bsz
        fast = execution.fast()
        return GPTGenerator(model, loaded.tokenizer, self.sampling, size, vae_bsz, fast)

    def config(self, loaded: Loaded, dtype: torch.dtype) -> dict[str, object]:
        images = self.images
        return {
            "img_size": images.img_size,
            "image_size_eval": images.image_size_eval or images.img_size,
            "tokenizer": f"{images.tokenizer} {sha256_of(images.vae_path)[:16]}",
            "vae_dtype": "float32",
            **asdict(self.sampling),
        }

    @property
    def steps(self) -> int:
        return self.images.grid[0] * self.images.grid[1]

    def flops_per_image(self, model: nn.Module) -> float:
        """With the full cache."""
        assert isinstance(model, llamagen.GPT)
        width = model.n_head * model.head_dim
        return self.flops((model.layers, model.output), len(model.layers), width, model.block_size)


@dataclass(frozen=True)
class TextEncoderConfig:
    """What embeds captions."""

    t5_path: str = setting(_T5, "text encoder of a t2i model: its folder", metavar="DIR")


@dataclass(frozen=True)
class CaptionHost(LlamaGenHost):
    """A named text-to-image GPT, whose captions are embedded by flan-t5-xl."""

    text: TextEncoderConfig

    @property
    def class_num(self) -> None:
        return None

    @property
    def builder(self) -> str:
        return self.model.rpartition("_")[0]  # without the size

    def load(self, device: torch.device) -> Loaded:
        remedy = "get it from LlamaGen's repository, see docs/text_to_image.md"
        require_file(self.resume, "--resume: the model", remedy)
        require_file(self.images.vae_path, "--vae_path: the tokenizer", remedy)
        loaded = super().load(device)
        path = self.text.t5_path
        try:
            from transformers import AutoTokenizer, T5EncoderModel

            from models.transformers_models import from_folder

            files = hub_weights(Path(path))
            encoder: Any = from_folder(T5EncoderModel, Path(path))
            tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception as error:  # transformers raises errors of many kinds for damaged files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--t5_path {path} is no T5 of transformers ({reason}): give the folder of flan-t5-xl"
            ) from error
        weights = " ".join([loaded.weights, "T5", *(sha256_of(file)[:16] for file in files)])
        text = tokenizer, encoder.to(device).eval()
        return Loaded(loaded.model, (*text, loaded.tokenizer), weights)

    def generator(self, loaded: Loaded, execution: Execution) -> ImageGenerator:
        from models.llamagen_text import CaptionGenerator

        model: Any = loaded.model.to(execution.dtype)
        *text, vq = loaded.tokenizer
        text[1].to(execution.dtype)
        size = self.images.image_size_eval or self.images.img_size
        return CaptionGenerator(model, text, vq, self.sampling, size, execution.config.vae_bsz)


class LlamaGenFamily(Family):
    """LlamaGen's GPTs for classes and for captions, and the bundled gpt_tiny."""

    name = "GPT"
    presets = PRESETS

    def add_flags(self, parser: FlagParser) -> None:
        add_sampling_flags(parser, self, GPTImageConfig)
        parser.add(TextEncoderConfig, "LlamaGen and text-to-image", owner=self.name)

    def host(self, model: str, flags: Flags, defaults: Preset) -> LlamaGenHost:
        images = flags.build(GPTImageConfig, defaults)
        line_ar = build_line_ar(flags, defaults)
        try:
            if line_ar is not None:
                line_ar.plan(images.grid)
        except ValueError as error:
            raise UserError(str(error)) from error
        sampling = replace(flags.build(GPTSampling, defaults), line_ar=line_ar)
        resume = flags.build(WeightsConfig, defaults).resume
        if "t5_path" in defaults:
            if "class_num" in flags.given:
                raise UserError(f"--class_num has no effect with --model {model}: remove it")
            text = flags.build(TextEncoderConfig, defaults)
            return CaptionHost(model, sampling, resume, images, text)
        if "t5_path" in flags.given:
            raise UserError(f"--t5_path is for text-to-image models; {model} takes class labels")
        return LlamaGenHost(model, sampling, resume, images)
