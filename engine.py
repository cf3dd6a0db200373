"""What is done with a model: it is built, it makes images, and its images are scored.

Two families: "mar" (MAR, LazyMAR) and "gpt" (LlamaGen, LineAR). What an evaluation needs to know of
them is here: how images are sampled, which settings decide them, what a run is called. The run
itself knows no model, see util/evaluation/run.py.
"""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from models import llamagen, mar, vq
from models.flops import MARGeometry, image_work
from models.gpt_images import GPTGenerator, GPTSampling
from models.lazy_mar import LazyMARConfig
from models.line_cache import LineARConfig
from models.noise import ImageNoise
from models.plan import DecodingPlan
from models.sampler import Sampler
from models.tokenizers import latent_scale_of, load_tokenizer
from util import checkpoint, dist
from util.device import DTYPES, autocast, can_compile, to_device
from util.errors import UserError
from util.evaluation import run as evaluation
from util.evaluation.dry_run import dry_run
from util.files import sha256_of
from util.flags import lazy_mar_values, line_ar_values

VQ_TOKENIZERS = {"vq16": vq.vq16, "vq_tiny": vq.vq_tiny}
ROPE_TABLE = "freqs_cis"  # some published GPT files hold it; ours is computed


def build_model(args: argparse.Namespace) -> mar.MAR | llamagen.GPT:
    """The model that resolved flags describe, on the CPU: MAR with fresh weights, a GPT without any."""
    try:
        if args.family == "gpt":
            lines, line = gpt_grid(args)
            build = llamagen.__dict__[args.model]
            with torch.device("meta"):  # drawing billions of weights takes minutes
                model = build(block_size=lines * line, num_classes=args.class_num)
            return model.to_empty(device="cpu")
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
    if args.vae_dtype is not None:
        raise UserError("--vae_dtype is for MAR's tokenizer: a GPT's decodes in float32")
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


class MarGenerator:
    """MAR or LazyMAR and a tokenizer as a util.generation.ImageGenerator."""

    def __init__(
        self,
        model: mar.MAR,
        tokenizer: nn.Module,
        latent_scale: float,
        sampling: SamplingConfig,
        device: torch.device,
        dtype: torch.dtype,
        vae_bsz: int | None = None,
        vae_dtype: torch.dtype | None = None,
        compile: bool = False,
        graphs: bool = False,
    ) -> None:
        """vae_bsz: images decoded at once, all without it; vae_dtype: `dtype` without it.

        compile and graphs as in models.sampler.Sampler.
        """
        self.sampler = Sampler(model, dtype, compile=compile, graphs=graphs)
        self.tokenizer, self.latent_scale = tokenizer, latent_scale
        self.sampling, self.device = sampling, device
        self.vae_bsz, self.vae_dtype = vae_bsz, vae_dtype or dtype
        self.noise_shape = (model.seq_len, model.diffloss.num_sampling_steps, model.token_dim)
        if device.type == "cpu" or (device.type == "cuda" and self.vae_dtype != torch.float32):
            # Tensor cores' own layout; KL-16 on a CPU: 1.06 times as fast in float32, 1.19 in bf16.
            tokenizer.to(memory_format=torch.channels_last)

    def prepare(self, labels: Sequence[int], seeds: Sequence[int]) -> tuple[Tensor, ImageNoise]:
        """Labels (B,) and the images' noise, on the CPU."""
        return torch.tensor(labels), ImageNoise.from_seeds(seeds, *self.noise_shape)

    @torch.no_grad()
    def generate(self, prepared: tuple[Tensor, ImageNoise]) -> Tensor:
        """Images (B, 3, H, W) float32 in [-1, 1]."""
        labels, noise = prepared
        noise = ImageNoise(to_device(noise.orders, self.device), to_device(noise.head, self.device))
        sampling = self.sampling
        latents = self.sampler.sample_tokens(
            len(labels),
            sampling.num_iter,
            sampling.cfg,
            sampling.cfg_schedule,
            labels,
            sampling.temperature,
            lazy_mar=sampling.lazy_mar,
            noise=noise,
        )
        parts = (latents.float() / self.latent_scale).split(self.vae_bsz or len(latents))
        with autocast(self.device, self.vae_dtype):
            return torch.cat([self.tokenizer.decode(part).float() for part in parts])


def evaluate(
    model: mar.MAR | llamagen.GPT,
    tokenizer: nn.Module,
    args: argparse.Namespace,
    meeting: dist.Meeting,
    device: torch.device,
    dtype: torch.dtype,
    weights: str,
    redo: bool = True,
) -> dict[str, object]:
    """Generate what is missing of a run, score it, and return its results (process 0; others {}).

    `weights` says which weights the model holds; images of other weights are not mixed in. With
    --dry_run say what would be done, and do nothing but one batch. redo: False leaves a run that is
    complete and scored as it is.
    """
    sampling = sampling_of(args)
    scale = None
    if args.family == "gpt":
        vae_dtype = torch.float32
        generator = GPTGenerator(
            model.to(dtype), tokenizer, sampling, args.image_size_eval, args.vae_bsz
        )
        flops, num_iter = gpt_flops(model, sampling), model.block_size
        method, name = sampling.method, sampling.run_name(args.model, args.num_images)
    else:
        scale = scale_of(tokenizer, args)
        vae_dtype = DTYPES[args.vae_dtype] if args.vae_dtype else dtype
        fast = device.type == "cuda" and not args.no_compile
        compile = fast and can_compile(device, show=meeting.world.is_main)
        args.no_compile |= fast and not compile  # recorded as it was done
        generator = MarGenerator(
            model,
            tokenizer,
            scale,
            sampling,
            device,
            dtype,
            args.vae_bsz,
            vae_dtype,
            compile=compile,
            graphs=fast,
        )
        flops, num_iter = flops_per_image(model, sampling), args.num_iter
        method = method_name(sampling.lazy_mar)
        name = run_name(args.model, args.num_images, sampling)
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
        "vae_dtype": str(vae_dtype).removeprefix("torch."),
        **asdict(sampling),
    }
    about = {
        "model": args.model,
        "lazy_mar": args.lazy_mar,
        "line_ar": args.line_ar,
        "method": method,
        "num_images": args.num_images,
        "num_iter": num_iter,
        "cfg": args.cfg,
    }
    run = evaluation.Run.from_args(args, name, config, about, meeting.world.size)
    if not redo and (results := evaluation.finished(run)):
        return results
    if args.dry_run:
        return dry_run(run, generator, meeting.world, device, flops)
    return evaluation.evaluate(run, generator, meeting, device)


def gpt_flops(model: llamagen.GPT, sampling: GPTSampling) -> float:
    """Operations for one image with the full cache; tokenizer not counted."""
    branches, tokens = 2 if sampling.cfg > 1 else 1, model.block_size
    matrices = [p for p in model.layers.parameters() if p.dim() == 2] + [model.output.weight]
    width = model.n_head * model.head_dim
    attention = 4 * width * len(model.layers) * tokens * (tokens + 1) / 2
    return branches * (2 * tokens * sum(p.numel() for p in matrices) + attention)


def flops_per_image(model: mar.MAR, sampling: SamplingConfig) -> float:
    """Operations for one image without caches, which LazyMAR saves part of; tokenizer not counted."""
    plan = DecodingPlan.create(
        model.seq_len, sampling.num_iter, sampling.cfg, sampling.cfg_schedule
    )
    return image_work(MARGeometry.of(model), plan, executed=True).total


def method_name(config: LazyMARConfig | None) -> str:
    """MAR, LazyMAR, or LazyMAR with the constants that are not the published ones."""
    if config is None:
        return "MAR"
    published = asdict(LazyMARConfig())
    changed = {k: v for k, v in asdict(config).items() if v != published[k]}
    return ", ".join(["LazyMAR", *(f"{name} {value}" for name, value in changed.items())])


def run_name(model: str, num_images: int, sampling: SamplingConfig) -> str:
    """Folder name of a run, such as mar_huge-lazy_mar-iter64-cfg3.25-50000."""
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
