"""The count of operations equals what torch counts while the model samples."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import engine
from models import mar
from models.noise import ImageNoise

SMALL = {"img_size": 32, "buffer_size": 4, "diffloss_d": 2, "diffloss_w": 24}


@pytest.mark.parametrize(("cfg", "schedule"), [(1.0, "linear"), (3.0, "linear"), (3.0, "constant")])
def test_operations_of_an_image_are_those_that_torch_counts(cfg, schedule):
    torch.manual_seed(0)
    model = mar.mar_tiny(**SMALL, num_sampling_steps="7").eval()
    sampling = engine.SamplingConfig(5, cfg, schedule, 1.0, None)
    noise = ImageNoise.from_seeds([0, 1], model.seq_len, 7, model.token_dim)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.sample_tokens(2, 5, cfg, schedule, [0, 1], noise=noise)
    time_table = 7 * (2 * 256 * 24 + 2 * 24 * 24)  # once per call, not per image
    expected = (counter.get_total_flops() - time_table) / 2
    assert engine.flops_per_image(model, sampling) == pytest.approx(expected, rel=1e-3)


def test_guidance_and_size_cost_what_they_must():
    with torch.device("meta"):
        base = mar.mar_base(diffloss_d=6, diffloss_w=1024)
        huge = mar.mar_huge(diffloss_d=12, diffloss_w=1536)
    plain, guided = (engine.SamplingConfig(64, cfg, "constant", 1.0, None) for cfg in (1.0, 3.0))
    assert engine.flops_per_image(base, guided) == pytest.approx(
        2 * engine.flops_per_image(base, plain), rel=0.01
    )
    assert engine.flops_per_image(huge, plain) > 3 * engine.flops_per_image(base, plain)
