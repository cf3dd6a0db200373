"""What LazyMAR remembers between decoding steps: keys, values, and the probe layer's last values.

Sequences are in decoding order behind the buffer, so the encoder's cache only ever grows at its end.
The methods that take (k, v) are KVUpdates for models.layers.Attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Keys and values (rows, H, capacity, d) of one layer, allocated once at exactly this size."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows = rows
        self.capacity = capacity
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def refill(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the first `rows` rows of k, v (B, H, n, d); attend to k, v as they are."""
        self._allocate(k)
        self.k[:, :, : k.shape[2]] = k[: self.rows]
        self.v[:, :, : v.shape[2]] = v[: self.rows]
        return k, v

    def append(self, buffer_size: int, end: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Renew the buffer and append the new tokens so that they end at `end`; attend to all."""
        self._allocate(k)  # the first of all, where without a buffer nothing was known before
        start = end - (k.shape[2] - buffer_size)
        for cached, new in ((self.k, k), (self.v, v)):
            cached[:, :, :buffer_size] = new[:, :, :buffer_size]
            cached[:, :, start:end] = new[:, :, buffer_size:]
        return self.k[:, :, :end], self.v[:, :, :end]

    def _allocate(self, k: Tensor) -> None:
        if self.k is None:
            shape = (self.rows, k.shape[1], self.capacity, k.shape[3])
            self.k, self.v = k.new_empty(shape), k.new_empty(shape)

    def scatter(self, index: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Renew the positions index (rows, n) by k, v (rows, H, n, d); attend to all positions."""
        at = index[:, None, :, None].expand_as(k)
        self.k.scatter_(2, at, k)
        self.v.scatter_(2, at, v)
        return self.k, self.v

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.k is None else self.k.nbytes + self.v.nbytes


class ProbeCache:
    """Values (rows, H, n, d) of the probe layer at the last step; tells which positions changed."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.v: Tensor | None = None

    def refill(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the first `rows` rows of v; attend to k, v as they are."""
        if self.v is None:
            self.v = torch.empty_like(v[: self.rows])
        self.v.copy_(v[: self.rows])
        return k, v

    def similarity(self, v: Tensor) -> Tensor:
        """Cosine similarity (rows, n), averaged over heads, of each position's new value v
        (rows, H, n, d) to the remembered one (LazyMAR, section 3.2); remembers v.
        """
        similarity = F.cosine_similarity(v.float(), self.v.float(), dim=-1).mean(dim=1)
        self.v.copy_(v)
        return similarity

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.v is None else self.v.nbytes
