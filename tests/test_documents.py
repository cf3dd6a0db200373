"""Documents are true: commands parse, links resolve, example code runs."""

import ast
import json
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.ablation_rows import ABOUT
from engine import base, cli
from engine.published import ROWS
from models.lazy_mar import LazyMARConfig
from tests.support import DOCUMENTS, ROOT
from tests.support.golden_data import relative_error
from tests.support.sampling import CLOSE, noise_of, sample, small_mar

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
STARTS = ("make ", "python ", "torchrun ", "sbatch ", "scripts/")


def read(name: str) -> str:
    return (ROOT / name).read_text()


# ---- commands ----------------------------------------------------------------------------------------


def commands(name: str) -> list[list[str]]:
    """The words of each command in the blocks and the `code` of a Markdown file."""
    text = read(name)
    blocks = [block for language, block in BLOCK.findall(text) if language == "bash"]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]
    lines = re.sub(r"\\\n", " ", "\n".join([*blocks, *spans])).splitlines()
    lines = [re.sub(r"^\s*([A-Z_]+=\S+ +)*", "", line) for line in lines]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith(STARTS)]
    unsaid = ("...", ">")  # more flags, and a redirection: >FILE
    return [[word for word in command if not word.startswith(unsaid)] for command in found]


COMMANDS = [(name, command) for name in DOCUMENTS for command in commands(name)]


class Parsed(Exception):
    """Ends a command when its words are parsed."""


def parse_module(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `python -m module words` up to the end of parsing."""
    if module == "pytest" or not words:  # named without flags: that it exists
        import_module(module)
    elif module == "benchmarks.ablations":
        import_module(module).parse(words)
    else:
        parse_args = ArgumentParser.parse_args

        def parse_and_stop(*args: object) -> None:
            parse_args(*args)
            raise Parsed

        monkeypatch.setattr(ArgumentParser, "parse_args", parse_and_stop)
        monkeypatch.setattr(sys, "argv", [module, *words])
        with pytest.raises(Parsed):
            import_module(module).main()


def parse_script(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the name of a row, and flags."""
    if name == "reproduce" and words != ["--list"]:
        assert words[0] in {*ROWS, "NAME"}
        cli.parse("eval", words=words[1:])
    elif name == "ablation" and words not in (["--list"], ["NAME"]):
        assert words[0] in {*ABOUT, "all"}
        parse_module("benchmarks.ablations", ["--group", *words], monkeypatch)
    elif name == "eval_slurm":
        cli.parse("eval", words=words)


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=lambda part: str(part)[:70])
def test_a_documented_command_parses(name, command, monkeypatch):
    program = command[0]
    if program == "make":
        targets = re.findall(r"^([a-z][a-z-]*):", read("Makefile"), re.MULTILINE)
        assert set(command[1:]) <= set(targets)
    elif "-m" in command:
        at = command.index("-m") + 1
        parse_module(command[at], command[at + 1 :], monkeypatch)
    else:
        at = next(i for i, word in enumerate(command) if word.endswith((".py", ".sh")))
        script = Path(command[at])
        assert (ROOT / script).is_file()
        if script.suffix == ".sh":
            parse_script(script.stem, command[at + 1 :], monkeypatch)
        else:
            cli.parse(script.stem, words=command[at + 1 :])


def test_the_commands_of_the_documents_are_found():
    assert len(COMMANDS) > 60
    assert ("README.md", ["make", "demo"]) in COMMANDS


# ---- links -------------------------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_picture_and_local_link_leads_somewhere(name):
    document = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", document.read_text())):
        if not link.startswith(("http:", "https:")):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 200
    assert len(read("README.md").split()) <= 2300


# ---- Python code -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_import_what_exists(name):
    for language, block in BLOCK.findall(read(name)):
        for node in ast.walk(ast.parse(block)) if language == "python" else ():
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    try:
                        getattr(import_module(node.module), alias.name)
                    except AttributeError:
                        import_module(f"{node.module}.{alias.name}")


@pytest.fixture(scope="module")
def example():
    """`sample_tokens` of the acceleration in docs/extending.md."""
    blocks = [block for _, block in BLOCK.findall(read("docs/extending.md"))]
    (block,) = [block for block in blocks if "class BlockSkip" in block]
    found: dict[str, object] = {}
    exec(block, found)
    return found["sample_tokens"]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("geometry", [{}, {"buffer_size": 0}, {"decoder_depth": 1}])
def test_the_worked_example_equals_mar_where_it_skips_nothing(example, geometry, cfg):
    model = small_mar(**geometry)
    latents = example(model, [1, 2], noise_of(model, (3, 4)), num_iter=12, cfg=cfg, every=1)
    assert relative_error(latents, sample(model, cfg=cfg)) < CLOSE


def test_the_worked_example_differs_where_it_skips_and_keeps_images_apart(example):
    model = small_mar()
    kwargs = {"num_iter": 12, "cfg": 3.0, "every": 3}
    latents = example(model, [1, 2], noise_of(model, (3, 4)), **kwargs)
    assert 1e-4 < relative_error(latents, sample(model)) < 1
    alone = example(model, [2], noise_of(model, (4,)), **kwargs)
    assert relative_error(alone, latents[1:]) < CLOSE
    lazy = sample(model, lazy_mar=LazyMARConfig(warmup=2, interval=4))
    assert relative_error(latents, lazy) > 1e-4


def test_the_tables_of_a_family_name_what_it_has_to_have():
    text = read("docs/extending.md")
    named = {*re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)}
    required = base.Host.__abstractmethods__ | base.Family.__abstractmethods__
    assert named == required | {"name", "presets", "class_num"}


# ---- the notebook ------------------------------------------------------------------------------------

NOTEBOOK = ROOT / "notebooks" / "lazymar.ipynb"


@pytest.fixture
def cells():
    document = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    return ["".join(cell["source"]) for cell in code]


def test_the_cells_of_the_notebook_run_one_after_another(cells, monkeypatch, capsys):
    monkeypatch.chdir(NOTEBOOK.parent)  # where Jupyter starts
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for long, short in (
        ("STEPS = 64", "STEPS = 4"),
        ("lazy_mar=True)", "lazy_mar=True, num_sampling_steps='ddim50')"),
        ("[0, 3, 4, 6, 7, 9]", "[4]"),
    ):
        assert sum(cell.count(long) for cell in cells) == 1
        cells = [cell.replace(long, short) for cell in cells]
    found: dict[str, object] = {"__name__": "__main__"}
    for cell in cells:
        exec(compile(cell, NOTEBOOK.name, "exec"), found)
    said = capsys.readouterr().out
    assert "mar_tiny: " in said and " parameters on cpu" in said
    assert "head_cache       alone" in said
    assert found["plain"].shape == (1, 64, 64, 3)
    assert not np.array_equal(found["plain"], found["lazy"])
    assert torch.equal(found["edited"][:, :, :8], found["latents"][:, :, :8])  # the upper half
    assert not torch.equal(found["edited"], found["latents"])
    assert isinstance(eval(cells[-1].splitlines()[-1], found), Image.Image)


def test_a_notebook_away_from_the_repository_asks_where_it_is(cells, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="give REPOSITORY"):
        exec(cells[0], {})


def test_a_notebook_that_starts_again_takes_the_clone_it_has(cells, monkeypatch, tmp_path):
    (tmp_path / "lazymar" / "models").mkdir(parents=True)
    (tmp_path / "lazymar" / "models" / "lazy_mar.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", None)  # neither git nor pip is called
    exec(cells[0], {})
    assert Path.cwd() == tmp_path / "lazymar"
    assert sys.path[0] == str(tmp_path / "lazymar")
