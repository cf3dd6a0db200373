"""Scores of a run: as they come, again, otherwise; and what cannot be scored."""

import json
import shutil
import sys
from functools import partial

import numpy as np
import pytest

import eval as eval_script
from tests.support import ROOT
from tests.support.runs import flags_for, folder_of, pixels_of, scores, snapshot
from util.errors import UserError, run_main

SCORED = ["--num_images", 20, "--eval_bsz", 8]


@pytest.fixture(scope="module")
def scored_run(weights, tmp_path_factory):
    """Folder of a finished and scored run; the flags are SCORED."""
    out = tmp_path_factory.mktemp("scored_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["eval.py", *flags_for(weights / "official", out, *SCORED)])
        run_main(eval_script.main)
    (folder,) = out.iterdir()
    return folder


@pytest.fixture
def score_only(one_thread, document_of):
    """Calls eval.py --score_only in this process, with a folder and other flags."""
    return partial(document_of, eval_script, "--device", "cpu", "--score_only")


def test_images_that_are_never_saved_score_the_same(run, scored_run, tmp_path):
    result = run(*SCORED, "--no_save")
    expected = json.loads((scored_run / "results.json").read_text())
    assert scores(result) == pytest.approx(scores(expected), rel=1e-6)
    assert result["images_dir"] is None
    assert result["images_per_s"] > 0
    assert list(tmp_path.rglob("*.png")) == []


def test_scoring_a_folder_again_changes_only_its_results(scored_run, score_only, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(scored_run, folder)
    before = snapshot(folder)
    result = score_only(folder)
    expected = json.loads(before["results.json"])
    assert scores(result) == pytest.approx(scores(expected), rel=1e-9)
    assert result["sec_per_image"] == expected["sec_per_image"]
    after = snapshot(folder)
    assert {name for name in after if after[name] != before.get(name)} <= {"results.json"}


def test_scores_against_another_reference_replace_the_old_ones(scored_run, score_only, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(scored_run, folder)
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


def test_a_folder_of_pictures_alone_is_scored_and_stays_as_it_is(scored_run, score_only, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(scored_run / "images", folder)
    before = snapshot(folder)
    result = score_only(folder, "--model", "mar_tiny", "--num_images", 20, "--metrics", "fid")
    expected = json.loads((scored_run / "results.json").read_text())
    assert result["fid"] == pytest.approx(expected["fid"], rel=1e-9)
    assert "is_mean" not in result
    assert snapshot(folder) == before


def test_fewer_images_than_the_run_should_have_are_not_scored(scored_run, score_only, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(scored_run, folder)
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
