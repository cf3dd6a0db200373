"""DDIM and second-order multistep sampling between any timesteps: one affine update per step.

With signal a = sqrt(abar), noise s = sqrt(1 - abar), log-SNR l = log(a / s) and h = l_next - l, a step
leads from x_t to

    x_next = (s_next / s) e^(-tau^2 h) x_t + a_next (1 - e^(-(1 + tau^2) h)) D
             + s_next sqrt(1 - e^(-2 tau^2 h)) noise

D is the predicted x_0, or of order 2 its extrapolation from the step before, x_0 + (x_0 - before) / (2 r)
with r = h_before / h, but for the first and the last step. Order 1: tau = 0 is DDIM (Song et al. 2021),
tau = 1 is ancestral sampling with the posterior's variance. Order 2: DPM-Solver++(2M) and its SDE form
(Lu et al. 2022); tau between is SA-Solver's family (Xue et al. 2023).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion.gaussian import EpsilonModel


class MultistepSolver:
    """Samples as GaussianDiffusion does, without its learned variance; all tables float64.

    Attributes: `timestep_map` (step -> timestep of the full process), `alphas_cumprod` of the kept
    steps, `num_timesteps`.
    """

    def __init__(self, betas: np.ndarray, kept: Sequence[int], order: int, tau: float) -> None:
        """betas of the full process; kept: ascending timesteps; order 1 or 2; tau >= 0."""
        self.timestep_map = list(kept)
        self.num_timesteps = len(self.timestep_map)
        self.alphas_cumprod = np.cumprod(1.0 - betas)[self.timestep_map]
        signal, noise = np.sqrt(self.alphas_cumprod), np.sqrt(1.0 - self.alphas_cumprod)
        self.to_x0 = 1.0 / signal, noise / signal  # x_0 = x / a - (s / a) epsilon
        # Step i leads from i to i - 1; step 0 to x_0 itself, where s = 0 and h is infinite.
        h = np.append(np.inf, -np.diff(np.log(signal / noise)))
        next_signal, next_noise = np.append(1.0, signal[:-1]), np.append(0.0, noise[:-1])
        noisy = tau**2 > 0  # where it is 0, 0 * h is NaN at the last step
        self.keep = next_noise / noise * (np.exp(-(tau**2) * h) if noisy else 1.0)
        self.gain = next_signal * (1.0 - np.exp(-(1.0 + tau**2) * h))
        self.std = next_noise * np.sqrt(1.0 - np.exp(-2.0 * tau**2 * h)) if noisy else 0.0 * noise
        self.extrapolation = np.zeros(self.num_timesteps)
        if order == 2:  # h / (2 h_before)
            self.extrapolation[1:-1] = h[1:-1] / (2.0 * h[2:])

    @torch.no_grad()
    def sample(self, model: EpsilonModel, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """noise (n, num_timesteps + 1, C) -> x_0 (n, C) float32; arguments as GaussianDiffusion.sample.

        The variance fraction is not read. tau = 0 reads noise[:, 0] alone.
        """
        x, before = noise[:, 0], noise[:, 0]
        for k, i in enumerate(reversed(range(self.num_timesteps))):
            epsilon, _ = model(i, x)
            x0 = float(self.to_x0[0][i]) * x - float(self.to_x0[1][i]) * epsilon
            aim = x0
            if self.extrapolation[i]:
                aim = x0 + float(self.extrapolation[i]) * (x0 - before)
            x = float(self.keep[i]) * x + float(self.gain[i]) * aim
            if self.std[i]:
                x = x + (float(self.std[i]) * temperature) * noise[:, 1 + k]
            before = x0
        return x
