"""The recorded runs of the published implementations, and the model that made them."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from models.mar import MAR
from models.noise import ImageNoise

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = pytest.mark.parametrize(
    ("file", "key"),
    [("mar.npz", "mar_T64_cfg3_linear"), ("lazymar.npz", "lazy_T64_cfg3_linear")],
    ids=["mar", "lazymar"],
)


def load_npz(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as file:
        return {key: file[key] for key in file.files}


@cache
def golden(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in load_npz(name).items()}


@cache
def golden_model(num_sampling_steps: str = "ddim100") -> MAR:
    config = json.loads((GOLDEN / "config.json").read_text())
    model = MAR(**{**config, "num_sampling_steps": num_sampling_steps})
    weights = {k: torch.from_numpy(v).float() for k, v in load_npz("weights.npz").items()}
    model.load_state_dict(weights, strict=True)
    return model.eval()


@cache
def golden_noise(name: str) -> tuple[ImageNoise, torch.Tensor]:
    """Orders, noise and labels as recorded: one RandomState draws all orders, then all noise."""
    data = golden(name)
    stream = np.random.RandomState(int(data["seed"]))
    orders = np.stack([stream.permutation(256) for _ in range(2)])
    head = stream.standard_normal((2, 256, 101, 16)).astype(np.float32)
    labels = torch.from_numpy(stream.randint(0, 10, 2))
    assert (orders == data["orders"].numpy()).all()
    assert (labels == data["labels"]).all()
    assert (head[0, 0, :2] == data["noise_first"].numpy()).all()
    assert (head[-1, -1, -1] == data["noise_last"].numpy()).all()
    return ImageNoise(torch.from_numpy(orders), torch.from_numpy(head)), labels


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN counts as infinite."""
    error = (out.double() - reference.double()).norm() / reference.double().norm()
    return float("inf") if error.isnan() else error.item()
