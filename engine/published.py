"""Published results on ImageNet 256x256, and the flags of eval.py that reproduce each of them.

    python -m engine.published                  # list all rows
    python -m engine.published lazymar_huge     # flags of one row, for scripts/reproduce.sh

A row added to ROWS is listed, can be reproduced by its name, and belongs in the README's table.
"""

import argparse
from dataclasses import dataclass

from util.errors import UserError, run_main
from util.report import markdown_table


@dataclass(frozen=True)
class Published:
    """FID and Inception Score of 50,000 images; cost per image where it was published.

    gpu_s: seconds on an RTX 3090; cpu_s: seconds on a CPU; tflops: operations in T.
    """

    method: str
    flags: str
    fid: float | None  # None: nobody has published this row
    inception: float | None
    gpu_s: float | None = None
    cpu_s: float | None = None
    tflops: float | None = None


# MAR: Li et al. 2024, 256 steps; without guidance at temperature 0.95 (MAR's README; FID and IS of these
# three rows are quoted from memory of its Table 4). LazyMAR and 64 steps: Yan et al. 2025; the paper names
# no guidance, 3.25 is that of its eval.py.
# fmt: off
ROWS = {
    "mar_base_256": Published("MAR-B", "--model mar_base --num_iter 256 --cfg 2.9 --eval_bsz 256", 2.31, 281.7),
    "mar_large_256": Published("MAR-L", "--model mar_large --num_iter 256 --cfg 3.0 --eval_bsz 256", 1.78, 296.0),
    "mar_huge_256": Published("MAR-H", "--model mar_huge --num_iter 256 --cfg 3.2 --eval_bsz 128", 1.55, 303.7),
    "mar_base_nocfg": Published("MAR-B, no guidance", "--model mar_base --num_iter 256 --cfg 1.0 --temperature 0.95 --eval_bsz 256", 3.48, 192.4),
    "mar_large_nocfg": Published("MAR-L, no guidance", "--model mar_large --num_iter 256 --cfg 1.0 --temperature 0.95 --eval_bsz 256", 2.60, 221.4),
    "mar_huge_nocfg": Published("MAR-H, no guidance", "--model mar_huge --num_iter 256 --cfg 1.0 --temperature 0.95 --eval_bsz 128", 2.35, 227.8),
    "mar_base_64": Published("MAR-B", "--model mar_base --num_iter 64 --cfg 3.25 --eval_bsz 128", 2.32, 281.1, 0.47, 28.97, 15.49),
    "mar_large_64": Published("MAR-L", "--model mar_large --num_iter 64 --cfg 3.25 --eval_bsz 128", 1.82, 296.1, 0.93, 59.66, 35.05),
    "mar_huge_64": Published("MAR-H", "--model mar_huge --num_iter 64 --cfg 3.25 --eval_bsz 128", 1.59, 299.1, 1.74, 116.61, 69.06),
    "lazymar_base": Published("LazyMAR-B", "--model mar_base --num_iter 64 --cfg 3.25 --eval_bsz 128 --lazy_mar", 2.45, 281.3, 0.21, 11.08, 5.54),
    "lazymar_large": Published("LazyMAR-L", "--model mar_large --num_iter 64 --cfg 3.25 --eval_bsz 128 --lazy_mar", 1.93, 297.4, 0.40, 22.82, 12.52),
    "lazymar_huge": Published("LazyMAR-H", "--model mar_huge --num_iter 64 --cfg 3.25 --eval_bsz 128 --lazy_mar", 1.69, 299.2, 0.75, 43.12, 24.38),
    # l-DeTok: Yang et al., arXiv 2507.15856 and its README; 64 steps are ours to measure.
    "detok_mar_base": Published("l-DeTok MAR-B", "--model detok_mar_base --num_iter 256 --eval_bsz 256", 1.55, 291.0),
    "detok_mar_large": Published("l-DeTok MAR-L", "--model detok_mar_large --num_iter 256 --eval_bsz 256", 1.32, 304.1),
    "detok_mar_base_64": Published("l-DeTok MAR-B", "--model detok_mar_base --num_iter 64 --eval_bsz 256", None, None),
    "detok_mar_large_64": Published("l-DeTok MAR-L", "--model detok_mar_large --num_iter 64 --eval_bsz 256", None, None),
    "detok_lazymar_base": Published("l-DeTok LazyMAR-B", "--model detok_mar_base --num_iter 64 --eval_bsz 256 --lazy_mar", None, None),
    "detok_lazymar_large": Published("l-DeTok LazyMAR-L", "--model detok_mar_large --num_iter 64 --eval_bsz 256 --lazy_mar", None, None),
}
# fmt: on
NUM_IMAGES = "--num_images 50000"


def flags_of(name: str) -> str:
    """Flags of eval.py that reproduce a row. UserError if there is none of that name."""
    if name not in ROWS:
        raise UserError(f"there is no published row {name}: use one of {', '.join(ROWS)}")
    return f"{ROWS[name].flags} {NUM_IMAGES}"


def tflops_at_64(model: str, lazy_mar: bool) -> float:
    """Published operations per image at 64 steps, in T; model: mar_base, mar_large or mar_huge."""
    tflops = ROWS[f"lazy{model}" if lazy_mar else f"{model}_64"].tflops
    assert tflops is not None
    return tflops


def main() -> None:
    """Print the rows, or the flags of the one that is named."""
    parser = argparse.ArgumentParser("python -m engine.published", description=main.__doc__)
    parser.add_argument("name", nargs="?", help="a row; without it all rows are listed")
    name = parser.parse_args().name
    if name is not None:
        print(flags_of(name))
        return
    head = ("name", "method", "FID", "IS", "s / image, RTX 3090", "CPU", "TFLOPs", "eval.py")
    rows = []
    for name, row in ROWS.items():
        numbers = (row.fid, row.inception, row.gpu_s, row.cpu_s, row.tflops)
        cells = [None if x is None else f"{x:g}" for x in numbers]
        rows.append([name, row.method, *cells, row.flags])
    print(markdown_table(head, rows), end="")


if __name__ == "__main__":
    run_main(main)
