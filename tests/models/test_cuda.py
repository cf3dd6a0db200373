"""On a GPU: the same contract, compiled and recorded too. Run with `make test-gpu`."""

import copy
from dataclasses import replace

import pytest
import torch

from models.decoding import Decoding
from models.sampler import Sampler
from tests.support import NEEDS_GPU
from tests.support.golden_data import RECORDED, golden, golden_model, golden_noise, relative_error
from tests.support.sampling import CONFIGS, noise_of, small_mar

pytestmark = NEEDS_GPU
CONTROLS = {name: replace(CONFIGS["all"], token_selection=name) for name in ("random", "oldest")}
KINDS = {"mar": None, "lazymar": CONFIGS["all"], **CONTROLS}


@RECORDED
@pytest.mark.parametrize("graphs", [False, True], ids=["", "graphs"])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_sampled_latents_on_cuda_equal_the_recorded_ones(file, key, compiled, graphs):
    model = copy.deepcopy(golden_model()).to("cuda")
    sampler = Sampler(model, torch.float32, compile=compiled, graphs=graphs)
    noise, labels = golden_noise(file)
    for _ in range(3):  # as it is, recorded, replayed
        latents = sampler.sample_tokens(
            2, 64, 3.0, labels=labels, noise=noise, lazy_mar=key.startswith("lazy")
        )
        assert relative_error(latents.cpu(), golden(file)[key]) < 1e-3


@RECORDED
def test_bf16_on_cuda_stays_near_float32(file, key):
    model = copy.deepcopy(golden_model()).to("cuda")
    noise, labels = golden_noise(file)
    with torch.autocast("cuda", torch.bfloat16):
        latents = model.sample_tokens(
            2, 64, 3.0, labels=labels, noise=noise, lazy_mar=key.startswith("lazy")
        )
    assert 0 < relative_error(latents.cpu(), golden(file)[key]) < 0.2


@pytest.mark.parametrize("lazy_mar", KINDS.values(), ids=KINDS)
def test_replayed_batches_equal_fresh_ones(lazy_mar):
    model = small_mar().to("cuda")
    replayed, fresh = Sampler(model, torch.float32, graphs=True), Sampler(model, torch.float32)
    for seeds, labels in (((3, 4), (1, 2)), ((5, 6), (0, 1)), ((7, 8), (4, 4)), ((3, 4), (1, 2))):
        arguments = {"labels": labels, "noise": noise_of(model, seeds), "lazy_mar": lazy_mar}
        expected = fresh.sample_tokens(2, 12, 3.0, **arguments)
        assert relative_error(replayed.sample_tokens(2, 12, 3.0, **arguments), expected) < 1e-5


@pytest.mark.parametrize("lazy_mar", KINDS.values(), ids=KINDS)
def test_the_decoding_loop_never_waits_for_the_device(monkeypatch, lazy_mar):
    original = Decoding._decode

    def decode(self, noise, progress):
        torch.cuda.set_sync_debug_mode("error")
        try:
            original(self, noise, progress)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model = small_mar().to("cuda")
    arguments = {"labels": (1, 2), "noise": noise_of(model, (3, 4)), "lazy_mar": lazy_mar}
    sampler = Sampler(model, torch.float32)
    sampler.sample_tokens(2, 12, 3.0, **arguments)
    monkeypatch.setattr(Decoding, "_decode", decode)
    sampler.sample_tokens(2, 12, 3.0, **arguments)
