"""benchmarks.fid_difference: FIDs of two runs, features kept, pairs only."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fid_difference, measures
from engine.mar import PRESETS
from tests.support.runs import write_run
from util import metrics
from util.errors import UserError
from util.evaluation.request import ScoreRequest
from util.images import png_name
from util.shapes import render

COUNT = 12


def make_run(folder: Path, noise: float, **config: object) -> Path:
    """A finished run whose images are pictures of the data set with noise."""
    random = np.random.default_rng(0)
    pictures = [render(i) + random.normal(0, noise, (64, 64, 3)) for i in range(COUNT)]
    images = [picture.round().clip(0, 255).astype(np.uint8) for picture in pictures]
    return write_run(folder, images, config, {"method": f"noise {noise}"})


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [make_run(tmp_path / name, noise) for name, noise in (("a", 0), ("b", 20))]


@pytest.fixture
def command(one_thread, document_of):
    """Calls the command; returns the document of its last line."""
    return partial(document_of, fid_difference, "--resamples", 20)


def test_fids_are_those_of_eval_and_noise_is_worse(command, runs):
    (row,) = command(*runs)["rows"]
    preset = PRESETS["mar_tiny"]
    request = ScoreRequest(*(preset[key] for key in ("features", "features_path", "fid_stats")))
    wanted = [metrics.score(run / "images", COUNT, request, "cpu")["fid"] for run in runs]
    assert [row["base"], row["fid"]] == pytest.approx(wanted, rel=1e-4)
    assert row["difference"] > 0
    assert row["low"] < row["high"]


def test_features_are_kept_so_that_images_can_be_deleted(command, runs, tmp_path):
    rows = command(*runs, "--output", tmp_path / "out")["rows"]
    assert "| noise 20 | " in (tmp_path / "out.md").read_text()
    for run in runs:
        shutil.rmtree(run / "images")
        results = json.loads((run / "results.json").read_text())
        (run / "results.json").write_text(json.dumps(results | {"images_dir": None}))
    assert command(*runs)["rows"] == rows
    (runs[1] / "features.npz").unlink()
    with pytest.raises(UserError, match="has no images and no features.npz"):
        command(*runs)


def test_features_of_another_run_in_the_same_folder_are_made_again(command, runs):
    command(*runs)
    shutil.copy(runs[0] / "features.npz", runs[1] / "features.npz")
    assert command(*runs)["rows"][0]["difference"] == 0  # both runs have one configuration here
    manifest = json.loads((runs[1] / "manifest.json").read_text())
    manifest["config"]["num_iter"] = 32
    (runs[1] / "manifest.json").write_text(json.dumps(manifest))
    assert command(*runs)["rows"][0]["difference"] > 0


def test_runs_of_several_seeds_are_one_set(command, runs, tmp_path):
    """The FIDs of two seeds together are those of the images in one folder."""
    parts = {}
    for method, noise in (("mar", 0), ("lazy", 20)):
        folders = [tmp_path / f"{method}{seed}" for seed in (1, 2)]
        for seed, folder in enumerate(folders, 1):
            make_run(folder, noise + seed, seed=seed, cfg=3.0 if method == "mar" else 2.0)
        parts[method] = folders
    document = command(*parts["mar"], *parts["lazy"])
    assert document["about"]["images"] == 2 * COUNT
    (row,) = document["rows"]
    assert row["runs"] == [str(folder) for folder in parts["lazy"]]
    preset = PRESETS["mar_tiny"]
    request = ScoreRequest(*(preset[key] for key in ("features", "features_path", "fid_stats")))
    for key, folders in zip(("base", "fid"), parts.values(), strict=True):
        together = tmp_path / f"{key}_together"
        together.mkdir()
        for k, folder in enumerate(folders):
            for i in range(COUNT):
                shutil.copy(folder / "images" / png_name(i), together / png_name(k * COUNT + i))
        wanted = metrics.score(together, 2 * COUNT, request, "cpu")["fid"]
        assert row[key] == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(UserError, match="mar1 is one of 2 runs of its configuration, .*lazy1 of 1"):
        command(*parts["mar"], parts["lazy"][0])
    with pytest.raises(UserError, match="differ only by seed"):
        command(*parts["mar"])


def test_runs_that_are_not_paired_are_refused_in_a_sentence(command, runs, tmp_path):
    third = make_run(tmp_path / "c", 5, seed=2, cfg=2.0)
    with pytest.raises(UserError, match=r"c has seed 2, .*a has 1: runs to compare share"):
        command(runs[0], third)
    with pytest.raises(UserError, match="a single run cannot be compared"):
        command(runs[0])
    (runs[1] / "features.npz").write_bytes(b"none")
    with pytest.raises(UserError, match="is not a file of features .*: delete it"):
        command(*runs)


@pytest.mark.parametrize("damage", ["rows are missing", "NaN"])
def test_damaged_features_are_refused_in_a_sentence(command, runs, damage):
    command(*runs)
    path = runs[1] / "features.npz"
    with np.load(path) as file:
        key, features = file["key"], file["features"]
    features[0] = np.nan
    np.savez(path, key=key, features=features if damage == "NaN" else features[1:])
    with pytest.raises(UserError, match=r"features.npz is damaged: delete it"):
        command(*runs)


def test_classes_of_enough_images_are_resampled_apart(command, monkeypatch, tmp_path):
    monkeypatch.setattr(measures, "LEAST_PER_CLASS", 3)
    found = {}
    for class_num in (1, 4, 6):
        folders = [tmp_path / f"{class_num} {noise}" for noise in (0, 20)]
        runs = [make_run(f, n, class_num=class_num) for f, n in zip(folders, (0, 20), strict=True)]
        document = command(*runs)
        interval = [document["rows"][0][end] for end in ("low", "high")]
        found[class_num] = document["about"]["resampled within"], interval
    assert [found[n][0] for n in found] == ["all images", "4 classes", "all images"]
    assert found[1][1] == found[6][1] != found[4][1]


def test_labels_are_those_of_each_run():
    runs = [{"class_num": 2, "num_images": count} for count in (4, 2)]
    assert fid_difference.labels_of(runs).tolist() == [0, 0, 1, 1, 0, 1]
    assert fid_difference.labels_of([{"prompts": "a.txt", "num_images": 4}]) is None


def test_accuracy_is_that_of_all_runs_together(tmp_path, command):
    found = {"a": (0.5, 7), "b": (1.0, 8), "c": (0.75, 7), "d": (None, 8)}
    runs = []
    for name, (accuracy, seed) in found.items():
        noise = 0 if name in "ab" else 20
        run = make_run(tmp_path / name, noise, seed=seed, cfg=3.0 if noise else 2.0)
        results = json.loads((run / "results.json").read_text())
        (run / "results.json").write_text(json.dumps(results | {"accuracy": accuracy}))
        runs.append(run)
    document = command(*runs)
    assert document["about"]["accuracy"] == 0.75
    assert document["rows"][0]["accuracy"] is None
