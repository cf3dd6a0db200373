"""Editing: known tokens stay, the others are generated as in a whole image, in any batch and preset."""

from dataclasses import replace

import pytest
import torch

from models.fast_mar import FastMARConfig
from models.lazy_mar import LazyMARConfig
from models.order import OrderConfig
from models.plan import DecodingPlan
from tests.support.golden_data import relative_error
from tests.support.sampling import CLOSE, CONFIGS, noise_of, sample, small_mar

EVERY_STEP = LazyMARConfig(interval=1, head_cache=False)
FAST = FastMARConfig.fast()
FAST = replace(FAST, head=replace(FAST.head, steps=(20, 5)))  # small_mar has noise of 25 steps
PRESETS = {
    "mar": FastMARConfig(12),
    "lazymar": replace(FastMARConfig.lazymar(), num_iter=12),
    "caches": FastMARConfig(12, lazy=CONFIGS["all"]),
    "fast": FAST,
    "gtr": replace(FAST, order="gtr"),
}


@pytest.fixture(scope="module")
def edit():
    """A model, latents (3, 4, 8, 8) and masks: half of the image, a few tokens, nothing known."""
    model = small_mar()
    known = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 8, 8, dtype=torch.bool)
    mask[0, :, :4] = True
    mask[1, 2:4, 3:6] = True
    return model, known, mask


def edited(edit, images=(0, 1, 2), num_iter=12, **kwargs):
    model, known, mask = edit
    images = list(images)
    return model.sample_tokens(
        len(images), num_iter, 3.0, labels=[(1, 2, 3)[i] for i in images],
        noise=noise_of(model, [(3, 4, 5)[i] for i in images]), known=known[images],
        known_mask=mask[images], **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_known_tokens_come_back_bit_for_bit_and_the_others_are_new(edit, preset):
    _, known, mask = edit
    latents = edited(edit, **preset.arguments())
    kept = mask[:, None].expand_as(known)
    assert torch.equal(latents[kept], known[kept])
    assert latents.isfinite().all()
    assert not torch.isclose(latents[~kept], known[~kept]).any(dim=0).all()


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_an_all_false_mask_is_plain_sampling(edit, preset):
    model, known, mask = edit
    nothing = {"known": known[:2], "known_mask": torch.zeros_like(mask[:2])}
    arguments = preset.arguments()
    assert torch.equal(sample(model, **arguments, **nothing), sample(model, **arguments))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_an_edit_depends_neither_on_its_batch_nor_on_what_others_know(edit, preset):
    crowd = edited(edit, **preset.arguments())
    for i in range(3):
        alone = edited(edit, [i], **preset.arguments())
        assert relative_error(crowd[i : i + 1], alone) < 1e-4


def test_lazymar_that_always_refreshes_edits_as_mar_does(edit):
    plain = edited(edit)
    assert relative_error(edited(edit, lazy_mar=EVERY_STEP), plain) < CLOSE
    assert relative_error(edited(edit, lazy_mar=CONFIGS["token"]), plain) > 1e-4


def test_what_is_known_decides_what_is_new_and_what_is_not_known_does_not_matter(edit):
    model, known, mask = edit
    latents = edited(edit, [0])
    left, right = mask[:1, None].expand_as(latents), ~mask[:1, None].expand_as(latents)
    for where, same in ((left, False), (right, True)):
        other = torch.where(where, -known[:1], known[:1])
        other = torch.where(right, torch.nan, other) if same else other
        changed = edited((model, other.expand(3, -1, -1, -1), mask), [0])
        assert torch.equal(changed[right], latents[right]) == same


def test_everything_known_is_returned(edit):
    model, known, mask = edit
    assert torch.equal(edited((model, known, torch.ones_like(mask))), known)


def test_an_edit_takes_the_steps_of_a_whole_image_from_there_on():
    whole = DecodingPlan.create(256, 64, 3.0).steps
    rest = DecodingPlan.create(256, 64, 3.0, known=whole[40].start).steps
    assert rest[0] == replace(whole[40], previous=whole[40].start)
    assert rest[1:] == whole[41:]
    between = DecodingPlan.create(256, 64, 3.0, known=whole[40].start + 1).steps
    assert (between[0].start, between[0].stop) == (whole[40].start + 1, whole[40].stop)
    assert DecodingPlan.create(256, 64, known=256).steps == ()


def test_half_an_image_takes_as_many_steps_in_every_order():
    random, gtr = (
        DecodingPlan.create(256, 16, 3.0, order=OrderConfig(kind), known=128).steps
        for kind in ("random", "gtr")
    )
    assert gtr == random
    assert len(gtr) == 6  # the last stage of a whole image, of 128 tokens, has a single step


@pytest.mark.parametrize("geometry", [{"buffer_size": 0}, {"patch_size": 2}], ids=str)
@pytest.mark.parametrize("lazy_mar", [None, CONFIGS["all"]], ids=["mar", "lazymar"])
def test_edits_work_without_a_buffer_and_with_patches(geometry, lazy_mar):
    model = small_mar(**geometry)
    grid = model.grid_size
    mask = (torch.arange(grid**2) % 3 == 0).view(1, grid, grid).expand(2, -1, -1)
    known = torch.randn(2, 4, 8, 8)
    latents = sample(model, lazy_mar=lazy_mar, known=known, known_mask=mask)
    kept = model.patchify(latents)[mask.flatten(1)]
    assert torch.equal(kept, model.patchify(known)[mask.flatten(1)])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"known": torch.zeros(2, 4, 8, 8)}, "known and known_mask come together"),
        ({"known_mask": torch.zeros(2, 8, 8, dtype=torch.bool)}, "come together"),
        (
            {"known": torch.zeros(2, 4, 8, 8), "known_mask": torch.zeros(2, 4, 4, dtype=torch.bool)},
            r"known_mask \(2, 4, 4\)",
        ),
        ({"known": torch.zeros(2, 4, 8, 8), "known_mask": torch.zeros(2, 8, 8)}, "torch.bool"),
        (
            {"known": torch.zeros(2, 4, 8, 8).numpy(), "known_mask": torch.ones(2, 8, 8).bool()},
            "give two tensors",
        ),
        (
            {
                "known": torch.full((2, 4, 8, 8), torch.nan),
                "known_mask": torch.eye(8).bool().expand(2, 8, 8),
            },
            "not finite where known_mask is true",
        ),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        sample(small_mar(), **arguments)
