"""Train MAR, or evaluate a trained one with --evaluate.

    python main_mar.py --model mar_tiny --use_cached --cached_path data/shapes_latents
    torchrun --nproc_per_node=8 main_mar.py --model mar_base --diffloss_d 6 --diffloss_w 1024 ...

With `--resume DIR` the same command goes on where it stopped, in the middle of an epoch too, and
computes, on a CPU, the very same numbers as a run that was never stopped.
"""

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import engine
from models import mar
from models.presets import PRESETS
from models.vae import DiagonalGaussianDistribution
from util import checkpoint, dist, metrics
from util.data.checks import (
    check_same_classes,
    check_spread,
    note,
    open_data,
    record_classes,
    some_items,
)
from util.data.datasets import BatchPlan, batches, to_unit_range
from util.device import pick_device, pick_dtype, set_threads
from util.errors import UserError, run_main
from util.evaluation.run import Run, request_of
from util.evaluation.run_folder import RunDir
from util.flags import make_parser, resolve
from util.training import step as training
from util.training.ema import EMA
from util.training.monitor import Watch, sheet_of
from util.training.optimizer import LRSchedule, make_optimizer, scaled_lr
from util.training.signals import Stopped, StopRequest

SHEET_COLUMNS = 10


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
    try:
        with dist.Meeting(world, args.dist_url, args.patience) as meeting:
            if not args.evaluate:
                dist.start(meeting, device)
            try:
                run(args, meeting, device)
            except RuntimeError as error:
                raise meeting.blame(error) from None
            finally:
                dist.stop()
    except Stopped:
        if world.is_main:
            print(f"stopped in an evaluation; go on with --resume {args.output_dir}", flush=True)


def run(args: argparse.Namespace, meeting: dist.Meeting, device: torch.device) -> None:
    """Train or evaluate as the flags say, in this process of the run."""
    world, dtype = meeting.world, pick_dtype(args.dtype, device)
    if args.score_only:
        raise UserError("--score_only belongs to eval.py: python eval.py --score_only DIR")
    engine.SamplingConfig.from_args(args)  # before hours of training, not at the first evaluation
    if args.dry_run and not args.evaluate:
        raise UserError("--dry_run is for evaluations: use it with eval.py or with --evaluate")
    if args.start_epoch >= args.epochs:
        raise UserError(
            f"--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}"
        )
    if args.online_eval:
        Run.from_args(args, "", {}, {}, world.size)  # refuses flags that disagree
    if (args.online_eval or args.evaluate) and not args.no_score:
        metrics.check_ready(request_of(args))
    resumed = "" if args.evaluate else starting_point(args, world)
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
    data = open_data(args, world)
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
    if resumed:
        check_same_classes(checkpoint.find_checkpoint(resumed).parent, data.files.classes)
        first_epoch, first_step = resume(state, plan, resumed, world)
        if first_epoch >= args.epochs:
            note(
                f"{resumed} has {first_epoch} epochs, --epochs is {args.epochs}: no more to train",
                world,
            )
        elif args.max_steps is not None and state.step >= args.max_steps:
            note(f"{resumed} has {state.step} steps, --max_steps is {args.max_steps}", world)
            return
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
    if world.is_main:
        record_classes(args.output_dir, data.files.classes)
        if not resumed:
            items, side = some_items(data).to(device), args.img_size // args.vae_stride
            noise = torch.randn(len(items), args.vae_embed_dim, side, side, device=device)
            check_spread(to_latents(items, noise), scale, world)
    with StopRequest() as stop_request, Watch(args, state, plan, world, stop_request) as watch:

        def evaluate_if_due(done: int) -> None:
            if args.online_eval and done and (done % args.eval_freq == 0 or done == args.epochs):
                with state.ema.swapped_into(model), stop_request.at_once(), watch.paused():
                    evaluate_online(model, tokenizer, args, meeting, device, dtype, done, watch)

        if resumed and first_step == 0:
            evaluate_if_due(first_epoch)  # it may have been interrupted
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
            evaluated = args.online_eval and done % args.eval_freq == 0  # or interrupted in it
            if evaluated or done % args.save_last_freq == 0 or done == args.epochs:
                watch.save(done, 0)
            evaluate_if_due(done)
    dist.barrier(world)


def starting_point(args: argparse.Namespace, world: dist.World) -> str:
    """What to resume, "" for a fresh start.

    As in the original's commands, --resume may name the --output_dir of a run that has not begun.
    UserError if another run's checkpoint would be overwritten.
    """
    last = Path(args.output_dir) / checkpoint.LAST
    if args.resume and os.path.realpath(args.resume) == os.path.realpath(args.output_dir):
        if last.exists() or (last.parent / "model.safetensors").exists():
            return args.resume
        note(f"no {checkpoint.LAST} in {args.output_dir} yet: starting at step 0", world)
        return ""
    same = args.resume and checkpoint.find_checkpoint(args.resume).resolve() == last.resolve()
    if last.exists() and not same and not args.overwrite:
        raise UserError(
            f"{last} is of another run: go on with it by --resume {args.output_dir}, choose another "
            "--output_dir, or replace it by --overwrite"
        )
    return args.resume


def evaluate_online(
    model: mar.MAR,
    tokenizer: nn.Module,
    args: argparse.Namespace,
    meeting: dist.Meeting,
    device: torch.device,
    dtype: torch.dtype,
    epoch: int,
    watch: Watch,
) -> None:
    """Score the averaged weights without guidance and, if --cfg asks for it, with it, as MAR does.

    The same seeds each time, so that the sample sheets of the epochs compare. What an earlier call
    has finished stays; of its images, as in the original, only the sheets are kept.
    """
    model.eval()
    weights = f"epoch {epoch} {checkpoint.digest_of(model)}"
    folder, sheet = (
        str(Path(args.output_dir) / f"epoch{epoch:04d}"),
        sheet_of(args.output_dir, epoch),
    )
    runs: dict[float, tuple[argparse.Namespace, RunDir]] = {}
    for cfg in sorted({1.0, args.cfg}):
        ours = argparse.Namespace(**{**vars(args), "cfg": cfg, "output_dir": folder})
        name = engine.run_name(args.model, args.num_images, engine.SamplingConfig.from_args(ours))
        runs[cfg] = ours, RunDir(Path(folder) / name)
    finished = [cfg for cfg, (_, run_dir) in runs.items() if run_dir.finished(weights)]
    if len(finished) == len(runs) and (args.no_save or sheet.exists()):
        return
    scores: dict[str, float] = {}
    rows: dict[str, np.ndarray] = {}
    for cfg, (ours, run_dir) in runs.items():
        if cfg not in finished:
            results = engine.evaluate(model, tokenizer, ours, meeting, device, dtype, weights)
            tokenizer.to(memory_format=torch.contiguous_format)  # as training has it
            if meeting.world.is_main:
                print(json.dumps(results), flush=True)
        if meeting.world.is_main:
            results = run_dir.results()
            for name, key in (("fid", "fid"), ("is", "is_mean")):
                if results[key] is not None:
                    scores[f"{name}_cfg{cfg:g}"] = results[key]
            if not args.no_save:
                rows[f"cfg {cfg:g}"] = run_dir.spread(args.num_images, SHEET_COLUMNS)
    watch.evaluated(epoch, scores, rows)
    if meeting.world.is_main:
        for _, run_dir in runs.values():
            run_dir.drop_images()


def resume(
    state: training.TrainState, plan: BatchPlan, path: str, world: dist.World
) -> tuple[int, int]:
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
    images = progress.get("images", plan.item_count)
    if step_in_epoch and images != plan.item_count:
        note(
            f"there were {images} images, now {plan.item_count}: another order from here on", world
        )
        if step_in_epoch >= plan.steps:
            epoch, step_in_epoch = epoch + 1, 0
    state.step = progress.get("step", epoch * plan.steps)
    state.skipped = progress.get("skipped", 0)
    return epoch, step_in_epoch


if __name__ == "__main__":
    run_main(main)
