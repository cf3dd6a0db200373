"""A run that can be trusted: the same bits however it comes about, one configuration, nothing lost."""

import errno
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.mar import MarGenerator, SamplingConfig
from models.lazy_mar import LazyMARConfig
from models.tokenizers import latent_scale_of, load_tokenizer
from tests.support import ROOT
from tests.support.runs import (
    folder_of,
    images_of,
    manifest_of,
    pixels_of,
    random_mar,
    snapshot,
    written_at,
)
from util import files, images

CPU = torch.device("cpu")
LAZY = ["--num_iter", 6, "--lazy_mar", "--warmup", 1, "--interval", 3, "--probe_layer", 1]
LAZY += ["--keep_floor", 4, "--keep", "0:1,0.1:0.05"]


# ---- the same bits -----------------------------------------------------------------------------------


def generator_of(lazy_mar, dtype):
    tokenizer = load_tokenizer(
        "linear", ROOT / "pretrained_models/mar_tiny/tokenizer.safetensors", 8
    )
    sampling = SamplingConfig(6, 2.0, "linear", 1.0, lazy_mar)
    scale = latent_scale_of(tokenizer, None)
    return MarGenerator(random_mar(1), tokenizer, scale, sampling, CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "lazy_mar", [None, LazyMARConfig(warmup=1, interval=3)], ids=["mar", "lazy"]
)
def test_pixels_do_not_depend_on_the_other_images_of_a_batch(lazy_mar, dtype):
    generator = generator_of(lazy_mar, dtype)
    batches = (([3, 1, 4], [30, 10, 40]), ([5, 1, 9], [50, 10, 90]))
    first, second = (generator.generate(generator.prepare(*batch)) for batch in batches)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("method", [[], LAZY], ids=["mar", "lazy_mar"])
def test_a_run_with_any_images_missing_is_completed_with_the_same_bits(run, method):
    flags = ["--no_score", "--num_images", 11, "--eval_bsz", 4, *method]
    first = run(*flags)
    whole, times = images_of(first), written_at(first)
    folder = Path(first["images_dir"])
    lost = [f"{i:05d}.png" for i in (0, 5, 6, 10)]
    for name in lost:
        (folder / name).unlink()
    (folder / lost[1]).write_bytes(whole[5][:100])
    again = run(*flags)
    assert images_of(again) == whole
    rewritten = [name for name in times if written_at(again)[name] != times[name]]
    assert sorted(rewritten) == lost
    assert again["generated"] - first["generated"] == 4


def test_another_batch_size_changes_a_pixel_by_one_grey_level_at_most(run, tmp_path):
    flags = ["--no_score", "--num_images", 12]
    runs = [run(*flags, "--eval_bsz", size, out=tmp_path / str(size)) for size in (1, 5, 12)]
    first, *others = (pixels_of(result) for result in runs)
    for other in others:
        difference = np.abs(other - first)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


def test_the_tokenizer_may_decode_in_smaller_batches_and_another_dtype(run, tmp_path):
    flags = ["--no_score", "--num_images", 4, "--eval_bsz", 4]
    plain = run(*flags)
    split = run(*flags, "--vae_bsz", 3, out=tmp_path / "split")
    coarse = run(*flags, "--vae_dtype", "bf16", out=tmp_path / "coarse")
    assert np.abs(pixels_of(split) - pixels_of(plain)).max() <= 1
    assert 0 < np.abs(pixels_of(coarse) - pixels_of(plain)).mean() < 4
    assert coarse["config"]["dtype"] == "float32"


def test_seeds_that_follow_the_process_are_another_configuration(run, refused, tmp_path):
    flags = ["--no_score", "--num_images", 4, "--eval_bsz", 2]
    own = run(*flags)
    first, again = (
        run(*flags, "--seed_mode", "rank", out=tmp_path / name) for name in ("first", "again")
    )
    assert images_of(first) == images_of(again) != images_of(own)
    other_size = [*flags[:-1], 4, "--seed_mode", "rank"]
    assert "eval_bsz" in refused(*other_size, out=tmp_path / "first")


# ---- the folder --------------------------------------------------------------------------------------


def test_the_manifest_says_what_made_the_images(run, weights):
    result = run("--no_score", "--cfg", 1.5)
    manifest = manifest_of(result)
    assert manifest["config"] == result["config"]
    assert manifest["config"]["cfg"] == 1.5
    assert manifest["config"]["weights"].startswith("checkpoint-last.pth ")
    (call,) = manifest["calls"]
    assert call["arguments"]["cfg"] == 1.5
    assert call["arguments"]["resume"] == str(weights / "official")
    assert call["torch"] == torch.__version__
    assert call.keys() >= {"commit", "device_name", "processes", "eval_bsz", "command"}
    assert call["threads"] == 1


def test_what_may_change_is_reported_and_recorded(run, monkeypatch):
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    flags = ["--no_score", "--num_images", 4]
    first = run(*flags, "--eval_bsz", 2)
    assert first["mixed"] == {}
    (Path(first["images_dir"]) / "00003.png").unlink()
    second = run(*flags, "--eval_bsz", 4)
    assert "eval_bsz 2 -> 4" in told.getvalue()
    assert second["mixed"]["eval_bsz"] == [2, 4]
    assert [call["eval_bsz"] for call in manifest_of(second)["calls"]] == [2, 4]


@pytest.mark.parametrize("name", ["sheet.png", "photo.JPG", "7.png", "00002.png", "100000.png"])
def test_foreign_images_are_refused_before_anything_is_generated(run, refused, tmp_path, name):
    result = run("--no_score")
    images_of_run = images_of(result)
    foreign = Path(result["images_dir"]) / name
    Image.new("RGB", (4, 4)).save(foreign)
    (Path(result["images_dir"]) / "00001.png").unlink()
    for flags in ([], ["--overwrite"]):
        message = refused("--no_score", *flags, out=tmp_path / "out")
        assert f"({name})" in message and "move them away" in message
    foreign.unlink()
    assert images_of(run("--no_score")) == images_of_run


def test_other_files_in_the_folder_are_left_alone(run):
    result = run("--no_score")
    for name in ("notes.txt", ".DS_Store", ".00001.png.9-9.part"):
        (Path(result["images_dir"]) / name).write_text("x")
    run("--no_score", "--seed", 2, "--overwrite")
    names = {path.name for path in Path(result["images_dir"]).iterdir()}
    assert names == {"00000.png", "00001.png", "notes.txt", ".DS_Store"}  # a torn file is swept


def test_images_without_a_manifest_are_refused(run, refused, tmp_path):
    result = run("--no_score")
    (folder_of(result) / "manifest.json").unlink()
    message = refused("--no_score", out=tmp_path / "out")
    assert "holds 2 images, but no manifest.json says what made them" in message
    assert run("--no_score", "--overwrite")["generated"] == 2


def fail_on(monkeypatch, number, name):
    """Every file whose name has `name` in it meets error `number` when it takes that name."""
    replace = files.os.replace

    def refuse(source, target):
        if name in str(target):
            raise OSError(number, "no")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refuse)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["full disk", "read-only"])
def test_a_full_disk_costs_one_sentence_and_no_image(run, tmp_path, monkeypatch, capsys, number):
    whole = images_of(run("--no_score", "--num_images", 4, out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        fail_on(patch, number, "00002.png")
        with pytest.raises(SystemExit) as exit_info:
            run("--no_score", "--num_images", 4)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "00002.png" in error and error.startswith("error: ") and error.count("\n") == 1
    kept = sorted((tmp_path / "out").rglob("*.png"))
    assert [path.name for path in kept][:2] == ["00000.png", "00001.png"]
    assert "00002.png" not in [path.name for path in kept]
    assert all(images.is_complete_png(path) for path in kept)
    assert images_of(run("--no_score", "--num_images", 4)) == whole


@pytest.mark.parametrize("name", ["manifest.json", "results.json", "sheet.png", "samples.npz"])
def test_a_disk_too_full_for_results_costs_one_sentence(run, tmp_path, monkeypatch, capsys, name):
    flags = ["--no_score", "--save_npz"]
    with monkeypatch.context() as patch:
        fail_on(patch, errno.ENOSPC, name)
        with pytest.raises(SystemExit):
            run(*flags)
    assert name in capsys.readouterr().err
    assert not list(tmp_path.rglob(name))
    assert run(*flags)["generated"] == 2


# ---- speed and plan ----------------------------------------------------------------------------------


def test_speed_is_reported_with_saving_and_without(run):
    result = run("--no_score", "--num_images", 4)
    assert 0 < result["images_per_s"] <= result["images_per_s_without_saving"]
    rate = 1 / result["sec_per_image"]
    assert result["images_per_s_without_saving"] == pytest.approx(rate)


def test_a_dry_run_tells_the_plan_and_writes_nothing(run, tmp_path, capsys):
    flags = ["--no_score", "--num_images", 10, "--eval_bsz", 4]
    plan = run(*flags, "--dry_run")
    assert (plan["to_make"], plan["batches"]) == ([10], [3])
    assert plan["flops_per_image"] > 1e6
    assert plan["seconds"] == pytest.approx(3 * plan["sec_per_batch"]) and plan["seconds"] > 0
    assert list(tmp_path.rglob("*")) == []
    result = run(*flags)
    (Path(result["images_dir"]) / "00005.png").unlink()
    before = snapshot(tmp_path)
    assert (run(*flags, "--dry_run")["to_make"], snapshot(tmp_path)) == ([1], before)


def test_a_dry_run_refuses_what_the_run_would_refuse(run, refused, tmp_path):
    run("--no_score")
    assert "--overwrite" in refused("--no_score", "--seed", 2, "--dry_run", out=tmp_path / "out")
    discarding = run("--no_score", "--seed", 2, "--dry_run", "--overwrite")
    assert discarding["to_make"] == [2]
    assert len(list((tmp_path / "out").rglob("0*.png"))) == 2
