"""LazyMAR's schedules are the published ones, and its caches are exactly as large as what they hold."""

import math

import pytest
import torch

from models.lazy_mar import LazyMARConfig, step_policies
from models.lazy_predictor import LazyPredictor
from models.plan import DecodingPlan
from tests.support.sampling import noise_of, small_mar

PUBLISHED_KEEP = [1.0] * 20 + [0.6] + [0.5] * 4 + [0.4] * 5 + [0.15] * 5 + [0.12] * 5 + [0.05] * 24


def test_the_keep_schedule_at_64_steps_is_the_published_table():
    config = LazyMARConfig()
    assert [config.keep_ratio(s, 64) for s in range(64)] == PUBLISHED_KEEP


@pytest.mark.parametrize("num_iter", [16, 32, 128, 256])
def test_the_keep_schedule_stretches_with_the_number_of_steps(num_iter):
    config = LazyMARConfig()
    for s in range(num_iter):
        assert config.keep_ratio(s, num_iter) == PUBLISHED_KEEP[s * 64 // num_iter]


def test_refresh_steps_at_64_steps_are_the_published_twelve():
    refreshes = [s for s in range(64) if LazyMARConfig().is_refresh(s, 64)]
    assert refreshes == [0, 1, 2, 3, 4, 5, 14, 23, 32, 41, 50, 59]


def test_full_denoising_steps_are_the_published_sixteen():
    config = LazyMARConfig()
    full = [i for i in reversed(range(100)) if config.is_full(i, 100)]
    assert full == [99, 98, *range(91, -1, -7)]
    assert len(full) == 16
    assert [i for i in range(100) if config.is_warm(i, 100)] == list(range(91, 100))


def test_kept_positions_follow_the_table_and_its_floor():
    plan = DecodingPlan.create(256, 64)
    policies = step_policies(LazyMARConfig(), plan, buffer_size=64)
    for step in plan.steps:
        floor = step.stop - step.previous + 15
        expected = max(floor, math.floor(320 * PUBLISHED_KEEP[step.index]))
        assert policies[step.index].kept == min(320, expected)


def test_a_refresh_fills_its_caches_only_if_a_lazy_step_follows():
    plan = DecodingPlan.create(256, 64)
    policies = step_policies(LazyMARConfig(), plan, buffer_size=64)
    filling = [s for s, policy in policies.items() if policy.refresh and policy.fills]
    assert sorted(filling) == [5, 14, 23, 32, 41, 50, 59]
    starts = {step.index: step.start for step in plan.steps}
    assert policies[14].residual_stop == starts[23]


def test_caches_are_as_large_as_what_they_hold():
    model = small_mar(num_sampling_steps="ddim5")
    plan = DecodingPlan.create(model.seq_len, 12, 3.0)
    config = LazyMARConfig(warmup=2, interval=4)
    noise = noise_of(model, [1, 2])
    embedding = torch.cat([model.class_emb(torch.tensor([0, 1])), model.class_embedding(None, 2)])
    predictor = LazyPredictor(model, noise.orders.flip(1).repeat(2, 1), embedding, plan, config)
    tokens = torch.zeros(2, model.seq_len, model.token_dim)
    with torch.no_grad():
        for step in plan.steps:
            predictor(step, tokens)
    rows, width, total = 2, 32, model.seq_len + model.buffer_size  # conditional rows only
    policies = step_policies(config, plan, model.buffer_size)
    lazy = [step for step in plan.steps if not policies[step.index].refresh]
    encoder = 3 * 2 * rows * (model.buffer_size + lazy[-1].start) * width
    decoder = 1 * 2 * rows * total * width  # one layer behind the probe, keys and values
    probe, decoder_input = rows * total * width, rows * total * width
    last_fill = [s for s in plan.steps if policies[s.index].refresh and policies[s.index].fills][-1]
    residual = rows * (policies[last_fill.index].residual_stop - last_fill.start) * width
    assert predictor.nbytes == 4 * (encoder + decoder + probe + decoder_input + residual)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("interval", 0, "interval is 0"),
        ("warmup", -1, "warmup is -1"),
        ("probe_layer", 1.5, "probe_layer is 1.5"),
        ("keep", ((0.5, 1.0),), "ascend from 0"),
        ("keep", ((0.0, 1.0), (0.5, 0.0)), "ratios"),
        ("keep", (), "ascend from 0"),
        ("keep", ((0.0, 1.0), (math.nan, 0.5)), "ascend from 0"),
        ("head_skip", (1.5,), "give the numbers of head blocks"),
        ("head_skip", (-1,), "count from 0"),
        ("head_warm", 1.5, "head_warm is 1.5"),
        ("head_interval", 0, "head_interval is 0"),
    ],
)
def test_impossible_constants_are_named(field, value, named):
    with pytest.raises(ValueError, match=named):
        LazyMARConfig(**{field: value})
