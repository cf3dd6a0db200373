"""Transformer layers with timm's names and arithmetic: pre-norm, exact GELU, fused qkv.

The plain path is `block(x)`. Two optional arguments are for callers that compute only a part: `update`
gets this layer's new keys and values and returns those to attend to (a cache), and `query_slice` selects
the positions whose output is computed, while all of x gives keys and values.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6  # MAR, models/mar.py: norm_layer=partial(nn.LayerNorm, eps=1e-6)

KVUpdate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
M = TypeVar("M", bound=nn.Module)

if TYPE_CHECKING:

    class ModuleList(nn.ModuleList, Generic[M]):
        """nn.ModuleList with the type of its modules."""

        def __iter__(self) -> Iterator[M]: ...
        @overload
        def __getitem__(self, index: slice) -> "ModuleList[M]": ...
        @overload
        def __getitem__(self, index: int) -> M: ...
        def __getitem__(self, index: int | slice) -> "M | ModuleList[M]": ...

else:
    ModuleList = nn.ModuleList


def linear_at(layers: nn.Sequential, index: int) -> nn.Linear:
    """A linear layer of a Sequential, typed; in a sampling copy, the layer that replaces it."""
    return cast(nn.Linear, layers[index])


class Linear(nn.Linear):
    """nn.Linear that can also compute only some of its outputs."""

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """x (..., in) -> (..., out), or (..., len(outputs))."""
        if outputs is None:
            return super().forward(x)
        return F.linear(x, self.weight[outputs], self.bias[outputs])


class Attention(nn.Module):
    """Multi-head self-attention; keys of the state_dict: qkv, proj."""

    def __init__(
        self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of {num_heads} heads")
        self.dim = dim
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, update: KVUpdate | None = None, query_slice: slice | None = None
    ) -> Tensor:
        """x (B, n, D) -> (B, n, D), or (B, len(query_slice), D)."""
        if query_slice is None:
            q, k, v = self._heads(self.qkv(x), 3)
        else:
            k, v = self.keys_values(x)
            q = self.queries(x[:, query_slice])
        if update is not None:
            k, v = update(k, v)
        return self.attend(q, k, v)

    def queries(self, x: Tensor) -> Tensor:
        """x (B, n, D) -> (B, H, n, D/H)."""
        return self._heads(self.qkv(x, slice(0, self.dim)), 1)[0]

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, n, D) -> keys and values, each (B, H, n, D/H)."""
        k, v = self._heads(self.qkv(x, slice(self.dim, 3 * self.dim)), 2)
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, n, d), k and v (B, H, m, d) -> (B, n, H*d), projected."""
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            out = _attention_as_products(q, k, v)
        else:
            drop = self.attn_drop if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, n, parts*D) -> `parts` tensors (B, H, n, D/H)."""
        x = x.unflatten(-1, (parts, self.num_heads, -1))  # (B, n, parts, H, d)
        return x.permute(2, 0, 3, 1, 4).unbind(0)


def _attention_as_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in three calls: 1.4 times as fast as the fused CPU kernel in bf16."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1) @ v


class Mlp(nn.Module):
    """Linear, exact GELU, Linear; keys fc1, fc2."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """timm's vision-transformer Block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        mlp_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, attn_drop, proj_drop)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), mlp_drop)

    def forward(
        self, x: Tensor, update: KVUpdate | None = None, query_slice: slice | None = None
    ) -> Tensor:
        """x (B, n, D) -> (B, n, D), or (B, len(query_slice), D)."""
        attended = self.attn(self.norm1(x), update, query_slice)
        return self.finish(x if query_slice is None else x[:, query_slice], attended)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Both residual sums: x and the attention's output (B, n, D) -> (B, n, D)."""
        x = x + attended
        return x + self.mlp(self.norm2(x))
