"""The count of operations equals what torch counts in the modules, called without caches."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import engine
from models import mar
from models.plan import DecodingPlan

SMALL = {"img_size": 32, "buffer_size": 4, "diffloss_d": 2, "diffloss_w": 24}


def counted(call) -> int:
    """Operations of a call on tensors without contents, where fused attention is counted too."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(("cfg", "schedule"), [(1.0, "linear"), (3.0, "linear"), (3.0, "constant")])
def test_operations_of_an_image_are_those_that_torch_counts(cfg, schedule):
    with torch.device("meta"):
        model = mar.mar_tiny(**SMALL, num_sampling_steps="7").eval()
    net, channels, width = model.diffloss.net, model.token_dim, model.z_proj.out_features
    expected = 0
    for step in DecodingPlan.create(model.seq_len, 5, cfg, schedule).steps:
        rows, decoded = 1 if cfg == 1.0 else 2, step.stop - step.start

        def predict(step=step, rows=rows):
            order = torch.zeros(rows, model.seq_len, dtype=torch.long)
            known, label = torch.zeros(rows, step.start, channels), torch.zeros(rows, width)
            model.predict(known, order, step.stop, label)

        def denoise(count):
            net(torch.zeros(count, channels), torch.zeros(count), torch.zeros(count, width))

        expected += counted(predict)
        head_rows = decoded * (1 if step.cfg == 1.0 else 2)
        embedded = counted(lambda n=head_rows: net.time_embed(torch.zeros(n)))
        conditioned = counted(lambda n=head_rows: net.cond_embed(torch.zeros(n, width)))
        projected = counted(lambda n=decoded: net.input_proj(torch.zeros(n, channels)))
        twice = head_rows // decoded - 1  # both branches start from one projected token
        each = counted(lambda n=head_rows: denoise(n)) - embedded - conditioned - twice * projected
        expected += 7 * each + conditioned  # the condition is embedded once for all steps
    sampling = engine.SamplingConfig(5, cfg, schedule, 1.0, None)
    assert engine.flops_per_image(model, sampling) == pytest.approx(expected, rel=1e-9)


def test_guidance_and_size_cost_what_they_must():
    with torch.device("meta"):
        base = mar.mar_base(diffloss_d=6, diffloss_w=1024)
        huge = mar.mar_huge(diffloss_d=12, diffloss_w=1536)
    plain, guided = (engine.SamplingConfig(64, cfg, "constant", 1.0, None) for cfg in (1.0, 3.0))
    assert engine.flops_per_image(base, guided) == pytest.approx(
        2 * engine.flops_per_image(base, plain), rel=0.01
    )
    assert engine.flops_per_image(huge, plain) > 3 * engine.flops_per_image(base, plain)
