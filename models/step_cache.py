"""A key-value cache for steps that are CUDA graphs.

KVCache writes at a Python integer and attends to a view of the live slots, so every step is a different
program. Here a tensor says where to write, and a step attends to a multiple of BUCKET slots, of which a
mask hides those that are not live: there is one program per bucket, and each runs often.
"""

from collections.abc import Hashable

import torch
from torch import Tensor

from models.graphs import Runner
from models.line_cache import KVCache, LineARConfig, LineLayer, make_layer

# Masked attention on CUDA wants masks aligned to 16 elements. At 24x24 tokens a full cache then attends to
# 3% more slots than are live, LineAR at 1/6 to 8%.
BUCKET = 16


class StepCache(KVCache):
    """The layers of many calls, one image each per row; `reset` begins another one.

    position: (1,) int64, the next position, on the device; read by every call, so that it may change
    between them. run: does what a complete line asks for.
    """

    def __init__(
        self,
        line_ar: LineARConfig | bool | None,
        grid: tuple[int, int],
        layers: int,
        position: Tensor,
        dtype: torch.dtype,
        run: Runner,
    ) -> None:
        """dtype: of queries, keys and values. ValueError if the budget does not fit the grid."""
        config = LineARConfig.from_argument(line_ar)
        self.plan = config.plan(grid)
        slots = -(-self.plan.slots // BUCKET) * BUCKET
        super().__init__([make_layer(config, self.plan, slots) for _ in range(layers)])
        self.position, self.run = position, run
        positions = range(self.plan.condition + self.plan.line * self.plan.lines - 1)
        self.live_at = [self.plan.live(i) for i in positions]
        self.slot_at = torch.tensor(self.live_at, device=position.device)
        self.index = torch.arange(slots, device=position.device)
        self.visible = torch.zeros(slots, dtype=dtype, device=position.device)
        self.attended = 0  # slots at this step
        self.slot, self.place = position, position

    def go_to(self, position: int) -> Hashable:
        live = self.live_at[position]
        self.attended = -(-(live + 1) // BUCKET) * BUCKET
        for layer in self.layers:
            layer.live, layer.count = live, position
        return self.attended

    def begin(self) -> Tensor:
        self.slot = self.slot_at.index_select(0, self.position)
        self.place = (self.position - self.plan.condition) % self.plan.line
        hidden = self.index[: self.attended] > self.slot
        return self.visible[: self.attended].masked_fill(hidden, -torch.inf)[None, None, None]

    def update(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers[layer].put(self.slot, self.place, q, k, v, self.attended)

    def advance(self) -> None:
        for layer in self.layers:
            layer.live, layer.count = layer.live + 1, layer.count + 1
        first = self.layers[0]
        if isinstance(first, LineLayer) and first.completes_line:
            self.run(("line", first.live), self._end_line)

    def _end_line(self) -> None:
        for layer in self.layers:
            assert isinstance(layer, LineLayer)
            layer.end_line(self.position + 1)
