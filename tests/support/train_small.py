"""main_mar.py with a model of a few thousand weights, for tests that start processes."""

import main_mar
from models import mar
from util.errors import run_main

WIDTHS = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("embed_dim", 16), ("depth", 1), ("num_heads", 2))
}

if __name__ == "__main__":
    mar.SIZES["mar_tiny"] = WIDTHS
    run_main(main_mar.main)
