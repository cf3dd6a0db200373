"""Trains janus_tiny, the bundled text-to-image model: a JanusForConditionalGeneration on captioned shapes.

    python -m util.tiny.janus --output_dir output_dir/janus_tiny/model \
        --tokenizer output_dir/janus_tiny/tokenizer/tokenizer.safetensors

It writes model and processor as save_pretrained does, in half precision. Its prompts are captions of
util.tiny.captions. Text, VQ and image generation are used; the vision tower, which transformers asks
for, is minimal and not trained. The same command resumes.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from util.errors import UserError, run_main
from util.images import contact_sheet, save_png, to_bytes
from util.shapes import HELD_OUT_START, IMAGE_SIZE
from util.tiny import janus_vq
from util.tiny.captions import WORDS, caption_of
from util.tiny.gpt import fit, load_codes
from util.tiny.prompt_classifier import CLASSIFIER, FOLDER, PromptClassifier, prompt_agreement
from util.tiny.vq import load_tokenizer

GRID = 16  # codes per line, and lines
WIDTH = 128
LAYERS = 6
HEADS = 4
PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
BOI, EOI, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
SPECIAL_TOKENS = (PAD, BOS, EOS, BOI, EOI, IMAGE, UNKNOWN)
VOCABULARY = {word: k for k, word in enumerate((*SPECIAL_TOKENS, *WORDS))}
CHAT_TEMPLATE = (  # the words of the user alone: no turn markers, which this model never saw
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}"
)
GUIDANCE = 1.5  # of the saved generation config

PICTURES = 40_000
STEPS = 8000
BATCH = 16  # pictures
PROMPT_DROP = 0.1  # LlamaGen, train_t2i.py: class_dropout_prob
TEST_PICTURES = 100  # drawn at the end from held-out captions


def make_processor() -> JanusProcessor:
    """A tokenizer with one token per word of the grammar, and the image processor of 64x64 pixels."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(  # as captions.parse reads a caption
        [normalizers.Lowercase(), normalizers.Replace(".", "")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, VOCABULARY[BOS])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE, "boi_token": BOI, "eoi_token": EOI},
    )
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = JanusImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return JanusProcessor(images, fast, chat_template=CHAT_TEMPLATE, num_image_tokens=GRID * GRID)


def make_model() -> JanusForConditionalGeneration:
    """The untrained model, float32, with random weights."""
    names = {"pad": PAD, "bos": BOS, "eos": EOS}
    special: dict[str, Any] = {f"{k}_token_id": VOCABULARY[word] for k, word in names.items()}
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=2 * GRID * GRID,
            initializer_range=0.05,
            **special,
        ),
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": IMAGE_SIZE // GRID,
            "mlp_ratio": 1.0,
            "projection_dim": WIDTH,
            "depth": 1,
            "num_image_tokens": GRID * GRID,
        },
        vq_config={
            "embed_dim": janus_vq.CODE_CHANNELS,
            "num_embeddings": janus_vq.CODES,
            "latent_channels": janus_vq.LATENT_CHANNELS,
            "base_channels": janus_vq.BASE_CHANNELS,
            "channel_multiplier": list(janus_vq.CHANNEL_MULTIPLIER),
            "num_res_blocks": janus_vq.RES_BLOCKS,
            "projection_dim": WIDTH,
            "image_token_embed_dim": WIDTH,
        },
        image_token_id=VOCABULARY[IMAGE],
        **special,
    )
    model = JanusForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        guidance_scale=GUIDANCE,
        top_k=0,
        generation_kwargs={"boi_token_id": VOCABULARY[BOI]},
        **special,
    )
    return model


def start(tokenizer_path: Path) -> JanusForConditionalGeneration:
    """The model before training: the trained tokenizer inside, and the parts to train ready.

    Image embeddings start as the codes themselves, at unit variance, and the small networks around
    them at PyTorch's defaults. At the scale of the library's (0.02) codes are lost in the first norm:
    after 40 steps of a trial the loss was 4.85 nats, and 4.45 with this start.
    """
    torch.manual_seed(0)
    model = make_model().requires_grad_(False)
    inner = model.model
    tokenizer = load_tokenizer(tokenizer_path, janus_vq.janus_vq)
    inner.vqmodel.load_state_dict(janus_vq.janus_weights(tokenizer.state_dict()))
    codes = inner.vqmodel.quantize.embedding.weight
    inner.generation_embeddings.weight.copy_(codes * janus_vq.CODE_CHANNELS**0.5)
    small = [inner.generation_aligner, inner.generation_head]
    for module in nn.ModuleList(small).modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    for part in (inner.language_model, inner.generation_embeddings, *small):
        part.requires_grad_(True)
    return model


def drop_prompts(ids: Tensor, dropped: Tensor) -> Tensor:
    """Prompts (B, P) with all but begin tokens padded where dropped (B,), as `generate` does it."""
    kept = (ids == VOCABULARY[BOS]) | (ids == VOCABULARY[BOI])
    return ids.masked_fill(dropped[:, None] & ~kept, VOCABULARY[PAD])


def loss_of(
    model: JanusForConditionalGeneration, ids: Tensor, mask: Tensor, codes: Tensor
) -> Tensor:
    """Mean cross entropy, nats per token; ids and mask (B, P) of prompts, codes (B, N)."""
    before = model.prepare_embeddings_for_image_generation(codes[:, :-1])
    embeddings = torch.cat([model.get_input_embeddings()(ids), before], dim=1)
    mask = torch.cat([mask, mask.new_ones(before.shape[:2])], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=mask, use_cache=False
    ).last_hidden_state[:, ids.shape[1] - 1 :]  # (B, N, C)
    logits = model.model.generation_head(hidden)
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def train(
    output_dir: Path, tokenizer_path: Path, steps: int, count: int
) -> tuple[JanusForConditionalGeneration, float]:
    """Train, or continue from the checkpoint in output_dir; the model and its last mean loss."""
    output_dir.mkdir(parents=True, exist_ok=True)
    codes = load_codes(output_dir, count, tokenizer_path, janus_vq.janus_vq, janus_vq.draw)
    prompts = make_processor()(
        text=[caption_of(index) for index in range(count)],
        generation_mode="image",
        padding=True,
        return_tensors="pt",
    )
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    model = start(tokenizer_path)

    def loss_of_step(step: int) -> Tensor:
        rows = torch.randint(count, (BATCH,))
        dropped = torch.rand(BATCH) < PROMPT_DROP
        return loss_of(model, drop_prompts(ids[rows], dropped), mask[rows], codes[rows])

    mean = fit(model, loss_of_step, output_dir, steps)
    return model.eval(), mean


def save(model: JanusForConditionalGeneration, folder: Path) -> None:
    """Write model and processor into the folder, the weights last: they are there or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, suffix=".part") as made:
        model.save_pretrained(made)
        make_processor().save_pretrained(made)
        for path in sorted(Path(made).iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(path, folder / path.name)


@torch.no_grad()
def draw_prompts(folder: Path, prompts: list[str], seed: int) -> Tensor:
    """A picture of each prompt by the bundled model and the library, uint8 (B, 3, 64, 64)."""
    model = JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = JanusProcessor.from_pretrained(folder)
    inputs = processor(text=prompts, generation_mode="image", padding=True, return_tensors="pt")
    torch.manual_seed(seed)
    codes = model.generate(**inputs, generation_mode="image")
    return to_bytes(model.decode_image_tokens(codes).permute(0, 3, 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m util.tiny.janus", description="Train janus_tiny and write it."
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="for codes and checkpoint")
    parser.add_argument("--tokenizer", type=Path, required=True, help="of util.tiny.janus_vq")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--num_images", type=int, default=PICTURES)
    parser.add_argument("--bundle", type=Path, default=FOLDER, help="folder to write at the end")
    args = parser.parse_args()
    if not args.tokenizer.is_file():
        raise UserError(f"there is no tokenizer at {args.tokenizer}: run util.tiny.janus_vq first")
    classifier = PromptClassifier.from_file(args.bundle / CLASSIFIER)
    model, loss = train(args.output_dir, args.tokenizer, args.steps, args.num_images)
    save(model.half(), args.bundle)
    prompts = [caption_of(HELD_OUT_START + n) for n in range(TEST_PICTURES)]
    images = draw_prompts(args.bundle, prompts, seed=0)
    sheet = contact_sheet(images.permute(0, 2, 3, 1).numpy(), columns=10, padding=0)
    save_png(args.output_dir / "samples.png", sheet)
    agreement = prompt_agreement(classifier, images, prompts)
    print(json.dumps({"training_loss_nats": round(loss, 4), "agreement": agreement}))


if __name__ == "__main__":
    run_main(main)
