"""Noise schedules and respacing, in float64 numpy: no tensor, no device, known before any loop."""

import math
from collections.abc import Sequence

import numpy as np


def cosine_betas(num_steps: int, max_beta: float = 0.999) -> np.ndarray:
    """Cosine schedule (Nichol & Dhariwal 2021, eq. 17): abar(t) = cos^2((t + 0.008)/1.008 pi/2)."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    ratios = [alpha_bar((i + 1) / num_steps) / alpha_bar(i / num_steps) for i in range(num_steps)]
    return np.minimum(1.0 - np.array(ratios), max_beta)


def space_timesteps(num_steps: int, respacing: str) -> list[int]:
    """Ascending timesteps kept by `respacing` (Nichol & Dhariwal 2021, section 4).

    "" keeps all; "100" strides evenly from the first to the last; "10,20" splits the range into
    equal sections with that many steps each; "ddim50" takes every (num_steps/50)-th from 0, so that
    the last one, where the cosine schedule amplifies errors most, is left out.
    Raises ValueError if the numbers do not fit.
    """
    if not respacing:
        return list(range(num_steps))
    digits = respacing.removeprefix("ddim")
    if not all(part.isdigit() and int(part) > 0 for part in digits.split(",")):
        raise ValueError(
            f"num_sampling_steps is {respacing!r}; give a count such as '100', sections such as "
            "'10,20', or an even stride such as 'ddim50'"
        )
    if respacing.startswith("ddim"):
        for whole in range(1, num_steps + 1):
            if digits == str(len(range(0, num_steps, whole))):
                return list(range(0, num_steps, whole))
        raise ValueError(
            f"num_sampling_steps is {respacing!r}, but {digits} steps do not divide {num_steps} "
            "timesteps evenly: give a divisor"
        )
    counts = [int(part) for part in digits.split(",")]
    size, extra = divmod(num_steps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise ValueError(f"cannot take {count} timesteps from a section of {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):  # summed, not multiplied: the rounding of the published spacing
            kept.append(start + round(position))
            position += stride
        start += length
    return sorted(set(kept))


def clip_timesteps(kept: Sequence[int], first: int) -> list[int]:
    """Ascending timesteps with all above `first` replaced by it, duplicates dropped (DiSA's clip).

    The cosine schedule amplifies an error of epsilon 20,291 times at t = 999 and 13 times at 950.
    """
    return sorted({min(t, first) for t in kept})


def log_snr_timesteps(betas: np.ndarray, count: int, first: int) -> list[int]:
    """At most `count` ascending timesteps from 0 to `first`, evenly spaced in log(a / s).

    Rounded to whole timesteps of the process with these betas; duplicates, which occur near 0, are
    dropped.
    """
    abar = np.cumprod(1.0 - betas)
    log_snr = 0.5 * np.log(abar / (1.0 - abar))  # falls with t
    targets = np.linspace(log_snr[0], log_snr[first], count)
    exact = np.interp(-targets, -log_snr, np.arange(len(betas)))
    return sorted({int(t) for t in np.rint(exact)})


def coupling(fine_abar: np.ndarray, coarse_abar: np.ndarray) -> np.ndarray:
    """Weights (N + 1, T + 1) that make the noise of a coarse denoising run from that of a fine one.

    fine_abar (T,), coarse_abar (N,), N <= T: abar of the kept steps, ascending timesteps. Rows and columns
    are in the order of a run: initial noise, then that of each step; the last one is never read.

    With u = x a / s^2 an ancestral step is u_next = u + (q_next - q) x_0 + sqrt(q_next - q) noise, where
    q = a^2 / s^2: the noise is Brownian motion in q. So the noise of a step is that of the fine steps it
    covers, weighted by the square roots of their spans of q, and divided by that of its own. Boundaries
    of coarse steps are moved to the nearest fine ones, at least one fine step each: every row has
    norm 1 and no two rows share a column, so coarse noise is exactly standard normal and independent.
    """
    steps, coarse_steps = len(fine_abar), len(coarse_abar)
    log_q, coarse_log_q = (np.log(a / (1.0 - a))[::-1] for a in (fine_abar, coarse_abar))
    # In units of x_T: W(q) has variance q; log_q ascends, and span k leads to boundary k.
    q = np.exp(log_q)
    spans = np.diff(q, prepend=0.0)
    # A boundary leaves at least one fine step to each coarse one before and behind it.
    nearest = np.abs(coarse_log_q[:, None] - log_q).argmin(axis=1)
    bounds: list[int] = []
    for k, bound in enumerate(nearest):
        least = bounds[-1] + 1 if bounds else 0
        bounds.append(int(np.clip(bound, least, steps - coarse_steps + k)))
    weights = np.zeros((coarse_steps + 1, steps + 1))
    for k, (start, stop) in enumerate(zip([-1, *bounds], bounds, strict=False)):
        covered = spans[start + 1 : stop + 1]
        weights[k, start + 1 : stop + 1] = np.sqrt(covered / covered.sum())
    weights[-1, -1] = 1.0
    return weights
