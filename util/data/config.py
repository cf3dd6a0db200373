"""DataConfig: where the training data are, and how they are read."""

from dataclasses import dataclass

from util.config import setting


@dataclass(frozen=True)
class DataConfig:
    """Training data: images in class folders, or their cached latents."""

    data_path: str = setting("./data/imagenet", "images in DIR/train/CLASS/*", metavar="DIR")
    use_cached: bool = setting(False, "train on the latents of --cached_path")
    cached_path: str | None = setting(
        None, "latents in DIR/CLASS/*.npz, written by main_cache.py", metavar="DIR"
    )
    cache_in_memory: bool | None = setting(
        None, "read all latents into memory; default: if they are below 4 GiB"
    )
    check_data: bool = setting(False, "read every file before training")
    num_workers: int = setting(10, "processes that read data", least=0)
    pin_mem: bool = setting(True, "page-locked batches for CUDA")
