"""Gaussian diffusion of one continuous token: schedules, training losses, ancestral sampling.

`create_diffusion("")` is the 1000-step process that trains the head; `create_diffusion("100")`
and `create_diffusion("ddim50")` are its respaced versions that sample.
"""

from diffusion.gaussian import GaussianDiffusion
from diffusion.schedule import cosine_betas, space_timesteps

__all__ = ["GaussianDiffusion", "create_diffusion"]

DIFFUSION_STEPS = 1000  # MAR's code, diffusion/__init__.py


def create_diffusion(timestep_respacing: str | int = "") -> GaussianDiffusion:
    """The cosine process over all its steps, or over those that `timestep_respacing` keeps.

    Raises ValueError for a respacing that does not fit.
    """
    kept = space_timesteps(DIFFUSION_STEPS, str(timestep_respacing))
    return GaussianDiffusion(cosine_betas(DIFFUSION_STEPS), kept)
