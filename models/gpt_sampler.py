"""GPTSampler: many batches of images from one GPT, as fast as its device allows."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.graphs import CudaGraphs, Runner, call_now, compiled
from models.line_cache import KVCache, LineARConfig, make_cache
from models.step_cache import StepCache
from models.token_sampling import TokenSampler, check_settings


@dataclass(frozen=True)
class Guidance:
    """scale s > 1: logits = u + s (c - u), up to token `interval` + 1; -1 is always."""

    scale: float
    interval: int

    @property
    def branches(self) -> int:
        """Sequences per image."""
        return 2 if self.scale > 1 else 1

    def at(self, i: int) -> bool:
        """Whether token i is guided."""
        return self.scale > 1 and (self.interval < 0 or i - 1 <= self.interval)


class GPTDecoding:
    """Decodes batches of `batch` images, one after another.

    Steps communicate through tensors that are allocated once, so that they can be CUDA graphs. Rows: the
    conditional images, then with guidance the unconditional ones.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        guidance: Guidance,
        line_ar: LineARConfig | bool | None,
        graphs: Runner | None = None,
    ) -> None:
        """model: a models.llamagen.GPT. graphs: runs the steps, which then are few programs."""
        self.model, self.guidance = model, guidance
        rows, layers = guidance.branches * batch, len(model.layers)
        device, dtype = model.device, model.output.weight.dtype
        self.rope = model.rope()
        self.positions = torch.arange(model.block_size, device=device)
        self.position = self.positions[:1].clone()
        self.x = torch.empty(rows, 1, model.output.in_features, dtype=dtype, device=device)
        self.codes = torch.empty(batch, model.block_size, dtype=torch.long, device=device)
        self.logits = torch.empty(batch, model.vocab_size, device=device)
        self.uniforms = torch.empty(batch, model.block_size, device=device)
        self.run: Runner = call_now
        self.cache: KVCache = make_cache(line_ar, model.grid, layers)
        if graphs is not None:
            self.run = graphs
            self.cache = StepCache(line_ar, model.grid, layers, self.position, dtype, graphs)

    def __call__(self, labels: Tensor, sampler: TokenSampler) -> Tensor:
        """labels (B,) on the device -> codes (B, N); -1 for an image whose logits are not finite."""
        self.cache.reset()
        if self.guidance.branches == 2:
            labels = torch.cat([labels, torch.full_like(labels, self.model.num_classes)])
        self.x.copy_(self.model.cls_embedding(labels))
        if sampler.uniforms is not None:
            self.uniforms.copy_(sampler.uniforms)
            sampler.uniforms = self.uniforms
        self._decode(sampler)
        broken = ~self.logits.isfinite().all(dim=-1, keepdim=True)  # what is NaN once stays so
        return self.codes.masked_fill(broken, -1)

    def _decode(self, sampler: TokenSampler) -> None:
        """All tokens; nothing here waits for the device."""
        for i in range(self.model.block_size):
            self.position.copy_(self.positions[i : i + 1])
            program, guided = self.cache.go_to(i), self.guidance.at(i)
            self.run((program, guided), partial(self._step, sampler, guided))
            self.cache.advance()

    def _step(self, sampler: TokenSampler, guided: bool) -> None:
        """x -> code of this position, and the next x."""
        rope = self.rope.index_select(0, self.position)
        logits = self.model.next_logits(self.x, rope, self.cache)
        if self.guidance.branches == 2:
            c, u = logits.chunk(2)
            logits = u + self.guidance.scale * (c - u) if guided else c
        self.logits.copy_(logits)
        codes = sampler(logits, self.position)[:, None]
        self.codes.index_copy_(1, self.position, codes)
        self.x.copy_(self.model.tok_embeddings(codes).repeat(self.guidance.branches, 1, 1))


class GPTSampler:
    """Samples from a GPT; GPT.sample_tokens makes one for a single batch."""

    def __init__(self, model: Any, *, compile: bool = False, graphs: bool = False) -> None:
        """model: a models.llamagen.GPT, whose weights are shared.

        compile: what surrounds the attention with torch.compile, in a copy of the model.
        graphs (CUDA alone): replay CUDA graphs of the steps; batches of another kind make their own.
        """
        if graphs and model.device.type != "cuda":
            raise ValueError(f"graphs need a model on CUDA, not on {model.device}")
        if compile:
            shared: dict[int, object] = {id(p): p for p in model.parameters()}
            model = copy.deepcopy(model, shared)
            layer: Any
            for layer in model.layers:
                layer.project, layer.finish = compiled(layer.project), compiled(layer.finish)
        self.model, self.graphs = model, graphs
        self._last: tuple[tuple[object, ...], GPTDecoding] | None = None  # (what, its Decoding)

    @torch.no_grad()
    def sample_tokens(
        self,
        labels: Tensor | Sequence[int],
        cfg: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        cfg_interval: int = -1,
        *,
        line_ar: LineARConfig | bool | None = None,
        seeds: Sequence[int] | None = None,
        greedy: bool = False,
    ) -> Tensor:
        """GPT.sample_tokens: codes (B, N). Raises ValueError for what does not fit."""
        model, device = self.model, self.model.device
        check_settings(cfg, temperature, top_k, top_p)
        labels = torch.as_tensor(labels)
        classes = labels.dim() == 1 and not (labels.is_floating_point() and len(labels))
        if not classes or not bool(((labels >= 0) & (labels < model.num_classes)).all()):
            raise ValueError(f"labels must be (B,) classes from 0 to {model.num_classes - 1}")
        settings = temperature, top_k, top_p, greedy
        sampler = TokenSampler(len(labels), model.block_size, *settings, seeds, device)
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with on_device:
            decoding = self._decoding(len(labels), Guidance(cfg, cfg_interval), line_ar, settings)
            return decoding(labels.to(device, torch.long), sampler)

    def _decoding(
        self,
        batch: int,
        guidance: Guidance,
        line_ar: LineARConfig | bool | None,
        settings: tuple[object, ...],
    ) -> GPTDecoding:
        """A GPTDecoding; with graphs the last one, if what it recorded is the same, settings too."""
        if not self.graphs:
            return GPTDecoding(self.model, batch, guidance, line_ar)
        what = (batch, guidance, line_ar, settings)
        if self._last is None or self._last[0] != what:
            self._last = None  # free its memory first
            # Steps leave nothing in the graphs' memory, so they may share it in any order.
            self._last = what, GPTDecoding(self.model, batch, guidance, line_ar, CudaGraphs())
        return self._last[1]
