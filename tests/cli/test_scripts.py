"""The scripts of published rows and ablations: their commands parse into what their heads say."""

import os
import subprocess
from pathlib import Path

import pytest
from models.presets import PRESETS
from util.flags import make_parser, resolve

import engine
from benchmarks import ablations
from benchmarks.ablation_rows import MAR
from models.lazy_mar import LazyMARConfig
from util.errors import UserError
from util.published import ROWS, tflops_at_64

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.sh"))
ABLATIONS = [name for name in SCRIPTS if name.startswith("ablation_")]


def words_of(name: str, *flags: str, **environment: str) -> list[str]:
    """What the script hands to torchrun, which is replaced."""
    stub = {"BASH_FUNC_torchrun%%": '() { printf "%s\\n" "$@"; }'}
    command = ["bash", f"scripts/{name}.sh", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment, **stub}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def head_of(name: str) -> str:
    """The comment at the top."""
    lines = (ROOT / f"scripts/{name}.sh").read_text().splitlines()[1:]
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_valid_bash(name):
    subprocess.run(["bash", "-n", f"scripts/{name}.sh"], cwd=ROOT, check=True)
    assert os.access(ROOT / f"scripts/{name}.sh", os.X_OK)


def test_every_published_row_has_its_script():
    assert set(ROWS) == {name for name in SCRIPTS if name.startswith(("mar_", "lazymar_"))}


@pytest.mark.parametrize("name", ROWS)
def test_a_published_row_is_sampled_as_its_head_says(name):
    row, words = ROWS[name], words_of(name, "--dry_run", PROCESSES="4")
    assert words[:3] == ["--standalone", "--nproc_per_node=4", "eval.py"]
    args = make_parser("eval").parse_args(words[3:])
    resolve(args, "eval", PRESETS)
    sampling = engine.SamplingConfig.from_args(args)
    assert (args.model, args.num_images, args.dry_run) == (row.model, 50000, True)
    asked = (sampling.num_iter, sampling.cfg, sampling.temperature)
    assert asked == (row.num_iter, row.cfg, row.temperature)
    assert sampling.lazy_mar == (LazyMARConfig() if row.lazy_mar else None)


@pytest.mark.parametrize("name", ROWS)
def test_the_head_of_a_published_row_states_its_numbers(name):
    row, head = ROWS[name], head_of(name)
    method, size = "LazyMAR" if row.lazy_mar else "MAR", row.model[len("mar_")].upper()
    assert head.startswith(f"# {method}-{size}, {row.num_iter} steps")
    assert f"FID {row.fid:.2f}, IS {row.inception:.1f}" in head
    if row.tflops:
        costs = f"{row.gpu_s:.2f} s per image on an RTX 3090, {row.cpu_s:.2f} s on a CPU"
        assert f"{costs}, {row.tflops:.2f} TFLOPs" in head
    if row.lazy_mar:
        ratio = tflops_at_64(row.model, lazy_mar=False) / row.tflops
        assert f"(ratio {ratio:.2f})" in head
    assert ("without guidance" in head) == (row.cfg == 1.0)


def test_every_group_of_rows_has_its_script():
    found = []
    for name in ABLATIONS:
        words = words_of(name, "--num_images", "20", MODEL="mar_tiny")
        assert words[1:4] == ["--nproc_per_node=1", "-m", "benchmarks.ablations"]
        args = ablations.parse_args(words[4:])
        assert (args.model, args.num_images) == ("mar_tiny", 20)
        found += args.group
    assert sorted(found) == sorted(ablations.GROUPS)
    assert ablations.parse_args(words_of(ABLATIONS[0])[4:]).model == "mar_huge"


def test_an_ablation_has_sizes_that_fit_its_model():
    tiny, huge = (ablations.parse_args(["--model", model]) for model in ("mar_tiny", "mar_huge"))
    assert (tiny.num_images, tiny.eval_bsz, tiny.group) == (300, 100, list(ablations.GROUPS))
    assert (huge.num_images, huge.eval_bsz) == (50000, 128)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--group", "cache"], "--group cache is unknown; use all, or some of caches"),
        (["--interval", "3"], "--interval is what the rows"),
        (["--lazy_mar"], "--lazy_mar is what the rows"),
        (["--num_iter", "32"], "--num_iter is what the rows"),
        (["--no_save"], "--no_save"),
        (["--model", "gpt_tiny"], "gpt_tiny has no LazyMAR"),
    ],
)
def test_what_an_ablation_cannot_do_is_named(words, named):
    with pytest.raises(UserError, match=named):
        ablations.parse_args(["--model", "mar_tiny", *words])


def test_rows_of_every_group_are_distinct_and_begin_with_mar():
    base = LazyMARConfig(head_interval=3)
    for name, rows in ablations.groups(base, lambda row, config: 24 * row.num_iter // 64).items():
        assert rows[0] == MAR, name
        assert len({row.task for row in rows}) == len(rows), name
        assert len({row.name for row in rows}) == len(rows), name
        assert any(row.task == (base, 64) for row in rows), name
    assert len(ablations.groups(base, lambda row, config: None)["caches"]) == 1 + 8 + 1
