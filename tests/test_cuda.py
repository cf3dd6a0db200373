"""On a GPU: the same contract. Run with `make test-gpu`."""

import copy

import pytest
import torch

from tests.golden_data import golden, golden_model, golden_noise, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("file", "key"),
    [("mar.npz", "mar_T64_cfg3_linear"), ("lazymar.npz", "lazy_T64_cfg3_linear")],
    ids=["mar", "lazymar"],
)
def test_sampled_latents_on_cuda_equal_the_recorded_ones(file, key):
    model = copy.deepcopy(golden_model()).to("cuda")
    noise, labels = golden_noise(file)
    latents = model.sample_tokens(
        2, 64, 3.0, labels=labels, noise=noise, lazy_mar=key.startswith("lazy")
    )
    assert relative_error(latents.cpu(), golden(file)[key]) < 1e-3
