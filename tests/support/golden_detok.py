"""The recorded runs of l-DeTok's MAR and tokenizer, and their models with the recorded weights."""

import json
from functools import cache

import numpy as np
import torch

from models.detok import DeTok
from models.mar import MAR
from models.noise import ImageNoise
from tests.support.golden_data import load_npz

FILE = "detok.npz"
# l-DeTok's names of what ours calls otherwise
NAMES = {
    "tokenizer_patch_size": "vae_stride",
    "token_channels": "vae_embed_dim",
    "num_classes": "class_num",
}
FIXED = ("noise_schedule", "force_one_d_seq")  # nothing else than ours


@cache
def recorded() -> dict[str, torch.Tensor]:
    """Everything but the two JSON strings."""
    arrays = {key: value for key, value in load_npz(FILE).items() if value.dtype.kind != "U"}
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def config(name: str) -> dict:
    return json.loads(str(load_npz(FILE)[name]))


def weights(part: str) -> dict[str, torch.Tensor]:
    """Recorded weights of "mar" or "tok", in the order of l-DeTok's named_parameters."""
    start = f"{part}/"
    return {k.removeprefix(start): v for k, v in recorded().items() if k.startswith(start)}


def mar_config() -> dict:
    theirs = {k: v for k, v in config("mar_config").items() if k not in FIXED}
    size = {short: theirs.pop(short) for short in ("width", "layers", "heads")}
    for part in ("encoder", "decoder"):
        theirs[f"{part}_embed_dim"] = size["width"]
        theirs[f"{part}_depth"] = size["layers"]
        theirs[f"{part}_num_heads"] = size["heads"]
    return {NAMES.get(name, name): value for name, value in theirs.items()}


@cache
def detok_mar(num_sampling_steps: str = "ddim100") -> MAR:
    model = MAR(**{**mar_config(), "num_sampling_steps": num_sampling_steps})
    model.load_state_dict(weights("mar"))
    return model.eval()


def tokenizer() -> DeTok:
    model = DeTok(**config("tok_config")).eval().requires_grad_(False)
    model.load_state_dict(weights("tok"))
    return model


@cache
def detok_noise() -> ImageNoise:
    """Orders and noise as recorded: one RandomState draws both orders, then all noise."""
    data = recorded()
    stream = np.random.RandomState(int(data["noise_seed"]))
    orders = np.stack([stream.permutation(64) for _ in range(2)])
    head = stream.standard_normal((2, 64, 101, 16)).astype(np.float32)
    assert (orders == data["orders"].numpy()).all()
    assert (head[0, 0, :2] == data["noise_first"].numpy()).all()
    assert (head[-1, -1, -1] == data["noise_last"].numpy()).all()
    return ImageNoise(torch.from_numpy(orders), torch.from_numpy(head))
