"""DecodingPlan: every count of a MAR sampling run, as Python integers, before the loop.

MAR decodes L tokens in a random order, a few per step. We keep the tokens *in decoding order*, so
that what is known is a prefix and what is decoded now is the slice behind it: no masks, no index
searches, static shapes per step.
"""

import math
import operator
from dataclasses import dataclass

CFG_SCHEDULES = ("linear", "constant")


@dataclass(frozen=True)
class DecodingStep:
    """One step that predicts ranks start..stop of the decoding order.

    index: the step s of T; previous: where the step before started, so that ranks
    previous..start were decoded by it; cfg: guidance of this step.
    """

    index: int
    previous: int
    start: int
    stop: int
    cfg: float


@dataclass(frozen=True)
class DecodingPlan:
    """The steps of one run over `seq_len` tokens; `num_iter` is T, `steps` those that predict.

    guided: whether there is an unconditional branch.
    """

    seq_len: int
    num_iter: int
    guided: bool
    steps: tuple[DecodingStep, ...]

    @classmethod
    def create(
        cls, seq_len: int, num_iter: int, cfg: float = 1.0, cfg_schedule: str = "linear"
    ) -> "DecodingPlan":
        """Cosine masking (MaskGIT's schedule, as in MAR's code) with its guidance schedule.

        After step s, floor(L cos(pi/2 (s+1)/T)) tokens stay masked: at least 1, at most one fewer
        than before, and 0 after the last. Where T exceeds L some steps predict nothing; they are left out.
        Raises ValueError for num_iter < 1 or an unknown schedule.
        """
        if isinstance(num_iter, bool) or operator.index(num_iter) < 1:
            raise ValueError(f"num_iter is {num_iter!r}; it must be a whole number of at least 1")
        if not math.isfinite(cfg):
            raise ValueError(f"cfg is {cfg}; it must be a finite number")
        if cfg_schedule not in CFG_SCHEDULES:
            raise ValueError(f"cfg_schedule is {cfg_schedule!r}; use one of {CFG_SCHEDULES}")
        steps: list[DecodingStep] = []
        masked = seq_len
        for s in range(num_iter):
            left = math.floor(seq_len * math.cos(math.pi / 2 * (s + 1) / num_iter))
            left = max(1, min(masked - 1, left))
            step_cfg = cfg
            if cfg_schedule == "linear":
                step_cfg = 1 + (cfg - 1) * (seq_len - left) / seq_len
            if s == num_iter - 1:
                left = 0
            if left < masked:
                start = seq_len - masked
                previous = steps[-1].start if steps else 0
                steps.append(DecodingStep(s, previous, start, seq_len - left, step_cfg))
            masked = left
        return cls(seq_len, num_iter, cfg != 1.0, tuple(steps))
