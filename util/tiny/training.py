"""Shared by the trainings of the bundled models: checkpoints, weight files, the classifiers' loop."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from util.errors import UserError
from util.evaluation.statistics import FidStatistics
from util.files import atomic_path
from util.tiny.classifier import TinyClassifier
from util.weights import read_pickle, save_safetensors

BATCH = 100  # images of a classifier's step


def batches(
    draw: Callable[[int, int], Tensor], start: int, count: int
) -> Iterator[tuple[Tensor, range]]:
    """Pictures start .. start + count - 1 in order, as draw(first, size) makes them, with their indices."""
    stop, desc = start + count, f"pictures {start}..{start + count - 1}"
    for first in tqdm(range(start, stop, BATCH), desc=desc, leave=False, disable=None):
        indices = range(first, min(first + BATCH, stop))
        yield draw(first, len(indices)), indices


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **rest: object
) -> None:
    """Write a checkpoint atomically, `rest` beside the states of model and optimizer."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **rest}
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *rest: str
) -> dict[str, Any]:
    """Restore what save_checkpoint wrote and return the entries `rest`; {} if there is no file.

    UserError for a damaged file, or one of another training.
    """
    if not path.exists():
        return {}
    state: dict[str, Any] = read_pickle(path, mmap=False)
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return {name: state[name] for name in rest}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is of another training ({reason}): delete it") from error


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write tensors, and each value of the metadata as JSON, to a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors(path, weights, {key: json.dumps(value) for key, value in metadata.items()})


def fit_classifier(
    classifier: TinyClassifier,
    count: int,
    epochs: int,
    peak_lr: float,
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
) -> None:
    """Train with a one-cycle schedule; loss_of(indices (BATCH,), random numbers) -> scalar."""
    random = torch.Generator().manual_seed(0)
    steps = epochs * -(-count // BATCH)
    optimizer = torch.optim.AdamW(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=steps)
    with tqdm(total=steps, desc="training", disable=None) as progress:
        for _ in range(epochs):
            for indices in torch.randperm(count, generator=random).split(BATCH):
                loss = loss_of(indices, random)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
                progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def with_noise(images: Tensor, most: float, random: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) plus Gaussian noise whose deviation is drawn from 0 to `most` for each."""
    strength = most * torch.rand(len(images), 1, 1, 1, generator=random)
    return images + strength * torch.randn(images.shape, generator=random)


@torch.no_grad()
def normalise(classifier: TinyClassifier, images: Tensor) -> None:
    """Scale the features to a mean variance of 1 over the images; the logits stay the same.

    It gives FID a meaningful unit. The last ReLU does not change a positive factor.
    """
    features = torch.cat([classifier(batch)[0] for batch in images.split(BATCH)])
    factor = features.var(0).mean().rsqrt()
    weights = classifier.state_dict()
    weights["trunk.6.weight"].mul_(factor)
    weights["trunk.6.bias"].mul_(factor)
    weights[f"{classifier.reader}.weight"].div_(factor)


@torch.no_grad()
def statistics_of(
    classifier: TinyClassifier, pictures: Iterable[tuple[Tensor, range]]
) -> FidStatistics:
    """Mean (64,) and covariance (64, 64) of the features of `batches`, float64."""
    features = torch.cat([classifier(images)[0] for images, _ in pictures]).double().numpy()
    return FidStatistics(features.mean(0), np.cov(features, rowvar=False))
