"""Noise schedules and respacing, in float64 numpy: no tensor, no device, known before any loop."""

import math

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
        for stride in range(1, num_steps + 1):
            if digits == str(len(range(0, num_steps, stride))):
                return list(range(0, num_steps, stride))
        raise ValueError(
            f"no whole stride over {num_steps} steps gives {digits} of them ({respacing!r})"
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
