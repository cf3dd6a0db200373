"""MAR's sampling, written plainly: the baseline of benchmarks/waterfall.py.

Tokens in raster order with masks, indices looked up at every step, both branches in full, the head
called step by step with the whole of z. The arithmetic is that of MAR's paper and code; blocks,
attention (scaled_dot_product_attention) and diffusion tables are ours.
"""

import torch
from torch import Tensor

from models.denoiser import guide
from models.mar import MAR
from models.noise import ImageNoise
from models.plan import DecodingPlan


class EagerDenoiser:
    """The head's network at each denoising step, called as a user of the module would."""

    def __init__(self, model: MAR) -> None:
        self.net, self.diffusion = model.diffloss.net, model.diffloss.gen_diffusion

    def __call__(self, z: Tensor, noise: Tensor, cfg: float | Tensor, temperature: float) -> Tensor:
        """As models.denoiser.PlainDenoiser."""
        timesteps = self.diffusion.timestep_map

        def model(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            t = torch.full((len(z),), timesteps[i], device=z.device)
            both = x.repeat(len(z) // len(x), 1)
            return guide(self.net(both, t, z).float(), len(x), cfg)[:2]

        return self.diffusion.sample(model, noise, temperature)


@torch.no_grad()
def sample_tokens(model: MAR, plan: DecodingPlan, labels: list[int], noise: ImageNoise) -> Tensor:
    """Latents (B, C, H, W) of labels (B,) with guidance; on the device of the model."""
    bsz, device = len(labels), noise.orders.device
    denoiser = EagerDenoiser(model)
    embedding = torch.cat([model.class_embedding(labels, bsz), model.class_embedding(None, bsz)])
    order_index = noise.orders.flip(1).argsort(dim=1)  # (B, L), of each token
    tokens = torch.zeros(bsz, model.seq_len, model.token_dim, device=device)
    for step in plan.steps:
        mask = (order_index >= step.start).float().repeat(2, 1)
        encoded = model.forward_mae_encoder(tokens.repeat(2, 1, 1), mask, embedding)
        z = model.forward_mae_decoder(encoded, mask)
        now = (order_index >= step.start) & (order_index < step.stop)
        sampled = denoiser(z[now.repeat(2, 1)], noise.head[now], step.cfg, 1.0)
        tokens[now] = sampled
    return model.unpatchify(tokens)
