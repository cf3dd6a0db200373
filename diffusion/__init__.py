"""Gaussian diffusion of one continuous token: schedules, training losses, ancestral sampling.

`create_diffusion("")` is the 1000-step process that trains the head; `create_diffusion("100")`
and `create_diffusion("ddim50")` are its respaced versions that sample.
"""

from diffusion.gaussian import GaussianDiffusion
from diffusion.schedule import cosine_betas, linear_betas, space_timesteps

__all__ = ["GaussianDiffusion", "create_diffusion"]

DIFFUSION_STEPS = 1000  # MAR, section 3.2


def create_diffusion(
    timestep_respacing: str = "",
    noise_schedule: str = "cosine",
    diffusion_steps: int = DIFFUSION_STEPS,
) -> GaussianDiffusion:
    """A diffusion process over all its steps, or over those that `timestep_respacing` keeps.

    Raises ValueError for an unknown schedule or a respacing that does not fit.
    """
    schedules = {"cosine": cosine_betas, "linear": linear_betas}
    if noise_schedule not in schedules:
        raise ValueError(f"noise_schedule is {noise_schedule!r}; use one of {sorted(schedules)}")
    betas = schedules[noise_schedule](diffusion_steps)
    kept = space_timesteps(diffusion_steps, timestep_respacing)
    return GaussianDiffusion(betas, kept)
