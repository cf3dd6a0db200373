"""Text-to-image models of transformers: what their families share."""

from abc import abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.base import Loaded
from engine.gpt import GPTHost
from util.download import hub_folder
from util.errors import UserError
from util.files import hub_weights, sha256_of


@dataclass(frozen=True)
class TextToImageHost(GPTHost):
    """A named model that draws prompts; resume: its folder, or its name on the Hugging Face Hub."""

    @property
    @abstractmethod
    def remedy(self) -> str:
        """How to get the published model."""

    @abstractmethod
    def open(self, folder: Path) -> tuple[nn.Module, Any]:
        """Model, float32, and its processor. Raises if the folder does not hold this model."""

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
        except Exception as error:  # transformers raises errors of many kinds for damaged files
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
            folder = hub_folder(self.resume)
            if not list(folder.glob("*.safetensors")):
                raise UserError(
                    f"{self.resume} has no safetensors on the Hugging Face Hub, and pickles are not "
                    f"fetched: {self.remedy}, or download it by hand and give --resume its folder"
                )
            return folder
        raise UserError(
            f"there is no folder {self.resume}: {self.remedy}, or give --resume a folder or a name on "
            "the Hugging Face Hub"
        )
