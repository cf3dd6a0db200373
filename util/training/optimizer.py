"""Learning rate and weight decay: MAR's recipe, as in its training code.

The rate rises linearly during the warm-up and then is constant or follows half a cosine; it is set
at every iteration, with the epoch as a fractional number.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from util.config import setting
from util.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    lr: float | None = setting(
        None, "peak learning rate; default blr * images per step / 256", least=0
    )
    blr: float = setting(1e-4, "base learning rate", least=0)
    min_lr: float = setting(0.0, "end of the cosine", least=0)
    lr_schedule: str = setting("constant", "after the warm-up", choices=("constant", "cosine"))
    warmup_epochs: float = setting(100.0, "length of the linear warm-up", least=0)
    weight_decay: float = setting(0.02, "weight decay", least=0)
    grad_clip: float = setting(3.0, "largest gradient norm", least=1e-6)
    ema_rate: float = setting(0.9999, "decay of the averaged weights", least=0, most=1)


@dataclass(frozen=True)
class LRSchedule:
    """Learning rate as a function of the fractional epoch."""

    peak: float
    minimum: float = 0.0
    warmup_epochs: float = 100.0
    epochs: float = 400.0
    shape: str = "constant"  # or "cosine"

    def __post_init__(self) -> None:
        if self.shape == "cosine" and self.minimum > self.peak:
            raise UserError(
                f"--min_lr {self.minimum:g} is above the peak learning rate {self.peak:.3g}, the "
                "cosine would rise: lower it, or raise --lr or --blr"
            )

    def at(self, epoch: float) -> float:
        """Rate at `epoch` (1.5 is the middle of the second epoch)."""
        if epoch < self.warmup_epochs:
            return self.peak * epoch / self.warmup_epochs
        if self.shape == "constant":
            return self.peak
        done = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-8)
        fall = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
        return self.minimum + (self.peak - self.minimum) * fall


def scaled_lr(lr: float | None, blr: float, images_per_step: int) -> float:
    """`lr` if given, else the base rate scaled linearly with the batch: blr * images / 256."""
    return blr * images_per_step / 256 if lr is None else lr


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups, first without, then with weight decay, in the order of the official checkpoints.

    No decay for vectors (biases, norms) and for the whole diffusion head.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = parameter.ndim == 1 or name.endswith(".bias")
        (no_decay if vector or "diffloss" in name else decay).append(parameter)
    return [
        {"params": no_decay, "weight_decay": 0.0},
        {"params": decay, "weight_decay": weight_decay},
    ]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.95), fused where PyTorch has a fused kernel."""
    device = next(model.parameters()).device
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda"))
