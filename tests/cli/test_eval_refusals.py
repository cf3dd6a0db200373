"""What eval.py refuses: one sentence, exit code 2, and no image made."""

import pytest
import torch


def test_a_damaged_checkpoint_is_never_replaced_by_random_weights(refused, weights, tmp_path):
    whole = (weights / "official" / "checkpoint-last.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    cases = {"none": "no checkpoint at", "cut.pth": "truncated", "other.pth": "of another model"}
    for name, words in cases.items():
        assert words in refused("--no_score", resume=tmp_path / name), name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--diffloss_w", 32], "check the model's flags"),
        (["--diffloss_d", 2], "of another model"),
        (["--class_num", 1000], "check the model's flags"),
        (["--img_size", 128], "check the model's flags"),
        (["--img_size", 0], "img_size is 0"),
        (["--img_size", 30], "img_size 30"),
        (["--vae_embed_dim", -1], "vae_embed_dim"),
        (["--model", "mar_medium"], "mar_medium is unknown"),
        (["--num_iter", 0], "num_iter is 0"),
        (["--num_sampling_steps", "many"], "num_sampling_steps is 'many'"),
        (["--num_sampling_steps", 2000], "cannot take 2000 timesteps"),
        (["--num_images", 0], "num_images"),
        (["--eval_bsz", 0], "eval_bsz"),
        (["--threads", -1], "threads"),
        (["--seed", -1], "seed"),
        (["--cfg", "nan"], "cfg is nan"),
        (["--latent_scale", 0], "--latent_scale is 0.0"),
        (["--device", "gpu"], "--device gpu is unknown"),
        (["--vae_path", "none.safetensors"], "none.safetensors"),
        (["--tokenizer", "kl16", "--vae_path", "none.ckpt"], "none.ckpt"),
        (["--vae_path", "pyproject.toml"], "pyproject.toml is damaged"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags_that_make_no_sense_are_refused_before_anything_is_generated(refused, flags, words):
    assert words in refused("--no_score", *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--interval", 3], "--interval belongs to LazyMAR"),
        (["--no_token_cache"], "--no_token_cache belongs to LazyMAR"),
        (["--lazy_mar", "--interval", 0], "interval is 0"),
        (["--lazy_mar", "--keep", "0.5:0.1"], "keep has progress"),
        (["--lazy_mar", "--head_warm", 2], "head_warm is 2"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_constants_of_lazymar_that_have_no_effect_or_sense_are_refused(refused, flags, words):
    assert words in refused("--no_score", *flags)


def test_cuda_where_there_is_none_is_refused(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch sees no CUDA device here" in refused("--no_score", "--device", "cuda")


def test_a_damaged_file_for_scoring_is_reported_before_anything_is_generated(refused, tmp_path):
    (tmp_path / "page").write_text("<!DOCTYPE html><p>Sign in</p>")
    assert "page is not a shape classifier's file" in refused("--features_path", tmp_path / "page")
    assert "page is not a file of FID statistics" in refused("--fid_stats", tmp_path / "page")
    assert "none is missing" in refused("--features_path", tmp_path / "none")
    assert "unknown feature extractor" in refused("--features", "resnet")


def test_too_few_images_for_a_score_are_reported_before_they_are_generated(refused):
    assert "at least 2 images" in refused("--num_images", 1)


def test_an_output_folder_that_cannot_be_made_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused("--no_score", out=tmp_path / "file")
