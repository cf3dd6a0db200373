"""Epsilon-predicting Gaussian diffusion with learned-range variance: losses and posterior.

Training: MSE on epsilon plus the variational bound on a detached mean (Nichol & Dhariwal 2021).
Sampling: ancestral DDPM over the kept timesteps, as one affine update per step.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

EpsilonModel = Callable[[int, Tensor], tuple[Tensor, Tensor]]

_BY_TIMESTEP = (
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_log_variance",
    "log_betas",
    "posterior_mean_coef_x0",
    "posterior_mean_coef_xt",
)


class GaussianDiffusion:
    """The process over `kept` timesteps of a schedule with the given betas; all tables float64.

    Attributes: `timestep_map` (step -> timestep of the full process), `betas` of the kept steps,
    `num_timesteps`.
    """

    def __init__(self, betas: np.ndarray, kept: Sequence[int]) -> None:
        full_bar = np.cumprod(1.0 - betas)
        self.timestep_map = list(kept)
        abar = full_bar[self.timestep_map]
        abar_prev = np.append(1.0, abar[:-1])
        self.betas = 1.0 - abar / abar_prev
        self.num_timesteps = len(self.timestep_map)

        self.alphas_cumprod = abar
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / abar)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / abar - 1.0)
        posterior_variance = self.betas * (1.0 - abar_prev) / (1.0 - abar)
        # The variance of step 0 is 0; its logarithm is clipped to that of step 1.
        # (A single step adds no noise, so its variance is never asked for.)
        clipped = np.append(posterior_variance[1:2], posterior_variance[1:])
        self.posterior_log_variance = np.log(clipped if self.num_timesteps > 1 else self.betas)
        self.log_betas = np.log(self.betas)
        self.posterior_mean_coef_x0 = self.betas * np.sqrt(abar_prev) / (1.0 - abar)
        self.posterior_mean_coef_xt = (1.0 - abar_prev) * np.sqrt(1.0 - self.betas) / (1.0 - abar)
        # Training gathers rows of these by timestep; float32 copies are made once per device.
        self._training_tables = {
            "sqrt_alphas_cumprod": np.sqrt(abar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - abar),
            "timesteps": np.array(self.timestep_map),
            **{name: value for name, value in vars(self).items() if name in _BY_TIMESTEP},
        }
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; x_start (n, C), t (n,) int64."""
        signal = self._rows("sqrt_alphas_cumprod", t)
        return signal * x_start + self._rows("sqrt_one_minus_alphas_cumprod", t) * noise

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Per-row terms "mse", "vb" (bits) and their sum "loss", each (n,).

        model(x_t, timesteps, **model_kwargs) -> (n, 2C), epsilon and variance fraction; x_start
        (n, C); t (n,) int64 steps of this process.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        timesteps = self._rows("timesteps", t)[:, 0]
        epsilon, fraction = model(x_t, timesteps, **(model_kwargs or {})).float().chunk(2, dim=-1)
        mse = (noise - epsilon).square().mean(dim=-1)
        vb = self._variational_bound(x_start, x_t, t, epsilon.detach(), fraction)
        return {"mse": mse, "vb": vb, "loss": mse + vb}

    def _variational_bound(
        self, x_start: Tensor, x_t: Tensor, t: Tensor, epsilon: Tensor, fraction: Tensor
    ) -> Tensor:
        """Bits per dimension of one step: KL to the posterior, or the likelihood of x_0 at t = 0."""
        coef_x0 = self._rows("posterior_mean_coef_x0", t)
        coef_xt = self._rows("posterior_mean_coef_xt", t)
        true_mean = coef_x0 * x_start + coef_xt * x_t
        x0 = self._rows("sqrt_recip_alphas_cumprod", t) * x_t
        x0 = x0 - self._rows("sqrt_recipm1_alphas_cumprod", t) * epsilon
        mean = coef_x0 * x0 + coef_xt * x_t

        true_log_variance = self._rows("posterior_log_variance", t)
        upper = self._rows("log_betas", t)
        share = (fraction + 1.0) / 2.0
        log_variance = share * upper + (1.0 - share) * true_log_variance

        kl = 0.5 * (
            log_variance
            - true_log_variance
            - 1.0
            + (true_log_variance - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )
        likelihood = _discretized_log_likelihood(x_start, mean, 0.5 * log_variance)
        bound = torch.where(t == 0, -likelihood.mean(dim=-1), kl.mean(dim=-1))
        return bound / math.log(2.0)

    def _rows(self, name: str, t: Tensor) -> Tensor:
        """The table's entries at t (n,) as a float32 column (n, 1) on t's device."""
        key = (name, t.device)
        if key not in self._on_device:
            table = torch.from_numpy(self._training_tables[name]).float()
            self._on_device[key] = table.to(t.device)
        return self._on_device[key][t, None]

    @torch.no_grad()
    def sample(self, model: EpsilonModel, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Ancestral DDPM without clipping: noise (n, num_timesteps + 1, C) -> x_0 (n, C) float32.

        noise[:, 0] is x_T and noise[:, 1 + k] the noise of the k-th denoising step; none is added
        at the last one. model(i, x_t (n, C)) -> (epsilon (n, C), variance fraction (n, C)) at step
        i = num_timesteps - 1 .. 0 of this process.
        """
        # mean = coef_x0 * x0(x_t, eps) + coef_xt * x_t, gathered by x_t and eps in float64.
        coef_eps = self.posterior_mean_coef_x0 * self.sqrt_recipm1_alphas_cumprod
        coef_x = self.posterior_mean_coef_x0 * self.sqrt_recip_alphas_cumprod
        coef_x = coef_x + self.posterior_mean_coef_xt
        lower, upper = self.posterior_log_variance, self.log_betas
        x = noise[:, 0]
        for k, i in enumerate(reversed(range(self.num_timesteps))):
            epsilon, fraction = model(i, x)
            x = float(coef_x[i]) * x - float(coef_eps[i]) * epsilon
            if i > 0:
                # std = exp(log_variance / 2), log_variance between lower and upper by (fraction+1)/2
                middle, half = (upper[i] + lower[i]) / 4, (upper[i] - lower[i]) / 4
                std = (float(half) * fraction + float(middle)).exp()
                x = x + std * (noise[:, 1 + k] * temperature)
        return x


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log P(x) of a Gaussian binned to 1/255 on [-1, 1] (Ho et al. 2020, eq. 13), elementwise."""

    def cdf(value: Tensor) -> Tensor:
        # tanh approximation of the normal CDF, as published
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    inverse_std = (-log_std).exp()
    upper = cdf(inverse_std * (x - mean + 1.0 / 255.0))
    lower = cdf(inverse_std * (x - mean - 1.0 / 255.0))
    floor = 1e-12
    inside = (upper - lower).clamp(min=floor).log()
    at_top = (1.0 - lower).clamp(min=floor).log()
    at_bottom = upper.clamp(min=floor).log()
    return torch.where(x < -0.999, at_bottom, torch.where(x > 0.999, at_top, inside))
