"""Flags: the original's names and defaults, and what follows from the model's name."""

import pytest
from models.presets import PRESETS
from util.flags import make_parser, resolve

from util.errors import UserError

# spec of the original command lines: flag => default of main_mar.py
ORIGINAL = {
    "batch_size": 16,
    "epochs": 400,
    "model": "mar_large",
    "img_size": 256,
    "vae_path": "pretrained_models/vae/kl16.ckpt",
    "vae_embed_dim": 16,
    "vae_stride": 16,
    "patch_size": 1,
    "num_iter": 64,
    "num_images": 50000,
    "cfg": 1.0,
    "cfg_schedule": "linear",
    "label_drop_prob": 0.1,
    "eval_freq": 40,
    "save_last_freq": 5,
    "online_eval": False,
    "evaluate": False,
    "eval_bsz": 64,
    "lazy_mar": False,
    "weight_decay": 0.02,
    "grad_checkpointing": False,
    "lr": None,
    "blr": 1e-4,
    "min_lr": 0.0,
    "lr_schedule": "constant",
    "warmup_epochs": 100,
    "ema_rate": 0.9999,
    "mask_ratio_min": 0.7,
    "grad_clip": 3.0,
    "attn_dropout": 0.1,
    "proj_dropout": 0.1,
    "buffer_size": 64,
    "diffloss_d": 12,
    "diffloss_w": 1536,
    "num_sampling_steps": "100",
    "diffusion_batch_mul": 1,
    "temperature": 1.0,
    "data_path": "./data/imagenet",
    "class_num": 1000,
    "output_dir": "./output_dir",
    "seed": 1,
    "resume": "",
    "start_epoch": 0,
    "num_workers": 10,
    "pin_mem": True,
    "use_cached": False,
    "dist_url": "env://",
}


def parse(program, *flags):
    args = make_parser(program).parse_args(flags)
    resolve(args, program, PRESETS)
    return vars(args)


def test_main_mar_has_the_flags_and_defaults_of_the_original():
    args = parse("main_mar")
    assert {name: args[name] for name in ORIGINAL} == ORIGINAL


def test_the_defaults_of_eval_are_those_of_lazymar():
    args = parse("eval")
    assert (args["model"], args["cfg"], args["eval_bsz"]) == ("mar_huge", 3.25, 128)
    assert args["resume"] == "pretrained_models/mar/mar_huge"
    assert (args["diffloss_d"], args["diffloss_w"]) == (12, 1536)


def test_eval_of_a_named_model_needs_no_other_flag():
    args = parse("eval", "--model", "mar_base")
    assert (args["diffloss_d"], args["diffloss_w"]) == (6, 1024)
    assert args["resume"] == "pretrained_models/mar/mar_base"


def test_training_of_a_large_model_keeps_the_head_of_the_original():
    args = parse("main_mar", "--model", "mar_base")
    assert (args["diffloss_d"], args["diffloss_w"], args["resume"]) == (12, 1536, "")


@pytest.mark.parametrize("program", ["main_mar", "main_cache", "eval"])
def test_mar_tiny_brings_its_geometry_everywhere(program):
    args, preset = parse(program, "--model", "mar_tiny"), PRESETS["mar_tiny"]
    for name in ("img_size", "vae_stride", "vae_embed_dim", "class_num", "diffloss_w", "tokenizer"):
        assert args[name] == getattr(preset, name)


@pytest.mark.parametrize("program", ["main_mar", "eval"])
def test_a_flag_that_is_given_wins_over_the_preset(program):
    args = parse(program, "--model", "mar_tiny", "--cfg", "1.5", "--latent_scale", "2")
    assert (args["cfg"], args["latent_scale"]) == (1.5, 2.0)


def test_the_published_commands_parse():
    flags = "--model mar_base --diffloss_d 6 --diffloss_w 1024 --eval_bsz 256 --num_images 50000"
    flags += " --num_iter 256 --num_sampling_steps 100 --cfg 2.9 --cfg_schedule linear"
    flags += " --temperature 1.0 --resume pretrained_models/mar/mar_base --evaluate --no_pin_mem"
    args = parse("main_mar", *flags.split())
    assert (args["num_iter"], args["cfg"], args["pin_mem"]) == (256, 2.9, False)


def test_an_unknown_model_is_refused_with_the_known_names():
    with pytest.raises(UserError, match=r"mar_medium is unknown; use one of mar_base, mar_large"):
        parse("main_mar", "--model", "mar_medium")
