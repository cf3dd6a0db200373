"""janus_tiny: what is trained, the loss of the library's own forward, and the bundled model."""

from pathlib import Path

import pytest
import torch

from util.errors import UserError
from util.shapes import HELD_OUT_START
from util.tiny.captions import WORDS, caption_of, parse
from util.tiny.janus_vq import janus_vq
from util.tiny.prompt_classifier import CLASSIFIER, FOLDER, PromptClassifier, prompt_agreement
from util.weights import save_safetensors

pytest.importorskip("transformers", reason="janus_tiny needs transformers")
from util.tiny import janus

BUNDLE = Path(__file__).parents[3] / FOLDER
PICTURES = 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer's file with random weights."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    torch.manual_seed(3)
    save_safetensors(path, janus_vq().state_dict())
    return path


def test_only_the_parts_that_draw_are_trained(write_codes, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(janus, "BATCH", 2)
    before = janus.start(tokenizer).state_dict()
    folder = write_codes(tmp_path / "one", tokenizer)
    after = janus.train(folder, tokenizer, 2, PICTURES)[0].state_dict()
    changed = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    trained = {"language_model", "generation_embeddings", "generation_aligner", "generation_head"}
    assert changed - {"weight"} == trained  # lm_head.weight is tied to the text embeddings


def test_the_loss_is_that_of_the_codes_one_by_one_with_a_cache(tokenizer):
    model = janus.start(tokenizer).eval()
    captions = ["a red disc on a blue ground", "an orange star"]
    inputs = janus.make_processor()(
        text=captions, generation_mode="image", padding=True, return_tensors="pt"
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    codes = torch.randint(512, (2, 6))
    with torch.no_grad():
        loss = janus.loss_of(model, ids, mask, codes)
        step = model.get_input_embeddings()(ids)
        cache, logits = None, []
        for code in codes.T:
            keyword = {} if cache is None else {janus_cache_name(model): cache}
            out = model.model.language_model(
                inputs_embeds=step, attention_mask=mask, use_cache=True, **keyword
            )
            cache = getattr(out, janus_cache_name(model))
            logits.append(model.model.generation_head(out.last_hidden_state[:, -1]))
            step = model.prepare_embeddings_for_image_generation(code[:, None])
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), codes.T.flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)


def janus_cache_name(model):
    """transformers 5.24 renamed past_key_values to cache."""
    import inspect

    parameters = inspect.signature(model.model.language_model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def test_dropped_prompts_keep_their_length_and_their_begin_tokens():
    ids = torch.tensor([[0, 1, 9, 12, 3], [1, 9, 10, 11, 3]])
    dropped = janus.drop_prompts(ids, torch.tensor([True, False]))
    assert dropped.tolist() == [[0, 1, 0, 0, 3], [1, 9, 10, 11, 3]]


def test_every_word_of_the_grammar_is_one_token_between_the_begin_tokens():
    inputs = janus.make_processor()(text=[" ".join(WORDS)], generation_mode="image")
    ids = inputs["input_ids"][0]
    ids = ids.tolist() if torch.is_tensor(ids) else ids
    assert ids == [janus.VOCABULARY[word] for word in (janus.BOS, *WORDS, janus.BOI)]


def test_capitals_and_a_full_stop_which_the_grammar_allows_make_no_difference():
    plain, written = "a red disc on a blue ground", "A Red disc  on a blue ground."
    assert parse(written) == parse(plain)
    ids = janus.make_processor()(text=[plain, written], generation_mode="image")["input_ids"]
    assert list(ids[0]) == list(ids[1])


def test_what_is_saved_loads_through_the_library_and_draws(tokenizer, tmp_path):
    from transformers import AutoProcessor

    model = janus.start(tokenizer).half()
    janus.save(model, tmp_path / "bundle")
    processor = AutoProcessor.from_pretrained(tmp_path / "bundle")
    chat = [{"role": "user", "content": [{"type": "text", "text": "a red disc"}]}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == "a red disc"
    loaded = type(model).from_pretrained(tmp_path / "bundle")
    assert loaded.dtype == torch.float16
    assert loaded.generation_config.generation_kwargs["boi_token_id"] == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert sum(path.stat().st_size for path in (tmp_path / "bundle").iterdir()) < 6e6
    assert not list(tmp_path.rglob("*.part"))


def test_a_missing_tokenizer_is_one_sentence(tmp_path, monkeypatch):
    argv = ["janus", "--output_dir", str(tmp_path), "--tokenizer", str(tmp_path / "none")]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(UserError, match="no tokenizer at"):
        janus.main()


def test_the_bundled_model_draws_what_its_prompts_say():
    prompts = [caption_of(HELD_OUT_START + n) for n in range(12)]
    images = janus.draw_prompts(BUNDLE, prompts, seed=1)
    shares = prompt_agreement(PromptClassifier.from_file(BUNDLE / CLASSIFIER), images, prompts)
    assert shares["all"] >= 0.5
    assert shares["colour"] >= 0.75
