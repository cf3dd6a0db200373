"""What Inception-v3 is to ImageNet, for the ten shapes: 64 features for FID and 10 logits for IS.

Four convolutions without normalisation or dropout, 61,000 parameters: a picture's features depend
on nothing but the picture. Trained by `python -m util.tiny.assets classifier`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from util.errors import UserError
from util.weights import load_into

FEATURES = 64
LABELS = 10
IMAGE_SIZE = 64  # pixels


class ShapeClassifier(nn.Module):
    """Images (B, 3, 64, 64), uint8 or float in [-1, 1] => features (B, 64), logits (B, 10)."""

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
        self.head = nn.Linear(FEATURES, LABELS)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"images must be (B, 3, 64, 64), got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.to(self.head.weight.dtype) / 127.5 - 1
        features = self.trunk(images).mean((2, 3))  # (B, 64, 8, 8) => (B, 64)
        return features, self.head(features)

    @classmethod
    def from_file(cls, path: str | Path) -> "ShapeClassifier":
        """The trained classifier in evaluation mode. UserError when the file is not one."""
        if not Path(path).is_file():
            raise UserError(
                f"there is no shape classifier at {path}; make it with "
                "`python -m util.tiny.assets classifier`"
            )
        classifier = cls()
        try:
            load_into(classifier, path)
        except UserError as error:
            raise UserError(f"{path} is not a shape classifier's file: {error}") from error
        return classifier.eval().requires_grad_(False)
