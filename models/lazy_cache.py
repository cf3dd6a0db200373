"""LazyMAR's caches between decoding steps: keys, values, and the last values of the probe layer.

Sequences are in decoding order behind the buffer, so the encoder's cache only grows at its end. Methods
that take (k, v) are KVUpdates of models.layers.Attention. Rows are the batch of all branches.
"""

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
        rows = min(self.rows, len(k))
        for cached, new in zip(self._allocated(k), (k, v), strict=True):
            cached[:rows, :, : new.shape[2]] = new[:rows]
        return k, v

    def renew(
        self, buffer_size: int, end: int, known: int, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Renew the first buffer_size positions and those that end at `end`, by k, v (B, H, n, d).

        B may be less than `rows`. Attend to the first `known` positions.
        """
        all_k, all_v = self._allocated(k)  # here, where without a buffer nothing was known before
        rows, start = len(k), end - (k.shape[2] - buffer_size)
        for cached, new in ((all_k, k), (all_v, v)):
            cached[:rows, :, :buffer_size] = new[:, :, :buffer_size]
            cached[:rows, :, start:end] = new[:, :, buffer_size:]
        return all_k[:rows, :, :known], all_v[:rows, :, :known]

    def _allocated(self, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is None or self.v is None:
            shape = (self.rows, k.shape[1], self.capacity, k.shape[3])
            self.k, self.v = k.new_empty(shape), k.new_empty(shape)
        return self.k, self.v

    def scatter(self, index: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Renew the positions index (rows, n) by k, v (rows, H, n, d); attend to all positions."""
        assert self.k is not None and self.v is not None  # of the refresh before
        at, rows = index[:, None, :, None].expand_as(k), len(k)
        return self.k[:rows].scatter_(2, at, k), self.v[:rows].scatter_(2, at, v)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.k, self.v) if tensor is not None)


class ProbeCache:
    """Values (rows, H, n, d) of the probe layer at the last step; tells which positions changed."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.v: Tensor | None = None

    def refill(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the first `rows` rows of v; attend to k, v as they are."""
        if self.v is None:
            self.v = v.new_empty(self.rows, *v.shape[1:])
        rows = min(self.rows, len(v))
        self.v[:rows] = v[:rows]
        return k, v

    def similarity(self, v: Tensor) -> Tensor:
        """Cosine similarity (rows, n), averaged over heads, of each position's new value v
        (rows, H, n, d) to the remembered one (LazyMAR, section 3.2); remembers v.
        """
        assert self.v is not None  # of the refresh before
        before = self.v[: len(v)]
        similarity = F.cosine_similarity(v.float(), before.float(), dim=-1).mean(dim=1)
        before.copy_(v)
        return similarity

    @property
    def nbytes(self) -> int:
        return 0 if self.v is None else self.v.nbytes
