"""A small model in training, and the checkpoints that it writes."""

import argparse
from pathlib import Path

import torch
from torch import nn

from util.checkpoint import save_checkpoint
from util.training.ema import EMA


class Run:
    """A linear layer and what trains it."""

    def __init__(self, seed: int = 0, fp16: bool = False) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(3, 2)
        self.ema = EMA(self.model, 0.9)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scaler = torch.amp.GradScaler("cpu", enabled=fp16)

    def step(self) -> None:
        self.model(torch.ones(1, 3)).sum().backward()
        self.optimizer.step()

    def parts(self) -> dict:
        return {key: getattr(self, key) for key in ("model", "ema", "optimizer", "scaler")}

    def save(self, path: Path, progress: dict[str, int], **flags: object) -> None:
        """After three epochs."""
        args = argparse.Namespace(**flags)
        save_checkpoint(path, **self.parts(), epochs_done=3, args=args, progress=progress)
