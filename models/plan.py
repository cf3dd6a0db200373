"""DecodingPlan: every count of a MAR sampling run, as Python integers, before the loop.

MAR decodes L tokens in a random order, a few per step. We keep the tokens *in decoding order*, so
that what is known is a prefix and what is decoded now is the slice behind it: no masks, no index
searches, static shapes per step.
"""

import math
from dataclasses import dataclass
from numbers import Integral

from models.order import OrderConfig

CFG_SCHEDULES = ("linear", "constant")


@dataclass(frozen=True)
class DecodingStep:
    """One step that predicts positions start..stop of the decoding order.

    index: the step s of T; previous: where the step before started, so that positions
    previous..start were decoded by it; cfg: guidance of this step; guided: whether it has an
    unconditional branch.
    """

    index: int
    previous: int
    start: int
    stop: int
    cfg: float
    guided: bool


@dataclass(frozen=True)
class DecodingPlan:
    """The steps of one run over `seq_len` tokens; `num_iter` is T, `steps` those that predict.

    guided: whether any step has an unconditional branch.
    """

    seq_len: int
    num_iter: int
    guided: bool
    steps: tuple[DecodingStep, ...]

    @classmethod
    def create(
        cls,
        seq_len: int,
        num_iter: int,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        *,
        guidance_start: float = 0.0,
        order: OrderConfig | None = None,
        known: int = 0,
    ) -> "DecodingPlan":
        """The counts of an order (None: MAR's random order) with MAR's guidance schedule.

        guidance_start: steps before this progress s/T are not guided. known: tokens that are known from
        the beginning; the run then starts at the step that predicts the next one, with the counts of
        the random order: stage boundaries are ignored. Where T exceeds L some steps predict nothing;
        they are left out.
        Raises ValueError for num_iter < 1 or an unknown schedule.
        """
        whole = isinstance(num_iter, Integral) and not isinstance(num_iter, bool)
        if not whole or num_iter < 1:
            raise ValueError(f"num_iter is {num_iter!r}; it must be a whole number of at least 1")
        if not math.isfinite(cfg):
            raise ValueError(f"cfg is {cfg}; it must be a finite number")
        if cfg_schedule not in CFG_SCHEDULES:
            raise ValueError(f"cfg_schedule is {cfg_schedule!r}; use one of {CFG_SCHEDULES}")
        steps: list[DecodingStep] = []
        start = previous = known
        counted = order if order and not known else OrderConfig()
        for s, left in enumerate(counted.masked_after(seq_len, num_iter)):
            step_cfg = cfg
            if cfg_schedule == "linear":  # at the last step, too, with one token left
                step_cfg = 1 + (cfg - 1) * (seq_len - max(1, left)) / seq_len
            guided = cfg != 1.0 and s / num_iter >= guidance_start
            stop = seq_len - left
            if stop > start:
                step_cfg = step_cfg if guided else 1.0
                steps.append(DecodingStep(s, previous, start, stop, step_cfg, guided))
                previous, start = start, stop
        return cls(seq_len, num_iter, any(step.guided for step in steps), tuple(steps))
