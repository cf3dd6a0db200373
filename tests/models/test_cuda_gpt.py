"""LlamaGen and LineAR on a GPU: the same contract. Run with `make test-gpu`."""

import copy

import pytest
import torch

from models.gpt_sampler import GPTDecoding, GPTSampler
from models.line_config import LineARConfig
from models.line_methods import METHODS
from tests.support import NEEDS_GPU
from tests.support.golden_data import golden
from tests.support.line_oracle import Oracle
from tests.support.llamagen_data import golden_gpt, random_codes, small_gpt

pytestmark = NEEDS_GPU
CACHES = {
    "full": None,
    **{m: LineARConfig(budget=3, anchors=2, recent=1, method=m) for m in METHODS},
}


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
    ours = copy.deepcopy(model).to("cuda")
    ours = ours.cached_logits(codes.to("cuda"), labels.to("cuda"), config)
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


@pytest.mark.parametrize("kind", CACHES)
def test_replayed_batches_equal_fresh_ones(kind):
    model = small_gpt((8, 8)).to("cuda")
    sampler = GPTSampler(model, graphs=True)
    for seeds, labels in (((3, 4), (1, 2)), ((5, 6), (0, 1)), ((7, 8), (4, 4)), ((3, 4), (1, 2))):
        arguments = {"cfg": 2.0, "seeds": seeds, "line_ar": CACHES[kind]}
        codes = sampler.sample_tokens(labels, **arguments)
        assert torch.equal(codes, model.sample_tokens(labels, **arguments))


@pytest.mark.parametrize("kind", ["full", "linear"])
def test_compiled_and_recorded_codes_are_those_of_the_plain_model(kind):
    model = small_gpt((8, 8)).to("cuda")
    sampler = GPTSampler(model, compile=True, graphs=True)
    arguments = {"cfg": 2.0, "greedy": True, "line_ar": CACHES[kind]}
    expected = model.sample_tokens((1, 2), **arguments)
    for _ in range(2):
        codes = sampler.sample_tokens((1, 2), **arguments)
        assert (codes == expected).double().mean() > 0.9  # fused kernels round differently


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("kind", CACHES)
def test_the_loop_never_waits_for_the_device(monkeypatch, kind, graphs):
    original = GPTDecoding._decode

    def decode(self, sampler):
        torch.cuda.set_sync_debug_mode("error")
        try:
            original(self, sampler)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model = small_gpt((8, 8)).to("cuda")
    sampler = GPTSampler(model, graphs=graphs)
    arguments = {"cfg": 2.0, "seeds": (3, 4), "line_ar": CACHES[kind], "top_k": 9, "top_p": 0.9}
    for _ in range(2):
        sampler.sample_tokens((1, 2), **arguments)  # the second one records what came once
    monkeypatch.setattr(GPTDecoding, "_decode", decode)
    sampler.sample_tokens((1, 2), **arguments)
