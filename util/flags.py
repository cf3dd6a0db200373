"""The command lines of main_mar.py, main_cache.py and eval.py: parser, defaults, what flags mean.

The flags themselves are in util/flag_groups.py. One marked [model] that is not given follows from the
name of the model, see `resolve`.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import NoReturn, TypeVar

from util.errors import UserError
from util.flag_groups import GROUPS

Preset = TypeVar("Preset")  # a dataclass with at least the fields FROM_MODEL and `resume`

# Flags that `resolve` fills from a preset.
FROM_MODEL = (
    "img_size",
    "image_size_eval",
    "vae_path",
    "vae_embed_dim",
    "vae_stride",
    "patch_size",
    "class_num",
    "buffer_size",
    "diffloss_d",
    "diffloss_w",
    "num_sampling_steps",
    "cfg",
    "top_p",
    "tokenizer",
    "latent_scale",
    "features",
    "features_path",
    "fid_stats",
)
# What --score_only takes from the run that it scores, unless given.
SCORED_AS = ("model", "num_images", "class_num", "features", "features_path", "fid_stats")

# Flags of sampling that one family alone has, with the value that means nothing was asked for.
GPT_ONLY: dict[str, object] = {"top_k": 0, "top_p": 1.0, "cfg_interval": -1}
MAR_ONLY: dict[str, object] = {
    "num_iter": 64,
    "cfg_schedule": "linear",
    **dict.fromkeys(("patch_size", "buffer_size", "diffloss_d", "diffloss_w")),
    **dict.fromkeys(("num_sampling_steps", "vae_embed_dim", "latent_scale")),
}
# LineAR's constants; its rivals have their own. Those of "stratified" are the last three.
LINE_SETTINGS = ("line_anchors", "line_recent", "line_pooling", "line_spaced")
LINE_METHODS = {"linear": LINE_SETTINGS[:3], "stratified": LINE_SETTINGS[1:]}

TRAINING_CFG = 1.0  # MAR's main_mar.py; eval.py takes the preset's

# The smallest sensible value of every number that could be nonsense.
LEAST: dict[str, float] = {
    **dict.fromkeys(("num_images", "num_iter", "eval_bsz", "batch_size", "epochs", "threads"), 1),
    **dict.fromkeys(("log_freq", "save_last_freq", "eval_freq", "diffusion_batch_mul"), 1),
    "accum_iter": 1,
    **dict.fromkeys(("diffloss_d", "diffloss_w", "max_steps", "world_size", "vae_bsz"), 1),
    "patience": 1,
    **dict.fromkeys(("seed", "num_workers", "start_epoch", "warmup_epochs", "lr", "blr"), 0),
    **dict.fromkeys(("min_lr", "weight_decay", "ema_rate", "temperature", "save_minutes"), 0),
    **dict.fromkeys(("latent_scale", "grad_clip"), 1e-6),
    "image_size_eval": 1,
    "top_k": 0,
    **dict.fromkeys(("label_drop_prob", "attn_dropout", "proj_dropout", "aux_weight"), 0),
}
# The largest sensible value of shares and probabilities.
MOST: dict[str, float] = dict.fromkeys(
    ("label_drop_prob", "attn_dropout", "proj_dropout", "ema_rate"), 1
)


class _Parser(argparse.ArgumentParser):
    """A mistake on the command line is a UserError: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


class _HelpFormatter(argparse.HelpFormatter):
    """Adds each default in brackets; [model] where it follows from --model."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.dest in FROM_MODEL:
            return f"{text} [model]"
        if action.nargs == 0 or action.default in (None, "", argparse.SUPPRESS):
            return text
        return f"{text} [%(default)s]"


def line_ar_values(args: argparse.Namespace, fields: Iterable[str]) -> dict[str, object] | None:
    """Fields of LineARConfig that were given, as `lazy_mar_values` does for LazyMARConfig."""
    given = {name: getattr(args, f"line_{name}") for name in fields}
    given = {name: value for name, value in given.items() if value is not None}
    if args.line_ar:
        return given
    if given:
        raise UserError(f"--line_{next(iter(given))} belongs to LineAR: add --line_ar")
    return None


def lazy_mar_values(args: argparse.Namespace, fields: Iterable[str]) -> dict[str, object] | None:
    """Fields of LazyMARConfig that were given, {} for the defaults, None without --lazy_mar.

    UserError if a field is given without --lazy_mar, which would have no effect.
    """
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    if args.lazy_mar:
        return given
    if given:
        raise UserError(f"--{next(iter(given))} belongs to LazyMAR: add --lazy_mar")
    return None


def make_parser(
    program: str, groups: Iterable[Callable[[argparse.ArgumentParser], None]] = GROUPS
) -> argparse.ArgumentParser:
    """Parser of "main_mar", "main_cache" or "eval" with the defaults that this command has.

    These three know every flag, as in the original; only the defaults differ. Another command may
    take some of the groups.
    """
    parser = _Parser(f"{program}.py", formatter_class=_HelpFormatter)
    for add in groups:
        add(parser)
    parser.set_defaults(model="mar_large")
    if program == "main_cache":
        parser.set_defaults(model="mar_huge", batch_size=128)
    if program == "eval":
        parser.set_defaults(model="mar_huge", eval_bsz=128, resume=None)
    return parser


def resolve(args: argparse.Namespace, program: str, presets: Mapping[str, Preset]) -> Preset:
    """Fill every flag that was not given from the model's name, in place; returns the preset used.

    eval.py takes the model's preset. The training commands keep the original's defaults, which do
    not depend on the model, except for mar_tiny, whose geometry is its own. UserError: unknown
    model.
    """
    if args.model not in presets:
        raise UserError(f"--model {args.model} is unknown; use one of {', '.join(presets)}")
    training = program != "eval"
    preset = presets[args.model]
    is_gpt = preset.family == "gpt"
    if training and is_gpt:
        raise UserError(f"{program}.py is for MAR models; eval.py samples --model {args.model}")
    for flag, fits in (("lazy_mar", not is_gpt), ("line_ar", is_gpt)):
        if getattr(args, flag) and not fits:
            raise UserError(f"--{flag} is not for --model {args.model}, which is a {preset.family}")
    family, others = ("MAR", MAR_ONLY) if is_gpt else ("GPT", GPT_ONLY)
    for flag, off in others.items():
        if getattr(args, flag) not in (None, off):
            raise UserError(f"--{flag} is for {family} models, --model {args.model} is none")
    args.family = preset.family
    if training and args.model != "mar_tiny":
        preset = type(preset)()
    values = asdict(preset)
    if training:
        values["cfg"] = TRAINING_CFG
    for name in FROM_MODEL:
        if getattr(args, name) is None:
            setattr(args, name, values[name])
    if args.resume is None:
        args.resume = preset.resume
    if args.lazy_mar and args.head_interval is None:
        args.head_interval = preset.head_interval
    if args.line_ar:
        method = args.line_method or "linear"
        known = LINE_METHODS.get(method, ())
        for flag in LINE_SETTINGS:
            if flag not in known and getattr(args, flag) is not None:
                owner = "stratified's" if flag == "line_spaced" else "LineAR's"
                raise UserError(f"--{flag} is {owner}, --line_method {method} has none")
        if known and args.line_recent is None:
            args.line_recent = preset.line_recent
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not (least <= value < math.inf):
            raise UserError(f"--{name} is {value}; it must be a number of at least {least:g}")
    for name, most in MOST.items():
        if getattr(args, name) > most:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at most {most:g}")
    if args.image_size_eval is None:
        args.image_size_eval = args.img_size
    return preset
