"""Makes the tokenizer of mar_tiny, its feature extractor and its FID statistics.

All three are small files, made once from the shapes data set in a few minutes on one core:

    python -m util.tiny.assets tokenizer
    python -m util.tiny.assets classifier
    python -m util.tiny.assets stats
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.linear_tokenizer import LinearTokenizer
from util.data.datasets import to_unit_range
from util.errors import UserError, run_main
from util.evaluation.statistics import save_stats
from util.images import to_bytes
from util.shapes import CLASSES, HELD_OUT_START, label_of, pictures
from util.tiny import training
from util.tiny.classifier import ShapeClassifier

FOLDER = Path("pretrained_models/mar_tiny")
DEFAULT_IMAGES = {"tokenizer": 4000, "classifier": 20_000, "stats": 20_000}
TEST_IMAGES = 5000  # held out: for PSNR and accuracy

CLASSIFIER_EPOCHS = 6
CLASSIFIER_LR = 2e-3  # peak of a one-cycle schedule
LABEL_SMOOTHING = 0.01  # keeps the logits finite: IS is 9.0, not 10, for perfect pictures
PIXEL_NOISE = 0.04  # largest deviation of the noise added in training; pixels are in [-1, 1]


def restore(tokenizer: LinearTokenizer, images: Tensor) -> Tensor:
    """uint8 images encoded and decoded, as uint8 like a saved image."""
    return to_bytes(tokenizer.decode(tokenizer.encode(to_unit_range(images)).mode()))


def psnr(tokenizer: LinearTokenizer) -> float:
    """Peak signal-to-noise ratio of the tokenizer over all pixels of the test pictures, in dB."""
    errors = [
        (restore(tokenizer, images).double() - images.double()).square().mean().item()
        for images, _ in training.batches(pictures, HELD_OUT_START, TEST_IMAGES)
    ]
    return float(10 * np.log10(255**2 / np.mean(errors)))


def accuracy(classifier: ShapeClassifier, tokenizer: LinearTokenizer | None) -> float:
    """Share of the test pictures that are classified correctly, raw or through a tokenizer."""
    right = 0
    for images, indices in training.batches(pictures, HELD_OUT_START, TEST_IMAGES):
        images = images if tokenizer is None else restore(tokenizer, images)
        found = classifier(images)[1].argmax(1).tolist()
        right += sum(label == label_of(i) for label, i in zip(found, indices, strict=True))
    return right / TEST_IMAGES


def load_tokenizer(path: Path) -> LinearTokenizer:
    try:
        return LinearTokenizer.from_file(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{error}; make it with `python -m util.tiny.assets tokenizer`") from error


def channel_spread(tokenizer: LinearTokenizer, images: Tensor) -> list[list[float]]:
    """Standard deviation, largest magnitude and kurtosis of each channel of the scaled latents.

    images: (N, 3, H, W) in [-1, 1].
    """
    latents = tokenizer.encode(images).mode() * tokenizer.latent_scale  # (N, C, h, w)
    kurtosis = latents.pow(4).mean((0, 2, 3)) / latents.square().mean((0, 2, 3)).square()
    spread = latents.std((0, 2, 3)), latents.abs().amax((0, 2, 3)), kurtosis
    return torch.stack(spread, dim=1).tolist()


@torch.inference_mode()
def make_tokenizer(folder: Path, num_images: int) -> dict[str, object]:
    """Fit the tokenizer, print a table of its channels and write tokenizer.safetensors."""
    drawn = training.batches(pictures, 0, num_images)
    images = torch.cat([to_unit_range(images) for images, _ in drawn])
    tokenizer = LinearTokenizer.fit(images)
    print("channel   std  largest  kurtosis   (of the latents times latent_scale)")
    for k, (std, largest, kurtosis) in enumerate(channel_spread(tokenizer, images)):
        print(f"{k:7d} {std:5.2f} {largest:8.2f} {kurtosis:9.1f}")
    metadata = {
        "kind": "LinearTokenizer",
        "channels": tokenizer.channels,
        "stride": tokenizer.stride,
        "latent_scale": tokenizer.latent_scale,
        "held_out_psnr_db": round(psnr(tokenizer), 2),
        "made_by": f"python -m util.tiny.assets tokenizer --num_images {num_images}",
    }
    training.save_weights(folder / "tokenizer.safetensors", tokenizer.state_dict(), metadata)
    return metadata


def make_classifier(folder: Path, num_images: int) -> dict[str, object]:
    """Train the classifier and write classifier.safetensors.

    Half of the pictures pass the tokenizer first, and all get pixel noise, so that the features measure
    the shapes rather than artefacts of the tokenizer.
    """
    tokenizer = load_tokenizer(folder / "tokenizer.safetensors")
    images = torch.cat([images for images, _ in training.batches(pictures, 0, num_images)])
    labels = torch.tensor([label_of(i) for i in range(num_images)])
    torch.manual_seed(0)  # the initial weights
    classifier = ShapeClassifier()

    def loss_of(indices: Tensor, random: torch.Generator) -> Tensor:
        batch, half = images[indices], len(indices) // 2
        batch = torch.cat([batch[:half], restore(tokenizer, batch[half:])])
        logits = classifier(training.with_noise(to_unit_range(batch), PIXEL_NOISE, random))[1]
        return F.cross_entropy(logits, labels[indices], label_smoothing=LABEL_SMOOTHING)

    training.fit_classifier(classifier, num_images, CLASSIFIER_EPOCHS, CLASSIFIER_LR, loss_of)
    training.normalise(classifier, images)
    with torch.inference_mode():
        metadata = {
            "kind": "ShapeClassifier",
            "held_out_accuracy": accuracy(classifier, None),
            "held_out_accuracy_through_tokenizer": accuracy(classifier, tokenizer),
            "made_by": f"{ShapeClassifier.command} --num_images {num_images}",
        }
    training.save_weights(folder / "classifier.safetensors", classifier.state_dict(), metadata)
    return metadata


def make_stats(folder: Path, num_images: int) -> dict[str, object]:
    """Write fid_stats.npz: mean (64,) and covariance (64, 64) of held-out features, float64."""
    if num_images % len(CLASSES):
        raise UserError(
            f"--num_images must be a multiple of {len(CLASSES)}, so that every class counts "
            f"the same, got {num_images}"
        )
    classifier = ShapeClassifier.from_file(folder / "classifier.safetensors")
    held_out = training.batches(pictures, HELD_OUT_START, num_images)
    save_stats(folder / "fid_stats.npz", training.statistics_of(classifier, held_out))
    return {"made_by": f"python -m util.tiny.assets stats --num_images {num_images}"}


MAKERS = {"tokenizer": make_tokenizer, "classifier": make_classifier, "stats": make_stats}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m util.tiny.assets",
        description="Make the tokenizer, the shape classifier or the FID statistics of mar_tiny.",
    )
    parser.add_argument("asset", choices=MAKERS)
    parser.add_argument("--output_dir", type=Path, default=FOLDER)
    parser.add_argument("--num_images", type=int, help="default: tokenizer 4000, others 20000")
    args = parser.parse_args()
    num_images = DEFAULT_IMAGES[args.asset] if args.num_images is None else args.num_images
    if num_images < training.BATCH:
        raise UserError(f"--num_images must be at least {training.BATCH}, got {num_images}")
    print(json.dumps(MAKERS[args.asset](args.output_dir, num_images)))


if __name__ == "__main__":
    run_main(main)
