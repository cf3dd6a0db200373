"""Lazy steps that compute less: local ones, a frozen buffer, listed refreshes, late guidance."""

from dataclasses import replace

import pytest
import torch

from models.fast_mar import PRESETS, FastMARConfig
from models.flops import MARGeometry, image_work
from models.lazy_mar import LazyMARConfig, step_policies
from models.mar import mar_base, mar_huge, mar_large, mar_tiny
from models.plan import DecodingPlan
from tests.support.golden_data import relative_error
from tests.support.sampling import CLOSE, GEOMETRIES, sample, small_mar

PROBE = LazyMARConfig(warmup=2, interval=4, head_cache=False)
LOCAL = replace(PROBE, lazy_step="local")
FROZEN = replace(LOCAL, buffer_refresh=False)
KINDS = {
    "local": LOCAL,
    "local, frozen buffer": FROZEN,
    "probe, frozen buffer": replace(PROBE, buffer_refresh=False),
    "local, both branches": replace(LOCAL, condition_cache=False),
    "local from the first step": replace(FROZEN, warmup=0, interval=5),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("config", [LOCAL, FROZEN], ids=["buffer", "frozen buffer"])
def test_local_steps_stay_near_mar_in_every_geometry(geometry, config):
    model = small_mar(**GEOMETRIES[geometry])
    for cfg in (1.0, 2.5):
        plain = sample(model, num_iter=7, cfg=cfg)
        error = relative_error(sample(model, num_iter=7, cfg=cfg, lazy_mar=config), plain)
        assert error < 0.2  # other seeds differ by 1.3
        assert (error < 1e-3) == (geometry == "one token")  # which has no lazy step


@pytest.mark.parametrize("frozen", [False, True], ids=["buffer", "frozen buffer"])
def test_local_steps_of_a_single_decoder_layer_are_lazy_steps_that_keep_all(frozen):
    """There, keys and values of positions follow from the decoder's input, which local steps know."""
    model = small_mar(decoder_depth=1)
    probe, local = (
        replace(PROBE, buffer_refresh=not frozen),
        replace(LOCAL, buffer_refresh=not frozen),
    )
    expected = sample(model, lazy_mar=probe)
    assert relative_error(sample(model, lazy_mar=local), expected) < CLOSE
    deep = small_mar()
    assert relative_error(sample(deep, lazy_mar=local), sample(deep, lazy_mar=probe)) > 1e-5


def test_a_frozen_buffer_changes_the_image_unless_there_is_none():
    for lazy in (PROBE, LOCAL):
        frozen = replace(lazy, buffer_refresh=False)
        for size, same in ((6, False), (0, True)):
            model = small_mar(buffer_size=size)
            error = relative_error(sample(model, lazy_mar=frozen), sample(model, lazy_mar=lazy))
            assert (error == 0) == same


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_an_image_of_local_steps_depends_on_its_seed_alone(config):
    model = small_mar()
    alone = sample(model, seeds=[11], labels=[4], lazy_mar=config)
    crowd = sample(model, seeds=[1, 11, 3], labels=[0, 4, 2], lazy_mar=config)
    assert relative_error(crowd[1:2], alone) < 1e-4
    assert 1e-5 < relative_error(alone, sample(model, seeds=[11], labels=[4])) < 1.0


def test_listed_refreshes_replace_warmup_and_interval():
    listed = LazyMARConfig(
        refresh_steps=tuple(s / 64 for s in (0, 1, 2, 3, 4, 5, 14, 23, 32, 41, 50, 59))
    )
    for s in range(64):
        assert listed.is_refresh(s, 64) == LazyMARConfig().is_refresh(s, 64)
    assert [s for s in range(16) if listed.is_refresh(s, 16)] == [0, 1, 4, 6, 8, 10, 12, 15]
    late = LazyMARConfig(refresh_steps=(0, 63 / 64))
    assert [s for s in range(20) if late.is_refresh(s, 20)] == [
        0,
        19,
    ]  # not step 20, behind the last
    model = small_mar()
    same = replace(PROBE, refresh_steps=tuple(s / 12 for s in (0, 1, 2, 6, 10)))
    assert torch.equal(sample(model, lazy_mar=same), sample(model, lazy_mar=PROBE))


def test_the_first_guided_step_is_a_refresh():
    plan = DecodingPlan.create(256, 64, 3.0, guidance_start=0.3)
    policies = step_policies(LazyMARConfig(), plan, buffer_size=64)
    first = next(step.index for step in plan.steps if step.guided)
    assert first == 20
    assert policies[first].refresh
    assert not LazyMARConfig().is_refresh(first, 64)
    assert not policies[first - 1].refresh


def test_a_local_step_keeps_what_changes_alone():
    plan = DecodingPlan.create(256, 32, 3.0)
    for config, buffer in ((LOCAL, 64), (FROZEN, 0)):
        policies = step_policies(config, plan, buffer_size=64)
        for step in plan.steps:
            assert policies[step.index].kept == step.stop - step.previous + buffer


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("lazy_step", "near", "lazy_step is 'near'"),
        ("forecast_order", 2, "forecast_order is 2"),
        ("refresh_steps", (0.0, 1.0), r"refresh_steps are \(0.0, 1.0\)"),
    ],
)
def test_impossible_lazy_steps_are_named(field, value, named):
    with pytest.raises(ValueError, match=named):
        LazyMARConfig(**{field: value})


# ---- presets -----------------------------------------------------------------------------------------


MODELS = {
    "mar_base": lambda: mar_base(diffloss_d=6, diffloss_w=1024),
    "mar_large": lambda: mar_large(diffloss_d=8, diffloss_w=1280),
    "mar_huge": lambda: mar_huge(diffloss_d=12, diffloss_w=1536),
    "mar_tiny": mar_tiny,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("executed", [False, True], ids=["published", "executed"])
def test_fast_has_an_eighth_of_the_operations_and_balanced_a_fifth(name, executed):
    with torch.device("meta"):
        geometry = MARGeometry.from_model(MODELS[name]())

    def total(preset: FastMARConfig) -> float:
        head, order = preset.head, preset.order
        plan = DecodingPlan.create(
            256, preset.num_iter, 3.25, guidance_start=head.guidance_start, order=order
        )
        return image_work(geometry, plan, preset.lazy, executed, head).total

    plain = total(FastMARConfig.published())
    ratios = {name: plain / total(preset()) for name, preset in PRESETS.items()}
    assert ratios["fast"] >= 8
    assert 4.5 < ratios["balanced"] < 5.5
    assert 2.7 < ratios["lazymar"] < 3.4


def test_the_published_preset_is_plain_sampling():
    model = small_mar()
    arguments = {**FastMARConfig.published().arguments(), "num_iter": 6}
    assert torch.equal(sample(model, **arguments), sample(model, num_iter=6))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_samples(preset):
    model = small_mar(num_sampling_steps="ddim100", decoder_depth=2, encoder_depth=1)
    images = sample(model, **{**PRESETS[preset]().arguments(), "num_iter": 8})
    assert images.isfinite().all()
    assert relative_error(images, sample(model, num_iter=8)) > 1e-4
