"""The head's schedule: which steps, noise and guidance; one picture for any number of steps."""

import math

import numpy as np
import pytest
import torch

from diffusion import create_diffusion
from diffusion.schedule import coupling
from models.head_config import LEVELS, HeadConfig, denoising_runs
from models.lazy_mar import LazyMARConfig
from models.mar import mar_tiny
from models.noise import ImageNoise
from models.plan import DecodingPlan
from tests.support import ROOT
from tests.support.golden_data import relative_error
from tests.support.sampling import CLOSE, CONFIGS, noise_of, sample, small_mar
from util.weights import load_into

OWN = create_diffusion("100")
DISA = HeadConfig(steps=(50, 5), t_start=950)


def runs_of(config: HeadConfig | None, num_iter: int = 64, own=OWN):
    return denoising_runs(config, own, DecodingPlan.create(256, num_iter, 3.0))


def counts(config: HeadConfig, num_iter: int = 64) -> list[int]:
    return [config.steps_at(s, num_iter, 100) for s in range(num_iter)]


# ---- the schedule ------------------------------------------------------------------------------------


def test_the_default_is_the_models_own_sampling():
    for config in (None, HeadConfig()):
        assert {run.solver for run in runs_of(config)} == {OWN}
        assert {run.coupling is None and all(run.guided) for run in runs_of(config)} == {True}


def test_steps_are_annealed_from_many_to_few_in_few_different_numbers():
    exact = [5 + int((63 - s) / 63 * 45) for s in range(64)]  # DiSA, section 4
    linear = counts(DISA)
    assert linear == sorted(linear, reverse=True)
    assert (linear[0], linear[-1], len(set(linear))) == (50, 5, LEVELS)
    assert max(abs(a - b) for a, b in zip(linear, exact, strict=True)) <= 4
    assert abs(sum(linear) - sum(exact)) < 64
    assert len({id(run) for run in runs_of(DISA)}) == LEVELS


def test_annealings_differ_between_their_ends():
    of = {
        n: counts(HeadConfig(steps=(50, 5), annealing=n))
        for n in ("cosine", "two_stage", "constant")
    }
    assert of["two_stage"] == [50] * 32 + [5] * 32
    assert of["constant"] == [50] * 64
    assert (of["cosine"][0], of["cosine"][-1]) == (50, 5)
    assert of["cosine"][8] > counts(DISA)[8]
    assert counts(HeadConfig(steps=(50, 5)), 1) == [50]


def test_timesteps_are_clipped_and_never_above_the_models_own():
    run = runs_of(HeadConfig(steps=50, t_start=950))[0]
    assert (run.solver.timestep_map[-1], run.num_steps) == (950, 48)
    own = create_diffusion("ddim100")
    assert runs_of(HeadConfig(steps=50), own=own)[0].solver.timestep_map[-1] == 990
    clipped = runs_of(HeadConfig(t_start=950), own=own)[0]
    assert clipped.solver.timestep_map == [*range(0, 951, 10)]


def test_guidance_follows_progress_and_timesteps():
    plan = DecodingPlan.create(256, 20, 3.0, guidance_start=0.25)
    assert [step.guided for step in plan.steps] == [False] * 5 + [True] * 15
    assert {step.cfg for step in plan.steps[:5]} == {1.0}
    assert plan.steps[5:] == DecodingPlan.create(256, 20, 3.0).steps[5:]
    run = runs_of(HeadConfig(guidance_interval=(225, 807)))[0]
    inside = [225 <= t <= 807 for t in run.solver.timestep_map]
    assert list(run.guided) == inside
    assert 0.5 < sum(inside) / 100 < 0.6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"steps": 1}, "steps is 1"),
        ({"steps": (5, 50)}, r"steps is \(5, 50\)"),
        ({"steps": (50, 20, 5)}, "first, last"),
        ({"steps": 50.0}, "steps is 50.0"),
        ({"steps": [50, 5]}, r"steps is \[50, 5\]"),
        ({"annealing": "square"}, "annealing is 'square'"),
        ({"t_start": 1000}, "t_start is 1000"),
        ({"t_start": 950.0}, "t_start is 950.0"),
        ({"spacing": "karras"}, "spacing is 'karras'"),
        ({"solver": "heun"}, "solver is 'heun'"),
        ({"tau": 1.5}, "tau is 1.5"),
        ({"guidance_start": -0.1}, "guidance_start is -0.1"),
        ({"guidance_interval": (807, 225)}, r"guidance_interval is \(807, 225\)"),
        ({"guidance_interval": (225, 807, 9)}, "give two timesteps"),
        ({"guidance_interval": 225}, "give two timesteps"),
    ],
)
def test_impossible_settings_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        HeadConfig(**arguments)


@pytest.mark.parametrize(
    ("argument", "named"),
    [({"head": "ddim"}, "head is 'ddim'"), ({"temperature": math.nan}, "temperature is nan")],
)
def test_a_head_of_another_type_and_a_temperature_that_is_no_number_are_refused(argument, named):
    with pytest.raises(ValueError, match=named):
        sample(small_mar(), **argument)


def test_more_steps_than_the_model_has_are_refused():
    with pytest.raises(ValueError, match=r"40 denoising steps exceed the model's 25 .* at most 25"):
        sample(small_mar(), head=HeadConfig(steps=40))


# ---- coupled noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DISA, HeadConfig(steps=12, spacing="logsnr", t_start=950)])
def test_derived_noise_is_standard_normal_and_independent(config):
    for run in runs_of(config)[::8]:
        weights = run.coupling
        assert weights.shape == (run.num_steps + 1, 101)
        np.testing.assert_allclose(weights @ weights.T, np.eye(run.num_steps + 1), atol=1e-12)
        assert (weights >= 0).all()


def test_noise_of_the_same_schedule_is_the_same():
    np.testing.assert_allclose(coupling(OWN.alphas_cumprod, OWN.alphas_cumprod), np.eye(101))


def test_derived_noise_follows_the_same_brownian_path():
    """W(q), the running sum of sqrt(dq) noise, agrees where both runs have a timestep."""
    fine, coarse = OWN.alphas_cumprod, OWN.alphas_cumprod[::9]
    noise = np.random.RandomState(0).standard_normal((101, 1000))
    q, coarse_q = (abar[::-1] / (1 - abar[::-1]) for abar in (fine, coarse))

    def path(q, noise):
        return (np.sqrt(np.diff(q, prepend=0))[:, None] * noise[: len(q)]).cumsum(axis=0)

    derived = coupling(fine, coarse) @ noise
    np.testing.assert_allclose(path(coarse_q, derived), path(q, noise)[::9], rtol=1e-9)


@pytest.fixture(scope="module")
def bundled():
    """The bundled model and the plain latents of two images."""
    model = mar_tiny().eval()
    load_into(model, ROOT / "pretrained_models/mar_tiny/model.safetensors")
    return model, model.sample_tokens(2, 1, 3.0, labels=[1, 2], noise=noise_of(model, [0, 1]))


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """dB, of latents whose range is taken as 4 standard deviations."""
    return float(10 * torch.log10(16 * b.var() / (a - b).square().mean()))


def test_one_seed_is_nearly_one_picture_with_100_and_with_20_steps(bundled):
    model, plain = bundled
    noise = noise_of(model, [0, 1])
    other = ImageNoise(noise.orders, noise_of(model, [8, 9]).head)
    # One step: with more, a small change may tip a decision of the transformer.
    few = {"num_iter": 1, "cfg": 3.0, "labels": [1, 2], "head": HeadConfig(steps=20, t_start=950)}
    coupled, free = (model.sample_tokens(2, noise=n, **few) for n in (noise, other))
    assert psnr(coupled, plain) > psnr(free, plain) + 6


# ---- sampling ----------------------------------------------------------------------------------------

HEADS = {
    "annealed": HeadConfig(steps=(20, 5), t_start=950),
    "ddim": HeadConfig(steps=10, solver="ddim", t_start=980),
    "2m": HeadConfig(steps=10, solver="2m", spacing="logsnr", tau=0.5, t_start=950),
    "guided late": HeadConfig(guidance_start=0.3),
    "guided inside": HeadConfig(guidance_interval=(225, 807)),
}
ALL = HeadConfig(steps=(20, 5), t_start=950, guidance_start=0.3, guidance_interval=(100, 807))
EVERY_STEP = LazyMARConfig(interval=1, head_cache=False)


def test_the_default_changes_nothing():
    model = small_mar()
    for lazy_mar in (None, CONFIGS["all"]):
        assert torch.equal(
            sample(model, lazy_mar=lazy_mar, head=HeadConfig(), order="random"),
            sample(model, lazy_mar=lazy_mar),
        )


@pytest.mark.parametrize("head", [HeadConfig(), HEADS["annealed"]], ids=["own", "annealed"])
def test_noise_of_another_precision_gives_the_same_image(head):
    model = small_mar()
    noise = noise_of(model, [0, 1])
    double = ImageNoise(noise.orders, noise.head.double())
    single, other = (
        model.sample_tokens(2, 8, 3.0, labels=[1, 2], head=head, noise=n) for n in (noise, double)
    )
    assert torch.equal(single, other)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_every_setting_changes_the_image_and_works_with_lazymar(head):
    model = small_mar()
    plain = sample(model, head=head)
    assert relative_error(plain, sample(model)) > 1e-4
    assert relative_error(sample(model, head=head, lazy_mar=EVERY_STEP), plain) < CLOSE
    lazy = sample(model, head=head, lazy_mar=CONFIGS["all"])
    assert 1e-4 < relative_error(lazy, plain) < 0.2  # other seeds differ by 1.4


@pytest.mark.parametrize("name", CONFIGS)
def test_every_cache_works_with_guidance_that_starts_late_and_stops_early(name):
    model = small_mar()
    lazy = sample(model, head=ALL, lazy_mar=CONFIGS[name], num_iter=20)
    plain = sample(model, head=ALL, num_iter=20)
    assert 1e-5 < relative_error(lazy, plain) < 1.0


def test_guidance_that_never_starts_is_no_guidance():
    model = small_mar()
    never = sample(model, head=HeadConfig(guidance_start=1.0))
    assert torch.equal(never, sample(model, cfg=1.0))


def test_guidance_everywhere_is_the_default():
    model = small_mar()
    everywhere = sample(model, head=HeadConfig(guidance_interval=(0, 999)))
    assert torch.equal(everywhere, sample(model))


@pytest.mark.parametrize("lazy_mar", [None, CONFIGS["all"]], ids=["mar", "lazymar"])
def test_an_image_of_few_steps_depends_on_its_seed_alone(lazy_mar):
    model = small_mar()
    alone = sample(model, seeds=[11], labels=[4], lazy_mar=lazy_mar, head=ALL)
    crowd = sample(model, seeds=[1, 11, 3], labels=[0, 4, 2], lazy_mar=lazy_mar, head=ALL)
    assert relative_error(crowd[1:2], alone) < 1e-4


def test_the_heads_cache_shrinks_with_the_number_of_steps():
    config = LazyMARConfig()
    kinds = {n: config.head_kinds([True] * n, 100) for n in (100, 48, 28, 20)}
    assert [sum(k == "full" for k in kinds[n]) for n in (100, 48, 28, 20)] == [16, 17, 28, 20]
    assert kinds[100] == config.head_kinds([True] * 100, 100)
    late = config.head_kinds([i < 96 for i in range(100)], 100)
    assert late[95] == "full"  # the residual is needed from here on
    assert kinds[100][95] == "warm"


def test_a_forecast_of_the_heads_cache_needs_two_full_steps_and_changes_the_rest():
    model = small_mar()
    reuse, forecast = (
        sample(model, lazy_mar=LazyMARConfig(interval=1, forecast_order=n)) for n in (0, 1)
    )
    assert 1e-5 < relative_error(forecast, reuse) < 1.0
    one_full = LazyMARConfig(interval=1, head_interval=25)
    with_order = LazyMARConfig(interval=1, head_interval=25, forecast_order=1)
    assert [*one_full.head_kinds([True] * 25, 25)].count("full") == 2  # the first and the last
    assert torch.equal(sample(model, lazy_mar=with_order), sample(model, lazy_mar=one_full))
