"""Runs of eval.py: their flags, a small model for them, and what lies in their folders."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models import mar
from util.images import png_name, save_png

HEAD = {"diffloss_d": 1, "diffloss_w": 16, "num_sampling_steps": "ddim5"}
NUM_IMAGES = 20
SCORED = ["--num_images", NUM_IMAGES, "--eval_bsz", NUM_IMAGES]
PROMISED = {
    "model", "lazy_mar", "num_images", "num_iter", "cfg", "fid", "is_mean", "is_std",
    "sec_per_image", "images_dir", "device", "dtype",
}  # fmt: skip
SCORES = ("fid", "is_mean", "is_std", "accuracy")


def random_mar(seed: int) -> mar.MAR:
    """mar_tiny with a smaller head, and weights that make class, context and head matter."""
    torch.manual_seed(seed)
    model = mar.mar_tiny(**HEAD).eval()
    for parameter in model.parameters():  # adaLN and output layers start at zero
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def flags_for(resume: Path, output_dir: Path, *flags: object) -> list[str]:
    """A short evaluation on the CPU; later flags win over earlier ones."""
    short = ["--num_images", 2, "--eval_bsz", 1, "--cfg", 2.0, "--device", "cpu", "--threads", 1]
    if not any(str(flag).startswith("gpt_") for flag in flags):
        short += ["--model", "mar_tiny", "--num_iter", 2]
        for name, value in HEAD.items():
            short += [f"--{name}", value]
    return [str(word) for word in [*short, "--resume", resume, "--output_dir", output_dir, *flags]]


def images_of(result: dict) -> list[bytes]:
    """The bytes of every PNG of a run, in the order of their numbers."""
    return [path.read_bytes() for path in sorted(Path(result["images_dir"]).glob("*.png"))]


def pixels_of(result: dict) -> np.ndarray:
    """(N, H, W, 3) int16."""
    paths = sorted(Path(result["images_dir"]).glob("*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(np.int16)


def written_at(result: dict) -> dict[str, int]:
    """When each PNG was last written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in Path(result["images_dir"]).iterdir()}


def folder_of(result: dict) -> Path:
    return Path(result["images_dir"]).parent


def manifest_of(result: dict) -> dict:
    return json.loads((folder_of(result) / "manifest.json").read_text())


def write_run(
    folder: Path, images: list[np.ndarray], config: dict[str, object], results: dict[str, object]
) -> Path:
    """A finished run of these images; what config and results leave out is that of a small one."""
    (folder / "images").mkdir(parents=True)
    for index, image in enumerate(images):
        save_png(folder / "images" / png_name(index), image)
    usual = {"model": "mar_tiny", "weights": "w", "num_images": len(images), "seed": 1}
    config = {**usual, "class_num": len(images), "seed_mode": "image", **config}
    (folder / "manifest.json").write_text(json.dumps({"config": config, "calls": []}))
    usual = {
        "method": "MAR", "images_dir": str(folder / "images"), "num_iter": 4, "cfg": 3.0,
        "sec_per_image": None, "fid": None, "is_mean": None, "device": "cpu", "dtype": "float32",
        "processes": 1, "threads": 1, "eval_bsz": 3, "torch": "2", "commit": "abc",
        "command": "eval.py",
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps({**usual, **results}))
    return folder


def log_of(folder: Path) -> list[dict]:
    """The lines of a training's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def scores(result: dict) -> dict[str, float]:
    return {name: result[name] for name in SCORES}
