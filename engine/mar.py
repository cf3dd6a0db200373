"""The MAR family: MAR sampled plainly or with LazyMAR's caches."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.base import ComputeConfig, Family, Host, Loaded, Preset, WeightsConfig, bundled
from models import mar
from models.fast_mar import PRESETS as FAST_PRESETS
from models.fast_mar import FastMARConfig
from models.flops import MARGeometry, image_work
from models.head_config import HeadConfig
from models.lazy_mar import LazyMARConfig
from models.mar_config import MARConfig
from models.noise import ImageNoise
from models.order import OrderConfig
from models.plan import DecodingPlan
from models.sampler import Sampler
from models.tokenizers import Tokenizer, latent_scale_of, load_tokenizer
from util import checkpoint
from util.config import FlagParser, Flags, flags_of, setting
from util.device import DTYPES, autocast, can_compile, to_device
from util.errors import UserError
from util.files import sha256_of

_TINY = bundled("mar_tiny")
_DETOK = "pretrained_models/detok"

# What --tokenizer implies where its other flags are not given.
TOKENIZERS: dict[str, Preset] = {
    "kl16": {},
    "linear": {"latent_scale": None},  # its own file states it
    "detok": {  # which normalises its latents by their statistics
        "vae_path": f"{_DETOK}/detok-BB-gamm3.0-m0.7-decoder_tuned.pth",
        "latent_stats": f"{_DETOK}/stats.safetensors",
        "latent_scale": 1.0,
    },
}


def _detok(name: str, depth: int, width: int, cfg: float) -> Preset:
    """MAR on the latents of l-DeTok's tokenizer (Yang et al., arXiv 2507.15856; its README)."""
    return {
        "diffloss_d": depth,
        "diffloss_w": width,
        "cfg": cfg,
        "no_dropout_in_mlp": True,
        "tokenizer": "detok",
        "resume": f"{_DETOK}/{name}.pth",
        "trains": True,
    }


# What a model's name implies for eval.py. The training commands keep the original's defaults, except
# for models with "trains": True.
PRESETS: dict[str, Preset] = {
    "mar_base": {"diffloss_d": 6, "diffloss_w": 1024, "resume": "pretrained_models/mar/mar_base"},
    "mar_large": {"diffloss_d": 8, "diffloss_w": 1280, "resume": "pretrained_models/mar/mar_large"},
    "mar_huge": {"resume": "pretrained_models/mar/mar_huge"},
    "detok_mar_base": _detok("mar_base", 6, 1024, cfg=3.9),
    "detok_mar_large": _detok("mar_large", 8, 1280, cfg=3.4),
    "mar_tiny": {
        **mar.TINY,
        "cfg": 3.0,
        "head_interval": 3,  # a head of 4 blocks changes faster from step to step: at 7 noise remains
        "tokenizer": "linear",
        "vae_path": f"{_TINY}/tokenizer.safetensors",
        "resume": f"{_TINY}/model.safetensors",
        "features": "shapes",
        "features_path": f"{_TINY}/classifier.safetensors",
        "fid_stats": f"{_TINY}/fid_stats.npz",
        "trains": True,
    },
}
# The original's defaults where they are not those of its constructor; cfg is that of LazyMAR's eval.py.
DEFAULTS: Preset = {
    "diffloss_d": 12,
    "diffloss_w": 1536,
    "diffusion_batch_mul": 1,
    "cfg": 3.25,
}
TRAINING_CFG = 1.0  # MAR's main_mar.py


@dataclass(frozen=True)
class TokenizerConfig:
    """The autoencoder between images and latents."""

    tokenizer: str = setting("kl16", "kind of the autoencoder", choices=tuple(TOKENIZERS))
    vae_path: str = setting("pretrained_models/vae/kl16.ckpt", "its weights", metavar="FILE")
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
class HeadSteps:
    """Denoising steps of the head over the decoding steps (DiSA, arXiv 2505.20297)."""

    upper: int | None = setting(
        None,
        "denoising steps at the first decoding step; default the model's",
        flag="diff_upper_steps",
        least=1,
    )
    lower: int | None = setting(
        None, "at the last one; default the same", flag="diff_lower_steps", least=1
    )

    def steps(self) -> int | tuple[int, int] | None:
        """HeadConfig.steps. UserError for a last number without a first."""
        if self.lower is None:
            return self.upper
        if self.upper is None:
            raise UserError("--diff_lower_steps needs --diff_upper_steps")
        return self.upper, self.lower


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled; arguments of MAR.sample_tokens. ValueError if they make no sense."""

    num_iter: int = setting(64, "autoregressive steps per image", least=1)
    cfg: float = setting(1.0, "guidance scale, 1.0 is none")
    cfg_schedule: str = setting("linear", "guidance over steps", choices=("linear", "constant"))
    temperature: float = setting(1.0, "scale of the head's noise", least=0)
    lazy_mar: LazyMARConfig | None = None
    head: HeadConfig | None = None
    order: OrderConfig | None = None

    def __post_init__(self) -> None:
        DecodingPlan.create(1, self.num_iter, self.cfg, self.cfg_schedule)

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
        """MAR, LazyMAR or a preset, and the constants that are not the published ones."""
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


@dataclass(frozen=True)
class MARHost(Host):
    """A named MAR."""

    model: str
    geometry: MARConfig
    tokenizer: TokenizerConfig
    sampling: SamplingConfig
    resume: str
    no_ema: bool

    @property
    def class_num(self) -> int:
        return self.geometry.class_num

    def build(self) -> mar.MAR:
        """The model with fresh weights, on the CPU."""
        return mar.MAR(**vars(self.geometry))

    def open_tokenizer(self, device: torch.device) -> Tokenizer:
        """The tokenizer on the device."""
        geometry = self.geometry
        return self.tokenizer.open(geometry.vae_embed_dim, geometry.vae_stride, device)

    def load(self, device: torch.device) -> Loaded:
        checkpoint.find_checkpoint(self.resume)
        model = self.build()
        checkpoint.load_into(model, self.resume, use_ema=not self.no_ema)
        weights = checkpoint.describe(self.resume, use_ema=not self.no_ema)
        return Loaded(model.to(device).eval(), self.open_tokenizer(device), weights)

    def generator(
        self,
        loaded: Loaded,
        compute: ComputeConfig,
        device: torch.device,
        dtype: torch.dtype,
        show: bool,
    ) -> "MarGenerator":
        assert isinstance(loaded.model, mar.MAR)
        fast = not compute.no_compile and can_compile(device, show)
        return MarGenerator(
            loaded.model,
            loaded.tokenizer,
            self.tokenizer.scale(loaded.tokenizer),
            self.sampling,
            device,
            dtype,
            compute.vae_bsz,
            self._vae_dtype(dtype),
            fast,
        )

    def _vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return DTYPES[self.tokenizer.vae_dtype] if self.tokenizer.vae_dtype else dtype

    def config(self, loaded: Loaded, dtype: torch.dtype) -> dict[str, object]:
        return {
            "img_size": self.geometry.img_size,
            "image_size_eval": self.geometry.img_size,
            "num_sampling_steps": self.geometry.num_sampling_steps,
            "tokenizer": self.tokenizer.digest(),
            "latent_scale": self.tokenizer.scale(loaded.tokenizer),
            "vae_dtype": str(self._vae_dtype(dtype)).removeprefix("torch."),
            **asdict(self.sampling),
        }

    def summary(self) -> dict[str, object]:
        return {
            "lazy_mar": self.sampling.lazy_mar is not None,
            "line_ar": False,
            "method": self.sampling.method,
            "num_iter": self.sampling.num_iter,
            "cfg": self.sampling.cfg,
        }

    def run_name(self, num_images: int) -> str:
        return self.sampling.run_name(self.model, num_images)

    def flops_per_image(self, model: nn.Module) -> float:
        assert isinstance(model, mar.MAR)
        sampling = self.sampling
        plan = DecodingPlan.create(
            model.seq_len, sampling.num_iter, sampling.cfg, sampling.cfg_schedule
        )
        return image_work(MARGeometry.from_model(model), plan, executed=True).total

    def with_sampling(self, **changes: Any) -> "MARHost":
        """The same model, sampled with these fields of SamplingConfig changed."""
        return replace(self, sampling=replace(self.sampling, **changes))


class MARFamily(Family):
    """MAR-B, MAR-L, MAR-H, l-DeTok's MAR-B and MAR-L, and the bundled mar_tiny."""

    name = "MAR"
    presets = PRESETS

    def add_flags(self, parser: FlagParser) -> None:
        from_model = {name for preset in PRESETS.values() for name in preset} | {"cfg"}
        shared: dict[str, Any] = {
            "owner": self.name,
            "from_model": tuple(from_model),
            "defaults": DEFAULTS,
        }
        parser.add(MARConfig, "MAR", **shared)
        parser.add(TokenizerConfig, "tokenizer", **shared)
        parser.add(EMAConfig, "weights", **shared)
        parser.add(PresetConfig, "sampling", **shared)
        parser.add(SamplingConfig, "sampling", **shared)
        parser.add(OrderConfig, "sampling", **shared)
        parser.add(HeadSteps, "diffusion head", **shared)
        parser.add(HeadConfig, "diffusion head", **shared)
        parser.add(
            LazyMARConfig,
            "LazyMAR",
            description="--lazy_mar takes the published constants; each other flag changes one",
            switch=("lazy_mar", "sample with LazyMAR's caches"),
            **shared,
        )

    def host(self, model: str, flags: Flags, defaults: Preset) -> MARHost:
        tokenizer = flags.value("tokenizer", defaults.get("tokenizer", "kl16"))
        flagged = {**DEFAULTS, **TOKENIZERS[tokenizer], **defaults}
        if preset := flags.build(PresetConfig, defaults).preset:
            flagged |= preset_flags(FAST_PRESETS[preset]())
        try:
            geometry = replace(
                flags.build(MARConfig, flagged), **mar.SIZES[model.removeprefix("detok_")]
            )
        except UserError as error:
            raise UserError(f"--model {model}: {error}") from error
        lazy_mar = flags.build_optional(LazyMARConfig, "lazy_mar", "LazyMAR", flagged)
        steps = flags.build(HeadSteps, flagged).steps()
        order: OrderConfig | None = flags.build(OrderConfig, flagged)
        try:
            head: HeadConfig | None = replace(flags.build(HeadConfig, flagged), steps=steps)
        except ValueError as error:
            raise UserError(str(error)) from error
        head = None if head == HeadConfig() else head
        order = None if order == OrderConfig() else order
        return MARHost(
            model=model,
            geometry=geometry,
            tokenizer=flags.build(TokenizerConfig, flagged),
            sampling=replace(
                flags.build(SamplingConfig, flagged), lazy_mar=lazy_mar, head=head, order=order
            ),
            resume=flags.build(WeightsConfig, flagged).resume,
            no_ema=flags.build(EMAConfig, flagged).no_ema,
        )


class MarGenerator:
    """MAR or LazyMAR and a tokenizer as a util.evaluation.generation.ImageGenerator."""

    def __init__(
        self,
        model: mar.MAR,
        tokenizer: Tokenizer,
        latent_scale: float,
        sampling: SamplingConfig,
        device: torch.device,
        dtype: torch.dtype,
        vae_bsz: int | None = None,
        vae_dtype: torch.dtype | None = None,
        fast: bool = False,
    ) -> None:
        """vae_bsz: images decoded at once, default all; vae_dtype: default `dtype`.

        fast: torch.compile and CUDA graphs, see models.sampler.Sampler.
        """
        self.sampler = Sampler(model, dtype, compile=fast, graphs=fast)
        self.execution = {"compile": fast, "cuda_graphs": fast}
        self.latent_scale = latent_scale
        self.sampling, self.device = sampling, device
        self.vae_bsz, self.vae_dtype = vae_bsz, vae_dtype or dtype
        self.noise_shape = (model.seq_len, model.diffloss.num_sampling_steps, model.token_dim)
        if device.type == "cpu" or (device.type == "cuda" and self.vae_dtype != torch.float32):
            # KL-16 on a CPU: 1.06 times as fast in float32, 1.19 in bf16. The caller's stays as it is.
            tokenizer = copy.deepcopy(tokenizer).to(memory_format=torch.channels_last)
        self.tokenizer = tokenizer

    def prepare(self, conditions: Sequence[int], seeds: Sequence[int]) -> tuple[Tensor, ImageNoise]:
        """Labels (B,) and the images' noise, on the CPU."""
        return torch.tensor(conditions), ImageNoise.from_seeds(seeds, *self.noise_shape)

    @torch.no_grad()
    def generate(self, prepared: tuple[Tensor, ImageNoise]) -> Tensor:
        """Images (B, 3, H, W) float32 in [-1, 1]."""
        labels, noise = prepared
        noise = ImageNoise(to_device(noise.orders, self.device), to_device(noise.head, self.device))
        latents = self.sampler.sample_tokens(
            len(labels), **vars(self.sampling), labels=labels, noise=noise
        )
        parts = (latents.float() / self.latent_scale).split(self.vae_bsz or len(latents))
        with autocast(self.device, self.vae_dtype):
            return torch.cat([self.tokenizer.decode(part).float() for part in parts])
