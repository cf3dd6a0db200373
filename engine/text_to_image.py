"""Text-to-image models of transformers: what their families share."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.base import Family, Host, Loaded
from models.gpt_images import GPTSampling
from models.line_config import LineARConfig
from util.config import FlagParser
from util.download import hub_folder
from util.errors import UserError
from util.files import hub_weights, sha256_of


@dataclass(frozen=True)
class TextToImageHost(Host):
    """A named model that draws prompts; resume: its folder, or its name on the Hugging Face Hub."""

    model: str
    sampling: GPTSampling
    resume: str

    @property
    @abstractmethod
    def remedy(self) -> str:
        """How to get the published model."""

    @abstractmethod
    def open(self, folder: Path) -> tuple[nn.Module, Any]:
        """Model, float32, and its processor. Any error says that the folder is none of the model."""

    @abstractmethod
    def grid(self, model: Any) -> tuple[int, int]:
        """Lines of an image, and tokens of a line as the cache counts them."""

    def load(self, device: torch.device) -> Loaded:
        if find_spec("transformers") is None:
            raise UserError(
                f"--model {self.model} needs transformers: install it with "
                "`pip install '.[transformers]'`"
            )
        folder = self._folder()
        try:
            files = hub_weights(folder)
            model, processor = self.open(folder)
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError, UserError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--resume {self.resume} cannot be loaded as --model {self.model} ({reason}): give the "
                "folder of such a model, or its name on the Hugging Face Hub"
            ) from error
        try:
            if self.sampling.line_ar is not None:
                self.sampling.line_ar.plan(self.grid(model))
        except ValueError as error:
            raise UserError(str(error)) from error
        weights = " ".join([Path(self.resume).name, *(sha256_of(file)[:16] for file in files)])
        return Loaded(model.to(device).eval(), processor, weights)

    def _folder(self) -> Path:
        folder = Path(self.resume)
        if folder.is_dir():
            return folder
        if self.resume.count("/") == 1 and not folder.parent.exists():
            return hub_folder(self.resume)
        raise UserError(
            f"there is no folder {self.resume}: {self.remedy}, or give --resume a folder or a name on "
            "the Hugging Face Hub"
        )

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

    def flops(self, parts: Iterable[nn.Module], layers: int, width: int, tokens: int) -> float:
        """Of an image with the full cache, the prompt not counted; `parts` see every token."""
        branches = 2 if self.sampling.cfg > 1 else 1
        modules = (module for part in parts for module in part.modules())
        matrices = sum(m.weight.numel() for m in modules if isinstance(m, nn.Linear))
        attention = 4 * width * layers * tokens * (tokens + 1) / 2
        return float(branches * (2 * tokens * matrices + attention))


def add_sampling_flags(parser: FlagParser, family: Family, images: type) -> None:
    """The flags of the images, of sampling and of LineAR."""
    from_model = tuple({name for preset in family.presets.values() for name in preset})
    shared: dict[str, Any] = {"owner": family.name, "from_model": from_model}
    title = "LlamaGen and text-to-image"
    parser.add(images, title, **shared)
    parser.add(GPTSampling, title, **shared)
    parser.add(
        LineARConfig,
        "LineAR",
        prefix="line_",
        switch=("line_ar", "compress the key-value cache to a few lines"),
        **shared,
    )
