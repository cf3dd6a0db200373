"""The commands' flags: the original's names and defaults, and what follows from the model's name."""

import runpy
import sys

import pytest

from engine import FAMILIES, cli
from engine.base import ComputeConfig
from engine.llamagen import PRESETS as GPT_PRESETS
from engine.mar import PRESETS as MAR_PRESETS
from models.mar_config import MARConfig
from tests.support import ROOT
from util.config import flags_of
from util.data.config import DataConfig
from util.device import DeviceConfig
from util.dist import LaunchConfig
from util.errors import UserError
from util.evaluation.config import EvaluationConfig
from util.training.config import TrainConfig
from util.training.optimizer import OptimizerConfig

PROGRAMS = ("main_mar", "main_cache", "eval")
CONFIGS = (ComputeConfig, DataConfig, DeviceConfig, EvaluationConfig, LaunchConfig, OptimizerConfig)
CONFIGS += (TrainConfig,)
# The original's command line: flag => default of main_mar.py
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
    "log_dir": None,
    "seed": 1,
    "resume": "",
    "start_epoch": 0,
    "num_workers": 10,
    "pin_mem": True,
    "use_cached": False,
    "cached_path": None,
    "world_size": 1,
    "local_rank": -1,
    "dist_on_itp": False,
    "dist_url": "env://",
}
# Where the other commands of the original differ; LazyMAR's eval.py.
DIFFERENT = {
    "main_mar": {},
    "main_cache": {"model": "mar_huge", "batch_size": 128},
    "eval": {
        "model": "mar_huge",
        "cfg": 3.25,
        "eval_bsz": 128,
        "resume": "pretrained_models/mar/mar_huge",
    },
}


def values(program: str, *words: str) -> dict[str, object]:
    """Every flag's value in the configs of a command line."""
    selection = cli.parse(program, words=words)
    selection.host()
    selection.request()
    for config in CONFIGS:
        selection.flags.build(config)
    return selection.flags.resolved


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_command_has_the_flags_and_defaults_of_the_original(program):
    found = values(program)
    expected = {**ORIGINAL, **DIFFERENT[program]}
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_of_the_original_can_be_given_to_every_command(program):
    expected = {**ORIGINAL, "model": "mar_base", "log_dir": "a", "cached_path": "b", "lr": 0.5}
    expected |= {"resume": "c", "device": "cpu", "world_size": 1, "num_iter": 7, "cfg": 2.0}
    expected["min_lr"] = 0.25
    words = []
    for name, value in expected.items():
        words += [f"--{name}", str(value)]
    found = values(program, *words)
    assert {name: found[name] for name in expected} == expected
    switches = ["--online_eval", "--evaluate", "--lazy_mar", "--grad_checkpointing", "--use_cached"]
    found = values(program, *switches, "--no_pin_mem", "--dist_on_itp")
    assert all(found[switch.removeprefix("--")] is True for switch in switches)
    assert (found["pin_mem"], found["dist_on_itp"]) == (False, True)


@pytest.mark.parametrize(
    ("program", "name", "head", "resume"),
    [
        ("eval", "mar_base", (6, 1024), "pretrained_models/mar/mar_base"),
        ("eval", "mar_large", (8, 1280), "pretrained_models/mar/mar_large"),
        ("main_mar", "mar_base", (12, 1536), ""),  # the original's, whatever the model
    ],
)
def test_the_head_and_the_weights_follow_from_the_model_in_eval_alone(program, name, head, resume):
    found = values(program, "--model", name)
    assert (found["diffloss_d"], found["diffloss_w"], found["resume"]) == (*head, resume)


@pytest.mark.parametrize("program", PROGRAMS)
def test_mar_tiny_has_its_geometry_in_every_command(program):
    found = values(program, "--model", "mar_tiny")
    preset, flags = MAR_PRESETS["mar_tiny"], {flag.name for flag in flags_of(MARConfig)}
    for name in ("tokenizer", "vae_path", *(flags & preset.keys())):
        assert found[name] == preset[name], name
    assert bool(found["resume"]) == (program == "eval")


@pytest.mark.parametrize("program", ["main_mar", "eval"])
def test_a_flag_that_is_given_wins_over_the_preset(program):
    found = values(program, "--model", "mar_tiny", "--cfg", "1.5", "--latent_scale", "2")
    assert (found["cfg"], found["latent_scale"]) == (1.5, 2.0)


@pytest.mark.parametrize("model", ["mar_base", "mar_tiny"])
@pytest.mark.parametrize(("preset", "num_iter"), [("balanced", 40), ("fast", 24)])
def test_a_run_of_a_preset_has_its_name_unless_a_flag_overrides_it(model, preset, num_iter):
    def host(**flags):
        return cli.named(model, preset=preset, **flags).host()

    assert host().summary()["method"] == preset
    assert host().run_name(50).startswith(f"{model}-{preset}-iter{num_iter}-")
    for flags in ({"num_iter": 8}, {"warmup": 1}, {"head_cache": True}, {"diff_upper_steps": 20}):
        assert host(**flags).summary()["method"] != preset


def test_the_published_gpts_of_classes_draw_384_pixels_and_are_saved_at_256():
    for name in GPT_PRESETS.keys() - {"gpt_tiny"}:
        images = cli.named(name).host().images
        size = int(name.rpartition("_")[2]) if "t2i" in name else 384
        assert images.img_size == size
        assert images.image_size_eval == (None if "t2i" in name else 256)


def test_model_names_are_unique_over_all_families():
    names = [name for family in FAMILIES.values() for name in family.presets]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("program", [*PROGRAMS, "demo"])
def test_help_is_grouped_and_fits_on_three_screens(program, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.parse(program, "What it does.", ["--help"])
    assert exit_info.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 160
    assert max(map(len, lines)) <= 120
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert len(titles) >= 8


@pytest.mark.parametrize(
    ("program", "words", "named"),
    [
        ("eval", "--temperature -1", "--temperature is -1.0"),
        ("eval", "--keep abc", "'abc' is no"),
        ("eval", "--head_skip a", "'a' is no"),
        (
            "eval",
            "--diff_upper_steps 200",
            "--diff_upper_steps: 200 denoising steps exceed the model's",
        ),
        ("eval", "--diff_upper_steps 2000", "--diff_upper_steps is 2000"),
        ("eval", "--diff_tau 2", "--diff_tau is 2.0"),
        ("eval", "--diff_t_start 2000", "--diff_t_start is 2000"),
        ("eval", "--diff_upper_steps 1", "--diff_upper_steps is 1"),
        ("eval", "--preset fast --diff_upper_steps 7", "more than --diff_upper_steps 7"),
        ("main_mar", "--batch_size 0", "--batch_size is 0"),
        ("main_mar", "--log_freq 0", "--log_freq is 0"),
        ("main_mar", "--lr -1", "--lr is -1.0"),
        ("main_mar", "--save_last_freq 0", "--save_last_freq is 0"),
        ("main_mar", "--model gpt_tiny", "main_mar.py is for MAR models"),
        ("main_cache", "--num_workers -1", "--num_workers is -1"),
    ],
)
def test_a_nonsensical_flag_is_named_with_its_value(program, words, named):
    with pytest.raises(UserError) as error:
        values(program, *words.split())
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["eval.py", "main_mar.py", "main_cache.py"])
def test_a_command_prints_one_line_and_exits_with_2(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [command, "--model", "mar_tiny", "--world_size", "8"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / command), run_name="__main__")
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: 8 processes are stated")
    assert captured.err.count("\n") == 1
    assert not any(tmp_path.iterdir())
