"""The rows of all ablations: names, integers and configurations; nothing is sampled here.

python -m benchmarks.ablation_rows        # list the ablations
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import combinations

from models.fast_mar import DISA_START, GUIDANCE_INTERVAL, GUIDANCE_START, PRESETS, FastMARConfig
from models.head_config import HeadConfig
from models.lazy_mar import CACHES, TOKEN_SELECTIONS, LazyMARConfig
from models.order import OrderConfig
from util.errors import run_main

STEPS = 64  # both papers' quick setting
FEWER_STEPS = (48, 32, 24, 16)


@dataclass(frozen=True)
class Row:
    """One run: MAR (config None) or LazyMAR with `num_iter` steps."""

    name: str
    config: LazyMARConfig | None
    num_iter: int = STEPS
    head: HeadConfig = HeadConfig()
    order: OrderConfig = OrderConfig()

    @property
    def task(self) -> FastMARConfig:
        """What decides its images: rows of one task share a run."""
        return FastMARConfig(self.num_iter, self.order, self.head, self.config)

    @classmethod
    def of(cls, name: str, task: FastMARConfig) -> "Row":
        return cls(name, task.lazy, task.num_iter, task.head, task.order)


MAR = Row("MAR", None)
ABOUT = {  # group -> what its rows compare
    "caches": "all eight combinations of token, condition and head cache",
    "interval": "refresh interval: decoding steps from one refresh to the next",
    "warmup": "warm-up: refresh steps at the beginning",
    "probe_layer": "probe layer: the decoder layer that tells which tokens changed",
    "token_selection": "which tokens are recomputed: by similarity, and three controls",
    "head_interval": "head interval: denoising steps from one full one to the next",
    "head_skip": "which blocks of the diffusion head are skipped",
    "keep": "keep schedule: the published ratios times a factor",
    "steps": "MAR with fewer steps, at the cost of LazyMAR",
    "beyond": "what is added to LazyMAR: each technique alone, the presets, and fast without each",
    "frontier": "quality over cost of many settings, with a plot",
}
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
# (row, configuration) -> steps with which that costs as much as the row; None: even one costs more.
StepsAt = Callable[[Row, LazyMARConfig | None], int | None]


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
    """All eight combinations of the caches, and the extension of the head's."""
    chosen = [names for count in range(4) for names in combinations(CACHES, count)]
    rows = [Row(" + ".join(names) or "no cache", base.with_caches(names)) for names in chosen]
    return [*rows, Row(f"{rows[-1].name}, adaLN reused", replace(base, head_reuse_adaln=True))]


def lazy_rows(base: LazyMARConfig) -> list[Row]:
    """LazyMAR with fewer steps, too."""
    return [Row(f"LazyMAR, {steps} steps", base, steps) for steps in (STEPS, *FEWER_STEPS)]


def rivals(base: LazyMARConfig) -> dict[str, LazyMARConfig | None]:
    """What could save by fewer steps instead: MAR, whose head costs the same with any number of steps
    (each token is denoised once), and MAR with the head cache."""
    return {"MAR": None, "head cache alone": base.with_caches(["head"])}


def equal_cost_rows(base: LazyMARConfig, steps_at: StepsAt) -> list[Row]:
    """LazyMAR, and below each its rivals with as many steps as cost the same."""
    rows = []
    for lazy in lazy_rows(base):
        rows.append(lazy)
        for name, config in rivals(base).items():
            if steps := steps_at(lazy, config):
                rows.append(Row(f"{name}, {steps} steps: the cost of {lazy.name}", config, steps))
    return rows


def frontier_series(base: LazyMARConfig, steps_at: StepsAt) -> Series:
    """The lines of the plot of quality over cost; the same row may be on several."""
    series: Series = {}
    for name, config in rivals(base).items():
        equal = steps_at(Row("LazyMAR", base), config)
        steps = sorted({STEPS, *FEWER_STEPS, *([equal] if equal else [])}, reverse=True)
        rows = [Row(f"{name}, {n} steps", config, n) for n in steps]
        series[f"{name}, fewer steps"] = rows
    series["MAR, fewer steps"][0] = MAR
    series["MAR, shorter head"] = [MAR, *shorter_heads()]
    presets = [Row.of(name, make()) for name, make in PRESETS.items() if name != "lazymar"]
    return series | {
        "presets": [Row("LazyMAR", base), *presets],
        "LazyMAR, fewer steps": lazy_rows(base),
        "head interval": changed(base, "head_interval", (1, 3, 14)),
    }


def selection_rows(base: LazyMARConfig) -> list[Row]:
    """Token selections, with all caches and with the token cache alone, where nothing else blurs."""
    rows = changed(base, *CHANGED["token_selection"])
    return rows + [
        replace(row, name=f"{row.name}, token cache only", config=row.config.with_caches(["token"]))
        for row in rows
        if row.config is not None
    ]


def shorter_heads() -> list[Row]:
    """MAR with fewer denoising steps."""
    disa = HeadConfig(steps=(50, 5), t_start=DISA_START)
    return [
        Row("MAR, head 50 to 5", None, head=disa),
        Row("MAR, head 30 to 10", None, head=replace(disa, steps=(30, 10))),
        Row("MAR, head 20", None, head=replace(disa, steps=20)),
    ]


def beyond_rows() -> list[Row]:
    """Each technique of models/fast_mar.py added to MAR or LazyMAR, the presets, and fast changed."""
    lazy, fast = LazyMARConfig(), FastMARConfig.fast()
    alone = [
        Row("MAR, 32 steps", None, 32),
        *shorter_heads(),
        Row(
            "MAR, guidance from a quarter on", None, head=HeadConfig(guidance_start=GUIDANCE_START)
        ),
        Row("MAR, guidance interval", None, head=HeadConfig(guidance_interval=GUIDANCE_INTERVAL)),
        Row("LazyMAR", lazy),
        Row("LazyMAR, local steps", replace(lazy, lazy_step="local")),
        Row("LazyMAR, linear forecast", replace(lazy, forecast_order=1)),
    ]
    solver = replace(fast.head, solver="2m", spacing="logsnr", t_start=None, tau=1.0)
    no_limit = replace(
        fast.head, guidance_start=0.0, guidance_interval=HeadConfig().guidance_interval
    )
    assert fast.lazy is not None
    of_fast = {
        "head 40 to 5": replace(fast, head=replace(fast.head, steps=(40, 5))),
        "second-order head": replace(fast, head=solver),
        "all steps guided": replace(fast, head=no_limit),
        "local lazy steps": replace(fast, lazy=replace(fast.lazy, lazy_step="local")),
        "random order": replace(fast, order=OrderConfig("random")),
        "gtr order": replace(fast, order=OrderConfig("gtr")),
        "no lazy steps": replace(fast, lazy=None),
    }
    presets = [Row.of(name, make()) for name, make in PRESETS.items() if name != "lazymar"]
    return [*alone, *presets, *(Row.of(f"fast, {name}", task) for name, task in of_fast.items())]


def groups(base: LazyMARConfig, steps_at: StepsAt) -> dict[str, list[Row]]:
    """Name of each group -> its rows. The first is MAR, which the others are compared with."""
    found = {"caches": cache_rows(base)}
    found |= {name: changed(base, *fields) for name, fields in CHANGED.items()}
    found["token_selection"] = selection_rows(base)
    found |= {"keep": keep_rows(base), "steps": equal_cost_rows(base, steps_at)}
    found["beyond"] = beyond_rows()
    frontier = frontier_series(base, steps_at)
    found["frontier"] = [row for rows in frontier.values() for row in rows]
    unique = {}
    for name, rows in found.items():
        first: dict[object, Row] = {}
        for row in (MAR, *rows):
            first.setdefault(row.task, row)
        unique[name] = list(first.values())
    return unique


def main() -> None:
    """Print the groups of rows."""
    for name, about in ABOUT.items():
        print(f"{name:16} {about}")


if __name__ == "__main__":
    run_main(main)
