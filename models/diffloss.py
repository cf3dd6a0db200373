"""DiffLoss: the diffusion head that models p(token | z) of one continuous token (MAR, section 3).

A small MLP with adaLN modulation predicts the noise of a token given the decoder's output z.
"""

import torch
from torch import Tensor, nn

from diffusion import create_diffusion
from models.adaln_mlp import SimpleMLPAdaLN
from models.denoiser import PlainDenoiser
from models.head_config import DenoisingRun


class DiffLoss(nn.Module):
    """Loss and sampler of tokens (n, target_channels) given z (n, z_channels).

    depth and width are the flags diffloss_d and diffloss_w; num_sampling_steps respaces the
    1000 training steps for sampling ("100", "ddim50"; see diffusion.schedule.space_timesteps).
    """

    def __init__(
        self,
        target_channels: int,
        z_channels: int,
        depth: int,
        width: int,
        num_sampling_steps: str,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = target_channels
        self.net = SimpleMLPAdaLN(
            target_channels, width, 2 * target_channels, z_channels, depth, grad_checkpointing
        )
        self.train_diffusion = create_diffusion("")
        self.gen_diffusion = create_diffusion(num_sampling_steps)

    @property
    def num_sampling_steps(self) -> int:
        """Denoising steps per token."""
        return self.gen_diffusion.num_timesteps

    def forward(
        self,
        target: Tensor,
        z: Tensor,
        mask: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Mean loss of target (n, C) given z (n, D), weighted by mask (n,) if there is one.

        Timesteps t (n,) int64 and noise (n, C) are drawn from torch's generator if None.
        """
        if t is None:
            steps = self.train_diffusion.num_timesteps
            t = torch.randint(0, steps, (target.shape[0],), device=target.device)
        loss = self.train_diffusion.training_losses(self.net, target, t, {"c": z}, noise)["loss"]
        if mask is None:
            return loss.mean()
        return (loss * mask).sum() / mask.sum()

    def sample(
        self, z: Tensor, temperature: float = 1.0, cfg: float = 1.0, noise: Tensor | None = None
    ) -> Tensor:
        """Tokens (n, C) for z (n, D); with cfg != 1, z is (2n, D): conditional rows, then unconditional.

        noise (n, T+1, C) as in ImageNoise.head, drawn from torch's generator if None.
        """
        rows = z.shape[0] if cfg == 1.0 else z.shape[0] // 2
        if noise is None:
            shape = (rows, self.num_sampling_steps + 1, self.in_channels)
            noise = torch.randn(shape, device=z.device)
        run = DenoisingRun(self.gen_diffusion, (True,) * self.num_sampling_steps)
        return PlainDenoiser(self.net, [run])(z, noise, cfg, temperature)
