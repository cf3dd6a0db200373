"""The table of text-to-image compression: what its numbers are, and that it resumes."""

from functools import partial

import pytest
import torch

from util.errors import UserError

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from benchmarks import line_prompts
from benchmarks.line_prompts import Drawing, divergence
from models.janus import sample_tokens
from models.line_config import LineARConfig
from tests.support.transformers_data import save_tiny_janus

CONFIG = LineARConfig(2, anchors=2, recent=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Janus of 8 x 8 codes."""
    path = tmp_path_factory.mktemp("janus")
    save_tiny_janus(path)
    return path


@pytest.fixture
def call(one_thread, document_of, folder, tmp_path):
    few = ["--num_images", 3, "--kl_images", 2, "--columns", 2, "--batch", 2]
    few += ["--budgets", "1/2,1/4", "--device", "cpu", "--output", tmp_path / "table"]
    return partial(document_of, line_prompts, "--resume", folder, *few)


def test_a_table_resumes_and_ends_with_a_picture_and_its_prompts(call, tmp_path):
    first = call("--methods", "linear")
    assert [(row["method"], row["budget"]) for row in first["rows"]] == [
        ("full cache", "1"), ("linear", "1/2"), ("linear", "1/4"),
    ]  # fmt: skip
    both = call("--methods", "linear,rkv")
    assert both["rows"][:3] == first["rows"]
    assert [row["method"] for row in both["rows"][3:]] == ["rkv"] * 2
    assert both["rows"][0]["kl"] == 0 < both["rows"][1]["kl"] < both["rows"][2]["kl"]
    assert all(0 <= row["accuracy"] <= 1 and row["fid"] > 0 for row in both["rows"])
    assert {path.name for path in tmp_path.glob("table*")} == {
        "table.json", "table.md", "table.png", "table_fid.png",
    }  # fmt: skip
    text = (tmp_path / "table.md").read_text()
    assert "| KL, thousandths of a nat (full cache: 0.0) | 1/2 | 1/4 |" in text
    assert text.count("\n2. a") == 1


def test_the_probabilities_are_those_that_the_codes_were_drawn_from(one_thread, folder):
    """Greedy codes without guidance are the most likely ones, with the full cache and a compressed one."""
    drawing = Drawing(str(folder), 2, 1, torch.device("cpu"))
    inputs = drawing.inputs(2)
    for config in (None, CONFIG):
        codes = sample_tokens(drawing.model, **inputs, cfg=1.0, greedy=True, line_ar=config)
        found = drawing.log_probabilities(inputs, codes, config)
        assert torch.equal(found.argmax(-1), codes)
        assert found.exp().sum(-1).sub(1).abs().max() < 1e-4


def test_divergence_is_the_mean_over_codes():
    full = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]).clamp(min=1e-9).log()
    other = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]).log()
    expected = (0.5 * torch.tensor([2.0, 2 / 3]).log().sum() + torch.tensor(2.0).log()) / 2
    assert divergence(full, other) == pytest.approx(expected.item(), rel=1e-5)
    assert divergence(full, full) == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--kl_images", 4), "--kl_images is 4; there are 3 images"),
        (("--methods", "best"), "there is no row best 1/2"),
        (("--recent", 4), "is too small"),
        (("--cfg", "nan"), "cfg is nan"),
    ],
)
def test_flags_that_make_no_sense_are_refused(call, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        call(*flags)
