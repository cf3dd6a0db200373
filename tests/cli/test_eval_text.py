"""eval.py draws prompts with Janus and Lumina-mGPT: run folder, resuming, scores, refusals."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as eval_script
from models.chameleon_vq import ChameleonVQ
from tests.support.runs import images_of, manifest_of, pixels_of, written_at
from util.errors import UserError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from engine import llamagen as llamagen_engine  # noqa: E402
from engine import lumina, text_to_image  # noqa: E402
from models import janus_original  # noqa: E402
from tests.support.janus_original import (  # noqa: E402
    SMALL,
    original_weights,
    source_model,
    tiny_vq,
    write_original,
)
from tests.support.transformers_data import (  # noqa: E402
    save_tiny_janus,
    tiny_chameleon,
    tiny_processor,
)

PROMPTS = ["a red disc", "", "a green star", "a red star on a blue ground"]
LINE_AR = ("--line_ar", "--line_budget", "1/4", "--line_anchors", 2, "--line_recent", 1)


@pytest.fixture(scope="module")
def janus(tmp_path_factory):
    """The folder of a random Janus of 8 x 8 codes, 16 pixels."""
    folder = tmp_path_factory.mktemp("janus")
    save_tiny_janus(folder)
    return folder


@pytest.fixture
def draw(one_thread, document_of, tmp_path):
    """Calls eval.py; returns its last line, parsed."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def call(model: str, *flags: object, out: str = "out", bsz: int = 2) -> dict:
        words = ["--model", model, "--prompts", prompts, "--num_images", 4, "--eval_bsz", bsz]
        words += ["--device", "cpu", "--threads", 1, "--output_dir", tmp_path / out, *flags]
        return document_of(eval_script, *words)

    return call


def test_janus_draws_resumes_and_is_scored_by_its_prompts(draw, janus):
    flags = ("--resume", janus, "--image_size_eval", 64, *LINE_AR)
    first = draw("janus_tiny", *flags, "--no_score")
    assert first["method"] == "LineAR 1/4, anchors 2, recent 1"
    assert manifest_of(first)["config"]["prompts"].startswith("prompts.txt 3 ")
    images, times = images_of(first), written_at(first)
    (Path(first["images_dir"]) / "00002.png").unlink()
    result = draw("janus_tiny", *flags)
    assert images_of(result) == images
    assert [n for n in times if written_at(result)[n] != times[n]] == ["00002.png"]
    assert result["fid"] > 0
    assert 0 <= result["accuracy"] <= 1
    full = draw("janus_tiny", *flags[:4], "--no_score")
    assert images_of(full) != images


def test_prompts_that_cannot_be_scored_are_refused_before_anything_is_loaded(draw, tmp_path):
    (tmp_path / "cat.txt").write_text("a red disc\na cat")
    with pytest.raises(UserError, match="the caption 'a cat' is outside the grammar"):
        draw("janus_tiny", "--resume", "none", "--prompts", tmp_path / "cat.txt")


def test_a_run_is_not_scored_by_other_prompts(draw, janus, tmp_path, monkeypatch):
    first = draw("janus_tiny", "--resume", janus, "--image_size_eval", 64)
    folder = Path(first["images_dir"]).parent
    monkeypatch.setattr(sys, "argv", ["eval.py", "--score_only", str(folder)])
    eval_script.main()
    (tmp_path / "prompts.txt").write_text("a red disc\na green ring")
    with pytest.raises(
        UserError, match=r"made from prompts 'prompts.txt 3 .*, not 'prompts.txt 2 "
    ):
        eval_script.main()


def test_an_image_of_a_prompt_is_the_same_in_any_batch(draw, janus):
    flags = ("--resume", janus, "--no_score", *LINE_AR)
    many, single = draw("janus_tiny", *flags, bsz=4), draw("janus_tiny", *flags, bsz=1, out="one")
    assert abs(pixels_of(many) - pixels_of(single)).max() <= 1
    assert len(set(images_of(many))) == 4  # prompts 0 and 3 are the same, their seeds are not


def test_deepseeks_own_folder_draws_what_its_copy_in_transformers_draws(
    draw, monkeypatch, tmp_path
):
    monkeypatch.setattr(janus_original, "VQ_CHANNELS", SMALL)
    folder = write_original(tmp_path / "original", original_weights(source_model(), tiny_vq()))
    model, processor = janus_original.open_original(folder)
    model.save_pretrained(tmp_path / "copy")
    processor.save_pretrained(tmp_path / "copy")
    ours = draw("janus_pro_1b", "--resume", folder, "--no_score", "--num_images", 2)
    copy = draw(
        "janus_pro_1b", "--resume", tmp_path / "copy", "--no_score", "--num_images", 2, out="b"
    )
    assert images_of(ours) == images_of(copy)
    assert manifest_of(ours)["config"]["img_size"] == 128


def test_lumina_draws_and_resumes(draw, monkeypatch, tmp_path):
    small = partial(ChameleonVQ, 64, 32, ch=32, ch_mult=(1,) * 5, num_res_blocks=1, z_channels=32)
    monkeypatch.setattr(lumina, "ChameleonVQ", small)
    folder, vq = tmp_path / "lumina", tmp_path / "vqgan.ckpt"
    tiny_chameleon().save_pretrained(folder)
    tiny_processor().tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    leftover = {"loss.perceptual_loss.lin0.weight": torch.zeros(1)}
    torch.save({"state_dict": {**small().state_dict(), **leftover}}, vq)
    flags = ("--resume", folder, "--vae_path", vq, "--img_size", 128, "--no_score")
    first = draw("lumina_mgpt_768", *flags, *LINE_AR)
    assert pixels_of(first).shape == (4, 128, 128, 3)
    assert manifest_of(first)["config"]["tokenizer"].startswith("chameleon ")
    images = images_of(first)
    assert len(set(images)) == 4
    (Path(first["images_dir"]) / "00001.png").unlink()
    assert images_of(draw("lumina_mgpt_768", *flags, *LINE_AR)) == images
    plan = draw("lumina_mgpt_768", *flags, "--dry_run")
    tokens, matrices = 8 * 9, 2 * (4 * 64 * 64 + 3 * 64 * 128)
    attention = 4 * 64 * 2 * tokens * (tokens + 1) / 2
    assert plan["flops_per_image"] == 2 * (2 * tokens * matrices + attention + 2 * 64 * 64 * 64)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "janus_pro_1b",
            "there is no folder pretrained_models/janus/Janus-Pro-1B: get the published",
        ),
        (
            "janus_pro_7b",
            "with `python -m util.download janus_pro_7b`, or give --resume a folder or a",
        ),
        (
            "lumina_mgpt_768",
            "download Alpha-VLLM/Lumina-mGPT-7B-768 from the Hugging Face Hub into it",
        ),
        ("janus_tiny --resume HERE/none", "there is no folder HERE/none: make it with scripts/"),
        ("janus_tiny --resume HERE", "cannot be loaded as --model janus_tiny (HERE holds neither"),
        (
            "janus_tiny --resume JANUS --line_ar --line_budget 1/8",
            "8 tokens (1 lines of 8) is too small",
        ),
        (
            "janus_tiny --resume JANUS --vae_path x",
            "--vae_path is for GPT, Lumina and MAR models",
        ),
        (
            "gpt_xl_t2i_512",
            "t2i_XL_stage2_512.pt is missing: get it from LlamaGen's repository, see",
        ),
        ("gpt_xl_t2i_512 --class_num 5", "--class_num has no effect with --model gpt_xl_t2i_512"),
        (
            "gpt_tiny --t5_path x",
            "--t5_path is for text-to-image models; gpt_tiny takes class labels",
        ),
        (
            "janus_tiny --resume CUT",
            "1 tensors are missing, 0 unknown, 0 of another shape, the first",
        ),
        ("janus_tiny --resume OTHER", "(its model_type is 'chameleon', not 'janus')"),
        ("lumina_mgpt_768 --img_size 100", "--img_size is 100; it must be a multiple of 32"),
        ("lumina_mgpt_768 --resume JANUS", "--vae_path: the tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(draw, janus, tmp_path, words, sentence):
    shutil.copytree(janus, tmp_path / "cut")
    weights = load_file(janus / "model.safetensors")
    del weights["model.generation_head.vision_head.weight"]
    save_file(weights, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").touch()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "chameleon"}')
    words = words.replace("HERE", str(tmp_path)).replace("JANUS", str(janus))
    words = words.replace("CUT", f"{tmp_path}/cut").replace("OTHER", f"{tmp_path}/other")
    with pytest.raises(UserError) as error:
        draw(*words.split(), "--no_score")
    assert sentence.replace("HERE", str(tmp_path)) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("model.safetensors", b"", "cannot be loaded"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "cannot be loaded"),
        ("config.json", {"text_config": None}, "its config.json has no text_config"),
        ("config.json", {"text_config": {"hidden_size": "wide"}}, "cannot be loaded"),
        ("config.json", {"text_config": {"num_attention_heads": 0}}, "cannot be loaded"),
        ("generation_config.json", None, "needs bos_token_id, generation_kwargs.boi_token_id and"),
        ("generation_config.json", b"[]", "cannot be loaded"),
        (
            "generation_config.json",
            {"generation_kwargs": {"boi_token_id": 99999}},
            "below 32, not [1, 99999, 0]",
        ),
        ("tokenizer_config.json", None, "cannot be loaded"),
    ],
)
def test_a_damaged_folder_is_refused_before_anything_is_drawn(
    draw, janus, tmp_path, name, content, sentence
):
    folder = tmp_path / "damaged"
    shutil.copytree(janus, folder)
    path = folder / name
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        found = json.loads(path.read_text())
        for key, value in content.items():
            found[key] = {**found[key], **value} if isinstance(value, dict) else value
        path.write_text(json.dumps(found))
    with pytest.raises(UserError) as error:
        draw("janus_tiny", "--resume", folder, "--no_score")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_hub_model_without_safetensors_is_refused(draw, monkeypatch, tmp_path):
    monkeypatch.setattr(text_to_image, "hub_folder", lambda name: tmp_path)
    with pytest.raises(UserError, match=r"some/janus has no safetensors on the Hugging Face Hub"):
        draw("janus_pro_1b", "--resume", "some/janus", "--no_score")


def test_without_transformers_the_extra_is_named(draw, monkeypatch):
    monkeypatch.setattr(text_to_image, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs transformers: install it with `pip install '\.\[transf"
    ):
        draw("janus_tiny", "--no_score")


def test_a_name_on_the_hub_is_fetched_into_its_cache(draw, janus, monkeypatch):
    asked = []
    monkeypatch.setattr(text_to_image, "hub_folder", lambda name: asked.append(name) or janus)
    result = draw("janus_tiny", "--resume", "someone/Janus", "--no_score", "--num_images", 1)
    assert asked == ["someone/Janus"]
    assert manifest_of(result)["config"]["weights"].startswith("Janus ")


@pytest.fixture
def llamagen_files(monkeypatch, tmp_path):
    """Flags for a tiny text-to-image GPT of 4 x 4 codes, its tokenizer, and a T5 of random weights."""
    from models import llamagen, vq

    tiny = {"dim": 64, "n_layer": 1, "n_head": 4, "vocab_size": 512}
    make = partial(llamagen.GPT, **tiny, cls_token_num=6, caption_dim=32)
    monkeypatch.setattr(llamagen, "gpt_xl_t2i", make)
    torch.manual_seed(0)
    torch.save({"model": make(block_size=16).state_dict()}, tmp_path / "t2i.pt")
    torch.save({"model": vq.vq_tiny().state_dict()}, tmp_path / "vq.pt")
    config = transformers.T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2
    )
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    tiny_processor().tokenizer.save_pretrained(tmp_path / "t5")
    flags = ["--resume", tmp_path / "t2i.pt", "--vae_path", tmp_path / "vq.pt"]
    monkeypatch.setitem(llamagen_engine.TOKENIZERS, "vq16", vq.vq_tiny)
    flags += ["--vae_stride", 4, "--img_size", 16, "--no_score"]
    return [*flags, "--t5_path", tmp_path / "t5"]


def test_llamagen_draws_captions_through_t5(draw, llamagen_files, tmp_path):
    full = draw("gpt_xl_t2i_256", *llamagen_files)
    assert pixels_of(full).shape == (4, 16, 16, 3)
    assert len(set(images_of(full))) == 4
    assert " T5 " in manifest_of(full)["config"]["weights"]
    single = draw("gpt_xl_t2i_256", *llamagen_files, out="one", bsz=1)
    assert abs(pixels_of(full) - pixels_of(single)).max() <= 1
    line_ar = ("--line_ar", "--line_budget", 2, "--line_anchors", 1, "--line_recent", 1)
    assert images_of(draw("gpt_xl_t2i_256", *llamagen_files, *line_ar)) != images_of(full)
    with pytest.raises(
        UserError, match=r"--t5_path none is no T5 of transformers \(none holds nei"
    ):
        draw("gpt_xl_t2i_256", *llamagen_files, "--t5_path", "none")


def test_captions_are_padded_on_the_left_as_the_gpt_was_trained(tmp_path):
    from models.llamagen_text import CaptionGenerator

    encoder = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    ).eval()
    model = type("Model", (), {"cls_token_num": 6, "device": torch.device("cpu")})
    generator = CaptionGenerator(model, (tiny_processor().tokenizer, encoder), None, None, 16)
    captions, mask, _ = generator.prepare(["A red disc ", "a green star a red star"], [1, 2])
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]  # <s> and three words; cut after six
    alone = encoder(torch.tensor([[1, 6, 7, 8]])).last_hidden_state[0]
    torch.testing.assert_close(captions[0, 2:], alone, rtol=1e-4, atol=1e-5)
