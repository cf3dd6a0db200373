"""eval.py as its users call it: images, score, repair, refusals. The model is random and small."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
import main_mar
from models.tokenizers import latent_scale_of, load_tokenizer
from tests.support import ROOT
from tests.support.runs import (
    NUM_IMAGES,
    PROMISED,
    flags_for,
    images_of,
    pixels_of,
    random_mar,
    written_at,
)
from util.evaluation.batches import image_seed
from util.evaluation.conditions import image_label
from util.images import to_uint8

# ---- one scored run, as a command ------------------------------------------------------------------


@pytest.fixture
def result(scored) -> dict:
    """The last line on its stdout; NaN is no JSON."""
    _, process = scored
    assert process.returncode == 0, process.stderr

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(process.stdout.splitlines()[-1], parse_constant=refuse)


def test_the_last_line_on_stdout_is_a_json_document_with_settings_score_and_speed(result):
    assert result.keys() >= PROMISED
    settings = ("model", "lazy_mar", "num_images", "num_iter", "cfg", "device", "dtype")
    expected = ("mar_tiny", False, NUM_IMAGES, 2, 2.0, "cpu", "float32")
    assert tuple(result[name] for name in settings) == expected
    assert result["fid"] > 0
    assert 1 <= result["is_mean"] <= 10  # the exponential of an information about ten classes
    assert result["is_std"] >= 0
    assert result["sec_per_image"] > 0


def test_results_and_a_contact_sheet_lie_beside_the_images(result):
    folder = Path(result["images_dir"]).parent
    assert json.loads((folder / "results.json").read_text()) == result
    with Image.open(folder / "sheet.png") as sheet:
        assert min(sheet.size) >= 64


def test_there_is_one_numbered_rgb_png_per_image_and_nothing_else(result):
    paths = sorted(Path(result["images_dir"]).iterdir())
    assert [path.name for path in paths] == [f"{i:05d}.png" for i in range(NUM_IMAGES)]
    for path in paths:
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))


def test_every_class_gets_the_same_number_of_images_in_class_order(result):
    labels = [i // (NUM_IMAGES // 10) for i in range(NUM_IMAGES)]
    assert set(Counter(labels).values()) == {2}
    right, wrong = directly_sampled(labels), directly_sampled(labels[::-1])
    assert np.abs(pixels_of(result) - right).max() <= 1  # the weights' rounding may tip a byte
    differs = np.abs(pixels_of(result) - wrong).reshape(NUM_IMAGES, -1).max(axis=1) > 1
    assert differs.all()


def directly_sampled(labels: list[int]) -> np.ndarray:
    """Images of these labels and of the seeds that eval.py gives them: (N, H, W, 3) int16."""
    model = random_mar(1)  # the averaged weights
    tokenizer = load_tokenizer(
        "linear", ROOT / "pretrained_models/mar_tiny/tokenizer.safetensors", 8
    )
    seeds = [image_seed(1, i) for i in range(len(labels))]
    noise = model.image_noise(seeds)
    latents = model.sample_tokens(len(labels), 2, 2.0, labels=labels, noise=noise)
    with torch.no_grad():
        images = tokenizer.decode(latents / latent_scale_of(tokenizer, None))
    return to_uint8(images).astype(np.int16)


def test_labels_of_fifty_thousand_images_are_those_of_the_original():
    labels = [image_label(i, 50000, 1000) for i in range(50000)]
    assert labels == [i // 50 for i in range(50000)]


def test_where_classes_cannot_share_the_images_equally_they_differ_by_one():
    counts = Counter(image_label(i, 25, 10) for i in range(25))
    assert (set(counts), set(counts.values())) == (set(range(10)), {2, 3})


def test_the_same_command_again_generates_nothing_and_gives_the_same_score(
    scored, result, document_of
):
    before = written_at(result)
    again = document_of(eval_script, *scored[0])
    assert written_at(again) == before
    assert again["generated"] == result["generated"] == NUM_IMAGES
    for name in ("fid", "is_mean", "is_std"):
        assert again[name] == pytest.approx(result[name], rel=1e-6)
    assert again["sec_per_image"] == result["sec_per_image"]


# ---- weights -----------------------------------------------------------------------------------------


def test_every_format_of_the_same_weights_gives_the_same_images(run, weights, tmp_path):
    formats = ("official", "official/checkpoint-last.pth", "ema.pth", "ema.safetensors")
    runs = [
        run("--no_score", resume=weights / name, out=tmp_path / str(i))
        for i, name in enumerate(formats)
    ]
    first, *others = (images_of(result) for result in runs)
    assert len(first) == 2
    assert all(other == first for other in others)


def test_averaged_weights_are_used_unless_no_ema_asks_for_the_others(run, weights, tmp_path):
    averaged = run("--no_score", out=tmp_path / "averaged")
    plain = run("--no_score", "--no_ema", out=tmp_path / "plain")
    bare = run("--no_score", resume=weights / "plain.pth", out=tmp_path / "bare")
    assert images_of(plain) == images_of(bare)
    assert all(a != b for a, b in zip(images_of(averaged), images_of(plain), strict=True))


def test_main_mar_evaluate_makes_the_images_of_eval(run, weights, tmp_path, document_of):
    expected = run("--no_score")
    argv = flags_for(weights / "official", tmp_path / "main_mar", "--no_score", "--evaluate")
    assert images_of(document_of(main_mar, *argv)) == images_of(expected)


# ---- the run's folder --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--seed", 2],
            "holds a run with seed 1, not 2: choose another --output_dir or discard it",
        ),
        (["--seed_mode", "rank"], "seed_mode 'image'"),
        (["--vae_dtype", "bf16"], "vae_dtype 'float32', not 'bfloat16'"),
        (["--no_ema"], "holds a run with weights"),
        (["--latent_scale", 1.5], "holds a run with"),
        (["--dtype", "bf16"], "holds a run with"),
        (["--num_sampling_steps", "ddim4"], "holds a run with"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_folder_refuses_whatever_changes_the_images(run, refused, tmp_path, flags, words):
    images = images_of(first := run("--no_score"))
    assert words in refused("--no_score", *flags, out=tmp_path / "out")
    assert images_of(first) == images


def test_overwrite_replaces_the_images_of_another_configuration(run, tmp_path):
    run("--no_score", "--num_images", 2)
    replaced = run("--no_score", "--seed", 2, "--overwrite")
    fresh = run("--no_score", "--seed", 2, out=tmp_path / "fresh")
    assert replaced["generated"] == 2
    assert images_of(replaced) == images_of(fresh)


def test_runs_of_different_methods_share_an_output_folder(run):
    folders = {
        run("--no_score", *flags)["images_dir"]
        for flags in ([], ["--lazy_mar"], ["--lazy_mar", "--interval", 3], ["--num_iter", 3])
    }
    assert len(folders) == 4


def test_generation_alone_needs_neither_statistics_nor_a_feature_extractor(run, tmp_path):
    none = tmp_path / "none"
    result = run("--no_score", "--fid_stats", none, "--features_path", none)
    assert len(images_of(result)) == 2
    assert result.keys() >= PROMISED
    assert result["fid"] is result["is_mean"] is result["is_std"] is None


def test_bf16_is_reported_and_stays_near_float32(run, tmp_path):
    exact = run("--no_score", out=tmp_path / "float32")
    half = run("--no_score", "--dtype", "bf16", out=tmp_path / "bf16")
    assert (exact["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert 0 < np.abs(pixels_of(exact) - pixels_of(half)).mean() < 8


# ---- LazyMAR -----------------------------------------------------------------------------------------

SHORT_LAZY = ["--no_score", "--num_iter", 6, "--lazy_mar", "--warmup", 1, "--interval", 3]
SHORT_LAZY += ["--probe_layer", 1, "--keep_floor", 4, "--keep", "0:1,0.1:0.05"]


def test_each_cache_switches_off_alone_and_matters(run, tmp_path):
    on = run(*SHORT_LAZY, out=tmp_path / "on")
    assert on["lazy_mar"] is True
    for cache in ("token_cache", "condition_cache", "head_cache"):
        off = run(*SHORT_LAZY, f"--no_{cache}", out=tmp_path / cache)
        spelled = run(*SHORT_LAZY, f"--{cache}", "false", out=tmp_path / f"{cache}_false")
        assert images_of(off) != images_of(on), cache
        assert images_of(spelled) == images_of(off), cache


def test_every_field_of_lazymar_is_a_flag_that_takes_effect(run, tmp_path):
    on = run(*SHORT_LAZY, out=tmp_path / "on")
    others = {
        "--warmup": 4,
        "--interval": 2,
        "--probe_layer": 2,
        "--keep_floor": 30,
        "--keep": "0:1,0.1:0.5",
        "--head_interval": 2,
        "--head_skip": "0",
        "--head_warm": 0.1,
    }
    for name, value in others.items():
        changed = run(*SHORT_LAZY, name, value, out=tmp_path / name)
        assert images_of(changed) != images_of(on), name
