"""LlamaGen and LineAR on a GPU: the same contract. Run with `make test-gpu`."""

import copy

import pytest
import torch

from models.line_cache import LineARConfig
from tests.support.golden_data import golden
from tests.support.line_oracle import Oracle
from tests.support.llamagen_data import golden_gpt, random_codes, small_gpt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("cfg", [1, 2])
def test_greedy_codes_on_cuda_equal_the_recorded_ones(cfg):
    data, model = golden("llamagen.npz"), copy.deepcopy(golden_gpt()).to("cuda")
    tokens = model.sample_tokens(data["labels"], cfg=float(cfg), greedy=True)
    assert (tokens.cpu() == data[f"greedy_cfg{cfg}"]).double().mean() > 0.95


def test_a_compressed_cache_on_cuda_gives_the_logits_of_the_oracle():
    model, labels = small_gpt((6, 7)), torch.tensor([0, 4, 2])
    codes = random_codes(model, 3)
    oracle = Oracle(model, 3, budget=21, anchors=2, recent=7)
    config = LineARConfig(budget=3, anchors=2, recent=1)
    ours = (
        copy.deepcopy(model).to("cuda").cached_logits(codes.to("cuda"), labels.to("cuda"), config)
    )
    torch.testing.assert_close(ours.cpu(), oracle.logits(codes, labels), rtol=1e-3, atol=1e-3)


def test_the_cache_on_cuda_takes_what_theory_says_and_no_more():
    model = small_gpt((16, 16), dim=256, n_head=4).to("cuda", torch.bfloat16)
    labels, config = torch.zeros(64, dtype=torch.long), LineARConfig(budget=1 / 4)
    peaks = []
    for line_ar in (None, config):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.sample_tokens(labels, cfg=2.0, seeds=range(64), line_ar=line_ar)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert torch.cuda.memory_allocated() <= before + 2**20
    assert peaks[1] < 0.7 * peaks[0]
