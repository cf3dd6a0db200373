"""Logging, checkpoints and graceful shutdown of a training run."""

import argparse
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from util import checkpoint, dist
from util.data.datasets import BatchPlan
from util.images import save_png, side_by_side_sheet
from util.training import step as training
from util.training.config import TrainConfig
from util.training.log import RunLog
from util.training.signals import StopRequest
from util.weights import LAST


def memory_gb(device: torch.device) -> float:
    """Peak memory in 10^9 bytes: of the tensors on a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, else kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class TrainingMonitor:
    """After every step: log, save, stop. A context manager; leaving it closes the log."""

    def __init__(
        self,
        config: TrainConfig,
        arguments: Mapping[str, object],
        state: training.TrainState,
        plan: BatchPlan,
        world: dist.World,
        stop_request: StopRequest,
    ) -> None:
        """arguments: flags of the command, which checkpoints hold as the original's do."""
        self.config, self.arguments = config, arguments
        self.state, self.plan, self.world = state, plan, world
        self.stop_request, self.must_stop = stop_request, False
        self.log = None
        if world.is_main:
            self.log = RunLog(config.output_dir, config.log_dir or config.output_dir, state.step)
        self.losses: list[Tensor] = []
        self.logged = self.saved = time.monotonic()
        self.saved_step: int | None = None
        self.first_step, self.epoch_began = state.step, state.step
        self.epoch, self.bar = 0, None

    def __enter__(self) -> "TrainingMonitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None and issubclass(kind, Exception)
        if failed and self.state.step > self.first_step and self.state.is_sound:
            with suppress(Exception):  # the user must see the first error
                self.save(*self._next_step())
        if self.bar is not None:
            self.bar.close()
        if self.log:
            self.log.close()
        if failed and self.saved_step is not None:
            print(
                f"note: {self.config.output_dir} holds the run up to step {self.saved_step}; "
                f"continue with --resume {self.config.output_dir}",
                file=sys.stderr,
            )

    def begin(self, epoch: int, first_step: int) -> None:
        self.epoch, self.epoch_began = epoch, self.state.step - first_step
        if self.bar is not None:
            self.bar.close()
        if self.world.is_main and sys.stderr.isatty():
            title = f"epoch {epoch}"
            self.bar = tqdm(total=self.plan.steps, initial=first_step, desc=title, unit="step")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block does not count for images/s."""
        began = time.monotonic()
        yield
        self.logged += time.monotonic() - began

    @contextmanager
    def optional_evaluation(self, epoch: int, rendezvous: dist.Rendezvous) -> Iterator[None]:
        """An evaluation whose failure is only noted, so that it does not end the training."""
        with self.paused():
            try:
                with rendezvous.attempt():
                    yield
            except Exception as error:
                if self.world.is_main:
                    print(
                        f"note: evaluation after epoch {epoch} failed ({dist.reason_of(error)}); "
                        "training continues",
                        file=sys.stderr,
                        flush=True,
                    )

    def save(self, epoch: int, step_in_epoch: int) -> None:
        """Write checkpoint-last.pth; (epoch, step_in_epoch) is the next step to take."""
        self.saved = time.monotonic()
        if not self.world.is_main:
            return
        with self.paused():
            checkpoint.save_checkpoint(
                Path(self.config.output_dir) / LAST,
                model=self.state.model,
                ema=self.state.ema,
                optimizer=self.state.optimizer,
                scaler=self.state.scaler,
                epochs_done=epoch,
                args=argparse.Namespace(**self.arguments),
                progress={
                    "step_in_epoch": step_in_epoch,
                    "step": self.state.step,
                    "images_per_step": self.plan.images_per_step,
                    "images": self.plan.item_count,
                    "skipped": self.state.skipped,
                },
            )
        self.saved_step = self.state.step

    def after_step(self, result: training.StepResult, done: int) -> bool:
        """Called by train_one_epoch after `done` steps of this epoch; True ends the run."""
        config, state = self.config, self.state
        if self.bar is not None:
            self.bar.update()
        self.losses.append(result.loss)
        if state.step % config.log_freq == 0:
            self._write_log(result, done)
        asked = dist.any_rank(self.stop_request.requested, self.world, result.loss.device)
        self.must_stop = asked or (config.max_steps is not None and state.step >= config.max_steps)
        late = config.save_minutes and time.monotonic() - self.saved > 60 * config.save_minutes
        if self.must_stop or late:
            self.save(*self._next_step())
        if self.must_stop and self.world.is_main:
            print(
                f"stopped after step {state.step}; continue with --resume {config.output_dir}",
                flush=True,
            )
        return self.must_stop

    def _next_step(self) -> tuple[int, int]:
        """Epoch and step in it of the next step to take."""
        done = self.state.step - self.epoch_began
        ended = done >= self.plan.steps
        return self.epoch + ended, 0 if ended else done

    def evaluated(self, epoch: int, scores: dict[str, float], rows: dict[str, np.ndarray]) -> None:
        """Log an online evaluation; `rows` are images (N, H, W, 3) uint8 of the same seeds."""
        if not self.log:
            return
        if scores:
            self.log.write(self.state.step, epoch=epoch, **scores)
        if rows:
            sheet = side_by_side_sheet(rows)
            path = sheet_of(self.config.output_dir, epoch)
            path.parent.mkdir(exist_ok=True)
            save_png(path, sheet)
            self.log.show(self.state.step, "samples", sheet)

    def _write_log(self, result: training.StepResult, done: int) -> None:
        loss = dist.mean(torch.stack(self.losses).mean(), self.world).item()
        now = time.monotonic()
        if self.log:
            self.log.write(
                self.state.step,
                epoch=round(self.epoch + done / self.plan.steps, 4),
                loss=loss,
                lr=result.lr,
                grad_norm=result.grad_norm.item(),
                images_per_s=len(self.losses) * self.plan.images_per_step / (now - self.logged),
                memory_gb=memory_gb(result.loss.device),
                skipped=self.state.skipped,
            )
        self.losses.clear()
        self.logged = now


def sheet_of(output_dir: str | Path, epoch: int) -> Path:
    """Path of the sample sheet of an epoch."""
    return Path(output_dir) / "samples" / f"epoch{epoch:04d}.png"
