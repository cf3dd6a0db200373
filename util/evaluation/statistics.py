"""Reference statistics in an npz file, ours or ADM's: a Gaussian of features, and more.

ADM's statistics hold `mu` and `sigma`; its reference batches (VIRTUAL_imagenet256_labeled.npz) besides
`mu_s` and `sigma_s` of the spatial features for sFID, and the images as `arr_0`. Ours say how many
images and which feature extractor made them, so that an FID against statistics of another extractor
is refused, and may hold the features themselves.
"""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.errors import UserError
from util.files import atomic_path


@dataclass(frozen=True)
class FidStatistics:
    """Mean `mu` (d,) and covariance `sigma` (d, d); the rest is None where the file is silent.

    mu_s (e,), sigma_s (e, e): of spatial features. activations (N, d): the features themselves.
    has_images: the file has `arr_0`, see load_images.
    """

    mu: np.ndarray
    sigma: np.ndarray
    num_images: int | None = None
    features: str | None = None
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None
    activations: np.ndarray | None = None
    has_images: bool = False


def save_stats(path: str | os.PathLike, stats: FidStatistics) -> None:
    """Write the npz atomically. Raises UserError when the file system refuses."""
    known = {k: v for k, v in vars(stats).items() if v is not None and k != "has_images"}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **known)


def load_stats(path: str | os.PathLike) -> FidStatistics:
    """Read and check an npz with `mu` and `sigma`. Raises UserError when it is missing or wrong."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"the FID statistics {path} are missing; `python -m util.download fid_stats` gets "
            "ImageNet's, `python -m util.metrics make_stats` makes those of other images"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            stats = FidStatistics(
                mu=file["mu"],
                sigma=file["sigma"],
                num_images=int(file["num_images"]) if "num_images" in file else None,
                features=str(file["features"]) if "features" in file else None,
                mu_s=file.get("mu_s"),
                sigma_s=file.get("sigma_s"),
                activations=file.get("activations"),
                has_images="arr_0" in file,
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is no file of FID statistics ({error}); it must be an npz with mu and sigma"
        ) from error
    for mu, sigma in ((stats.mu, stats.sigma), (stats.mu_s, stats.sigma_s)):
        if mu is None:
            continue
        if mu.shape != (mu.size,) or sigma.shape != (mu.size, mu.size):
            raise UserError(
                f"{path} has mu {mu.shape} and sigma {sigma.shape}; "
                "FID statistics are (d,) and (d, d)"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError(
                f"{path} contains NaN or infinity; make or download the statistics again"
            )
    return stats


def load_images(path: str | os.PathLike) -> np.ndarray:
    """(N, H, W, 3) uint8 of a reference batch; ADM's 10,000 take 2 GB. UserError if it has none."""
    with np.load(path, allow_pickle=False) as file:
        images = file["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(
            f"{path} has arr_0 {images.dtype} {images.shape}; images are uint8 (N, H, W, 3)"
        )
    return images
