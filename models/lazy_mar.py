"""LazyMAR (Yan et al., ICCV 2025): which steps compute what. Integers only; tensors live elsewhere.

Tokens decoded long ago and tokens still masked hardly change between decoding steps (token cache),
nor does the difference between the two guidance branches (condition cache); inside a denoising run,
blocks of the head hardly change between neighbouring steps (head cache). A *refresh* step computes
everything and fills the caches, a *lazy* step reads them.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral
from typing import Any

from models.plan import DecodingPlan
from util.config import setting

# Keep ratio from a progress s/T on; the published table of 64 steps, written as progress.
KEEP_SCHEDULE = (
    (0.0, 1.0),
    (20 / 64, 0.6),
    (21 / 64, 0.5),
    (25 / 64, 0.4),
    (30 / 64, 0.15),
    (35 / 64, 0.12),
    (40 / 64, 0.05),
)

CACHES = ("token", "condition", "head")
# Which positions a lazy step also computes behind the probe layer. similarity is the paper's choice; the
# others are controls: the least changed, those not computed for longest, random ones.
TOKEN_SELECTIONS = ("similarity", "inverse_similarity", "oldest", "random")
LAZY_STEPS = ("probe", "local")


def parse_keep(text: str) -> tuple[tuple[float, float], ...]:
    """Pairs of progress and ratio: 0:1,0.5:0.05 is ((0.0, 1.0), (0.5, 0.05))."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((float(progress), float(ratio)) for progress, ratio in pairs)
    except ValueError as error:
        example = "0:1,0.3125:0.6,0.625:0.05"
        raise ValueError(f"{text!r} is not a schedule like {example}") from error


def parse_blocks(text: str) -> tuple[int, ...]:
    """Numbers of blocks: 1,2,3 is (1, 2, 3), nothing is ()."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"{text!r} is not a list of blocks like 1,2,3") from error


def parse_progress(text: str) -> tuple[float, ...]:
    """Shares of the decoding steps: 0,0.25 is (0.0, 0.25)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text!r} is not a list of shares like 0,0.25,0.5") from error


@dataclass(frozen=True)
class LazyMARConfig:
    """Constants of LazyMAR; the defaults are the published ones.

    warmup, interval: step s is a refresh if s < warmup or (s - warmup) % interval == 0.
    refresh_steps: instead of these two, the progress s/T of each refresh, such as an offline calibration
        finds (not in the paper).
    lazy_step: probe, the paper's, or local: every decoder layer computes only the positions decoded in
        this step and in the previous one, and the buffer (ReCAP, arXiv 2505.19089).
    buffer_refresh: lazy steps recompute the buffer; without, it stays as the last refresh left it.
    probe_layer: the decoder layer whose values tell which positions changed; all are computed up
        to it, only the kept ones behind it.
    keep: (progress, ratio) pairs; from progress s/T on, at least this share of all positions is kept.
    keep_floor: positions kept in addition to those decoded in this step and in the previous one.
    token_selection: how they are selected, one of TOKEN_SELECTIONS.
    token_cache, condition_cache, head_cache: switches; without a cache its part is computed exactly.
    head_interval: denoising step i is full if i is the first one or i % head_interval == 0. It counts
        steps of the model's own number; shorter runs divide it in proportion and round down, so that at
        1 all steps are full.
    head_skip: head blocks (from 0) that other denoising steps replace by their last change.
    head_warm: while more than this share of the denoising steps is left, steps that are not full
        recompute the MLPs of the blocks that they do not skip.
    head_reuse_adaln: such steps also take the last full step's modulations (not in the paper).
    forecast_order: 0 reuses the last change of skipped blocks and the last guidance residual; 1
        extrapolates them linearly from the last two full steps (TaylorSeer, arXiv 2503.06923).
    """

    warmup: int = setting(5, "refresh steps at the beginning")
    interval: int = setting(9, "steps from one refresh to the next")
    probe_layer: int = setting(3, "decoder layer that tells which tokens changed")
    keep_floor: int = setting(15, "positions kept in addition to those being decoded")
    keep: tuple[tuple[float, float], ...] = setting(
        KEEP_SCHEDULE,
        "from progress P on, keep at least the share R of all positions",
        parse=parse_keep,
        metavar="P:R,...",
    )
    token_selection: str = setting(
        "similarity", f"which positions are kept: {', '.join(TOKEN_SELECTIONS)}", metavar="NAME"
    )
    token_cache: bool = setting(True, "compute only tokens that changed")
    condition_cache: bool = setting(True, "unconditional branch = conditional + cached residual")
    head_cache: bool = setting(True, "cache blocks inside the diffusion head")
    head_interval: int = setting(7, "every N-th denoising step evaluates the head in full")
    head_skip: tuple[int, ...] = setting(
        (1, 2, 3, 4), "head blocks skipped in between", parse=parse_blocks, metavar="I,..."
    )
    head_warm: float = setting(
        0.9, "while more than this share of steps is left, recompute MLPs of unskipped blocks"
    )
    head_reuse_adaln: bool = setting(False, "reuse modulations too (not in the paper)")
    refresh_steps: tuple[float, ...] | None = setting(
        None,
        "progress s/T of each refresh, instead of warmup and interval",
        parse=parse_progress,
        metavar="P,...",
    )
    lazy_step: str = setting(
        "probe", "what lazy steps compute: probe (the paper's) or local", choices=LAZY_STEPS
    )
    buffer_refresh: bool = setting(True, "recompute the buffer in lazy steps")
    forecast_order: int = setting(
        0, "extrapolate the head's cache: 0 reuses it, 1 linearly", least=0, most=1
    )

    def __post_init__(self) -> None:
        least = {"warmup": 0, "interval": 1, "probe_layer": 0, "keep_floor": 0, "head_interval": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < smallest:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from {smallest}")
        object.__setattr__(self, "keep", tuple((float(p), float(r)) for p, r in self.keep))
        if not all(isinstance(block, Integral) for block in self.head_skip):
            raise ValueError(f"head_skip is {self.head_skip}; give the numbers of head blocks")
        object.__setattr__(self, "head_skip", tuple(sorted({int(b) for b in self.head_skip})))
        progress = [p for p, _ in self.keep]
        ascending = all(earlier < later for earlier, later in pairwise(progress))
        if not progress or progress[0] != 0 or not ascending:
            raise ValueError(f"keep has progress {progress}; it must ascend from 0")
        if not all(0 < ratio <= 1 for _, ratio in self.keep):
            raise ValueError(f"keep has ratios {[r for _, r in self.keep]}; each must be in (0, 1]")
        if self.token_selection not in TOKEN_SELECTIONS:
            raise ValueError(
                f"token_selection is {self.token_selection!r}; use one of {', '.join(TOKEN_SELECTIONS)}"
            )
        if self.lazy_step not in LAZY_STEPS:
            raise ValueError(f"lazy_step is {self.lazy_step!r}; use one of {', '.join(LAZY_STEPS)}")
        if self.forecast_order not in (0, 1):
            raise ValueError(f"forecast_order is {self.forecast_order!r}; it must be 0 or 1")
        if self.refresh_steps is not None:
            steps = tuple(sorted({float(p) for p in self.refresh_steps}))
            if not all(0 <= p < 1 for p in steps):
                raise ValueError(f"refresh_steps are {steps}; each is a progress in [0, 1)")
            object.__setattr__(self, "refresh_steps", steps)
        if any(block < 0 for block in self.head_skip):
            raise ValueError(f"head_skip is {self.head_skip}; head blocks count from 0")
        if not 0 <= self.head_warm <= 1:
            raise ValueError(f"head_warm is {self.head_warm}; it must be in [0, 1]")

    @classmethod
    def from_argument(cls, lazy_mar: "LazyMARConfig | bool | None") -> "LazyMARConfig | None":
        """The argument of sample_tokens: None or False is plain, True the published defaults."""
        if lazy_mar is None or lazy_mar is False:
            return None
        if lazy_mar is True:
            return cls()
        if not isinstance(lazy_mar, cls):
            raise ValueError(f"lazy_mar is {lazy_mar!r}; give a LazyMARConfig, True, False or None")
        return lazy_mar

    def with_caches(self, names: Collection[str]) -> "LazyMARConfig":
        """The same constants with these of CACHES on, and the others off."""
        switches: dict[str, Any] = {f"{name}_cache": name in names for name in CACHES}
        return replace(self, **switches)

    def is_refresh(self, index: int, num_iter: int) -> bool:
        """Whether step `index` of num_iter computes everything."""
        if self.refresh_steps is not None:
            last = num_iter - 1  # the step of a progress that rounds up to the end
            return index in {min(last, round(p * num_iter)) for p in self.refresh_steps}
        return index < self.warmup or (index - self.warmup) % self.interval == 0

    def keep_ratio(self, index: int, num_iter: int) -> float:
        """The keep schedule at progress index / num_iter."""
        return [ratio for progress, ratio in self.keep if index / num_iter >= progress][-1]

    def is_full(self, i: int, num_steps: int, own_steps: int | None = None) -> bool:
        """Whether denoising step i = num_steps-1 .. 0 computes both branches through all blocks.

        own_steps: the model's number of denoising steps, if this run has another.
        """
        interval = max(1, self.head_interval * num_steps // (own_steps or num_steps))
        return i == num_steps - 1 or i % interval == 0

    def head_kinds(self, guided: Sequence[bool], own_steps: int) -> list[str]:
        """What each denoising step i does: full, or lazily warm or cold.

        guided: of step i. The first guided step is full, for its residual.
        """
        steps = len(guided)
        kinds = ["warm" if self.is_warm(i, steps) else "cold" for i in range(steps)]
        for i in range(steps):
            first_guided = i < steps - 1 and guided[i] and not guided[i + 1]
            if first_guided or self.is_full(i, steps, own_steps):
                kinds[i] = "full"
        return kinds

    def is_warm(self, i: int, num_steps: int) -> bool:
        """Whether a lazy denoising step i still recomputes the MLPs of blocks it does not skip."""
        return i > self.head_warm * num_steps


@dataclass(frozen=True)
class StepPolicy:
    """What one decoding step does.

    refresh: computes everything. fills: a lazy step follows before the next refresh, so the caches
    will be read. residual_stop: positions in the decoding order up to here will need the guidance
    residual of this refresh. kept: positions computed behind the probe layer of a lazy step, or by
    all of a local one.
    """

    refresh: bool
    fills: bool
    residual_stop: int
    kept: int


def step_policies(
    config: LazyMARConfig, plan: DecodingPlan, buffer_size: int
) -> dict[int, StepPolicy]:
    """The policy of every step of the plan, by step index.

    The first step of all is a refresh, and so is the first one with guidance.
    """
    total = buffer_size + plan.seq_len
    policies: dict[int, StepPolicy] = {}
    lazy_stop = 0  # where the tokens of the lazy steps after this one end; 0: a refresh follows
    for before, step in reversed([*zip([None, *plan.steps], plan.steps, strict=False)]):
        refresh = config.is_refresh(step.index, plan.num_iter)
        refresh = refresh or before is None or (step.guided and not before.guided)
        changed = step.stop - step.previous
        if config.lazy_step == "local":
            kept = changed + (buffer_size if config.buffer_refresh else 0)
        else:
            share = math.floor(total * config.keep_ratio(step.index, plan.num_iter))
            kept = min(total, max(changed + config.keep_floor, share))
        policies[step.index] = StepPolicy(refresh, lazy_stop > 0, max(step.stop, lazy_stop), kept)
        lazy_stop = 0 if refresh else max(step.stop, lazy_stop)
    return policies


def oldest_positions(
    plan: DecodingPlan, policies: dict[int, StepPolicy], buffer_size: int
) -> dict[int, list[int]]:
    """By step index, the kept positions of a lazy step if those not computed for longest are chosen.

    Positions decoded in this step and in the previous one come first; of equal age, the earlier
    in the decoding order.
    """
    total = buffer_size + plan.seq_len
    computed_at = [0] * total  # the last step that computed a position behind the probe layer
    chosen: dict[int, list[int]] = {}
    for step in plan.steps:
        policy = policies[step.index]
        kept = list(range(total))
        if not policy.refresh and policy.kept < total:
            always = range(buffer_size + step.previous, buffer_size + step.stop)
            others = (p for p in kept if p not in always)
            oldest = sorted(others, key=lambda p: computed_at[p])  # stable
            kept = [*always, *oldest[: policy.kept - len(always)]]
            chosen[step.index] = kept
        for p in kept:
            computed_at[p] = step.index
    return chosen
