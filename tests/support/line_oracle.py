"""A slow LineAR: nothing is ever dropped, every head has a Python set of the tokens it may still see.

Independent of models/line_cache.py and of its slots; shares only the weights of the model.
"""

from collections.abc import Set

import torch
from torch import Tensor

from models.llamagen import GPT, rope_table, rotate

Alive = list[list[list[set[int]]]]  # [layer][row][head]: image tokens


def smooth(attention: Tensor, place: int) -> float:
    """SnapKV's average over five neighbours of n in the order of the image, zeros beyond the ends."""
    return attention[max(0, place - 2) : place + 3].sum().item() / 5


def spaced_columns(count: int, line: int) -> set[int]:
    """The middles of `count` equal parts of a line, each the nearest token, halves upwards."""
    middles = [(2 * i + 1) * (line - 1) for i in range(count)]  # in units of 1 / (2 * count)
    return {(middle + count) // (2 * count) for middle in middles}


def worth(
    method: str,
    attention: Tensor,
    total: Tensor,
    position: list[int],
    keys: Tensor,
    columns: Set[int],
    line: int,
) -> list[float]:
    """How much each of n tokens is worth to a head, in the order of the image.

    attention (queries, n) of the line just completed, total (n,) of all lines; position: of each in
    the image, below 0 for the condition; keys (n, d); columns: those that "stratified" always keeps.
    """
    mean, places = attention.mean(0), range(len(position))
    if method == "stratified":
        kept = [at >= 0 and at % line in columns for at in position]
        return [float("inf") if kept[i] else mean[i].item() for i in places]
    if method == "rkv":
        pairs = torch.cosine_similarity(keys[:, None], keys[None], dim=-1)
        redundancy = pairs.fill_diagonal_(0).mean(1).softmax(0)
        return (0.07 * mean - 0.93 * redundancy).tolist()
    if method == "snapkv":
        return [smooth(mean, place) for place in places]
    return {
        "linear": mean.tolist(),
        "streaming": position,
        "h2o": total.tolist(),
        "h2o_last": attention[-1].tolist(),
    }[method]


class Oracle:
    """Decodes position by position; method is one of models.line_methods.METHODS."""

    def __init__(
        self,
        model: GPT,
        rows: int,
        budget: int,
        anchors: int,
        recent: int,
        method: str = "linear",
        spaced: int = 0,
    ) -> None:
        self.model, self.method = model, method
        self.budget, self.anchors, self.recent = budget, anchors, recent
        self.columns = spaced_columns(spaced, model.grid[1]) if method == "stratified" else ()
        self.rope = rope_table(model.grid, model.head_dim, torch.device("cpu"))
        layers, heads, length = len(model.layers), model.n_head, 1 + model.block_size
        shape = (layers, rows, heads, length, model.head_dim)
        self.q, self.k, self.v = (torch.zeros(shape, dtype=self.dtype) for _ in range(3))
        self.total = torch.zeros(shape[:-1], dtype=self.dtype)  # accumulated attention
        self.alive: Alive = [
            [[set() for _ in range(heads)] for _ in range(rows)] for _ in model.layers
        ]
        self.history: list[Alive] = []
        self.count = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.model.output.weight.dtype

    def step(self, x: Tensor) -> Tensor:
        """x (rows, 1, D) of the next position -> logits (rows, vocab)."""
        at = self.count
        for index, block in enumerate(self.model.layers):
            attention = block.attention
            qkv = attention.wqkv(block.attention_norm(x))[:, 0]
            q, k, v = qkv.unflatten(-1, (3, attention.n_head, -1)).unbind(1)  # (rows, H, d)
            turn = self.rope[at : at + 1]
            self.q[index, :, :, at] = rotate(q[:, :, None], turn)[:, :, 0]
            self.k[index, :, :, at] = rotate(k[:, :, None], turn)[:, :, 0]
            self.v[index, :, :, at] = v
            out = torch.zeros_like(q)
            for row, heads in enumerate(self.alive[index]):
                for head, alive in enumerate(heads):
                    if at > 0:
                        alive.add(at - 1)
                    seen = [0, *(1 + token for token in sorted(alive))]
                    weights = self.weights(index, row, head, at, seen)
                    out[row, head] = weights @ self.v[index, row, head, seen]
            x = x + attention.wo(out.flatten(1)[:, None])
            x = x + block.feed_forward(block.ffn_norm(x))
        self.count += 1
        line = self.model.grid[1]
        if at > 0 and at % line == 0:
            for index in range(len(self.model.layers)):
                for row in range(x.shape[0]):
                    for head in range(self.model.n_head):
                        self.end_line(index, row, head)
            self.history.append(
                [[[set(a) for a in heads] for heads in rows] for rows in self.alive]
            )
        return self.model.output(self.model.norm(x))[:, 0].float()

    def weights(self, index: int, row: int, head: int, at: int, seen: list[int]) -> Tensor:
        """Attention of the query at `at` over the positions `seen`."""
        logits = self.k[index, row, head, seen] @ self.q[index, row, head, at]
        return torch.softmax(logits / self.model.head_dim**0.5, dim=0)

    def end_line(self, index: int, row: int, head: int) -> None:
        alive, line = self.alive[index][row][head], self.model.grid[1]
        tokens = self.count - 1
        seen = [0, *(1 + token for token in sorted(alive))]
        queries = range(self.count - line, self.count)
        attention = torch.stack([self.weights(index, row, head, at, seen) for at in queries])
        self.total[index, row, head, seen] += attention.sum(0)
        if len(alive) <= self.budget:
            return
        position = [place - 1 for place in seen]
        value = worth(
            self.method, attention, self.total[index, row, head, seen], position,
            self.k[index, row, head, seen], self.columns, line,
        )  # fmt: skip
        candidates = [
            (value[place], position - 1)
            for place, position in enumerate(seen)
            if self.anchors <= position - 1 < tokens - self.recent
        ]
        surplus = len(alive) - self.budget
        for _, token in sorted(candidates)[:surplus]:
            alive.remove(token)

    def logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """What GPT.cached_logits gives, (B, 1 + n, vocab)."""
        embedded = [self.model.cls_embedding(labels), self.model.tok_embeddings(codes)]
        x = torch.cat(embedded, dim=1)
        return torch.stack([self.step(x[:, i : i + 1]) for i in range(x.shape[1])], dim=1)

    def greedy(self, labels: Tensor, cfg: float = 1.0) -> Tensor:
        """What GPT.sample_tokens(greedy=True) gives, (B, N)."""
        guided = cfg > 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.model.num_classes)])
        x, tokens = self.model.cls_embedding(labels), []
        for _ in range(self.model.block_size):
            logits = self.step(x)
            if guided:
                c, u = logits.chunk(2)
                logits = u + cfg * (c - u)
            tokens.append(logits.argmax(-1))
            x = self.model.tok_embeddings(torch.cat([tokens[-1]] * (1 + guided)))[:, None]
        return torch.stack(tokens, dim=1)
