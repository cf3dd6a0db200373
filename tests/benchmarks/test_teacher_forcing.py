"""Teacher forcing: the sampler's own z, heads and cache history, on tokens that are given."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.teacher_forcing import (
    ForcedImages,
    Recording,
    Replay,
    Teacher,
    denoiser_of,
    forced_z,
)
from models.lazy_mar import LazyMARConfig, step_policies
from models.mar import MAR
from models.plan import DecodingPlan
from tests.support.sampling import small_mar

LAZY = LazyMARConfig(
    warmup=1, interval=3, probe_layer=1, keep_floor=1, keep=((0, 0.2),), head_interval=3
)
EXACT = replace(LAZY, interval=1, head_interval=1)
SEEDS, LABELS = (3, 4, 5), (1, 2, 0)


@pytest.fixture(scope="module")
def model() -> MAR:
    """36 tokens."""
    return small_mar(img_size=24, num_sampling_steps="ddim20")


@pytest.fixture(scope="module")
def plan(model) -> DecodingPlan:
    return DecodingPlan.create(model.seq_len, 9, 3.0)


def images_of(model, latents=None, part=slice(None)) -> ForcedImages:
    if latents is None:
        shape = (3, 4, 6, 6)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return ForcedImages.create(model, latents[part], LABELS[part], SEEDS[part])


@torch.no_grad()
@pytest.mark.parametrize("config", [None, LAZY])
def test_forced_to_its_own_samples_a_method_samples_them_again(model, plan, config):
    latents = model.sample_tokens(
        3, 9, 3.0, labels=LABELS, lazy_mar=config, noise=model.image_noise(SEEDS)
    )
    images = images_of(model, latents)
    denoise = denoiser_of(model, config, model.diffloss.gen_diffusion)
    for step, z in zip(plan.steps, forced_z(model, plan, images, config), strict=True):
        now = slice(step.start, step.stop)
        tokens = denoise(z.flatten(0, 1), images.head[:, now].flatten(0, 1), step.cfg, 1.0)
        wanted = images.tokens[:, now].flatten(0, 1)
        assert torch.allclose(tokens, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("config", [None, LAZY])
def test_a_head_repeats_its_own_epsilons_along_its_own_path(model, config):
    diffusion = model.diffloss.gen_diffusion
    z, noise = torch.randn(8, 32), torch.randn(4, 21, 4)
    states, epsilons = denoiser_of(model, config, Recording(diffusion))(z, noise, 2.0, 1.0)
    assert states.shape == (4, 20, 4)
    assert torch.equal(states[:, 0], noise[:, 0])
    again = denoiser_of(model, config, Replay(diffusion))(z, F.pad(states, (0, 0, 0, 1)), 2.0, 1.0)
    assert torch.equal(again, epsilons)


def test_caches_that_are_always_renewed_make_no_error(model, plan):
    found = Teacher(model, plan, [images_of(model)], 1).compare(EXACT)
    assert found.z_error.shape == (3, 9)
    assert found.kl.shape == (3, 9, 20)
    assert found.z_error.max() < 1e-10
    assert found.z_error_unconditional.max() < 1e-10
    assert found.kl.max() < 1e-6


def test_only_lazy_steps_have_errors_and_each_cache_has_its_own(model, plan):
    teacher = Teacher(model, plan, [images_of(model)], 1)
    policies = step_policies(LAZY, plan, model.buffer_size)
    lazy = torch.tensor([not policies[step.index].refresh for step in plan.steps])
    assert 0 < lazy.sum() < len(lazy)
    token, condition, head = (
        teacher.compare(LAZY.with_caches([name])) for name in ("token", "condition", "head")
    )
    assert token.z_error[:, lazy].min() > 1e-7 > 1e-10 > token.z_error[:, ~lazy].max()
    assert condition.z_error.max() < 1e-10 < 1e-7 < condition.z_error_unconditional[:, lazy].min()
    assert token.kl.sum(-1)[:, lazy].min() > 100 * token.kl.sum(-1)[:, ~lazy].max()
    assert head.z_error.max() == head.z_error_unconditional.max() == 0
    by_noise = head.kl.mean((0, 1))
    full = torch.tensor([i == 19 or i % 3 == 0 for i in reversed(range(20))])
    assert by_noise[~full].min() > 100 * by_noise[full].max()


def test_an_image_depends_on_no_batch_and_paths_are_kept_of_the_first(model, plan):
    together = Teacher(model, plan, [images_of(model)], 1).compare(LAZY)
    parts = [images_of(model, part=slice(0, 1)), images_of(model, part=slice(1, 3))]
    apart = Teacher(model, plan, parts, 1).compare(LAZY)
    assert torch.allclose(apart.z_error, together.z_error, rtol=0.01, atol=1e-10)
    assert apart.kl.shape == (1, 9, 20)
    assert torch.allclose(apart.kl.sum(-1), together.kl[:1].sum(-1), rtol=0.01, atol=1e-6)


def test_a_run_without_guidance_has_one_branch(model):
    plan = DecodingPlan.create(model.seq_len, 9)
    found = Teacher(model, plan, [images_of(model)], 1).compare(LAZY)
    assert found.z_error_unconditional is None
    assert found.z_error.max() > 1e-7


def test_means_over_tokens_weigh_steps_by_their_tokens(model, plan):
    teacher = Teacher(model, plan, [images_of(model)], 0)
    counts = torch.tensor([step.stop - step.start for step in plan.steps]).double()
    by_step = torch.zeros(2, 9).double()
    by_step[0, -1] = 1
    assert teacher.over_tokens(by_step).tolist() == pytest.approx([(counts[-1] / 36).item(), 0])


def test_head_samples_of_all_settings_share_their_noise(model, plan):
    teacher = Teacher(model, plan, [images_of(model)], 0)
    plain = teacher.head_samples(None, tokens=4, samples=5)
    assert plain.shape == (4, 5, 4)
    exact, lazy = (teacher.head_samples(config, 4, 5) for config in (EXACT, LAZY))
    assert torch.allclose(exact, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())
    assert not torch.allclose(lazy, plain, rtol=1e-2)
