"""Settings of the compressed key-value cache: LineAR and the other methods."""

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

from models.line_methods import METHODS, POOLINGS
from models.line_plan import CONDITION, LinePlan
from util.config import setting

NONE = "none"  # the full cache, whatever the budget


def parse_budget(text: str) -> float:
    """1/6, 0.25 or 4."""
    try:
        return float(Fraction(text))
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{text!r} is not a budget like 1/6, 0.25 or 4") from error


@dataclass(frozen=True)
class LineARConfig:
    """How the cache is compressed.

    budget: share of the image's tokens in (0, 1], rounded to whole lines (the nearest, half
        upwards, at least one), or a number of lines above 1. All lines are the full cache.
    anchors: first image tokens that are never evicted. recent: newest lines that are never evicted,
        the completed one included. Both are LineAR's, the second also of "stratified"; the other
        methods have their own.
    method: "linear", "none" (the full cache), or another of models/line_methods.py.
    pooling: of the attention over the queries of a line: "mean", "max" or "last".
    spaced: tokens of every older line that method "stratified" always keeps; fewer if the budget is
        smaller.

    The paper gives no anchors, recent lines or pooling; benchmarks/line_ablation.py measures them.
    """

    budget: float = setting(
        1 / 6,
        "image tokens kept: a share such as 1/6, or a number of lines above 1",
        parse=parse_budget,
        metavar="SHARE|LINES",
    )
    anchors: int = setting(8, "first tokens that are never evicted")
    recent: int = setting(2, "newest lines that are never evicted")
    method: str = setting("linear", ", ".join((NONE, *METHODS)), metavar="NAME")
    pooling: str = setting("mean", f"over a line's queries: {', '.join(POOLINGS)}", metavar="NAME")
    spaced: int = setting(1, "stratified: tokens of every older line that are never evicted")

    def __post_init__(self) -> None:
        if self.method != NONE and self.method not in METHODS:
            known = ", ".join((NONE, *METHODS))
            raise ValueError(f"the method of LineAR is {self.method!r}; use one of {known}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r}; use one of {', '.join(POOLINGS)}")
        number = isinstance(self.budget, Real) and not isinstance(self.budget, bool)
        whole = number and self.budget > 1 and float(self.budget).is_integer()
        if not (number and 0 < self.budget <= 1 or whole):
            raise ValueError(
                f"budget is {self.budget!r}; it must be a share in (0, 1] or a whole number of lines"
            )
        for name, least in (("anchors", 0), ("recent", 1), ("spaced", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from {least}")

    @classmethod
    def from_argument(cls, line_ar: "LineARConfig | bool | None") -> "LineARConfig":
        """The argument of sample_tokens: None or False is the full cache, True the defaults."""
        if line_ar is None or line_ar is False:
            return cls(method=NONE)
        if line_ar is True:
            return cls()
        if not isinstance(line_ar, cls):
            raise ValueError(f"line_ar is {line_ar!r}; give a LineARConfig, True, False or None")
        return line_ar

    def plan(self, grid: tuple[int, int], condition: int = CONDITION) -> LinePlan:
        """The counts on a grid of (lines, tokens per line) behind `condition` positions.

        ValueError if the budget is too small.
        """
        lines, line = grid
        kept = self.budget if self.budget > 1 else math.floor(self.budget * lines + 0.5)
        kept = min(lines, max(1, int(kept)))
        if self.method == NONE or kept == lines:
            return LinePlan(line, lines, lines * line, 0, lines * line, condition)
        budget = kept * line
        method = METHODS[self.method]
        anchors, recent = method.protected(self.anchors, self.recent, line, budget)
        room = budget - anchors - recent
        if room < 0:
            raise ValueError(
                f"the budget of {budget} tokens ({kept} lines of {line}) is too small for "
                f"{anchors} anchors and {recent} recent tokens of method {self.method}: "
                "raise the budget or lower anchors and recent"
            )
        older = lines - recent // line  # lines in front of the recent ones when all are complete
        spaced = min(self.spaced, room // max(1, older)) if method.stratified else 0
        return LinePlan(line, lines, budget, anchors, recent, condition, spaced)
