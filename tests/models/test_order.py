"""Decoding orders: every token once, from the image's own seed, with the counts of their stages."""

import pytest
import torch

from models.noise import ImageNoise
from models.order import OrderConfig, halton_order
from models.plan import DecodingPlan
from tests.support.golden_data import relative_error
from tests.support.sampling import CONFIGS, sample, small_mar

GTR = OrderConfig("gtr")


def decoding_order(order: OrderConfig, seeds=(1, 2), grid=16, known=None) -> torch.Tensor:
    """(B, L) in the order in which tokens are decoded."""
    noise = ImageNoise.from_seeds(seeds, grid * grid, 1, 1)
    return noise.arranged(order, known).orders.flip(1)


@pytest.mark.parametrize("kind", ["random", "halton", "gtr"])
@pytest.mark.parametrize("grid", [1, 2, 5, 16])
def test_every_order_has_every_token_once_and_follows_from_the_seed(kind, grid):
    order = decoding_order(OrderConfig(kind), (7, 8, 7), grid)
    assert (order.sort(dim=1).values == torch.arange(grid * grid)).all()
    assert torch.equal(order[0], order[2])
    assert torch.equal(order[:1], decoding_order(OrderConfig(kind), [7], grid))
    if grid == 16:
        assert not torch.equal(order[0], order[1])


def test_the_random_order_is_the_images_own():
    noise = ImageNoise.from_seeds([1, 2], 64, 1, 1)
    assert torch.equal(noise.arranged(OrderConfig()).orders, noise.orders)


def test_halton_spreads_its_first_tokens_and_starts_where_the_random_order_does():
    random, halton = decoding_order(OrderConfig()), decoding_order(OrderConfig("halton"))
    assert torch.equal(halton[:, 0], random[:, 0])

    def nearest(order):  # mean distance of each of the first 16 tokens to the nearest other one
        places = torch.stack([order[:, :16] // 16, order[:, :16] % 16], dim=2).float()
        distances = torch.cdist(places, places) + 99 * torch.eye(16)
        return distances.min(dim=2).values.mean()

    assert nearest(halton) > 1.3 * nearest(random)
    assert sorted(halton_order(5)) == list(range(25))


def test_gtr_decodes_a_coarse_grid_first():
    order = decoding_order(GTR)
    places = (order // 16 + order % 16).tolist()
    for image in places:
        assert {p % 4 for p in image[:64]} == {0}
        assert {p % 4 for p in image[64:128]} == {2}
        assert {p % 2 for p in image[128:]} == {1}


@pytest.mark.parametrize(
    ("num_iter", "stages"), [(8, (5, 2, 1)), (16, (12, 3, 1)), (32, (24, 6, 2)), (64, (48, 12, 4))]
)
def test_stages_share_the_steps_and_end_where_a_step_ends(num_iter, stages):
    steps = DecodingPlan.create(256, num_iter, 3.0, order=GTR).steps
    assert len(steps) == num_iter
    stops = [step.stop for step in steps]
    for first, count, tokens in zip(
        (0, stages[0], sum(stages[:2])), stages, (64, 64, 128), strict=True
    ):
        sizes = [step.stop - step.start for step in steps[first : first + count]]
        assert sum(sizes) == tokens
        assert max(sizes) - min(sizes) <= 1
    assert stops[-1] == 256


@pytest.mark.parametrize("grid", [1, 2, 3, 16])
@pytest.mark.parametrize("num_iter", [1, 2, 3, 20, 300])
def test_every_token_of_a_staged_plan_is_decoded_once(grid, num_iter):
    steps = DecodingPlan.create(grid * grid, num_iter, order=GTR).steps
    assert [0, *(step.stop for step in steps)] == [*(step.start for step in steps), grid * grid]
    assert all(step.stop > step.start for step in steps)


@pytest.mark.parametrize("kind", ["halton", "gtr"])
@pytest.mark.parametrize("lazy_mar", [None, CONFIGS["all"]], ids=["mar", "lazymar"])
def test_another_order_makes_another_image_whatever_its_batch(kind, lazy_mar):
    model = small_mar()
    alone = sample(model, seeds=[11], labels=[4], lazy_mar=lazy_mar, order=kind)
    crowd = sample(model, seeds=[1, 11], labels=[0, 4], lazy_mar=lazy_mar, order=kind)
    assert relative_error(crowd[1:], alone) < 1e-4
    assert relative_error(sample(model, seeds=[11], labels=[4], lazy_mar=lazy_mar), alone) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "raster"}, "order is 'raster'"),
        ({"kind": "gtr", "stages": 1, "rates": (1,)}, "stages is 1"),
        ({"kind": "gtr", "rates": (1, 2)}, "give 3 positive numbers"),
        ({"kind": "gtr", "rates": (1, 2, 0)}, "give 3 positive numbers"),
        ({"kind": "gtr", "rates": (float("nan"), 1, 2)}, "give 3 positive numbers"),
        ({"kind": "gtr", "rates": (1, 2, float("inf"))}, "give 3 positive numbers"),
    ],
)
def test_impossible_orders_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        OrderConfig(**arguments)


def test_an_order_of_another_type_is_refused():
    with pytest.raises(ValueError, match="order is 3"):
        sample(small_mar(), order=3)
