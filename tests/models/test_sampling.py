"""Claims about sampling: seeds name images, and LazyMAR differs from MAR exactly where it may."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock

from models.layers import Block
from models.lazy_mar import LazyMARConfig
from models.mar import MAR
from models.noise import ImageNoise
from tests.support.golden_data import relative_error
from tests.support.sampling import CLOSE, CONFIGS, GEOMETRIES, sample, small_mar

ONLY_REFRESH = LazyMARConfig(interval=1, head_cache=False)
KINDS = {**CONFIGS, "from the first step": LazyMARConfig(warmup=0, interval=5)}
# A class has no place without a buffer, and one token is decoded in one step.
NOTHING_TO_REUSE = {("no buffer", "condition"), ("one token", "token"), ("one token", "condition")}


@cache
def plain_of(geometry: str) -> tuple[MAR, torch.Tensor]:
    """A model and two images of it, sampled without caches."""
    model = small_mar(**GEOMETRIES[geometry])
    return model, sample(model)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_lazymar_that_always_refreshes_equals_mar(geometry, cfg):
    model, plain = plain_of(geometry)
    plain = plain if cfg == 3.0 else sample(model, cfg=cfg)
    assert relative_error(sample(model, cfg=cfg, lazy_mar=ONLY_REFRESH), plain) < CLOSE


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_cache_changes_images_a_little_and_the_same_in_any_batch(geometry, name):
    model, plain = plain_of(geometry)
    lazy = sample(model, lazy_mar=KINDS[name])
    change = relative_error(lazy, plain)
    if (geometry, name) in NOTHING_TO_REUSE:
        assert change < CLOSE
    else:
        assert 1e-3 < change < 0.2
    alone = sample(model, seeds=[4], labels=[2], lazy_mar=KINDS[name])
    assert relative_error(lazy[1:], alone) < CLOSE


@pytest.mark.parametrize("num_iter", [1, 70])  # of 64 tokens
def test_few_and_many_steps_keep_the_images_of_a_batch_apart(num_iter):
    model = small_mar()
    lazy = sample(model, num_iter=num_iter, lazy_mar=CONFIGS["all"])
    alone = sample(model, seeds=[4], labels=[2], num_iter=num_iter, lazy_mar=CONFIGS["all"])
    assert relative_error(lazy[1:], alone) < CLOSE
    assert relative_error(lazy[:1], alone) > 0.1


@pytest.mark.parametrize("num_iter", [1, 100])
def test_lazymar_that_always_refreshes_equals_mar_at_any_number_of_steps(num_iter):
    model = small_mar()
    plain = sample(model, num_iter=num_iter)
    assert relative_error(sample(model, num_iter=num_iter, lazy_mar=ONLY_REFRESH), plain) < CLOSE


@pytest.mark.parametrize("steps", ["1", "ddim1", "2"])
def test_heads_of_very_few_steps_have_nothing_to_cache(steps):
    model = small_mar(num_sampling_steps=steps)
    head_alone = LazyMARConfig(interval=1)
    assert relative_error(sample(model, lazy_mar=head_alone), sample(model)) < CLOSE


def test_lazymar_without_labels_is_unconditional_too():
    model = small_mar()
    config = CONFIGS["all"]
    free = sample(model, labels=None, cfg=1.0, lazy_mar=config)
    guided = sample(model, labels=None, cfg=4.0, lazy_mar=config)
    assert relative_error(guided, free) < 1e-4


def test_reusing_modulations_changes_lazy_denoising_steps_alone():
    model = small_mar()
    lazy, never = LazyMARConfig(interval=1), LazyMARConfig(interval=1, head_interval=1)
    reused = sample(model, lazy_mar=replace(lazy, head_reuse_adaln=True))
    assert 1e-4 < relative_error(reused, sample(model, lazy_mar=lazy)) < 1.0
    without = replace(never, head_reuse_adaln=True)
    assert torch.equal(sample(model, lazy_mar=without), sample(model, lazy_mar=never))


def test_all_caches_off_equals_mar():
    model = small_mar()
    config = LazyMARConfig(token_cache=False, condition_cache=False, head_cache=False)
    assert relative_error(sample(model, lazy_mar=config), sample(model)) < CLOSE


def test_condition_cache_changes_nothing_without_guidance():
    model = small_mar()
    lazy = sample(model, cfg=1.0, lazy_mar=CONFIGS["condition"])
    assert torch.equal(lazy, sample(model, cfg=1.0))


def test_head_cache_with_every_denoising_step_full_equals_the_plain_head():
    model = small_mar()
    config = LazyMARConfig(interval=1, head_interval=1)
    assert relative_error(sample(model, lazy_mar=config), sample(model)) < CLOSE


def test_token_cache_reuses_old_encodings_even_where_it_keeps_every_position():
    model = small_mar()
    keep_all = LazyMARConfig(
        warmup=1, interval=99, keep=((0.0, 1.0),), condition_cache=False, head_cache=False
    )
    trimmed = LazyMARConfig(
        warmup=1, interval=99, keep=((0.0, 0.05),), keep_floor=0, condition_cache=False,
        head_cache=False,
    )  # fmt: skip
    plain, all_kept, few_kept = (sample(model, lazy_mar=c) for c in (None, keep_all, trimmed))
    assert relative_error(all_kept, plain) > 1e-4
    assert relative_error(few_kept, all_kept) > 1e-4


@pytest.mark.parametrize("lazy_mar", [None, CONFIGS["all"]], ids=["mar", "lazymar"])
def test_an_image_depends_on_its_seed_alone_not_on_its_batch(lazy_mar):
    model = small_mar()
    alone = sample(model, seeds=[11], labels=[4], lazy_mar=lazy_mar)
    crowd = sample(
        model, seeds=[1, 2, 11, 3, 5, 8, 13], labels=[0, 1, 4, 2, 3, 0, 1], lazy_mar=lazy_mar
    )
    others = sample(model, seeds=[11, 77], labels=[4, 0], lazy_mar=lazy_mar)
    assert relative_error(crowd[2:3], alone) < 1e-4
    assert relative_error(others[:1], alone) < 1e-4
    assert relative_error(crowd[1:2], alone) > 0.1


def test_lazymar_leaves_the_model_as_it_was():
    model = small_mar()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = sample(model)
    sample(model, lazy_mar=True)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(sample(model), plain)
    model.train()
    sample(model, lazy_mar=True)
    assert model.training


def test_noise_is_drawn_from_torchs_generator_when_none_is_given():
    model = small_mar()
    images = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        images.append(model.sample_tokens(2, 4, labels=[0, 1]))
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_lazy_mar_true_means_the_published_defaults():
    model = small_mar()
    assert torch.equal(sample(model, lazy_mar=True), sample(model, lazy_mar=LazyMARConfig()))
    assert torch.equal(sample(model, lazy_mar=False), sample(model))


def test_no_labels_means_no_class():
    model = small_mar()
    free = sample(model, labels=None, cfg=1.0)
    guided = sample(model, labels=None, cfg=4.0)  # both branches are the same
    assert relative_error(guided, free) < CLOSE
    assert relative_error(sample(model, cfg=1.0), free) > 1e-3


@pytest.mark.parametrize("lazy_mar", [None, CONFIGS["all"]], ids=["mar", "lazymar"])
@pytest.mark.parametrize("mode", ["autocast", "weights"])
def test_bf16_stays_near_float32(lazy_mar, mode):
    model = small_mar()
    exact = sample(model, num_iter=4, lazy_mar=lazy_mar)
    if mode == "weights":
        rough = sample(model.bfloat16(), num_iter=4, lazy_mar=lazy_mar)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            rough = sample(model, num_iter=4, lazy_mar=lazy_mar)
    assert rough.dtype == torch.float32
    assert 0 < relative_error(rough, exact) < 0.2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"labels": [1, 9]}, "label 9 is not one of 0..4"),
        ({"labels": [1]}, r"\(1,\)"),
        ({"num_iter": 0}, "num_iter is 0"),
        ({"lazy_mar": "yes"}, "'yes'"),
        ({"cfg_schedule": "cosine"}, "'cosine'"),
    ],
)
def test_bad_arguments_are_named_in_the_error(arguments, named):
    with pytest.raises(ValueError, match=named):
        sample(small_mar(), **arguments)


def test_noise_of_another_geometry_is_refused():
    model = small_mar()
    noise = ImageNoise.from_seeds([1, 2], 64, 10, 4, "cpu")
    with pytest.raises(ValueError, match=r"\(2, 64, 11, 4\).*\(2, 64, 26, 4\)"):
        model.sample_tokens(2, noise=noise)


@pytest.mark.parametrize(("dim", "heads"), [(32, 4), (48, 3)])
def test_block_equals_timms_with_the_same_weights(dim, heads):
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    theirs = TimmBlock(dim, heads, qkv_bias=True, norm_layer=norm).eval()
    ours = Block(dim, heads).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 9, dim)
    assert relative_error(ours(x), theirs(x)) < 1e-6
    assert relative_error(ours(x, query_slice=slice(2, 5)), theirs(x)[:, 2:5]) < 1e-6
