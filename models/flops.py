"""How much arithmetic an image takes, counted from geometry, plan and policy.

Matrix products only, 2 operations per multiply-add, as torch.utils.flop_counter counts them; norms and
activations (below 0.5%), coupled noise (below 0.1%) and the tokenizer are left out. Two counts:
as published: MAR and LazyMAR as their code computes them, every layer for all positions and every
    denoising step with its own embeddings.
as executed: what models/decoding.py computes. The last decoder block has the rows that are read, the
    first step has all rows of its class, the probe layer's queries are those of kept positions; a
    denoising run embeds time and condition ahead of its steps, and lazy steps take only the
    modulations that they read.
"""

from dataclasses import dataclass

from diffusion import create_solver
from models.head_config import DenoisingRun, HeadConfig, denoising_runs
from models.lazy_mar import LazyMARConfig, StepPolicy, step_policies
from models.mar import MAR
from models.plan import DecodingPlan, DecodingStep


@dataclass(frozen=True)
class MARGeometry:
    """Sizes of a MAR: L tokens of `token_dim` channels behind `buffer` class tokens.

    encoder_mlp, decoder_mlp: hidden widths. head_timesteps: those of the model's own sampling.
    frequencies: features of a timestep that the head embeds.
    """

    seq_len: int
    buffer: int
    token_dim: int
    encoder_width: int
    encoder_depth: int
    encoder_mlp: int
    decoder_width: int
    decoder_depth: int
    decoder_mlp: int
    head_width: int
    head_depth: int
    head_timesteps: tuple[int, ...]
    frequencies: int

    @classmethod
    def from_model(cls, model: MAR) -> "MARGeometry":
        """That of a model."""
        net, encoder, decoder = model.diffloss.net, model.encoder_blocks, model.decoder_blocks
        return cls(
            seq_len=model.seq_len,
            buffer=model.buffer_size,
            token_dim=model.token_dim,
            encoder_width=model.z_proj.out_features,
            encoder_depth=len(encoder),
            encoder_mlp=encoder[0].mlp.fc1.out_features,
            decoder_width=model.decoder_embed.out_features,
            decoder_depth=len(decoder),
            decoder_mlp=decoder[0].mlp.fc1.out_features,
            head_width=net.input_proj.out_features,
            head_depth=len(net.res_blocks),
            head_timesteps=tuple(model.diffloss.gen_diffusion.timestep_map),
            frequencies=net.time_embed.frequencies,
        )


@dataclass(frozen=True)
class Work:
    """Operations for one image, by part of the model."""

    encoder: float = 0.0
    decoder: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        return self.encoder + self.decoder + self.head

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.encoder + other.encoder, self.decoder + other.decoder, self.head + other.head
        )


def image_work(
    geometry: MARGeometry,
    plan: DecodingPlan,
    config: LazyMARConfig | None = None,
    executed: bool = False,
    head: HeadConfig | None = None,
) -> Work:
    """Operations for one image by MAR (no config) or LazyMAR, as published or as executed."""
    policies = step_policies(config, plan, geometry.buffer) if config else {}
    runs = denoising_runs(head, create_solver(geometry.head_timesteps), plan)
    per_token: dict[tuple[int, int], float] = {}  # branches, denoising steps -> operations
    work = Work()
    for step, run in zip(plan.steps, runs, strict=True):
        policy = policies.get(step.index)
        branches = 2 if step.guided else 1
        if config is None or policy is None or policy.refresh:
            rows = _rows_read(geometry, step, policy, config) if executed else None
            work += _full_step(geometry, step, branches, rows)
        else:
            work += _lazy_step(geometry, step, branches, policy.kept, config, executed)
        key = (1 if step.cfg == 1.0 else branches, run.num_steps)
        if key not in per_token:
            per_token[key] = head_work(geometry, key[0], run, config, executed)
        work += Work(head=(step.stop - step.start) * per_token[key])
    return work


def _rows_read(
    g: MARGeometry, step: DecodingStep, policy: StepPolicy | None, config: LazyMARConfig | None
) -> int:
    """Positions whose decoder output is read in a full step: those decoded, or with a residual more."""
    if step.start == 0 and not (policy and policy.fills):
        return g.seq_len
    stop = step.stop
    if policy is not None and config is not None and config.condition_cache and step.guided:
        stop = policy.residual_stop
    return stop - step.start


def _block(queries: int, new: int, keys: int, mlp: int, width: int, hidden: int) -> float:
    """A transformer block: positions with queries and output, with new keys and values, attended to,
    and in the MLP, whose hidden width is `hidden`."""
    products = 4 * (queries + new) * width**2
    return products + 4 * queries * keys * width + 4 * mlp * width * hidden


def _full_step(g: MARGeometry, step: DecodingStep, branches: int, rows: int | None) -> Work:
    """Everything; the last decoder block for `rows` positions, or for all."""
    known = g.buffer + step.start
    encoder: float = 2 * step.start * g.token_dim * g.encoder_width
    encoder += g.encoder_depth * _block(known, known, known, known, g.encoder_width, g.encoder_mlp)
    decoder = 2 * known * g.encoder_width * g.decoder_width + _whole_decoder(g, rows)
    return Work(branches * encoder, branches * decoder)


def _whole_decoder(g: MARGeometry, rows: int | None) -> float:
    """All decoder blocks; the last one for `rows` positions, or for all."""
    total = g.buffer + g.seq_len
    last = total if rows is None else rows
    whole = _block(total, total, total, total, g.decoder_width, g.decoder_mlp)
    return (g.decoder_depth - 1) * whole + _block(
        last, total, total, last, g.decoder_width, g.decoder_mlp
    )


def _lazy_step(
    g: MARGeometry,
    step: DecodingStep,
    branches: int,
    kept: int,
    config: LazyMARConfig,
    executed: bool,
) -> Work:
    """With the caches that are on: one branch, and what changed."""
    branches = 1 if config.condition_cache else branches
    now = step.stop - step.start
    if not config.token_cache:
        return _full_step(g, step, branches, now if executed else None)
    tokens, known, total = step.start - step.previous, g.buffer + step.start, g.buffer + g.seq_len
    new = (g.buffer if config.buffer_refresh else 0) + tokens
    encoder: float = 2 * tokens * g.token_dim * g.encoder_width
    encoder += g.encoder_depth * _block(new, new, known, new, g.encoder_width, g.encoder_mlp)
    decoder: float = 2 * new * g.encoder_width * g.decoder_width
    sizes = g.decoder_width, g.decoder_mlp
    if config.lazy_step == "local":
        last = now if executed else kept
        decoder += (g.decoder_depth - 1) * _block(kept, kept, total, kept, *sizes)
        decoder += _block(last, kept, total, last, *sizes)
        return Work(branches * encoder, branches * decoder)
    deeper = g.decoder_depth - config.probe_layer - 1
    if deeper < 0 or kept == total:
        decoder += _whole_decoder(g, now if executed else None)
        return Work(branches * encoder, branches * decoder)
    decoder += config.probe_layer * _block(total, total, total, total, *sizes)
    decoder += _block(kept if executed else total, total, total, kept, *sizes)
    if deeper:
        last = now if executed else kept
        decoder += (deeper - 1) * _block(kept, kept, total, kept, *sizes)
        decoder += _block(last, kept, total, last, *sizes)
    return Work(branches * encoder, branches * decoder)


def head_work(
    g: MARGeometry,
    branches: int,
    run: DenoisingRun,
    config: LazyMARConfig | None,
    executed: bool = False,
) -> float:
    """The diffusion head for one token: all denoising steps of a run."""
    w, depth = g.head_width, g.head_depth
    one_modulation, mlp = 2 * w * w, 2 * 2 * w * w
    token = 2 * g.token_dim * w
    condition = 2 * g.decoder_width * w
    output = 2 * w * 2 * g.token_dim
    time = 2 * g.frequencies * w + 2 * w * w
    embedding = 0 if executed else time + condition  # of each row at each step
    full_row = embedding + depth * (3 * one_modulation + mlp) + 2 * one_modulation + output

    kinds = ["full"] * run.num_steps
    if config is not None and config.head_cache:
        kinds = config.head_kinds(run.guided, len(g.head_timesteps))
    blocks = depth - len(set(config.head_skip) & set(range(depth))) if config else depth
    total = branches * condition if executed else 0
    for guided, kind in zip(run.guided, kinds, strict=True):
        if kind == "full":
            rows = branches if guided else 1
            total += rows * full_row + (token if executed else rows * token)
            continue
        modulations = 2 + blocks * (1 if executed and kind == "cold" else 3)
        if config is not None and config.head_reuse_adaln:
            modulations = 0
        total += token + embedding + modulations * one_modulation + output
        total += blocks * mlp if kind == "warm" else 0
    return total
