"""benchmarks.rank: rows are measured once, written as they are done, and not mixed with others."""

import json

import pytest
import torch

from benchmarks import rank
from engine.base import Loaded
from engine.mar import MARHost
from models import mar
from models.lazy_mar import LazyMARConfig
from tests.support.sampling import small_mar
from util.errors import UserError


@pytest.fixture
def command(one_thread, monkeypatch, document_of, tmp_path):
    """Calls the command with two rows of one group; returns the document of its last line."""
    rows = rank.rows_of("token_selection")[:2]
    monkeypatch.setattr(rank, "rows_of", lambda group: rows)

    def call(*flags: object) -> dict:
        short = ["--images", 2, "--kl_images", 2, "--num_iter", 8, "--device", "cpu"]
        words = [*short, "--group", "token_selection", "--results", tmp_path, *flags]
        return document_of(rank, *words)

    return call


def test_groups_isolate_the_caches_that_they_are_about():
    for group in rank.ISOLATED:
        rows = rank.rows_of(group)
        assert rank.default_of(group) in [row.config for row in rows]
        if group != "caches":
            on = {k for row in rows for k in rank.CACHES if getattr(row.config, f"{k}_cache")}
            assert on == set(rank.ISOLATED[group])
        assert len({row.config for row in rows}) == len(rows) >= 4


def test_results_are_written_and_rows_are_not_measured_again(command, monkeypatch, tmp_path):
    shape = {"encoder_depth": 1, "decoder_depth": 5, "diffloss_d": 2, "diffloss_w": 16}
    shape["num_sampling_steps"] = "ddim20"
    small = small_mar(**{**mar.SIZES["mar_tiny"], **mar.TINY, **shape})

    def load(self: MARHost, device: torch.device) -> Loaded:
        return Loaded(small, self.open_tokenizer(device), "of the test")

    monkeypatch.setattr(MARHost, "load", load)
    monkeypatch.setattr(rank, "REFERENCE_PICTURES", 20)
    monkeypatch.setattr(rank, "HEAD_SAMPLES", 4)
    document = command("--samples", 2, "--head_tokens", 2)
    assert document == json.loads((tmp_path / "rank_mar_tiny_token_selection.json").read_text())
    plain, first, second = document["rows"]
    assert plain["name"] == "MAR"
    assert first["z_error"]["mean"] > 0
    assert first["z_error_by_image"] != second["z_error_by_image"]
    assert first["kl"]["mean"] > first["kl_visible"]["mean"] > 0
    assert sum(first["kl_by_noise"]) == pytest.approx(first["kl"]["mean"])
    assert first["patch_frechet_mar"] > plain["patch_frechet_mar"] == pytest.approx(0, abs=1e-6)
    assert "energy" in plain and "energy" not in first  # these rows have MAR's head
    assert LazyMARConfig(**first["lazy_mar"]).token_selection == "similarity"
    text = (tmp_path / "rank_mar_tiny_token_selection.md").read_text()
    assert "| token_selection similarity, the default | " in text
    assert "\n    weights: of the test\n" in text

    monkeypatch.setattr(rank, "Ranking", lambda *_: pytest.fail("measured again"))
    assert command("--samples", 2, "--head_tokens", 2)["rows"] == document["rows"]
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        command("--samples", 2, "--head_tokens", 2, "--seed", 2)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--group", "colour"), "--group colour is unknown"),
        (("--kl_images", 1), "--kl_images is 1"),
        (("--model", "mar_base"), "--cached_path DIR is missing"),
        (("--resume", "nowhere"), "no checkpoint at nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(command, tmp_path, flags, reason):
    with pytest.raises(UserError, match=reason):
        command(*flags)
    assert not list(tmp_path.iterdir())


def test_a_ratio_is_to_the_default_of_the_same_images():
    default = {"z_error_by_image": [1.0, 3.0]}
    assert rank.ratio({"z_error_by_image": [2.0, 6.0]}, default, "z_error") == "2 ± 0"
    assert rank.ratio(default, default, "z_error") == "1"
    assert rank.ratio({}, default, "z_error") is None
    assert rank.ratio(default, {"z_error_by_image": [0.0, 0.0]}, "z_error") is None
