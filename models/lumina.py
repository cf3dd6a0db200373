"""Lumina-mGPT (Liu et al., arXiv 2408.02657): pictures of prompts, with transformers' Chameleon.

transformers' own generation forbids image tokens, so the loop is ours, over `model.model` and
`model.lm_head`. An image is <racm3:break>, its height and its width, then lines of codes that end with a
newline token. The unconditional branch has no prompt: its own cache, shorter by the prompt.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from models.chameleon_vq import ChameleonVQ
from models.gpt_images import GPTSampling, pictures
from models.line_config import LineARConfig
from models.token_sampling import TokenSampler, check_settings
from models.transformers_cache import line_ar_attention
from models.transformers_models import Decoder, check_kind, new_cache, with_weights
from util.weights import read_hub_folder

STRIDE = 16  # pixels per code and side
CODES_PER_SIZE = 2  # a size token counts 32 pixels
PROMPT = "Generate an image of {width}x{height} according to the following prompt:\n{text}"


@dataclass(frozen=True)
class ImageVocabulary:
    """Ids of the tokens that make an image; `codes[i]` is code i of the tokenizer."""

    begin: int
    newline: int
    size: int  # of no pixels; the next is of 32
    turn: int  # ends the prompt
    codes: tuple[int, ...]

    @classmethod
    def from_model(cls, model: ChameleonForConditionalGeneration) -> "ImageVocabulary":
        """By their names in the model's vocabulary. ValueError if it lacks one."""
        names, ids = model.config.vocabulary_map or {}, model.model.vocabulary_mapping.img2bpe
        reserved = (f"<reserved{number:05}>" for number in (8799, 8800, 8706))
        wanted = ("<racm3:break>", *reserved)
        if missing := [name for name in wanted if name not in names]:
            raise ValueError(
                f"the vocabulary has no {missing[0]}: this is not a model of Lumina-mGPT"
            )
        begin, newline, size, turn = (names[name] for name in wanted)
        return cls(begin, newline, size, turn, tuple(ids[code] for code in range(len(ids))))

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
    cfg_interval: int = -1,
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
            guides = guided and (cfg_interval < 0 or i - 1 <= cfg_interval)
            tokens.append(sampler(u + cfg * (c - u) if guides else c, i))
            fed = [ids[tokens[-1]][:, None]] * len(branches)
    broken = ~(c + u).isfinite().all(dim=-1, keepdim=True)
    return torch.stack(tokens, dim=1).masked_fill(broken, -1)


def feed(branches: Sequence[Decoder], tokens: Sequence[Tensor]) -> list[Tensor]:
    """The next tokens of every branch, (B, n) each -> hidden states (B, D)."""
    return [decode(input_ids=ids) for decode, ids in zip(branches, tokens, strict=True)]


class LuminaGenerator:
    """A model of Lumina-mGPT, its tokenizers of text and images, as an ImageGenerator of prompts."""

    def __init__(
        self,
        model: ChameleonForConditionalGeneration,
        tokenizer: Any,  # transformers' tokenizer
        vq: ChameleonVQ,
        sampling: GPTSampling,
        grid: tuple[int, int],
        size: int,
        vae_bsz: int | None = None,
    ) -> None:
        """Images of `grid` codes, as pictures of size x size pixels; vae_bsz: decoded at once."""
        self.model, self.tokenizer, self.vq = model, tokenizer, vq
        self.sampling, self.grid, self.size, self.vae_bsz = sampling, grid, size, vae_bsz

    def prepare(
        self, prompts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[dict[str, Tensor], Sequence[int]]:
        """The prompts as the user's turn of a conversation, in tokens."""
        height, width = (side * STRIDE for side in self.grid)
        texts = [PROMPT.format(width=width, height=height, text=text) for text in prompts]
        inputs = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        turn = ImageVocabulary.from_model(self.model).turn
        ends = {"input_ids": turn, "attention_mask": 1}
        padded = {k: F.pad(inputs[k], (0, 1), value=v) for k, v in ends.items()}
        return {k: v.to(self.model.device) for k, v in padded.items()}, seeds

    @torch.no_grad()
    def generate(self, prepared: tuple[dict[str, Tensor], Sequence[int]]) -> Tensor:
        """Images (B, 3, size, size) float32, about [-1, 1]; NaN where the model computed none."""
        inputs, seeds = prepared
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        codes = sample_tokens(self.model, ids, mask, self.grid, **vars(self.sampling), seeds=seeds)
        return pictures(self.vq.decode, codes.unflatten(1, self.grid), self.size, self.vae_bsz)


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


def open_lumina(folder: Path) -> ChameleonForConditionalGeneration:
    """The model of a folder, float32, without its image tokenizer, which Lumina-mGPT's files do not hold.

    UserError or ValueError for files that are missing, damaged or do not fit each other.
    """
    check_kind(ChameleonForConditionalGeneration, folder)
    config = ChameleonConfig.from_pretrained(folder)
    weights = expand_norms(read_hub_folder(folder), config)
    return with_weights(ChameleonForConditionalGeneration, config, weights, ("model.vqmodel.",))
