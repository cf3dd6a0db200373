"""MARConfig: the geometry of a MAR and how it is trained, written once.

Field names and defaults are those of the original's constructor. Fields made by `setting` are also
command-line flags.
"""

from dataclasses import dataclass

from diffusion import DIFFUSION_STEPS
from diffusion.schedule import space_timesteps
from util.config import setting


@dataclass(frozen=True)
class MARConfig:
    """Arguments of `models.mar.MAR`. Raises ValueError for a geometry that does not work.

    L = (img_size / vae_stride / patch_size)^2 tokens of vae_embed_dim * patch_size^2 channels.
    no_dropout_in_mlp is l-DeTok's. Three fields are ours, for short trainings of small models; their
    defaults change nothing:
    masked_keep: share of the masked tokens that a training step decodes (CrossMAE, Fu et al. 2024).
    pos_init: "sincos" starts the position tables as 2-D sines (MAE, He et al. 2022).
    aux_weight: weight of a squared error between the token and z, read out through the transposed
        z_proj, so that context is learned before the head uses it.
    """

    img_size: int = setting(256, "height and width of the images, pixels", least=1)
    vae_stride: int = setting(16, "pixels per latent and side", least=1)
    patch_size: int = setting(1, "latents per token and side", least=1)
    encoder_embed_dim: int = 1024
    encoder_depth: int = 16
    encoder_num_heads: int = 16
    decoder_embed_dim: int = 1024
    decoder_depth: int = 16
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0
    vae_embed_dim: int = setting(16, "channels of the tokenizer's latents", least=1)
    mask_ratio_min: float = setting(0.7, "smallest share of masked tokens in training")
    label_drop_prob: float = setting(0.1, "labels dropped in training (guidance)", least=0, most=1)
    class_num: int = setting(1000, "number of classes", least=1)
    attn_dropout: float = setting(0.1, "dropout of the attention", least=0, most=1)
    proj_dropout: float = setting(0.1, "dropout of the projections", least=0, most=1)
    no_dropout_in_mlp: bool = setting(False, "dropout in the attention alone, as l-DeTok's MAR")
    buffer_size: int = setting(64, "class tokens in front of the image tokens", least=0)
    diffloss_d: int = setting(3, "residual blocks of the diffusion head", least=1)
    diffloss_w: int = setting(1024, "width of the diffusion head", least=1)
    num_sampling_steps: str = setting("100", "denoising steps of the head")
    diffusion_batch_mul: int = setting(4, "noise draws per token in training", least=1)
    grad_checkpointing: bool = setting(False, "recompute activations: less memory, more time")
    masked_keep: float = setting(1.0, "share of masked tokens decoded in training")
    pos_init: str = setting("normal", "start of the position tables", choices=("normal", "sincos"))
    aux_weight: float = setting(0.0, "weight of an auxiliary regression of the tokens", least=0)

    def __post_init__(self) -> None:
        at_least_one = ("img_size", "vae_stride", "patch_size", "vae_embed_dim", "class_num")
        for name in (*at_least_one, "encoder_depth", "decoder_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.buffer_size < 0:
            raise ValueError(f"buffer_size is {self.buffer_size}; it must be at least 0")
        if self.img_size % (self.vae_stride * self.patch_size):
            raise ValueError(
                f"img_size {self.img_size} is not a multiple of vae_stride {self.vae_stride} x "
                f"patch_size {self.patch_size}"
            )
        if not 0 <= self.mask_ratio_min < 1:
            raise ValueError(f"mask_ratio_min is {self.mask_ratio_min}; it must be in [0, 1)")
        if not 0 < self.masked_keep <= 1:
            raise ValueError(f"masked_keep is {self.masked_keep}; it must be in (0, 1]")
        space_timesteps(DIFFUSION_STEPS, str(self.num_sampling_steps))  # raises if it does not fit
        if self.pos_init not in ("normal", "sincos"):
            raise ValueError(f"pos_init is {self.pos_init!r}; use normal or sincos")
        if self.aux_weight and self.encoder_embed_dim != self.decoder_embed_dim:
            raise ValueError(
                f"aux_weight needs equal widths, not {self.encoder_embed_dim} and "
                f"{self.decoder_embed_dim}"
            )

    @property
    def grid_size(self) -> int:
        """Tokens per side."""
        return self.img_size // self.vae_stride // self.patch_size

    @property
    def latent_side(self) -> int:
        """Latents per side."""
        return self.img_size // self.vae_stride

    @property
    def token_dim(self) -> int:
        """Channels of a token."""
        return self.vae_embed_dim * self.patch_size**2
