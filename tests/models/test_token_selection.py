"""Which positions a lazy step computes: the published choice, and its controls."""

from dataclasses import replace

import pytest
import torch

from models.lazy_cache import ProbeCache
from models.lazy_mar import (
    TOKEN_SELECTIONS,
    LazyMARConfig,
    StepPolicy,
    oldest_positions,
    step_policies,
)
from models.plan import DecodingPlan
from models.token_selection import lowest, random_score
from tests.support.golden_data import relative_error
from tests.support.sampling import sample, small_mar

# Few positions, for long: then it matters which ones.
CONFIG = LazyMARConfig(
    warmup=2, interval=9, keep=((0.0, 1.0), (0.2, 0.2)), keep_floor=3, head_cache=False
)


def config_of(name: str) -> LazyMARConfig:
    return replace(CONFIG, token_selection=name)


def test_similarity_is_the_default_and_every_selection_makes_another_image():
    model = small_mar()
    images = [sample(model, lazy_mar=config_of(name)) for name in TOKEN_SELECTIONS]
    assert TOKEN_SELECTIONS[0] == "similarity"
    assert torch.equal(images[0], sample(model, lazy_mar=CONFIG))
    for i, image in enumerate(images):
        for other in images[:i]:
            assert relative_error(image, other) > 1e-5


@pytest.mark.parametrize("name", TOKEN_SELECTIONS)
def test_selections_agree_where_there_is_nothing_to_select(name):
    model = small_mar()
    everything = replace(CONFIG, keep=((0.0, 1.0),))
    kept = replace(everything, token_selection=name)
    assert torch.equal(sample(model, lazy_mar=kept), sample(model, lazy_mar=everything))


@pytest.mark.parametrize("name", ["random", "oldest"])
def test_a_control_depends_on_the_image_alone_not_on_its_batch(name):
    model = small_mar()
    lazy_mar = config_of(name)
    alone = sample(model, seeds=[11], labels=[4], lazy_mar=lazy_mar)
    crowd = sample(model, seeds=[1, 11, 3], labels=[0, 4, 2], lazy_mar=lazy_mar)
    assert relative_error(crowd[1:2], alone) < 1e-5


def test_the_lowest_scores_are_chosen_behind_those_always_kept():
    score = torch.tensor([[5.0, 1, 4, 2, 3, 0], [0, 9, 8, 7, 1, 2]])
    chosen = lowest(score, slice(2, 4), 4)
    assert chosen[:, :2].tolist() == [[2, 3], [2, 3]]
    assert [set(row) for row in chosen[:, 2:].tolist()] == [{5, 1}, {0, 4}]


def test_the_probe_compares_with_the_values_of_the_step_before():
    probe, v = ProbeCache(rows=1), torch.randn(1, 2, 5, 3)
    probe.refill(v, v)
    turned = v.clone()
    turned[:, :, 3] *= -1
    expected = torch.tensor([[1.0, 1, 1, -1, 1]])
    torch.testing.assert_close(probe.similarity(turned), expected)
    torch.testing.assert_close(probe.similarity(turned), torch.ones(1, 5))


def test_random_scores_are_the_images_own_and_new_at_each_step():
    orders = torch.stack([torch.randperm(64, generator=torch.manual_seed(i)) for i in range(200)])
    scores = random_score(orders, 8, step=3)
    assert scores.shape == (200, 72)
    assert torch.equal(scores[7:9], random_score(orders[7:9], 8, step=3))
    assert 0 <= scores.min() < 0.01
    assert 0.99 < scores.max() < 1
    # Every place is as likely as any other: 200 draws of the mean of a uniform number, 5 sigma.
    assert (scores.mean(dim=0) - 0.5).abs().max() < 5 * 12**-0.5 / 200**0.5
    both = torch.stack([scores.flatten(), random_score(orders, 8, step=4).flatten()])
    assert both.corrcoef()[0, 1].abs() < 0.05
    neighbours = torch.stack([scores[0], scores[1]])
    assert neighbours.corrcoef()[0, 1].abs() < 0.5


def test_the_oldest_positions_take_turns():
    plan = DecodingPlan.create(64, 32)
    policies = step_policies(replace(CONFIG, interval=30), plan, buffer_size=6)
    chosen = oldest_positions(plan, policies, buffer_size=6)
    lazy = [s for s in plan.steps if not policies[s.index].refresh and policies[s.index].kept < 70]
    assert list(chosen) == [step.index for step in lazy]
    seen: set[int] = set()
    for step in lazy[:4]:  # about ten of 70 each: nobody's turn comes twice
        kept, always = chosen[step.index], list(range(6 + step.previous, 6 + step.stop))
        assert len(kept) == len(set(kept)) == policies[step.index].kept
        assert kept[: len(always)] == always
        assert not seen & set(kept[len(always) :])
        seen |= set(kept)


def test_a_refresh_makes_all_positions_equally_old():
    plan = DecodingPlan.create(16, 8)
    policies = {s.index: StepPolicy(s.index in (0, 4), True, 16, 8) for s in plan.steps}
    chosen = oldest_positions(plan, policies, buffer_size=2)
    for index in (1, 5):
        step = plan.steps[index]
        always = range(2 + step.previous, 2 + step.stop)
        others = [p for p in range(18) if p not in always]
        assert chosen[index][len(always) :] == others[: 8 - len(always)]


def test_an_unknown_selection_is_named():
    with pytest.raises(ValueError, match="token_selection is 'newest'; use one of similarity, inv"):
        LazyMARConfig(token_selection="newest")
