"""Reference statistics in an npz file, ours or ADM's: a Gaussian of features, and more.

ADM's statistics hold `mu` and `sigma`; its reference batches (VIRTUAL_imagenet256_labeled.npz) also
`mu_s` and `sigma_s` of the spatial features for sFID, and the images as `arr_0`. Ours also state the
number of images and the feature extractor, so that an FID with another extractor is refused, and may
hold the features themselves.
"""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.data.npz import Array, check_array, read_arrays
from util.errors import UserError
from util.files import atomic_path

IMAGES = "arr_0"
_OPTIONAL = ("num_images", "features", "mu_s", "sigma_s", "activations")
_KIND = "file of FID statistics"
_REMEDY = "make it again by `python -m util.metrics make_stats`, or download it again"


@dataclass(frozen=True)
class FidStatistics:
    """Mean `mu` (d,) and covariance `sigma` (d, d); the rest is None if the file does not have it.

    mu_s (e,), sigma_s (e, e): of spatial features. activations (N, d): the features themselves.
    has_images: the file has `arr_0`, see load_images.
    """

    mu: Array
    sigma: Array
    num_images: int | None = None
    features: str | None = None
    mu_s: Array | None = None
    sigma_s: Array | None = None
    activations: Array | None = None
    has_images: bool = False


def save_stats(path: str | os.PathLike, stats: FidStatistics) -> None:
    """Write the npz atomically. Raises UserError when the file system refuses."""
    known = {k: v for k, v in vars(stats).items() if v is not None and k != "has_images"}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **known)


def load_stats(path: str | os.PathLike[str]) -> FidStatistics:
    """Read and check an npz with `mu` and `sigma`. Raises UserError when it is missing or wrong."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"the FID statistics {path} are missing; `python -m util.download fid_stats` gets "
            "ImageNet's, `python -m util.metrics make_stats` makes those of other images"
        )
    found = read_arrays(path, ("mu", "sigma"), _KIND, _REMEDY, optional=_OPTIONAL)
    for name, array in found.items():
        if name != "features" and array.dtype.kind not in "fiu":
            raise UserError(f"{path} is not a {_KIND} ({name} holds {array.dtype}): {_REMEDY}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{path} contains NaN or infinity in {name}: {_REMEDY}")
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mu in found or sigma in found:
            _check_gaussian(path, mu, found.get(mu), sigma, found.get(sigma))
    activations = found.get("activations")
    if activations is not None and activations.shape[1:] != found["mu"].shape:
        raise UserError(
            f"{path} has activations {activations.shape}, its mu is {found['mu'].shape}: {_REMEDY}"
        )
    if any(found[name].ndim for name in ("num_images", "features") if name in found):
        raise UserError(f"{path} is not a {_KIND} (num_images or features is a list): {_REMEDY}")
    return FidStatistics(
        mu=found["mu"],
        sigma=found["sigma"],
        num_images=int(found["num_images"]) if "num_images" in found else None,
        features=str(found["features"]) if "features" in found else None,
        mu_s=found.get("mu_s"),
        sigma_s=found.get("sigma_s"),
        activations=activations,
        has_images=_holds_images(path),
    )


def _check_gaussian(
    path: Path, mu_name: str, mu: Array | None, sigma_name: str, sigma: Array | None
) -> None:
    if mu is None or sigma is None:
        raise UserError(f"{path} has only one of {mu_name} and {sigma_name}: {_REMEDY}")
    if mu.shape != (mu.size,) or sigma.shape != (mu.size, mu.size):
        raise UserError(
            f"{path} has {mu_name} {mu.shape} and {sigma_name} {sigma.shape}; "
            f"FID statistics are (d,) and (d, d): {_REMEDY}"
        )
    largest = np.abs(sigma).max(initial=0)
    skew, smallest = np.abs(sigma - sigma.T).max(initial=0), np.diag(sigma).min(initial=0)
    if skew > 1e-3 * largest or smallest < -1e-6 * largest:  # rounding may go below 0
        raise UserError(f"{path} has a {sigma_name} that is no covariance: {_REMEDY}")


def _holds_images(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return f"{IMAGES}.npy" in archive.namelist()


def check_images(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Shape (N, H, W, 3) of the images of a reference batch, which are read once. UserError: damaged."""
    shape, dtype = check_array(Path(path), IMAGES, _KIND, _REMEDY)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise UserError(f"{path} has {IMAGES} {dtype} {shape}; images are uint8 (N, H, W, 3)")
    return shape


def load_images(path: str | os.PathLike[str]) -> Array:
    """(N, H, W, 3) uint8 of a reference batch; ADM's 10,000 take 2 GB. UserError if it has none."""
    check_images(path)
    return read_arrays(Path(path), (IMAGES,), _KIND, _REMEDY)[IMAGES]
