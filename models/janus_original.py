"""Janus-Pro as deepseek-ai publishes it, for transformers' model: config, names of tensors, tokenizer.

Such a folder holds config.json (model_type "multi_modality"), pytorch_model.bin or its parts, and
tokenizer.json. What draws no pictures, the vision tower and the head of the text, is left out.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from models.transformers_models import with_weights
from util.files import read_json
from util.weights import read_hub_folder

# Beginnings of the keys in deepseek-ai's files, and those of transformers.
ORIGINAL_KEYS = {
    "language_model.model.": "model.language_model.",
    "gen_embed.": "model.generation_embeddings.",
    "gen_aligner.layers.0.": "model.generation_aligner.fc1.",
    "gen_aligner.layers.2.": "model.generation_aligner.hidden_layers.0.",
    "gen_head.output_mlp_projector.": "model.generation_head.proj_out.",
    "gen_head.vision_head.": "model.generation_head.vision_head.",
    "gen_vision_model.": "model.vqmodel.",
}
TOKENIZER_KEYS = {  # inside gen_vision_model, LlamaGen's VQ-16
    "encoder.conv_blocks.": "encoder.down.",
    "decoder.conv_blocks.": "decoder.up.",
    ".res.": ".block.",
    ".mid.0.": ".mid.block_1.",
    ".mid.1.": ".mid.attn_1.",
    ".mid.2.": ".mid.block_2.",
}
NOT_DRAWING = (
    "vision_model.",
    "aligner.",
    "language_model.lm_head.",
    "gen_vision_model.quantize.codebook_used",
)
ABSENT = ("model.vision_model.", "model.aligner.", "lm_head.")

PATCH = 16  # pixels per code and side: VQ-16
VQ_CHANNELS = {"base_channels": 128, "latent_channels": 256}  # VQ-16's
TAGS = {  # of VLChatProcessor, unless processor_config.json says otherwise
    "image_tag": "<image_placeholder>",
    "image_start_tag": "<begin_of_image>",
    "image_end_tag": "<end_of_image>",
    "pad_tag": "<｜▁pad▁｜>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|User|>: {% for part in message['content'] %}{{ part['text'] }}"
    "{% endfor %}{{ '\n\n' }}{% endfor %}<|Assistant|>:"
)


def published(hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, Any]:
    """The part of a published config.json that decides the model."""
    return {
        "model_type": "multi_modality",
        "language_config": {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "intermediate_size": intermediate,
            "max_position_embeddings": 16384,
            "vocab_size": 102400,
        },
        "vision_config": {"params": {"image_size": 384}},
        "gen_vision_config": {"params": {"image_token_size": 16384, "n_embed": 8}},
    }


PUBLISHED = {  # deepseek-ai/Janus-Pro-1B and -7B
    "janus_pro_1b": published(2048, 24, 16, 5632),
    "janus_pro_7b": published(4096, 30, 32, 11008),
}


def is_original(folder: Path) -> bool:
    """Whether a folder holds a model in deepseek-ai's layout."""
    try:
        return bool(
            json.loads((folder / "config.json").read_bytes())["model_type"] == "multi_modality"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def config_of(original: Mapping[str, Any]) -> JanusConfig:
    """transformers' config of a model that draws; its vision tower is as small as can be.

    ValueError if the original lacks an entry.
    """
    try:
        text = dict(original["language_config"])
        size = original["vision_config"]["params"]["image_size"]
        codes = original["gen_vision_config"]["params"]
        numbers, channels = codes["image_token_size"], codes["n_embed"]
    except (KeyError, TypeError) as error:
        missing = error if isinstance(error, KeyError) else "entries"
        raise ValueError(
            f"config.json lacks {missing}, so it is not a deepseek-ai Janus config"
        ) from error
    for name in ("model_type", "torch_dtype", "_attn_implementation"):
        text.pop(name, None)
    language = LlamaConfig(**text)
    width = language.hidden_size
    return JanusConfig(
        text_config=language,
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "mlp_ratio": 1.0,
            "depth": 1,
            "projection_dim": width,
            "image_size": size,
            "patch_size": PATCH,
            "num_image_tokens": (size // PATCH) ** 2,
        },
        vq_config={
            "num_embeddings": numbers,
            "embed_dim": channels,
            "projection_dim": width,
            "image_token_embed_dim": width,
            **VQ_CHANNELS,
        },
        tie_word_embeddings=True,  # the head of the text is not used
    )


def from_original(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a deepseek-ai file under transformers' names, those that draw pictures.

    ValueError for a key that such a file does not have.
    """
    renamed = {}
    for key, tensor in weights.items():
        if key.startswith(NOT_DRAWING):
            continue
        start = next((old for old in ORIGINAL_KEYS if key.startswith(old)), None)
        if start is None:
            raise ValueError(f"{key} is not a key of deepseek-ai's Janus files")
        rest = key.removeprefix(start)
        if start == "gen_vision_model.":
            for old, new in TOKENIZER_KEYS.items():
                rest = rest.replace(old, new)
        renamed[ORIGINAL_KEYS[start] + rest] = tensor
    return renamed


def open_original(folder: Path) -> tuple[JanusForConditionalGeneration, JanusProcessor]:
    """Model, float32, and processor of a folder in deepseek-ai's layout.

    UserError or ValueError for files that are missing, damaged or do not fit each other.
    """
    remedy = "download it again"
    config = config_of(read_json(folder / "config.json", dict, remedy))
    tags, settings = dict(TAGS), folder / "processor_config.json"
    if settings.is_file():
        found = read_json(settings, dict, remedy)
        tags |= {name: found[name] for name in TAGS if name in found}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        folder,
        pad_token=tags["pad_tag"],
        extra_special_tokens={
            "image_token": tags["image_tag"],
            "boi_token": tags["image_start_tag"],
            "eoi_token": tags["image_end_tag"],
        },
    )
    weights = from_original(read_hub_folder(folder))
    model: Any = with_weights(JanusForConditionalGeneration, config, weights, ABSENT)
    begin = tokenizer.convert_tokens_to_ids(tags["image_start_tag"])
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generation_kwargs={"boi_token_id": begin},
    )
    processor = JanusProcessor(
        JanusImageProcessor(),
        tokenizer,
        chat_template=CHAT_TEMPLATE,
        num_image_tokens=model.config.vision_config.num_image_tokens,
    )
    return model, processor
