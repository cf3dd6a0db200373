"""Whether an image shows its prompt: a small GenEval (Ghosh et al., 2023) for util.tiny.captions.

A convolutional network reads the scene of an image: arrangement, ground, colour and shape of each
object. An image agrees with a prompt if everything that the prompt states is right.

    python -m util.tiny.prompt_classifier        # trains it and makes the FID statistics, 4 minutes
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.errors import UserError, run_main
from util.evaluation.statistics import save_stats
from util.shapes import HELD_OUT_START
from util.tiny import captions, training
from util.tiny.classifier import FEATURES, TinyClassifier

FOLDER = Path("pretrained_models/janus_tiny")
CLASSIFIER, STATISTICS = "prompt_classifier.safetensors", "fid_stats.npz"  # in FOLDER
HEADS: dict[str, tuple[str, ...]] = {  # what is read from a picture, and its possible values
    "arrangement": captions.ARRANGEMENTS,
    "ground": tuple(captions.GROUNDS),
    "colour": tuple(captions.COLOURS),
    "shape": captions.SHAPES,
    "second_colour": tuple(captions.COLOURS),
    "second_shape": captions.SHAPES,
}
SIZES = tuple(map(len, HEADS.values()))
ATTRIBUTES = ("shape", "colour", "ground", "relation")
ABSENT = -100  # label of a second object that is not there; cross_entropy ignores it

PICTURES = 20_000  # of training, and of the statistics
TEST_PICTURES = 5000  # held out
EPOCHS = 8
PEAK_LR = 2e-3  # of a one-cycle schedule
PIXEL_NOISE = 0.1  # largest deviation of the noise added in training; pixels are in [-1, 1]


class PromptClassifier(TinyClassifier):
    """Reads the scene of an image; its logits (B, sum(SIZES)) are those of HEADS."""

    title, command = "prompt classifier", "python -m util.tiny.prompt_classifier"
    reader = "places.0"

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Sequential(
            nn.Conv2d(FEATURES, 64, 3, stride=2, padding=1),  # 8 => 4
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 16, sum(SIZES)),
        )

    def logits(self, maps: Tensor) -> Tensor:
        return self.places(maps)

    @torch.no_grad()
    def scenes(self, images: Tensor) -> list[captions.Scene]:
        """The most probable scene of each image."""
        return scenes_of(self(images)[1])


def scenes_of(logits: Tensor) -> list[captions.Scene]:
    """The most probable scene of each row of logits (B, sum(SIZES))."""
    choices = torch.stack([part.argmax(1) for part in logits.split(SIZES, dim=1)], dim=1)
    return [_scene_of(row) for row in choices.tolist()]


def _scene_of(labels: Sequence[int]) -> captions.Scene:
    """The scene of the labels of HEADS."""
    words = [names[k] for names, k in zip(HEADS.values(), labels, strict=True)]
    arrangement, ground, *rest = words
    objects = ((rest[0], rest[1]), (rest[2], rest[3]))
    return captions.Scene(
        arrangement, objects[:1] if arrangement == captions.SINGLE else objects, ground
    )


def compare(asked: captions.Scene, found: captions.Scene) -> dict[str, bool]:
    """Whether each of ATTRIBUTES that `asked` states is right in `found`.

    Two objects are compared in the order in which they match best: an image in which they have
    changed places has right shapes and colours and a wrong relation. With another number of objects
    shape and colour are wrong. All values are True exactly when the scenes agree.
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
    if asked.arrangement != captions.SINGLE:
        result["relation"] = asked.arrangement == found.arrangement and in_order
    return result


def _matches(pairs: Sequence[tuple[tuple[str, str], tuple[str, str]]]) -> int:
    return sum((a[0] == b[0]) + (a[1] == b[1]) for a, b in pairs)


def prompt_agreement(
    classifier: PromptClassifier, images: Tensor, prompts: Sequence[str]
) -> dict[str, float]:
    """Share of images that agree with their prompt: in everything ("all") and per attribute.

    images: (B, 3, 64, 64), uint8 or float in [-1, 1]. An attribute counts only for prompts that state
    it. ValueError for a prompt outside the grammar.
    """
    if len(images) != len(prompts) or not prompts:
        raise ValueError(f"need a prompt for each image, got {len(prompts)} for {len(images)}")
    asked = [captions.parse(prompt) for prompt in prompts]
    found = [scene for batch in images.split(training.BATCH) for scene in classifier.scenes(batch)]
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
    scene = captions.scene_of(index)
    words = [scene.arrangement, scene.ground, *scene.objects[0], *scene.objects[-1]]
    labels = [names.index(word) for names, word in zip(HEADS.values(), words, strict=True)]
    return labels if scene.arrangement != captions.SINGLE else labels[:4] + [ABSENT, ABSENT]


def train(count: int) -> PromptClassifier:
    """Train on images 0 .. count - 1, randomly blurred and noisy, as generated images may be."""
    images = torch.cat([batch for batch, _ in training.batches(captions.pictures, 0, count)])
    labels = torch.tensor([labels_of(index) for index in range(count)])
    torch.manual_seed(0)  # the initial weights
    classifier = PromptClassifier()

    def loss_of(indices: Tensor, random: torch.Generator) -> Tensor:
        batch = images[indices].float() / 127.5 - 1
        blur = torch.rand(len(indices), 1, 1, 1, generator=random)
        batch = torch.lerp(batch, F.avg_pool2d(batch, 3, 1, 1, count_include_pad=False), blur)
        parts = classifier(training.with_noise(batch, PIXEL_NOISE, random))[1].split(SIZES, dim=1)
        losses = [F.cross_entropy(part, labels[indices, k]) for k, part in enumerate(parts)]
        return torch.stack(losses).sum()

    training.fit_classifier(classifier, count, EPOCHS, PEAK_LR, loss_of)
    training.normalise(classifier, images)
    return classifier.eval()


def accuracy(classifier: PromptClassifier, count: int) -> dict[str, float]:
    """Share of held-out pictures whose scene is right: in everything, and per attribute."""
    results = [
        compare(captions.scene_of(index), found)
        for batch, indices in training.batches(captions.pictures, HELD_OUT_START, count)
        for index, found in zip(indices, classifier.scenes(batch), strict=True)
    ]
    return _shares(results)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m util.tiny.prompt_classifier",
        description="Train the prompt classifier of janus_tiny and make its FID statistics.",
    )
    parser.add_argument("--output_dir", type=Path, default=FOLDER)
    parser.add_argument("--num_images", type=int, default=PICTURES)
    args = parser.parse_args()
    if args.num_images < training.BATCH:
        raise UserError(f"--num_images must be at least {training.BATCH}, got {args.num_images}")
    weights = train(args.num_images).half().state_dict()
    classifier = PromptClassifier()
    classifier.load_state_dict(weights)  # what is tested is what is written
    result = accuracy(classifier.eval(), TEST_PICTURES)
    held_out = training.batches(captions.pictures, HELD_OUT_START, args.num_images)
    save_stats(args.output_dir / STATISTICS, training.statistics_of(classifier, held_out))
    metadata = {
        "kind": "PromptClassifier",
        "held_out_accuracy": result,
        "made_by": f"{PromptClassifier.command} --num_images {args.num_images}",
    }
    training.save_weights(args.output_dir / CLASSIFIER, weights, metadata)
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
