"""Every measure, on a case whose answer is known."""

import math

import numpy as np
import pytest
import torch

from benchmarks import measures
from diffusion import create_diffusion
from models.plan import DecodingPlan
from util.evaluation import scores
from util.evaluation.sums import Gaussian


def gaussian_of(x: np.ndarray) -> Gaussian:
    return Gaussian(x.mean(0), np.cov(x.T))


def test_an_error_of_a_tenth_is_a_relative_squared_error_of_a_hundredth():
    z = torch.randn(3, 5, 7)
    factors = torch.tensor([1.0, 1.1, 0.0])[:, None, None]
    assert measures.relative_error(factors * z, z).tolist() == pytest.approx([0, 0.01, 1], abs=1e-6)


def test_path_kl_of_two_fixed_predictions_is_their_distance_times_the_gain_of_signal():
    """u = q x0 + Brownian motion: constant drifts a and b differ by (q_end - q_start) |a - b|^2 / 2."""
    diffusion = create_diffusion("ddim50")
    abar = torch.from_numpy(diffusion.alphas_cumprod).flip(0)  # in the order of a run
    states = torch.randn(4, 50, 3, dtype=torch.float64)
    a, b = torch.randn(2, 3, dtype=torch.float64)

    def epsilons(x0):
        signal, noise = abar.sqrt()[:, None], (1 - abar).sqrt()[:, None]
        return (states - signal * x0) / noise

    nats = measures.path_kl(measures.path_kl_weights(diffusion), epsilons(a), epsilons(b))
    q = abar / (1 - abar)
    expected = 0.5 * (q[-1] - q[0]) * ((a - b) ** 2).sum()
    assert nats.shape == (4, 50)
    assert torch.allclose(nats.sum(1), expected.expand(4), rtol=1e-9)


def test_a_step_of_the_path_kl_is_that_of_the_samplers_two_normal_distributions():
    diffusion = create_diffusion("ddim50")
    weights = measures.path_kl_weights(diffusion).flip(0).numpy()
    error = 0.1  # in one channel of epsilon
    moved = diffusion.posterior_mean_coef_x0 * diffusion.sqrt_recipm1_alphas_cumprod * error
    expected = 0.5 * moved**2 / np.exp(diffusion.posterior_log_variance)
    assert 0.5 * weights[1:] * error**2 == pytest.approx(expected[1:], rel=1e-9)
    assert weights[0] == 0


def test_windows_of_shifted_latents_are_as_far_as_the_shift():
    latents = torch.randn(30, 2, 6, 6)
    first = measures.patch_gaussian(latents)
    assert first.mu.shape == (18,)
    assert measures.frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert measures.frechet_distance(
        measures.patch_gaussian(latents + 0.5), first
    ) == pytest.approx(18 * 0.25)
    twice = measures.patch_gaussian(2 * latents)  # tr (4 S + S - 2 * 2 S) = tr S
    assert measures.frechet_distance(twice, first) == pytest.approx(
        np.trace(first.sigma) + (first.mu**2).sum()
    )


def test_windows_see_a_seam_that_single_tokens_do_not():
    smooth = torch.randn(400, 2, 1, 1).expand(-1, -1, 4, 4)
    torn = torch.randn(400, 2, 4, 4)
    # Per channel: eigenvalues 9, 0, ... against 1, ...: tr = 9 + 9 - 2 sqrt(9)
    windows = measures.frechet_distance(*map(measures.patch_gaussian, (torn, smooth)))
    assert windows == pytest.approx(2 * (9 + 9 - 2 * 3), rel=0.1)
    single = (measures.patch_gaussian(x, size=1) for x in (torn, smooth))
    assert measures.frechet_distance(*single) < 0.1


def test_the_tear_ratio_of_four_tokens_is_that_by_hand():
    tokens = torch.tensor([[[[0.0], [3.0]], [[1.0], [1.0]]]])  # rows 0 3 / 1 1
    steps = torch.tensor([[[0, 0], [1, 2]]])
    # together: 0-3 (9); apart: 1-1 (0), 0-1 (1), 3-1 (4)
    assert measures.tear_ratio(tokens, steps) == pytest.approx(9 / (5 / 3))
    assert math.isnan(measures.tear_ratio(tokens, torch.arange(4).view(1, 2, 2)))


def test_tokens_that_do_not_depend_on_the_order_have_a_tear_ratio_of_one():
    plan = DecodingPlan.create(64, 8)
    orders = torch.stack([torch.randperm(64) for _ in range(300)])
    steps = measures.steps_of_positions(plan, orders).view(300, 8, 8)
    assert measures.tear_ratio(torch.randn(300, 8, 8, 2), steps) == pytest.approx(1, abs=0.05)
    by_step = torch.randn(300, 8, 2).gather(1, steps.view(300, 64, 1).expand(-1, -1, 2))
    assert measures.tear_ratio(by_step.view(300, 8, 8, 2), steps) == 0


def test_steps_of_positions_are_those_of_the_decoding_order():
    plan = DecodingPlan.create(4, 2)  # two tokens each
    orders = torch.tensor([[3, 1, 0, 2]])  # 2 first, then 0, 1, 3
    first = plan.steps[0].stop
    expected = [0 if rank < first else 1 for rank in (1, 2, 0, 3)]  # of tokens 0, 1, 2, 3
    assert measures.steps_of_positions(plan, orders).tolist() == [expected]


def test_energy_distance_of_two_points_is_twice_their_distance():
    x = torch.zeros(5, 2)
    assert measures.energy_distance(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(10)


def test_energy_distance_is_zero_for_the_same_samples_and_unbiased_for_the_same_distribution():
    x = torch.randn(200, 30, 1)
    assert measures.energy_distance(x[0], x[0]) == pytest.approx(0, abs=1e-12)
    values = torch.tensor([measures.energy_distance(x[i], x[i + 100]) for i in range(100)])
    error = values.std() / 10
    assert abs(values.mean()) < 4 * error
    with pytest.raises(ValueError, match="30 and 29 samples"):
        measures.energy_distance(x[0], x[1, 1:])


def test_fids_are_those_of_the_evaluation():
    random = np.random.default_rng(0)
    reference = gaussian_of(random.normal(size=(400, 6)) @ random.normal(size=(6, 6)))
    a, b = random.normal(size=(2, 300, 6)).astype(np.float32)
    found = measures.paired_fid(a, b, reference, resamples=20)
    assert found.base == pytest.approx(scores._frechet(gaussian_of(a), reference), rel=1e-6)
    assert found.fid == pytest.approx(scores._frechet(gaussian_of(b), reference), rel=1e-6)
    assert found.difference == found.fid - found.base


def test_a_known_shift_lies_in_the_interval_and_no_shift_gives_no_interval():
    random = np.random.default_rng(1)
    reference = Gaussian(np.zeros(4), np.eye(4))
    a = random.normal(size=(2000, 4))
    same = measures.paired_fid(a, a, reference, resamples=50)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    shifted = measures.paired_fid(a, a + [0.3, 0, 0, 0], reference, resamples=200)
    assert shifted.low < 0.09 < shifted.high  # |shift|^2
    assert 0 < shifted.high - shifted.low < 0.06


def test_common_seeds_make_the_interval_narrow():
    random = np.random.default_rng(2)
    reference = Gaussian(np.zeros(4), np.eye(4))
    a, other = random.normal(size=(2, 1000, 4))
    close = a + 0.1 * random.normal(size=a.shape)
    widths = [
        (found := measures.paired_fid(a, b, reference, resamples=200)).high - found.low
        for b in (close, other)
    ]
    assert widths[0] < widths[1] / 3
    with pytest.raises(ValueError, match="both sets need the same"):
        measures.paired_fid(a, other[1:], reference)


def test_rows_of_one_image_are_resampled_together():
    random = np.random.default_rng(3)
    reference = Gaussian(np.zeros(2), np.eye(2))
    a, b = random.normal(size=(2, 500, 2))
    single, four = (
        measures.paired_fid(a.repeat(n, 0), b.repeat(n, 0), reference, 200, rows_per_image=n)
        for n in (1, 4)
    )
    assert four.difference == pytest.approx(single.difference, rel=0.1, abs=1e-4)
    assert four.high - four.low == pytest.approx(single.high - single.low, rel=0.1)
    alone = measures.paired_fid(a.repeat(4, 0), b.repeat(4, 0), reference, 200)
    assert alone.high - alone.low < 0.7 * (single.high - single.low)  # half, were rows independent


def test_the_interval_covers_a_difference_of_zero_about_as_often_as_it_says():
    reference = Gaussian(np.zeros(2), np.eye(2))
    covered = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        common, a, b = random.normal(size=(3, 200, 2))
        found = measures.paired_fid(common + a, common + b, reference, resamples=80, seed=seed)
        covered += found.low <= 0 <= found.high
    assert covered > 51  # 57 expected; 51 or fewer have probability 0.003


def test_where_runs_fix_the_labels_only_what_varies_within_a_class_is_uncertain():
    labels = np.arange(200) // 20
    means = 20 * np.random.default_rng(0).normal(size=(10, 2))
    means -= means.mean(0)
    reference = Gaussian(np.zeros(2), means.T @ means / 10 + 2 * np.eye(2))
    shift = np.array([1.0, 0.0])
    exact = (shift**2).sum()
    covered, widths = 0, []
    for seed in range(60):
        random = np.random.default_rng(seed)
        common, a, b = random.normal(size=(3, 200, 2))
        sets = (means[labels] + common + a, means[labels] + shift + common + b)
        within, over = (
            measures.paired_fid(*sets, reference, 80, seed, labels=given)
            for given in (labels, None)
        )
        covered += within.low <= exact <= within.high
        widths.append((within.high - within.low) / (over.high - over.low))
    assert covered > 51  # 57 expected
    assert np.mean(widths) < 0.5


def test_classes_of_few_images_are_resampled_as_one():
    random = np.random.default_rng(4)
    reference = Gaussian(np.zeros(2), np.eye(2))
    a, b = random.normal(size=(2, 90, 2))
    assert measures.paired_fid(
        a, b, reference, 30, labels=np.arange(90) // 9
    ) == measures.paired_fid(a, b, reference, 30)


def test_a_ratio_of_proportional_values_is_exact():
    base = torch.tensor([1.0, 2.0, 4.0])
    found = measures.Estimate.ratio(3 * base, base)
    assert (found.mean, found.error) == pytest.approx((3, 0), abs=1e-6)
    assert measures.Estimate.of(base).mean == pytest.approx(7 / 3)
    assert measures.Estimate.of(base).error == pytest.approx(base.std().item() / math.sqrt(3))
