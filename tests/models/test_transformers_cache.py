"""LineAR's cache in untouched models of transformers forgets what it says, and nothing else changes."""

import pytest
import torch

from models.line_config import LineARConfig
from models.line_methods import METHODS

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from models.transformers_cache import (  # noqa: E402
    LineARCache,
    cache_argument,
    line_ar_attention,
)
from tests.support.transformers_data import (  # noqa: E402
    BOI,
    BOS,
    MaskingOracle,
    padded,
    tiny_chameleon,
    tiny_janus,
)

GRID = (8, 6)
PROMPTS = [[BOS, 9, 8, BOI], [BOS, 5, 6, 7, 8, 11, BOI]]


def linear(budget: float = 3, **kwargs: object) -> LineARConfig:
    """Three of the lines, two anchors, one recent line."""
    return LineARConfig(**{"budget": budget, "anchors": 2, "recent": 1, **kwargs})


def draw(model, prompts, cache=None, seed=0, **kwargs):
    """The library's own image generation, codes (B, N)."""
    torch.manual_seed(seed)
    given = {} if cache is None else {cache_argument(model): cache}
    settings = {"do_sample": True, "guidance_scale": 5.0, "top_k": 0, **kwargs}
    return model.generate(**padded(prompts), generation_mode="image", **settings, **given)


def compressed(model, prompts, config, **kwargs):
    cache = LineARCache(config, GRID)
    with line_ar_attention(model):
        return draw(model, prompts, cache, **kwargs), cache


def foretold(model, prompts, config, **kwargs):
    condition = max(map(len, prompts))
    oracle = MaskingOracle(config.plan(GRID, condition), config.method)
    with oracle.serves(model):
        codes = draw(model, prompts, transformers.DynamicCache(), **kwargs)
    assert oracle.forgotten > 0
    return codes


@pytest.mark.parametrize("config", [None, LineARConfig(1), LineARConfig(8, method="rkv")])
def test_all_lines_give_the_codes_of_the_librarys_own_caches(config):
    model = tiny_janus()
    codes, cache = compressed(model, PROMPTS, config)
    assert torch.equal(codes, draw(model, PROMPTS))
    assert torch.equal(codes, draw(model, PROMPTS, transformers.DynamicCache()))
    assert cache.get_seq_length() == 7 + 47  # the last code is never fed


@pytest.mark.parametrize("budget", [2, 3, 1 / 2])
@pytest.mark.parametrize("method", METHODS)
def test_padded_prompts_with_guidance_draw_what_the_oracle_draws(method, budget):
    model, config = tiny_janus(), linear(budget, method=method)
    codes, _ = compressed(model, PROMPTS, config)
    assert torch.equal(codes, foretold(model, PROMPTS, config))
    assert not torch.equal(codes, draw(model, PROMPTS))


@pytest.mark.parametrize("method", METHODS)
def test_heads_that_share_keys_draw_what_the_oracle_draws(method):
    model, config = tiny_janus(kv_heads=2), linear(method=method)
    codes, cache = compressed(model, PROMPTS, config)
    assert cache.layers[0].kv.k.shape[1] == 2
    assert torch.equal(codes, foretold(model, PROMPTS, config))
    assert not torch.equal(codes, draw(model, PROMPTS))


@pytest.mark.parametrize("method", METHODS)
def test_a_padded_prompt_draws_what_it_draws_alone(method):
    model, config = tiny_janus(), linear(method=method)
    together, _ = compressed(model, PROMPTS, config, do_sample=False)
    alone, _ = compressed(model, PROMPTS[:1], config, do_sample=False)
    assert torch.equal(together[:1], alone)


def test_the_condition_is_a_number_where_the_prompt_is_shorter():
    """The last two tokens of the condition are fed one by one: they are pinned like the others."""
    model = tiny_chameleon().model
    ids = torch.randint(4, 68, (2, 5 + 48), generator=torch.Generator().manual_seed(0))

    def hidden(first: int, condition: int | None) -> torch.Tensor:
        cache = LineARCache(linear(), GRID, condition)
        parts = [ids[:, :first], *ids[:, first:].split(1, 1)]
        with line_ar_attention(model):
            steps = [
                model(input_ids=part, use_cache=True, **{cache_argument(model): cache})
                for part in parts
            ]
        return steps[-1].last_hidden_state[:, -1]

    torch.testing.assert_close(hidden(3, 5), hidden(5, None), rtol=1e-4, atol=1e-4)
    assert (hidden(3, None) - hidden(5, None)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_condition_and_budget_and_one_line(dtype):
    model = tiny_janus().to(dtype)
    _, cache = compressed(model, PROMPTS, linear())
    slots = 7 + 3 * 6 + 6
    rows, heads, width, layers = 4, 4, 16, 2
    assert cache.nbytes == layers * 2 * rows * heads * slots * width * dtype.itemsize
    assert [layer.kv.slots for layer in cache.layers] == [slots, slots]
    assert 0 < cache.workspace_nbytes < cache.nbytes


def test_attention_is_ours_inside_and_the_models_own_behind():
    model = tiny_janus()
    names = lambda: [  # noqa: E731
        part._attn_implementation
        for part in (model.config, model.config.text_config, model.config.vision_config)
    ]
    model.config.vision_config._attn_implementation = "eager"
    with line_ar_attention(model):
        assert set(names()) == {"line_ar"}
        inside = draw(model, PROMPTS, transformers.DynamicCache())
    assert names() == ["sdpa", "sdpa", "eager"]
    assert torch.equal(inside, draw(model, PROMPTS))
    with pytest.raises(KeyError), line_ar_attention(model):
        raise KeyError
    assert names() == ["sdpa", "sdpa", "eager"]


def test_a_reset_cache_serves_another_call():
    model = tiny_janus()
    codes, cache = compressed(model, PROMPTS, linear())
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    with line_ar_attention(model):
        assert torch.equal(draw(model, PROMPTS, cache), codes)


# ---- wrong use, one sentence each ----------------------------------------------------------------------


def test_a_cache_serves_one_image():
    model = tiny_janus()
    _, cache = compressed(model, PROMPTS, linear())
    message = r"7 tokens at once after 54.*make a new one"
    with line_ar_attention(model), pytest.raises(ValueError, match=message):
        draw(model, PROMPTS, cache)


def test_more_positions_than_the_grid_has_are_refused():
    model = tiny_chameleon().model
    cache = LineARCache(linear(2), (4, 2))
    token = torch.full((1, 1), 5)
    with line_ar_attention(model), pytest.raises(ValueError, match="seen all tokens of its grid"):
        for _ in range(1 + 10 + 1):
            model(input_ids=token, use_cache=True, **{cache_argument(model): cache})
    assert cache.get_seq_length() == 1 + 10  # a closing line is taken


@pytest.mark.parametrize("method", METHODS)
def test_the_condition_stays_when_the_last_line_is_complete(method):
    model = tiny_chameleon().model
    config = LineARConfig(2, anchors=1, recent=1, method=method)
    cache = LineARCache(config, (5, 4))
    with line_ar_attention(model):
        for ids in (torch.tensor([[5, 6, 7]]), *torch.full((20, 1, 1), 9)):
            model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
    for layer in cache.layers:
        kept = layer.kv.positions[:, :, : layer.kv.live]
        assert torch.equal((kept < 3).sum(-1), torch.full((1, 4), 3))


def test_attention_that_is_not_ours_is_refused():
    with pytest.raises(ValueError, match="inside `with line_ar_attention"):
        draw(tiny_janus(), PROMPTS, LineARCache(linear(), GRID))


def test_flash_attention_is_refused():
    model = tiny_janus()
    model.config.text_config._attn_implementation_internal = "flash_attention_2"
    message = "runs flash_attention_2: LineAR needs sdpa"
    with pytest.raises(ValueError, match=message), line_ar_attention(model):
        pass


def test_beam_search_is_refused():
    model = tiny_chameleon()
    cache = LineARCache(linear(), GRID)
    with line_ar_attention(model), pytest.raises(ValueError, match="beam search"):
        model.generate(
            **padded([[BOS, 5, 6]]), num_beams=2, max_new_tokens=4, do_sample=False,
            **{cache_argument(model): cache},
        )  # fmt: skip


def test_a_budget_that_does_not_fit_is_refused_before_anything_is_drawn():
    with pytest.raises(ValueError, match=r"12 tokens \(2 lines of 6\) is too small for 8 anchors"):
        LineARCache(LineARConfig(2, anchors=8, recent=1), GRID)


@pytest.mark.parametrize("grid", [(0, 6), (8.0, 6), (8, 6, 2)])
def test_a_grid_is_two_whole_numbers(grid):
    with pytest.raises(ValueError, match="it must be two whole numbers"):
        LineARCache(LineARConfig(), grid)
    with pytest.raises(ValueError, match="condition is -3"):
        LineARCache(LineARConfig(), (8, 6), condition=-3)


def test_a_prompt_longer_than_the_condition_is_refused():
    model, message = tiny_janus(), "7 tokens, more than the condition of 4"
    with line_ar_attention(model), pytest.raises(ValueError, match=message):
        draw(model, PROMPTS, LineARCache(linear(), GRID, condition=4))
