"""deepseek-ai's own files of Janus-Pro load into transformers' model and draw the same."""

import pytest
import torch

from util.errors import UserError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from models import janus_original  # noqa: E402
from models.janus import image_grid, sample_tokens  # noqa: E402
from models.janus_original import (  # noqa: E402
    PUBLISHED,
    config_of,
    from_original,
    is_original,
    open_original,
)
from tests.support.janus_original import (  # noqa: E402
    CONFIG,
    SMALL,
    original_weights,
    source_model,
    tiny_vq,
    write_original,
)
from tests.support.transformers_data import BOI, BOS, padded  # noqa: E402

PROMPTS = [[BOS, 9, 8, BOI], [BOS, 5, 6, 7, 8, 11, BOI]]
SEEDS = [4, 9]


@pytest.fixture(autouse=True)
def small_tokenizer(monkeypatch):
    monkeypatch.setattr(janus_original, "VQ_CHANNELS", SMALL)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_original_files_load_and_draw_the_same(tmp_path, parts):
    source, vq = source_model(), tiny_vq()
    folder = write_original(tmp_path / "original", original_weights(source, vq), parts)
    assert is_original(folder)
    model, processor = open_original(folder)
    codes = sample_tokens(source, **padded(PROMPTS), seeds=SEEDS)
    assert torch.equal(sample_tokens(model, **padded(PROMPTS), seeds=SEEDS), codes)
    pixels = vq.decode(codes.unflatten(1, (8, 8)))
    torch.testing.assert_close(
        model.decode_image_tokens(codes).movedim(-1, 1), pixels, rtol=1e-4, atol=1e-4
    )
    chat = [{"role": "user", "content": [{"type": "text", "text": "a red disc"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == "<|User|>: a red disc\n\n<|Assistant|>:"
    inputs = processor(text=["a red disc"], generation_mode="image", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[BOS, 6, 7, 8, BOI]]


def test_a_folder_of_transformers_is_not_taken_for_an_original(tmp_path):
    transformers.JanusConfig().save_pretrained(tmp_path)
    assert not is_original(tmp_path)
    assert not is_original(tmp_path / "none")


def test_original_files_that_do_not_fit_are_refused(tmp_path):
    weights = original_weights(source_model(), tiny_vq())
    with pytest.raises(ValueError, match="decoder.what is not a key of deepseek-ai's"):
        from_original({**weights, "decoder.what": torch.zeros(1)})
    with pytest.raises(ValueError, match="lacks 'vision_config', so it is not"):
        config_of({"language_config": CONFIG["language_config"]})
    kept = weights.pop("gen_embed.weight")
    folder = write_original(tmp_path / "lacking", weights)
    with pytest.raises(ValueError, match="1 tensors are missing.*generation_embeddings.weight"):
        open_original(folder)
    weights["gen_embed.weight"] = kept[:3].clone()
    folder = write_original(tmp_path / "shape", weights, parts=2)
    with pytest.raises(ValueError, match="1 of another shape.*generation_embeddings.weight"):
        open_original(folder)
    (folder / "pytorch_model-1.bin").unlink()
    with pytest.raises(UserError, match=r"lacks pytorch_model-1\.bin: download it again"):
        open_original(folder)


@pytest.mark.parametrize(
    ("name", "language", "head"),
    [("janus_pro_1b", 1442.9e6, 37.8e6), ("janus_pro_7b", 6490.9e6, None)],
)
def test_the_published_sizes_have_the_published_numbers_of_parameters(
    monkeypatch, name, language, head
):
    monkeypatch.undo()
    with torch.device("meta"):
        model = transformers.JanusForConditionalGeneration(config_of(PUBLISHED[name]))
    count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
    assert count(model.model.language_model) == pytest.approx(language, rel=1e-4)
    assert count(model.model.vqmodel) == pytest.approx(71.9e6, rel=1e-2)
    assert head is None or count(model.model.generation_head) == pytest.approx(head, rel=1e-2)
    assert image_grid(model) == (24, 24)
