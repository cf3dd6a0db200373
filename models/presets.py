"""What a model's name implies: geometry, tokenizer, head, guidance and files, unless a flag says otherwise.

`eval.py --model mar_tiny` and `models.mar.mar_tiny()` both read this table.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelPreset:
    """Geometry and files of one named model; fields that its family does not have are ignored.

    `latent_scale` multiplies the tokenizer's latents for the model (and divides them for decoding);
    None means that the tokenizer's own file states it.
    """

    family: str = "mar"  # mar (models.mar) or gpt (models.llamagen)
    img_size: int = 256
    image_size_eval: int | None = None  # pixels of saved pictures; None: img_size
    vae_stride: int = 16
    vae_embed_dim: int = 16
    patch_size: int = 1
    class_num: int = 1000
    buffer_size: int = 64
    diffloss_d: int = 12
    diffloss_w: int = 1536
    num_sampling_steps: str = "100"
    cfg: float = 3.25  # LazyMAR's eval.py
    tokenizer: str = (
        "kl16"  # kl16 (AutoencoderKL), linear (LinearTokenizer), vq16 or vq_tiny (VQModel)
    )
    vae_path: str = "pretrained_models/vae/kl16.ckpt"
    latent_scale: float | None = 0.2325  # MAR's code: scale of the KL-16 latents
    head_interval: int = 7  # LazyMAR's, published for heads of 6 to 12 blocks
    top_p: float = 1.0  # LlamaGen's FID runs
    line_recent: int = 2  # LineAR's recent lines
    resume: str = ""
    features: str = "inception-v3-compat"  # the feature extractor of FID and IS
    features_path: str | None = None  # None: where torch-fidelity keeps its own weights
    fid_stats: str = "fid_stats/adm_in256_stats.npz"


_TINY = "pretrained_models/mar_tiny"
_GPT_TINY = "pretrained_models/gpt_tiny"
_LLAMAGEN = "pretrained_models/llamagen"


def _llamagen(name: str, cfg: float) -> ModelPreset:
    """A published 384-pixel model; cfg of LlamaGen's best FID (its repository's table)."""
    return ModelPreset(
        family="gpt",
        img_size=384,
        image_size_eval=256,
        cfg=cfg,
        tokenizer="vq16",
        vae_path=f"{_LLAMAGEN}/vq_ds16_c2i.pt",
        resume=f"{_LLAMAGEN}/c2i_{name}_384.pt",
    )


PRESETS: dict[str, ModelPreset] = {
    "mar_base": ModelPreset(diffloss_d=6, diffloss_w=1024, resume="pretrained_models/mar/mar_base"),
    "mar_large": ModelPreset(
        diffloss_d=8, diffloss_w=1280, resume="pretrained_models/mar/mar_large"
    ),
    "mar_huge": ModelPreset(resume="pretrained_models/mar/mar_huge"),
    "mar_tiny": ModelPreset(
        img_size=64,
        vae_stride=4,
        vae_embed_dim=8,
        class_num=10,
        buffer_size=8,
        diffloss_d=4,
        diffloss_w=160,
        num_sampling_steps="ddim100",  # starts at t=990: a small head is not accurate at t=999
        cfg=3.0,
        head_interval=3,  # a head of 4 blocks changes faster from step to step: at 7 noise remains
        tokenizer="linear",
        vae_path=f"{_TINY}/tokenizer.safetensors",
        latent_scale=None,
        resume=f"{_TINY}/model.safetensors",
        features="shapes",
        features_path=f"{_TINY}/classifier.safetensors",
        fid_stats=f"{_TINY}/fid_stats.npz",
    ),
    "gpt_b": _llamagen("B", 2.0),
    "gpt_l": _llamagen("L", 2.0),
    "gpt_xl": _llamagen("XL", 1.75),
    "gpt_xxl": _llamagen("XXL", 1.75),
    "gpt_3b": _llamagen("3B", 1.65),
    "gpt_tiny": ModelPreset(
        family="gpt",
        img_size=64,
        vae_stride=4,
        class_num=10,
        cfg=1.5,
        top_p=0.95,  # an hour's training leaves unlikely codes too likely
        line_recent=1,  # of 16 lines, few are kept: benchmarks/results/line_ablation.md
        tokenizer="vq_tiny",
        vae_path=f"{_GPT_TINY}/tokenizer.safetensors",
        resume=f"{_GPT_TINY}/model.safetensors",
        features="shapes",
        features_path=f"{_TINY}/classifier.safetensors",
        fid_stats=f"{_TINY}/fid_stats.npz",
    ),
}
