"""Training without a word about the model: one step, one epoch, and the state of a run.

Every training step is seeded by (seed, step, rank), so a run that was stopped anywhere goes on with
the very same numbers, and no state of a random generator has to be kept.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from util.device import autocast
from util.ema import EMA
from util.errors import UserError
from util.lr import LRSchedule

MAX_SKIPPED_IN_A_ROW = 20  # a few bad batches heal themselves; this many do not


@dataclass
class TrainState:
    """A run at one moment; `wrapped` is what training calls: the model, or a DDP around it."""

    model: nn.Module
    wrapped: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # steps since the beginning of the run
    skipped: int = 0  # steps without a finite gradient, in all
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class StepConfig:
    """What a training step is made of besides the model and the batch."""

    schedule: LRSchedule
    grad_clip: float
    seed: int
    rank: int
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm are scalars on the device: reading them may wait for it."""

    loss: Tensor
    grad_norm: Tensor
    lr: float


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch, numpy and python for one step of one process."""
    word = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint32)[0])
    torch.manual_seed(word)
    np.random.seed(word)
    random.seed(word)


def train_step(
    state: TrainState, latents: Tensor, labels: Tensor, lr: float, config: StepConfig
) -> StepResult:
    """One step of AdamW and EMA on latents (B, C, h, w), skipped if a gradient is not finite."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    with attention_for_training(config.device):  # backward too: checkpointing recomputes there
        with autocast(config.device, config.dtype):
            loss = state.wrapped(latents, labels)
        state.scaler.scale(loss).backward()
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
    # A bad loss makes bad gradients, and gradients, being averaged, are bad in all processes alike.
    if torch.isfinite(norm):
        state.scaler.step(state.optimizer)
        state.ema.update(state.model)
        state.skipped_in_a_row = 0
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise UserError(
            f"{MAX_SKIPPED_IN_A_ROW} steps in a row without a finite loss, up to {state.step}: "
            "resume from the last checkpoint with a lower --blr or with --dtype bf16 or float32"
        )
    return StepResult(loss.detach(), norm.detach(), lr)


@contextmanager
def attention_for_training(device: torch.device) -> Iterator[None]:
    """On CPUs, let scaled_dot_product_attention be plain matrix products in the inputs' precision.

    Forward and backward of 140 tokens in bf16 took a third of the fused kernel's time.
    """
    if device.type != "cpu":
        yield
        return
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


def train_one_epoch(
    state: TrainState,
    batches: Iterable[tuple[Tensor, Tensor]],
    epoch: int,
    first_step: int,
    steps_per_epoch: int,
    to_latents: Callable[[Tensor], Tensor],
    config: StepConfig,
    after_step: Callable[[StepResult, int], bool],
) -> bool:
    """Train from `first_step` to the end of an epoch.

    Args:
        state: changed in place.
        batches: (images or moments, labels) of the steps from `first_step` on, on any device.
        to_latents: turns a batch on the device into scaled latents (B, C, h, w).
        after_step: called with the result and the number of steps done in this epoch; True stops.

    Returns:
        True if the epoch was stopped before its end.
    """
    state.wrapped.train()
    for done, (data, labels) in enumerate(batches, start=first_step):
        seed_step(config.seed, state.step, config.rank)
        latents = to_latents(data.to(config.device, non_blocking=True))
        lr = config.schedule.at(epoch + done / steps_per_epoch)
        labels = labels.to(config.device, non_blocking=True)
        result = train_step(state, latents, labels, lr, config)
        if after_step(result, done + 1):
            return done + 1 < steps_per_epoch
    return False
