"""Scores of real images, intact and damaged: what a FID of the bundled models means.

    python -m benchmarks.tiny_references

It measures the FID of real images that are not in the statistics, the cost of the tokenizer, and which
faults the classifier's features detect. Also the spread of each latent channel over the images that the
tokenizer was fitted to. Takes a minute or two on one core.
Results: output_dir/benchmarks/tiny_references.{json,md}, or where --output says; those of the
documents are benchmarks/results/tiny_references.{json,md}.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.common import OUTPUT, Parser, origin, write_result
from engine import cli
from engine.mar import mar_host
from models.linear_tokenizer import LinearTokenizer
from util import metrics
from util.data.datasets import to_unit_range
from util.device import device_name, set_threads
from util.errors import run_main
from util.evaluation.image_source import Pictures
from util.report import markdown_table
from util.shapes import CLASSES, HELD_OUT_START, label_of, pictures, render
from util.tiny import training
from util.tiny.assets import DEFAULT_IMAGES, channel_spread, psnr, restore

SELECTION = cli.named("mar_tiny")
HOST = mar_host(SELECTION.host())
START = HELD_OUT_START + DEFAULT_IMAGES["stats"]  # behind those of the statistics
FEW = 1000  # images, as in most tables
PATCH = 4  # pixels: the tokenizer's stride
SEED = 0  # of the damage
HEAD = ("", "images", "FID", "IS", "accuracy")
Images = np.ndarray  # uint8 (N, 64, 64, 3)


def noisy(images: Images, deviation: float, random: np.random.Generator) -> Images:
    """With Gaussian noise of that many grey levels."""
    noise = random.normal(0, deviation, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def patched(images: Images, share: float, random: np.random.Generator) -> Images:
    """With that share of the 4x4 patches taken, in place, from another picture."""
    side = images.shape[1] // PATCH
    taken = random.random((len(images), side, side)) < share
    mask = taken.repeat(PATCH, axis=1).repeat(PATCH, axis=2)[..., None]
    return np.where(mask, images[random.permutation(len(images))], images)


def through(tokenizer: LinearTokenizer, images: Images) -> Images:
    """Encoded and decoded."""
    parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(100)
    restored = torch.cat([restore(tokenizer, part) for part in parts])
    return restored.permute(0, 2, 3, 1).contiguous().numpy()


def versions(
    images: Images, labels: np.ndarray, tokenizer: LinearTokenizer
) -> dict[str, tuple[Callable[[], Images], np.ndarray]]:
    """Title of a row -> what makes its pictures, their labels."""
    random = np.random.default_rng(SEED)
    kept = labels != CLASSES.index("triangle")
    few = f"as rendered, the first {min(FEW, len(images)):,}"
    return {
        "as rendered": (lambda: images, labels),
        few: (lambda: images[:FEW], labels[:FEW]),
        "through the tokenizer": (lambda: through(tokenizer, images), labels),
        "pixel noise of 10/255": (lambda: noisy(images, 10, random), labels),
        "pixel noise of 25/255": (lambda: noisy(images, 25, random), labels),
        "3% of the 4x4 patches from another picture": (
            lambda: patched(images, 0.03, random),
            labels,
        ),
        "no triangles": (lambda: images[kept], labels[kept]),
        "red and blue swapped": (lambda: images[..., ::-1].copy(), labels),
    }


def parse() -> argparse.Namespace:
    parser = Parser("tiny_references", __doc__)
    parser.number("num_images", 5000, "held-out pictures", least=100)
    return parser.read(OUTPUT / "tiny_references")


def main() -> None:
    args = parse()
    set_threads(1)
    tokenizer = LinearTokenizer.from_file(HOST.tokenizer.vae_path)
    request = SELECTION.request()
    indices = range(START, START + args.num_images)
    images = np.stack([render(index) for index in indices])
    labels = np.array([label_of(index) for index in indices])
    rows = []
    with torch.inference_mode():
        for title, (make, own) in versions(images, labels, tokenizer).items():
            score = metrics.score(Pictures(make()), len(own), request, "cpu", labels=own.tolist())
            rows.append({"name": title, "num_images": len(own), **score})
        fitted = DEFAULT_IMAGES["tokenizer"]
        parts = [to_unit_range(part) for part, _ in training.batches(pictures, 0, fitted)]
        spread = channel_spread(tokenizer, torch.cat(parts))
        quality = psnr(tokenizer)
    about = {
        **origin(),
        "pictures": f"{indices.start} .. {indices.stop - 1} of util.shapes",
        "reference": str(SELECTION.request().stats_path),
        "tokenizer_psnr_db": round(quality, 2),
        "device": device_name(torch.device("cpu")),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "seeds": f"pictures: their numbers; noise and patches: numpy's default_rng({SEED})",
        "latents": f"pictures 0 .. {fitted - 1}, times latent_scale {tokenizer.latent_scale:.5f}",
    }
    forms = {"fid": ".3f", "is_mean": ".2f", "accuracy": ".1%"}
    scores = [
        [row["name"], row["num_images"], *(format(row[key], forms[key]) for key in forms)]
        for row in rows
    ]
    columns = [[f"{x:.2f}", f"{largest:.2f}", f"{k:.1f}"] for x, largest, k in spread]
    titles = ("standard deviation", "largest", "kurtosis")
    latents = [
        [title, *cells] for title, cells in zip(titles, zip(*columns, strict=True), strict=True)
    ]
    channels = ("channel", *(str(k) for k in range(len(spread))))
    text = markdown_table(HEAD, scores) + "\n" + markdown_table(channels, latents)
    channel_rows = [dict(zip(("std", "largest", "kurtosis"), row, strict=True)) for row in spread]
    write_result(args.output, {"about": about, "rows": rows, "channels": channel_rows}, text)


if __name__ == "__main__":
    run_main(main)
