"""LineAR's cache for models of Hugging Face transformers that draw images token by token.

    with line_ar_attention(model):
        cache = LineARCache(LineARConfig(budget=1 / 6), grid=(24, 24))
        codes = model.generate(**inputs, generation_mode="image", cache=cache, ...)

The model stays as it is. Its attention modules call `cache.update`, then an attention function by
name: ours is the library's `sdpa`, and it hands the queries to the layer whose keys it was given. What
is kept and evicted is decided in models/line_cache.py. Needs transformers 5.12 or newer.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from models.line_cache import KVLayer, LineARConfig, make_layer

ATTENTION = "line_ar"  # the name under which the library finds `attention`
ROUTED = (None, "eager", "sdpa", ATTENTION)  # implementations that ours stands in for


class LineARLayer(CacheLayerMixin):
    """One layer of a LineARCache; allocated by the prompt, which says how long the condition is."""

    is_compileable = False  # then generate() neither compiles nor builds a mask of its own
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self, config: LineARConfig, grid: tuple[int, int], condition: int | None = None
    ) -> None:
        super().__init__()
        self.config, self.grid, self.condition = config, grid, condition
        self.reset()

    def reset(self) -> None:
        """Forget everything, for another call of generate."""
        self.kv = KVLayer(0)
        self.room = 0  # positions that may still come: the image and a line of closing tokens
        self.waiting = 0  # positions whose queries have not been seen yet
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate condition + budget + line slots. ValueError if the prompt exceeds the condition."""
        prompt = key_states.shape[2]
        condition = prompt if self.condition is None else self.condition
        if prompt > condition:
            raise ValueError(
                f"the prompt has {prompt} tokens, more than the condition of {condition}: give its "
                "length, with all tokens in front of the image, or None"
            )
        plan = self.config.plan(self.grid, condition)
        self.kv = make_layer(self.config, plan, condition + plan.budget + plan.line)
        self.room = condition + plan.line * (plan.lines + 1)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keep keys and values (rows, H, m, d); returns views of all that are attended to."""
        tokens = key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif tokens > 1:
            raise ValueError(
                f"{tokens} tokens at once after {self.kv.count}: behind the prompt a LineARCache takes "
                "one token per call, and it serves one image; make a new one for another call"
            )
        if self.waiting:
            raise ValueError(
                "the attention of this model is not LineAR's: generate inside "
                "`with line_ar_attention(model)`"
            )
        if tokens > self.room:
            raise ValueError(
                f"the cache has seen all tokens of its grid of {self.grid[0]} lines of {self.grid[1]}: "
                "make a new one for another call"
            )
        keys, values = self.kv.append(key_states, value_states)
        self.waiting = tokens
        self.room -= tokens
        # `attention` gets this very tensor, and so finds the layer; Tensor does not declare the attribute
        keys.line_layer = self  # type: ignore[attr-defined]
        return keys, values

    def attended(self, query: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        """The attention of the kept positions is computed: query (rows, heads, m, d), its mask."""
        if mask is not None and self.kv.count == 0:
            # the last token of the prompt sees all of it but padding
            self.kv.hide(~mask[:, 0, -1, : self.waiting])
        if scaling is not None:  # scores divide by sqrt(d)
            query = query * (scaling * query.shape[-1] ** 0.5)
        self.kv.remember(query)
        self.kv.advance(self.waiting)
        self.waiting = 0

    def get_seq_length(self) -> int:
        """Positions seen, whatever is left of them: the next one's position."""
        return self.kv.count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that are attended to; the condition's come first, as in the padding mask."""
        return self.kv.live + query_length, 0

    def get_max_length(self) -> int:
        """No maximum that the library should plan with."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class LineARCache(Cache):
    """A cache for one call of generate: hand it over as `cache` (before 5.24: `past_key_values`).

    config: what is kept, see LineARConfig. grid: lines of the image and tokens of a line, an
    end-of-line token included. condition: tokens in front of the image; None: the prompt. Padding on
    the left is never attended to, nor does it change what is kept. layer: a subclass that observes.

    Raises ValueError for a wrong grid or condition, or if the budget does not fit the grid.
    """

    def __init__(
        self,
        config: LineARConfig | bool | None,
        grid: tuple[int, int],
        condition: int | None = None,
        layer: type[LineARLayer] = LineARLayer,
    ) -> None:
        config = LineARConfig.from_argument(config)
        if len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
            raise ValueError(
                f"grid is {grid!r}; it must be two whole numbers, lines and their tokens"
            )
        if condition is not None and condition < 0:
            raise ValueError(f"condition is {condition}; it must be a number of tokens, or None")
        config.plan(grid)
        # called for each layer of the model; the library declares a class, and only calls it
        make_layer = partial(layer, config, grid, condition)
        super().__init__(layer_class_to_replicate=make_layer)  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        return sum(layer.kv.nbytes for layer in self.layers if isinstance(layer, LineARLayer))

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of other buffers."""
        layers = [layer for layer in self.layers if isinstance(layer, LineARLayer)]
        return sum(layer.kv.workspace_nbytes for layer in layers)

    def _refuse(self, *args: object, **kwargs: object) -> None:
        raise ValueError(
            "a LineARCache cannot be reordered, repeated or shortened, so beam search and assisted "
            "generation do not work: use sampling or greedy search"
        )

    reorder_cache = batch_repeat_interleave = batch_select_indices = crop = _refuse


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The library's sdpa attention; keys of a LineARCache tell their layer what was attended to."""
    output = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    layer = getattr(key, "line_layer", None)
    if layer is not None:
        layer.attended(query, attention_mask, scaling)
    return output


@contextmanager
def line_ar_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the attention of a model serves a LineARCache; other caches work as before.

    Raises ValueError for a model that runs another attention than sdpa or eager, such as flash
    attention, which reads the padding mask in another way.
    """
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # without it there would be no mask
    configs = [getattr(module, "config", None) for module in model.modules()]
    before = {
        id(config): (config, config._attn_implementation)
        for config in configs
        if isinstance(config, PreTrainedConfig)
    }
    for _, name in before.values():
        if name not in ROUTED:
            raise ValueError(
                f"the model runs {name}: LineAR needs sdpa, load it with attn_implementation='sdpa'"
            )
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        for config, name in before.values():  # a model before its parts, whose names it overwrites
            config._attn_implementation = name


def cache_argument(module: nn.Module) -> str:
    """What the forward of a model calls its cache: `cache`, or `past_key_values` before 5.24."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"
