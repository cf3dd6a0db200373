"""All random draws: of sampled images (ImageNoise) and of a training step (TrainingNoise).

Each token is denoised exactly once, so a decoding order and a tensor of head noise are all the randomness
of a sampled image. Both are drawn from the image's own seed, so the image does not depend on its batch,
the number of processes or caching.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.order import OrderConfig, halton_order


@dataclass(frozen=True, eq=False)
class ImageNoise:
    """Orders and head noise of B images with L tokens of C channels and T denoising steps.

    orders (B, L) int64: a permutation each; its *front* stays masked longest.
    head (B, L, T+1, C) float32: head[b, p, 0] is the initial x_T of token p, head[b, p, 1+k] the
    noise of its k-th denoising step.
    """

    orders: Tensor
    head: Tensor

    @classmethod
    def from_seeds(
        cls,
        seeds: Sequence[int],
        seq_len: int,
        num_sampling_steps: int,
        channels: int,
        device: torch.device | str = "cpu",
    ) -> "ImageNoise":
        """Draw image i from seeds[i] alone (0 <= seed), the same on every device and platform.

        numpy's RandomState has a frozen stream (NEP 19), unlike torch's generators, whose values
        differ between devices and vector widths. Raises ValueError for a negative seed.
        """
        shape = (seq_len, int(num_sampling_steps) + 1, channels)
        orders = np.empty((len(seeds), seq_len), dtype=np.int64)
        head = np.empty((len(seeds), *shape), dtype=np.float32)
        for i, seed in enumerate(seeds):
            if int(seed) < 0:
                raise ValueError(f"seed {int(seed)} is negative; seeds are whole numbers from 0")
            stream = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(int(seed))))
            orders[i] = stream.permutation(seq_len)
            head[i] = stream.standard_normal(shape)
        return cls(torch.from_numpy(orders).to(device), torch.from_numpy(head).to(device))

    def to(self, device: torch.device | str) -> "ImageNoise":
        """The same noise on a device."""
        return ImageNoise(self.orders.to(device), self.head.to(device))

    def select(self, images: Sequence[int]) -> "ImageNoise":
        """The noise of some images."""
        rows = torch.tensor(images, device=self.orders.device)
        return ImageNoise(self.orders[rows], self.head[rows])

    def arranged(self, order: OrderConfig, known: Tensor | None = None) -> "ImageNoise":
        """The same images in another decoding order; with known (B, L) bool, raster, known tokens first.

        Tokens that the new order does not distinguish keep each image's random order.
        """
        decoding = self.orders.flip(1)  # tokens in the order in which they are decoded
        length = decoding.shape[1]
        grid = math.isqrt(length)
        if order.kind == "halton":
            base = torch.tensor(halton_order(grid), device=decoding.device)
            first = decoding[:, :1]
            rows = (base // grid - base[0] // grid + first // grid) % grid
            decoding = rows * grid + (base - base[0] + first) % grid  # (B, L)
        stages = order.stage_of(grid)
        keys = torch.zeros(length, dtype=torch.long) if stages is None else torch.tensor(stages)
        keys = keys.to(decoding.device).expand_as(decoding)
        if known is not None:
            keys = keys.masked_fill(known, -1)
        sort = keys.gather(1, decoding).argsort(dim=1, stable=True)
        return ImageNoise(decoding.gather(1, sort).flip(1), self.head)

    def check(self, batch: int, seq_len: int, num_sampling_steps: int, channels: int) -> None:
        """Raise ValueError unless the shapes are those that the model needs."""
        want_orders = (batch, seq_len)
        want_head = (batch, seq_len, num_sampling_steps + 1, channels)
        if tuple(self.orders.shape) != want_orders or tuple(self.head.shape) != want_head:
            raise ValueError(
                f"the noise has orders {tuple(self.orders.shape)} and head {tuple(self.head.shape)}; "
                f"this call needs {want_orders} and {want_head}"
            )


@dataclass(frozen=True, eq=False)
class TrainingNoise:
    """Random draws of one training step of B images (except dropout).

    They are drawn for all images of a step and split, so the step does not depend on the number of
    processes or accumulated batches.

    known, stop: of each image the first `known` positions of its order are given to the model, and
        the n = stop - known behind them are decoded; the same numbers for all images.
    orders (B, L) int64: a permutation each. dropped (B,) bool: trained without its label.
    latents (B, C, H, W): draws the latents from the tokenizer's posterior.
    timesteps (B, m, n) int64, head (B, m, n, c): m noise levels of each decoded token, and the noise.
    """

    known: int
    stop: int
    orders: Tensor
    dropped: Tensor
    latents: Tensor
    timesteps: Tensor
    head: Tensor

    def part(self, start: int, stop: int) -> "TrainingNoise":
        """The noise of images start..stop."""
        tensors = (self.orders, self.dropped, self.latents, self.timesteps, self.head)
        return TrainingNoise(self.known, self.stop, *(x[start:stop] for x in tensors))
