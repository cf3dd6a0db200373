"""How images are computed is decided once, does what the flag says, and is recorded as it is."""

import pytest
import torch

from engine import base, llamagen, mar
from engine.base import ComputeConfig, Execution, Loaded
from engine.mar import MarGenerator, SamplingConfig
from models.gpt_images import GPTSampling
from models.gpt_sampler import GPTSampler
from models.tokenizers import AutoencoderKL
from models.vq import vq_tiny
from tests.support.fake_cuda import fake_cuda
from tests.support.llamagen_data import small_gpt
from tests.support.sampling import small_mar

CUDA = torch.device("cuda", 0)


def generator_of(family, compute, monkeypatch, compiles):
    """That of a small model on a card where torch.compile works, or does not."""
    monkeypatch.setattr(base, "can_compile", lambda device, show: compiles)
    if family is mar:
        host = mar.MARHost(
            "mar_tiny", small_mar().config, mar.TokenizerConfig(), SamplingConfig(), "", False
        )
        loaded = Loaded(small_mar().to("cuda"), AutoencoderKL(4, ch_mult=(1, 1, 2)).to("cuda"), "")
    else:
        host = llamagen.LlamaGenHost("gpt_tiny", GPTSampling(), "", llamagen.GPTImageConfig())
        loaded = Loaded(small_gpt((4, 4)).to("cuda"), vq_tiny().to("cuda"), "")
    return host.generator(loaded, Execution(CUDA, torch.bfloat16, compute))


@pytest.mark.parametrize("family", [mar, llamagen])
@pytest.mark.parametrize(
    ("no_compile", "compiles", "fast"),
    [(False, True, True), (True, True, False), (False, False, False)],
    ids=["fast", "--no_compile", "torch.compile fails"],
)
def test_compile_and_cuda_graphs_go_together_and_are_recorded(
    monkeypatch, family, no_compile, compiles, fast
):
    with fake_cuda():
        compute = ComputeConfig(no_compile=no_compile)
        generator = generator_of(family, compute, monkeypatch, compiles)
    assert generator.execution == {"compile": fast, "cuda_graphs": fast}
    assert generator.sampler.graphs is fast
    if family is mar:
        assert generator.sampler.compile is fast
    else:
        assert ("project" in vars(generator.sampler.model.layers[0])) is fast


def test_a_generator_leaves_the_callers_tokenizer_as_it_is():
    vae = AutoencoderKL(4, ch_mult=(1, 1, 2)).eval()
    before = {name: p.stride() for name, p in vae.named_parameters()}
    args = (0.2325, SamplingConfig(), torch.device("cpu"), torch.float32)
    generator = MarGenerator(small_mar(), vae, *args)
    assert {name: p.stride() for name, p in vae.named_parameters()} == before
    changed = {name: p.stride() for name, p in generator.tokenizer.named_parameters()}
    assert changed != before  # its own copy is laid out for the processor


def test_the_copy_of_a_compiled_gpt_shares_its_weights_and_leaves_the_model_as_it_is():
    model = small_gpt((4, 4))
    copy = GPTSampler(model, compile=True).model
    assert copy is not model
    assert all(a is b for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    assert "project" not in vars(model.layers[0])
