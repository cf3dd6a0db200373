"""Gaussian diffusion of one continuous token: schedules, training losses, ancestral sampling.

`create_diffusion("")` is the 1000-step process that trains the head; `create_diffusion("100")`
and `create_diffusion("ddim50")` are its respaced versions that sample. `create_solver` makes other
samplers of the same process.
"""

from collections.abc import Sequence

from diffusion.gaussian import GaussianDiffusion
from diffusion.schedule import cosine_betas, space_timesteps
from diffusion.solvers import MultistepSolver

__all__ = ["GaussianDiffusion", "MultistepSolver", "create_diffusion", "create_solver"]

DIFFUSION_STEPS = 1000  # MAR's code, diffusion/__init__.py


def create_diffusion(timestep_respacing: str | int = "") -> GaussianDiffusion:
    """The cosine process over all its steps, or over those that `timestep_respacing` keeps.

    Raises ValueError for a respacing that does not fit.
    """
    kept = space_timesteps(DIFFUSION_STEPS, str(timestep_respacing))
    return GaussianDiffusion(cosine_betas(DIFFUSION_STEPS), kept)


def create_solver(
    kept: Sequence[int], solver: str = "ancestral", tau: float = 0.0
) -> GaussianDiffusion | MultistepSolver:
    """A sampler over these ascending timesteps: ancestral (learned variance), ddim or 2m, with tau.

    Raises ValueError for another name.
    """
    betas = cosine_betas(DIFFUSION_STEPS)
    if solver == "ancestral":
        return GaussianDiffusion(betas, kept)
    if solver not in ("ddim", "2m"):
        raise ValueError(f"solver is {solver!r}; use ancestral, ddim or 2m")
    return MultistepSolver(betas, kept, order=2 if solver == "2m" else 1, tau=tau)
