"""Whether LineAR's assumptions hold for a model: three numbers per line, from one run with the full cache.

    python -m benchmarks.line_locality --model gpt_tiny
    python -m benchmarks.line_locality --model pretrained_models/janus_tiny --prompts prompts.txt

* condition: share of a line's attention on the class or prompt tokens. LineAR expects it to stay high.
* older: share on lines older than the last three. LineAR expects it to be small.
* coverage: of a line's attention on tokens that may be evicted (not the condition, the anchors or the
  recent lines), the share on as many as the budget keeps of them, if these are the ones that the previous
  line attended to most. best: the same for the best possible choice of as many tokens.

A model is gpt_tiny, or the folder of a Janus model saved by transformers, with its processor. Shares are
means over images, layers, heads and queries of the conditional branch.
"""

import argparse
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Parser, origin, write_result
from benchmarks.line_common import HOST, Run, load_tiny
from engine import cli
from models.line_cache import KVCache, KVLayer, LineARConfig, LinePlan
from util.device import pick_device
from util.errors import UserError, run_main
from util.evaluation.batches import image_seed
from util.evaluation.conditions import Prompts
from util.report import markdown_table

NEAR = 3  # lines in front of the present one that are not old
COLUMNS = ("condition", "older", "coverage", "best")


@dataclass
class Shares:
    """Sums of attention per line, over layers; `lines` reads the shares."""

    plan: LinePlan
    sums: Tensor = field(init=False)  # (lines, 6): all, condition, older, candidates, covered, best

    def __post_init__(self) -> None:
        self.sums = torch.zeros(self.plan.lines, 6, dtype=torch.float64)

    def add(self, t: int, attention: Tensor, chosen: Tensor | None) -> None:
        """attention (rows, H, 1 + tokens) of line t; chosen (rows, H, M): slots the line before chose."""
        plan = self.plan
        old = plan.condition + max(0, t - NEAR) * plan.line
        parts = [attention, attention[..., : plan.condition], attention[..., plan.condition : old]]
        if chosen is not None:
            candidates = attention[..., choice(plan, t)]
            best = candidates.topk(chosen.shape[-1], dim=-1).values
            parts += [candidates, candidates.gather(-1, chosen), best]
        for i, part in enumerate(parts):
            self.sums[t, i] += part.sum().double().cpu()

    def lines(self) -> list[dict[str, float | None]]:
        """One row per line; without candidates there is no coverage."""
        rows = []
        for t, (every, condition, older, choice, covered, best) in enumerate(self.sums.tolist()):
            shares = (condition / every, older / every)
            shares += (covered / choice, best / choice) if choice else (None, None)
            rows.append({"line": t, **dict(zip(COLUMNS, shares, strict=True))})
        return rows


def choice(plan: LinePlan, t: int) -> slice:
    """Slots of the tokens that a budget has to choose from when line t begins."""
    first = plan.condition + plan.anchors
    return slice(first, max(first, plan.condition + t * plan.line - plan.recent))


class WatchedLayer(KVLayer):
    """A full cache of one layer that adds the attention of every complete line to `shares`."""

    def __init__(self, shares: Shares) -> None:
        super().__init__(shares.plan.condition + shares.plan.line * shares.plan.lines)
        self.shares = shares
        self.queries: list[Tensor] = []
        self.hidden: Tensor | None = None  # (rows, P)
        self.chosen: Tensor | None = None

    def remember(self, q: Tensor) -> None:
        if self.count >= self.shares.plan.condition:
            self.queries.append(q)

    def hide(self, hidden: Tensor) -> None:
        self.hidden = hidden

    def advance(self, positions: int = 1) -> None:
        super().advance(positions)
        if len(self.queries) == self.shares.plan.line:
            self._end_line()
            self.queries = []

    def _end_line(self) -> None:
        plan = self.shares.plan
        queries = torch.cat(self.queries, dim=2).unflatten(1, (self.k.shape[1], -1))
        keys = self.k[:, :, None, : self.live]  # (rows, H, 1, live, d), for groups of queries
        logits = queries.float() @ keys.float().transpose(-1, -2) * keys.shape[-1] ** -0.5
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(future.triu(self.live - plan.line + 1), -torch.inf)
        if self.hidden is not None:
            condition = logits[..., : self.hidden.shape[1]]
            condition.masked_fill_(self.hidden[:, None, None, None], -torch.inf)
        attention = logits.softmax(-1).mean((2, 3))  # (rows, H, live)
        t = (self.live - plan.condition) // plan.line - 1
        self.shares.add(t, attention, self.chosen)
        candidates = attention[..., choice(plan, t + 1)]
        kept = plan.budget - plan.anchors - plan.recent
        self.chosen = None
        if candidates.shape[-1] > kept:
            self.chosen = candidates.topk(kept, dim=-1).indices


@torch.no_grad()
def gpt_locality(config: LineARConfig, num_images: int, seed: int, device: torch.device) -> Shares:
    """The bundled GPT, fed with what it sampled."""
    model, *_ = load_tiny(device, torch.float32)
    run = Run(num_images, seed, num_images)
    labels = torch.tensor(run.labels, device=device)
    sampling = HOST.sampling
    codes = model.sample_tokens(labels, sampling.cfg, top_p=sampling.top_p, seeds=run.seeds)
    lines, line = model.grid
    shares = Shares(config.plan((lines, line)))
    cache, rope = KVCache([WatchedLayer(shares) for _ in model.layers]), model.rope()
    x = torch.cat([model.cls_embedding(labels), model.tok_embeddings(codes)], dim=1)
    for i in range(x.shape[1]):
        model.decode(x[:, i : i + 1], rope[i : i + 1], cache)
    return shares


@torch.no_grad()
def janus_locality(
    config: LineARConfig, folder: Path, prompts: list[str], seed: int, device: torch.device
) -> Shares:
    """A Janus of transformers, fed with what it sampled from the prompts."""
    # first, because it says how to get transformers
    loaded = cli.named("janus_tiny", resume=str(folder)).host().load(device)

    from models.gpt_images import GPTSampling
    from models.janus import JanusGenerator, image_grid, sample_tokens
    from models.transformers_cache import LineARCache, LineARLayer, line_ar_attention
    from models.transformers_models import Decoder

    class Watched(LineARLayer):
        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            self.kv = WatchedLayer(shares)

    model: Any = loaded.model
    generator = JanusGenerator(model, loaded.tokenizer, GPTSampling(5.0), 0)
    seeds = [image_seed(seed, i) for i in range(len(prompts))]
    inputs, _ = generator.prepare(prompts, seeds)
    ids, mask, grid = inputs["input_ids"], inputs["attention_mask"], image_grid(model)
    guidance: Any = model.generation_config.guidance_scale
    codes = sample_tokens(model, ids, mask, guidance or 5.0, seeds=seeds)
    shares = Shares(config.plan(grid, ids.shape[1]))
    with line_ar_attention(model):
        cache = LineARCache(None, grid, layer=Watched)
        decode = Decoder(model.model.language_model, cache, mask)
        decode(inputs_embeds=model.get_input_embeddings()(ids))
        for code in codes.split(1, dim=1):
            decode(inputs_embeds=model.prepare_embeddings_for_image_generation(code))
    return shares


def parse() -> argparse.Namespace:
    """The flags; `config` holds the budget, `texts` the prompts."""
    parser = Parser("line_locality", __doc__)
    parser.add_argument("--model", default="gpt_tiny", help="gpt_tiny, or the folder of a Janus")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="of a Janus, as in eval.py")
    parser.number("num_images", 6)
    parser.add_argument("--budget", default="1/4", help="as in eval.py's --line_budget")
    parser.add_argument("--anchors", type=int, default=1)
    parser.add_argument("--recent", type=int, default=1, help="recent lines")
    parser.number("seed", 1, "as in eval.py", least=0)
    parser.add_argument("--device")
    args = parser.read()
    try:
        args.config = LineARConfig(float(Fraction(args.budget)), args.anchors, args.recent)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--budget, --anchors, --recent: {error}") from error
    args.texts = []
    if args.model != "gpt_tiny":
        if args.prompts is None or not args.prompts.is_file():
            raise UserError(f"--model {args.model} draws prompts: give their file with --prompts")
        args.texts = Prompts.from_file(args.prompts).of(range(args.num_images), args.num_images)
    return args


def main() -> None:
    args = parse()
    device = pick_device(args.device)
    try:
        if args.model == "gpt_tiny":
            shares = gpt_locality(args.config, args.num_images, args.seed, device)
        else:
            folder = Path(args.model)
            shares = janus_locality(args.config, folder, args.texts, args.seed, device)
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"--model {args.model}: {str(error).splitlines()[0]}") from error
    rows = shares.lines()
    percent = [["" if (x := row[name]) is None else f"{x:.1%}" for name in COLUMNS] for row in rows]
    body = [[row["line"], *cells] for row, cells in zip(rows, percent, strict=True)]
    about = {
        **origin(),
        "images": args.num_images,
        **{name: getattr(args, name) for name in ("seed", "budget", "anchors", "recent")},
        "device": str(device),
        "dtype": "float32",
    }
    document = {"about": about, "rows": rows}
    write_result(args.output, document, markdown_table(["line", *COLUMNS], body))


if __name__ == "__main__":
    run_main(main)
