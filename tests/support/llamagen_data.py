"""The recorded runs of the published LlamaGen, and the model that made them."""

import json
from functools import cache

import torch

from models.llamagen import GPT
from tests.support.golden_data import GOLDEN
from tests.support.golden_recipe import recipe_state_dict


def recipe_gpt(**kwargs: object) -> GPT:
    """A GPT of any geometry with recipe weights, in evaluation mode."""
    model = GPT(**kwargs).eval().requires_grad_(False)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    model.load_state_dict(recipe_state_dict(shapes, llamagen=True))
    return model


@cache
def golden_gpt() -> GPT:
    return recipe_gpt(**json.loads((GOLDEN / "llamagen_config.json").read_text()))


def small_gpt(grid: tuple[int, int], **kwargs: object) -> GPT:
    """Two layers of two heads, for grids of any form."""
    small = {"dim": 32, "n_layer": 2, "n_head": 2, "num_classes": 5, "vocab_size": 64}
    return recipe_gpt(**{**small, "block_size": grid[0] * grid[1], "grid": grid, **kwargs})


def random_codes(model: GPT, batch: int, seed: int = 0) -> torch.Tensor:
    """All codes of an image but the last, which is never fed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.vocab_size, (batch, model.block_size - 1), generator=generator)
