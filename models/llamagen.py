"""LlamaGen's GPT (Sun et al., arXiv 2406.06525): class-conditional images, token by token in raster order.

A Llama decoder over one class token and the N codes of a VQ tokenizer (models/vq.py). Keys of the
state_dict are those of the published files. The plain path is teacher forcing, `model(idx, labels)`;
sampling hands a key-value cache to the same blocks (models/line_cache.py).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gpt_sampler import GPTSampler
from models.line_cache import KVCache, LineARConfig, make_cache

RMS_NORM_EPS = 1e-5  # LlamaGen, autoregressive/models/gpt.py: norm_eps
ROPE_BASE = 10_000  # the same: rope_base
FFN_MULTIPLE = 256  # the same: multiple_of
INIT_STD = 0.02  # the same: initializer_range

KVUpdate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def rope_table(
    grid: tuple[int, int], head_dim: int, device: torch.device, condition: int = 1
) -> Tensor:
    """Cosines and sines (condition + rows * cols, head_dim / 2, 2), float32, of all positions.

    Cell (row, col) turns the first half of its pairs by row * f and the second half by col * f, with
    f_i = 10000^(-2i / (head_dim / 2)), i < head_dim / 4. The rows of the condition are *zero* in
    both: its queries and keys become zero vectors, and the published weights rely on that.
    """
    rows, cols = grid
    exponent = torch.arange(head_dim // 4, dtype=torch.float32, device=device) * 2
    f = 1.0 / ROPE_BASE ** (exponent / (head_dim // 2))
    row, col = (torch.arange(side, dtype=f.dtype, device=device)[:, None] * f for side in grid)
    angles = torch.cat(
        [row[:, None].expand(rows, cols, -1), col[None].expand(rows, cols, -1)], dim=-1
    ).flatten(0, 1)  # (N, head_dim / 2)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([table.new_zeros(condition, *table.shape[1:]), table])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """x (B, H, n, d) turned by rope (n, d/2, 2): pairs (x_2i, x_2i+1) as complex numbers, float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, H, n, d/2)
    cos, sin = rope.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, times a weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_NORM_EPS)
        return normed.type_as(x) * self.weight


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = math.ceil(int(8 * dim / 3) / FFN_MULTIPLE) * FFN_MULTIPLE
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Attention(nn.Module):
    """Multi-head causal self-attention; rows of wqkv are q, k, v."""

    def __init__(self, dim: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, n, D), rope (n, d/2, 2) -> q, k, v (B, H, n, d)."""
        qkv = self.wqkv(x).unflatten(-1, (3, self.n_head, -1))  # (B, n, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return rotate(q, rope), rotate(k, rope), v

    def finish(self, out: Tensor) -> Tensor:
        """Output of the heads (B, H, n, d) -> (B, n, D)."""
        return self.wo(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, dim: int, n_head: int) -> None:
        super().__init__()
        self.attention = Attention(dim, n_head)
        self.feed_forward = FeedForward(dim)
        self.attention_norm = RMSNorm(dim)
        self.ffn_norm = RMSNorm(dim)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        update: KVUpdate | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, n, D), rope (n, d/2, 2) -> (B, n, D).

        `update` sees q, k, v (B, H, 1, d) of one position and returns the keys and values to attend to;
        mask (1, 1, 1, slots) is added to their logits.
        """
        q, k, v = self.project(x, rope)
        if update is not None:
            k, v = update(q, k, v)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=update is None)
        return self.finish(x, out)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before the attention; as Attention.project."""
        return self.attention.project(self.attention_norm(x), rope)

    def finish(self, x: Tensor, out: Tensor) -> Tensor:
        """Both residual sums: x (B, n, D) and the output of the heads (B, H, n, d) -> (B, n, D)."""
        x = x + self.attention.finish(out)
        return x + self.feed_forward(self.ffn_norm(x))


class LabelEmbedding(nn.Module):
    """The class token; row `num_classes` is the unconditional one."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) -> (B, 1, D)."""
        return self.embedding_table(labels)[:, None]


class CaptionEmbedding(nn.Module):
    """Embeddings of a caption by T5, projected; uncond_embedding stands for no caption."""

    def __init__(self, tokens: int, channels: int, dim: int) -> None:
        super().__init__()
        layers = OrderedDict[str, nn.Module](
            fc1=nn.Linear(channels, dim, bias=False),
            act=nn.GELU(approximate="tanh"),
            fc2=nn.Linear(dim, dim, bias=False),
        )
        self.cap_proj = nn.Sequential(layers)
        self.register_buffer("uncond_embedding", torch.randn(tokens, channels) / channels**0.5)

    def forward(self, captions: Tensor) -> Tensor:
        """(B, P, channels) -> (B, P, D)."""
        return self.cap_proj(captions)


class GPT(nn.Module):
    """LlamaGen's transformer; the arguments have the published code's names.

    dim, n_layer, n_head: width, blocks, heads. block_size: N, the tokens of an image. grid: its
    lines and the tokens of a line; without it the square of N. num_classes, vocab_size: classes
    and codes. cls_token_num: 1, class-conditional models have one class token. caption_dim: the
    channels of captions of cls_token_num tokens, for a text-to-image model: models/llamagen_text.py.

    Raises ValueError for a geometry that does not fit together.
    """

    def __init__(
        self,
        dim: int,
        n_layer: int,
        n_head: int,
        block_size: int = 256,
        num_classes: int = 1000,
        vocab_size: int = 16384,
        cls_token_num: int = 1,
        *,
        grid: tuple[int, int] | None = None,
        caption_dim: int | None = None,
    ) -> None:
        super().__init__()
        side = math.isqrt(block_size)
        self.grid: tuple[int, int] = (side, side) if grid is None else (grid[0], grid[1])
        if math.prod(self.grid) != block_size or min(self.grid) < 1:
            raise ValueError(
                f"block_size is {block_size}, which is not {self.grid[0]} x {self.grid[1]}: "
                "give the grid as (lines, tokens per line)"
            )
        if dim % n_head or (dim // n_head) % 4:
            raise ValueError(
                f"dim {dim} over n_head {n_head}: a head's width must be a multiple of 4 (2-D RoPE)"
            )
        if cls_token_num != 1 and caption_dim is None:
            raise ValueError(f"cls_token_num is {cls_token_num}; a class is one token")
        self.block_size = block_size
        self.num_classes = num_classes
        self.vocab_size = vocab_size
        self.n_head = n_head
        self.head_dim = dim // n_head
        self.cls_token_num = cls_token_num
        self.cls_embedding: nn.Module
        if caption_dim is None:
            self.cls_embedding = LabelEmbedding(num_classes, dim)
        else:
            self.cls_embedding = CaptionEmbedding(cls_token_num, caption_dim, dim)
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(Block(dim, n_head) for _ in range(n_layer))
        self.norm = RMSNorm(dim)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)

    @property
    def device(self) -> torch.device:
        return self.output.weight.device

    def forward(self, idx: Tensor, labels: Tensor) -> Tensor:
        """Teacher forcing: idx (B, n <= N) int64 codes, labels (B,) -> logits (B, 1 + n, vocab) float32.

        Position 0 is the class token and predicts token 0; token i predicts token i + 1.
        """
        x = torch.cat([self.cls_embedding(labels), self.tok_embeddings(idx)], dim=1)
        if idx.shape[1] > self.block_size:
            raise ValueError(f"{idx.shape[1]} tokens for an image of {self.block_size}")
        rope = self.rope()[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, rope)
        return self.output(self.norm(x)).float()

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
        """Codes (B, N) int64 of images of the classes `labels` (B,).

        cfg: guidance s > 1 computes both branches, logits = u + s (c - u). cfg_interval: from the
        token after next to this index on there is no guidance any more; -1: always. line_ar: how
        the key-value cache is compressed; None keeps all of it. seeds: one per image, which then
        does not depend on its batch; None draws from torch's global generator. greedy: the most
        likely code instead of a draw. An image whose logits became NaN or infinite has codes of -1.

        Raises ValueError for settings that do not fit, before anything is computed.
        """
        return GPTSampler(self).sample_tokens(
            labels, cfg, temperature, top_k, top_p, cfg_interval,
            line_ar=line_ar, seeds=seeds, greedy=greedy,
        )  # fmt: skip

    @torch.no_grad()
    def cached_logits(
        self, idx: Tensor, labels: Tensor, line_ar: LineARConfig | bool | None = None
    ) -> Tensor:
        """`forward`, position by position through a cache: what sampling would see after idx (B, n < N).

        With the full cache the logits (B, 1 + n, vocab) are those of `forward`; the difference is what a
        compressed one costs. Arguments as in `forward` and `sample_tokens`.
        """
        if idx.shape[1] >= self.block_size:
            raise ValueError(
                f"{idx.shape[1]} tokens: an image of {self.block_size} never feeds its last one"
            )
        cache = make_cache(line_ar, self.grid, len(self.layers))
        rope = self.rope()
        x = torch.cat([self.cls_embedding(labels), self.tok_embeddings(idx)], dim=1)
        steps = range(x.shape[1])
        logits = [self.decode(x[:, i : i + 1], rope[i : i + 1], cache) for i in steps]
        return torch.stack(logits, dim=1)

    def decode(self, x: Tensor, rope: Tensor, cache: KVCache) -> Tensor:
        """One position x (rows, 1, D), rope (1, d/2, 2) -> logits (rows, vocab) float32."""
        logits = self.next_logits(x, rope, cache)
        cache.advance()
        return logits

    def next_logits(self, x: Tensor, rope: Tensor, cache: KVCache) -> Tensor:
        """`decode`, but the caller advances the cache."""
        mask = cache.begin()
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, partial(cache.update, index), mask)
        return self.output(self.norm(x))[:, 0].float()

    def rope(self) -> Tensor:
        """The positions' table on the model's device, see `rope_table`."""
        return rope_table(self.grid, self.head_dim, self.device, self.cls_token_num)


def gpt_b(**kwargs: Any) -> GPT:
    """GPT-B, 111M parameters (LlamaGen, table 1)."""
    return GPT(**{"dim": 768, "n_layer": 12, "n_head": 12, **kwargs})


def gpt_l(**kwargs: Any) -> GPT:
    """GPT-L, 343M parameters."""
    return GPT(**{"dim": 1024, "n_layer": 24, "n_head": 16, **kwargs})


def gpt_xl(**kwargs: Any) -> GPT:
    """GPT-XL, 775M parameters."""
    return GPT(**{"dim": 1280, "n_layer": 36, "n_head": 20, **kwargs})


def gpt_xxl(**kwargs: Any) -> GPT:
    """GPT-XXL, 1.4B parameters."""
    return GPT(**{"dim": 1536, "n_layer": 48, "n_head": 24, **kwargs})


def gpt_3b(**kwargs: Any) -> GPT:
    """GPT-3B, 3.1B parameters."""
    return GPT(**{"dim": 3200, "n_layer": 24, "n_head": 32, **kwargs})


def gpt_xl_t2i(**kwargs: Any) -> GPT:
    """GPT-XL for captions of 120 tokens of flan-t5-xl, 778M parameters."""
    return gpt_xl(**{"cls_token_num": 120, "caption_dim": 2048, **kwargs})


def gpt_tiny(**kwargs: Any) -> GPT:
    """The bundled model of 64x64 shapes: 16x16 codes of ten classes."""
    return GPT(
        **{"dim": 128, "n_layer": 6, "n_head": 4, "num_classes": 10, "vocab_size": 512, **kwargs}
    )
