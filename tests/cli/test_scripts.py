"""The scripts: published rows and ablations by name."""

import os
import subprocess

import pytest

from benchmarks import ablations
from benchmarks.ablation_rows import ABOUT, MAR, Row, groups
from engine import cli
from engine.mar import MARHost
from engine.published import ROWS, flags_of
from models.lazy_mar import LazyMARConfig
from tests.support import ROOT
from util.errors import UserError
from util.evaluation.config import EvaluationConfig

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.sh"))


def run(name: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """A script with torchrun replaced by one that prints its words."""
    stub = {"BASH_FUNC_torchrun%%": '() { printf "%s\\n" "$@"; }'}
    env = {**os.environ, **environment, **stub}
    command = ["bash", f"scripts/{name}.sh", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_valid_bash_and_executable(name):
    subprocess.run(["bash", "-n", f"scripts/{name}"], cwd=ROOT, check=True)
    assert os.access(ROOT / "scripts" / name, os.X_OK)


def test_reproduce_runs_the_row_that_is_named():
    words = run("reproduce", "lazymar_huge", "--dry_run", PROCESSES="4").stdout.splitlines()
    assert words[:3] == ["--standalone", "--nproc_per_node=4", "eval.py"]
    assert words[3:] == [*flags_of("lazymar_huge").split(), "--dry_run"]


def test_both_scripts_list_what_they_know():
    for name, known in (("reproduce", ROWS), ("ablation", ABOUT)):
        for words in ([], ["--list"]):
            listed = run(name, *words).stdout
            assert [key for key in known if key not in listed] == []


def test_a_row_that_does_not_exist_is_one_sentence():
    done = run("reproduce", "lazymar_tiny")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no published row lazymar_tiny: use one of mar_")


@pytest.mark.parametrize("name", ROWS)
def test_the_flags_of_a_published_row_say_what_it_is_called(name):
    selection = cli.parse("eval", words=flags_of(name).split())
    host, row = selection.host(), ROWS[name]
    assert isinstance(host, MARHost)
    assert selection.flags.build(EvaluationConfig).num_images == 50000
    size = host.model.removeprefix("detok_").removeprefix("mar_")
    assert size in name
    assert row.method.startswith("l-DeTok ") == name.startswith("detok_") == ("detok" in host.model)
    method = row.method.removeprefix("l-DeTok ")
    assert method.startswith(f"{'LazyMAR' if 'lazymar' in name else 'MAR'}-{size[0].upper()}")
    assert host.sampling.lazy_mar == (LazyMARConfig() if "lazymar" in name else None)
    assert (host.sampling.cfg == 1.0) == ("nocfg" in name)
    assert host.sampling.temperature == (0.95 if "nocfg" in name else 1.0)
    short = "lazymar" in name or name.endswith("_64")
    assert host.sampling.num_iter == (64 if short else 256)


def test_ablation_runs_the_group_that_is_named():
    words = run("ablation", "caches", "--num_images", "20", MODEL="mar_tiny").stdout.splitlines()
    assert words[1:4] == ["--nproc_per_node=1", "-m", "benchmarks.ablations"]
    request = ablations.parse(words[4:])
    assert (request.host.model, request.groups) == ("mar_tiny", ["caches"])
    assert request.settings.num_images == 20
    assert "mar_huge" in run("ablation", "all").stdout


def test_every_ablation_is_listed():
    assert set(ABOUT) == set(ablations.GROUPS)


def test_an_ablation_has_sizes_that_fit_its_model():
    tiny, huge = (ablations.parse(["--model", model]) for model in ("mar_tiny", "mar_huge"))
    assert (tiny.settings.num_images, tiny.settings.eval_bsz) == (300, 100)
    assert (huge.settings.num_images, huge.settings.eval_bsz) == (50000, 128)
    assert tiny.groups == list(ablations.GROUPS)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--group", "cache"], "--group cache is unknown; use all, or some of caches"),
        (["--interval", "3"], "--interval is set by the rows"),
        (["--lazy_mar"], "--lazy_mar is set by the rows"),
        (["--num_iter", "32"], "--num_iter is set by the rows"),
        (["--no_token_cache"], "--no_token_cache is set by the rows"),
        (["--preset", "fast"], "--preset is set by the rows"),
        (["--diff_upper_steps", "20"], "--diff_upper_steps is set by the rows"),
        (["--decoding_order", "halton"], "--decoding_order is set by the rows"),
        (["--no_save"], "--no_save"),
        (["--model", "gpt_tiny"], "gpt_tiny is not a MAR model"),
    ],
)
def test_what_an_ablation_cannot_do_is_named(words, named):
    with pytest.raises(UserError, match=named):
        ablations.parse(["--model", "mar_tiny", *words])


def test_rows_of_every_group_are_distinct_and_begin_with_mar():
    base = LazyMARConfig(head_interval=3)
    for name, rows in groups(base, lambda row, config: 24 * row.num_iter // 64).items():
        assert rows[0] == MAR, name
        assert len({row.task for row in rows}) == len(rows), name
        assert len({row.name for row in rows}) == len(rows), name
        assert any(row.task == Row("", base).task for row in rows) or name == "beyond", name
    assert len(groups(base, lambda row, config: None)["caches"]) == 1 + 8 + 1
