"""Training steps and epochs of any model, and the state of a run.

The noise of a step is seeded by (seed, step) and drawn for all its images, so a stopped run continues
with the same numbers, and the loss curve does not depend on the number of processes or accumulated
batches (except for dropout). No state of a random generator has to be kept.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from util.device import autocast
from util.errors import UserError
from util.training.ema import EMA
from util.training.optimizer import LRSchedule

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
    is_updating: bool = False  # weights, averages and optimizer are of different steps

    @property
    def is_sound(self) -> bool:
        """Whether a checkpoint of it would be worth resuming."""
        return not self.is_updating and self.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW


@dataclass(frozen=True)
class StepConfig:
    """Settings of a training step."""

    schedule: LRSchedule
    grad_clip: float
    seed: int
    rank: int
    device: torch.device
    dtype: torch.dtype
    accum_iter: int = 1  # batches of this process in a step


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm are scalars on the device: reading them may wait for it."""

    loss: Tensor
    grad_norm: Tensor
    lr: float


class StepNoise(Protocol):
    """Random draws of all images of a step; `latents` samples latents from a posterior."""

    @property
    def latents(self) -> Tensor: ...

    def part(self, start: int, stop: int) -> "StepNoise":
        """The draws of images start..stop."""


def step_seed(*numbers: int) -> int:
    """A seed from (seed, step) for the noise of a step, or (seed, step, rank) for dropout."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def train_step(
    state: TrainState, batches: Iterable[tuple], lr: float, config: StepConfig
) -> StepResult:
    """One step of AdamW and EMA on config.accum_iter batches, skipped if a gradient is not finite.

    A batch is the arguments of the model, which returns its mean loss; batches are of one size.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    losses = []
    with attention_for_training(config.device):  # backward too: checkpointing recomputes there
        for i, batch in enumerate(batches):
            with _gradients_exchanged(state.wrapped, i == config.accum_iter - 1):
                with autocast(config.device, config.dtype):
                    loss = state.wrapped(*batch) / config.accum_iter
                state.scaler.scale(loss).backward()
            losses.append(loss.detach())
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
    # A bad loss makes bad gradients, and gradients, being averaged, are bad in all processes alike.
    if torch.isfinite(norm):
        state.is_updating = True
        state.scaler.step(state.optimizer)
        state.ema.update(state.model)
        state.skipped_in_a_row = 0
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.is_updating = False
    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise UserError(
            f"{MAX_SKIPPED_IN_A_ROW} steps in a row without a finite loss, up to {state.step}: "
            "resume from the last checkpoint with a lower --blr or with --dtype bf16 or float32"
        )
    return StepResult(torch.stack(losses).sum(), norm.detach(), lr)


def _gradients_exchanged(wrapped: nn.Module, wanted: bool) -> AbstractContextManager:
    """Processes exchange gradients once per step, after the last of the accumulated batches."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not wanted:
        return wrapped.no_sync()
    return nullcontext()


@contextmanager
def attention_for_training(device: torch.device) -> Iterator[None]:
    """On CPUs, compute scaled_dot_product_attention as matrix products in the inputs' precision.

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
    to_latents: Callable[[Tensor, Tensor], Tensor],
    draw: Callable[[int], StepNoise],
    config: StepConfig,
    after_step: Callable[[StepResult, int], bool],
) -> bool:
    """Train from `first_step` to the end of an epoch.

    Args:
        state: changed in place.
        batches: (images or moments, labels) of the steps from `first_step` on, on any device;
            config.accum_iter of them make a step of this process.
        to_latents: turns a batch on the device and its noise into scaled latents (B, C, h, w).
        draw: the noise of all images of a step, in all processes, from a seed.
        after_step: called with the result and the number of steps done in this epoch; True stops.

    Returns:
        True if the epoch was stopped before its end.
    """
    state.wrapped.train()
    source = iter(batches)
    for done in range(first_step, steps_per_epoch):
        batches_of_step = list(islice(source, config.accum_iter))  # loaders draw random numbers
        torch.manual_seed(step_seed(config.seed, state.step, config.rank))  # dropout
        noise = draw(step_seed(config.seed, state.step))
        lr = config.schedule.at(epoch + done / steps_per_epoch)
        parts = _parts_of_step(batches_of_step, noise, to_latents, config)
        result = train_step(state, parts, lr, config)
        if after_step(result, done + 1):
            return done + 1 < steps_per_epoch
    return False


def _parts_of_step(
    batches: Sequence[tuple[Tensor, Tensor]],
    noise: StepNoise,
    to_latents: Callable[[Tensor, Tensor], Tensor],
    config: StepConfig,
) -> Iterator[tuple[Tensor, Tensor, StepNoise]]:
    """This process's share of a step: latents, labels and noise, batch by batch."""
    for i, (data, labels) in enumerate(batches):
        start = (config.rank * config.accum_iter + i) * len(labels)
        part = noise.part(start, start + len(labels))
        data = data.to(config.device, non_blocking=True)
        yield (to_latents(data, part.latents), labels.to(config.device, non_blocking=True), part)
