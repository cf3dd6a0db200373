"""Key-value caches of raster-order generation: the full one, and LineAR's few lines.

LineAR (Qin et al., arXiv 2512.04857): tokens form lines of a grid. The first tokens (anchors) and the
newest lines stay. Of the others, each complete line evicts as many tokens as it added: those that its own
queries attended to least, because the next line attends to similar places. Tokens are chosen per layer,
sequence and head; their number is a Python integer known before the first token.

The buffer holds the condition, the budget and one line. Keys include their position (RoPE), so the order
of slots does not matter: the new line moves into the slots of evicted tokens, and the live slots are
always a prefix of the buffer, attended to as a view, without a mask.
"""

from collections.abc import Hashable

import torch
from torch import Tensor

from models.line_config import LineARConfig
from models.line_methods import METHODS, LineView
from models.line_plan import CONDITION, LinePlan

__all__ = [
    "KVCache",
    "KVLayer",
    "LineARConfig",
    "LineLayer",
    "LinePlan",
    "make_cache",
    "make_layer",
]

MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but its sign


class KVLayer:
    """Keys and values of one layer, (rows, H, slots, d) each, allocated once in the model's dtype.

    Per call of the layer: `append`, then `remember` the queries, and `advance` when the attention is
    computed.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.live = 0  # slots in use: a prefix
        self.count = 0  # positions seen, the condition included
        self.k = self.v = torch.empty(0)  # until the first call

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k, v (rows, H, m, d) of the next m positions; what to attend to: views of the live slots."""
        if self.k.numel() == 0:
            self._allocate(k)
        stop = self.live + k.shape[2]
        if stop > self.slots:
            raise ValueError(f"the cache is full: it has {self.slots} slots")
        self.k[:, :, self.live : stop] = k
        self.v[:, :, self.live : stop] = v
        return self.k[:, :, :stop], self.v[:, :, :stop]

    def put(
        self, slot: Tensor, place: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: int
    ) -> tuple[Tensor, Tensor]:
        """`append` and `remember` of one position, for StepCache: q, k, v (rows, H, 1, d).

        slot, place: (1,) int64, where keys and values go, and the query in its line. Returns views of
        the first `attended` slots.
        """
        del place, q
        if self.k.numel() == 0:
            self._allocate(k)
        self.k.index_copy_(2, slot, k)
        self.v.index_copy_(2, slot, v)
        return self.k[:, :, :attended], self.v[:, :, :attended]

    def reset(self) -> None:
        """Clear the contents, keep the memory."""
        self.live = self.count = 0
        self.k.zero_()
        self.v.zero_()

    def remember(self, q: Tensor) -> None:
        """See the queries (rows, heads, m, d) of the positions just appended."""

    def hide(self, hidden: Tensor) -> None:
        """Mark padding among the first positions, hidden (rows, m) bool: it is not attended to."""

    def advance(self, positions: int = 1) -> None:
        """The appended positions have been attended to."""
        self.live += positions
        self.count += positions

    def _allocate(self, k: Tensor) -> None:
        shape = (k.shape[0], k.shape[1], self.slots, k.shape[3])
        self.k, self.v = k.new_zeros(shape), k.new_zeros(shape)  # a mask may hide only numbers

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self.k.nbytes + self.v.nbytes

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of other buffers."""
        return 0


class LineLayer(KVLayer):
    """A layer that is compressed to its budget whenever a line is complete.

    Query heads that share a key head (grouped-query attention) decide together.
    """

    def __init__(self, slots: int, plan: LinePlan, config: LineARConfig) -> None:
        super().__init__(slots)
        self.plan = plan
        self.method = METHODS[config.method]
        self.pooling = config.pooling
        self.queries = torch.empty(0)  # (rows, H, line * groups, d), of this line
        self.positions = torch.empty(0)  # (rows, H, slots): which token it is
        self.scores = torch.empty(0)  # (rows, H, slots), if they accumulate
        self.hidden: Tensor | None = None  # (rows, 1, slots), if the condition is padded

    def remember(self, q: Tensor) -> None:
        if not self.method.needs_queries:
            return
        heads, groups = self.k.shape[1], q.shape[1] // self.k.shape[1]
        queries = self._queries(q, heads, groups)
        token = self.count - self.plan.condition
        if token >= 0:
            start = token % self.plan.line * groups
            queries[:, :, start : start + groups] = q[:, :, 0].unflatten(1, (heads, groups))

    def put(
        self, slot: Tensor, place: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: int
    ) -> tuple[Tensor, Tensor]:
        if self.method.needs_queries:  # of the condition too; the line's last query overwrites it
            self._queries(q, q.shape[1], groups=1).index_copy_(2, place, q)
        return super().put(slot, place, q, k, v, attended)

    def _queries(self, q: Tensor, heads: int, groups: int) -> Tensor:
        """The line's queries, allocated at the first call."""
        if self.queries.numel() == 0:
            self.queries = q.new_empty(len(q), heads, self.plan.line * groups, q.shape[3])
        return self.queries

    def reset(self) -> None:
        super().reset()
        if self.positions.numel():
            self.positions.copy_(torch.arange(self.slots, device=self.positions.device))
        self.scores.zero_()

    def hide(self, hidden: Tensor) -> None:
        self.hidden = hidden.new_zeros(len(hidden), 1, self.slots)
        self.hidden[:, 0, : hidden.shape[1]] = hidden

    def advance(self, positions: int = 1) -> None:
        super().advance(positions)
        if self.completes_line:
            self.end_line(self.count)

    @property
    def completes_line(self) -> bool:
        """Whether the last position was the last one of a line."""
        tokens = self.count - self.plan.condition
        return tokens > 0 and tokens % self.plan.line == 0

    def _allocate(self, k: Tensor) -> None:
        super()._allocate(k)
        rows, heads = k.shape[:2]
        last = self.plan.condition + self.plan.line * (self.plan.lines + 1)
        dtype = torch.int16 if last <= torch.iinfo(torch.int16).max else torch.int32
        index = torch.arange(self.slots, device=k.device, dtype=dtype)
        self.positions = index.repeat(rows, heads, 1)  # until the first eviction
        if self.method.cumulative:
            self.scores = torch.zeros(rows, heads, self.slots, device=k.device)

    def end_line(self, count: int | Tensor) -> None:
        """Score the live tokens where that is needed; if the buffer is full, evict one line.

        count: positions seen, as a number or as a tensor (1,) on the device.
        """
        line, live = self.plan.line, self.live
        full = live == self.plan.condition + self.plan.budget + line
        newest = torch.arange(-line, 0, device=self.positions.device) + count
        self.positions[:, :, live - line : live] = newest
        if not (full or self.method.cumulative):
            return
        view = LineView(
            self.queries,
            self.k[:, :, :live],
            self.positions[:, :, :live],
            self.pooling,
            self.plan,
            None if self.hidden is None else self.hidden[:, :, :live],
        )
        with torch.autocast(self.k.device.type, enabled=False):
            score = self.method.score(view)
        if self.method.cumulative:
            score = self.scores[:, :, :live].add_(score)
        if full:
            self._evict(self._holes(score, view.positions, count))
            self.live -= line

    def _holes(self, score: Tensor, position: Tensor, count: int | Tensor) -> Tensor:
        """Slots (rows, H, line) of the tokens to evict: the lowest scores that are not protected.

        Of equal scores the oldest token is evicted.
        """
        image = position - self.plan.condition  # < 0: the condition
        newest = count - self.plan.condition - self.plan.recent
        protected = (image < self.plan.anchors) | (image >= newest)
        bits = score.masked_fill(protected, torch.inf).view(torch.int32)
        bits = torch.where(bits < 0, bits ^ MAGNITUDE, bits)  # ordered as the floats are
        key = (bits.long() << 32) | position
        return key.topk(self.plan.line, dim=-1, largest=False).indices

    def _evict(self, holes: Tensor) -> None:
        """Move the rows of the newest line into the holes; its own slots are free then."""
        start, stop = self.live - self.plan.line, self.live
        buffers = [self.k, self.v, self.positions]
        if self.method.cumulative:
            buffers.append(self.scores)
        for buffer in buffers:
            newest = buffer[:, :, start:stop]
            at = holes if buffer.dim() == 3 else holes[..., None].expand_as(newest)
            buffer.scatter_(2, at, newest.clone())
        if self.method.cumulative:
            self.scores[:, :, start:stop] = 0

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of the line's queries, the positions and the accumulated scores."""
        held = self.queries.nbytes + self.positions.nbytes + self.scores.nbytes
        return held + (0 if self.hidden is None else self.hidden.nbytes)


class KVCache:
    """The layers of one call of GPT.sample_tokens.

    `update` is called by every layer for each position, then `advance` once.
    """

    def __init__(self, layers: list[KVLayer]) -> None:
        self.layers = layers

    def update(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k, v (rows, H, 1, d) of the next position; what to attend to: views of the live slots."""
        kv = self.layers[layer].append(k, v)
        self.layers[layer].remember(q)
        return kv

    def reset(self) -> None:
        """Clear the contents, keep the memory."""
        for layer in self.layers:
            layer.reset()

    def go_to(self, position: int) -> Hashable:
        """The next position is this one; returns what its program depends on, see StepCache."""
        return position

    def begin(self) -> Tensor | None:
        """Called once per position, before the layers: the mask of their attention, or None."""

    def advance(self) -> None:
        for layer in self.layers:
            layer.advance()

    @property
    def slots(self) -> int:
        """Rows of the buffers per head."""
        return self.layers[0].slots

    @property
    def live(self) -> int:
        """Rows in use."""
        return self.layers[0].live

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of other buffers."""
        return sum(layer.workspace_nbytes for layer in self.layers)


def make_layer(config: LineARConfig, plan: LinePlan, slots: int) -> KVLayer:
    """An empty layer: compressed, unless the plan keeps all lines."""
    return LineLayer(slots, plan, config) if plan.compressed else KVLayer(slots)


def make_cache(
    line_ar: LineARConfig | bool | None,
    grid: tuple[int, int],
    layers: int,
    condition: int = CONDITION,
) -> KVCache:
    """An empty cache for one call. ValueError if the budget does not fit the grid."""
    config = LineARConfig.from_argument(line_ar)
    plan = config.plan(grid, condition)
    return KVCache([make_layer(config, plan, plan.slots) for _ in range(layers)])
