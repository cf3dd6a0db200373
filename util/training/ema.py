"""Exponential moving average of the weights: what evaluation uses.

MAR is evaluated with its averaged weights, never with those of the last step; the average is kept
by parameter name, so that it can be written and read without relying on any order.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """`average = rate * average + (1 - rate) * weight` for every parameter, in one fused call."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.names = [name for name, _ in model.named_parameters()]
        self.averages = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards the weights of `model`, the one of the constructor."""
        weights = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(self.averages, weights, 1.0 - self.rate)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name (no copies)."""
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Overwrite the averages. A missing name is a KeyError; names of buffers are ignored."""
        for name, average in self.state_dict().items():
            average.copy_(weights[name])

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Inside the block `model` computes with the averages; afterwards its weights are back."""
        parameters = list(model.parameters())
        trained = [p.data for p in parameters]
        try:
            for p, average in zip(parameters, self.averages, strict=True):
                p.data = average
            yield
        finally:
            for p, weight in zip(parameters, trained, strict=True):
                p.data = weight
