"""Solvers against one-dimensional mixtures, whose scores and samples are known exactly."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from diffusion import create_diffusion, create_solver
from diffusion.schedule import clip_timesteps, cosine_betas, log_snr_timesteps, space_timesteps

BETAS = cosine_betas(1000)
ABAR = np.cumprod(1.0 - BETAS)
SAMPLES = 20000


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians (weights, means, one deviation) under MAR's diffusion."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    deviation: float

    def moments(self, abar: float, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of x_0 given x_t = x (n,)."""
        a, s2 = abar**0.5, 1 - abar
        means, v = torch.tensor(self.means), self.deviation**2
        total = abar * v + s2
        distance = (x[:, None] - a * means).square() / (2 * total)
        share = (torch.tensor(self.weights).log() - distance).softmax(dim=1)  # (n, components)
        each = means + a * v / total * (x[:, None] - a * means)
        mean = (share * each).sum(dim=1)
        return mean, (share * each.square()).sum(dim=1) - mean.square() + v * s2 / total

    def head(self, solver):
        """epsilon and the variance fraction that is best (Bao et al. 2022), exactly."""
        abar = solver.alphas_cumprod
        before = np.append(1.0, abar[:-1])
        betas = 1 - abar / before
        posterior = betas * (1 - before) / (1 - abar)
        weight = np.sqrt(before) * betas / (1 - abar)

        def model(i: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mean, variance = self.moments(float(abar[i]), x[:, 0])
            epsilon = (x[:, 0] - abar[i] ** 0.5 * mean) / (1 - abar[i]) ** 0.5
            log = (posterior[i] + weight[i] ** 2 * variance).clamp(min=1e-20).log()
            low, high = np.log(max(posterior[i], 1e-20)), np.log(betas[i])
            return epsilon[:, None], (2 * (log - low) / (high - low) - 1)[:, None]

        return model

    def draw(self, count: int) -> torch.Tensor:
        """Sorted quantiles (count,): what `count` perfect samples look like."""
        random = np.random.RandomState(0)
        which = random.choice(len(self.means), 50 * count, p=self.weights)
        values = np.array(self.means)[which] + self.deviation * random.standard_normal(50 * count)
        return torch.from_numpy(np.sort(values).reshape(count, 50).mean(axis=1))

    def error(self, solver) -> float:
        """Wasserstein-1 distance of SAMPLES samples to the truth."""
        random = np.random.RandomState(1)
        noise = random.standard_normal((SAMPLES, solver.num_timesteps + 1, 1))
        x = solver.sample(self.head(solver), torch.from_numpy(noise))
        return (x[:, 0].sort().values - self.draw(SAMPLES)).abs().mean().item()


EARLY = Mixture((0.3, 0.5, 0.2), (-1.2, 0.3, 1.5), 0.4)  # an early token: broad
LATE = Mixture((1.0,), (0.4,), 0.12)  # a late one: narrow


def uniform(count: int, name: str = "ancestral", tau: float = 0.0):
    return create_solver(clip_timesteps(space_timesteps(1000, str(count)), 950), name, tau)


def logsnr(count: int, name: str = "ancestral", tau: float = 0.0):
    return create_solver(log_snr_timesteps(BETAS, count, 950), name, tau)


@pytest.mark.parametrize("mixture", [EARLY, LATE], ids=["early", "late"])
def test_the_learned_variance_is_what_makes_few_ancestral_steps_work(mixture):
    learned = mixture.error(uniform(10))
    assert 3 * learned < mixture.error(uniform(10, "ddim", tau=1.0))
    assert 3 * learned < mixture.error(uniform(10, "ddim"))


def test_second_order_needs_spacing_in_log_snr():
    spaced, even = EARLY.error(logsnr(10, "2m")), EARLY.error(uniform(10, "2m"))
    assert 3 * spaced < even
    assert 3 * spaced < EARLY.error(uniform(10, "ddim"))
    assert spaced < 2 * EARLY.error(uniform(10))


@pytest.mark.parametrize(("name", "tau"), [("ddim", 0.0), ("2m", 0.0), ("2m", 0.5), ("2m", 1.0)])
def test_more_steps_are_better(name, tau):
    assert EARLY.error(logsnr(16, name, tau)) < 0.6 * EARLY.error(logsnr(6, name, tau))


def test_noise_forgets_the_bias_of_a_clipped_start_and_an_ode_keeps_it():
    assert 2 * LATE.error(logsnr(50, "2m", 0.5)) < LATE.error(logsnr(50, "2m"))


@pytest.mark.parametrize("name", ["ddim", "2m"])
def test_a_small_error_at_the_first_timestep_ruins_a_deterministic_run_unless_it_is_clipped(name):
    def error(first: int) -> float:
        kept = clip_timesteps(space_timesteps(1000, "20"), first)
        solver = create_solver(kept, name)
        exact = LATE.head(solver)
        noise = torch.from_numpy(np.random.RandomState(1).standard_normal((500, 21, 1)))
        sampled = solver.sample(lambda i, x: (exact(i, x)[0] + 0.02, exact(i, x)[1]), noise)
        return (sampled.mean() - 0.4).abs().item()

    assert error(999) > 1
    assert error(950) < 0.1


def test_first_order_steps_of_tau_1_are_ancestral_ones_with_the_posteriors_variance():
    kept = clip_timesteps(space_timesteps(1000, "12"), 950)
    ancestral, solver = create_solver(kept), create_solver(kept, "ddim", 1.0)
    noise = torch.from_numpy(np.random.RandomState(2).standard_normal((50, len(kept) + 1, 1)))
    exact = EARLY.head(ancestral)

    def small_variance(i: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return exact(i, x)[0], -torch.ones_like(x)

    expected = ancestral.sample(small_variance, noise, temperature=0.7)
    torch.testing.assert_close(solver.sample(small_variance, noise, temperature=0.7), expected)


def test_a_tau_whose_square_is_zero_is_zero():
    tiny, none = (logsnr(8, "2m", tau) for tau in (1e-170, 0.0))
    for name in ("keep", "gain", "std"):
        np.testing.assert_array_equal(getattr(tiny, name), getattr(none, name))


def test_the_noise_of_a_deterministic_solver_is_its_start_alone():
    noise = torch.from_numpy(np.random.RandomState(3).standard_normal((9, 11, 1)))
    solver = logsnr(10, "2m")
    other = noise.clone()
    other[:, 1:] = 0
    one, two = (solver.sample(EARLY.head(solver), drawn) for drawn in (noise, other))
    assert torch.equal(one, two)


def test_one_timestep_predicts_x_0_at_once():
    noise = torch.ones(1, 2, 1)
    for name in ("ddim", "2m"):
        solver = create_solver([500], name)
        exact, _ = EARLY.moments(float(ABAR[500]), noise[:, 0, 0])
        sampled = solver.sample(EARLY.head(solver), noise)
        torch.testing.assert_close(sampled[:, 0], exact, rtol=1e-5, atol=1e-5)


def test_the_default_solver_is_the_process_itself():
    own, made = create_diffusion("100"), create_solver(create_diffusion("100").timestep_map)
    noise = torch.from_numpy(np.random.RandomState(4).standard_normal((5, 101, 1)))
    assert torch.equal(own.sample(EARLY.head(own), noise), made.sample(EARLY.head(made), noise))


def test_log_snr_timesteps_are_evenly_spaced_and_clipped_ones_distinct():
    kept = log_snr_timesteps(BETAS, 12, 950)
    assert (kept[0], kept[-1], len(kept)) == (0, 950, 12)
    steps = np.diff(0.5 * np.log(ABAR / (1 - ABAR))[kept])
    assert np.abs(steps[2:] / steps[2:].mean() - 1).max() < 0.1  # near 0 whole timesteps are coarse
    assert clip_timesteps(space_timesteps(1000, "50"), 950)[-2:] == [938, 950]
    assert len(clip_timesteps(space_timesteps(1000, "50"), 950)) == 48


def test_another_solver_is_named():
    with pytest.raises(ValueError, match="solver is 'heun'"):
        create_solver([0, 500], "heun")
