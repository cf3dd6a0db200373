"""MAR's training step, written plainly: the baseline of benchmarks/training.py.

Tokens in raster order with masks, every decoder row, the head on all tokens with a weight of zero
for the known ones, PyTorch's default attention and AdamW, an average updated tensor by tensor. The
arithmetic of the loss is that of MAR's paper and code; blocks and diffusion tables are ours.
"""

import torch
from torch import Tensor, nn

from models.mar import MAR
from util.device import autocast
from util.training.optimizer import parameter_groups


def masked_loss(
    model: MAR,
    latents: Tensor,
    labels: Tensor,
    dropped: Tensor,
    mask: Tensor,
    t: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """The loss of latents (B, C, H, W) with mask (B, L), 1 where a token is to be decoded.

    dropped (B,) bool: trained without label. t (m * B * L,) and noise (m * B * L, c) of all tokens,
    drawn if None.
    """
    repeats = model.config.diffusion_batch_mul
    tokens = model.patchify(latents)
    embedding = model.class_embedding(labels, len(labels))
    embedding = torch.where(dropped[:, None], model.fake_latent, embedding)
    encoded = model.forward_mae_encoder(tokens, mask, embedding)
    z = model.forward_mae_decoder(encoded, mask)
    target = tokens.flatten(0, 1).repeat(repeats, 1)
    weights = mask.flatten().repeat(repeats)
    return model.diffloss(target, z.flatten(0, 1).repeat(repeats, 1), weights, t, noise)


class EagerTraining:
    """The model, its optimizer and its averages; `step` trains on one batch."""

    def __init__(self, model: MAR, lr: float, dtype: torch.dtype) -> None:
        self.model, self.dtype = model.train(), dtype
        groups = parameter_groups(model, weight_decay=0.02)
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
        self.averages = [p.detach().clone() for p in model.parameters()]

    def step(self, latents: Tensor, labels: Tensor, masked: int) -> Tensor:
        """One step on latents (B, C, H, W), labels (B,), `masked` tokens each; returns the loss."""
        model, (bsz, device) = self.model, (len(labels), latents.device)
        order = torch.rand(bsz, model.seq_len, device=device).argsort(dim=1)
        mask = torch.zeros(bsz, model.seq_len, device=device)
        mask.scatter_(1, order[:, :masked], 1.0)
        dropped = torch.rand(bsz, device=device) < model.config.label_drop_prob
        with autocast(device, self.dtype):
            loss = masked_loss(model, latents, labels, dropped, mask)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, parameter in zip(self.averages, model.parameters(), strict=True):
                average.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
        return loss.detach()
