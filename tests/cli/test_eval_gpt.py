"""eval.py with a GPT: the same run folder, seeds and refusals; official containers load."""

import argparse

import numpy as np
import pytest
import torch

from engine import cli
from models import llamagen
from models.gpt_images import GPTGenerator, GPTSampling
from models.line_cache import LineARConfig
from models.vq import vq_tiny
from tests.support import ROOT
from tests.support.llamagen_data import recipe_gpt
from tests.support.runs import manifest_of, pixels_of
from util.evaluation.batches import image_seed
from util.evaluation.conditions import image_label
from util.images import to_uint8
from util.weights import load_into, save_safetensors

TINY = {"dim": 128, "n_layer": 6, "n_head": 4, "num_classes": 10, "vocab_size": 512}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One small GPT in every container: model.pt ("model" and more), bare.pt, model.safetensors."""
    folder = tmp_path_factory.mktemp("gpt")
    state = recipe_gpt(**TINY).state_dict()
    rope = torch.zeros(257, 16, 2)
    args = argparse.Namespace(gpt_model="GPT-B")
    torch.save(
        {"model": {**state, "freqs_cis": rope}, "steps": 3, "args": args}, folder / "model.pt"
    )
    torch.save({**state, "freqs_cis": rope}, folder / "bare.pt")
    save_safetensors(folder / "model.safetensors", state)
    return folder


@pytest.fixture
def sample(run, files):
    """Calls eval.py for three images of the small GPT, 8x8 codes each."""

    def call(*flags: object, resume: object = files / "model.pt", **kwargs: object) -> dict:
        gpt = ["--model", "gpt_tiny", "--num_images", 3, "--eval_bsz", 2, "--no_score"]
        gpt += ["--img_size", 32, "--top_p", 1, *flags]
        return run(*gpt, resume=resume, **kwargs)

    return call


def test_every_official_container_gives_the_same_images(sample, files, tmp_path):
    one = pixels_of(sample())
    for name in ("bare.pt", "model.safetensors"):
        assert np.array_equal(pixels_of(sample(resume=files / name, out=tmp_path / name)), one)


def test_the_images_are_those_of_their_labels_and_seeds_in_any_batch(sample):
    result = sample("--eval_bsz", 3)
    model, tokenizer = recipe_gpt(**TINY, block_size=64), vq_tiny().eval()
    load_into(tokenizer, ROOT / cli.named("gpt_tiny").host().images.vae_path, use_ema=False)
    for i, image in enumerate(pixels_of(result)):
        label, seed = image_label(i, 3, 10), image_seed(1, i)
        one = GPTGenerator(model, tokenizer, GPTSampling(2.0), 32).generate(([label], [seed]))
        difference = to_uint8(one)[0].astype(int) - image
        assert abs(difference).max() <= 1


def test_a_run_resumes_and_a_compressed_one_has_its_own_folder(sample):
    full = sample()
    assert full["generated"] == 3
    assert full["method"] == "full cache"
    assert sample()["generated"] == 3
    line = sample("--line_ar", "--line_budget", "3/8", "--line_anchors", 4)
    assert line["line_ar"]
    assert line["method"] == "LineAR 3/8, anchors 4, recent 1"
    assert line["images_dir"] != full["images_dir"]
    assert not np.array_equal(pixels_of(line)[0], pixels_of(full)[0])


def test_the_folder_is_named_after_model_method_and_settings(sample):
    assert "/gpt_tiny-full_cache-cfg2-3/" in sample()["images_dir"]
    result = sample("--line_ar", "--line_method", "h2o", "--line_budget", 3, "--top_k", 9)
    assert "/gpt_tiny-h2o_3-cfg2-top_k9-3/" in result["images_dir"]


def test_pictures_are_resized_and_the_tokenizer_may_decode_fewer_at_once(sample, tmp_path):
    flags = ("--eval_bsz", 3, "--image_size_eval", 20)
    together = pixels_of(sample(*flags))
    assert together.shape == (3, 20, 20, 3)
    assert (
        abs(together - pixels_of(sample(*flags, "--vae_bsz", 2, out=tmp_path / "few"))).max() <= 1
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ("--line_ar", "--line_budget", "1/8", "--line_recent", "2"),
            "32 tokens (2 lines of 16) is too small for 8 anchors and 32 recent",
        ),
        (("--line_ar", "--line_budget", "2/0"), "'2/0' is not a budget like 1/6, 0.25 or 4"),
        (("--line_ar", "--line_budget", "2.5"), "--line_budget is 2.5"),
        (
            ("--line_ar", "--line_method", "h2o", "--line_anchors", 3),
            "--line_anchors has no effect with --line_method h2o",
        ),
        (("--num_iter", "32"), "--num_iter is for MAR models; --model gpt_tiny is a GPT model"),
        (("--line_ar", "--line_method", "magic"), "'magic'; use one of none, linear"),
        (("--line_anchors", "4"), "--line_anchors belongs to LineAR: add --line_ar"),
        (("--img_size", "30"), "--img_size is 30; it must be a multiple of --vae_stride 4"),
        (("--top_p", "0"), "top_p is 0.0"),
        (("--top_k", "-1"), "--top_k is -1"),
        (("--temperature", "0"), "temperature is 0.0"),
        (("--cfg", "nan"), "cfg is nan"),
    ],
)
def test_a_mistake_is_one_sentence(refused, files, flags, sentence):
    assert sentence in refused(
        "--model", "gpt_tiny", "--no_score", *flags, resume=files / "bare.pt"
    )


def test_flags_of_a_gpt_are_refused_for_mar(refused):
    words = "--line_ar is for GPT, Janus and Lumina models; --model mar_tiny is a MAR model"
    assert words in refused("--line_ar")


@pytest.mark.parametrize("name", ["gpt_b", "gpt_xl"])
def test_a_missing_file_is_named_before_gigabytes_are_made_for_it(refused, name, monkeypatch):
    resume = cli.named(name).host().resume
    monkeypatch.setattr(llamagen, name, None)
    sentence = refused("--model", name, "--no_score", resume=resume)
    assert f"no checkpoint at {resume}" in sentence
    assert f"python -m util.download {name}`" in sentence


def test_a_missing_tokenizer_is_named_with_the_command_that_fetches_it(refused, files):
    flags = ("--vae_path", "none.pt", "--no_score")
    sentence = refused("--model", "gpt_tiny", *flags, resume=files / "bare.pt")
    assert "--vae_path: the tokenizer none.pt is missing" in sentence
    assert "python -m util.download vq16" in sentence


def test_a_file_of_another_size_is_refused(refused, tmp_path):
    small = recipe_gpt(**{**TINY, "dim": 64})
    torch.save({"model": small.state_dict()}, tmp_path / "small.pt")
    sentence = refused("--model", "gpt_tiny", "--no_score", resume=tmp_path / "small.pt")
    assert "(11, 64)" in sentence
    assert "(11, 128)" in sentence


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (None, "full cache"),
        (LineARConfig(method="none"), "full cache"),
        (LineARConfig(1 / 6), "LineAR 1/6"),
        (LineARConfig(0.01, 0, 1), "LineAR 0.01, anchors 0, recent 1"),
        (LineARConfig(0.1666), "LineAR 0.1666"),
        (LineARConfig(5, pooling="max"), "LineAR 5, pooling max"),
        (LineARConfig(3 / 8, method="rkv"), "rkv 3/8"),
        (LineARConfig(1 / 4, 0, 1, "stratified", spaced=2), "stratified 1/4, recent 1, spaced 2"),
    ],
)
def test_a_cache_is_named_by_its_budget_and_by_what_was_changed(config, name):
    assert GPTSampling(1.5, line_ar=config).method == name


def test_weights_that_are_not_numbers_make_no_picture(refused, files, tmp_path):
    state = torch.load(files / "bare.pt", weights_only=True)
    state["norm.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    flags = ("--model", "gpt_tiny", "--img_size", 16, "--no_score")
    sentence = refused(*flags, resume=tmp_path / "nan.pt")
    assert "1 of 1 decoded images contain NaN or infinity" in sentence


def test_settings_of_line_ar_reach_the_configuration_of_the_run(sample):
    result = sample("--line_ar", "--line_recent", 1, "--line_anchors", 0, "--line_pooling", "max")
    want = LineARConfig(recent=1, anchors=0, pooling="max")
    assert manifest_of(result)["config"]["line_ar"] == vars(want)
