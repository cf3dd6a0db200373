"""Settings of the MAR family: its tokenizers, presets and sampling, each a group of flags."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from diffusion import DIFFUSION_STEPS
from engine.base import Preset
from models.fast_mar import PRESETS as FAST_PRESETS
from models.fast_mar import FastMARConfig
from models.head_config import HeadConfig
from models.lazy_mar import LazyMARConfig
from models.order import OrderConfig
from models.plan import DecodingPlan
from models.tokenizers import Tokenizer, latent_scale_of, load_tokenizer
from util.config import flags_of, setting
from util.device import DTYPES
from util.errors import UserError
from util.files import sha256_of

DETOK = "pretrained_models/detok"

# Defaults of the other flags for each --tokenizer.
TOKENIZERS: dict[str, Preset] = {
    "kl16": {},
    "linear": {"latent_scale": None},  # its own file states it
    "detok": {  # which normalises its latents by their statistics
        "vae_path": f"{DETOK}/detok-BB-gamm3.0-m0.7-decoder_tuned.pth",
        "latent_stats": f"{DETOK}/stats.safetensors",
        "latent_scale": 1.0,
    },
}


@dataclass(frozen=True)
class TokenizerConfig:
    """The autoencoder between images and latents."""

    tokenizer: str = setting("kl16", "kind of the autoencoder", choices=tuple(TOKENIZERS))
    vae_path: str = setting(
        "pretrained_models/vae/kl16.ckpt", "weights of the tokenizer", metavar="FILE"
    )
    latent_scale: float | None = setting(  # 0.2325: MAR's code, for KL-16
        0.2325, "factor from its latents to the model's", least=1e-6
    )
    latent_stats: str | None = setting(
        None, "detok: mean and std of its latents, safetensors", metavar="FILE"
    )
    vae_dtype: str | None = setting(None, "precision; default --dtype", choices=tuple(DTYPES))

    def open(self, embed_dim: int, stride: int, device: torch.device) -> Tokenizer:
        """The tokenizer on the device. UserError if its file is missing or does not fit."""
        try:
            tokenizer = load_tokenizer(self.tokenizer, self.vae_path, embed_dim, self.latent_stats)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"--vae_path: {error}") from error
        if tokenizer.stride != stride:
            raise UserError(
                f"the tokenizer {self.vae_path} has stride {tokenizer.stride}, but --vae_stride is "
                f"{stride}: give the tokenizer that the model was trained with"
            )
        return tokenizer.to(device)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that decide the latents."""
        return (self.vae_path,) if self.latent_stats is None else (self.vae_path, self.latent_stats)

    def digest(self) -> str:
        """Kind and first digits of the sha256 of its files."""
        return " ".join([self.tokenizer, *(sha256_of(path)[:16] for path in self.files)])

    def scale(self, tokenizer: Tokenizer | None) -> float:
        """Factor from the tokenizer's latents to the model's. UserError if nothing states it."""
        try:
            return latent_scale_of(tokenizer, self.latent_scale)
        except ValueError as error:
            raise UserError(str(error)) from error


@dataclass(frozen=True)
class PresetConfig:
    """A named combination of the flags below."""

    preset: str | None = setting(
        None,
        "lazymar, or faster: balanced, fast; other flags override it",
        choices=tuple(FAST_PRESETS),
    )


@dataclass(frozen=True)
class HeadSteps:
    """Denoising steps of the head over the decoding steps (DiSA, arXiv 2505.20297)."""

    upper: int | None = setting(
        None,
        "denoising steps at the first decoding step; default: the model's",
        flag="diff_upper_steps",
        least=2,
        most=DIFFUSION_STEPS,
    )
    lower: int | None = setting(
        None,
        "denoising steps at the last decoding step; default: --diff_upper_steps",
        flag="diff_lower_steps",
        least=2,
    )

    def steps(self) -> int | tuple[int, int] | None:
        """HeadConfig.steps. UserError for a last number without a first, or a larger one."""
        if self.lower is None:
            return self.upper
        if self.upper is None:
            raise UserError("--diff_lower_steps needs --diff_upper_steps")
        if self.lower > self.upper:
            raise UserError(
                f"--diff_lower_steps is {self.lower}, more than --diff_upper_steps {self.upper}: "
                "give at most as many"
            )
        return self.upper, self.lower


# Configs of the flags that go beyond LazyMAR.
BEYOND_LAZYMAR = (PresetConfig, HeadSteps, HeadConfig, OrderConfig)


def preset_flags(preset: FastMARConfig) -> dict[str, Any]:
    """The flags that a preset stands for, by name."""
    values: dict[str, Any] = {"num_iter": preset.num_iter, "lazy_mar": preset.lazy is not None}
    published = LazyMARConfig()
    for name, value in vars(preset.lazy or published).items():
        if value != getattr(published, name):
            values[name] = value
    for config in (preset.head, preset.order):
        for flag in flags_of(type(config)):
            values[flag.name] = getattr(config, flag.field.name)
    steps = preset.head.steps
    if isinstance(steps, tuple):
        values["diff_upper_steps"], values["diff_lower_steps"] = steps
    elif steps is not None:
        values["diff_upper_steps"] = steps
    return values


@dataclass(frozen=True)
class EMAConfig:
    """Which of a checkpoint's two sets of weights to use."""

    no_ema: bool = setting(False, "use the weights of `model` instead of `model_ema`")


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled; arguments of MAR.sample_tokens. ValueError if they are invalid."""

    num_iter: int = setting(64, "autoregressive steps per image", least=1)
    cfg: float = setting(1.0, "guidance scale, 1.0 for none")
    cfg_schedule: str = setting("linear", "guidance over steps", choices=("linear", "constant"))
    temperature: float = setting(1.0, "scale of the head's noise", least=0)
    lazy_mar: LazyMARConfig | None = None
    head: HeadConfig | None = None
    order: OrderConfig | None = None

    def __post_init__(self) -> None:
        DecodingPlan.create(1, self.num_iter, self.cfg, self.cfg_schedule)

    def plan(self, seq_len: int) -> DecodingPlan:
        """The steps of an image of seq_len tokens."""
        start = self.head.guidance_start if self.head else 0.0
        return DecodingPlan.create(
            seq_len, self.num_iter, self.cfg, self.cfg_schedule,
            guidance_start=start, order=self.order,
        )  # fmt: skip

    @property
    def preset(self) -> str | None:
        """Name of the preset that these settings are, "balanced" or "fast", else None."""
        ours = FastMARConfig(
            self.num_iter, self.order or OrderConfig(), self.head or HeadConfig(), self.lazy_mar
        )
        names = (name for name in ("balanced", "fast") if FAST_PRESETS[name]() == ours)
        return next(names, None)

    @property
    def method(self) -> str:
        """MAR, LazyMAR or a preset, and the constants that differ from the published ones."""
        if self.preset:
            return self.preset
        parts = ["MAR" if self.lazy_mar is None else "LazyMAR"]
        for config, published in (
            (self.lazy_mar, LazyMARConfig()),
            (self.head, HeadConfig()),
            (self.order, OrderConfig()),
        ):
            for name, value in vars(config).items() if config else ():
                if value != getattr(published, name):
                    parts.append(f"{name} {value}")
        return ", ".join(parts)

    def run_name(self, model: str, num_images: int) -> str:
        """Folder name of a run, such as mar_huge-lazy_mar-iter64-cfg3.25-50000."""
        method = "mar" if self.lazy_mar is None else "lazy_mar"
        if self.preset:
            method = self.preset
        elif self.lazy_mar not in (None, LazyMARConfig()) or self.head or self.order:
            settings = repr((self.lazy_mar, self.head, self.order))
            method += "_" + hashlib.sha256(settings.encode()).hexdigest()[:6]
        parts = [model, method, f"iter{self.num_iter}", f"cfg{self.cfg:g}"]
        if self.cfg_schedule != "linear":
            parts.append(self.cfg_schedule)
        if self.temperature != 1.0:
            parts.append(f"temp{self.temperature:g}")
        return "-".join([*parts, str(num_images)])
