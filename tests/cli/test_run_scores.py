"""Scores of a run: as they come, again, otherwise; and what cannot be scored."""

import json
import shutil
from functools import partial

import numpy as np
import pytest

import eval as eval_script
from tests.support import ROOT
from tests.support.runs import SCORED, folder_of, pixels_of, scores, snapshot
from util.errors import UserError


@pytest.fixture
def expected(scored) -> dict:
    """The results of the scored run."""
    return json.loads(scored[1].stdout.splitlines()[-1])


@pytest.fixture
def folder(expected, tmp_path):
    """A copy of its folder."""
    return shutil.copytree(folder_of(expected), tmp_path / "run")


@pytest.fixture
def score_only(one_thread, document_of):
    """Calls eval.py --score_only in this process, with a folder and other flags."""
    return partial(document_of, eval_script, "--device", "cpu", "--score_only")


def test_images_that_are_never_saved_score_the_same(run, expected, tmp_path):
    result = run(*SCORED, "--no_save")
    assert scores(result) == pytest.approx(scores(expected), rel=1e-6)
    assert result["images_dir"] is None
    assert result["images_per_s"] > 0
    assert list(tmp_path.rglob("*.png")) == []


def test_scoring_a_folder_again_changes_only_its_results(folder, expected, score_only):
    before = snapshot(folder)
    result = score_only(folder)
    assert scores(result) == pytest.approx(scores(expected), rel=1e-9)
    assert result["sec_per_image"] == expected["sec_per_image"]
    after = snapshot(folder)
    assert {name for name in after if after[name] != before.get(name)} <= {"results.json"}


def test_scores_against_another_reference_replace_the_old_ones(folder, score_only, tmp_path):
    assert score_only(folder, "--metrics", "fid")["is_mean"] > 1  # the same reference
    with np.load(ROOT / "pretrained_models/mar_tiny/fid_stats.npz") as file:
        np.savez(tmp_path / "other.npz", mu=file["mu"] + 1, sigma=file["sigma"])
    flags = ["--metrics", "fid", "--fid_stats", tmp_path / "other.npz"]
    result = score_only(folder, *flags)
    assert "is_mean" not in result
    assert result["reference"].startswith("shapes other.npz ")


def test_generating_again_without_scoring_keeps_the_scores(run, tmp_path):
    scored = run(*SCORED)
    assert scores(run(*SCORED, "--no_score")) == scores(scored)
    replaced = run(*SCORED, "--no_score", "--seed", 2, "--overwrite")
    assert replaced["fid"] is None


def test_a_folder_of_pictures_alone_is_scored_and_stays_as_it_is(folder, expected, score_only):
    pictures = folder.parent / "pictures"
    (folder / "images").rename(pictures)
    before = snapshot(pictures)
    result = score_only(pictures, "--model", "mar_tiny", "--num_images", 20, "--metrics", "fid")
    assert result["fid"] == pytest.approx(expected["fid"], rel=1e-9)
    assert "is_mean" not in result
    assert snapshot(pictures) == before


def test_fewer_images_than_the_run_should_have_are_not_scored(folder, score_only):
    (folder / "images" / "00007.png").unlink()
    before = snapshot(folder)
    with pytest.raises(UserError, match="holds 19 images, but 20 are to be scored"):
        score_only(folder)
    assert snapshot(folder) == before


def test_a_folder_that_is_not_there_cannot_be_scored(score_only, tmp_path):
    with pytest.raises(UserError, match="none does not exist"):
        score_only(tmp_path / "none", "--model", "mar_tiny")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--metrics", "fid,lpips"], "'lpips' is not a metric"),
        (["--metrics", "kid"], "neither features nor images"),
        (["--metrics", "sfid"], "sfid"),
        (["--no_save", "--no_score"], "--no_save keeps no images, so --no_score"),
        (["--no_save", "--save_npz"], "--no_save keeps no images, so --save_npz"),
        (["--vae_bsz", 0], "vae_bsz is 0"),
        (["--seed_mode", "time"], "invalid choice"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_impossible_scores_are_refused_before_anything_is_generated(refused, flags, words):
    assert words in refused(*flags)


def test_the_sample_batch_of_adm_holds_the_images_and_their_labels(run):
    result = run("--no_score", "--num_images", 5, "--save_npz")
    with np.load(folder_of(result) / "samples.npz") as batch:
        assert batch["arr_0"].dtype == np.uint8
        assert np.array_equal(batch["arr_0"], pixels_of(result))
        assert batch["arr_1"].tolist() == [0, 2, 4, 6, 8]
