"""LazyPredictor: z of each decoding step with LazyMAR's token cache and condition cache.

Replaces models.predictor.PlainPredictor and uses the same MAR.
"""

from functools import partial

import torch
from torch import Tensor

from models.lazy_cache import KVCache, ProbeCache
from models.lazy_mar import LazyMARConfig, StepPolicy, oldest_positions, step_policies
from models.plan import DecodingPlan, DecodingStep
from models.token_selection import lowest, random_score
from models.transformer import MaskedTransformer


class LazyPredictor:
    """Holds the state between decoding steps; a refresh renews everything that later steps read.

    The batch (rows, R) is conditional first, then unconditional. With the condition cache, caches and
    lazy steps hold only the conditional half, as does a step without guidance.
    """

    def __init__(
        self,
        model: MaskedTransformer,
        order: Tensor,
        embedding: Tensor,
        plan: DecodingPlan,
        config: LazyMARConfig,
    ) -> None:
        """order (R, L) decoding order; embedding (R, D)."""
        self.model = model
        self.branches = 2 if plan.guided else 1
        self.order = order
        self.embedding = embedding
        self.policies = step_policies(config, plan, model.buffer_size)
        self.first_fills = self.policies[plan.steps[0].index].fills
        self.use_residual = config.condition_cache and self.branches == 2
        self.rows = len(order) // self.branches if self.use_residual else len(order)
        self.residual: Tensor | None = None  # uncond - cond from residual_start on
        self.residual_start = 0

        self.token_cache = config.token_cache
        self.local = config.lazy_step == "local"
        self.lazy_buffer = model.buffer_size if config.buffer_refresh else 0  # in lazy steps
        total = model.buffer_size + plan.seq_len
        lazy_starts = [s.start for s in plan.steps if not self.policies[s.index].refresh]
        known = model.buffer_size + max(lazy_starts, default=0)
        self.probe_layer = min(config.probe_layer, len(model.decoder_blocks))
        self.encoder_caches = [KVCache(self.rows, known) for _ in model.encoder_blocks]
        self.probe = ProbeCache(self.rows)
        self.selection = config.token_selection
        self.selected: Tensor | None = None  # positions (rows, kept) of the last step, if selected
        self.oldest: dict[int, Tensor] = {}  # step index -> kept positions (kept,)
        if self.selection == "oldest":
            chosen = oldest_positions(plan, self.policies, model.buffer_size)
            self.oldest = {s: torch.tensor(kept, device=order.device) for s, kept in chosen.items()}
        first = 0 if self.local else self.probe_layer + 1
        deeper = range(first, len(model.decoder_blocks))
        self.decoder_caches = {i: KVCache(self.rows, total) for i in deeper}
        self.decoder_input: Tensor | None = None  # (rows, total, D), position embeddings added

    def __call__(self, step: DecodingStep, tokens: Tensor) -> Tensor:
        """Tokens (B, L, c), known up to step.start -> z (R, stop - start, D); unguided (B, ., D)."""
        policy = self.policies[step.index]
        self.selected = None
        compute = self._refresh if policy.refresh else self._lazy
        x = compute(step, policy, tokens)
        return self.model.to_condition(x, self.order[: len(x), step.start : step.stop])

    @property
    def nbytes(self) -> int:
        """Bytes held by all caches."""
        layers = (*self.encoder_caches, *self.decoder_caches.values())
        tensors = [t for t in (self.residual, self.decoder_input) if t is not None]
        held = sum(cache.nbytes for cache in layers) + sum(t.nbytes for t in tensors)
        return held + self.probe.nbytes

    def _refresh(self, step: DecodingStep, policy: StepPolicy, tokens: Tensor) -> Tensor:
        """Everything, all branches -> decoder output (branches * B, n, D)."""
        fill = policy.fills and self.token_cache
        x = self._encode_all(step, tokens, self.branches if step.guided else 1, fill)
        if fill and not self.local:
            if self.decoder_input is None:
                self.decoder_input = x.new_empty(self.rows, *x.shape[1:])
            rows = min(self.rows, len(x))
            self.decoder_input[:rows] = x[:rows]
        use_residual = self.use_residual and step.guided
        stop = policy.residual_stop if use_residual else step.stop
        x = self._decode_all(x, step.start, stop, fill)
        if policy.fills and use_residual:
            conditional, unconditional = x.chunk(2)
            self.residual = unconditional - conditional
            self.residual_start = step.start
        return x[:, : step.stop - step.start]

    def _lazy(self, step: DecodingStep, policy: StepPolicy, tokens: Tensor) -> Tensor:
        """Computes only what changed -> decoder output (branches * B, n, D)."""
        branches = self.branches if step.guided and not self.use_residual else 1
        if not self.token_cache:
            x = self._encode_all(step, tokens, branches, fill=False)
            x = self._decode_all(x, step.start, step.stop, fill=False)
        elif self.local:
            x = self._decode_new(self._encode_new(step, tokens, branches, step.stop), step)
        else:
            x = self._encode_new(step, tokens, branches, step.start)
            x = self._decode_changed(self._renewed_input(x, step), step, policy.kept)
        if self.use_residual and step.guided:
            assert self.residual is not None  # of the refresh before
            base = self.residual_start
            x = torch.cat([x, x + self.residual[:, step.start - base : step.stop - base]])
        return x

    def _encode_all(self, step: DecodingStep, tokens: Tensor, branches: int, fill: bool) -> Tensor:
        """All known tokens -> decoder input (branches * B, total, D)."""
        known = tokens[:, : step.start].repeat(branches, 1, 1)
        order, embedding = self.order[: len(known)], self.embedding[: len(known)]
        x = self.model.embed_known(known, order[:, : step.start], embedding)
        updates = [cache.refill for cache in self.encoder_caches] if fill else None
        return self.model.embed_decoder(self.model.encode(x, updates), order)

    def _decode_all(self, x: Tensor, start: int, stop: int, fill: bool) -> Tensor:
        """Decoder input (R, total, D) -> decoder output (R, stop - start, D)."""
        buffer = self.model.buffer_size
        updates = None
        if fill:
            first = [] if self.local else [None] * self.probe_layer + [self.probe.refill]
            updates = first + [cache.refill for cache in self.decoder_caches.values()]
        return self.model.decode(x, slice(buffer + start, buffer + stop), updates)

    def _encode_new(self, step: DecodingStep, tokens: Tensor, branches: int, stop: int) -> Tensor:
        """Buffer and tokens of the previous step -> their decoder input (rows, m, D).

        Behind them, mask tokens up to `stop`; without the buffer if it is not renewed.
        """
        buffer, renewed = self.model.buffer_size, self.lazy_buffer
        new = tokens[:, step.previous : step.start].repeat(branches, 1, 1)
        rows, end = len(new), buffer + step.start
        order = self.order[:rows, step.previous : stop]
        x = self.model.embed_known(new, order[:, : new.shape[1]], self.embedding[:rows])
        updates = [partial(cache.renew, renewed, end, end) for cache in self.encoder_caches]
        x = self.model.encode(x[:, buffer - renewed :], updates)
        return self.model.embed_decoder(x, order, buffer=renewed > 0)

    def _renewed_input(self, x: Tensor, step: DecodingStep) -> Tensor:
        """Decoder input (rows, total, D), renewed at the buffer and the previous step's tokens by x."""
        buffer, renewed = self.model.buffer_size, self.lazy_buffer
        assert self.decoder_input is not None  # of the refresh before
        cached = self.decoder_input[: len(x)]
        cached[:, :renewed] = x[:, :renewed]
        cached[:, buffer + step.previous : buffer + step.start] = x[:, renewed:]
        return cached

    def _decode_new(self, x: Tensor, step: DecodingStep) -> Tensor:
        """Decoder input (rows, m, D) of positions that end at step.stop -> output (rows, n, D)."""
        buffer = self.model.buffer_size
        end, total = buffer + step.stop, buffer + self.order.shape[1]
        caches = self.decoder_caches.values()
        updates = [partial(cache.renew, self.lazy_buffer, end, total) for cache in caches]
        return self.model.decode(x, slice(x.shape[1] - (step.stop - step.start), None), updates)

    def _decode_changed(self, x: Tensor, step: DecodingStep, kept: int) -> Tensor:
        """Decoder input (rows, total, D) -> decoder output (rows, n, D), deep layers on kept rows."""
        blocks = self.model.decoder_blocks
        if kept == x.shape[1] or self.probe_layer == len(blocks):
            return self._decode_all(x, step.start, step.stop, fill=True)
        for block in blocks[: self.probe_layer]:
            x = block(x)
        block = blocks[self.probe_layer]
        h = block.norm1(x)
        k, v = block.attn.keys_values(h)
        index = self.selected = self.select(v, step, kept)
        x, h = _take(x, index), _take(h, index)
        x = block.finish(x, block.attn.attend(block.attn.queries(h), k, v))
        now = slice(step.start - step.previous, step.stop - step.previous)  # among the kept
        for i, cache in self.decoder_caches.items():
            query_slice = now if i == len(blocks) - 1 else None
            x = blocks[i](x, partial(cache.scatter, index), query_slice)
        return x if self.decoder_caches else x[:, now]

    def select(self, v: Tensor, step: DecodingStep, kept: int) -> Tensor:
        """The probe layer's values v (rows, H, total, d) -> positions to compute (rows, kept)."""
        if self.selection == "oldest":
            return self.oldest[step.index].expand(len(v), -1)
        buffer = self.model.buffer_size
        if self.selection == "random":
            score = random_score(self.order[: len(v)], buffer, step.index)
        else:
            score = self.probe.similarity(v)
            score = score if self.selection == "similarity" else -score
        return lowest(score, slice(buffer + step.previous, buffer + step.stop), kept)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x (R, n, D), index (R, m) -> (R, m, D)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
