"""What is done with a model: an epoch of training; batches of images by seed; an evaluation.

Every training step is seeded by (seed, step, rank), so a run that was stopped anywhere goes on with
the very same numbers, and no state of a random generator has to be kept. Generated images carry
their own seeds, so what is missing can be made in any order, batch and process.
"""

import argparse
import hashlib
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from models import llamagen, mar, vq
from models.gpt_images import GPTSampling, generate
from models.lazy_mar import LazyMARConfig
from models.line_cache import LineARConfig
from models.plan import DecodingPlan
from models.tokenizers import latent_scale_of, load_tokenizer
from util import checkpoint, dist, metrics
from util.device import autocast
from util.ema import EMA
from util.errors import UserError
from util.files import sha256_of, write_json
from util.flags import lazy_mar_values, line_ar_values
from util.images import PngWriter, to_uint8
from util.lr import LRSchedule
from util.run_dir import RunDir, provenance

VQ_TOKENIZERS = {"vq16": vq.vq16, "vq_tiny": vq.vq_tiny}
ROPE_TABLE = "freqs_cis"  # some published GPT files hold it; ours is computed
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


def build_model(args: argparse.Namespace) -> mar.MAR | llamagen.GPT:
    """The model that resolved flags describe, with fresh weights, on the CPU."""
    try:
        if args.family == "gpt":
            lines, line = gpt_grid(args)
            return llamagen.__dict__[args.model](
                block_size=lines * line, num_classes=args.class_num
            )
        return mar.__dict__[args.model](
            img_size=args.img_size,
            vae_stride=args.vae_stride,
            patch_size=args.patch_size,
            vae_embed_dim=args.vae_embed_dim,
            mask_ratio_min=args.mask_ratio_min,
            label_drop_prob=args.label_drop_prob,
            class_num=args.class_num,
            attn_dropout=args.attn_dropout,
            proj_dropout=args.proj_dropout,
            buffer_size=args.buffer_size,
            diffloss_d=args.diffloss_d,
            diffloss_w=args.diffloss_w,
            num_sampling_steps=args.num_sampling_steps,
            diffusion_batch_mul=args.diffusion_batch_mul,
            grad_checkpointing=args.grad_checkpointing,
            masked_keep=args.masked_keep,
            pos_init=args.pos_init,
            aux_weight=args.aux_weight,
        )
    except ValueError as error:
        raise UserError(f"--model {args.model}: {error}") from error


def gpt_grid(args: argparse.Namespace) -> tuple[int, int]:
    """Lines and codes per line of an image. UserError if its size is not a whole number of codes."""
    side, rest = divmod(args.img_size, args.vae_stride)
    if rest or side < 1:
        raise UserError(
            f"--img_size is {args.img_size}; it must be a multiple of --vae_stride {args.vae_stride}"
        )
    return side, side


def load_weights(model: nn.Module, args: argparse.Namespace) -> str:
    """Fill the model from --resume; says which weights these are. GPT files have no averaged ones."""
    use_ema = args.family == "mar" and not args.no_ema
    checkpoint.load_into(model, args.resume, use_ema, surplus=(ROPE_TABLE,))
    return checkpoint.describe(args.resume, use_ema)


def open_tokenizer(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The tokenizer that resolved flags name, on the device. UserError if its file does not fit."""
    try:
        if args.tokenizer in VQ_TOKENIZERS:
            if not Path(args.vae_path).is_file():
                raise FileNotFoundError(
                    f"{args.vae_path} not found: fetch LlamaGen's with `python -m util.download vq16`"
                )
            tokenizer = VQ_TOKENIZERS[args.tokenizer]().eval().requires_grad_(False)
            checkpoint.load_into(tokenizer, args.vae_path, use_ema=False)
        else:
            tokenizer = load_tokenizer(args.tokenizer, args.vae_path, args.vae_embed_dim)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--vae_path: {error}") from error
    if tokenizer.stride != args.vae_stride:
        raise UserError(
            f"the tokenizer {args.vae_path} has stride {tokenizer.stride}, but --vae_stride is "
            f"{args.vae_stride}: give the tokenizer that the model was trained with"
        )
    return tokenizer.to(device)


def scale_of(tokenizer: nn.Module | None, args: argparse.Namespace) -> float:
    """Factor from the tokenizer's latents to the model's. UserError if nothing states it."""
    try:
        return latent_scale_of(tokenizer, args.latent_scale)
    except ValueError as error:
        raise UserError(str(error)) from error


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled; the arguments of MAR.sample_tokens that a whole run shares."""

    num_iter: int
    cfg: float
    cfg_schedule: str
    temperature: float
    lazy_mar: LazyMARConfig | None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "SamplingConfig":
        """From resolved flags. UserError if they do not make sense."""
        values = lazy_mar_values(args, [field.name for field in fields(LazyMARConfig)])
        try:
            lazy_mar = None if values is None else LazyMARConfig(**values)
            DecodingPlan.create(1, args.num_iter, args.cfg, args.cfg_schedule)
        except ValueError as error:
            raise UserError(str(error)) from error
        return cls(args.num_iter, args.cfg, args.cfg_schedule, args.temperature, lazy_mar)


def gpt_sampling(args: argparse.Namespace) -> GPTSampling:
    """From resolved flags. UserError if they do not make sense."""
    values = line_ar_values(args, [field.name for field in fields(LineARConfig)])
    grid = gpt_grid(args)
    try:
        line_ar = None if values is None else LineARConfig(**values)
        if line_ar is not None:
            line_ar.plan(grid)
        return GPTSampling(
            args.cfg, args.temperature, args.top_k, args.top_p, args.cfg_interval, line_ar
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def sampling_of(args: argparse.Namespace) -> SamplingConfig | GPTSampling:
    """How the model of resolved flags samples. UserError if they do not make sense."""
    return gpt_sampling(args) if args.family == "gpt" else SamplingConfig.from_args(args)


@dataclass(frozen=True)
class ImageBatch:
    """Images of one batch: their indices, uint8 pixels (B, H, W, 3), and the seconds they took."""

    indices: list[int]
    images: np.ndarray
    seconds: float


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index` of the run with --seed `seed`: no two of them share one."""
    return (seed << 32) + index


def image_label(index: int, num_images: int, class_num: int) -> int:
    """Classes in order, as many images of each; image i has label i // (num_images / class_num)."""
    return index * class_num // num_images


@torch.no_grad()
def generate_images(
    model: mar.MAR,
    tokenizer: nn.Module,
    latent_scale: float,
    indices: Sequence[int],
    labels: Sequence[int],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[ImageBatch]:
    """Generate the images `indices`, each from its own label and seed, batch by batch."""
    for start in range(0, len(indices), batch_size):
        part = slice(start, start + batch_size)
        began = time.perf_counter()
        with autocast(device, dtype):
            latents = model.sample_tokens(
                len(indices[part]),
                sampling.num_iter,
                sampling.cfg,
                sampling.cfg_schedule,
                torch.tensor(labels[part]),
                sampling.temperature,
                lazy_mar=sampling.lazy_mar,
                noise=model.image_noise(seeds[part]),
            )
            images = to_uint8(tokenizer.decode(latents / latent_scale).float())
        yield ImageBatch(list(indices[part]), images, time.perf_counter() - began)


def generate_gpt_images(
    model: llamagen.GPT,
    tokenizer: vq.VQModel,
    indices: Sequence[int],
    labels: Sequence[int],
    seeds: Sequence[int],
    sampling: GPTSampling,
    batch_size: int,
    size: int,
) -> Iterator[ImageBatch]:
    """`generate_images` for a GPT, in the model's own precision; pictures of size x size pixels."""
    for start in range(0, len(indices), batch_size):
        part = slice(start, start + batch_size)
        began = time.perf_counter()
        images = generate(model, tokenizer, labels[part], seeds[part], sampling, size)
        pixels = to_uint8(images)
        yield ImageBatch(list(indices[part]), pixels, time.perf_counter() - began)


def evaluate(
    model: mar.MAR | llamagen.GPT,
    tokenizer: nn.Module,
    args: argparse.Namespace,
    world: dist.World,
    device: torch.device,
    dtype: torch.dtype,
    weights: str,
) -> dict[str, object]:
    """Generate what is missing of a run, score it, and return its results (rank 0; others {}).

    `weights` says which weights the model holds; images of other weights are not mixed in.
    """
    sampling = sampling_of(args)
    is_gpt = isinstance(sampling, GPTSampling)
    scale = None if is_gpt else scale_of(tokenizer, args)
    if args.num_images < 2 and not args.no_score:
        raise UserError("--num_images is 1, but FID needs at least 2 images: add --no_score")
    config = {
        "model": args.model,
        "weights": weights,
        "num_images": args.num_images,
        "class_num": args.class_num,
        "img_size": args.img_size,
        "image_size_eval": args.image_size_eval,
        "num_sampling_steps": args.num_sampling_steps,
        "tokenizer": f"{args.tokenizer} {sha256_of(args.vae_path)[:16]}",
        "latent_scale": scale,
        "seed": args.seed,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        **asdict(sampling),
    }
    run = RunDir(Path(args.output_dir) / run_name(args.model, args.num_images, sampling))
    if world.is_main:
        if not args.no_score:
            metrics.check_ready(args.features, args.features_path, args.fid_stats)
        run.open(config, args.overwrite)
    dist.barrier(world)
    missing = run.missing(args.num_images)
    dist.barrier(world)  # all have looked before anyone writes

    mine = missing[world.rank :: world.size]
    labels = [image_label(i, args.num_images, args.class_num) for i in mine]
    seeds = [image_seed(args.seed, i) for i in mine]
    if is_gpt:
        model = model.to(dtype)
        batches = generate_gpt_images(
            model, tokenizer, mine, labels, seeds, sampling, args.eval_bsz, args.image_size_eval
        )
    else:
        batches = generate_images(
            model, tokenizer, scale, mine, labels, seeds, sampling, args.eval_bsz, device, dtype
        )
    seconds = 0.0
    show = world.is_main and sys.stderr.isatty()
    with PngWriter() as writer, tqdm(total=len(mine), unit="image", disable=not show) as bar:
        for batch in batches:
            for index, image in zip(batch.indices, batch.images, strict=True):
                writer.write(run.image(index), image)
            seconds += batch.seconds
            bar.update(len(batch.indices))
    dist.barrier(world)
    if not world.is_main:
        return {}
    former = run.results() if len(missing) < args.num_images else {}
    seconds += former.get("seconds", 0.0)
    generated = len(missing) + former.get("generated", 0)
    results: dict[str, object] = {
        "model": args.model,
        "lazy_mar": args.lazy_mar,
        "line_ar": args.line_ar,
        "method": gpt_method_name(sampling) if is_gpt else method_name(sampling.lazy_mar),
        "num_images": args.num_images,
        "num_iter": model.block_size if is_gpt else args.num_iter,
        "cfg": args.cfg,
        "sec_per_image": seconds / generated if generated else None,
        "generated": generated,
        "seconds": seconds,
        "processes": world.size,
        "eval_bsz": args.eval_bsz,
        "threads": torch.get_num_threads(),
        "images_dir": str(run.images),
        "device": str(device),
        "dtype": config["dtype"],
        **provenance(),
    }
    results |= {"fid": None, "is_mean": None, "is_std": None}
    every_label = [image_label(i, args.num_images, args.class_num) for i in range(args.num_images)]
    if not args.no_score:
        results |= metrics.score(
            str(run.images),
            args.num_images,
            args.features,
            args.features_path,
            args.fid_stats,
            device,
            labels=every_label,
        )
    run.write_sheet(args.num_images)
    write_json(run.path / "results.json", results)
    return results


def method_name(config: LazyMARConfig | None) -> str:
    """MAR, LazyMAR, or LazyMAR with the constants that are not the published ones."""
    if config is None:
        return "MAR"
    published = asdict(LazyMARConfig())
    changed = {k: v for k, v in asdict(config).items() if v != published[k]}
    return ", ".join(["LazyMAR", *(f"{name} {value}" for name, value in changed.items())])


def gpt_method_name(sampling: GPTSampling) -> str:
    """The cache in words: full cache, h2o 1/4, LineAR 1/6 and what differs from its defaults."""
    config = sampling.line_ar
    if config is None or config.method == "none":
        return "full cache"
    budget = Fraction(config.budget).limit_denominator(64)
    if config.method != "linear":
        return f"{config.method} {budget}"
    changed = [
        f"{name} {getattr(config, name)}"
        for name in ("anchors", "recent", "pooling")
        if getattr(config, name) != getattr(LineARConfig(), name)
    ]
    return ", ".join([f"LineAR {budget}", *changed])


def gpt_run_name(model: str, num_images: int, sampling: GPTSampling) -> str:
    """Folder name of a run, such as gpt_xl-line_ar_1-6-cfg1.75-50000."""
    method = gpt_method_name(sampling).lower().replace("linear", "line_ar").replace("/", "-")
    parts = [model, method.replace(", ", "-").replace(" ", "_")]
    parts.append(f"cfg{sampling.cfg:g}")
    plain = GPTSampling(sampling.cfg)
    for field in ("temperature", "top_k", "top_p", "cfg_interval"):
        if getattr(sampling, field) != getattr(plain, field):
            parts.append(f"{field}{getattr(sampling, field):g}")
    return "-".join([*parts, str(num_images)])


def run_name(model: str, num_images: int, sampling: SamplingConfig | GPTSampling) -> str:
    """Folder name of a run, such as mar_huge-lazy_mar-iter64-cfg3.25-50000."""
    if isinstance(sampling, GPTSampling):
        return gpt_run_name(model, num_images, sampling)
    config = sampling.lazy_mar
    method = "mar" if config is None else "lazy_mar"
    if config is not None and config != LazyMARConfig():
        method += "_" + hashlib.sha256(repr(config).encode()).hexdigest()[:6]
    parts = [model, method, f"iter{sampling.num_iter}", f"cfg{sampling.cfg:g}"]
    if sampling.cfg_schedule != "linear":
        parts.append(sampling.cfg_schedule)
    if sampling.temperature != 1.0:
        parts.append(f"temp{sampling.temperature:g}")
    return "-".join([*parts, str(num_images)])
