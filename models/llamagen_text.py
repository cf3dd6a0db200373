"""LlamaGen's text-to-image models: a GPT whose condition is a caption, embedded by flan-t5-xl.

A caption has a fixed number of tokens, 120; a shorter one is padded on the left. Nobody attends to padding.
The same mask serves both branches of guidance.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.gpt_images import GPTSampling, pictures
from models.gpt_sampler import Guidance
from models.line_cache import KVCache, make_cache
from models.line_config import LineARConfig
from models.llamagen import GPT, CaptionEmbedding
from models.token_sampling import TokenSampler, check_settings
from models.vq import VQModel


@torch.no_grad()
def sample_tokens(
    model: GPT,
    captions: Tensor,
    mask: Tensor,
    cfg: float = 7.5,
    temperature: float = 1.0,
    top_k: int = 1000,
    top_p: float = 1.0,
    cfg_interval: int = -1,
    *,
    line_ar: LineARConfig | bool | None = None,
    seeds: Sequence[int] | None = None,
    greedy: bool = False,
) -> Tensor:
    """Codes (B, N) int64 of captions (B, P, C), padded on the left where mask (B, P) is false.

    The settings are those of GPT.sample_tokens; the defaults are LlamaGen's (sample_t2i.py). ValueError
    for captions of another shape than the model's.
    """
    check_settings(cfg, temperature, top_k, top_p)
    embedding = model.cls_embedding
    if not isinstance(embedding, CaptionEmbedding):
        raise ValueError("this GPT draws classes, not captions: use its own sample_tokens")
    nothing: Any = embedding.uncond_embedding
    if captions.shape[1:] != nothing.shape or mask.shape != captions.shape[:2]:
        raise ValueError(
            f"captions are {tuple(captions.shape)} with a mask {tuple(mask.shape)}; the model needs (B, "
            f"{nothing.shape[0]}, {nothing.shape[1]}) and (B, {nothing.shape[0]})"
        )
    settings = temperature, top_k, top_p, greedy
    sampler = TokenSampler(len(captions), model.block_size, *settings, seeds, captions.device)
    guidance = Guidance(cfg, cfg_interval)
    captions = (captions * mask[..., None]).to(nothing.dtype)
    mask = mask.bool().repeat(guidance.branches, 1)
    if guidance.branches == 2:
        captions = torch.cat([captions, nothing.expand_as(captions)])
    condition = model.cls_token_num
    rope, cache = model.rope(), make_cache(line_ar, model.grid, len(model.layers), condition)
    for layer in cache.layers:
        layer.hide(~mask)
    sees = mask[:, None] & mask.new_ones(condition, condition).tril()
    sees = sees | torch.eye(condition, dtype=torch.bool, device=sees.device)  # padding sees itself
    logits = decode(model, embedding(captions), rope[:condition], cache, sees[:, None])
    tokens: list[Tensor] = []
    for i in range(model.block_size):
        if guidance.branches == 2:
            c, u = logits.chunk(2)
            logits = u + cfg * (c - u) if guidance.at(i) else c
        tokens.append(sampler(logits, i))
        if i + 1 < model.block_size:
            x = model.tok_embeddings(tokens[-1]).repeat(guidance.branches, 1)[:, None]
            live = F.pad(mask, (0, cache.live + 1 - condition), value=True)
            turn = rope[condition + i : condition + i + 1]
            logits = decode(model, x, turn, cache, live[:, None, None])
    broken = ~logits.isfinite().all(dim=-1, keepdim=True)
    return torch.stack(tokens, dim=1).masked_fill(broken, -1)


def decode(model: GPT, x: Tensor, rope: Tensor, cache: KVCache, mask: Tensor) -> Tensor:
    """Positions x (rows, m, D), which see what mask (rows, 1, m, live) says -> last logits, float32."""
    for index, block in enumerate(model.layers):
        x = block(x, rope, partial(cache.update, index), mask)
        cache.layers[index].advance(x.shape[1])
    return model.output(model.norm(x[:, -1])).float()


class CaptionGenerator:
    """A text-to-image GPT, flan-t5-xl and the tokenizer of images, as an ImageGenerator of prompts."""

    def __init__(
        self,
        model: GPT,
        text: tuple[Any, Any],  # transformers' tokenizer and T5EncoderModel
        tokenizer: VQModel,
        sampling: GPTSampling,
        size: int,
        vae_bsz: int | None = None,
    ) -> None:
        """Pictures of size x size pixels; vae_bsz: images decoded at once, all without it."""
        self.model, self.text, self.tokenizer = model, text, tokenizer
        self.sampling, self.size, self.vae_bsz = sampling, size, vae_bsz

    @torch.no_grad()
    def prepare(
        self, prompts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor, Sequence[int]]:
        """Embeddings (B, P, C) of the prompts in small letters, their mask (B, P), and the seeds."""
        tokenizer, encoder = self.text
        inputs = tokenizer(
            [prompt.lower().strip() for prompt in prompts],
            max_length=self.model.cls_token_num,
            padding="max_length",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        hidden = encoder(ids.to(encoder.device), mask.to(encoder.device)).last_hidden_state
        # T5 saw padding on the right; the GPT was trained with it on the left
        place = (torch.arange(ids.shape[1]) + mask.sum(1, keepdim=True)) % ids.shape[1]
        captions = hidden.gather(1, place[..., None].to(hidden.device).expand_as(hidden))
        return captions.to(self.model.device), mask.flip(1).to(self.model.device), seeds

    @torch.no_grad()
    def generate(self, prepared: tuple[Tensor, Tensor, Sequence[int]]) -> Tensor:
        """Images (B, 3, size, size) float32, about [-1, 1]; NaN where the model computed none."""
        captions, mask, seeds = prepared
        codes = sample_tokens(self.model, captions, mask, **vars(self.sampling), seeds=seeds)
        codes = codes.unflatten(1, self.model.grid)
        return pictures(self.tokenizer.decode, codes, self.size, self.vae_bsz)
