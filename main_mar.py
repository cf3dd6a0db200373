"""Train MAR, or evaluate a trained one with --evaluate.

    python main_mar.py --model mar_tiny --use_cached --cached_path data/shapes_latents
    torchrun --nproc_per_node=8 main_mar.py --model mar_base --diffloss_d 6 --diffloss_w 1024 ...

With `--resume DIR` the same command goes on where it stopped, in the middle of an epoch too, and
computes, on a CPU, the very same numbers as a run that was never stopped.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import engine
from models import mar
from models.presets import PRESETS
from models.vae import DiagonalGaussianDistribution
from util import checkpoint, dist, metrics, training
from util.data import (
    BatchPlan,
    CachedFolder,
    CachedTensors,
    ImageFolder,
    batches,
    to_unit_range,
)
from util.device import pick_device, pick_dtype, set_threads
from util.ema import EMA
from util.errors import UserError, run_main
from util.evaluation import request_of
from util.flags import make_parser, resolve
from util.latents import check_note
from util.lr import LRSchedule, make_optimizer, scaled_lr
from util.run_log import RunLog
from util.signals import StopRequest

IN_MEMORY_BELOW = 4 << 30  # bytes of cached latents that are read into memory without being asked


def open_data(args: argparse.Namespace) -> ImageFolder | CachedFolder | CachedTensors:
    """Training data, checked against the model's geometry. UserError if they disagree."""
    if not args.use_cached:
        data = ImageFolder(Path(args.data_path) / "train", args.img_size)
    else:
        if args.cached_path is None:
            raise UserError("--use_cached needs --cached_path, the folder that main_cache.py wrote")
        data = CachedFolder(args.cached_path)
        check_note(args.cached_path, args.vae_path, args.img_size)
        side = args.img_size // args.vae_stride
        expected, found = (2 * args.vae_embed_dim, side, side), tuple(data[(0, False)][0].shape)
        if found != expected:
            raise UserError(
                f"{args.cached_path} holds moments {found}, the model needs {expected}: "
                "check --img_size, --vae_stride and --vae_embed_dim"
            )
        in_memory = args.cache_in_memory
        if in_memory is None:
            in_memory = data.memory_bytes() < IN_MEMORY_BELOW
        if in_memory:
            print(
                f"reading {data.memory_bytes() / 2**30:.2f} GiB of latents into memory", flush=True
            )
            data = CachedTensors(data)
    if data.class_count > args.class_num:
        raise UserError(
            f"the data have {data.class_count} classes, the model {args.class_num}: "
            f"give --class_num {data.class_count}"
        )
    return data


def latents_from(
    args: argparse.Namespace, tokenizer: nn.Module | None, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Function from a batch and its noise to scaled latents: a draw from each image's posterior."""

    @torch.no_grad()
    def from_moments(moments: Tensor, noise: Tensor) -> Tensor:
        return DiagonalGaussianDistribution(moments).sample(noise=noise) * scale

    @torch.no_grad()
    def from_images(images: Tensor, noise: Tensor) -> Tensor:
        return tokenizer.encode(to_unit_range(images)).sample(noise=noise) * scale

    return from_moments if args.use_cached else from_images


def main() -> None:
    """Command line."""
    args = make_parser("main_mar").parse_args()
    resolve(args, "main_mar", PRESETS)
    set_threads(args.threads)
    world = dist.world_from_env(args.dist_on_itp, args.world_size)
    device = pick_device(args.device, world.local_rank)
    with dist.Meeting(world, args.dist_url, args.patience) as meeting:
        if not args.evaluate:
            dist.start(meeting, device)
        try:
            run(args, meeting, device)
        finally:
            dist.stop()


def run(args: argparse.Namespace, meeting: dist.Meeting, device: torch.device) -> None:
    """Train or evaluate as the flags say, in this process of the run."""
    world, dtype = meeting.world, pick_dtype(args.dtype, device)
    if args.score_only:
        raise UserError("--score_only belongs to eval.py: python eval.py --score_only DIR")
    engine.SamplingConfig.from_args(args)  # before hours of training, not at the first evaluation
    if args.online_eval or (args.evaluate and not args.no_score):
        metrics.check_ready(request_of(args))
    torch.manual_seed(args.seed)
    model = engine.build_model(args).to(device)
    tokenizer = None
    if not args.use_cached or args.latent_scale is None or args.online_eval or args.evaluate:
        tokenizer = engine.open_tokenizer(args, device)
    if args.evaluate:
        if not args.resume:
            raise UserError("--evaluate needs --resume DIR, the folder of checkpoint-last.pth")
        checkpoint.load_into(model, args.resume, use_ema=not args.no_ema)
        weights = checkpoint.describe(args.resume, use_ema=not args.no_ema)
        results = engine.evaluate(model.eval(), tokenizer, args, meeting, device, dtype, weights)
        if world.is_main:
            print(json.dumps(results))
        return
    scale = engine.scale_of(tokenizer, args)
    data = open_data(args)
    plan = BatchPlan(len(data), args.batch_size, args.seed, world.rank, world.size, args.accum_iter)
    peak = scaled_lr(args.lr, args.blr, plan.images_per_step)
    schedule = LRSchedule(
        peak, args.min_lr, args.warmup_epochs, args.epochs, shape=args.lr_schedule
    )
    state = training.TrainState(
        model=model,
        wrapped=model,
        ema=EMA(model, args.ema_rate),
        optimizer=make_optimizer(model, peak, args.weight_decay),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )
    first_epoch, first_step = args.start_epoch, 0
    state.step = first_epoch * plan.steps
    if args.resume:
        first_epoch, first_step = resume(state, plan, args.resume)
    if args.compile:
        mar.compile_for_training(model)
    if world.size > 1:
        ids = [device.index] if device.type == "cuda" else None
        state.wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    config = training.StepConfig(
        schedule, args.grad_clip, args.seed, world.rank, device, dtype, args.accum_iter
    )
    if world.is_main:
        count = sum(p.numel() for p in model.parameters())
        print(
            f"{args.model}: {count / 1e6:.1f}M parameters on {device}, {dtype}, "
            f"{torch.get_num_threads()} CPU threads\n"
            f"{len(data)} images, {plan.steps} steps of {plan.images_per_step} per epoch, "
            f"peak lr {peak:.3g}, latent scale {scale:.4g}; "
            f"from epoch {first_epoch}, step {first_step}",
            flush=True,
        )
    to_latents = latents_from(args, tokenizer, scale)
    with StopRequest() as stop_request, Watch(args, state, plan, world, stop_request) as watch:
        for epoch in range(first_epoch, args.epochs):
            picks = plan.epoch(epoch, first_step)
            watch.begin(epoch, first_step)
            stopped = training.train_one_epoch(
                state,
                batches(data, picks, args.num_workers, args.pin_mem and device.type == "cuda"),
                epoch,
                first_step,
                plan.steps,
                to_latents,
                partial(model.training_noise, plan.images_per_step),
                config,
                watch.after_step,
            )
            first_step = 0
            done = epoch + 1
            if stopped or watch.must_stop:
                break
            if done % args.save_last_freq == 0 or done == args.epochs:
                watch.save(done, 0)
            if args.online_eval and (done % args.eval_freq == 0 or done == args.epochs):
                with state.ema.swapped_into(model):
                    evaluate_online(model, tokenizer, args, meeting, device, dtype, done)
    dist.barrier(world)


def evaluate_online(
    model: mar.MAR,
    tokenizer: nn.Module,
    args: argparse.Namespace,
    meeting: dist.Meeting,
    device: torch.device,
    dtype: torch.dtype,
    epoch: int,
) -> None:
    """Score the averaged weights without guidance and, if --cfg asks for it, with it, as MAR does."""
    for cfg in sorted({1.0, args.cfg}):
        folder = str(Path(args.output_dir) / f"epoch{epoch:04d}")
        changes = {"cfg": cfg, "output_dir": folder, "overwrite": True, "dry_run": False}
        ours = argparse.Namespace(**{**vars(args), **changes})
        model.eval()
        weights = f"epoch {epoch} {checkpoint.digest_of(model)}"
        results = engine.evaluate(model, tokenizer, ours, meeting, device, dtype, weights)
        if meeting.world.is_main:
            print(json.dumps(results), flush=True)


def resume(state: training.TrainState, plan: BatchPlan, path: str) -> tuple[int, int]:
    """Restore a run; returns (epoch, step inside it) to go on with."""
    epoch, progress = checkpoint.restore_checkpoint(
        path,
        model=state.model,
        ema=state.ema,
        optimizer=state.optimizer,
        scaler=state.scaler,
    )
    step_in_epoch = progress.get("step_in_epoch", 0)
    if step_in_epoch and progress["images_per_step"] != plan.images_per_step:
        raise UserError(
            f"{path} stopped inside an epoch with {progress['images_per_step']} images per step, "
            f"this run has {plan.images_per_step}: give --batch_size and --accum_iter so that "
            "they and the processes make as many"
        )
    state.step = progress.get("step", epoch * plan.steps)
    state.skipped = progress.get("skipped", 0)
    return epoch, step_in_epoch


class Watch:
    """After every step: log, save, stop. A context manager; leaving it closes the log."""

    def __init__(
        self,
        args: argparse.Namespace,
        state: training.TrainState,
        plan: BatchPlan,
        world: dist.World,
        stop_request: StopRequest,
    ) -> None:
        self.args, self.state, self.plan, self.world = args, state, plan, world
        self.stop_request, self.must_stop = stop_request, False
        self.log = (
            RunLog(args.output_dir, args.log_dir or args.output_dir) if world.is_main else None
        )
        self.losses: list[Tensor] = []
        self.logged = self.saved = time.monotonic()
        self.epoch, self.bar = 0, None

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.log:
            self.log.close()

    def begin(self, epoch: int, first_step: int) -> None:
        """Start of an epoch."""
        self.epoch = epoch
        if self.bar is not None:
            self.bar.close()
        if self.world.is_main and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.plan.steps, initial=first_step, desc=f"epoch {epoch}", unit="step"
            )

    def save(self, epoch: int, step_in_epoch: int) -> None:
        """Write checkpoint-last.pth as seen from (epoch, step_in_epoch), the next step to take."""
        self.saved = time.monotonic()
        if not self.world.is_main:
            return
        checkpoint.save_checkpoint(
            Path(self.args.output_dir) / checkpoint.LAST,
            model=self.state.model,
            ema=self.state.ema,
            optimizer=self.state.optimizer,
            scaler=self.state.scaler,
            epochs_done=epoch,
            args=self.args,
            progress={
                "step_in_epoch": step_in_epoch,
                "step": self.state.step,
                "images_per_step": self.plan.images_per_step,
                "skipped": self.state.skipped,
            },
        )

    def after_step(self, result: training.StepResult, done: int) -> bool:
        """Called by train_one_epoch; True ends the run. `done` steps of this epoch are behind us."""
        args, state = self.args, self.state
        if self.bar is not None:
            self.bar.update()
        self.losses.append(result.loss)
        if state.step % args.log_freq == 0:
            self._write_log(result, done)
        asked = dist.any_rank(self.stop_request.requested, self.world, result.loss.device)
        self.must_stop = asked or (args.max_steps is not None and state.step >= args.max_steps)
        late = args.save_minutes and time.monotonic() - self.saved > 60 * args.save_minutes
        if self.must_stop or late:
            ended = done == self.plan.steps
            self.save(self.epoch + ended, 0 if ended else done)
        if self.must_stop and self.world.is_main:
            print(
                f"stopped after step {state.step}; go on with --resume {args.output_dir}",
                flush=True,
            )
        return self.must_stop

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
                skipped=self.state.skipped,
            )
        self.losses.clear()
        self.logged = now


if __name__ == "__main__":
    run_main(main)
