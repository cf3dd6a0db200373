"""What benchmarks.line_latency measures: models of random weights, and the caches that they sample with."""

from abc import ABC, abstractmethod
from typing import Any

import torch

from benchmarks.common import timed
from models import llamagen
from models.gpt_sampler import GPTSampler
from models.line_cache import LineARConfig, LinePlan, make_cache
from models.llamagen import GPT

DYNAMIC, STATIC = LIBRARY = ("dynamic", "static")  # the full caches of transformers
PROMPT_TOKENS = 20  # of a text-to-image model

Variant = LineARConfig | str  # a compressed or full cache of ours, or one of LIBRARY


class Work(ABC):
    """Sampling from one model.

    grid: lines, and tokens per line. condition: positions in front of the image. cfg: its usual guidance.
    slot_bytes: of a slot's keys and values in all layers, for one sequence. weight_bytes: of what a step
    reads.
    """

    grid: tuple[int, int]
    condition: int
    cfg: float
    slot_bytes: int
    weight_bytes: int
    device: torch.device

    @abstractmethod
    def cache_bytes(self, variant: Variant, rows: int) -> tuple[int, int]:
        """Bytes of keys and values, and of the workspace, as they are allocated; also on meta."""

    @abstractmethod
    def sample(self, variant: Variant, batch: int, cfg: float) -> None:
        """One batch of images, without their decoder."""

    @abstractmethod
    def renew(self, fast: bool) -> None:
        """Forget what earlier calls compiled and recorded; fast: torch.compile and CUDA graphs."""

    def plan(self, variant: Variant) -> LinePlan:
        """The counts of a cache. ValueError for a budget that does not fit the grid."""
        config = LineARConfig(method="none") if isinstance(variant, str) else variant
        return config.plan(self.grid, self.condition)

    def slots(self, variant: Variant) -> int:
        """Slots for one sequence, as they are allocated."""
        return self.plan(variant).slots

    def read_bytes(self, variant: Variant, rows: int) -> int:
        """Weights once per step, and every slot attended to, over all steps of an image."""
        plan, tokens = self.plan(variant), self.grid[0] * self.grid[1]
        live = sum(
            plan.condition + min(i, plan.budget + 1 + (i - 1) % plan.line) for i in range(tokens)
        )
        if variant == STATIC:  # attends to all its slots under a mask
            live = tokens * (plan.condition + tokens)
        return tokens * self.weight_bytes + live * rows * self.slot_bytes

    def sizes(self, variant: Variant, rows: int) -> dict[str, Any]:
        """Columns of a table that follow from shapes."""
        slots = self.slots(variant)
        held, workspace = self.cache_bytes(variant, rows)
        return {
            "slots": slots,
            "cache_gb": held / 1e9,
            "cache_over_theory": held / (rows * slots * self.slot_bytes),
            "workspace_gb": workspace / 1e9,
        }

    def seconds(self, variant: Variant, batch: int, cfg: float) -> float:
        """Of one batch."""
        return timed(lambda: self.sample(variant, batch, cfg), self.device)


class GPTWork(Work):
    """One of LlamaGen's GPTs."""

    condition, cfg = 1, 1.75

    def __init__(self, name: str, lines: int, device: torch.device, dtype: torch.dtype) -> None:
        with torch.device(device):
            model: GPT = getattr(llamagen, name)(block_size=lines**2)
        self.model = model.to(dtype).eval()
        self.device, self.grid = device, model.grid
        width = model.n_head * model.head_dim * dtype.itemsize
        self.slot_bytes = 2 * width * len(model.layers)
        self.weight_bytes = sum(p.nbytes for p in model.layers.parameters())
        self.weight_bytes += model.output.weight.nbytes
        self.sampler = GPTSampler(model)

    def cache_bytes(self, variant: Variant, rows: int) -> tuple[int, int]:
        assert isinstance(variant, LineARConfig)
        cache = make_cache(variant, self.grid, len(self.model.layers))
        x = self.model.cls_embedding(torch.zeros(rows, dtype=torch.long, device=self.device))
        with torch.no_grad():
            self.model.decode(x, self.model.rope()[:1], cache)
        return cache.nbytes, cache.workspace_nbytes

    def renew(self, fast: bool) -> None:
        self.sampler = GPTSampler(self.model)  # free its memory first
        if fast:
            self.sampler = GPTSampler(self.model, compile=True, graphs=True)

    def sample(self, variant: Variant, batch: int, cfg: float) -> None:
        assert isinstance(variant, LineARConfig)
        labels = torch.arange(batch) % self.model.num_classes
        self.sampler.sample_tokens(labels, cfg, seeds=range(batch), line_ar=variant)


class JanusWork(Work):
    """A Janus-Pro of transformers, drawing a prompt of PROMPT_TOKENS tokens."""

    condition, cfg = PROMPT_TOKENS, 5.0
    BOS, BOI, PAD = 0, 1, 2  # any ids will do

    def __init__(self, name: str, lines: int, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import GenerationConfig, JanusForConditionalGeneration

        from models.janus_original import PUBLISHED, config_of

        with torch.device(device):
            model: Any = JanusForConditionalGeneration(config_of(PUBLISHED[name]))
        model.generation_config = GenerationConfig(
            bos_token_id=self.BOS,
            pad_token_id=self.PAD,
            generation_kwargs={"boi_token_id": self.BOI},
        )
        self.model = model.to(dtype).eval()
        self.device, self.dtype, self.grid = device, dtype, (lines, lines)
        self.text = text = model.config.text_config
        self.heads, self.head_dim = (
            text.num_key_value_heads,
            text.hidden_size // text.num_attention_heads,
        )
        self.slot_bytes = 2 * self.heads * self.head_dim * text.num_hidden_layers * dtype.itemsize
        parts = (model.model.language_model.layers, model.model.generation_head)
        self.weight_bytes = sum(p.nbytes for part in parts for p in part.parameters())

    def slots(self, variant: Variant) -> int:
        plan, tokens = self.plan(variant), self.condition + self.grid[0] * self.grid[1]
        if isinstance(variant, str):  # the last token is never fed, but a StaticCache has its slot
            return tokens - (variant == DYNAMIC)
        return self.condition + plan.budget + plan.line

    def cache_bytes(self, variant: Variant, rows: int) -> tuple[int, int]:
        from models.transformers_cache import LineARCache, LineARLayer

        if isinstance(variant, str):
            return rows * self.slots(variant) * self.slot_bytes, 0
        cache = LineARCache(variant, self.grid)
        shape = (rows, self.heads, self.condition, self.head_dim)
        prompt = torch.empty(shape, dtype=self.dtype, device="meta")
        for index in range(self.text.num_hidden_layers):
            cache.update(prompt, prompt, index)
            layer = cache.layers[index]
            assert isinstance(layer, LineARLayer)
            layer.attended(prompt, None, None)
        return cache.nbytes, cache.workspace_nbytes

    def renew(self, fast: bool) -> None:
        """Nothing is compiled."""

    def sample(self, variant: Variant, batch: int, cfg: float) -> None:
        from transformers import StaticCache

        from models.janus import sample_tokens

        words = range(self.PAD + 1, self.PAD + 1 + self.condition - 2)
        ids = torch.tensor([[self.BOS, *words, self.BOI]], device=self.device).expand(batch, -1)
        cache = None
        if variant == STATIC:
            length = self.condition + self.grid[0] * self.grid[1]
            cache = StaticCache(config=self.text, max_cache_len=length)
        line_ar = None if isinstance(variant, str) else variant
        sample_tokens(
            self.model,
            ids,
            torch.ones_like(ids),
            cfg,
            line_ar=line_ar,
            grid=self.grid,
            seeds=range(batch),
            cache=cache,
        )
