"""Family and Host: the interface between the scripts and the models.

A family is one kind of model (MAR, LlamaGen). It has flags and presets, and makes a Host of them: one
named model with every setting of a run, built before anything is loaded. A new family is one file and
one line in engine/__init__.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.config import FlagParser, Flags, setting
from util.device import can_compile
from util.errors import UserError
from util.evaluation.conditions import ClassLabels, Conditions, Prompts
from util.evaluation.generation import ImageGenerator

Preset = Mapping[str, Any]  # values of flags that follow from a model's name


@dataclass(frozen=True)
class WeightsConfig:
    """Which weights to load."""

    resume: str = setting("", "file, or folder of checkpoint-last.pth", metavar="PATH")


@dataclass(frozen=True)
class ComputeConfig:
    """How images are computed; changes pixels by rounding at most."""

    vae_bsz: int | None = setting(
        None, "images per call of the tokenizer's decoder; default: the whole batch", least=1
    )
    no_compile: bool = setting(False, "on CUDA: no torch.compile and no CUDA graphs")


@dataclass(frozen=True)
class Execution:
    """Where and in which precision images are computed, and how. show: notes go to stderr."""

    device: torch.device
    dtype: torch.dtype
    config: ComputeConfig = ComputeConfig()
    show: bool = False

    def fast(self) -> bool:
        """Whether to compile and to record CUDA graphs."""
        return not self.config.no_compile and can_compile(self.device, self.show)


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer on the device; weights: their origin, for the manifest.

    The tokenizer of a text-to-image model is its processor.
    """

    model: nn.Module
    tokenizer: Any
    weights: str


class Host(ABC):
    """One named model with all settings of a run."""

    model: str

    @property
    def class_num(self) -> int | None:
        """Number of class labels; None for text-to-image models, which need --prompts."""
        return None

    def conditions(self, prompts: str | None) -> Conditions:
        """Class labels or prompts of the images. UserError if the model needs the other kind."""
        if self.class_num is None:
            if prompts is None:
                raise UserError(f"--model {self.model} draws from text: give --prompts FILE")
            return Prompts.from_file(prompts)
        if prompts is not None:
            raise UserError(f"--prompts is for text-to-image models; {self.model} takes classes")
        return ClassLabels(self.class_num)

    @abstractmethod
    def load(self, device: torch.device) -> Loaded:
        """Model and tokenizer, ready to sample. UserError for files that are missing or do not fit."""

    @abstractmethod
    def generator(self, loaded: Loaded, execution: Execution) -> ImageGenerator:
        """The loaded model as a generator."""

    @abstractmethod
    def config(self, loaded: Loaded, dtype: torch.dtype) -> dict[str, object]:
        """Settings that decide the images, except weights, number, seed and device."""

    @abstractmethod
    def summary(self) -> dict[str, object]:
        """Entries of results.json: method, num_iter, cfg, lazy_mar, line_ar."""

    @abstractmethod
    def run_name(self, num_images: int) -> str:
        """Folder name of a run, such as mar_huge-lazy_mar-iter64-cfg3.25-50000."""

    @abstractmethod
    def flops_per_image(self, model: nn.Module) -> float:
        """Operations for one image as it is sampled, tokenizer not counted."""


class Family(ABC):
    """A kind of model."""

    name: str
    presets: Mapping[str, Preset]
    trains: bool = False  # whether main_mar.py and main_cache.py know its models

    @abstractmethod
    def add_flags(self, parser: FlagParser) -> None:
        """Add the flags that only this family has, with owner=self.name."""

    @abstractmethod
    def host(self, model: str, flags: Flags, defaults: Preset) -> Host:
        """The named model with the given flags, else `defaults`. UserError for invalid settings."""


def bundled(name: str) -> str:
    """Folder of a bundled model: below the working directory, else beside the installed packages."""
    folder = Path("pretrained_models") / name
    return str(folder if folder.is_dir() else Path(__file__).parents[1] / folder)


def require_file(path: str, what: str, remedy: str) -> None:
    """UserError if a file is missing."""
    if not Path(path).is_file():
        raise UserError(f"{what} {path} is missing: {remedy}")
