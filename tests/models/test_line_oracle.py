"""A compressed run equals, token by token, a slow oracle that masks what was evicted."""

import numpy as np
import pytest
import torch

from models.line_cache import LineARConfig, make_cache
from models.line_methods import METHODS
from tests.support.line_oracle import Oracle
from tests.support.llamagen_data import golden_gpt, random_codes, small_gpt

GRIDS = [(8, 8), (6, 4), (6, 7), (9, 3)]
CASES = [(method, seed) for method in METHODS for seed in range(4)]


def oracle_of(model, rows, config):
    """The oracle with the counts of `config`; the methods' protected tokens are tested elsewhere."""
    plan = config.plan(model.grid)
    return Oracle(model, rows, plan.budget, plan.anchors, plan.recent, config.method, plan.spaced)


def random_case(method, seed):
    """A model, a batch and a configuration that evicts, all of random sizes."""
    random = np.random.RandomState(seed)
    while True:
        lines, line, layers, heads, rows = (int(n) for n in random.randint(1, [8, 9, 3, 4, 4]))
        budget, anchors, recent = (int(n) for n in random.randint([2, 0, 1], [6, 12, 3]))
        config = LineARConfig(budget, anchors, recent, method)
        try:
            plan = config.plan((lines, line))
        except ValueError:
            continue
        if lines >= budget + 2 and plan.anchors + plan.recent < plan.budget:
            break
    width = 4 * int(random.randint(1, 4))
    model = small_gpt((lines, line), dim=heads * width, n_layer=layers, n_head=heads)
    labels = torch.from_numpy(random.randint(0, model.num_classes, rows))
    return model, labels, config


@pytest.mark.parametrize("grid", GRIDS)
def test_logits_equal_those_of_the_oracle(grid):
    model, labels = small_gpt(grid), torch.tensor([0, 4, 2])
    codes, config = random_codes(model, 3), LineARConfig(budget=3, anchors=2, recent=1)
    oracle = oracle_of(model, 3, config)
    torch.testing.assert_close(
        model.cached_logits(codes, labels, config),
        oracle.logits(codes, labels),
        rtol=1e-4,
        atol=1e-4,
    )
    assert any(len(alive) < oracle.count - 1 for alive in oracle.alive[0][0])


@pytest.mark.parametrize(("method", "seed"), CASES)
def test_any_geometry_method_and_batch_holds_what_the_oracle_holds(method, seed):
    model, labels, config = random_case(method, seed)
    codes, line = random_codes(model, len(labels), seed), model.grid[1]
    oracle = oracle_of(model, len(labels), config)
    wanted = oracle.logits(codes, labels)
    cache = make_cache(config, model.grid, len(model.layers))
    x = torch.cat([model.cls_embedding(labels), model.tok_embeddings(codes)], dim=1)
    for i in range(x.shape[1]):
        logits = model.decode(x[:, i : i + 1], oracle.rope[i : i + 1], cache)
        torch.testing.assert_close(logits, wanted[:, i], rtol=1e-3, atol=1e-3)
        if i and i % line == 0:
            for layer, rows in enumerate(oracle.history[i // line - 1]):
                for row, heads in enumerate(rows):
                    for head, alive in enumerate(heads):
                        held = cache.layers[layer].positions[row, head, : cache.live].tolist()
                        assert sorted(held) == [0, *(1 + token for token in sorted(alive))]
    assert cache.live < cache.layers[0].count


@pytest.mark.parametrize("method", METHODS)
def test_greedy_codes_with_guidance_equal_those_of_the_oracle(method):
    model, labels = small_gpt((7, 5), n_head=4), torch.tensor([1, 3])
    config = LineARConfig(budget=3, anchors=3, recent=1, method=method)
    tokens = model.sample_tokens(labels, cfg=2.0, greedy=True, line_ar=config)
    assert torch.equal(tokens, oracle_of(model, 4, config).greedy(labels, cfg=2.0))
    assert not torch.equal(tokens, model.sample_tokens(labels, cfg=2.0, greedy=True))


def test_greedy_codes_of_the_golden_model_equal_those_of_the_oracle():
    model, labels = golden_gpt(), torch.tensor([8, 9])
    config = LineARConfig(budget=1 / 2, anchors=5, recent=2)
    tokens = model.sample_tokens(labels, cfg=2.0, greedy=True, line_ar=config)
    assert torch.equal(tokens, oracle_of(model, 4, config).greedy(labels, cfg=2.0))
    assert not torch.equal(tokens, model.sample_tokens(labels, cfg=2.0, greedy=True))


@pytest.mark.parametrize("method", ["linear", "snapkv", "h2o_last"])
def test_of_tokens_with_the_same_score_the_oldest_is_evicted(method):
    model, labels = small_gpt((9, 2)), torch.tensor([0, 3])
    for layer in model.layers:
        layer.attention.wqkv.weight[: 2 * model.n_head * model.head_dim].zero_()  # queries, keys
    config = LineARConfig(budget=4, anchors=1, recent=1, method=method)
    oracle = oracle_of(model, 2, config)
    codes = random_codes(model, 2)
    logits = model.cached_logits(codes, labels, config)
    torch.testing.assert_close(logits, oracle.logits(codes, labels), rtol=1e-4, atol=1e-4)
