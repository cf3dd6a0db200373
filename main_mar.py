"""Train MAR, or evaluate a trained one with --evaluate.

    python main_mar.py --model mar_tiny --use_cached --cached_path data/shapes_latents
    torchrun --nproc_per_node=8 main_mar.py --model mar_base --diffloss_d 6 --diffloss_w 1024 ...

With `--resume DIR` the same command continues where it stopped, also in the middle of an epoch, and on a
CPU computes the same numbers as an uninterrupted run.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engine import cli
from engine.base import Loaded
from engine.mar import MARHost, mar_host
from engine.run import evaluate
from models import mar
from models.tokenizers import Tokenizer
from models.vae import DiagonalGaussianDistribution
from util import dist, metrics
from util.data import checks
from util.data.config import DataConfig
from util.data.datasets import BatchPlan, batches, to_unit_range
from util.errors import UserError, run_main
from util.evaluation.config import EvaluationConfig
from util.evaluation.request import ScoreRequest
from util.evaluation.run_folder import RunFolder
from util.training import step as training
from util.training.config import TrainConfig
from util.training.ema import EMA
from util.training.monitor import TrainingMonitor, sheet_of
from util.training.optimizer import LRSchedule, OptimizerConfig, make_optimizer, scaled_lr
from util.training.resume import resume, starting_point
from util.training.signals import Stopped, StopRequest
from util.weights import digest_of, find_checkpoint

SHEET_COLUMNS = 10


@dataclass(frozen=True)
class Command:
    """The flags of this command as configs. evaluation is None if nothing is evaluated."""

    host: MARHost
    train: TrainConfig
    optimizer: OptimizerConfig
    data: DataConfig
    evaluation: EvaluationConfig | None
    request: ScoreRequest | None
    place: cli.Place
    arguments: dict[str, object]


def parse(words: Sequence[str] | None = None) -> Command:
    """The command line, from sys.argv without words."""
    flags = cli.make_parser("main_mar", __doc__.splitlines()[0]).parse(words)
    if "score_only" in flags.given:
        raise UserError("--score_only belongs to eval.py: python eval.py --score_only DIR")
    selection = cli.select(flags, "main_mar")
    host = mar_host(selection.host())  # before hours of training, not at the first evaluation
    train = flags.build(TrainConfig)
    if flags.given.get("dry_run") and not train.evaluate:
        raise UserError("--dry_run is for evaluations: use it with eval.py or with --evaluate")
    evaluates = train.evaluate or train.online_eval
    evaluation = flags.build(EvaluationConfig) if evaluates else None
    return Command(
        host=host,
        train=train,
        optimizer=flags.build(OptimizerConfig),
        data=flags.build(DataConfig),
        evaluation=evaluation,
        request=selection.request() if evaluation and not evaluation.no_score else None,
        place=cli.place(flags),
        arguments=flags.resolved,
    )


def latents_from(
    use_cached: bool, tokenizer: Tokenizer | None, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Function from a batch and its noise to scaled latents: a draw from each image's posterior."""

    @torch.no_grad()
    def from_moments(moments: Tensor, noise: Tensor) -> Tensor:
        return DiagonalGaussianDistribution(moments).sample(noise=noise) * scale

    @torch.no_grad()
    def from_images(images: Tensor, noise: Tensor) -> Tensor:
        assert tokenizer is not None
        return tokenizer.encode(to_unit_range(images)).sample(noise=noise) * scale

    return from_moments if use_cached else from_images


def main() -> None:
    command = parse()
    place = command.place
    try:
        with place.rendezvous() as rendezvous:
            if not command.train.evaluate:
                dist.start(rendezvous, place.device)
            try:
                run(command, rendezvous)
            except RuntimeError as error:
                rendezvous.raise_peer_failure(error)
            finally:
                dist.stop()
    except Stopped:
        if place.world.is_main:
            folder = command.train.output_dir
            print(f"stopped in an evaluation; continue with --resume {folder}", flush=True)


def run(command: Command, rendezvous: dist.Rendezvous) -> None:
    """Train or evaluate as the flags say, in this process of the run."""
    if command.request is not None and command.evaluation is not None:
        metrics.check_ready(command.request, command.evaluation.num_images)
    if command.train.evaluate:
        evaluate_checkpoint(command, rendezvous)
    else:
        train(command, rendezvous)


def evaluate_checkpoint(command: Command, rendezvous: dist.Rendezvous) -> None:
    """--evaluate: as eval.py does."""
    if not command.host.resume:
        raise UserError("--evaluate needs --resume DIR, the folder of checkpoint-last.pth")
    loaded = command.host.load(command.place.device)
    results = evaluate_loaded(command, command.host, loaded, rendezvous)
    if rendezvous.world.is_main:
        print(json.dumps(results))


def evaluate_loaded(
    command: Command,
    host: MARHost,
    loaded: Loaded,
    rendezvous: dist.Rendezvous,
    folder: str | None = None,
) -> dict[str, object]:
    """Evaluate a host; `folder` replaces --output_dir."""
    assert command.evaluation is not None
    settings = command.evaluation
    if folder is not None:
        settings = replace(settings, output_dir=folder)
    return evaluate(
        host,
        loaded,
        settings,
        command.request,
        command.place.execution,
        rendezvous,
        command.arguments,
    )


def train(command: Command, rendezvous: dist.Rendezvous) -> None:
    world, execution = rendezvous.world, command.place.execution
    device, dtype = execution.device, execution.dtype
    host, config, data_config = command.host, command.train, command.data
    resumed = starting_point(host.resume, config, world)
    torch.manual_seed(config.seed)
    model = host.build().to(device)
    tokenizer = None
    if not data_config.use_cached or host.tokenizer.latent_scale is None or config.online_eval:
        tokenizer = host.open_tokenizer(device)
    scale = host.tokenizer.scale(tokenizer)
    geometry = host.geometry
    side = geometry.latent_side
    latent_shape = (geometry.vae_embed_dim, side, side)
    shape = checks.DataShape(
        geometry.img_size, latent_shape, geometry.class_num, host.tokenizer.files
    )
    data = checks.open_data(data_config, shape, world)
    ranks = world.rank, world.size
    plan = BatchPlan(len(data), config.batch_size, config.seed, *ranks, config.accum_iter)
    optimizer = command.optimizer
    peak = scaled_lr(optimizer.lr, optimizer.blr, plan.images_per_step)
    schedule = LRSchedule(
        peak, optimizer.min_lr, optimizer.warmup_epochs, config.epochs, shape=optimizer.lr_schedule
    )
    state = training.TrainState(
        model=model,
        wrapped=model,
        ema=EMA(model, optimizer.ema_rate),
        optimizer=make_optimizer(model, peak, optimizer.weight_decay),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )
    first_epoch, first_step = config.start_epoch, 0
    state.step = first_epoch * plan.steps
    if resumed:
        checks.check_same_classes(find_checkpoint(resumed).parent, data.files.classes)
        first_epoch, first_step = resume(state, plan, resumed, world)
        if first_epoch >= config.epochs:
            checks.note(
                f"{resumed} has {first_epoch} epochs, --epochs is {config.epochs}: nothing is left "
                "to train",
                world,
            )
        elif config.max_steps is not None and state.step >= config.max_steps:
            checks.note(
                f"{resumed} has {state.step} steps, --max_steps is {config.max_steps}", world
            )
            return
    if config.compile:
        mar.compile_for_training(model)
    if world.size > 1:
        ids = [device.index] if device.type == "cuda" else None
        state.wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    step_config = training.StepConfig(
        schedule, optimizer.grad_clip, config.seed, world.rank, device, dtype, config.accum_iter
    )
    if world.is_main:
        count = sum(p.numel() for p in model.parameters())
        print(
            f"{host.model}: {count / 1e6:.1f}M parameters on {device}, {dtype}, "
            f"{torch.get_num_threads()} CPU threads\n"
            f"{len(data)} images, {plan.steps} steps of {plan.images_per_step} per epoch, "
            f"peak lr {peak:.3g}, latent scale {scale:.4g}; "
            f"from epoch {first_epoch}, step {first_step}",
            flush=True,
        )
    to_latents = latents_from(data_config.use_cached, tokenizer, scale)
    if world.is_main:
        checks.record_classes(config.output_dir, data.files.classes)
        if not resumed:
            items = checks.some_items(data).to(device)
            noise = torch.randn(len(items), *latent_shape, device=device)
            checks.check_spread(to_latents(items, noise), scale, world)
    with (
        StopRequest() as stop_request,
        TrainingMonitor(config, command.arguments, state, plan, world, stop_request) as monitor,
    ):

        def evaluate_if_due(done: int) -> None:
            due = config.online_eval and done
            if due and (done % config.eval_freq == 0 or done == config.epochs):
                assert tokenizer is not None
                with (
                    state.ema.swapped_into(model),
                    stop_request.at_once(),
                    monitor.optional_evaluation(done, rendezvous),
                ):
                    evaluate_online(command, model, tokenizer, rendezvous, done, monitor)

        if resumed and first_step == 0:
            evaluate_if_due(first_epoch)  # it may have been interrupted
        for epoch in range(first_epoch, config.epochs):
            picks = plan.epoch(epoch, first_step)
            monitor.begin(epoch, first_step)
            pin = data_config.pin_mem and device.type == "cuda"
            stopped = training.train_one_epoch(
                state,
                batches(data, picks, data_config.num_workers, pin),
                epoch,
                first_step,
                plan.steps,
                to_latents,
                partial(model.training_noise, plan.images_per_step),
                step_config,
                monitor.after_step,
            )
            first_step = 0
            done = epoch + 1
            if stopped or monitor.must_stop:
                break
            evaluated = config.online_eval and done % config.eval_freq == 0  # or interrupted in it
            if evaluated or done % config.save_last_freq == 0 or done == config.epochs:
                monitor.save(done, 0)
            evaluate_if_due(done)
    dist.barrier(world)


def evaluate_online(
    command: Command,
    model: mar.MAR,
    tokenizer: Tokenizer,
    rendezvous: dist.Rendezvous,
    epoch: int,
    monitor: TrainingMonitor,
) -> None:
    """Score the averaged weights without guidance and, if --cfg asks for it, with it, as MAR does.

    The seeds are the same each time, so the sample sheets of epochs can be compared. A finished evaluation
    is not repeated; as in the original, only the sheets of its images are kept.
    """
    assert command.evaluation is not None
    settings = command.evaluation
    loaded = Loaded(model.eval(), tokenizer, f"epoch {epoch} {digest_of(model)}")
    folder = Path(settings.output_dir) / f"epoch{epoch:04d}"
    sheet = sheet_of(settings.output_dir, epoch)
    runs: dict[float, tuple[MARHost, RunFolder]] = {}
    for cfg in sorted({1.0, command.host.sampling.cfg}):
        host = command.host.with_sampling(cfg=cfg)
        runs[cfg] = host, RunFolder(folder / host.run_name(settings.num_images))
    finished = [cfg for cfg, (_, run_folder) in runs.items() if run_folder.finished(loaded.weights)]
    if len(finished) == len(runs) and (settings.no_save or sheet.exists()):
        return
    scores: dict[str, float] = {}
    rows: dict[str, np.ndarray] = {}
    for cfg, (host, run_folder) in runs.items():
        if cfg not in finished:
            try:
                made = evaluate_loaded(command, host, loaded, rendezvous, str(folder))
            except Exception:
                run_folder.delete_images()  # a full disk would also end the training
                raise
            if rendezvous.world.is_main:
                print(json.dumps(made), flush=True)
        if rendezvous.world.is_main:
            results = run_folder.results()
            for name, key in (("fid", "fid"), ("is", "is_mean")):
                if results[key] is not None:
                    scores[f"{name}_cfg{cfg:g}"] = results[key]
            if not settings.no_save:
                rows[f"cfg {cfg:g}"] = run_folder.spread(settings.num_images, SHEET_COLUMNS)
    monitor.evaluated(epoch, scores, rows)
    if rendezvous.world.is_main:
        for _, run_folder in runs.values():
            run_folder.drop_images()


if __name__ == "__main__":
    run_main(main)
