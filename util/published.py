"""Published results on ImageNet 256x256, one row per script of scripts/ that reproduces it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """FID and IS of 50,000 images; seconds per image and operations where they were published.

    num_iter, cfg, temperature: how it was sampled. LazyMAR's paper names no guidance; 3.25 is that of
    its eval.py.
    """

    model: str
    lazy_mar: bool
    num_iter: int
    cfg: float
    temperature: float
    fid: float
    inception: float
    gpu_s: float | None = None  # RTX 3090
    cpu_s: float | None = None
    tflops: float | None = None


def _mar(model: str, cfg: float, fid: float, inception: float) -> Published:
    """Li et al. 2024: 256 steps; without guidance at temperature 0.95 (MAR's README)."""
    return Published(model, False, 256, cfg, 0.95 if cfg == 1.0 else 1.0, fid, inception)


def _lazymar(model: str, lazy_mar: bool, *results: float) -> Published:
    """Yan et al. 2025: 64 steps."""
    return Published(model, lazy_mar, 64, 3.25, 1.0, *results)


ROWS = {
    "mar_base_256": _mar("mar_base", 2.9, 2.31, 281.7),
    "mar_large_256": _mar("mar_large", 3.0, 1.78, 296.0),
    "mar_huge_256": _mar("mar_huge", 3.2, 1.55, 303.7),
    "mar_base_nocfg": _mar("mar_base", 1.0, 3.48, 192.4),
    "mar_large_nocfg": _mar("mar_large", 1.0, 2.60, 221.4),
    "mar_huge_nocfg": _mar("mar_huge", 1.0, 2.35, 227.8),
    "mar_base_64": _lazymar("mar_base", False, 2.32, 281.1, 0.47, 28.97, 15.49),
    "mar_large_64": _lazymar("mar_large", False, 1.82, 296.1, 0.93, 59.66, 35.05),
    "mar_huge_64": _lazymar("mar_huge", False, 1.59, 299.1, 1.74, 116.61, 69.06),
    "lazymar_base": _lazymar("mar_base", True, 2.45, 281.3, 0.21, 11.08, 5.54),
    "lazymar_large": _lazymar("mar_large", True, 1.93, 297.4, 0.40, 22.82, 12.52),
    "lazymar_huge": _lazymar("mar_huge", True, 1.69, 299.2, 0.75, 43.12, 24.38),
}


def tflops_at_64(model: str, lazy_mar: bool) -> float:
    """Published operations per image at 64 steps, in T."""
    rows = ROWS.values()
    return next(
        row.tflops for row in rows if (row.model, row.lazy_mar) == (model, lazy_mar) and row.tflops
    )
