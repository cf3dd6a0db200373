"""Which tokens a compressed cache evicts: LineAR's score, and those of the methods to compare with.

The cache handles budget and memory; a method says how many tokens it protects at both ends and scores
the others, (rows, H, live) float32: the lowest are evicted. A new method is a class with these two, and
a line in METHODS. All methods run after each complete line, with the same budget, and decide per layer,
sequence and head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.line_plan import LinePlan

POOLINGS = ("mean", "max", "last")


@dataclass(frozen=True)
class LineView:
    """The input of a method when a line is complete.

    queries: (rows, H, line * groups, d), of the line; `groups` query heads share a key head; empty for
    a method that needs none.
    keys, positions: (rows, H, live, d) and (rows, H, live), of all live tokens in no particular
    order. hidden: (rows, 1, live), true for padding; None if there is none.
    """

    queries: Tensor
    keys: Tensor
    positions: Tensor
    pooling: str
    plan: LinePlan
    hidden: Tensor | None = None

    def attention(self) -> Tensor:
        """softmax(q k / sqrt d) over all live keys, mean of a group: (rows, H, line, live) float32."""
        scale = self.keys.shape[-1] ** -0.5
        logits = self.queries.float() * scale @ self.keys.float().transpose(-1, -2)
        if self.hidden is not None:
            logits = logits.masked_fill(self.hidden[:, :, None], -torch.inf)
        attention = logits.softmax(dim=-1).unflatten(2, (self.plan.line, -1))
        return attention.mean(3) if attention.shape[3] > 1 else attention.squeeze(3)

    def pooled(self) -> Tensor:
        """The attention pooled over the queries of the line, (rows, H, live)."""
        attention = self.attention()
        if self.pooling == "mean":
            return attention.mean(dim=2)
        return attention.amax(dim=2) if self.pooling == "max" else attention[:, :, -1]


class Method:
    """One way to choose the tokens that are evicted.

    cumulative: scores of all lines are added up. stratified: tokens of every line are always kept.
    settings: the fields of LineARConfig, beside the budget, that make a difference.
    """

    needs_queries = True
    cumulative = False
    stratified = False
    settings: tuple[str, ...] = ()

    def protected(self, anchors: int, recent: int, line: int, budget: int) -> tuple[int, int]:
        """First and newest tokens that are never evicted, at least one line of the newest.

        anchors, recent: LineAR's constants, the second in lines.
        """
        raise NotImplementedError

    def score(self, view: LineView) -> Tensor:
        """Score of each live token, (rows, H, live); the lowest are evicted."""
        raise NotImplementedError


class LineAR(Method):
    """Attention of the line just completed (Qin et al., arXiv 2512.04857): inter-line attention."""

    settings = ("anchors", "recent", "pooling")

    def protected(self, anchors: int, recent: int, line: int, budget: int) -> tuple[int, int]:
        return anchors, recent * line

    def score(self, view: LineView) -> Tensor:
        return view.pooled()


class Stratified(LineAR):
    """LineAR's score, but evenly spaced tokens of every line are never evicted. Ours.

    If attention to old lines is spread out, the score alone may evict whole lines. The spaced tokens of
    the first line replace all of LineAR's anchors but one.
    """

    stratified = True
    settings = ("recent", "pooling", "spaced")
    ANCHORS = 1  # the first token, which heads attend to whatever it is (arXiv 2309.17453)

    def protected(self, anchors: int, recent: int, line: int, budget: int) -> tuple[int, int]:
        return self.ANCHORS, recent * line

    def score(self, view: LineView) -> Tensor:
        line, spaced = view.plan.line, view.plan.spaced
        place = torch.arange(spaced, dtype=torch.float64, device=view.positions.device)
        columns = ((place + 0.5) * (line - 1) / spaced + 0.5).floor()
        column = (view.positions - view.plan.condition) % line
        kept = (column[..., None] == columns).any(-1)
        return super().score(view).masked_fill(kept, torch.inf)


class StreamingLLM(Method):
    """The first four tokens and the newest (Xiao et al., arXiv 2309.17453)."""

    needs_queries = False
    SINKS = 4  # section 3.1: four initial tokens

    def protected(self, anchors: int, recent: int, line: int, budget: int) -> tuple[int, int]:
        return self.SINKS, line

    def score(self, view: LineView) -> Tensor:
        return view.positions.float()


class H2O(Method):
    """Heavy hitters: accumulated attention; half of the budget are the newest tokens.

    Zhang et al., arXiv 2306.14048: equal shares of heavy hitters and of recent tokens.
    """

    cumulative = True

    def protected(self, anchors: int, recent: int, line: int, budget: int) -> tuple[int, int]:
        return 0, max(line, budget // 2)

    def score(self, view: LineView) -> Tensor:
        return view.attention().sum(dim=2)


class H2OLast(H2O):
    """Its variant without memory: the attention of the newest query alone (TOVA, arXiv 2401.06104)."""

    cumulative = False

    def score(self, view: LineView) -> Tensor:
        return view.attention()[:, :, -1]


class SnapKV(Method):
    """Attention of an observation window, here a line, smoothed along the sequence.

    Li et al., arXiv 2404.14469: pooling keeps the neighbours of what is attended to.
    """

    KERNEL = 5  # the published code's kernel_size, with avgpool

    def protected(self, anchors: int, recent: int, line: int, budget: int) -> tuple[int, int]:
        return 0, line

    def score(self, view: LineView) -> Tensor:
        order = view.positions.argsort(dim=-1)
        score = view.attention().mean(dim=2).gather(-1, order)
        smooth = F.avg_pool1d(score, self.KERNEL, stride=1, padding=self.KERNEL // 2)
        return score.scatter(-1, order, smooth)


class RKV(Method):
    """Attention minus redundancy (Cai et al., arXiv 2505.24133).

    Redundancy of a key is the softmax of its mean cosine similarity to the other live keys of its
    sequence and head; the published code looks at the first sequence of a batch alone. Its
    exception for the newest of several similar keys is left out: the newest line is protected.
    """

    LAMBDA = 0.07  # the published code's mix_lambda: weight of attention

    def protected(self, anchors: int, recent: int, line: int, budget: int) -> tuple[int, int]:
        return 0, line

    def score(self, view: LineView) -> Tensor:
        direction = F.normalize(view.keys.float(), dim=-1)
        live: int | Tensor = view.keys.shape[2]
        if view.hidden is not None:
            direction = direction.masked_fill(view.hidden[..., None], 0)
            live = (~view.hidden).sum(-1, keepdim=True)
        total = direction.sum(dim=2, keepdim=True)  # mean_j cos(i, j) = k_i . sum_j k_j / live
        itself = direction.square().sum(-1)  # 1, but 0 where a key is zero: LlamaGen's condition
        similarity = ((direction * total).sum(-1) - itself) / live
        if view.hidden is not None:
            similarity = similarity.masked_fill(view.hidden, -torch.inf)
        attention = view.attention().mean(dim=2)
        return self.LAMBDA * attention - (1 - self.LAMBDA) * similarity.softmax(dim=-1)


METHODS: dict[str, Method] = {
    "linear": LineAR(),
    "streaming": StreamingLLM(),
    "h2o": H2O(),
    "rkv": RKV(),
    "snapkv": SnapKV(),
    "h2o_last": H2OLast(),
    "stratified": Stratified(),
}
