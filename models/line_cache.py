"""Key-value caches of raster-order generation: the full one, and LineAR's few lines.

LineAR (Qin et al., arXiv 2512.04857): tokens form lines of a grid. The first tokens (anchors) and
the newest lines stay; between them, each completed line evicts for good as many tokens as it
brought, those its own queries attended to least, because the next line looks at similar places.
Which tokens go is decided per layer, sequence and head; how many is a Python number known before
the first token.

The buffer holds the condition, the budget and one line. Keys carry their position (RoPE), so the
order of slots means nothing: the new line's rows move into the slots of evicted tokens, and the
live slots are always a prefix of the buffer, attended to as a view, without a mask.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor

from models.line_methods import METHODS, POOLINGS, LineView, Method
from util.config import setting

NONE = "none"  # the full cache, whatever the budget
CONDITION = 1  # positions in front of the image: the class token
MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but its sign


@dataclass(frozen=True)
class LinePlan:
    """Every count of a run: of image tokens, but for `condition`.

    line, lines: the grid. budget: tokens kept when a line begins. anchors, recent: the first and
    the newest ones, never evicted; `budget - anchors - recent` others are kept by their score.
    """

    line: int
    lines: int
    budget: int
    anchors: int
    recent: int
    condition: int = CONDITION

    @property
    def slots(self) -> int:
        """Rows of the buffer per head; the image's last token is never fed."""
        tokens = self.line * self.lines - 1
        return self.condition + min(tokens, self.budget + self.line)


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
        the completed one included. Both are LineAR's; the other methods have their own.
    method: "linear", "none" (the full cache), or a rival, see models/line_methods.py.
    pooling: of the attention over the queries of a line: "mean", "max" or "last".

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
    method: str = setting("linear", f"{', '.join((NONE, *METHODS))}", metavar="NAME")
    pooling: str = setting(
        "mean", f"pooling over a line's queries: {', '.join(POOLINGS)}", metavar="NAME"
    )

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
        for name, least in (("anchors", 0), ("recent", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from {least}")

    @classmethod
    def of(cls, line_ar: "LineARConfig | bool | None") -> "LineARConfig":
        """The argument of sample_tokens: None or False is the full cache, True the defaults."""
        if line_ar is None or line_ar is False:
            return cls(method=NONE)
        if line_ar is True:
            return cls()
        if not isinstance(line_ar, cls):
            raise ValueError(f"line_ar is {line_ar!r}; give a LineARConfig, True, False or None")
        return line_ar

    def plan(self, grid: tuple[int, int]) -> LinePlan:
        """The counts on a grid of (lines, tokens per line). ValueError if the budget is too small."""
        lines, line = grid
        kept = self.budget if self.budget > 1 else math.floor(self.budget * lines + 0.5)
        kept = min(lines, max(1, int(kept)))
        if self.method == NONE or kept == lines:
            return LinePlan(line, lines, lines * line, 0, lines * line)
        budget = kept * line
        method = METHODS[self.method]
        anchors, recent = method.protected(self.anchors, self.recent, line, budget)
        if anchors + recent > budget:
            raise ValueError(
                f"the budget of {budget} tokens ({kept} lines of {line}) is too small for "
                f"{anchors} anchors and {recent} recent tokens of method {self.method}: "
                "raise the budget or lower anchors and recent"
            )
        return LinePlan(line, lines, budget, anchors, recent)


class KVCache:
    """Keys and values of all layers, (rows, H, slots, d) each, allocated once in the model's dtype.

    `update` is called by every layer for each position, then `advance` once.
    """

    def __init__(self, layers: int, slots: int) -> None:
        self.slots = slots
        self.live = 0  # slots in use: a prefix
        self.k: list[Tensor | None] = [None] * layers
        self.v: list[Tensor | None] = [None] * layers

    def update(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k, v (rows, H, 1, d) of the next position; what to attend to: views of the live slots."""
        if self.k[layer] is None:
            self._allocate(layer, k)
        stop = self.live + 1
        if stop > self.slots:
            raise ValueError(f"the cache is full: it has {self.slots} slots")
        self.k[layer][:, :, self.live : stop] = k
        self.v[layer][:, :, self.live : stop] = v
        return self.k[layer][:, :, :stop], self.v[layer][:, :, :stop]

    def advance(self) -> None:
        """All layers have seen this position."""
        self.live += 1

    def _allocate(self, layer: int, k: Tensor) -> None:
        shape = (k.shape[0], k.shape[1], self.slots, k.shape[3])
        self.k[layer], self.v[layer] = k.new_empty(shape), k.new_empty(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(t.nbytes for t in (*self.k, *self.v) if t is not None)

    @property
    def workspace_nbytes(self) -> int:
        """Bytes held besides."""
        return 0


class LineCache(KVCache):
    """A cache that is compressed to its budget whenever a line is complete."""

    def __init__(self, layers: int, plan: LinePlan, method: Method, pooling: str) -> None:
        super().__init__(layers, plan.slots)
        self.plan = plan
        self.method = method
        self.pooling = pooling
        self.count = 0  # positions seen, the condition included
        self.queries: list[Tensor | None] = [None] * layers  # (rows, H, line, d), of this line
        self.positions: list[Tensor | None] = [None] * layers  # (rows, H, slots): which token it is
        self.scores: list[Tensor | None] = [None] * layers  # (rows, H, slots), if they accumulate

    def update(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kv = super().update(layer, q, k, v)
        token = self.count - self.plan.condition
        if token >= 0 and self.method.needs_queries:
            self.queries[layer][:, :, token % self.plan.line] = q[:, :, 0]
        return kv

    def advance(self) -> None:
        super().advance()
        self.count += 1
        tokens = self.count - self.plan.condition
        if tokens > 0 and tokens % self.plan.line == 0:
            full = self.live == self.plan.condition + self.plan.budget + self.plan.line
            for layer in range(len(self.k)):
                self._end_line(layer, full)
            if full:
                self.live -= self.plan.line

    def _allocate(self, layer: int, k: Tensor) -> None:
        super()._allocate(layer, k)
        rows, heads, _, width = k.shape
        shape = (rows, heads, self.slots)
        last = self.plan.condition + self.plan.line * self.plan.lines
        dtype = torch.int16 if last <= torch.iinfo(torch.int16).max else torch.int32
        index = torch.arange(self.slots, device=k.device, dtype=dtype)
        self.positions[layer] = index.repeat(rows, heads, 1)  # until the first eviction
        if self.method.needs_queries:
            self.queries[layer] = k.new_empty(rows, heads, self.plan.line, width)
        if self.method.cumulative:
            self.scores[layer] = torch.zeros(shape, device=k.device)

    def _end_line(self, layer: int, full: bool) -> None:
        """Score the live tokens of a layer where that is needed; if it is full, evict one line."""
        line, live = self.plan.line, self.live
        position = self.positions[layer]
        newest = torch.arange(self.count - line, self.count, device=position.device)
        position[:, :, live - line : live] = newest
        if not (full or self.method.cumulative):
            return
        view = LineView(
            self.queries[layer], self.k[layer][:, :, :live], position[:, :, :live], self.pooling
        )
        with torch.autocast(position.device.type, enabled=False):
            score = self.method.score(view)
        if self.method.cumulative:
            score = self.scores[layer][:, :, :live].add_(score)
        if full:
            self._evict(layer, self._holes(score, view.positions))

    def _holes(self, score: Tensor, position: Tensor) -> Tensor:
        """Slots (rows, H, line) of the tokens to evict: the worst ones that nothing protects.

        Among equals the oldest goes, in whatever slot it lies.
        """
        image = position - self.plan.condition  # < 0: the condition
        newest = self.count - self.plan.condition - self.plan.recent
        protected = (image < self.plan.anchors) | (image >= newest)
        bits = score.masked_fill(protected, torch.inf).view(torch.int32)
        bits = torch.where(bits < 0, bits ^ MAGNITUDE, bits)  # ordered as the floats are
        rank = (bits.long() << 32) | position
        return rank.topk(self.plan.line, dim=-1, largest=False).indices

    def _evict(self, layer: int, holes: Tensor) -> None:
        """Move the rows of the newest line into the holes; its own slots are free then."""
        buffers = [self.k[layer], self.v[layer], self.positions[layer]]
        if self.method.cumulative:
            buffers.append(self.scores[layer])
        for buffer in buffers:
            newest = buffer[:, :, -self.plan.line :]
            at = holes if buffer.dim() == 3 else holes[..., None].expand_as(newest)
            buffer.scatter_(2, at, newest.clone())
        if self.method.cumulative:
            self.scores[layer][:, :, -self.plan.line :] = 0

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of the line's queries, the positions and the accumulated scores."""
        held = (*self.queries, *self.positions, *self.scores)
        return sum(t.nbytes for t in held if t is not None)


def make_cache(line_ar: LineARConfig | bool | None, grid: tuple[int, int], layers: int) -> KVCache:
    """An empty cache for one call. ValueError if the budget does not fit the grid."""
    config = LineARConfig.of(line_ar)
    plan = config.plan(grid)
    if plan.budget == plan.line * plan.lines:
        return KVCache(layers, plan.slots)
    return LineCache(layers, plan, METHODS[config.method], config.pooling)
