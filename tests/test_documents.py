"""Code in the documents runs: the notebook, and the worked example of the README."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.lazy_mar import LazyMARConfig
from tests.support import ROOT
from tests.support.golden_data import relative_error
from tests.support.sampling import CLOSE, noise_of, sample, small_mar

NOTEBOOK = ROOT / "notebooks" / "lazymar.ipynb"


@pytest.fixture
def notebook():
    document = json.loads(NOTEBOOK.read_text())
    assert document["nbformat"] == 4
    return [cell for cell in document["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_committed_without_what_a_run_leaves_in_it(notebook):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in notebook)


def test_the_cells_of_the_notebook_run_one_after_another(notebook, monkeypatch, capsys):
    monkeypatch.chdir(NOTEBOOK.parent)  # where Jupyter starts
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cells = ["".join(cell["source"]) for cell in notebook]
    for long, short in (
        ("STEPS = 64", "STEPS = 4"),
        ("preset.num_sampling_steps", "'ddim10'"),
        ("[0, 3, 4, 6, 7, 9]", "[4]"),
    ):
        assert sum(cell.count(long) for cell in cells) == 1
        cells = [cell.replace(long, short) for cell in cells]
    found: dict[str, object] = {"__name__": "__main__"}
    for cell in cells:
        exec(compile(cell, NOTEBOOK.name, "exec"), found)
    said = capsys.readouterr().out
    assert "mar_tiny: 1.6M parameters on cpu" in said
    assert "head_cache       alone" in said
    assert found["plain"].shape == (1, 64, 64, 3)
    assert not np.array_equal(found["plain"], found["lazy"])
    assert len(found["rows"]) == 5  # one sheet shows MAR and four intervals
    assert isinstance(eval(cells[-1].splitlines()[-1], found), Image.Image)


def test_a_notebook_away_from_the_repository_asks_where_it_is(notebook, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="give REPOSITORY"):
        exec("".join(notebook[0]["source"]), {})


def test_a_notebook_that_starts_again_takes_the_clone_it_has(notebook, monkeypatch, tmp_path):
    (tmp_path / "lazymar" / "models").mkdir(parents=True)
    (tmp_path / "lazymar" / "models" / "lazy_mar.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", None)  # neither git nor pip is called
    exec("".join(notebook[0]["source"]), {})
    assert Path.cwd() == tmp_path / "lazymar"
    assert sys.path[0] == str(tmp_path / "lazymar")


# ---- the README's own acceleration --------------------------------------------------------------------


@pytest.fixture(scope="module")
def example():
    """The block of the README that defines BlockSkip, and what it defines."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "class BlockSkip" in block]
    assert len(block.splitlines()) < 40
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
    plain = sample(model)
    kwargs = {"num_iter": 12, "cfg": 3.0, "every": 3}
    latents = example(model, [1, 2], noise_of(model, (3, 4)), **kwargs)
    assert 1e-4 < relative_error(latents, plain) < 1
    alone = example(model, [2], noise_of(model, (4,)), **kwargs)
    assert relative_error(alone, latents[1:]) < CLOSE
    lazy = sample(model, lazy_mar=LazyMARConfig(warmup=2, interval=4))
    assert relative_error(latents, lazy) > 1e-4
