"""How much arithmetic an image takes, counted from the geometry: 2 operations per multiply-add.

Matrix products only, as torch.utils.flop_counter counts them; norms and activations are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MARGeometry:
    """Sizes of a MAR: L tokens of `token_dim` channels behind `buffer` class tokens."""

    seq_len: int
    buffer: int
    token_dim: int
    encoder_width: int
    encoder_depth: int
    decoder_width: int
    decoder_depth: int
    mlp_ratio: float
    head_width: int
    head_depth: int
    head_steps: int


def block_flops(rows: int, keys: int, width: int, mlp_ratio: float) -> float:
    """A transformer block that computes `rows` positions, which attend to `keys` positions."""
    queries_and_output = 4 * rows * width * width
    keys_and_values = 4 * keys * width * width
    attention = 4 * rows * keys * width
    mlp = 4 * rows * width * mlp_ratio * width
    return queries_and_output + keys_and_values + attention + mlp


def head_flops(geometry: MARGeometry, branches: int) -> float:
    """The diffusion head for one token, all denoising steps."""
    w = geometry.head_width
    modulation_and_mlp = 2 * 3 * w * w + 2 * 2 * w * w
    final = 2 * 2 * w * w + 2 * 2 * w * geometry.token_dim
    per_branch = geometry.head_depth * modulation_and_mlp + final
    shared = 2 * geometry.token_dim * w
    condition = 2 * geometry.decoder_width * w
    return branches * condition + geometry.head_steps * (shared + branches * per_branch)


def mar_flops(geometry: MARGeometry, steps: Sequence[tuple[int, int, int]]) -> float:
    """One image by MAR without caches; each step is (known tokens, known afterwards, branches).

    branches: 2 with guidance, else 1.
    """
    g, total = geometry, 0.0
    positions = g.buffer + g.seq_len
    for start, stop, branches in steps:
        known, decoded = g.buffer + start, stop - start
        encoder = 2 * start * g.token_dim * g.encoder_width
        encoder += g.encoder_depth * block_flops(known, known, g.encoder_width, g.mlp_ratio)
        decoder = 2 * known * g.encoder_width * g.decoder_width
        whole = block_flops(positions, positions, g.decoder_width, g.mlp_ratio)
        last = block_flops(decoded, positions, g.decoder_width, g.mlp_ratio)
        decoder += (g.decoder_depth - 1) * whole + last
        total += branches * (encoder + decoder) + decoded * head_flops(g, branches)
    return total
