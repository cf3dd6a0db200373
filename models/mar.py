"""MAR: masked autoregressive image generation over continuous tokens (Li et al., NeurIPS 2024).

An MAE-style encoder reads the tokens that are known, a decoder writes a condition z for every
token that is not, and a diffusion head samples each token given its z. Sequences are kept in
*decoding order* (known tokens first), behind `buffer_size` positions that hold the class.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import truncnorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from models.diffloss import DiffLoss, PlainDenoiser
from models.layers import LAYER_NORM_EPS, Block, KVUpdate
from models.lazy_head import LazyDenoiser
from models.lazy_mar import LazyMARConfig
from models.lazy_predictor import LazyPredictor
from models.noise import ImageNoise
from models.plan import DecodingPlan, DecodingStep
from models.presets import PRESETS

LayerUpdates = Sequence[KVUpdate | None]


class MAR(nn.Module):
    """Trains with `forward(latents, labels)`, generates with `sample_tokens(...)`.

    L = (img_size / vae_stride / patch_size)^2 tokens of vae_embed_dim * patch_size^2 channels.
    Constructor names and defaults are those of the original. Three are ours, for short trainings of
    small models; their defaults change nothing:
    masked_keep: share of the masked tokens that a training step decodes (CrossMAE, Fu et al. 2024).
    pos_init: "sincos" starts the position tables as 2-D sines (MAE, He et al. 2022).
    aux_weight: weight of a squared error that asks z for the token itself, read out through the
        transposed z_proj, so that context is learned before the head makes use of it.
    """

    def __init__(
        self,
        img_size: int = 256,
        vae_stride: int = 16,
        patch_size: int = 1,
        encoder_embed_dim: int = 1024,
        encoder_depth: int = 16,
        encoder_num_heads: int = 16,
        decoder_embed_dim: int = 1024,
        decoder_depth: int = 16,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        vae_embed_dim: int = 16,
        mask_ratio_min: float = 0.7,
        label_drop_prob: float = 0.1,
        class_num: int = 1000,
        attn_dropout: float = 0.1,
        proj_dropout: float = 0.1,
        buffer_size: int = 64,
        diffloss_d: int = 3,
        diffloss_w: int = 1024,
        num_sampling_steps: str = "100",
        diffusion_batch_mul: int = 4,
        grad_checkpointing: bool = False,
        masked_keep: float = 1.0,
        pos_init: str = "normal",
        aux_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if aux_weight and encoder_embed_dim != decoder_embed_dim:
            raise ValueError(
                f"aux_weight needs equal widths, not {encoder_embed_dim} and {decoder_embed_dim}"
            )
        if img_size % (vae_stride * patch_size):
            raise ValueError(
                f"img_size {img_size} is not a multiple of vae_stride {vae_stride} x patch_size "
                f"{patch_size}"
            )
        self.patch_size = patch_size
        self.vae_embed_dim = vae_embed_dim
        self.grid_size = img_size // vae_stride // patch_size
        self.seq_len = self.grid_size**2
        self.token_dim = vae_embed_dim * patch_size**2
        self.buffer_size = buffer_size
        self.class_num = class_num
        self.label_drop_prob = label_drop_prob
        self.diffusion_batch_mul = diffusion_batch_mul
        self.masked_keep = masked_keep
        self.aux_weight = aux_weight
        self.grad_checkpointing = grad_checkpointing
        # MAR, section 4.2: mask ratio from a normal of mean 1 and std 0.25, cut to [min, 1]
        self.mask_ratio = truncnorm((mask_ratio_min - 1.0) / 0.25, 0, loc=1.0, scale=0.25)

        length = buffer_size + self.seq_len
        self.fake_latent = nn.Parameter(torch.zeros(1, encoder_embed_dim))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, encoder_embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, decoder_embed_dim))
        self.diffusion_pos_embed_learned = nn.Parameter(
            torch.zeros(1, self.seq_len, decoder_embed_dim)
        )
        self.class_emb = nn.Embedding(class_num, encoder_embed_dim)

        block = partial(Block, mlp_ratio=mlp_ratio, attn_drop=attn_dropout, proj_drop=proj_dropout)
        self.z_proj = nn.Linear(self.token_dim, encoder_embed_dim)
        self.z_proj_ln = nn.LayerNorm(encoder_embed_dim, eps=LAYER_NORM_EPS)
        self.encoder_blocks = nn.ModuleList(
            block(encoder_embed_dim, encoder_num_heads) for _ in range(encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(encoder_embed_dim, eps=LAYER_NORM_EPS)
        self.decoder_embed = nn.Linear(encoder_embed_dim, decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(
            block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=LAYER_NORM_EPS)
        self._initialize(pos_init)
        self.diffloss = DiffLoss(
            self.token_dim,
            decoder_embed_dim,
            diffloss_d,
            diffloss_w,
            num_sampling_steps,
            grad_checkpointing,
        )

    def _initialize(self, pos_init: str) -> None:
        """Embeddings and position tables normal 0.02; Linear xavier uniform, bias zero."""
        if pos_init not in ("normal", "sincos"):
            raise ValueError(f"pos_init is {pos_init!r}; use normal or sincos")
        for name, parameter in self.named_parameters():
            if "." not in name or name.startswith("class_emb"):
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if pos_init == "sincos":
            # Below the size of what they are added to, so that contents are seen too.
            encoder, decoder = self.encoder_pos_embed_learned, self.decoder_pos_embed_learned
            for table, scale in ((encoder, 0.25), (decoder, 0.5)):
                table.data[0, self.buffer_size :] = scale * _sincos(self.grid_size, table.shape[2])

    # ---- tokens -------------------------------------------------------------------------------

    def patchify(self, x: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> tokens (B, L, C*p*p), channel-major inside a token."""
        p = self.patch_size
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h, p, w, p)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens (B, L, C*p*p) -> latents (B, C, H, W)."""
        p, g = self.patch_size, self.grid_size
        x = x.unflatten(2, (self.vae_embed_dim, p, p)).unflatten(1, (g, g))  # (B, h, w, C, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def class_embedding(self, labels: Tensor | Sequence[int] | None, bsz: int) -> Tensor:
        """(B, D) embeddings of labels (B,), or of no class at all (None)."""
        if labels is None:
            return self.fake_latent.expand(bsz, -1)
        labels = torch.as_tensor(labels, dtype=torch.long)
        if labels.shape != (bsz,):
            raise ValueError(f"labels have shape {tuple(labels.shape)}; this batch needs ({bsz},)")
        return self.class_emb(labels.to(self.fake_latent.device))

    def check_labels(self, labels: Tensor | Sequence[int] | None) -> None:
        """Raise ValueError for a label outside 0..class_num-1."""
        if labels is None:
            return
        for label in torch.as_tensor(labels).flatten().tolist():
            if not 0 <= label < self.class_num:
                raise ValueError(f"label {label} is outside 0..{self.class_num - 1}")

    # ---- transformer, in decoding order ---------------------------------------------------------

    def embed_known(self, known: Tensor, order: Tensor, class_embedding: Tensor) -> Tensor:
        """Encoder input (B, buffer + n, D) of known tokens (B, n, c) at positions order (B, n)."""
        x = self.z_proj(known.to(self.z_proj.weight.dtype))
        table = self.encoder_pos_embed_learned[0]
        buffer = class_embedding[:, None] + table[: self.buffer_size]
        return self.z_proj_ln(
            torch.cat([buffer, x + F.embedding(order, table[self.buffer_size :])], dim=1)
        )

    def encode(self, x: Tensor, updates: LayerUpdates | None = None) -> Tensor:
        """Encoder blocks on embedded known positions (B, n, D) -> (B, n, D)."""
        if x.shape[1] == 0:  # no buffer and nothing known yet
            return x
        return self.encoder_norm(self._run(self.encoder_blocks, x, updates))

    def embed_decoder(self, encoded: Tensor, order: Tensor) -> Tensor:
        """Decoder input (B, buffer + L, D): encoded (B, buffer + n, D'), mask tokens behind it.

        order (B, L): the positions of all tokens, the n known ones first.
        """
        x = self.decoder_embed(encoded)
        masked = self.buffer_size + order.shape[1] - x.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], masked, -1)
        table = self.decoder_pos_embed_learned[0]
        buffer = table[: self.buffer_size].expand(x.shape[0], -1, -1)
        positions = F.embedding(order, table[self.buffer_size :])
        return torch.cat([x, mask_tokens], dim=1) + torch.cat([buffer, positions], dim=1)

    def decode(
        self, x: Tensor, rows: slice | None = None, updates: LayerUpdates | None = None
    ) -> Tensor:
        """Decoder blocks (B, buffer + L, D) -> (B, rows, D), before decoder_norm.

        The last block computes only `rows` (counted from the buffer's first position).
        """
        return self._run(self.decoder_blocks, x, updates, rows)

    def to_condition(self, x: Tensor, order: Tensor) -> Tensor:
        """Decoder outputs (B, n, D) of tokens at positions order (B, n) -> z (B, n, D)."""
        return self.decoder_norm(x) + F.embedding(order, self.diffusion_pos_embed_learned[0])

    def _run(
        self,
        blocks: nn.ModuleList,
        x: Tensor,
        updates: LayerUpdates | None = None,
        rows: slice | None = None,
    ) -> Tensor:
        for i, block in enumerate(blocks):
            update = updates[i] if updates is not None else None
            block_rows = rows if i == len(blocks) - 1 else None
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, update, block_rows, use_reentrant=False)
            else:
                x = block(x, update, block_rows)
        return x

    def predict(self, known: Tensor, order: Tensor, stop: int, class_embedding: Tensor) -> Tensor:
        """z (B, stop - n, D) of ranks n..stop, given the known tokens (B, n, c).

        order (B, L) is the decoding order; class_embedding (B, D).
        """
        n = known.shape[1]
        encoded = self.encode(self.embed_known(known, order[:, :n], class_embedding))
        x = self.embed_decoder(encoded, order)
        x = self.decode(x, rows=slice(self.buffer_size + n, self.buffer_size + stop))
        return self.to_condition(x, order[:, n:stop])

    # ---- the original's calls, in raster order ----------------------------------------------------

    def forward_mae_encoder(self, x: Tensor, mask: Tensor, class_embedding: Tensor) -> Tensor:
        """Tokens (B, L, c), mask (B, L) with 1 = masked -> (B, buffer + known, D), raster order."""
        order, known = _order_of_mask(mask)
        tokens = x.gather(1, order[:, :known, None].expand(-1, -1, x.shape[2]))
        return self.encode(self.embed_known(tokens, order[:, :known], class_embedding))

    def forward_mae_decoder(self, x: Tensor, mask: Tensor) -> Tensor:
        """Encoder output (B, buffer + known, D), mask (B, L) -> z (B, L, D), raster order."""
        order, _ = _order_of_mask(mask)
        x = self.decode(self.embed_decoder(x, order))
        z = self.to_condition(x[:, self.buffer_size :], order)
        return z.gather(1, order.argsort(1)[:, :, None].expand_as(z))

    # ---- training -------------------------------------------------------------------------------

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Latents (B, C, H, W), labels (B,) int64 -> the scalar diffusion loss on masked tokens."""
        tokens = self.patchify(latents)  # (B, L, c)
        bsz, length = tokens.shape[:2]
        if length != self.seq_len:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} make {length} tokens; this model has "
                f"{self.seq_len} (img_size / vae_stride / patch_size)"
            )
        order = torch.rand(bsz, length, device=tokens.device).argsort(dim=1)
        ratio = float(self.mask_ratio.ppf(torch.rand((), dtype=torch.float64).item()))
        known = length - min(length, max(1, -int(-length * ratio // 1)))  # L - ceil(L * ratio)

        stop = known + max(1, round((length - known) * self.masked_keep))  # ranks decoded

        embedding = self.class_embedding(labels, bsz)
        dropped = torch.rand(bsz, 1, device=tokens.device) < self.label_drop_prob
        embedding = torch.where(dropped, self.fake_latent, embedding)

        order = order[:, :stop]
        tokens = tokens.gather(1, order[:, :, None].expand(-1, -1, self.token_dim))
        z = self.predict(tokens[:, :known], order, stop, embedding)
        target, z = tokens[:, known:].flatten(0, 1), z.flatten(0, 1)  # (B * masked, .)
        mul = self.diffusion_batch_mul
        loss = self.diffloss(target.repeat(mul, 1), z.repeat(mul, 1))
        if self.aux_weight:
            read_out = F.linear(z, self.z_proj.weight.t())  # (B * masked, c)
            loss = loss + self.aux_weight * F.mse_loss(read_out.float(), target)
        return loss

    # ---- sampling -------------------------------------------------------------------------------

    def image_noise(self, seeds: Sequence[int]) -> ImageNoise:
        """The noise of one image per seed, shaped for this model and on its device."""
        steps = self.diffloss.num_sampling_steps
        return ImageNoise.from_seeds(
            seeds, self.seq_len, steps, self.token_dim, self.fake_latent.device
        )

    @torch.no_grad()
    def sample_tokens(
        self,
        bsz: int,
        num_iter: int = 64,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        labels: Tensor | Sequence[int] | None = None,
        temperature: float = 1.0,
        progress: bool = False,
        *,
        lazy_mar: LazyMARConfig | bool | None = None,
        noise: ImageNoise | None = None,
    ) -> Tensor:
        """Generate latents (bsz, C, H, W) of labels (bsz,), or of no class (None).

        num_iter steps; guidance cfg by cfg_schedule "linear" or "constant"; temperature scales the
        noise of the head. lazy_mar: None or False plain, True LazyMAR's defaults, or a
        LazyMARConfig. noise: the images' own randomness (None: seeds from torch's generator).
        Raises ValueError for arguments that do not fit.
        """
        plan = DecodingPlan.create(self.seq_len, num_iter, cfg, cfg_schedule)
        self.check_labels(labels)
        if noise is None:
            noise = self.image_noise(torch.randint(0, 2**32, (bsz,)).tolist())
        noise.check(bsz, self.seq_len, self.diffloss.num_sampling_steps, self.token_dim)

        order = noise.orders.flip(1)  # decoding order: the front of `orders` comes last
        embedding = self.class_embedding(labels, bsz)
        if cfg != 1.0:  # conditional rows, then unconditional ones
            embedding = torch.cat([embedding, self.class_embedding(None, bsz)])
        config = LazyMARConfig.of(lazy_mar)
        if config is None:
            predictor, denoiser = (
                PlainPredictor(self, order, embedding),
                PlainDenoiser(self.diffloss),
            )
        else:
            predictor = LazyPredictor(self, order, embedding, plan, config)
            denoiser = LazyDenoiser.of(self.diffloss, config)

        tokens = torch.zeros(bsz, self.seq_len, self.token_dim, device=order.device)
        for step in tqdm(plan.steps, disable=not progress, leave=False):
            z = predictor(step, tokens)  # (branches * B, n, D)
            now = order[:, step.start : step.stop, None, None].expand(-1, -1, *noise.head.shape[2:])
            step_noise = noise.head.gather(1, now).flatten(0, 1)  # (B * n, T+1, c)
            if step.cfg == 1.0:
                z = z[:bsz]
            sampled = denoiser(z.flatten(0, 1), step_noise, step.cfg, temperature)
            tokens[:, step.start : step.stop] = sampled.unflatten(0, (bsz, -1))
        in_raster = torch.empty_like(tokens)
        in_raster.scatter_(1, order[:, :, None].expand_as(tokens), tokens)
        return self.unpatchify(in_raster)


class PlainPredictor:
    """z of each decoding step, computed in full; born with one call of sample_tokens."""

    def __init__(self, model: MAR, order: Tensor, embedding: Tensor) -> None:
        """order (B, L) decoding order; embedding (B, D), or (2B, D) with guidance."""
        self.model = model
        self.branches = embedding.shape[0] // order.shape[0]
        self.order = order.repeat(self.branches, 1)
        self.embedding = embedding

    def __call__(self, step: DecodingStep, tokens: Tensor) -> Tensor:
        """Tokens (B, L, c), known up to step.start -> z (branches * B, stop - start, D)."""
        known = tokens[:, : step.start].repeat(self.branches, 1, 1)
        return self.model.predict(known, self.order, step.stop, self.embedding)


def _sincos(grid_size: int, dim: int, max_period: float = 100.0) -> Tensor:
    """(grid_size^2, dim): sines and cosines of row and column, periods from 2 pi to 200 pi."""
    frequencies = max_period ** (-torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(grid_size)[:, None] * frequencies  # (g, dim/4)
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (g, dim/2)
    rows = one_axis[:, None].expand(-1, grid_size, -1)
    columns = one_axis[None].expand(grid_size, -1, -1)
    table = torch.cat([rows, columns], dim=2).flatten(0, 1)
    return F.pad(table, (0, dim - table.shape[1]))


def _order_of_mask(mask: Tensor) -> tuple[Tensor, int]:
    """mask (B, L), 1 = masked, the same count per row -> (positions, known ones first; their count)."""
    counts = mask.bool().logical_not().sum(dim=1)
    if bool((counts != counts[0]).any()):
        raise ValueError(f"rows of the mask keep different counts: {counts.tolist()}")
    return mask.bool().int().argsort(dim=1, stable=True), int(counts[0])


def mar_base(**kwargs: Any) -> MAR:
    """MAR-B: 207.9M parameters with diffloss_d=6, diffloss_w=1024."""
    return MAR(**_widths(768, 12, 12), **kwargs)


def mar_large(**kwargs: Any) -> MAR:
    """MAR-L: 478.3M parameters with diffloss_d=8, diffloss_w=1280."""
    return MAR(**_widths(1024, 16, 16), **kwargs)


def mar_huge(**kwargs: Any) -> MAR:
    """MAR-H: 942.4M parameters with diffloss_d=12, diffloss_w=1536."""
    return MAR(**_widths(1280, 20, 16), **kwargs)


def mar_tiny(**kwargs: Any) -> MAR:
    """The bundled model of 64x64 shapes: its geometry is PRESETS["mar_tiny"], unless overridden."""
    preset = PRESETS["mar_tiny"]
    geometry = {
        "img_size": preset.img_size,
        "vae_stride": preset.vae_stride,
        "vae_embed_dim": preset.vae_embed_dim,
        "patch_size": preset.patch_size,
        "class_num": preset.class_num,
        "buffer_size": preset.buffer_size,
        "diffloss_d": preset.diffloss_d,
        "diffloss_w": preset.diffloss_w,
        "num_sampling_steps": preset.num_sampling_steps,
    }
    return MAR(**{**_widths(96, 5, 3), "encoder_depth": 3, **geometry, **kwargs})


def _widths(dim: int, depth: int, heads: int) -> dict[str, int]:
    """Encoder and decoder of the same width, depth and heads (MAR, table 6 of its appendix)."""
    return {
        "encoder_embed_dim": dim,
        "encoder_depth": depth,
        "encoder_num_heads": heads,
        "decoder_embed_dim": dim,
        "decoder_depth": depth,
        "decoder_num_heads": heads,
    }
