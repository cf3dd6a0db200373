"""Decoding order: which tokens are decoded at each step. Integers only."""

import math
import operator
from dataclasses import dataclass
from functools import cache

from util.config import setting

ORDERS = ("random", "halton", "gtr")


@dataclass(frozen=True)
class OrderConfig:
    """Decoding order; the default is MAR's. All follow from the image's own random order.

    kind: random; halton, tokens far from earlier ones (Besnier et al. 2025), a low-discrepancy sequence
        shifted to the image's first token; gtr, generation-then-reconstruction (Yan et al., arXiv
        2510.17171), first a coarse grid in many steps, then the tokens between in few.
    stages: K grids of gtr. Stage K holds the tokens with (row + column) mod 2 = 1, stage K-1 those with
        (row + column) mod 4 = 2, and so on; stage 1 the others. Inside a stage the order is random.
    rates: tokens per step of each stage, in proportion: they share out the decoding steps.
    """

    kind: str = setting(
        "random", "order in which tokens are decoded", flag="decoding_order", choices=ORDERS
    )
    stages: int = 3
    rates: tuple[float, ...] = (8 / 3, 32 / 3, 64.0)

    def __post_init__(self) -> None:
        if self.kind not in ORDERS:
            raise ValueError(f"order is {self.kind!r}; use one of {', '.join(ORDERS)}")
        if operator.index(self.stages) < 2:
            raise ValueError(f"stages is {self.stages}; it must be at least 2")
        object.__setattr__(self, "rates", tuple(float(rate) for rate in self.rates))
        positive = all(0 < rate < math.inf for rate in self.rates)
        if len(self.rates) != self.stages or not positive:
            raise ValueError(f"rates are {self.rates}; give {self.stages} positive numbers")

    @classmethod
    def from_argument(cls, order: "OrderConfig | str | None") -> "OrderConfig":
        """The argument of sample_tokens: a kind, None for MAR's, or an OrderConfig."""
        if isinstance(order, cls):
            return order
        if order is not None and not isinstance(order, str):
            raise ValueError(f"order is {order!r}; give an OrderConfig or one of {ORDERS}")
        return cls("random" if order is None else order)

    def stage_of(self, grid: int) -> list[int] | None:
        """Stage 0..K-1 of each token, raster order; None where there are no stages."""
        if self.kind != "gtr":
            return None
        places = (row + column for row in range(grid) for column in range(grid))
        last = self.stages - 1
        # The number of trailing zero bits: 0 is the last stage.
        zeros = (min(last, ((p & -p) or 1 << self.stages).bit_length() - 1) for p in places)
        return [last - z for z in zeros]

    def masked_after(self, length: int, num_iter: int) -> list[int]:
        """Of `length` tokens, those still masked after each of num_iter steps; 0 after the last.

        Without stages: MaskGIT's cosine as in MAR's code, floor(L cos(pi/2 (s+1)/T)), at least 1, at
        most one fewer than before. With stages: as many tokens per step as a stage's steps allow.
        """
        stages = self.stage_of(math.isqrt(length))
        if stages is None:
            left: list[int] = []
            masked = length
            for s in range(num_iter - 1):
                exact = math.floor(length * math.cos(math.pi / 2 * (s + 1) / num_iter))
                masked = max(1, min(masked - 1, exact))
                left.append(masked)
            return [*left, 0]
        sizes = [stages.count(k) for k in range(self.stages)]
        masked, counts = length, []
        for size, steps in zip(sizes, _shares(sizes, self.rates, num_iter), strict=True):
            counts += [masked - size * (k + 1) // steps for k in range(steps)]
            masked -= size if steps else 0
        return [*counts[:-1], 0]


def _shares(sizes: list[int], rates: tuple[float, ...], num_iter: int) -> list[int]:
    """Steps of each stage: size / rate in proportion, rounded; at least 1 while steps remain."""
    wanted = [size / rate for size, rate in zip(sizes, rates, strict=True)]
    left, steps = num_iter, []
    for k in reversed(range(len(sizes))):  # the short last stages first, the first takes the rest
        exact = num_iter * wanted[k] / sum(wanted)
        share = left if k == 0 else min(max(1, round(exact)), left - (left > 1))
        steps.append(share)
        left -= share
    return steps[::-1]


@cache
def halton_order(grid: int) -> tuple[int, ...]:
    """All tokens of a grid, raster numbers, in the order in which Halton's points (bases 2, 3) hit them."""
    order: dict[int, None] = {}
    n = 1
    while len(order) < grid * grid:
        row, column = (int(grid * _radical_inverse(n, base)) for base in (2, 3))
        order[row * grid + column] = None
        n += 1
    return tuple(order)


def _radical_inverse(n: int, base: int) -> float:
    """The digits of n in this base, mirrored behind the point."""
    value, weight = 0.0, 1.0 / base
    while n:
        n, digit = divmod(n, base)
        value += digit * weight
        weight /= base
    return value
