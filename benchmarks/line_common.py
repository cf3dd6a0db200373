"""Shared by the LineAR benchmarks: the bundled model, its images and scores."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from engine import cli
from engine.llamagen import LlamaGenHost
from models.gpt_images import GPTGenerator, GPTSampling
from models.llamagen import GPT
from models.vq import VQModel
from util import metrics
from util.evaluation.batches import image_seed
from util.evaluation.conditions import image_label
from util.evaluation.image_source import Pictures
from util.images import to_uint8

SELECTION = cli.named("gpt_tiny")
HOST = cast(LlamaGenHost, SELECTION.host())
REQUEST = SELECTION.request()
RECENT = int(SELECTION.defaults["line_recent"])
BUDGETS = {"1/2": 1 / 2, "1/4": 1 / 4, "1/6": 1 / 6, "1/8": 1 / 8}


def load_tiny(device: torch.device, dtype: torch.dtype) -> tuple[GPT, VQModel, str]:
    """The bundled GPT in `dtype`, its tokenizer in float32, and what names the weights."""
    loaded = HOST.load(device)
    model = loaded.model.to(dtype).requires_grad_(False)
    return cast(GPT, model), cast(VQModel, loaded.tokenizer), loaded.weights


@dataclass(frozen=True)
class Run:
    """Images of eval.py's labels and seeds: images 0 .. num_images - 1 of --seed `seed`."""

    num_images: int
    seed: int
    batch: int

    @property
    def labels(self) -> list[int]:
        return [
            image_label(i, self.num_images, HOST.images.class_num) for i in range(self.num_images)
        ]

    @property
    def seeds(self) -> list[int]:
        return [image_seed(self.seed, i) for i in range(self.num_images)]

    def images(self, model: GPT, tokenizer: VQModel, sampling: GPTSampling) -> np.ndarray:
        """uint8 (N, 64, 64, 3)."""
        generator, parts = GPTGenerator(model, tokenizer, sampling, HOST.images.img_size), []
        for start in range(0, self.num_images, self.batch):
            part = slice(start, start + self.batch)
            parts.append(to_uint8(generator.generate((self.labels[part], self.seeds[part]))))
        return np.concatenate(parts)

    def score(self, images: np.ndarray) -> dict[str, Any]:
        """fid, is_mean, is_std, accuracy of the bundled classifier."""
        return metrics.score(Pictures(images), self.num_images, REQUEST, "cpu", labels=self.labels)
