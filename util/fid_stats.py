"""Reference statistics of FID: a Gaussian of features in an npz file, ours or ADM's.

ADM's files hold `mu` and `sigma`; ours say besides how many images and which feature extractor
made them, so that an FID against statistics of another extractor is refused.
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
    """Mean `mu` (d,) and covariance `sigma` (d, d); the rest is None where the file is silent."""

    mu: np.ndarray
    sigma: np.ndarray
    num_images: int | None = None
    features: str | None = None


def save_stats(path: str | os.PathLike, stats: FidStatistics) -> None:
    """Write the npz atomically. Raises UserError when the file system refuses."""
    known = {name: value for name, value in vars(stats).items() if value is not None}
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
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is no file of FID statistics ({error}); it must be an npz with mu and sigma"
        ) from error
    dim = stats.mu.size
    if stats.mu.shape != (dim,) or stats.sigma.shape != (dim, dim):
        raise UserError(
            f"{path} has mu {stats.mu.shape} and sigma {stats.sigma.shape}; "
            "FID statistics are (d,) and (d, d)"
        )
    if not (np.isfinite(stats.mu).all() and np.isfinite(stats.sigma).all()):
        raise UserError(f"{path} contains NaN or infinity; make or download the statistics again")
    return stats
