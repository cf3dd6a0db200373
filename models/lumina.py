"""Lumina-mGPT (Liu et al., arXiv 2408.02657): pictures of prompts, with transformers' Chameleon.

transformers' own generation forbids image tokens, so the loop is ours, over `model.model` and
`model.lm_head`. An image is <racm3:break>, its height and its width, then lines of codes that end with a
newline token. The unconditional branch has no prompt: its own cache, shorter by the prompt.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from models.line_config import LineARConfig
from models.token_sampling import TokenSampler, check_settings
from models.transformers_cache import line_ar_attention
from models.transformers_models import Decoder, load_parts, new_cache

CODES_PER_SIZE = 2  # a size token counts 32 pixels, a code has 16


@dataclass(frozen=True)
class ImageVocabulary:
    """Ids of the tokens that make an image; `codes[i]` is code i of the tokenizer."""

    begin: int
    newline: int
    size: int  # of no pixels; the next is of 32
    codes: tuple[int, ...]

    @classmethod
    def from_model(cls, model: ChameleonForConditionalGeneration) -> "ImageVocabulary":
        """By their names in the model's vocabulary. ValueError if it lacks one."""
        names, ids = model.config.vocabulary_map or {}, model.model.vocabulary_mapping.img2bpe
        wanted = ("<racm3:break>", "<reserved08799>", "<reserved08800>")
        if missing := [name for name in wanted if name not in names]:
            raise ValueError(
                f"the vocabulary has no {missing[0]}: this is not a model of Lumina-mGPT"
            )
        begin, newline, size = (names[name] for name in wanted)
        return cls(begin, newline, size, tuple(ids[code] for code in range(len(ids))))

    def head(self, grid: tuple[int, int]) -> list[int]:
        """The three tokens in front of an image of `grid` codes: begin, height, width."""
        if any(side % CODES_PER_SIZE or side <= 0 for side in grid):
            raise ValueError(f"an image has {grid[0]} x {grid[1]} codes; both must be even numbers")
        return [self.begin, *(self.size + side // CODES_PER_SIZE for side in grid)]


@torch.no_grad()
def sample_tokens(
    model: ChameleonForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    grid: tuple[int, int],
    cfg: float = 4.0,
    temperature: float = 1.0,
    top_k: int = 2000,
    top_p: float = 1.0,
    *,
    line_ar: LineARConfig | bool | None = None,
    seeds: Sequence[int] | None = None,
    greedy: bool = False,
) -> Tensor:
    """Codes (B, lines * tokens) int64 of prompts (B, P), padded on the left; (48, 48) is 768 pixels.

    grid: lines and codes of a line; for the cache the newline is part of the line. The other settings
    are those of GPT.sample_tokens; their defaults are Lumina-mGPT's.
    """
    check_settings(cfg, temperature, top_k, top_p)
    lines, width = grid
    vocabulary, device = ImageVocabulary.from_model(model), input_ids.device
    head = torch.tensor(vocabulary.head(grid), device=device).expand(len(input_ids), -1)
    newline = torch.full_like(head[:, :1], vocabulary.newline)
    ids = torch.tensor(vocabulary.codes, device=device)
    weight = model.lm_head.weight[ids]  # the logits of image tokens are all that is needed
    sampler = TokenSampler(
        len(input_ids), lines * width, temperature, top_k, top_p, greedy, seeds, device
    )
    guided = cfg > 1
    mask = F.pad(attention_mask, (0, head.shape[1]), value=1)
    fed = [torch.cat([input_ids, head], dim=1), head][: 1 + guided]
    tokens = []
    with nullcontext() if line_ar is None else line_ar_attention(model):
        branches = [
            Decoder(model.model, new_cache(line_ar, (lines, width + 1)), padding)
            for padding in (mask, None)[: 1 + guided]
        ]
        for i in range(lines * width):
            if i and i % width == 0:
                feed(branches, fed)
                fed = [newline] * len(branches)
            logits = [F.linear(hidden, weight).float() for hidden in feed(branches, fed)]
            c, u = logits[0], logits[-1]
            tokens.append(sampler(u + cfg * (c - u) if guided else c, i))
            fed = [ids[tokens[-1]][:, None]] * len(branches)
    broken = ~(c + u).isfinite().all(dim=-1, keepdim=True)
    return torch.stack(tokens, dim=1).masked_fill(broken, -1)


def feed(branches: Sequence[Decoder], tokens: Sequence[Tensor]) -> list[Tensor]:
    """The next tokens of every branch, (B, n) each -> hidden states (B, D)."""
    return [decode(input_ids=ids) for decode, ids in zip(branches, tokens, strict=True)]


def expand_norms(weights: Mapping[str, Tensor], config: ChameleonConfig) -> dict[str, Tensor]:
    """Norms of queries and keys with a row per head; Lumina-mGPT's files have one per model shard."""
    of_keys = config.num_key_value_heads or config.num_attention_heads
    heads = {"q_norm": config.num_attention_heads, "k_norm": of_keys}
    expanded = dict(weights)
    for key, tensor in weights.items():
        part = key.split(".")[-2] if "." in key else ""
        if part in heads:
            expanded[key] = tensor.repeat_interleave(heads[part] // len(tensor), dim=0)
    return expanded


def load_lumina(model: ChameleonForConditionalGeneration, weights: Mapping[str, Tensor]) -> None:
    """Give a model the tensors of Lumina-mGPT's files, which hold no image tokenizer.

    ValueError if one is missing, unknown or of another shape.
    """
    load_parts(model, expand_norms(weights, model.config), ("model.vqmodel.",))
