"""torch.compile and CUDA graphs for the calls of a decoding loop."""

from collections.abc import Callable, Hashable

import torch

# Runs a call, which takes nothing, returns nothing and is the same for the same key.
Runner = Callable[[Hashable, Callable[[], None]], None]
VARIANTS = 64  # of one function: row counts, with guidance or not, memory layouts


def compiled(function: Callable) -> Callable:
    """torch.compile for any number of rows; the default limit of 8 variants ends in eager mode."""
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), VARIANTS))
    return torch.compile(function, dynamic=True)


class CudaGraphs:
    """Runs a call as it is the first time, records it the second time, and replays it from then on.

    A call reads and writes tensors that keep their addresses. Graphs of one instance share their memory,
    so a call may leave data in it for later calls only if all calls are replayed in the order in which
    they were recorded; other calls need another instance and must leave nothing in it.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._warm: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def __call__(self, key: Hashable, call: Callable[[], None]) -> None:
        """Do `call`, which is the same for the same key."""
        if key not in self._warm:
            self._warm.add(key)
            call()
            return
        if key not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as a data loader's, may call CUDA meanwhile.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode=mode):
                call()
            self._graphs[key] = graph
        self._graphs[key].replay()


def call_now(key: Hashable, call: Callable[[], None]) -> None:
    """Runs a call at once; used instead of CudaGraphs."""
    del key
    call()
