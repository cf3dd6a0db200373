"""LlamaGen's text-to-image GPT: the caption in front of the image, padded on the left, and its cache."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from models import llamagen
from models.line_config import LineARConfig
from models.line_methods import METHODS
from models.llamagen import GPT
from models.llamagen_text import sample_tokens

pytest.importorskip("transformers", reason="the oracle is that of transformers' models")
from tests.support.transformers_data import MaskingOracle

GRID, TOKENS, CHANNELS = (6, 5), 7, 12
SEEDS = [4, 9]
MASK = torch.tensor([[False] * 4 + [True] * 3, [True] * 7])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    gpt = GPT(64, 2, 4, 30, vocab_size=40, cls_token_num=TOKENS, caption_dim=CHANNELS, grid=GRID)
    for parameter in gpt.parameters():  # sharp attention and clear codes, whatever the rounding
        if parameter.dim() == 2:
            parameter.data = torch.randn_like(parameter) * 1.5 * parameter.shape[1] ** -0.5
    gpt.tok_embeddings.weight.data.normal_()
    return gpt.eval().requires_grad_(False)


def captions(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed))


def keep_all(model, inputs, mask, cfg: float, config: LineARConfig | None) -> torch.Tensor:
    """Greedy codes with a cache that keeps all keys, whose attention an oracle computes."""
    nothing = model.cls_embedding.uncond_embedding.expand_as(inputs)
    x = model.cls_embedding(torch.cat([inputs * mask[..., None], nothing]))
    plan = (config or LineARConfig(method="none")).plan(GRID, TOKENS)
    oracle = MaskingOracle(plan, config.method if config else "linear")
    rope, past, codes, at = model.rope(), [None] * len(model.layers), [], 0
    sees = torch.cat([mask, mask])[:, None, None]
    for _ in range(model.block_size):
        for i, block in enumerate(model.layers):
            q, k, v = block.project(x, rope[at : at + x.shape[1]])
            if past[i] is not None:
                k, v = (torch.cat(pair, dim=2) for pair in zip(past[i], (k, v), strict=True))
            past[i] = k, v
            out, _ = oracle.attention(SimpleNamespace(layer_idx=i), q, k, v, sees)
            x = block.finish(x, out.transpose(1, 2))
        at += x.shape[1]
        c, u = model.output(model.norm(x[:, -1])).chunk(2)
        codes.append((u + cfg * (c - u)).argmax(-1))
        x = model.tok_embeddings(codes[-1]).repeat(2, 1)[:, None]
    assert config is None or oracle.forgotten > 0
    return torch.stack(codes, dim=1)


@pytest.mark.parametrize("line_ar", [None, True, LineARConfig(6)])
def test_all_lines_draw_what_a_cache_of_all_keys_draws(model, line_ar):
    line_ar = LineARConfig(method="none") if line_ar is True else line_ar
    codes = sample_tokens(model, captions(), MASK, cfg=3.0, greedy=True, line_ar=line_ar)
    assert torch.equal(codes, keep_all(model, captions(), MASK, 3.0, None))


@pytest.mark.parametrize("budget", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_compressed_codes_are_those_of_the_oracle(model, method, budget):
    config = LineARConfig(budget, anchors=2, recent=1, method=method)
    codes = sample_tokens(model, captions(), MASK, cfg=3.0, greedy=True, line_ar=config)
    assert torch.equal(codes, keep_all(model, captions(), MASK, 3.0, config))


def test_teacher_forcing_without_a_mask_gives_the_same_codes(model):
    whole = torch.ones_like(MASK)
    codes = sample_tokens(model, captions(), whole, cfg=1.0, greedy=True)
    logits = model(codes[:, :-1], captions())[:, TOKENS - 1 :]
    assert torch.equal(logits.argmax(-1), codes)


@pytest.mark.parametrize("line_ar", [None, LineARConfig(2, anchors=2, recent=1, method="rkv")])
def test_an_image_depends_on_its_caption_and_seed_alone(model, line_ar):
    exact = deepcopy(model).double()
    draw = lambda given, mask, seeds: sample_tokens(  # noqa: E731
        exact, given.double(), mask, top_k=0, line_ar=line_ar, seeds=seeds
    )
    many = draw(captions(), MASK, SEEDS)
    assert torch.equal(many[:1], draw(captions()[:1], MASK[:1], SEEDS[:1]))
    padding = torch.where(MASK[..., None], captions(), captions(seed=8))  # nobody sees it
    assert torch.equal(many, draw(padding, MASK, SEEDS))
    assert not torch.equal(many[0], draw(captions(seed=8), MASK, SEEDS)[0])
    assert not torch.equal(many[0], draw(captions(), MASK, [5, 9])[0])


def test_the_published_model_has_these_tensors():
    with torch.device("meta"):
        model = llamagen.gpt_xl_t2i(block_size=256)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if "cls" in k}
    assert shapes == {
        "cls_embedding.cap_proj.fc1.weight": (1280, 2048),
        "cls_embedding.cap_proj.fc2.weight": (1280, 1280),
        "cls_embedding.uncond_embedding": (120, 2048),
    }
    assert model.rope().shape == (120 + 256, 32, 2)


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match=r"captions are \(2, 6, 12\).*needs \(B, 7, 12\)"):
        sample_tokens(model, captions()[:, :6], MASK)
    with pytest.raises(ValueError, match="draws classes, not captions"):
        sample_tokens(GPT(64, 1, 4, 4), captions(), MASK)
