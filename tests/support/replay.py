"""CUDA graphs on the CPU: a call is recorded as its operations on its very tensors, and replayed as these.

A replay runs no Python of the call, so whatever Python would have decided again (a slice, a number, a
tensor that lies elsewhere now) is what it was when the call was recorded: as on a card.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Operation = tuple[
    Any, tuple[Any, ...], dict[str, Any], list[Tensor]
]  # function, args, kwargs, results


def _memory(value: object) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in tree_leaves(value) if isinstance(t, Tensor)]


class Recording(TorchDispatchMode):
    """The operations of one call."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        taken = _memory((args, kwargs))
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        made = [t for t in made if t.numel() and t.untyped_storage().data_ptr() not in taken]
        self.operations.append((func, args, kwargs, made))
        return result

    def replay(self) -> None:
        """The same operations, results in the same memory."""
        for func, args, kwargs, made in self.operations:
            result = func(*args, **kwargs)
            fresh = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            if made:
                for old, new in zip(made, fresh, strict=True):
                    old.copy_(new)

    def forget(self) -> None:
        """Spoil what the call made: the memory of a graph serves others behind it."""
        for *_, made in self.operations:
            for tensor in made:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)


class CpuGraphs:
    """Stands in for models.graphs.CudaGraphs.

    forgets: whether calls are in the right to leave nothing behind in their own memory.
    """

    def __init__(self, forgets: bool = True) -> None:
        self.forgets = forgets
        self.warm: set[Hashable] = set()
        self.recordings: dict[Hashable, Recording] = {}
        self.replays = 0

    def __call__(self, key: Hashable, call: Callable[[], None]) -> None:
        if key not in self.warm:
            self.warm.add(key)
            call()
            return
        if key not in self.recordings:
            with Recording() as self.recordings[key]:
                call()
        else:
            self.replays += 1
            self.recordings[key].replay()
        if self.forgets:
            self.recordings[key].forget()
