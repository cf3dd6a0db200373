"""Where a training run begins: at step 0, or with a checkpoint, in the middle of an epoch too."""

import os
from pathlib import Path

from util import checkpoint, dist
from util.data.checks import note
from util.data.datasets import BatchPlan
from util.errors import UserError
from util.training.config import TrainConfig
from util.training.step import TrainState
from util.weights import LAST, find_checkpoint


def starting_point(resume: str, config: TrainConfig, world: dist.World) -> str:
    """What to resume, "" for a fresh start.

    As in the original's commands, --resume may name the --output_dir of a run that has not begun.
    UserError if another run's checkpoint would be overwritten.
    """
    last = Path(config.output_dir) / LAST
    if resume and os.path.realpath(resume) == os.path.realpath(config.output_dir):
        if last.exists() or (last.parent / "model.safetensors").exists():
            return resume
        note(f"no {LAST} in {config.output_dir} yet: starting at step 0", world)
        return ""
    same = resume and find_checkpoint(resume).resolve() == last.resolve()
    if last.exists() and not same and not config.overwrite:
        raise UserError(
            f"{last} is of another run: continue it with --resume {config.output_dir}, choose "
            "another --output_dir, or replace it with --overwrite"
        )
    return resume


def resume(state: TrainState, plan: BatchPlan, path: str, world: dist.World) -> tuple[int, int]:
    """Restore a run; returns (epoch, step inside it) to continue with."""
    epoch, progress = checkpoint.restore_checkpoint(
        path, model=state.model, ema=state.ema, optimizer=state.optimizer, scaler=state.scaler
    )
    step_in_epoch = progress.get("step_in_epoch", 0)
    if step_in_epoch and progress["images_per_step"] != plan.images_per_step:
        raise UserError(
            f"{path} stopped inside an epoch with {progress['images_per_step']} images per step, "
            f"this run has {plan.images_per_step}: give --batch_size and --accum_iter so that "
            "they and the processes make as many"
        )
    images = progress.get("images", plan.item_count)
    if step_in_epoch and images != plan.item_count:
        note(f"there were {images} images, now {plan.item_count}: the order changes", world)
        if step_in_epoch >= plan.steps:
            epoch, step_in_epoch = epoch + 1, 0
    state.step = progress.get("step", epoch * plan.steps)
    state.skipped = progress.get("skipped", 0)
    return epoch, step_in_epoch
