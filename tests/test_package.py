"""The repository as a package: what it installs and promises, what users of the original call."""

import argparse
import inspect
import os
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from models.presets import PRESETS
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from util.flags import make_parser, resolve

import engine
from models import mar
from models.lazy_mar import LazyMARConfig
from models.vae import AutoencoderKL
from util import download

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings this one
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
BUNDLES = {"mar_tiny": 25e6, "gpt_tiny": 15e6}  # bytes at most
MANUALS = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *(f"pretrained_models/{name}/README.md" for name in BUNDLES),
)


def read(name: str) -> str:
    return (ROOT / name).read_text()


# ---- what is installed -------------------------------------------------------------------------------


def pins(name: str) -> list[Requirement]:
    """The requirements of a file, without its comments and its references to other files."""
    lines = [line.partition("#")[0].strip() for line in read(name).splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def pins_for(name: str, python: str) -> list[Requirement]:
    """Those that a version of Python installs."""
    environment = {"python_version": python, "python_full_version": f"{python}.9"}
    return [p for p in pins(name) if p.marker is None or p.marker.evaluate(environment)]


def names(requirements: list[Requirement]) -> list[str]:
    return sorted(canonicalize_name(requirement.name) for requirement in requirements)


RANGES = {
    "requirements.txt": PYPROJECT["project"]["dependencies"],
    "requirements-dev.txt": PYPROJECT["project"]["optional-dependencies"]["dev"],
}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", RANGES)
def test_every_dependency_has_one_exact_pin_within_its_range(name, python):
    ranges = [Requirement(text) for text in RANGES[name]]
    chosen = pins_for(name, python)
    assert names(chosen) == names(ranges)
    by_name = {canonicalize_name(pin.name): pin for pin in chosen}
    for allowed in ranges:
        (specifier,) = by_name[canonicalize_name(allowed.name)].specifier
        assert specifier.operator == "=="
        assert allowed.specifier.contains(specifier.version), allowed.name


def test_the_tools_are_installed_with_the_package():
    assert "-r requirements.txt" in read("requirements-dev.txt").splitlines()


def test_conda_installs_the_same_requirements_and_a_python_that_is_supported():
    text = re.sub(r"\s*#.*", "", read("environment.yaml"))
    assert re.search(r"^name: lazymar$", text, re.MULTILINE)
    (pip_section,) = re.findall(r"- pip:\n((?:[ ]+- .*\n?)+)", text)
    assert [line.strip() for line in pip_section.splitlines()] == ["- -r requirements.txt"]
    (python,) = re.findall(r"- python=+([\d.]+)", text)
    assert python in SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert python in PYTHONS


def test_every_package_and_module_of_the_project_is_declared():
    declared = PYPROJECT["tool"]["setuptools"]
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == set(declared["packages"])
    assert all((ROOT / f"{module}.py").is_file() for module in declared["py-modules"])


# ---- what is promised --------------------------------------------------------------------------------


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", read("Makefile"), re.MULTILINE))


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LOOP = re.compile(r"for (\w+) in (\S+); do (.+); done")
STARTS = ("make ", "python ", "torchrun ", "sbatch ", "scripts/")


def unrolled(line: str) -> list[str]:
    """A loop over files as one command per file; any other line as it is."""
    loop = LOOP.match(line)
    if loop is None:
        return [line]
    name, pattern, command = loop.groups()
    files = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(pattern))]
    assert files, pattern
    return [command.replace(f"${name}", file) for file in files]


def commands(name: str) -> list[list[str]]:
    """The words of each command in code blocks and in `code` of a Markdown file, or in a script."""
    text = read(name)
    if name.endswith(".md"):
        blocks = [
            block for language, block in BLOCK.findall(text) if language in ("", "bash", "sh")
        ]
        spans = re.findall(r"`([^`]+)`", BLOCK.sub("", text))  # may go on in the next line
        text = "\n".join([*blocks, *(" ".join(span.split()) for span in spans)])
    lines = re.sub(r"\\\n", " ", text).splitlines()
    lines = [re.sub(r"^\s*([A-Z_]+=\S+ +)*", "", each) for line in lines for each in unrolled(line)]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(STARTS)]


SOURCES = [*MANUALS, *(f"scripts/{path.name}" for path in sorted((ROOT / "scripts").glob("*.sh")))]
COMMANDS = [(source, command) for source in SOURCES for command in commands(source)]


def test_commands_are_found_in_every_manual_and_script():
    assert {source for source, _ in COMMANDS} == set(SOURCES)
    assert ("README.md", ["make", "demo"]) in COMMANDS
    assert ("README.md", ["make", "test"]) in COMMANDS
    assert ("benchmarks/README.md", ["scripts/ablation_keep.sh", "--dtype", "bf16"]) in COMMANDS


@pytest.mark.parametrize(("source", "command"), COMMANDS, ids=lambda part: " ".join(part)[:60])
def test_what_a_documented_command_starts_exists(source, command):
    program = command[0]
    if program == "make":
        assert set(command[1:]) <= targets()
    elif program == "sbatch" or program.startswith("scripts/"):
        (script,) = [word for word in command if word.startswith("scripts/")]
        assert os.access(ROOT / script, os.X_OK)
    elif "-m" in command:
        module = command[command.index("-m") + 1]
        assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").is_file()
        files = [word for word in command[3:] if word.startswith("tests/")]
        assert all((ROOT / word).is_file() for word in files)
    else:
        (script,) = [word for word in command if word.endswith(".py")]
        assert (ROOT / script).is_file()


DOCUMENTED = [command for source, command in COMMANDS if source.endswith(".md")]
PROGRAMS = ("eval.py", "main_mar.py", "main_cache.py")
FLAGGED = [
    command
    for command in DOCUMENTED
    if any(word in PROGRAMS or word.endswith(".sh") for word in command[:3])
]
MODULES = [
    command
    for command in DOCUMENTED
    if command[1:2] == ["-m"] and command[2] != "pytest" and len(command) > 3
]


@pytest.mark.parametrize("command", FLAGGED, ids=lambda command: " ".join(command)[:80])
def test_the_flags_of_a_documented_command_parse_and_its_model_exists(command):
    at = next(i for i, word in enumerate(command) if word.endswith((".py", ".sh")))
    program = Path(command[at]).stem if command[at] in PROGRAMS else "eval"  # scripts run eval.py
    args = make_parser(program).parse_args([word for word in command[at + 1 :] if word != "..."])
    resolve(args, program, PRESETS)


class Parsed(Exception):
    """Ends a command as soon as its words are parsed."""


@pytest.mark.parametrize("command", MODULES, ids=lambda command: " ".join(command)[:80])
def test_the_words_of_a_documented_module_parse(command, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args):
        parse_args(*args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [word for word in command[2:] if word != "..."])
    with pytest.raises(Parsed):
        import_module(command[2]).main()


def anchors(manual: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", manual.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", MANUALS)
def test_every_picture_and_local_link_of_a_manual_leads_somewhere(name):
    manual = ROOT / name
    links = re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", manual.read_text()))
    for link in links:
        if not link.startswith(("http:", "https:")):
            path, _, anchor = link.partition("#")
            target = manual.parent / path if path else manual
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_opens_with_a_picture_a_table_and_the_two_commands():
    first_screen = "\n".join(read("README.md").splitlines()[:40])
    places = [first_screen.find(part) for part in ("![", "\n|", "make demo", "make test")]
    assert -1 not in places
    assert places == sorted(places)
    assert "@@" not in read("README.md")  # a place that was to be filled


def test_make_offers_what_is_promised_and_ci_runs_the_tests():
    assert {"demo", "test", "lint"} <= targets()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make test" in read(".ci/run").splitlines()


def test_the_licence_is_mit_everywhere():
    assert read("LICENSE").startswith("MIT License")
    assert PYPROJECT["project"]["license"] == {"text": "MIT"}


@pytest.mark.parametrize("name", BUNDLES)
def test_every_bundled_file_is_described_and_all_are_small(name):
    folder = ROOT / "pretrained_models" / name
    files = [path for path in folder.iterdir() if path.name != "README.md"]
    manual = (folder / "README.md").read_text()
    assert [path.name for path in files if f"`{path.name}`" not in manual] == []
    assert sum(path.stat().st_size for path in files) <= BUNDLES[name]
    promised = re.findall(r"^\| `([^`]+)` \|", manual, re.MULTILINE)
    assert [name for name in promised if not (folder / name).is_file()] == []


@pytest.mark.parametrize("name", BUNDLES)
def test_files_of_a_bundled_model_are_where_its_preset_looks_for_them(name):
    preset = PRESETS[name]
    files = (preset.resume, preset.vae_path, preset.features_path, preset.fid_stats)
    assert [name for name in files if not (ROOT / name).is_file()] == []


# ---- the command lines of the original ---------------------------------------------------------------

EVALUATE_MAR = """--model {model} --diffloss_d {d} --diffloss_w {w} --eval_bsz {bsz}
    --num_images 50000 --num_iter 256 --num_sampling_steps 100 --cfg {cfg} --cfg_schedule linear
    --temperature {temperature} --resume pretrained_models/mar/{model} --evaluate"""
PUBLISHED = [
    EVALUATE_MAR.format(model=model, d=d, w=w, bsz=bsz, cfg=cfg, temperature=temperature)
    for model, d, w, bsz, guided in (
        ("mar_base", 6, 1024, 256, 2.9),
        ("mar_large", 8, 1280, 256, 3.0),
        ("mar_huge", 12, 1536, 128, 3.2),
    )
    for cfg, temperature in ((guided, 1.0), (1.0, 0.95))
]
ALL_FLAGS = """--batch_size 16 --epochs 400 --model mar_large --img_size 256
    --vae_path pretrained_models/vae/kl16.ckpt --vae_embed_dim 16 --vae_stride 16 --patch_size 1
    --num_iter 64 --num_images 50000 --cfg 1.0 --cfg_schedule linear --label_drop_prob 0.1
    --eval_freq 40 --save_last_freq 5 --online_eval --evaluate --eval_bsz 64 --lazy_mar
    --weight_decay 0.02 --grad_checkpointing --lr 1e-4 --blr 1e-4 --min_lr 0 --lr_schedule cosine
    --warmup_epochs 100 --ema_rate 0.9999 --mask_ratio_min 0.7 --grad_clip 3.0 --attn_dropout 0.1
    --proj_dropout 0.1 --buffer_size 64 --diffloss_d 3 --diffloss_w 1024 --num_sampling_steps 100
    --diffusion_batch_mul 1 --temperature 1.0 --data_path ./data/imagenet --class_num 1000
    --output_dir ./output_dir --log_dir ./output_dir --device cuda --seed 1 --resume DIR
    --start_epoch 0 --num_workers 10 --pin_mem --no_pin_mem --world_size 1 --local_rank -1
    --dist_on_itp --dist_url env:// --use_cached --cached_path DIR"""


@pytest.mark.parametrize("program", ["main_mar", "eval"])
@pytest.mark.parametrize("command", PUBLISHED)
def test_the_published_evaluation_of_mar_parses_into_the_published_model(program, command):
    args = make_parser(program).parse_args(command.split())
    preset = resolve(args, program, PRESETS)
    named = PRESETS[args.model]
    assert (args.diffloss_d, args.diffloss_w) == (named.diffloss_d, named.diffloss_w)
    assert (args.num_iter, args.num_images, args.evaluate) == (256, 50000, True)
    assert (args.img_size, args.class_num, args.vae_stride) == (256, 1000, 16)
    assert args.latent_scale == 0.2325
    assert preset.tokenizer == "kl16"


def test_the_published_evaluation_of_lazymar_means_mar_huge():
    command = "--num_images 50000 --eval_bsz 128 --num_iter 64 --lazy_mar"
    args = make_parser("eval").parse_args(command.split())
    resolve(args, "eval", PRESETS)
    assert (args.model, args.resume) == ("mar_huge", "pretrained_models/mar/mar_huge")
    assert (args.diffloss_d, args.diffloss_w, args.cfg) == (12, 1536, 3.25)
    assert engine.SamplingConfig.from_args(args).lazy_mar == LazyMARConfig()


@pytest.mark.parametrize("program", ["main_mar", "main_cache", "eval"])
def test_every_flag_of_the_original_parses(program):
    args = make_parser(program).parse_args(ALL_FLAGS.split())
    assert (args.lr, args.blr, args.dist_url, args.pin_mem) == (1e-4, 1e-4, "env://", False)
    assert args.local_rank == -1
    assert all((args.lazy_mar, args.use_cached, args.online_eval, args.grad_checkpointing))


# ---- the notebook of the original ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "depth", "width"),
    [("mar_base", 6, 1024), ("mar_large", 8, 1280), ("mar_huge", 12, 1536)],
)
def test_the_factories_are_called_by_name_as_in_the_notebook(name, depth, width):
    with torch.device("meta"):
        model = mar.__dict__[name](
            buffer_size=64, diffloss_d=depth, diffloss_w=width, num_sampling_steps="100"
        )
    assert model.diffloss.num_sampling_steps == 100
    assert (model.buffer_size, model.seq_len) == (64, 256)


def test_the_notebook_samples_and_decodes(tmp_path):
    small = {"embed_dim": 8, "ch_mult": (1, 1, 1)}
    torch.save({"model": AutoencoderKL(**small, ch=32).state_dict()}, tmp_path / "kl.ckpt")
    vae = AutoencoderKL(**small, ch=32, ckpt_path=str(tmp_path / "kl.ckpt")).eval()
    model = mar.__dict__["mar_tiny"](
        buffer_size=2, diffloss_d=1, diffloss_w=16, num_sampling_steps="5", img_size=32
    )
    torch.save({"model_ema": model.state_dict()}, tmp_path / "checkpoint-last.pth")
    state_dict = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)["model_ema"]
    model.load_state_dict(state_dict)
    model.eval()
    class_labels = (7, 1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        sampled_tokens = model.sample_tokens(
            bsz=len(class_labels),
            num_iter=2,
            cfg=4.0,
            cfg_schedule="constant",
            labels=torch.Tensor(class_labels).long(),
            temperature=1.0,
            progress=True,
        )
        images = vae.decode(sampled_tokens / 0.2325)
    assert sampled_tokens.shape == (2, 8, 8, 8)
    assert images.shape == (2, 3, 32, 32)


def test_kl16_is_built_as_in_the_notebook():
    positional = ["embed_dim", "ch_mult", "use_variational", "ckpt_path"]
    parameters = inspect.signature(AutoencoderKL).parameters
    assert list(parameters)[:4] == positional
    assert (parameters["use_variational"].default, parameters["ckpt_path"].default) == (True, None)
    with torch.device("meta"):
        vae = AutoencoderKL(embed_dim=16, ch_mult=(1, 1, 2, 2, 4), ckpt_path=None)
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 1) == 66.5


@pytest.mark.parametrize(
    ("call", "path"),
    [
        ("vae", PRESETS["mar_base"].vae_path),
        ("marb", f"{PRESETS['mar_base'].resume}/checkpoint-last.pth"),
        ("marl", f"{PRESETS['mar_large'].resume}/checkpoint-last.pth"),
        ("marh", f"{PRESETS['mar_huge'].resume}/checkpoint-last.pth"),
    ],
)
def test_the_download_calls_of_the_notebook_bring_what_the_models_look_for(call, path, monkeypatch):
    asked = []
    monkeypatch.setattr(download, "fetch", lambda item, overwrite: asked.append(item.path))
    getattr(download, f"download_pretrained_{call}")(overwrite=False)
    assert asked == [path]
