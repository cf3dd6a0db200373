"""The MAR family: MAR sampled plainly or with LazyMAR's caches."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import create_diffusion
from engine.base import Execution, Family, Host, Loaded, Preset, WeightsConfig, bundled
from engine.mar_settings import (
    DETOK,
    TOKENIZERS,
    EMAConfig,
    HeadSteps,
    PresetConfig,
    SamplingConfig,
    TokenizerConfig,
    preset_flags,
)
from models import mar
from models.fast_mar import PRESETS as FAST_PRESETS
from models.flops import MARGeometry, image_work
from models.head_config import HeadConfig, denoising_runs
from models.lazy_mar import LazyMARConfig
from models.mar_config import MARConfig
from models.noise import ImageNoise
from models.order import OrderConfig
from models.sampler import Sampler
from models.tokenizers import Tokenizer
from util.config import FlagParser, Flags
from util.device import DTYPES, autocast, to_device
from util.errors import UserError
from util.weights import describe, find_checkpoint, load_into

_TINY = bundled("mar_tiny")


def _detok(name: str, depth: int, width: int, cfg: float) -> Preset:
    """MAR on the latents of l-DeTok's tokenizer (Yang et al., arXiv 2507.15856; its README)."""
    return {
        "diffloss_d": depth,
        "diffloss_w": width,
        "cfg": cfg,
        "no_dropout_in_mlp": True,
        "tokenizer": "detok",
        "resume": f"{DETOK}/{name}.pth",
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
DEFAULTS: Preset = {"diffloss_d": 12, "diffloss_w": 1536, "diffusion_batch_mul": 1, "cfg": 3.25}


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
        find_checkpoint(self.resume)
        model = self.build()
        load_into(model, self.resume, use_ema=not self.no_ema)
        weights = describe(self.resume, use_ema=not self.no_ema)
        return Loaded(model.to(device).eval(), self.open_tokenizer(device), weights)

    def generator(self, loaded: Loaded, execution: Execution) -> "MarGenerator":
        assert isinstance(loaded.model, mar.MAR)
        return MarGenerator(
            loaded.model,
            loaded.tokenizer,
            self.tokenizer.scale(loaded.tokenizer),
            self.sampling,
            execution.device,
            execution.dtype,
            execution.config.vae_bsz,
            self._vae_dtype(execution.dtype),
            execution.fast(),
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
        geometry, plan = MARGeometry.from_model(model), sampling.plan(model.seq_len)
        return image_work(geometry, plan, sampling.lazy_mar, True, sampling.head).total

    def with_sampling(self, **changes: Any) -> "MARHost":
        """The same model, sampled with these fields of SamplingConfig changed."""
        return replace(self, sampling=replace(self.sampling, **changes))


class MARFamily(Family):
    """MAR-B, MAR-L, MAR-H, l-DeTok's MAR-B and MAR-L, and the bundled mar_tiny."""

    name = "MAR"
    presets = PRESETS
    trains = True

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
            size = mar.SIZES[model.removeprefix("detok_")]
            geometry = replace(flags.build(MARConfig, flagged), **size)
        except UserError as error:
            raise UserError(f"--model {model}: {error}") from error
        lazy_mar = flags.build_optional(LazyMARConfig, "lazy_mar", "LazyMAR", flagged)
        steps = flags.build(HeadSteps, flagged).steps()
        order: OrderConfig | None = flags.build(OrderConfig, flagged)
        order = None if order == OrderConfig() else order
        sampling = replace(flags.build(SamplingConfig, flagged), lazy_mar=lazy_mar, order=order)
        try:
            head = replace(flags.build(HeadConfig, flagged), steps=steps)
            sampling = replace(sampling, head=None if head == HeadConfig() else head)
            own = create_diffusion(geometry.num_sampling_steps)
            plan = sampling.plan(geometry.grid_size**2)
        except ValueError as error:
            raise UserError(str(error)) from error
        try:
            denoising_runs(sampling.head, own, plan)
        except ValueError as error:
            raise UserError(f"--diff_upper_steps: {error}") from error
        return MARHost(
            model=model,
            geometry=geometry,
            tokenizer=flags.build(TokenizerConfig, flagged),
            sampling=sampling,
            resume=flags.build(WeightsConfig, flagged).resume,
            no_ema=flags.build(EMAConfig, flagged).no_ema,
        )


def mar_host(host: Host) -> MARHost:
    """The host, if it is MAR's. UserError for models of other families."""
    if not isinstance(host, MARHost):
        raise UserError(f"--model {host.model} is not a MAR model: use one of {', '.join(PRESETS)}")
    return host


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
