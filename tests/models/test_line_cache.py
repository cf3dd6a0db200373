"""LineAR forgets what it says it forgets, for every sequence by itself, and nothing else changes."""

import pytest
import torch

from models.line_cache import LineARConfig, LineLayer, make_cache
from models.line_methods import METHODS, LineView
from models.line_plan import LinePlan
from models.llamagen import gpt_xl
from tests.support.llamagen_data import random_codes, small_gpt


def linear(**kwargs: object) -> LineARConfig:
    """Three of the lines, two anchors, one recent line."""
    return LineARConfig(**{"budget": 3, "anchors": 2, "recent": 1, **kwargs})


def run_cache(config, grid, layers=2, shape=(3, 2, 2, 1, 8)):
    """Random queries, keys and values through a cache; yields it whenever a line is complete."""
    generator = torch.Generator().manual_seed(0)
    cache = make_cache(config, grid, layers)
    for position in range(grid[0] * grid[1]):
        for layer in range(layers):
            keys, values = cache.update(layer, *torch.randn(shape, generator=generator))
            assert keys.data_ptr() == cache.layers[layer].k.data_ptr()  # a view: nothing is copied
            assert keys.shape[2] == values.shape[2] == cache.live + 1
        cache.advance()
        if position and position % grid[1] == 0:
            yield cache


@pytest.mark.parametrize("budget", [1, 1.0, 8, 100, 0.95])
def test_a_budget_of_all_lines_gives_the_codes_of_the_full_cache(budget):
    model, labels = small_gpt((8, 8)), torch.tensor([0, 3])
    full = model.sample_tokens(labels, cfg=2.0, seeds=[1, 2])
    config = LineARConfig(budget=budget)
    compressed = model.sample_tokens(labels, cfg=2.0, seeds=[1, 2], line_ar=config)
    assert torch.equal(compressed, full)
    cache = make_cache(LineARConfig(budget=budget), (8, 8), 1)
    assert not isinstance(cache.layers[0], LineLayer)


@pytest.mark.parametrize("method", METHODS)
def test_a_small_budget_gives_other_codes(method):
    model, labels = small_gpt((8, 8)), torch.tensor([0, 3])
    full = model.sample_tokens(labels, cfg=2.0, seeds=[1, 2])
    config = linear(budget=2, method=method)
    assert not torch.equal(model.sample_tokens(labels, 2.0, seeds=[1, 2], line_ar=config), full)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_sequence_forgets_does_not_depend_on_the_others(method):
    config = linear(method=method)
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(24, 3, 4, 2, 1, 8, generator=generator)
    many, one = make_cache(config, (6, 4), 1), make_cache(config, (6, 4), 1)
    for step in steps:
        many.update(0, *step)
        one.update(0, *step[:, 2:3])
        many.advance()
        one.advance()
    assert torch.equal(many.layers[0].positions[2:3], one.layers[0].positions)
    assert (
        not torch.equal(many.layers[0].positions[:1], one.layers[0].positions)
        or method == "streaming"
    )


def test_one_branch_does_not_depend_on_the_other():
    model, labels = small_gpt((8, 8)), torch.tensor([1, 1])
    changed = torch.tensor([1, 4])
    codes = random_codes(model, 2)
    first = model.cached_logits(codes, labels, linear())
    other = model.cached_logits(codes, changed, linear())
    torch.testing.assert_close(first[0], other[0], rtol=1e-5, atol=1e-5)
    assert (first[1] - other[1]).abs().max() > 1e-3


def test_an_image_is_the_same_alone_and_in_a_batch():
    model = small_gpt((8, 8))
    labels, seeds = torch.tensor([1, 0, 3]), [5, 6, 7]
    many = model.sample_tokens(labels, cfg=2.0, seeds=seeds, line_ar=linear())
    one = model.sample_tokens(labels[1:2], cfg=2.0, seeds=seeds[1:2], line_ar=linear())
    assert torch.equal(many[1:2], one)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_condition_and_budget_and_one_line_in_the_models_dtype(method, dtype):
    rows, heads, width, layers = 4, 2, 16, 2
    model = small_gpt((8, 8)).to(dtype)
    cache = make_cache(linear(method=method), (8, 8), layers)
    x = model.cls_embedding(torch.zeros(rows, dtype=torch.long))
    rope = torch.zeros(1, width // 2, 2)
    for _ in range(8 * 6):
        model.decode(x, rope, cache)
    assert cache.slots == 1 + 3 * 8 + 8
    assert cache.nbytes == layers * 2 * rows * heads * cache.slots * width * dtype.itemsize
    assert cache.live <= cache.slots
    assert (cache.workspace_nbytes > 0) == (method != "none")


def test_memory_of_the_published_setting_is_the_published_one():
    """LlamaGen-XL at 24x24: 121 of 577 slots at 1/6, 169 at 1/4."""
    assert LineARConfig(1 / 6).plan((24, 24)).slots == 121
    assert LineARConfig(1 / 4).plan((24, 24)).slots == 169
    assert LineARConfig(1).plan((24, 24)).slots == 576  # the last token is never fed


@pytest.mark.parametrize(
    ("budget", "gb", "besides"), [(1, 54.36, 0), (1 / 4, 15.95, 0.0788), (1 / 6, 11.42, 0.1070)]
)
def test_bytes_of_gpt_xl_at_batch_256_are_those_of_the_manual(budget, gb, besides):
    """Sixteen bits, both branches; the queries of a line are what LineAR holds besides."""
    with torch.device("meta"):
        model = gpt_xl(block_size=24 * 24).to(torch.bfloat16)
    cache = make_cache(LineARConfig(budget), model.grid, len(model.layers))
    x = torch.empty(512, 1, 1280, dtype=torch.bfloat16, device="meta")
    model.decode(x, model.rope()[:1], cache)
    assert cache.nbytes == 512 * cache.slots * 2 * 1280 * 2 * 36
    assert cache.nbytes / 1e9 == pytest.approx(gb, abs=0.01)
    assert cache.workspace_nbytes / cache.nbytes == pytest.approx(besides, abs=1e-3)


@pytest.mark.parametrize(("grid", "size"), [((24, 24), 2), ((200, 200), 4)])
def test_a_position_takes_two_bytes_where_that_is_enough(grid, size):
    cache = make_cache(linear(method="streaming"), grid, 1)
    cache.update(0, *torch.zeros(3, 1, 1, 1, 4))
    assert cache.workspace_nbytes == size * cache.slots
    assert cache.layers[0].positions.max() == cache.slots - 1


def test_a_position_beyond_the_buffer_is_refused():
    cache = make_cache(None, (2, 3), 1)
    for _ in range(6):
        cache.update(0, *torch.zeros(3, 1, 1, 1, 4))
        cache.advance()
    with pytest.raises(ValueError, match="the cache is full: it has 6 slots"):
        cache.update(0, *torch.zeros(3, 1, 1, 1, 4))


def test_buffers_are_neither_moved_nor_resized():
    seen = set()
    for cache in run_cache(linear(), grid=(9, 4)):
        layer = cache.layers[0]
        seen.add((layer.k.data_ptr(), layer.k.shape, layer.positions.data_ptr()))
        assert cache.live <= 1 + 12
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("budget", "lines", "kept"),
    [(1 / 6, 24, 4), (1 / 4, 24, 6), (1 / 8, 24, 3), (1 / 6, 16, 3), (1 / 2, 5, 3), (0.01, 16, 1)]
    + [(2, 16, 2), (16, 16, 16), (99, 16, 16), (1, 16, 16)],
)
def test_a_share_becomes_the_nearest_number_of_whole_lines(budget, lines, kept):
    config = LineARConfig(budget=budget, anchors=0, recent=1)
    assert config.plan((lines, 7)).budget == kept * 7


def test_a_budget_that_does_not_fit_is_refused_with_its_three_numbers():
    model = small_gpt((8, 8))
    message = r"32 tokens \(2 lines of 16\) is too small for 8 anchors and 32 recent"
    with pytest.raises(ValueError, match=message):
        LineARConfig(budget=1 / 8).plan((16, 16))
    with pytest.raises(ValueError, match="raise the budget"):
        model.sample_tokens(torch.tensor([0]), line_ar=LineARConfig(budget=2))
    assert LineARConfig(budget=1 / 8, recent=1).plan((16, 16)).budget == 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"budget": -2}, "budget is -2"),
        ({"budget": 2.5}, "budget is 2.5"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"budget": float("inf")}, "budget is inf"),
        ({"budget": "1/6"}, "budget is '1/6'"),
        ({"budget": True}, "budget is True"),
        ({"anchors": -1}, "anchors is -1"),
        ({"recent": 0}, "recent is 0"),
        ({"method": "magic"}, "'magic'; use one of none, linear, streaming"),
        ({"pooling": "sum"}, "pooling is 'sum'"),
        ({"spaced": -1}, "spaced is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LineARConfig(**fields)


def test_only_a_config_a_bool_or_none_is_taken():
    assert LineARConfig.from_argument(True) == LineARConfig()
    assert LineARConfig.from_argument(None).method == "none"
    with pytest.raises(ValueError, match="line_ar is 0.5"):
        make_cache(0.5, (8, 8), 1)


def view(pooling: str = "mean") -> LineView:
    generator = torch.Generator().manual_seed(3)
    queries, keys = torch.randn(2, 1, 1, 6, 8, generator=generator)
    keys = torch.cat([keys, keys[:, :, :1]], dim=2)  # the last token repeats the first
    positions = torch.tensor([[[4, 0, 2, 6, 1, 3, 5]]])
    return LineView(queries, keys, positions, pooling, LinePlan(6, 1, 6, 0, 6))


def test_pooling_says_which_query_counts():
    attention = view().attention()
    torch.testing.assert_close(attention.sum(-1), torch.ones(1, 1, 6))
    torch.testing.assert_close(view("mean").pooled(), attention.mean(2))
    torch.testing.assert_close(view("max").pooled(), attention.amax(2))
    torch.testing.assert_close(view("last").pooled(), attention[:, :, -1])


def test_snapkv_smooths_over_neighbours_in_the_sequence_not_in_the_buffer():
    one = view()
    place = {position: slot for slot, position in enumerate(one.positions[0, 0].tolist())}
    plain, smooth = one.attention().mean(2)[0, 0], METHODS["snapkv"].score(one)[0, 0]
    want = sum(plain[place[p]] for p in (1, 2, 3, 4, 5)) / 5
    torch.testing.assert_close(smooth[place[3]], want)


def test_rkv_scores_a_repeated_key_lower():
    one = view()
    directions = torch.nn.functional.normalize(one.keys[0, 0], dim=-1)
    similarity = directions @ directions.T
    similarity.fill_diagonal_(0)
    attention = one.attention().mean(2)[0, 0]
    want = 0.07 * attention - 0.93 * similarity.mean(1).softmax(0)
    torch.testing.assert_close(METHODS["rkv"].score(one)[0, 0], want)


def test_a_config_of_method_none_is_the_full_cache():
    cache = make_cache(LineARConfig(budget=2, method="none"), (8, 8), 1)
    assert not isinstance(cache.layers[0], LineLayer)
    assert cache.slots == 64


@pytest.mark.parametrize(
    ("line", "spaced", "columns"), [(16, 2, {4, 11}), (5, 1, {2}), (4, 3, {1, 2, 3})]
)
def test_stratified_always_keeps_evenly_spaced_tokens_of_every_line(line, spaced, columns):
    config = linear(budget=7, method="stratified", spaced=spaced)
    assert config.plan((8, line)).spaced == spaced
    for cache in run_cache(config, grid=(8, line)):
        lines = (cache.layers[0].count - 1) // line
        kept = {1 + row * line + column for row in range(lines) for column in columns}
        for layer in cache.layers:
            for held in layer.positions[:, :, : cache.live].flatten(0, 1).tolist():
                assert kept <= set(held)


def test_stratified_keeps_fewer_of_a_line_where_the_budget_does_not_hold_more():
    for budget, spaced in ((1 / 2, 3), (1 / 4, 3), (1 / 6, 2), (1 / 8, 1)):
        # 112, 48, 32, 16 slots for 14 older lines
        config = LineARConfig(budget, anchors=0, recent=1, method="stratified", spaced=3)
        assert config.plan((16, 16)).spaced == spaced
    assert LineARConfig(1 / 4, recent=1).plan((16, 16)).spaced == 0
