"""LineAR's constants: how far a compressed cache moves the distribution of the next token.

    python -m benchmarks.line_ablation

Codes that the bundled GPT sampled with the full cache are fed to each compressed cache, position by
position. It measures KL(full || compressed) of the next token in nats, averaged over images and the tokens
of a line. All settings see the same codes, so few images suffice.
Results: output_dir/benchmarks/line_ablation.{json,md}, or where --output says; those of the documents
are benchmarks/results/line_ablation.{json,md}.
"""

import argparse
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.common import OUTPUT, Parser, origin, write_result
from benchmarks.line_common import BUDGETS, HOST, Run, load_tiny
from models.line_cache import LineARConfig
from models.line_methods import METHODS, POOLINGS
from models.llamagen import GPT
from util.device import pick_device
from util.errors import run_main
from util.report import markdown_table

ANCHORS = (0, 1, 4, 8, 12, 24)
RECENT = (1, 2, 3)


def kl_per_line(
    full: Tensor, model: GPT, codes: Tensor, labels: Tensor, config: LineARConfig
) -> Tensor:
    """KL(full || compressed) in nats per token, (lines,); full (B, N, vocab): log-probabilities."""
    logits = model.cached_logits(codes, labels, config)
    kl = (full.exp() * (full - logits.log_softmax(-1))).sum(-1)  # (B, N)
    return kl.mean(0).unflatten(0, model.grid).mean(1).double().cpu()


def sweep(grid: tuple[int, int]) -> Iterator[tuple[str, LineARConfig]]:
    """Every setting whose budget fits, with the budget's name."""
    for budget, share in BUDGETS.items():
        settings: list[dict] = [{"anchors": a, "recent": r} for a in ANCHORS for r in RECENT]
        settings += [{"recent": r, "pooling": p} for r in RECENT for p in POOLINGS if p != "mean"]
        settings += [{"method": name} for name in METHODS if name != "linear"]
        for setting in settings:
            config = LineARConfig(budget=share, **setting)
            try:
                config.plan(grid)
            except ValueError:
                continue
            yield budget, config


def table(rows: list[dict], key: tuple[str, ...]) -> str:
    """Markdown: one line per setting of `key`, one column per budget, KL in thousandths of a nat."""
    found = {(*(row[k] for k in key), row["budget"]): 1000 * row["kl"] for row in rows}
    settings = list(dict.fromkeys(setting[:-1] for setting in found))
    body = []
    for setting in settings:
        cells = [found.get((*setting, budget)) for budget in BUDGETS]
        body.append([*setting, *("-" if cell is None else f"{cell:.2f}" for cell in cells)])
    return markdown_table([*key, *BUDGETS], body)


def parse() -> argparse.Namespace:
    parser = Parser("line_ablation", __doc__)
    parser.number("num_images", 20)
    parser.number("seed", 1, "as in eval.py", least=0)
    parser.add_argument("--device")
    return parser.read(OUTPUT / "line_ablation")


def main() -> None:
    args = parse()
    device = pick_device(args.device)
    model, _, weights = load_tiny(device, torch.float32)
    run = Run(args.num_images, args.seed, args.num_images)
    labels = torch.tensor(run.labels, device=device)
    codes = model.sample_tokens(
        labels, HOST.sampling.cfg, top_p=HOST.sampling.top_p, seeds=run.seeds
    )[:, :-1]
    full = model.cached_logits(codes, labels).log_softmax(-1)
    rows = []
    for budget, config in sweep(model.grid):
        kl = kl_per_line(full, model, codes, labels, config)
        row = {
            "budget": budget,
            **{key: getattr(config, key) for key in ("method", "anchors", "recent", "pooling")},
            "kl": kl.mean().item(),
            "kl_per_line": [round(value, 6) for value in kl.tolist()],
        }
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "kl_per_line"}), flush=True)
    about = {
        **origin(),
        "weights": weights,
        "images": args.num_images,
        "seed": args.seed,
        "cfg": HOST.sampling.cfg,
        "top_p": HOST.sampling.top_p,
        "device": str(device),
        "dtype": "float32",
    }
    ours = [row for row in rows if row["method"] == "linear"]
    parts = [
        "KL(full cache || compressed) of the next token, thousandths of a nat, mean over images and lines.",
        "Anchors and recent lines (mean pooling):",
        table([row for row in ours if row["pooling"] == "mean"], ("anchors", "recent")),
        "Pooling over the queries of a line (8 anchors):",
        table([row for row in ours if row["anchors"] == 8], ("pooling", "recent")),
        "Methods, each with its own protected tokens; LineAR with 8 anchors:",
        table([r for r in rows if r["method"] != "linear"], ("method",)),
    ]
    write_result(args.output, {"about": about, "rows": rows}, "\n\n".join(parts))


if __name__ == "__main__":
    run_main(main)
