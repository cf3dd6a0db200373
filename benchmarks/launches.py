"""Kernel launches per batch of images, counted without a GPU.

    python -m benchmarks.launches --output benchmarks/results/launches

The real models run on the meta device; an operation that is neither a view nor an allocation counts as
one launch, attention as one too. So it is the least that eager CUDA launches: a sort or a top-k takes
several kernels. `with graphs` is what CUDA graphs leave: one launch for each recorded call, and the
operations between them. torch.compile, which merges kernels inside a graph, is not counted. Tokenizers
are left out. Images are of different classes. The number depends on the batch where many rows split the
head's modulation tables, and because each class has its own first step.
The last line is one JSON document.
"""

import argparse
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import Parser, batch_sizes, listed, origin, write_result
from benchmarks.mar_work import build
from models import llamagen
from models.decoding import Decoding
from models.fast_mar import PRESETS, FastMARConfig
from models.gpt_sampler import GPTDecoding, Guidance
from models.line_config import LineARConfig
from models.noise import ImageNoise
from models.plan import DecodingPlan
from models.sampling_copy import sampling_copy
from models.token_sampling import TokenSampler
from util.errors import run_main
from util.report import markdown_table

MARS = ("mar_base", "mar_large", "mar_huge")
GPTS = ("gpt_b", "gpt_l", "gpt_xl")
METHODS = {"mar": FastMARConfig.published, **PRESETS}
CACHES: dict[str, LineARConfig | None] = {
    "full cache": None,
    "LineAR 1/4": LineARConfig(1 / 4),
    "LineAR 1/6": LineARConfig(1 / 6),
    "h2o 1/6": LineARConfig(1 / 6, method="h2o"),
}
LINES = 24  # LlamaGen's models of 384 pixels
HEAD = ["model", "method", "batch", "launches", "per image", "with graphs", "per image, graphs"]
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "device"}


class Launches(TorchDispatchMode):
    """Counts operations; use `counting`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in ALLOCATIONS:
            self.count += 1
        return func(*args, **(kwargs or {}))


def _attention(q: Tensor, *args: object, **kwargs: object) -> Tensor:
    """One operation with the result's shape; the meta device would take attention apart."""
    del args, kwargs
    return q.clone()


@contextmanager
def counting() -> Iterator[Launches]:
    """Inside, operations are counted."""
    with (
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention),
        mock.patch("torch.autocast", lambda *args, **kwargs: nullcontext()),  # knows no meta device
        Launches() as launches,
    ):
        yield launches


class Calls:
    """Stands in for CudaGraphs: counts what calls launch, once for each key, and the calls."""

    def __init__(self, launches: Launches) -> None:
        self.launches = launches
        self.inside: dict[Hashable, int] = {}
        self.total = self.calls = 0

    def __call__(self, key: Hashable, call: Callable[[], None]) -> None:
        """Count `call`, which is the same for the same key."""
        if key not in self.inside:
            before = self.launches.count
            call()
            self.inside[key] = self.launches.count - before
            self.launches.count = before
        self.total += self.inside[key]
        self.calls += 1


def mar_launches(
    name: str, settings: FastMARConfig, batch: int, cfg: float, **geometry: object
) -> tuple[int, int]:
    """Launches of a batch, and those with CUDA graphs; geometry as MAR's arguments."""
    original = build(name, "meta", **geometry)
    model: Any = sampling_copy(original, torch.bfloat16, original.diffloss)
    plan = DecodingPlan.create(
        model.seq_len, settings.num_iter, cfg, order=settings.order,
        guidance_start=settings.head.guidance_start,
    )  # fmt: skip
    decoding = Decoding(model, batch, plan, settings.lazy, 1.0, settings.head)
    steps = model.diffloss.num_sampling_steps
    noise = ImageNoise(
        torch.empty(batch, model.seq_len, dtype=torch.long, device="meta"),
        torch.empty(batch, model.seq_len, steps + 1, model.token_dim, device="meta"),
    )
    with counting() as launches:
        runs = [Calls(launches) for _ in range(3)]
        decoding.run_step, decoding.run_head, decoding.run_class = runs
        decoding(list(range(batch)), noise)
    eager, recorded = (sum(getattr(run, name) for run in runs) for name in ("total", "calls"))
    return launches.count + eager, launches.count + recorded


def gpt_launches(
    name: str, line_ar: LineARConfig | None, batch: int, cfg: float
) -> tuple[int, int]:
    """Launches of a batch, and those with CUDA graphs."""
    with torch.device("meta"):
        model = getattr(llamagen, name)(block_size=LINES**2).to(torch.bfloat16).eval()
    sampler = TokenSampler(batch, LINES**2, 1.0, 0, 1.0, False, None, model.device)
    what = (model, batch, Guidance(cfg, -1), line_ar)
    labels = torch.empty(batch, dtype=torch.long, device="meta")
    with counting() as launches, torch.no_grad():
        calls = Calls(launches)
        decoding = GPTDecoding(*what)
        decoding.run = partial(_alike, calls)
        decoding(labels, sampler)
    eager = launches.count + calls.total
    with counting() as launches, torch.no_grad():
        calls = Calls(launches)
        GPTDecoding(*what, calls)(labels, sampler)
    return eager, launches.count + calls.calls


def _alike(calls: Calls, key: Hashable, call: Callable[[], None]) -> None:
    """Count a step: all but the first, which allocates, are alike."""
    calls(isinstance(key, tuple) and key[0] == 0, call)


def parse() -> argparse.Namespace:
    parser = Parser("launches", __doc__)
    known = ",".join((*MARS, *GPTS))
    parser.add_argument("--models", default=known, help=f"of {known}")
    parser.add_argument("--batches", default="1,64", help="images per batch")
    parser.number("cfg", 3.0, "guidance; above 1 two branches", kind=float)
    args = parser.read()
    args.models = listed(args.models, "models", (*MARS, *GPTS))
    args.batches = batch_sizes(args.batches)
    return args


def main() -> None:
    args = parse()
    rows = []
    for name in args.models:
        for method in METHODS if name in MARS else CACHES:
            for batch in args.batches:
                if name in MARS:
                    eager, graphs = mar_launches(name, METHODS[method](), batch, args.cfg)
                else:
                    eager, graphs = gpt_launches(name, CACHES[method], batch, args.cfg)
                values = (name, method, batch, eager, eager // batch, graphs, graphs // batch)
                rows.append(dict(zip(HEAD, values, strict=True)))
                print(f"{name} {method} batch {batch}: {eager}, {graphs} with graphs", flush=True)
    about = {**origin(), "cfg": args.cfg, "dtype": "bfloat16", "grid of the GPTs": [LINES, LINES]}
    table = markdown_table(HEAD, [list(row.values()) for row in rows])
    write_result(args.output, {"about": about, "rows": rows}, table)


if __name__ == "__main__":
    run_main(main)
