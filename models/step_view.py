"""Sampling of one image, step by step: what is known so far, and which tokens each step computes.

For the demo, the notebook and benchmarks.redundancy. Nothing in sampling itself needs this.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from models.decoding import Decoding
from models.head_config import HeadConfig
from models.lazy_mar import LazyMARConfig
from models.lazy_predictor import LazyPredictor
from models.noise import ImageNoise
from models.plan import DecodingPlan, DecodingStep

if TYPE_CHECKING:
    from models.mar import MAR

# What a step does with a token: decodes it, had decoded it the step before, computes it anyway, reuses it.
NOW, PREVIOUS, CHANGED, REUSED = "npc."


@dataclass(frozen=True)
class StepView:
    """One decoding step of one image.

    latents (1, C, H, W), 0 where unknown. known (g, g) bool. states: a string of NOW, PREVIOUS, CHANGED
    and REUSED, one character per token in raster order, as the last decoder layers see them. refresh:
    whether the step computes everything.
    """

    step: DecodingStep
    latents: Tensor
    known: Tensor
    states: str
    refresh: bool


def views(
    model: "MAR",
    plan: DecodingPlan,
    config: LazyMARConfig | None,
    label: int,
    noise: ImageNoise,
    temperature: float = 1.0,
    head: HeadConfig | None = None,
) -> Iterator[StepView]:
    """The steps of an image, as each is done; the last one's latents are those of sample_tokens.

    model: a sampling copy (models/sampling_copy.py); noise of one image, arranged in the plan's order.
    """
    decoding = Decoding(model, 1, plan, config, temperature, head)
    ranks = noise.orders[0].flip(0).argsort()  # when each token is decoded, raster order
    for step, tokens in decoding.partial_results([label], noise):
        refresh = True
        states = [CHANGED] * plan.seq_len
        if isinstance(decoding.predictor, LazyPredictor):
            refresh = decoding.predictor.policies[step.index].refresh
            if not refresh:
                states = _lazy_states(decoding.predictor, plan.seq_len)
        states[step.previous : step.start] = PREVIOUS * (step.start - step.previous)
        states[step.start : step.stop] = NOW * (step.stop - step.start)
        yield StepView(
            step,
            model.unpatchify(tokens),
            (ranks < step.stop).unflatten(0, (model.grid_size, -1)),
            "".join(states[rank] for rank in ranks.tolist()),
            refresh,
        )


def _lazy_states(predictor: LazyPredictor, length: int) -> list[str]:
    """What the lazy step just done does with each token, in decoding order."""
    if predictor.token_cache and predictor.local:
        return [REUSED] * length
    if predictor.selected is None:
        return [CHANGED] * length
    states = [REUSED] * (predictor.model.buffer_size + length)
    for position in predictor.selected[0].tolist():
        states[position] = CHANGED
    return states[predictor.model.buffer_size :]
