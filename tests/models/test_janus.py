"""Janus draws what the library draws; the draws belong to the image."""

import pytest
import torch

from models.gpt_images import GPTSampling
from models.line_config import LineARConfig
from models.line_methods import METHODS
from models.token_sampling import TokenSampler
from util.errors import UserError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from models.janus import (  # noqa: E402
    JanusGenerator,
    sample_tokens,
    unconditional,
)
from models.transformers_cache import LineARCache, cache_argument, line_ar_attention  # noqa: E402
from tests.support.transformers_data import (  # noqa: E402
    BOI,
    BOS,
    MaskingOracle,
    padded,
    tiny_janus,
    tiny_processor,
)

GRID = (8, 6)
PROMPTS = [[BOS, 9, 8, BOI], [BOS, 5, 6, 7, 8, 11, BOI]]
SEEDS = [4, 9]
LINEAR = LineARConfig(3, anchors=2, recent=1)


@pytest.fixture
def librarys(monkeypatch):
    """The library's `generate`, drawing as our sampler does."""

    def generate(model, **kwargs):
        steps = iter(range(GRID[0] * GRID[1]))
        sampler = TokenSampler(2, GRID[0] * GRID[1], 1.0, 0, 1.0, False, SEEDS, torch.device("cpu"))
        draw = lambda probs, num_samples: sampler(probs.log(), next(steps))[:, None]  # noqa: E731
        monkeypatch.setattr(torch, "multinomial", draw)
        settings = {"do_sample": True, "guidance_scale": 5.0, "top_k": 0, **kwargs}
        return model.generate(**padded(PROMPTS), generation_mode="image", **settings)

    return generate


def test_codes_are_those_of_the_librarys_generate_with_the_same_draws(librarys):
    model = tiny_janus()
    codes = sample_tokens(model, **padded(PROMPTS), grid=GRID, seeds=SEEDS)
    assert torch.equal(codes, librarys(model))
    other = sample_tokens(model, **padded(PROMPTS), grid=GRID, seeds=[4, 10])
    assert torch.equal(codes[0], other[0])
    assert not torch.equal(codes[1], other[1])


def test_compressed_codes_are_those_of_the_librarys_generate(librarys):
    model = tiny_janus()
    codes = sample_tokens(model, **padded(PROMPTS), grid=GRID, seeds=SEEDS, line_ar=LINEAR)
    with line_ar_attention(model):
        cache = {cache_argument(model): LineARCache(LINEAR, GRID)}
        assert torch.equal(codes, librarys(model, **cache))
    assert not torch.equal(codes, librarys(model))


def test_another_cache_of_the_library_draws_the_same():
    model = tiny_janus()
    cache = transformers.StaticCache(config=model.config.text_config, max_cache_len=7 + 48)
    settings = {"grid": GRID, "seeds": SEEDS}
    codes = sample_tokens(model, **padded(PROMPTS), **settings, cache=cache)
    assert cache.get_seq_length() == 7 + 47
    assert torch.equal(codes, sample_tokens(model, **padded(PROMPTS), **settings))


@pytest.mark.parametrize("cfg", [2.0, 5.0])
def test_greedy_codes_are_those_of_the_library(cfg):
    model = tiny_janus()
    codes = sample_tokens(model, **padded(PROMPTS), cfg=cfg, grid=GRID, greedy=True)
    wanted = model.generate(
        **padded(PROMPTS), generation_mode="image", do_sample=False, guidance_scale=cfg
    )
    assert torch.equal(codes, wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_compressed_codes_are_those_of_the_oracle(method, cfg):
    model, config = tiny_janus(seed=1), LineARConfig(3, anchors=2, recent=1, method=method)
    settings = {"cfg": cfg, "grid": GRID, "seeds": SEEDS}
    codes = sample_tokens(model, **padded(PROMPTS), **settings, line_ar=config)
    oracle = MaskingOracle(config.plan(GRID, 7), method)
    with oracle.serves(model):
        assert torch.equal(codes, sample_tokens(model, **padded(PROMPTS), **settings))
    assert not torch.equal(codes, sample_tokens(model, **padded(PROMPTS), **settings))


@pytest.mark.parametrize("line_ar", [None, LINEAR])
def test_an_image_is_the_same_alone_and_in_a_batch(line_ar):
    model = tiny_janus().double()  # rounding, which may differ, decides no draw
    settings = {"grid": GRID, "line_ar": line_ar}
    many = sample_tokens(model, **padded(PROMPTS), seeds=SEEDS, **settings)
    for i, prompt in enumerate(PROMPTS):
        one = sample_tokens(model, **padded([prompt]), seeds=SEEDS[i : i + 1], **settings)
        assert torch.equal(many[i : i + 1], one)


def test_the_other_branch_keeps_what_begins_text_and_image():
    ids = unconditional(tiny_janus(), padded(PROMPTS)["input_ids"])
    assert ids.tolist() == [[0, 0, 0, BOS, 0, 0, BOI], [BOS, 0, 0, 0, 0, 0, BOI]]


def test_a_model_that_computes_nan_gives_no_codes():
    model = tiny_janus()
    model.model.generation_head.vision_head.weight[3] = torch.nan
    codes = sample_tokens(model, **padded(PROMPTS), grid=GRID, seeds=SEEDS)
    assert bool((codes == -1).all())


def test_a_prompt_that_leaves_no_room_for_the_image_is_refused():
    generator = JanusGenerator(tiny_janus((8, 8)), tiny_processor(), GPTSampling(), 16)
    long = "red disc " * 223  # and two begin tokens: 448 of 512 positions
    inputs, _ = generator.prepare(["a disc", long], [1, 2])
    assert inputs["input_ids"].shape == (2, 512 - 64)
    with pytest.raises(
        UserError, match="a prompt has 449 tokens, the model takes 448: shorten 'a red"
    ):
        generator.prepare(["a disc", f"a {long}"], [1, 2])


TEMPLATE = (
    "{% for m in messages %}User: {{ m['content'][0]['text'] }} {% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_prompts_become_pictures_whatever_their_batch(template):
    model = tiny_janus((8, 8))
    sampling = GPTSampling(5.0, line_ar=LineARConfig(2, anchors=2, recent=1))
    generator = JanusGenerator(model, tiny_processor(template), sampling, 16)
    prompts = ["a red disc", "green star a red star"]
    inputs, seeds = generator.prepare(prompts, [1, 2])
    words = [1, 6, 7, 8] if template is None else [1, 12, 6, 7, 8, 13]
    assert [i for i in inputs["input_ids"][0].tolist() if i] == [*words, BOI]
    images = generator.generate((inputs, seeds))
    assert images.shape == (2, 3, 16, 16)
    alone = generator.generate(generator.prepare(prompts[:1], [1]))
    torch.testing.assert_close(images[:1], alone, rtol=1e-4, atol=1e-4)
    codes = sample_tokens(model, **inputs, seeds=seeds, line_ar=sampling.line_ar)
    pixels = model.decode_image_tokens(codes).movedim(-1, 1)  # 16 pixels: stride 2
    torch.testing.assert_close(images, pixels)
    for token in ("<image_placeholder>", generator.processor.tokenizer.bos_token):
        with pytest.raises(UserError, match=f"prompts are text alone: remove {token} from"):
            generator.prepare(["a disc", f"a {token} disc"], [1, 2])
