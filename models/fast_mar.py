"""FastMARConfig: everything that decides how an image is sampled, and the presets.

    model.sample_tokens(bsz, cfg=3.25, labels=labels, **FastMARConfig.fast().arguments())

Ratios are operations of MAR's published sampling (64 decoding steps, 100 denoising steps) over those of
the preset, by the same count (models/flops.py), for mar_base, mar_large and mar_huge.
"""

from dataclasses import dataclass, field
from typing import Any

from models.head_config import HeadConfig
from models.lazy_mar import LazyMARConfig
from models.order import OrderConfig

# DiSA, arXiv 2505.20297: where its ancestral steps start.
DISA_START = 950
# In the first quarter of the steps, linear guidance of 3.25 is below 1.2; they decode 8% of the tokens.
GUIDANCE_START = 0.25
# Timesteps at the noise levels (0.19, 1.61] of Kynkaanniemi et al. 2024, relative to the data's 0.5.
GUIDANCE_INTERVAL = (225, 807)


@dataclass(frozen=True)
class FastMARConfig:
    """The arguments of sample_tokens that trade cost for quality; the defaults are MAR's.

    num_iter: decoding steps. lazy: LazyMAR's caches, None for none.
    """

    num_iter: int = 64
    order: OrderConfig = field(default_factory=OrderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    lazy: LazyMARConfig | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of sample_tokens."""
        return {
            "num_iter": self.num_iter,
            "order": self.order,
            "head": self.head,
            "lazy_mar": self.lazy,
        }

    @classmethod
    def published(cls) -> "FastMARConfig":
        """MAR as published."""
        return cls()

    @classmethod
    def lazymar(cls) -> "FastMARConfig":
        """LazyMAR as published: 2.8x."""
        return cls(lazy=LazyMARConfig())

    @classmethod
    def balanced(cls) -> "FastMARConfig":
        """LazyMAR's token and condition cache, DiSA's head, guidance from a quarter on: 4.8x."""
        return cls(
            num_iter=40,
            head=HeadConfig(steps=(50, 5), t_start=DISA_START, guidance_start=GUIDANCE_START),
            lazy=LazyMARConfig(head_cache=False),
        )

    @classmethod
    def fast(cls) -> "FastMARConfig":
        """24 decoding steps in Halton's order, a shorter head, guidance where it matters: 8.2x or more."""
        return cls(
            num_iter=24,
            order=OrderConfig("halton"),
            head=HeadConfig(
                steps=(25, 8),
                t_start=DISA_START,
                guidance_start=GUIDANCE_START,
                guidance_interval=GUIDANCE_INTERVAL,
            ),
            lazy=LazyMARConfig(buffer_refresh=False, head_cache=False),
        )


PRESETS = {
    "lazymar": FastMARConfig.lazymar,
    "balanced": FastMARConfig.balanced,
    "fast": FastMARConfig.fast,
}
