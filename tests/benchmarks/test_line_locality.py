"""The three numbers of line_locality are what they are said to be."""

import pytest
import torch

from benchmarks import line_locality
from benchmarks.line_locality import Shares, WatchedLayer
from models.line_config import LineARConfig
from util.errors import UserError

GRID, CONDITION, GROUPS = (7, 3), 4, 2


def watched(hidden: torch.Tensor | None = None, seed: int = 0):
    """Shares of random tokens through a layer; their attention (rows, H, groups, tokens, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    length = CONDITION + GRID[0] * GRID[1]
    q = 2 * torch.randn(2, 3 * GROUPS, length, 8, generator=generator)
    k = torch.randn(2, 3, length, 8, generator=generator)
    shares = Shares(LineARConfig(2, anchors=1, recent=1).plan(GRID, CONDITION))
    layer = WatchedLayer(shares)
    layer.append(k[:, :, :CONDITION], k[:, :, :CONDITION])
    if hidden is not None:
        layer.hide(hidden)
    layer.remember(q[:, :, :CONDITION])
    layer.advance(CONDITION)
    for i in range(CONDITION, length):
        layer.append(k[:, :, i : i + 1], k[:, :, i : i + 1])
        layer.remember(q[:, :, i : i + 1])
        layer.advance()
    logits = q.unflatten(1, (3, GROUPS)) @ k[:, :, None].transpose(-1, -2) / 8**0.5
    seen = torch.ones(length, length).tril().bool().expand(2, -1, -1).clone()
    if hidden is not None:
        seen[:, :, :CONDITION] &= ~hidden[:, None]
    return shares.lines(), logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)


@pytest.mark.parametrize(
    "hidden", [None, torch.tensor([[True, True, False, False], [False] * 4])], ids=["", "padded"]
)
def test_shares_are_those_of_the_causal_attention(hidden):
    rows, attention = watched(hidden)
    assert [row["line"] for row in rows] == list(range(7))
    for row in rows:
        start = CONDITION + 3 * row["line"]
        line = attention[..., start : start + 3, :]
        assert row["condition"] == pytest.approx(line[..., :CONDITION].sum(-1).mean().item())
        older = line[..., CONDITION : max(CONDITION, start - 9)].sum(-1).mean().item()
        assert row["older"] == pytest.approx(older)


def test_coverage_is_the_share_of_what_the_line_before_would_have_kept():
    """Two lines are the budget: of all but the first token and the newest line, two are kept."""
    rows, attention = watched()
    assert [row["coverage"] is None for row in rows] == [True] * 3 + [False] * 4
    for row in rows[3:]:
        start = CONDITION + 3 * row["line"]
        choice = slice(CONDITION + 1, start - 3)
        means = [attention[..., i : i + 3, :].mean((2, 3)) for i in (start - 3, start)]
        before, now = (mean[..., choice] for mean in means)
        kept = before.topk(2, dim=-1).indices
        assert row["coverage"] == pytest.approx((now.gather(-1, kept).sum() / now.sum()).item())
        best = now.topk(2, dim=-1).values.sum() / now.sum()
        assert row["best"] == pytest.approx(best.item())
        assert row["coverage"] <= row["best"] + 1e-6


def test_a_janus_of_transformers_is_measured(document_of, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.support.transformers_data import tiny_janus, tiny_processor

    tiny_janus((8, 8)).save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red disc\n\ngreen star a red star\n")
    flags = ("--model", tmp_path / "model", "--prompts", tmp_path / "prompts.txt")
    document = document_of(line_locality, *flags, "--num_images", 3, "--device", "cpu")
    assert len(document["rows"]) == 8
    assert all(0 < row["condition"] < 1 for row in document["rows"])
    assert 0 < document["rows"][-1]["coverage"] <= document["rows"][-1]["best"] < 1


def test_wrong_flags_are_one_sentence(tmp_path, monkeypatch):
    for flags, message in (
        (["--budget", "two"], "--budget, --anchors, --recent: "),
        (["--model", "folder"], "give their file with --prompts"),
        (["--num_images", "0"], "--num_images is 0"),
    ):
        monkeypatch.setattr("sys.argv", ["line_locality.py", *flags])
        with pytest.raises(UserError, match=message):
            line_locality.main()
