"""Patch Frechet distance of runs on the shapes data set: texture and seams, beside the FID."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.fid_difference import labels_of
from benchmarks.measures import FidDifference, paired_fid, patch_gaussian, patches
from util.data.datasets import to_unit_range
from util.evaluation.image_source import image_batches, open_source
from util.shapes import HELD_OUT_START, pictures

PICTURES = 3000  # held out, of the reference
RESAMPLES = 200
BATCH = 100
Json = dict[str, Any]


class PatchDistance:
    """Compares 3x3 windows of the latents of a run's images with those of held-out pictures.

    Images are encoded without the tokenizer's noise. Its latents are a linear function of the pixels.
    """

    def __init__(self, tokenizer: Any, scale: float, base: Json) -> None:
        """scale: factor from the tokenizer's latents to the model's. base: the run to compare with."""
        self.tokenizer, self.scale = tokenizer, scale
        starts = range(HELD_OUT_START, HELD_OUT_START + PICTURES, BATCH)
        self.reference = patch_gaussian(
            torch.cat([self.encode(pictures(i, BATCH)) for i in starts])
        )
        self.base, self.labels = self.windows(base), labels_of([base])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 => latents (B, C, h, w)."""
        device = next(self.tokenizer.parameters()).device
        return (self.tokenizer.encode(to_unit_range(images.to(device))).mode() * self.scale).cpu()

    def windows(self, run: Json) -> Tensor:
        """Of all images of a run, (N, windows, d) float64."""
        source = open_source(run["path"] / "images", run["num_images"])
        latents = [self.encode(images) for _, images in image_batches(source, BATCH)]
        return patches(torch.cat(latents).double())

    def compare(self, run: Json) -> FidDifference:
        """Distances of the base and of a run of its seeds; the bootstrap resamples whole images."""
        first, second = (x.flatten(0, 1).numpy() for x in (self.base, self.windows(run)))
        per_image = self.base.shape[1]
        return paired_fid(
            first,
            second,
            self.reference,
            RESAMPLES,
            rows_per_image=per_image,
            labels=self.labels,
        )
