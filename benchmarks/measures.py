"""Measures that rank sampling methods with less noise than an FID: numbers from tensors, no models.

* relative_error: of z, the decoder's output, beside its exact value.
* path_kl: how far two heads' epsilons drive their denoising runs apart, in nats (Girsanov).
* patch_gaussian, frechet_distance: 3x3 windows of latents, which show seams between tokens.
* tear_ratio: seams between neighbours that were decoded in the same step.
* energy_distance: between two sets of samples of the same distribution, or not.
* paired_fid: difference of two FIDs of the same seeds, with a bootstrap interval.

benchmarks/teacher_forcing.py makes what the first two compare; benchmarks/rank.py and
benchmarks/fid_difference.py are the commands.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import unfold

from diffusion.gaussian import GaussianDiffusion
from models.plan import DecodingPlan
from util.evaluation.sums import Gaussian

PATCH = 3  # tokens on a side of a window
LEVEL = 0.95  # of intervals
LEAST_PER_CLASS = 10  # fewer images of a class say too little about how much they vary


def relative_error(z: Tensor, exact: Tensor) -> Tensor:
    """|z - exact|^2 / |exact|^2 of each image: z and exact (B, n, D) -> (B,)."""
    error, size = ((x.double() ** 2).sum((1, 2)) for x in (z - exact, exact))
    return error / size


def path_kl_weights(diffusion: GaussianDiffusion) -> Tensor:
    """Weights w (T,) float64 of the denoising steps, in the order of a run, for `path_kl`.

    With q = abar / (1 - abar), a step of ancestral sampling with the small posterior variance moves
    u = q x / sqrt(abar) by dq x0 + sqrt(dq) xi: noise is Brownian motion in q. So two predictions of
    x0 cost dq |dx0|^2 / 2 nats at this step, and with |dx0|^2 = |deps|^2 / q the weight is dq / q. The
    last step adds no noise; its weight is 0.
    """
    abar = torch.from_numpy(diffusion.alphas_cumprod)
    q = abar / (1 - abar)  # ascending in a run, whose steps are T-1 .. 0
    weights = torch.zeros_like(q)
    weights[1:] = (q[:-1] - q[1:]) / q[1:]
    return weights.flip(0)


def noise_to_signal(diffusion: GaussianDiffusion) -> Tensor:
    """sigma / alpha (T,) that each denoising step leaves, in the order of a run; 0 after the last."""
    abar = torch.from_numpy(diffusion.alphas_cumprod)
    left = ((1 - abar) / abar).sqrt().flip(0)
    return torch.cat([left[1:], left.new_zeros(1)])


def path_kl(weights: Tensor, epsilons: Tensor, others: Tensor) -> Tensor:
    """Nats (n, T) that each denoising step adds to the KL divergence of two heads' paths.

    weights (T,): path_kl_weights. epsilons, others (n, T, C): both heads' at the states of runs of
    the first one. The expectation over such runs is the KL divergence of the two processes (chain
    rule; Girsanov's theorem), an upper bound of that of their tokens.
    """
    return 0.5 * weights * ((epsilons - others).double() ** 2).sum(-1)


def patches(latents: Tensor, size: int = PATCH) -> Tensor:
    """All size x size windows of latents (N, C, H, W), as (N, windows, C * size^2)."""
    return unfold(latents, size).transpose(1, 2)


def patch_gaussian(latents: Tensor, size: int = PATCH) -> Gaussian:
    """Gaussian of the windows of all latents (N, C, H, W)."""
    windows = patches(latents.double(), size).flatten(0, 1).cpu()
    return Gaussian(windows.mean(0).numpy(), windows.T.cov().numpy())


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2))."""
    return _frechet(a.mu, a.sigma, b, _root(b.sigma))


def _root(sigma: np.ndarray) -> np.ndarray:
    """Symmetric square root of a covariance (d, d)."""
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _frechet(mu: np.ndarray, sigma: np.ndarray, to: Gaussian, root: np.ndarray) -> float:
    """Frechet distance to a Gaussian, the square root of whose covariance is `root`."""
    # tr (A B)^(1/2) is the sum of the roots of the eigenvalues of B^(1/2) A B^(1/2).
    product = np.linalg.eigvalsh(root @ sigma @ root)
    cross = np.sqrt(product.clip(min=0)).sum()
    shift = ((mu - to.mu) ** 2).sum()
    return float(shift + np.trace(sigma) + np.trace(to.sigma) - 2 * cross)


def steps_of_positions(plan: DecodingPlan, orders: Tensor) -> Tensor:
    """The step that decodes each token, raster order (B, L); orders (B, L) as in ImageNoise."""
    by_rank = torch.empty(plan.seq_len, dtype=torch.long)
    for step in plan.steps:
        by_rank[step.start : step.stop] = step.index
    orders = orders.cpu().flip(1)  # their front comes last
    return torch.empty_like(orders).scatter_(1, orders, by_rank.expand_as(orders))


def tear_ratio(tokens: Tensor, steps: Tensor) -> float:
    """Mean squared difference of adjacent tokens decoded in one step, over that of all others.

    tokens (N, h, w, c); steps (N, h, w): the step that decodes each. 1: no seam. NaN where no two
    neighbours share a step.
    """
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for axis in (1, 2):
        length = tokens.shape[axis] - 1
        first, second = (x.narrow(axis, 0, length) for x in (tokens, steps))
        third, fourth = (x.narrow(axis, 1, length) for x in (tokens, steps))
        distance = ((first - third).double() ** 2).sum(-1).cpu()
        same = (second == fourth).cpu()
        for i, chosen in enumerate((same, ~same)):
            sums[i] += (distance * chosen).sum()
            counts[i] += chosen.sum()
    together, apart = (sums / counts).tolist()
    return together / apart


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| (Szekely & Rizzo 2013): 0 for equal distributions alone.

    x, y (m, C): sample i of both may share its noise, so pairs of equal number are left out. The
    estimate is unbiased and may be below 0.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"{len(x)} and {len(y)} samples; both need the same number, 2 or more")
    x, y = x.double(), y.double()
    different = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    # The formula with a square of sums is inexact for close points.
    xy, xx, yy = (
        torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")[different].mean().item()
        for a, b in ((x, y), (x, x), (y, y))
    )
    return 2 * xy - xx - yy


@dataclass(frozen=True)
class FidDifference:
    """FIDs of two sets of images against one reference; `low` to `high` is the 95% interval of
    `difference` = fid - base."""

    base: float
    fid: float
    difference: float
    low: float
    high: float


def paired_fid(
    base: np.ndarray,
    features: np.ndarray,
    reference: Gaussian,
    resamples: int = 1000,
    seed: int = 0,
    rows_per_image: int = 1,
    labels: np.ndarray | None = None,
) -> FidDifference:
    """FID of `features` minus that of `base`, with a percentile bootstrap interval.

    base, features (N, d): row i of both is of the same label and seed, so images are resampled
    together: what both sets owe to their seeds cancels. An image has `rows_per_image` rows, one after
    the other. labels: class of each image, where a run fixes how many images a class has; images are
    resampled within their class then, if each has LEAST_PER_CLASS or more. The reference is taken as
    exact. Raises ValueError for sets of other sizes.
    """
    if base.shape != features.shape or len(base) < 2:
        raise ValueError(
            f"features {base.shape} and {features.shape}; both sets need the same 2 or more images"
        )
    center = reference.mu
    sets = [x.astype(np.float64) - center for x in (base, features)]
    centered, root = Gaussian(np.zeros_like(center), reference.sigma), _root(reference.sigma)

    def fid_of(x: np.ndarray, counts: np.ndarray) -> float:
        """FID of row i taken counts[i] times."""
        total = counts.sum()
        mu = counts @ x / total
        sigma = ((x * counts[:, None]).T @ x - total * np.outer(mu, mu)) / (total - 1)
        return _frechet(mu, sigma, centered, root)

    count = len(base) // rows_per_image
    first, second = (fid_of(x, np.ones(len(base))) for x in sets)
    random = np.random.default_rng(seed)
    groups, differences = strata(count, labels), []
    for _ in range(resamples):
        drawn = np.concatenate(
            [images[random.integers(len(images), size=len(images))] for images in groups]
        )
        counts = np.bincount(drawn, minlength=count).astype(np.float64)
        ours, theirs = (fid_of(x, counts.repeat(rows_per_image)) for x in sets)
        differences.append(theirs - ours)
    low, high = np.quantile(differences, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    return FidDifference(first, second, second - first, low, high)


def strata(count: int, labels: np.ndarray | None) -> list[np.ndarray]:
    """Indices of the images that are resampled together: those of a class, or all."""
    if labels is not None:
        classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        if min(map(len, classes)) >= LEAST_PER_CLASS:
            return classes
    return [np.arange(count)]


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> "Estimate":
        """values (N,): one of each image. The error of a single image is NaN."""
        values = values.double()
        return cls(values.mean().item(), (values.std() / math.sqrt(len(values))).item())

    @classmethod
    def ratio(cls, values: Tensor, base: Tensor) -> "Estimate":
        """Mean of values (N,) over that of base (N,), of the same images, by the delta method.

        NaN if the base is 0.
        """
        values, base = values.double(), base.double()
        ratio = values.mean() / base.mean()
        rest = (values - ratio * base) / base.mean()
        return cls(ratio.item(), (rest.std() / math.sqrt(len(base))).item())
