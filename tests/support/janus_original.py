"""A tiny Janus in the layout that deepseek-ai publishes, written down module by module."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.vq import VQModel
from tests.support.transformers_data import BOI, BOS, EOS, PAD, sharpen, tiny_processor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from models import janus_original  # noqa: E402

CONFIG = {
    "model_type": "multi_modality",
    "language_config": {
        "model_type": "llama", "torch_dtype": "bfloat16", "_attn_implementation": "flash_attention_2",
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32,
    },
    "vision_config": {"cls": "CLIPVisionTower", "params": {"image_size": 128}},
    "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 64, "n_embed": 8}},
}  # fmt: skip
SMALL = {"base_channels": 32, "latent_channels": 32}  # of the tokenizer


def tiny_vq() -> VQModel:
    torch.manual_seed(5)
    return VQModel(64, 8, ch=32, z_channels=32).eval().requires_grad_(False)


def source_model(seed: int = 0):
    """The model of CONFIG in transformers' own class, with a tokenizer of other weights."""
    model = transformers.JanusForConditionalGeneration(janus_original.config_of(CONFIG))
    model = model.eval().requires_grad_(False)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        generation_kwargs={"boi_token_id": BOI},
    )  # fmt: skip
    sharpen(model, seed)
    return model


def original_weights(model, vq: VQModel) -> dict[str, Tensor]:
    """What deepseek-ai's file of this model would hold: its head of the text is not the embedding."""
    inner = model.model
    parts = {
        "language_model.model": inner.language_model,
        "gen_embed": inner.generation_embeddings,
        "gen_aligner.layers.0": inner.generation_aligner.fc1,
        "gen_aligner.layers.2": inner.generation_aligner.hidden_layers[0],
        "gen_head.output_mlp_projector": inner.generation_head.proj_out,
        "gen_head.vision_head": inner.generation_head.vision_head,
        "gen_vision_model": vq,
    }
    weights = {
        f"{name}.{key}": tensor
        for name, part in parts.items()
        for key, tensor in part.state_dict().items()
    }
    unused = ("vision_model.vision_tower.norm.weight", "aligner.layers.0.bias")
    weights |= {key: torch.zeros(3) for key in unused}
    return weights | {"language_model.lm_head.weight": torch.zeros(32, 64)}


def write_original(folder: Path, weights: dict[str, Tensor], parts: int = 1) -> Path:
    """config.json, the tokenizer's files, and pytorch_model.bin in one or more parts."""
    folder.mkdir()
    tiny_processor().tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tags = {"processor_class": "VLChatProcessor", "pad_tag": "<pad>"}
    (folder / "processor_config.json").write_text(json.dumps(tags))
    if parts == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    names = {}
    for i in range(parts):
        name, keys = f"pytorch_model-{i}.bin", list(weights)[i::parts]
        torch.save({key: weights[key] for key in keys}, folder / name)
        names |= dict.fromkeys(keys, name)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    return folder
