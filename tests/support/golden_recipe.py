"""Weights from a recipe: every machine computes them from key and shape, so no file carries them.

Golden numbers in tests/golden/ that are said to use recipe weights were recorded with these.
state_dicts.json there holds the keys and shapes of the published checkpoints.
"""

import json
import math
import zlib

import numpy as np
import torch
from torch import Tensor

from tests.support.golden_data import GOLDEN


def recipe_state_dict(
    shapes: dict[str, tuple[int, ...]], llamagen: bool = False
) -> dict[str, Tensor]:
    """float32 weights, each drawn from a generator that is seeded with the CRC-32 of its key.

    One-dimensional weights are near 1, other one-dimensional tensors near 0; matrices and kernels
    have variance 1 / fan-in. llamagen: embeddings have deviation 0.5, output.weight twice its own.
    """
    state_dict = {}
    for key, shape in shapes.items():
        normal = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape))
        if llamagen and len(shape) > 1 and "embed" in key:
            values = 0.5 * normal
        elif llamagen and len(shape) > 1 and "output.weight" in key:
            values = 2 * normal / math.sqrt(shape[-1])
        elif len(shape) > 1:
            values = normal / math.sqrt(math.prod(shape[1:]))
        else:
            values = 1 + 0.1 * normal if key.endswith("weight") else 0.05 * normal
        state_dict[key] = torch.from_numpy(values.astype(np.float32))
    return state_dict


def load_shapes(name: str, file: str = "state_dicts.json") -> dict[str, tuple[int, ...]]:
    """Keys and shapes, in file order, of mar_base, mar_large, mar_huge or vae_kl16; of GPT-B,
    GPT-L, GPT-XL, GPT-XXL or VQ-16 with the file llamagen_state_dicts.json.
    """
    shapes = json.loads((GOLDEN / file).read_text())[name]
    return {key: tuple(shape) for key, shape in shapes.items()}
