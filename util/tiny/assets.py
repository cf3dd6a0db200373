"""Makes what mar_tiny is evaluated with: its tokenizer, its feature extractor, its FID statistics.

The three are small files, made once from the shapes data set in a few minutes on one core:

    python -m util.tiny.assets tokenizer
    python -m util.tiny.assets classifier
    python -m util.tiny.assets stats
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.linear_tokenizer import LinearTokenizer
from util.checkpoint import save_safetensors
from util.errors import UserError, run_main
from util.evaluation.statistics import FidStatistics, save_stats
from util.shapes import CLASSES, HELD_OUT_START, ShapesDataset
from util.tiny.classifier import ShapeClassifier

FOLDER = Path("pretrained_models/mar_tiny")
DEFAULT_IMAGES = {"tokenizer": 4000, "classifier": 20_000, "stats": 20_000}
TEST_IMAGES = 5000  # held out: for PSNR and accuracy
BATCH = 100  # images

CLASSIFIER_EPOCHS = 6
CLASSIFIER_LR = 2e-3  # peak of a one-cycle schedule
LABEL_SMOOTHING = 0.01  # keeps the logits finite: IS is 9.0, not 10, for perfect pictures
PIXEL_NOISE = 0.04  # largest deviation of the noise added in training; pixels are in [-1, 1]


def save_module(module: nn.Module, path: Path, metadata: dict[str, object]) -> None:
    """Write a module's tensors, and each value of the metadata as JSON, to a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    save_safetensors(path, module.state_dict(), texts)


def batches(start: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures start .. start + length - 1 in order, as uint8 (B, 3, 64, 64), labels (B,)."""
    loader = torch.utils.data.DataLoader(ShapesDataset(start, length), batch_size=BATCH)
    yield from tqdm(
        loader, desc=f"pictures {start}..{start + length - 1}", leave=False, disable=None
    )


def to_float(images: Tensor) -> Tensor:
    """uint8 => float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def restore(tokenizer: LinearTokenizer, images: Tensor) -> Tensor:
    """uint8 images through the tokenizer and back to uint8, as a generated picture is saved."""
    decoded = tokenizer.decode(tokenizer.encode(to_float(images)).mode())
    return ((decoded + 1) * 127.5).round().clamp(0, 255).byte()


def psnr(tokenizer: LinearTokenizer) -> float:
    """Peak signal-to-noise ratio of the tokenizer over all pixels of the test pictures, in dB."""
    errors = [
        (restore(tokenizer, images).double() - images.double()).square().mean().item()
        for images, _ in batches(HELD_OUT_START, TEST_IMAGES)
    ]
    return float(10 * np.log10(255**2 / np.mean(errors)))


def accuracy(classifier: ShapeClassifier, tokenizer: LinearTokenizer | None) -> float:
    """Share of the test pictures that are named rightly, raw or through a tokenizer."""
    right = 0
    for images, labels in batches(HELD_OUT_START, TEST_IMAGES):
        images = images if tokenizer is None else restore(tokenizer, images)
        right += (classifier(images)[1].argmax(1) == labels).sum().item()
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
    images = torch.cat([to_float(images) for images, _ in batches(0, num_images)])
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
    save_module(tokenizer, folder / "tokenizer.safetensors", metadata)
    return metadata


def make_classifier(folder: Path, num_images: int) -> dict[str, object]:
    """Train the classifier and write classifier.safetensors.

    Half of the pictures pass the tokenizer first, and all get pixel noise, so that its features
    measure the shapes rather than the tokenizer's fingerprint.
    """
    tokenizer = load_tokenizer(folder / "tokenizer.safetensors")
    data = list(batches(0, num_images))
    images, labels = (torch.cat(part) for part in zip(*data, strict=True))
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # the initial weights
    classifier = ShapeClassifier()
    steps = CLASSIFIER_EPOCHS * -(-num_images // BATCH)
    optimizer = torch.optim.AdamW(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, CLASSIFIER_LR, total_steps=steps)
    progress = tqdm(total=steps, desc="training", disable=None)
    for _ in range(CLASSIFIER_EPOCHS):
        for rows in torch.randperm(num_images, generator=random).split(BATCH):
            batch, half = images[rows], len(rows) // 2
            batch = torch.cat([batch[:half], restore(tokenizer, batch[half:])])
            strength = PIXEL_NOISE * torch.rand(len(rows), 1, 1, 1, generator=random)
            noise = torch.randn(batch.shape, generator=random)
            logits = classifier(to_float(batch) + strength * noise)[1]
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    progress.close()
    with torch.inference_mode():
        _normalise(classifier, images)
        metadata = {
            "kind": "ShapeClassifier",
            "held_out_accuracy": accuracy(classifier, None),
            "held_out_accuracy_through_tokenizer": accuracy(classifier, tokenizer),
            "made_by": f"python -m util.tiny.assets classifier --num_images {num_images}",
        }
    save_module(classifier, folder / "classifier.safetensors", metadata)
    return metadata


def _normalise(classifier: ShapeClassifier, images: Tensor) -> None:
    """Scale the features to a mean variance of 1 over the images; the logits stay the same.

    FID then is in units that mean something: the last ReLU lets a factor through.
    """
    features = torch.cat([classifier(batch)[0] for batch in images.split(BATCH)])
    factor = features.var(0).mean().rsqrt()
    last = classifier.trunk[-2]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    last.weight.mul_(factor)
    last.bias.mul_(factor)
    classifier.head.weight.div_(factor)


@torch.inference_mode()
def make_stats(folder: Path, num_images: int) -> dict[str, object]:
    """Write fid_stats.npz: mean (64,) and covariance (64, 64) of held-out features, float64."""
    if num_images % len(CLASSES):
        raise UserError(
            f"--num_images must be a multiple of {len(CLASSES)}, so that every class counts "
            f"the same, got {num_images}"
        )
    classifier = ShapeClassifier.from_file(folder / "classifier.safetensors")
    data = [classifier(images)[0] for images, _ in batches(HELD_OUT_START, num_images)]
    features = torch.cat(data).double().numpy()  # (N, 64)
    statistics = FidStatistics(features.mean(0), np.cov(features, rowvar=False))
    save_stats(folder / "fid_stats.npz", statistics)
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
    if num_images < BATCH:
        raise UserError(f"--num_images must be at least {BATCH}, got {num_images}")
    print(json.dumps(MAKERS[args.asset](args.output_dir, num_images)))


if __name__ == "__main__":
    run_main(main)
