"""The classifiers of the bundled data sets: 64 features for FID, as Inception-v3 gives for ImageNet.

Four convolutions without normalisation or dropout, so an image's features depend only on that image.
"""

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from util.errors import UserError
from util.weights import load_into

FEATURES = 64
LABELS = 10
IMAGE_SIZE = 64  # pixels

Classifier = TypeVar("Classifier", bound="TinyClassifier")


class TinyClassifier(nn.Module):
    """Images (B, 3, 64, 64), uint8 or float in [-1, 1] => features (B, 64), logits (B, K)."""

    title: str  # of its files, in errors
    command: str  # that trains it
    reader: str  # name of the layer that reads the features

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2),  # 64 => 32 pixels
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),  # 32 => 16
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),  # 16 => 8
            nn.ReLU(),
            nn.Conv2d(64, FEATURES, 3, padding=1),
            nn.ReLU(),
        )

    def logits(self, maps: Tensor) -> Tensor:
        """(B, 64, 8, 8) => (B, K)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"images must be (B, 3, 64, 64), got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.float() / 127.5 - 1
        maps = self.trunk(images)  # (B, 64, 8, 8)
        return maps.mean((2, 3)), self.logits(maps)

    @classmethod
    def from_file(cls: type[Classifier], path: str | Path) -> Classifier:
        """The trained classifier in evaluation mode, float32. UserError if the file does not fit."""
        if not Path(path).is_file():
            raise UserError(f"there is no {cls.title} at {path}; make it with `{cls.command}`")
        classifier = cls()
        try:
            load_into(classifier, path)
        except UserError as error:
            raise UserError(f"{path} is not a {cls.title}'s file: {error}") from error
        return classifier.eval().requires_grad_(False)


class ShapeClassifier(TinyClassifier):
    """Names the ten shapes of util.shapes; 61,000 parameters."""

    title, command = "shape classifier", "python -m util.tiny.assets classifier"
    reader = "head"

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, LABELS)

    def logits(self, maps: Tensor) -> Tensor:
        return self.head(maps.mean((2, 3)))
