"""main_mar.py with a model of a few thousand weights, for tests that start processes."""

import main_mar
from models import mar
from util.errors import run_main

WIDTHS = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("embed_dim", 16), ("depth", 1), ("num_heads", 2))
}
GEOMETRY = ["--model", "mar_tiny", "--img_size", "16", "--vae_stride", "4", "--vae_embed_dim", "4"]
GEOMETRY += ["--class_num", "2", "--buffer_size", "2", "--diffloss_d", "1", "--diffloss_w", "16"]
GEOMETRY += ["--latent_scale", "1", "--device", "cpu"]
SCHEDULE = ["--batch_size", "8", "--blr", "0.3", "--epochs", "4", "--warmup_epochs", "1"]
SCHEDULE += ["--ema_rate", "0.9", "--log_freq", "1"]

if __name__ == "__main__":
    mar.SIZES["mar_tiny"] = WIDTHS
    run_main(main_mar.main)
