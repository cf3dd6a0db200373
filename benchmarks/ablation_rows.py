"""The rows of all ablations: what is sampled, and how. Names, integers and configurations only."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import combinations

from models.lazy_mar import CACHES, TOKEN_SELECTIONS, LazyMARConfig

STEPS = 64  # both papers' quick setting
FEWER_STEPS = (48, 32, 24, 16)


@dataclass(frozen=True)
class Row:
    """One run: MAR (config None) or LazyMAR with `num_iter` steps."""

    name: str
    config: LazyMARConfig | None
    num_iter: int = STEPS

    @property
    def task(self) -> tuple[LazyMARConfig | None, int]:
        """What decides its images: rows of one task share a run."""
        return self.config, self.num_iter


MAR = Row("MAR", None)
CHANGED = {  # group -> field of LazyMARConfig and its values; the default is among the rows anyway
    "interval": ("interval", (1, 3, 5, 9, 13, 18)),
    "warmup": ("warmup", (0, 1, 3, 5, 10, 20)),
    "probe_layer": ("probe_layer", (0, 1, 2, 3, 4)),
    "token_selection": ("token_selection", TOKEN_SELECTIONS),
    "head_interval": ("head_interval", (1, 2, 3, 5, 7, 10, 14)),
    "head_skip": ("head_skip", ((), (1,), (1, 2), (1, 2, 3, 4), (0, 1, 2, 3, 4))),
}
KEEP_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
Series = dict[str, list[Row]]


def changed(base: LazyMARConfig, field: str, values: Iterable[object]) -> list[Row]:
    """The base with other values of a field, its own among them."""
    rows = []
    for value in dict.fromkeys([*values, getattr(base, field)]):
        shown = ",".join(map(str, value)) or "none" if isinstance(value, tuple) else value
        default = ", the default" if value == getattr(base, field) else ""
        rows.append(Row(f"{field} {shown}{default}", replace(base, **{field: value})))
    return sorted(rows, key=lambda row: _place(getattr(row.config, field)))


def _place(value: object) -> tuple[object, ...]:
    """Numbers by size, sets of blocks by their number, names as they are listed."""
    if isinstance(value, str):
        return (TOKEN_SELECTIONS.index(value),)
    return (len(value), value) if isinstance(value, tuple) else (value,)


def scaled(base: LazyMARConfig, scale: float) -> LazyMARConfig:
    """With every keep ratio below 1 times `scale`, at most 1."""
    keep = tuple((p, r if r == 1 else min(1.0, scale * r)) for p, r in base.keep)
    return replace(base, keep=keep)


def keep_rows(base: LazyMARConfig) -> list[Row]:
    """Keep schedules."""
    rows = [
        Row(f"keep x {s:g}" + (", the default" if s == 1 else ""), scaled(base, s))
        for s in KEEP_SCALES
    ]
    return [*rows, Row("keep all positions", replace(base, keep=((0.0, 1.0),)))]


def cache_rows(base: LazyMARConfig) -> list[Row]:
    """All eight combinations of the caches."""
    chosen = [names for count in range(4) for names in combinations(CACHES, count)]
    return [Row(" + ".join(names) or "no cache", base.with_caches(names)) for names in chosen]


def lazy_rows(base: LazyMARConfig) -> list[Row]:
    """LazyMAR with fewer steps, too."""
    return [Row(f"LazyMAR, {steps} steps", base, steps) for steps in (STEPS, *FEWER_STEPS)]


def equal_cost_rows(base: LazyMARConfig, mar_steps: Callable[[Row], int]) -> list[Row]:
    """LazyMAR, and below each MAR with as many steps as cost the same: mar_steps says how many."""
    rows = []
    for lazy in lazy_rows(base):
        steps = mar_steps(lazy)
        rows += [lazy, Row(f"MAR, {steps} steps: the cost of {lazy.name}", None, steps)]
    return rows


def frontier_series(base: LazyMARConfig, mar_steps: Callable[[Row], int]) -> Series:
    """The lines of the plot of quality over cost; the same row may be on several."""
    steps = sorted({*FEWER_STEPS, mar_steps(Row("LazyMAR", base))}, reverse=True)
    fewer = [Row(f"MAR, {n} steps", None, n) for n in steps]
    return {
        "MAR, fewer steps": [MAR, *fewer],
        "LazyMAR, fewer steps": lazy_rows(base),
        "refresh interval": changed(base, *CHANGED["interval"]),
        "keep scale": keep_rows(base),
        "head interval": changed(base, *CHANGED["head_interval"]),
    }


def groups(base: LazyMARConfig, mar_steps: Callable[[Row], int]) -> dict[str, list[Row]]:
    """Name of each group -> its rows. The first is MAR, which the others are compared with."""
    found = {"caches": cache_rows(base)}
    found |= {name: changed(base, *fields) for name, fields in CHANGED.items()}
    found |= {"keep": keep_rows(base), "steps": equal_cost_rows(base, mar_steps)}
    frontier = frontier_series(base, mar_steps)
    unique = {row.task: row for rows in reversed(frontier.values()) for row in rows}
    found["frontier"] = [
        row for rows in frontier.values() for row in rows if unique[row.task] is row
    ]
    return {name: [MAR, *(row for row in rows if row != MAR)] for name, rows in found.items()}
