"""Does a picture show what its prompt says? GenEval (Ghosh et al., 2023) in small, for util.tiny.captions.

A convolutional network reads a picture's scene: arrangement, ground, colour and shape of each
object. A picture agrees with a prompt when everything that the prompt states is right.

    python -m util.tiny.prompt_classifier        # trains it and makes the FID statistics, 4 minutes
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from util.checkpoint import save_safetensors
from util.errors import UserError, run_main
from util.evaluation.statistics import FidStatistics, save_stats
from util.shapes import HELD_OUT_START
from util.tiny.captions import (
    ARRANGEMENTS,
    COLOURS,
    GROUNDS,
    SHAPES,
    SINGLE,
    Scene,
    parse,
    pictures,
    scene_of,
)

FOLDER = Path("pretrained_models/janus_tiny")
CLASSIFIER, STATISTICS = "prompt_classifier.safetensors", "fid_stats.npz"  # in FOLDER
FEATURES = 64
IMAGE_SIZE = 64  # pixels
HEADS: dict[str, tuple[str, ...]] = {  # what is read from a picture, and its possible values
    "arrangement": ARRANGEMENTS,
    "ground": tuple(GROUNDS),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "second_colour": tuple(COLOURS),
    "second_shape": SHAPES,
}
SIZES = tuple(map(len, HEADS.values()))
ATTRIBUTES = ("shape", "colour", "ground", "relation")
ABSENT = -100  # label of a second object that is not there; cross_entropy ignores it

PICTURES = 20_000  # of training, and of the statistics
TEST_PICTURES = 5000  # held out
EPOCHS = 8
BATCH = 100
PEAK_LR = 2e-3  # of a one-cycle schedule
PIXEL_NOISE = 0.1  # largest deviation of the noise added in training; pixels are in [-1, 1]


class PromptClassifier(nn.Module):
    """Images (B, 3, 64, 64), uint8 or float in [-1, 1] => features (B, 64), logits (B, sum(SIZES))."""

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
        self.places = nn.Sequential(
            nn.Conv2d(FEATURES, 64, 3, stride=2, padding=1),  # 8 => 4
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 16, sum(SIZES)),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"images must be (B, 3, 64, 64), got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.float() / 127.5 - 1
        maps = self.trunk(images)  # (B, 64, 8, 8)
        return maps.mean((2, 3)), self.places(maps)

    @torch.no_grad()
    def scenes(self, images: Tensor) -> list[Scene]:
        """The most probable scene of each image."""
        return scenes_of(self(images)[1])

    @classmethod
    def from_file(cls, path: str | Path) -> "PromptClassifier":
        """The trained classifier in evaluation mode, float32. UserError when the file is not one."""
        if not Path(path).is_file():
            raise UserError(
                f"there is no prompt classifier at {path}; make it with "
                "`python -m util.tiny.prompt_classifier`"
            )
        classifier = cls()
        try:
            classifier.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is not a prompt classifier's file: {reason}") from error
        return classifier.eval().requires_grad_(False)


def scenes_of(logits: Tensor) -> list[Scene]:
    """The most probable scene of each row of logits (B, sum(SIZES))."""
    choices = torch.stack([part.argmax(1) for part in logits.split(SIZES, dim=1)], dim=1)
    return [_scene_of(row) for row in choices.tolist()]


def _scene_of(labels: Sequence[int]) -> Scene:
    """The scene of the labels of HEADS."""
    words = [names[k] for names, k in zip(HEADS.values(), labels, strict=True)]
    arrangement, ground, *rest = words
    objects = ((rest[0], rest[1]), (rest[2], rest[3]))
    return Scene(arrangement, objects[:1] if arrangement == SINGLE else objects, ground)


def compare(asked: Scene, found: Scene) -> dict[str, bool]:
    """Whether each of ATTRIBUTES that `asked` states is right in `found`.

    Of two objects those are compared that resemble each other most: a picture in which both have
    changed places has right shapes and colours and a wrong relation. With another number of
    objects shape and colour are wrong. All values are True exactly when the scenes agree.
    """
    result = {}
    pairs = list(zip(asked.objects, found.objects, strict=False))
    swapped = list(zip(asked.objects, found.objects[::-1], strict=False))
    in_order = _matches(pairs) >= _matches(swapped)
    best = pairs if in_order else swapped
    same_number = len(asked.objects) == len(found.objects)
    result["shape"] = same_number and all(a[1] == b[1] for a, b in best)
    result["colour"] = same_number and all(a[0] == b[0] for a, b in best)
    if asked.ground is not None:
        result["ground"] = asked.ground == found.ground
    if asked.arrangement != SINGLE:
        result["relation"] = asked.arrangement == found.arrangement and in_order
    return result


def _matches(pairs: Sequence[tuple[tuple[str, str], tuple[str, str]]]) -> int:
    return sum((a[0] == b[0]) + (a[1] == b[1]) for a, b in pairs)


def prompt_agreement(
    classifier: PromptClassifier, images: Tensor, prompts: Sequence[str]
) -> dict[str, float]:
    """Share of images that agree with their prompt: in everything ("all") and per attribute.

    images: (B, 3, 64, 64), uint8 or float in [-1, 1]. An attribute counts where a prompt states it
    and is left out where none does. ValueError for a prompt outside the grammar.
    """
    if len(images) != len(prompts) or not prompts:
        raise ValueError(f"need a prompt for each image, got {len(prompts)} for {len(images)}")
    asked = [parse(prompt) for prompt in prompts]
    found = [scene for batch in images.split(BATCH) for scene in classifier.scenes(batch)]
    return _shares([compare(a, b) for a, b in zip(asked, found, strict=True)])


def _shares(results: Sequence[dict[str, bool]]) -> dict[str, float]:
    shares = {"all": sum(all(result.values()) for result in results) / len(results)}
    for name in ATTRIBUTES:
        stated = [result[name] for result in results if name in result]
        if stated:
            shares[name] = sum(stated) / len(stated)
    return shares


def labels_of(index: int) -> list[int]:
    """Label of each head for picture `index`."""
    scene = scene_of(index)
    words = [scene.arrangement, scene.ground, *scene.objects[0], *scene.objects[-1]]
    labels = [names.index(word) for names, word in zip(HEADS.values(), words, strict=True)]
    return labels if scene.arrangement != SINGLE else labels[:4] + [ABSENT, ABSENT]


def batches(start: int, count: int) -> Iterator[tuple[Tensor, range]]:
    """Pictures start .. start + count - 1 in batches, with their indices."""
    for first in range(start, start + count, BATCH):
        size = min(BATCH, start + count - first)
        yield pictures(first, size), range(first, first + size)


def train(count: int) -> PromptClassifier:
    """Train on pictures 0 .. count - 1, blurred and noisy at random as drawn pictures may be."""
    images = torch.cat([batch for batch, _ in batches(0, count)])
    labels = torch.tensor([labels_of(index) for index in range(count)])
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # the initial weights
    classifier = PromptClassifier()
    steps = EPOCHS * -(-count // BATCH)
    optimizer = torch.optim.AdamW(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    progress = tqdm(total=steps, desc="training", disable=None)
    for _ in range(EPOCHS):
        for rows in torch.randperm(count, generator=random).split(BATCH):
            batch = images[rows].float() / 127.5 - 1
            blur = torch.rand(len(rows), 1, 1, 1, generator=random)
            batch = torch.lerp(batch, F.avg_pool2d(batch, 3, 1, 1, count_include_pad=False), blur)
            strength = PIXEL_NOISE * torch.rand(len(rows), 1, 1, 1, generator=random)
            batch += strength * torch.randn(batch.shape, generator=random)
            parts = classifier(batch)[1].split(SIZES, dim=1)
            losses = [F.cross_entropy(part, labels[rows, k]) for k, part in enumerate(parts)]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            schedule.step()
            progress.update()
    progress.close()
    return _normalised(classifier, images)


@torch.no_grad()
def _normalised(classifier: PromptClassifier, images: Tensor) -> PromptClassifier:
    """Features scaled to a mean variance of 1 over the images; the logits stay the same."""
    features = torch.cat([classifier(batch)[0] for batch in images.split(BATCH)])
    factor = features.var(0).mean().rsqrt()
    weights = (
        classifier.state_dict()
    )  # of the last convolution before the features, and behind them
    weights["trunk.6.weight"].mul_(factor)
    weights["trunk.6.bias"].mul_(factor)
    weights["places.0.weight"].div_(factor)
    return classifier.eval()


def accuracy(classifier: PromptClassifier, count: int) -> dict[str, float]:
    """Share of held-out pictures whose scene is right: in everything, and per attribute."""
    results = [
        compare(scene_of(index), found)
        for batch, indices in batches(HELD_OUT_START, count)
        for index, found in zip(indices, classifier.scenes(batch), strict=True)
    ]
    return _shares(results)


@torch.no_grad()
def statistics(classifier: PromptClassifier, count: int) -> FidStatistics:
    """Mean (64,) and covariance (64, 64) of the features of held-out pictures, float64."""
    parts = [classifier(batch)[0] for batch, _ in batches(HELD_OUT_START, count)]
    features = torch.cat(parts).double().numpy()
    return FidStatistics(features.mean(0), np.cov(features, rowvar=False))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m util.tiny.prompt_classifier",
        description="Train the prompt classifier of janus_tiny and make its FID statistics.",
    )
    parser.add_argument("--output_dir", type=Path, default=FOLDER)
    parser.add_argument("--num_images", type=int, default=PICTURES)
    args = parser.parse_args()
    if args.num_images < BATCH:
        raise UserError(f"--num_images must be at least {BATCH}, got {args.num_images}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    weights = train(args.num_images).half().state_dict()
    classifier = PromptClassifier()
    classifier.load_state_dict(weights)  # what is tested is what is written
    result = accuracy(classifier.eval(), TEST_PICTURES)
    save_stats(args.output_dir / STATISTICS, statistics(classifier, args.num_images))
    metadata = {
        "kind": json.dumps("PromptClassifier"),
        "held_out_accuracy": json.dumps(result),
        "made_by": json.dumps(
            f"python -m util.tiny.prompt_classifier --num_images {args.num_images}"
        ),
    }
    save_safetensors(args.output_dir / CLASSIFIER, weights, metadata)
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
