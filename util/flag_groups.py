"""Every flag of the three commands, group by group.

Names and defaults are those of MAR's and LazyMAR's command lines. Where it says nothing else, a flag
that is not given has the default that its command gives it, see util/flags.py.
"""

import argparse
from fractions import Fraction

from util.batch_grid import SEED_MODES
from util.device import DTYPES
from util.dist import PATIENCE
from util.score_request import METRICS


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--model",
        metavar="NAME",
        help="mar_base, mar_large, mar_huge, mar_tiny; gpt_b to gpt_3b, gpt_tiny",
    )
    add("--img_size", type=int, help="height and width of the images, pixels")
    add("--image_size_eval", type=int, help="GPT: pixels of the saved images")
    add("--patch_size", type=int, help="latents per token and side")
    add("--class_num", type=int, help="number of classes")
    add("--buffer_size", type=int, help="class tokens in front of the image's tokens")
    add("--diffloss_d", type=int, help="residual blocks of the diffusion head")
    add("--diffloss_w", type=int, help="width of the diffusion head")
    add("--num_sampling_steps", help="denoising steps of the head when sampling")
    add("--masked_keep", type=float, default=1.0, help="share of masked tokens decoded in training")
    add("--aux_weight", type=float, default=0.0, help="of an auxiliary regression of the tokens")
    add(
        "--pos_init",
        choices=("normal", "sincos"),
        default="normal",
        help="start of the position tables; sincos learns faster",
    )
    add("--diffusion_batch_mul", type=int, default=1, help="noise draws per token in training")
    add("--label_drop_prob", type=float, default=0.1, help="labels dropped, for guidance")
    add("--mask_ratio_min", type=float, default=0.7, help="least share of masked tokens")
    add("--attn_dropout", type=float, default=0.1, help="dropout of the attention")
    add("--proj_dropout", type=float, default=0.1, help="dropout of the projections")
    add("--grad_checkpointing", action="store_true", help="trade time for memory in training")


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tokenizer").add_argument
    add(
        "--tokenizer", choices=("kl16", "linear", "vq16", "vq_tiny"), help="kind of the autoencoder"
    )
    add("--vae_path", metavar="FILE", help="weights of the tokenizer")
    add("--vae_embed_dim", type=int, help="channels of its latents")
    add("--vae_stride", type=int, help="pixels per latent and side")
    add("--latent_scale", type=float, help="factor from its latents to the model's")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add("--num_iter", type=int, default=64, help="autoregressive steps per image")
    add("--cfg", type=float, help="guidance scale, 1.0 is none")
    add(
        "--cfg_schedule",
        choices=("linear", "constant"),
        default="linear",
        help="guidance over steps",
    )
    add("--temperature", type=float, default=1.0, help="of the diffusion head, or of the codes")
    add("--top_k", type=int, default=0, help="GPT: draw from the most likely codes, 0 is all")
    add("--top_p", type=float, help="GPT: draw from this share of probability")
    add("--cfg_interval", type=int, default=-1, help="GPT: last guided step, -1 is all")


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation").add_argument
    add("--num_images", type=int, default=50000, help="images to generate")
    add("--eval_bsz", type=int, default=64, help="images per batch")
    add("--vae_bsz", type=int, help="images that the tokenizer decodes at once; without it a batch")
    add("--vae_dtype", choices=tuple(DTYPES), help="of the tokenizer; without it --dtype")
    add("--no_compile", action="store_true", help="on CUDA: no torch.compile, no CUDA graphs")
    add(
        "--overwrite", action="store_true", help="discard images of another configuration, or a run"
    )
    add("--no_save", action="store_true", help="score images as they come and keep none")
    add("--save_npz", action="store_true", help="write ADM's sample batch, samples.npz, too")
    add("--dry_run", action="store_true", help="say what would be done and how long it takes")
    add(
        "--seed_mode",
        choices=SEED_MODES,
        default="image",
        help="image: each has its own seed; rank: seeds follow the process, as in the original",
    )
    add(
        "--patience",
        type=float,
        default=PATIENCE,
        help="seconds without a sign of life until another process counts as dead",
    )


def add_scoring(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("scoring").add_argument
    add("--no_score", action="store_true", help="generate only")
    add("--score_only", metavar="DIR", help="score a run's folder, or one of numbered PNGs")
    add(
        "--metrics",
        type=_metrics,
        default="fid,isc",
        metavar="NAME,...",
        help=f"any of {', '.join(METRICS)}",
    )
    add("--fid_stats", metavar="FILE", help="npz with mu and sigma of the reference images")
    add("--features", metavar="NAME", help="feature extractor of FID and IS")
    add("--features_path", metavar="FILE", help="its weights")


def _metrics(text: str) -> tuple[str, ...]:
    """Names of metrics: fid,pr is ("fid", "pr")."""
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is no metric; use {', '.join(METRICS)}, with commas between"
        )
    return names


def add_lazy_mar(parser: argparse.ArgumentParser) -> None:
    """One flag per field of LazyMARConfig; None leaves the published default."""
    group = parser.add_argument_group(
        "LazyMAR", "--lazy_mar takes the published constants; the others change one of them each"
    )
    add = group.add_argument
    add("--lazy_mar", action="store_true", help="sample with LazyMAR's caches")
    add("--warmup", type=int, help="refresh steps at the beginning (5)")
    add("--interval", type=int, help="steps from one refresh to the next (9)")
    add("--probe_layer", type=int, help="decoder layer that tells which tokens changed (3)")
    add("--keep_floor", type=int, help="positions kept besides those being decoded (15)")
    add(
        "--keep",
        type=_keep_schedule,
        metavar="P:R,...",
        help="from progress P on keep at least the share R, such as 0:1,0.3125:0.6,0.625:0.05",
    )
    add(
        "--token_selection",
        metavar="NAME",
        help="which these are: similarity, or as a control inverse_similarity, oldest or random "
        "(similarity)",
    )
    for name, what in (
        ("token_cache", "compute only tokens that changed"),
        ("condition_cache", "take the unconditional branch from its cached residual"),
        ("head_cache", "cache blocks inside the diffusion head"),
        ("head_reuse_adaln", "let that cache skip modulations too, which the paper does not"),
    ):
        default = "false" if name == "head_reuse_adaln" else "true"
        what = f"{what} ({default})"
        add(f"--{name}", nargs="?", type=_boolean, const=True, metavar="BOOL", help=what)
        add(f"--no_{name}", f"--no-{name}", dest=name, action="store_false", default=None)
    add(
        "--head_interval",
        type=int,
        help="denoising steps from one full one to the next (7) [model]",
    )
    add("--head_skip", type=_blocks, metavar="I,...", help="head blocks skipped between (1,2,3,4)")
    add("--head_warm", type=float, help="share of steps above which other blocks are renewed (0.9)")


def add_line_ar(parser: argparse.ArgumentParser) -> None:
    """One flag per field of LineARConfig; None leaves its default."""
    group = parser.add_argument_group("LineAR", "for GPT models; --line_ar takes the defaults")
    add = group.add_argument
    add("--line_ar", action="store_true", help="compress the key-value cache to a few lines")
    add(
        "--line_budget",
        type=_budget,
        metavar="SHARE|LINES",
        help="image tokens kept: a share like 1/6, or a number of lines above 1 (1/6)",
    )
    add("--line_anchors", type=int, help="first tokens that are never evicted (8)")
    add("--line_recent", type=int, help="newest lines that are never evicted (2) [model]")
    methods = "linear, none, streaming, h2o, rkv, snapkv, h2o_last or stratified (linear)"
    add("--line_method", help=methods)
    add("--line_pooling", help="of the attention of a line's queries: mean, max or last (mean)")
    add("--line_spaced", type=int, help="tokens of each older line that stratified keeps (1)")


def _budget(text: str) -> float:
    """1/6, 0.25 or 4."""
    try:
        return float(Fraction(text))
    except (ValueError, ArithmeticError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no budget like 1/6, 0.25 or 4") from error


def _keep_schedule(text: str) -> tuple[tuple[float, float], ...]:
    """Pairs of progress and ratio: 0:1,0.5:0.05 is ((0.0, 1.0), (0.5, 0.05))."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((float(progress), float(ratio)) for progress, ratio in pairs)
    except ValueError as error:
        example = "0:1,0.3125:0.6,0.625:0.05"
        raise argparse.ArgumentTypeError(f"{text!r} is no schedule like {example}") from error


def _blocks(text: str) -> tuple[int, ...]:
    """Numbers of blocks: 1,2,3 is (1, 2, 3), nothing is ()."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of blocks like 1,2,3") from error


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--batch_size", type=int, default=16, help="images per step and process")
    add("--accum_iter", type=int, default=1, help="batches per process whose gradients are added")
    add("--epochs", type=int, default=400, help="length of the schedule")
    add("--max_steps", type=int, help="stop after so many steps; the schedule stays")
    add("--lr", type=float, help="peak learning rate; without it blr * images per step / 256")
    add("--blr", type=float, default=1e-4, help="base learning rate")
    add("--min_lr", type=float, default=0.0, help="end of the cosine")
    add(
        "--lr_schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="after the warm-up",
    )
    add("--warmup_epochs", type=float, default=100, help="linear warm-up")
    add("--weight_decay", type=float, default=0.02, help="of AdamW")
    add("--grad_clip", type=float, default=3.0, help="largest gradient norm")
    add("--ema_rate", type=float, default=0.9999, help="of the averaged weights")
    add("--start_epoch", type=int, default=0, help="first epoch, when nothing is resumed")
    add("--online_eval", action="store_true", help="evaluate during training")
    add("--eval_freq", type=int, default=40, help="epochs between two evaluations")
    add("--evaluate", action="store_true", help="only evaluate the checkpoint of --resume")
    add("--save_last_freq", type=int, default=5, help="epochs between two checkpoints")
    add("--save_minutes", type=float, help="also save a checkpoint every so many minutes")
    add("--compile", action="store_true", help="torch.compile blocks and head for training")
    add("--log_freq", type=int, default=20, help="steps between two lines of the log")


def add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="./data/imagenet", metavar="DIR", help="images in DIR/train/CLASS/*")
    add("--cached_path", metavar="DIR", help="latents in DIR/CLASS/*.npz, see main_cache.py")
    add("--use_cached", action="store_true", help="train on the latents of --cached_path")
    add(
        "--cache_in_memory",
        action=argparse.BooleanOptionalAction,
        help="read all latents into memory first; without the flag if they are below 4 GiB",
    )
    add("--check_data", action="store_true", help="read every file before the beginning")
    add("--num_workers", type=int, default=10, help="processes that read data")
    add("--pin_mem", action="store_true", default=True, help="page-locked batches for CUDA")
    add("--no_pin_mem", action="store_false", dest="pin_mem")


def add_weights(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("weights, seed and device").add_argument
    add("--resume", default="", metavar="DIR", help="checkpoint-last.pth is in DIR")
    add("--no_ema", action="store_true", help="evaluate model instead of model_ema")
    add("--seed", type=int, default=1, help="of everything random")
    add("--device", help="cpu, cuda, cuda:1, mps; without it cuda if there is one, else cpu")
    add("--dtype", choices=tuple(DTYPES), help="without it bf16 on cuda, float32 elsewhere")
    add("--threads", type=int, help="CPU threads per process (1)")


def add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="./output_dir", metavar="DIR", help="checkpoints, images, log")
    add("--log_dir", metavar="DIR", help="TensorBoard files; without it --output_dir")
    add("--world_size", type=int, default=1, help="accepted; torchrun starts the processes")
    add("--local_rank", type=int, default=-1, help="accepted; torchrun sets LOCAL_RANK")
    add("--dist_on_itp", action="store_true", help="take the ranks from Open MPI's environment")
    add("--dist_url", default="env://", help="where the processes meet")


GROUPS = (
    add_model,
    add_tokenizer,
    add_sampling,
    add_evaluation,
    add_scoring,
    add_lazy_mar,
    add_line_ar,
    add_training,
    add_data,
    add_weights,
    add_run,
)
