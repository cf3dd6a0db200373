"""MaskedTransformer: MAR's encoder and decoder, from known tokens to a condition z per unknown one.

An MAE-style encoder reads the tokens that are known, a decoder writes z for those that are not.
Sequences are kept in *decoding order* (known tokens first), behind `buffer_size` positions that
hold the class embedding.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import LAYER_NORM_EPS, Block, KVUpdate, ModuleList
from models.mar_config import MARConfig

LayerUpdates = Sequence[KVUpdate | None]


class MaskedTransformer(nn.Module):
    """Embeddings, encoder and decoder of a MARConfig.

    Without a buffer (buffer_size 0), z does not depend on the class.
    """

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_size = config.patch_size
        self.vae_embed_dim = config.vae_embed_dim
        self.grid_size = self.seq_h = self.seq_w = config.grid_size
        self.seq_len = self.grid_size**2
        self.token_dim = self.token_embed_dim = config.token_dim
        self.buffer_size = config.buffer_size
        self.class_num = config.class_num
        self.grad_checkpointing = config.grad_checkpointing
        encoder_width, decoder_width = config.encoder_embed_dim, config.decoder_embed_dim

        length = self.buffer_size + self.seq_len
        self.fake_latent = nn.Parameter(torch.zeros(1, encoder_width))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, encoder_width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, decoder_width))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.seq_len, decoder_width))
        self.class_emb = nn.Embedding(self.class_num, encoder_width)

        block = partial(
            Block,
            mlp_ratio=config.mlp_ratio,
            attn_drop=config.attn_dropout,
            proj_drop=config.proj_dropout,
            mlp_drop=0.0 if config.no_dropout_in_mlp else config.proj_dropout,
        )
        self.z_proj = nn.Linear(self.token_dim, encoder_width)
        self.z_proj_ln = nn.LayerNorm(encoder_width, eps=LAYER_NORM_EPS)
        self.encoder_blocks: ModuleList[Block] = ModuleList(
            block(encoder_width, config.encoder_num_heads) for _ in range(config.encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(encoder_width, eps=LAYER_NORM_EPS)
        self.decoder_embed = nn.Linear(encoder_width, decoder_width)
        self.decoder_blocks: ModuleList[Block] = ModuleList(
            block(decoder_width, config.decoder_num_heads) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=LAYER_NORM_EPS)
        self._initialize(config.pos_init)

    def _initialize(self, pos_init: str) -> None:
        """Embeddings and position tables normal 0.02; Linear xavier uniform, bias zero."""
        for name, parameter in self.named_parameters():
            if "." not in name or name.startswith("class_emb"):
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if pos_init == "sincos":
            # Smaller than the embeddings to which they are added.
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
        """(B, D) embeddings of labels (B,), or of no class (None)."""
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
            if label != int(label) or not 0 <= label < self.class_num:
                raise ValueError(f"label {label} is not one of 0..{self.class_num - 1}")

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

    def embed_decoder(self, encoded: Tensor, order: Tensor, buffer: bool = True) -> Tensor:
        """Decoder input (B, buffer + L, D): encoded (B, buffer + n, D'), mask tokens behind it.

        order (B, L): the positions of all tokens, the n known ones first. buffer False: without it.
        """
        x = self.decoder_embed(encoded)
        size = self.buffer_size if buffer else 0
        missing = size + order.shape[1] - x.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), missing, -1)
        table = self.decoder_pos_embed_learned[0]
        first = table[:size].expand(len(x), -1, -1)
        positions = F.embedding(order, table[self.buffer_size :])
        return torch.cat([x, mask_tokens], dim=1) + torch.cat([first, positions], dim=1)

    def decode(
        self, x: Tensor, query_slice: slice | None = None, updates: LayerUpdates | None = None
    ) -> Tensor:
        """Decoder blocks (B, buffer + L, D) -> (B, len(query_slice), D), before decoder_norm.

        The last block computes only `query_slice` (counted from the buffer's first position).
        """
        return self._run(self.decoder_blocks, x, updates, query_slice)

    def to_condition(self, x: Tensor, order: Tensor) -> Tensor:
        """Decoder outputs (B, n, D) of tokens at positions order (B, n) -> z (B, n, D)."""
        return self.decoder_norm(x) + F.embedding(order, self.diffusion_pos_embed_learned[0])

    def _run(
        self,
        blocks: "ModuleList[Block]",
        x: Tensor,
        updates: LayerUpdates | None = None,
        query_slice: slice | None = None,
    ) -> Tensor:
        for i, block in enumerate(blocks):
            update = updates[i] if updates is not None else None
            block_slice = query_slice if i == len(blocks) - 1 else None
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, update, block_slice, use_reentrant=False)
            else:
                x = block(x, update, block_slice)
        return x

    def predict(self, known: Tensor, order: Tensor, stop: int, class_embedding: Tensor) -> Tensor:
        """z (B, stop - n, D) of the tokens order[:, n:stop], given the known tokens (B, n, c).

        order (B, L) is the decoding order; class_embedding (B, D).
        """
        n = known.shape[1]
        encoded = self.encode(self.embed_known(known, order[:, :n], class_embedding))
        x = self.embed_decoder(encoded, order)
        x = self.decode(x, slice(self.buffer_size + n, self.buffer_size + stop))
        return self.to_condition(x, order[:, n:stop])

    # ---- the original's calls, in raster order -------------------------------------------------

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
