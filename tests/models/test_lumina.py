"""Lumina-mGPT's loop over transformers' Chameleon: two caches, lines that end with a newline token."""

import pytest
import torch
from safetensors.torch import save_file

from models.line_config import LineARConfig
from models.line_methods import METHODS

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from models.lumina import ImageVocabulary, expand_norms, open_lumina, sample_tokens  # noqa: E402
from models.transformers_cache import cache_argument  # noqa: E402
from tests.support.transformers_data import BOS, MaskingOracle, padded, tiny_chameleon  # noqa: E402

GRID = (8, 4)
LINE_GRID = (8, 5)  # with the newline
PROMPTS = [[BOS, 9, 8], [BOS, 5, 6, 7, 8, 11, 30]]
SEEDS = [4, 9]
HEAD = [68, 70 + 4, 70 + 2]  # begin; sizes of 128 and 64 pixels
NEWLINE = 69


def config_of(budget: float = 3, **kwargs: object) -> LineARConfig:
    return LineARConfig(**{"budget": budget, "anchors": 2, "recent": 1, **kwargs})


def draw(model, prompts=PROMPTS, seeds=SEEDS, **kwargs):
    return sample_tokens(model, **padded(prompts), grid=GRID, seeds=seeds, **kwargs)


def sequence(codes: torch.Tensor) -> list[int]:
    """The tokens that an image of codes (N,) is made of: this vocabulary counts codes downwards."""
    tokens = list(HEAD)
    for line in codes.unflatten(0, GRID).tolist():
        tokens += [*(4 + 63 - code for code in line), NEWLINE]
    return tokens


def test_greedy_codes_are_the_most_likely_ones_of_the_whole_sequence():
    """Teacher forcing without any cache: guidance, newlines and the choice among image tokens alone."""
    model = tiny_chameleon()
    codes = draw(model, cfg=3.0, greedy=True, seeds=None)
    for image, prompt in zip(codes, PROMPTS, strict=True):
        tokens = sequence(image)
        logits = [
            model.lm_head(model.model(torch.tensor([ids])).last_hidden_state)[0, -len(tokens) :]
            for ids in (prompt + tokens, tokens)
        ]
        guided = logits[1] + 3.0 * (logits[0] - logits[1])
        best = 63 - guided[:, 4:68].argmax(-1)
        behind = [2 + 5 * line + i for line in range(8) for i in range(4)]  # what predicts a code
        assert torch.equal(best[behind], image)


@pytest.mark.parametrize("line_ar", [True, LineARConfig(1), LineARConfig(8, method="h2o")])
def test_all_lines_give_the_codes_of_the_librarys_own_cache(line_ar):
    if line_ar is True:
        line_ar = LineARConfig(method="none")
    model = tiny_chameleon()
    assert torch.equal(draw(model, line_ar=line_ar), draw(model))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("budget", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_compressed_branches_draw_what_their_oracles_draw(method, budget, kv_heads):
    """The branches have conditions of 10 and of 3 tokens, so each has an oracle of its own."""
    model, config = tiny_chameleon(kv_heads), config_of(budget, method=method)
    oracles = [MaskingOracle(config.plan(LINE_GRID, p), method) for p in (7 + 3, 3)]

    class Both:  # takes the branches in turns, as the loop does
        def __init__(self) -> None:
            self.calls = 0

        def attention(self, module, *args, **kwargs):
            branch = self.calls // 2 % 2  # two layers each
            self.calls += 1
            return oracles[branch].attention(module, *args, **kwargs)

        serves = MaskingOracle.serves

    codes = draw(model, line_ar=config)
    with Both().serves(model):
        assert torch.equal(codes, draw(model))
    assert all(oracle.forgotten > 0 for oracle in oracles)
    assert not torch.equal(codes, draw(model))


@pytest.mark.parametrize("line_ar", [None, config_of(), config_of(method="rkv")])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_an_image_is_the_same_alone_and_in_a_batch(line_ar, cfg):
    model = tiny_chameleon().double()  # rounding, which may differ, decides no draw
    many = draw(model, line_ar=line_ar, cfg=cfg)
    for i, prompt in enumerate(PROMPTS):
        one = draw(model, [prompt], SEEDS[i : i + 1], line_ar=line_ar, cfg=cfg)
        assert torch.equal(many[i : i + 1], one)


def test_without_guidance_there_is_one_branch(monkeypatch):
    model, calls = tiny_chameleon(), []
    forward = model.model.forward
    argument = cache_argument(model.model)

    def counted(*args, **kwargs):
        calls.append(id(kwargs[argument]))
        return forward(*args, **kwargs)

    counted.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(model.model, "forward", counted)
    draw(model, cfg=1.0)
    assert len(calls) == 4 * 8 + 7  # codes but the last, and the newlines between
    assert len(set(calls)) == 1


def test_the_vocabulary_is_found_by_name():
    vocabulary = ImageVocabulary.from_model(tiny_chameleon())
    assert (vocabulary.begin, vocabulary.newline, vocabulary.size) == (68, 69, 70)
    assert vocabulary.turn == 79
    assert vocabulary.codes[:3] == (67, 66, 65)
    assert vocabulary.head(GRID) == HEAD
    with pytest.raises(ValueError, match="8 x 5 codes; both must be even"):
        vocabulary.head((8, 5))
    model = tiny_chameleon()
    del model.config.vocabulary_map["<reserved08799>"]
    with pytest.raises(ValueError, match="no <reserved08799>: this is not a model of Lumina-mGPT"):
        draw(model)


def test_norms_of_a_shard_serve_all_its_heads(tmp_path):
    source, model = tiny_chameleon(), tiny_chameleon(seed=1)
    weights = {k: v for k, v in source.state_dict().items() if not k.startswith("model.vqmodel.")}
    for key in [k for k in weights if "_norm." in k]:
        shards = weights[key][:2].clone()  # two shards of two heads
        weights[key] = shards
        source.state_dict()[key].copy_(shards[[0, 0, 1, 1]])
    assert expand_norms(weights, model.config)[key].shape == (4, 16)
    model.config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    model = open_lumina(tmp_path)
    assert torch.equal(draw(model), draw(source))
    with pytest.raises(ValueError, match="1 tensors are missing.*lm_head.weight"):
        del weights["lm_head.weight"]
        save_file(weights, tmp_path / "model.safetensors")
        open_lumina(tmp_path)
