"""Schedule of the diffusion head: number of denoising steps, timesteps, solver, guidance.

Everything is known before the first step. `HeadConfig()` is MAR's published sampling.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

import numpy as np
from torch import Tensor

from diffusion import DIFFUSION_STEPS, create_solver
from diffusion.gaussian import EpsilonModel
from diffusion.schedule import (
    clip_timesteps,
    cosine_betas,
    coupling,
    log_snr_timesteps,
    space_timesteps,
)
from models.plan import DecodingPlan
from util.config import setting

# Share of the way from the last number of steps to the first, at progress 0..1 of decoding (DiSA).
ANNEALINGS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "two_stage": lambda progress: float(progress < 0.5),
    "constant": lambda progress: 1.0,
}
SPACINGS = ("uniform", "logsnr")
SOLVERS = ("ancestral", "ddim", "2m")
# Different numbers of denoising steps in an annealed run: each has its own tables and CUDA graphs.
LEVELS = 8


class Solver(Protocol):
    """A denoising run over `num_timesteps` timesteps of the 1000-step process, `timestep_map`."""

    timestep_map: list[int]
    num_timesteps: int
    alphas_cumprod: np.ndarray

    def sample(self, model: EpsilonModel, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """noise (n, num_timesteps + 1, C) -> x_0 (n, C)."""


def parse_interval(text: str) -> tuple[int, int]:
    """Two timesteps: 225,807 is (225, 807)."""
    try:
        low, high = (int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text!r} is not an interval like 225,807") from error
    return low, high


@dataclass(frozen=True)
class HeadConfig:
    """How the diffusion head samples and is guided; the defaults are MAR's.

    steps: denoising steps of a token: a number, or (first, last) annealed over the decoding steps
        (DiSA, arXiv 2505.20297, has 50 and 5); None is the model's own number and its own timesteps.
    annealing: one of ANNEALINGS; the numbers between are rounded to one of LEVELS.
    t_start: timesteps above it, of 0..999, are replaced by it and duplicates dropped (DiSA: 950 for
        ancestral steps, 980 for ddim); None is the model's own first timestep.
    spacing: of the timesteps, uniform or logsnr (evenly in the logarithm of the signal-to-noise ratio).
    solver: ancestral (learned variance), ddim, or 2m (second order, wants logsnr).
    tau: noise of ddim and 2m, from 0 (none) to 1 (that of ancestral steps); ancestral does not read it.
    guidance_start: decoding steps before this progress s/T are not guided; transformer and head then
        compute the conditional branch alone. The first step has progress 0: of a single decoding step,
        nothing is guided.
    guidance_interval: denoising steps at timesteps outside (low, high) are not guided (Kynkaanniemi et
        al. 2024).
    """

    steps: int | tuple[int, int] | None = None
    annealing: str = setting(
        "linear",
        "how the number of denoising steps falls over decoding",
        flag="diff_annealing_strategy",
        choices=tuple(ANNEALINGS),
    )
    t_start: int | None = setting(
        None,
        "highest timestep used, e.g. 950 for few steps; default: the model's",
        flag="diff_t_start",
    )
    spacing: str = setting(
        "uniform", "spacing of the head's timesteps", flag="diff_spacing", choices=SPACINGS
    )
    solver: str = setting("ancestral", "solver of the head", flag="diff_sampler", choices=SOLVERS)
    tau: float = setting(0.0, "noise of ddim and 2m: 0 none, 1 full", flag="diff_tau")
    guidance_start: float = setting(0.0, "progress before which there is no guidance")
    guidance_interval: tuple[int, int] = setting(
        (0, DIFFUSION_STEPS),
        "timesteps of the head that are guided",
        parse=parse_interval,
        metavar="LOW,HIGH",
    )

    def __post_init__(self) -> None:
        choices = {"annealing": tuple(ANNEALINGS), "spacing": SPACINGS, "solver": SOLVERS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {', '.join(known)}")
        if self.steps is not None:
            ends = self.steps if isinstance(self.steps, tuple) else (self.steps, self.steps)
            if not (_two_whole(ends) and 2 <= ends[1] <= ends[0] <= DIFFUSION_STEPS):
                raise ValueError(
                    f"steps is {self.steps!r}; give a number of denoising steps from 2 to "
                    f"{DIFFUSION_STEPS}, or (first, last) with first >= last"
                )
        start = 1 if self.t_start is None else self.t_start
        if not (isinstance(start, Integral) and 1 <= start < DIFFUSION_STEPS):
            raise ValueError(
                f"t_start is {start!r}; it must be a whole number in 1..{DIFFUSION_STEPS - 1}"
            )
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau is {self.tau}; it must be in [0, 1]")
        if not 0 <= self.guidance_start <= 1:
            raise ValueError(f"guidance_start is {self.guidance_start}; it must be in [0, 1]")
        ends = self.guidance_interval
        if not (_two_whole(ends) and 0 <= ends[0] < ends[1] <= DIFFUSION_STEPS):
            raise ValueError(
                f"guidance_interval is {ends}; give two timesteps, ascending, in 0..{DIFFUSION_STEPS}"
            )
        object.__setattr__(self, "guidance_interval", tuple(ends))

    def steps_at(self, index: int, num_iter: int, own: int) -> int:
        """Denoising steps of decoding step `index` of num_iter, before the clip; own: the model's."""
        if not isinstance(self.steps, tuple):
            return own if self.steps is None else self.steps
        first, last = self.steps
        progress = index / max(1, num_iter - 1)
        exact = last + int(ANNEALINGS[self.annealing](progress) * (first - last))
        levels = {round(last + (first - last) * k / (LEVELS - 1)) for k in range(LEVELS)}
        return min(levels, key=lambda level: (abs(level - exact), level))


def _two_whole(ends: object) -> bool:
    """Whether these are two whole numbers."""
    if not isinstance(ends, (tuple, list)) or len(ends) != 2:
        return False
    return all(isinstance(end, Integral) for end in ends)


@dataclass(frozen=True, eq=False)
class DenoisingRun:
    """One denoising run. Runs with the same number of steps are the same run.

    guided: whether step i = N-1 .. 0 has both branches, if its decoding step is guided.
    coupling: (N + 1, T + 1) weights from the image's noise to that of the run; None: no change.
    """

    solver: Solver
    guided: tuple[bool, ...]
    coupling: np.ndarray | None = None

    @property
    def num_steps(self) -> int:
        return self.solver.num_timesteps


def denoising_runs(
    config: HeadConfig | None, own: Solver, plan: DecodingPlan
) -> tuple[DenoisingRun, ...]:
    """The run of each step of the plan, where the model itself samples with `own`.

    ValueError for more denoising steps than the model has.
    """
    config = config or HeadConfig()
    betas = cosine_betas(DIFFUSION_STEPS)
    runs: dict[int, DenoisingRun] = {}  # number of steps before the clip -> run
    by_length: dict[int, DenoisingRun] = {}
    chosen = []
    for step in plan.steps:
        count = config.steps_at(step.index, plan.num_iter, own.num_timesteps)
        if count not in runs:
            solver = _solver(config, own, betas, count)
            if solver.num_timesteps > own.num_timesteps:  # an image has noise for the model's steps
                raise ValueError(
                    f"{count} denoising steps exceed the model's {own.num_timesteps} "
                    f"(num_sampling_steps): use at most {own.num_timesteps}"
                )
            run = by_length.setdefault(solver.num_timesteps, _run(config, own, solver))
            runs[count] = run
        chosen.append(runs[count])
    return tuple(chosen)


def _solver(config: HeadConfig, own: Solver, betas: np.ndarray, count: int) -> Solver:
    """`own`, or a solver of `count` steps without duplicate timesteps."""
    first = own.timestep_map[-1] if config.t_start is None else config.t_start
    if config.spacing == "logsnr":
        kept = log_snr_timesteps(betas, count, first)
    elif config.steps is None:
        kept = clip_timesteps(own.timestep_map, first)
    else:
        kept = clip_timesteps(space_timesteps(DIFFUSION_STEPS, str(count)), first)
    if config.solver == "ancestral" and kept == own.timestep_map:
        return own
    return create_solver(kept, config.solver, config.tau)


def _run(config: HeadConfig, own: Solver, solver: Solver) -> DenoisingRun:
    low, high = config.guidance_interval
    guided = tuple(low <= t <= high for t in solver.timestep_map)
    same = solver.timestep_map == own.timestep_map
    return DenoisingRun(
        solver, guided, None if same else coupling(own.alphas_cumprod, solver.alphas_cumprod)
    )
