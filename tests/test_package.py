"""The repository as a package: dependencies, the wheel, and what users of the original call."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from engine.cli import make_parser, select
from engine.mar import MARHost
from models.lazy_mar import LazyMARConfig
from tests.support import PROJECT, ROOT

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
BUNDLES = {"mar_tiny": 25e6, "gpt_tiny": 15e6, "janus_tiny": 8e6}  # bytes at most


# ---- dependencies ------------------------------------------------------------------------------------


def pins(name: str, python: str) -> dict[str, Requirement]:
    """What a version of Python installs from a requirements file, without the files that it names."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    environment = {"python_version": python, "python_full_version": f"{python}.9"}
    chosen = [p for p in found if p.marker is None or p.marker.evaluate(environment)]
    return {canonicalize_name(pin.name): pin for pin in chosen}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("name", "ranges"),
    [
        ("requirements.txt", PROJECT["dependencies"]),
        ("requirements-dev.txt", PROJECT["optional-dependencies"]["dev"]),
    ],
)
def test_every_dependency_has_one_exact_pin_within_its_range(name, ranges, python):
    allowed = {canonicalize_name(r.name): r for r in map(Requirement, ranges)}
    chosen = pins(name, python)
    assert sorted(chosen) == sorted(allowed)
    for package, pin in chosen.items():
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert allowed[package].specifier.contains(specifier.version), package


def test_conda_installs_the_same_requirements_and_a_supported_python():
    text = re.sub(r"\s*#.*", "", (ROOT / "environment.yaml").read_text())
    (pip_section,) = re.findall(r"- pip:\n((?:[ ]+- .*\n?)+)", text)
    assert [line.strip() for line in pip_section.splitlines()] == ["- -r requirements.txt"]
    (python,) = re.findall(r"- python=+([\d.]+)", text)
    assert python in PYTHONS
    assert python in SpecifierSet(PROJECT["requires-python"])


# ---- the wheel ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wheel_installs_every_package_and_runs_the_bundled_model(tmp_path):
    source, wheels, home = (tmp_path / name for name in ("source", "wheels", "home"))
    files = "git", "ls-files", "-co", "--exclude-standard"
    listed = subprocess.run(files, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if not name.startswith(("tests/", "benchmarks/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source]
    subprocess.run([*pip, *build], check=True)

    venv.create(tmp_path / "empty", with_pip=False)
    python = tmp_path / "empty" / "bin" / "python"
    (site,) = (tmp_path / "empty" / "lib").glob("python*/site-packages")
    install = ["install", "--no-deps", "--target", site, *wheels.glob("*.whl")]
    subprocess.run([*pip, *install], check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    home.mkdir()  # another working directory: nothing of the repository can be found by chance
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for folder in ("models", "diffusion", "engine", "util")
        for path in (ROOT / folder).rglob("*.py")
    }
    code = f"""
import importlib, runpy, sys
for name in {packages}:
    assert importlib.import_module(name).__file__.startswith({str(site)!r}), name
sys.argv = "eval --model mar_tiny --num_images 2 --eval_bsz 2 --num_iter 2 --device cpu".split()
runpy.run_module("eval", run_name="__main__")
"""
    done = subprocess.run([python, "-c", code], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["num_images"] == 2


@pytest.mark.parametrize("name", BUNDLES)
def test_the_files_of_a_bundled_model_are_described_and_small(name):
    folder = ROOT / "pretrained_models" / name
    manual = (folder / "README.md").read_text()
    files = {path.name for path in folder.iterdir()} - {"README.md"}
    assert files == set(re.findall(r"^\| `([^`]+)` \|", manual, re.MULTILINE))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= BUNDLES[name]


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


def host_of(program: str, command: str) -> MARHost:
    host = select(make_parser(program).parse(command.split()), program).host()
    assert isinstance(host, MARHost)
    return host


@pytest.mark.parametrize("program", ["main_mar", "eval"])
@pytest.mark.parametrize("command", PUBLISHED)
def test_the_published_evaluation_of_mar_parses_into_the_published_model(program, command):
    host = host_of(program, command)
    named = host_of("eval", f"--model {host.model}")
    assert host.geometry == named.geometry
    assert (host.tokenizer, host.resume) == (named.tokenizer, named.resume)
    assert host.tokenizer.latent_scale == 0.2325
    assert (host.geometry.img_size, host.geometry.class_num) == (256, 1000)
    assert host.sampling.num_iter == 256
    assert f"--cfg {host.sampling.cfg} " in command
    assert f"--temperature {host.sampling.temperature} " in command


def test_the_published_evaluation_of_lazymar_means_mar_huge():
    host = host_of("eval", "--num_images 50000 --eval_bsz 128 --num_iter 64 --lazy_mar")
    assert (host.model, host.resume) == ("mar_huge", "pretrained_models/mar/mar_huge")
    assert (host.geometry.diffloss_d, host.geometry.diffloss_w) == (12, 1536)
    assert (host.sampling.cfg, host.sampling.lazy_mar) == (3.25, LazyMARConfig())
