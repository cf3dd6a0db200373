"""Janus-Pro (Chen et al., arXiv 2501.17811): pictures of prompts, with transformers' own model.

The loop is that of `JanusForConditionalGeneration.generate(generation_mode="image")`, over the same
parts of the model, but each image is drawn from its own seed, whatever its batch.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, JanusForConditionalGeneration

from models.gpt_images import GPTSampling, pictures
from models.line_config import LineARConfig
from models.token_sampling import TokenSampler, check_settings
from models.transformers_cache import line_ar_attention
from models.transformers_models import Decoder, new_cache
from util.errors import UserError


def image_grid(model: JanusForConditionalGeneration) -> tuple[int, int]:
    """Lines of an image, and tokens of a line."""
    vision: Any = model.config.vision_config
    side = math.isqrt(vision.num_image_tokens)
    if side**2 != vision.num_image_tokens:
        raise ValueError(f"an image has {vision.num_image_tokens} tokens, which make no square")
    return side, side


def special_tokens(model: JanusForConditionalGeneration) -> list[int]:
    """Begin of the text, begin of the image, padding.

    ValueError if generation_config.json does not give them, or not as tokens of the model.
    """
    config: Any = model.generation_config
    text: Any = model.config.text_config
    further = getattr(config, "generation_kwargs", None)
    image = further.get("boi_token_id") if isinstance(further, dict) else None
    found = [config.bos_token_id, image, config.pad_token_id]
    if not all(isinstance(token, int) and 0 <= token < text.vocab_size for token in found):
        raise ValueError(
            "generation_config.json needs bos_token_id, generation_kwargs.boi_token_id and pad_token_id "
            f"below {text.vocab_size}, not {found}"
        )
    return found


def unconditional(model: JanusForConditionalGeneration, input_ids: Tensor) -> Tensor:
    """Prompts (B, P) of the unconditional branch: all but the begin tokens of text and image is padding.

    The new padding is attended to, as in the library; that of the prompt is not.
    """
    begin, image, padding = special_tokens(model)
    kept = (input_ids == begin) | (input_ids == image)
    return input_ids.masked_fill(~kept, padding)


@torch.no_grad()
def sample_tokens(
    model: JanusForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    cfg: float = 5.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cfg_interval: int = -1,
    *,
    line_ar: LineARConfig | bool | None = None,
    grid: tuple[int, int] | None = None,
    seeds: Sequence[int] | None = None,
    greedy: bool = False,
    cache: Cache | None = None,
) -> Tensor:
    """Codes (B, N) int64 of prompts (B, P), which end with <begin_of_image> and are padded on the left.

    The settings are those of GPT.sample_tokens; line_ar None is the library's DynamicCache, or
    `cache`, another empty one. grid: lines and tokens of a line, a square without it. In float32 with
    the same draws the codes are those of the library's `generate`.
    """
    check_settings(cfg, temperature, top_k, top_p)
    if line_ar is not None and cache is not None:
        raise ValueError("line_ar makes a cache of its own: give either line_ar or cache")
    grid = image_grid(model) if grid is None else grid
    sampler = TokenSampler(
        len(input_ids), math.prod(grid), temperature, top_k, top_p, greedy, seeds, input_ids.device
    )
    guided = cfg > 1
    if guided:
        input_ids = torch.cat([input_ids, unconditional(model, input_ids)])
        attention_mask = torch.cat([attention_mask, attention_mask])
    x = model.get_input_embeddings()(input_ids)
    tokens = []
    with nullcontext() if line_ar is None else line_ar_attention(model):
        cache = new_cache(line_ar, grid) if cache is None else cache
        decode = Decoder(model.model.language_model, cache, attention_mask)
        for i in range(math.prod(grid)):
            logits = model.model.generation_head(decode(inputs_embeds=x)).float()
            if guided:
                c, u = logits.chunk(2)
                logits = u + cfg * (c - u) if cfg_interval < 0 or i - 1 <= cfg_interval else c
            tokens.append(sampler(logits, i))
            fed = torch.cat([tokens[-1]] * (1 + guided))[:, None]
            x = model.prepare_embeddings_for_image_generation(fed)
    broken = ~logits.isfinite().all(dim=-1, keepdim=True)
    return torch.stack(tokens, dim=1).masked_fill(broken, -1)


class JanusGenerator:
    """A Janus model and its processor as an ImageGenerator whose conditions are prompts."""

    def __init__(
        self,
        model: JanusForConditionalGeneration,
        processor: Any,  # transformers' JanusProcessor
        sampling: GPTSampling,
        size: int,
        vae_bsz: int | None = None,
    ) -> None:
        """Pictures of size x size pixels; vae_bsz: images decoded at once, all without it."""
        self.model, self.processor, self.sampling = model, processor, sampling
        self.size, self.vae_bsz = size, vae_bsz

    def prepare(
        self, prompts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[dict[str, Tensor], Sequence[int]]:
        """The prompts as tokens, with the processor's chat template if it has one.

        UserError for a prompt that leaves the model no room for an image, or that holds special tokens.
        """
        texts = list(prompts)
        special = [self.processor.image_token, *self.processor.tokenizer.all_special_tokens]
        for text in texts:
            if found := next((token for token in special if token in text), None):
                raise UserError(f"prompts are text alone: remove {found} from {text[:60]!r}")
        if self.processor.chat_template is not None:
            texts = [
                self.processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "text", "text": text}]}],
                    add_generation_prompt=True,
                )
                for text in texts
            ]
        inputs = self.processor(
            text=texts,
            generation_mode="image",
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        text_config: Any = self.model.config.text_config
        room = text_config.max_position_embeddings - math.prod(image_grid(self.model))
        tokens = inputs["attention_mask"].sum(1)
        if (longest := int(tokens.max())) > room:
            prompt = prompts[int(tokens.argmax())]
            raise UserError(
                f"a prompt has {longest} tokens, the model takes {room}: shorten {prompt[:60]!r}..."
            )
        device = self.model.device
        return {k: inputs[k].to(device) for k in ("input_ids", "attention_mask")}, seeds

    @torch.no_grad()
    def generate(self, prepared: tuple[dict[str, Tensor], Sequence[int]]) -> Tensor:
        """Images (B, 3, size, size) float32, about [-1, 1]; NaN where the model computed none."""
        inputs, seeds = prepared
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        codes = sample_tokens(self.model, ids, mask, **vars(self.sampling), seeds=seeds)
        codes = codes.unflatten(1, image_grid(self.model))
        return pictures(self.decode, codes, self.size, self.vae_bsz)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) => images (B, 3, h*f, w*f)."""
        return self.model.decode_image_tokens(codes.flatten(1)).movedim(-1, 1)
