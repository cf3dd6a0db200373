"""Models of the real sizes with random weights, and the work that sampling from them takes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.mar import DEFAULTS, PRESETS
from models import mar
from models.decoding import Decoding
from models.fast_mar import PRESETS as FAST_PRESETS
from models.fast_mar import FastMARConfig
from models.head_config import HeadConfig
from models.lazy_head import LazyDenoiser
from models.lazy_mar import CACHES, LazyMARConfig
from models.noise import ImageNoise
from models.plan import DecodingPlan
from models.sampling_copy import sampling_copy

MODELS = tuple(mar.SIZES)
MODES: dict[str, FastMARConfig] = {
    "plain": FastMARConfig.published(),
    "lazy": FastMARConfig.lazymar(),
    **{name: FastMARConfig(lazy=LazyMARConfig().with_caches([name])) for name in CACHES},
    **{name: FAST_PRESETS[name]() for name in ("balanced", "fast")},
}


def build(name: str, device: torch.device | str, **kwargs: object) -> mar.MAR:
    """A model with seeded random weights, no matrix of zeros, ready to sample; kwargs as MAR's.

    Raises ValueError for an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"{name} is no model; use one of {', '.join(MODELS)}")
    flags = {**DEFAULTS, **PRESETS[name]}
    head = {key: flags[key] for key in ("diffloss_d", "diffloss_w")}
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(mar, name)(**{**head, **kwargs}).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)
    return model


@dataclass(frozen=True)
class Work:
    """Operations for one image, and bytes of head weights that one batch reads at least."""

    transformer_flops: float
    head_flops: float
    head_bytes: float

    @property
    def flops(self) -> float:
        return self.transformer_flops + self.head_flops

    def limits(self, batch: int, rate: float, bandwidth: float) -> tuple[float, float]:
        """Seconds per batch: by arithmetic alone; and with the head's weights read at each step."""
        arithmetic = batch * self.flops / rate
        head = max(batch * self.head_flops / rate, self.head_bytes / bandwidth)
        return arithmetic, batch * self.transformer_flops / rate + head


def count_work(name: str, task: FastMARConfig, cfg: float, itemsize: int) -> Work:
    """The work of one image by a model of this name, see `work_of`."""
    model, start = build(name, "meta"), task.head.guidance_start
    plan = DecodingPlan.create(
        model.seq_len, task.num_iter, cfg, guidance_start=start, order=task.order
    )
    return work_of(model, task.lazy, plan, itemsize, task.head)


def work_of(
    model: mar.MAR,
    config: LazyMARConfig | None,
    plan: DecodingPlan,
    itemsize: int,
    head: HeadConfig | None = None,
) -> Work:
    """The work of one image by a model on the meta device, counted by torch's flop counter."""
    copy = sampling_copy(model, torch.float32, model.diffloss)
    decoding = Decoding(copy, 1, plan, config, temperature=1.0, head=head)
    heads: dict[object, float] = {}  # (rows of a run) -> operations
    flops = {"step": 0.0, "head": 0.0}

    def run_step(key: object, call: Callable[[], None]) -> None:
        del key
        flops["step"] += count(call)

    def run_head(key: object, call: Callable[[], None]) -> None:
        if key not in heads:
            heads[key] = count(call)
        flops["head"] += heads[key]

    decoding.run_step, decoding.run_head = run_step, run_head
    with torch.device("meta"):
        shape = (1, model.seq_len, model.diffloss.num_sampling_steps + 1, model.token_dim)
        noise = ImageNoise(torch.zeros(1, model.seq_len, dtype=torch.long), torch.zeros(shape))
    first = count(lambda: decoding._prepare([0], noise))
    list(decoding._decode(noise, progress=False))
    return Work(
        transformer_flops=flops["step"] + first,
        head_flops=flops["head"],
        head_bytes=sum(_head_weights(decoding, run.num_steps) for run in decoding.runs) * itemsize,
    )


def count(call: Callable[[], object]) -> float:
    """Operations of a call: 2 for each multiply-add of a matrix product."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _head_weights(decoding: Decoding, steps: int) -> int:
    """Weights that a denoising run of `steps` reads if each of its steps reads what it needs."""
    net, denoiser = decoding.model.diffloss.net, decoding.denoiser
    width = net.cond_embed.weight.shape[0]
    always = net.input_proj.weight.numel() + net.final_layer.linear.weight.numel()
    mlp = 2 * width**2
    full = always + len(net.res_blocks) * (mlp + 3 * width**2) + 2 * width**2
    if not isinstance(denoiser, LazyDenoiser):
        return steps * full
    unskipped = sum(not skipped for skipped, _ in denoiser.segments)
    kinds = denoiser.runs[steps].kinds
    cold = always + denoiser.columns["cold"] * width**2
    warm = always + denoiser.columns["warm"] * width**2 + unskipped * mlp
    of = {"full": full, "warm": warm, "cold": cold}
    return sum(of[kind] for kind in kinds)
