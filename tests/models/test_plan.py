"""DecodingPlan: the counts of MAR's cosine schedule, whatever the number of steps."""

import math

import pytest

from models.plan import DecodingPlan


@pytest.mark.parametrize("seq_len", [1, 2, 16, 100, 256, 1024])
@pytest.mark.parametrize("num_iter", [1, 2, 5, 16, 64, 256, 300])
def test_every_token_is_decoded_exactly_once_and_in_order(seq_len, num_iter):
    steps = DecodingPlan.create(seq_len, num_iter).steps
    assert steps[0].start == steps[0].previous == 0
    assert steps[-1].stop == seq_len
    for before, step in zip(steps, steps[1:], strict=False):
        assert step.start == before.stop
        assert step.previous == before.start
        assert step.index > before.index
    assert all(step.stop > step.start for step in steps)


def test_counts_of_64_steps_follow_the_cosine():
    steps = DecodingPlan.create(256, 64).steps
    assert len(steps) == 64
    assert [step.stop - step.start for step in steps][:6] == [1, 1, 1, 1, 1, 1]
    for step in steps[30:-1]:
        assert 256 - step.stop == math.floor(256 * math.cos(math.pi / 2 * (step.index + 1) / 64))


def test_linear_guidance_grows_with_what_is_known_and_constant_guidance_does_not():
    linear = DecodingPlan.create(256, 64, cfg=3.0).steps
    assert linear[0].cfg == pytest.approx(1 + 2 * 1 / 256)
    assert linear[-1].cfg == pytest.approx(1 + 2 * 255 / 256)
    assert all(a.cfg < b.cfg for a, b in zip(linear, linear[1:], strict=False))
    assert {s.cfg for s in DecodingPlan.create(256, 64, 3.0, "constant").steps} == {3.0}


@pytest.mark.parametrize("first", range(0, 100, 7))
def test_guidance_starts_at_exactly_its_progress(first):
    steps = DecodingPlan.create(256, 100, 3.0, guidance_start=first / 100).steps
    assert [step.index for step in steps if step.guided] == [*range(first, 100)]


def test_without_guidance_every_step_has_none():
    assert {step.cfg for step in DecodingPlan.create(256, 64, 1.0).steps} == {1.0}


@pytest.mark.parametrize(
    ("num_iter", "schedule", "named"),
    [(0, "linear", "0"), (-3, "linear", "-3"), (2.5, "linear", "2.5"), (8, "sine", "sine")],
)
def test_impossible_arguments_are_named(num_iter, schedule, named):
    with pytest.raises(ValueError, match=named):
        DecodingPlan.create(16, num_iter, 2.0, schedule)
