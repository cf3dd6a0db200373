"""Tiny random models of transformers, and the oracle that masks for them what a cache should forget."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from models.line_plan import LinePlan
from tests.support.line_oracle import spaced_columns, worth

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

BOS, EOS, BOI, PAD = 1, 2, 3, 0
ORACLE = "oracle_of_tests"


def sharpen(model: torch.nn.Module, seed: int) -> None:
    """Weights with which attention and codes are decided clearly, whatever the rounding."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "norm" not in name:
            gain = 3.0 if "q_proj" in name else 1.0
            std = gain if "embed" in name else gain * weight.shape[1] ** -0.5
            weight.data = torch.randn(weight.shape, generator=generator) * std
        elif "_norm.weight" in name:  # Chameleon's norm of queries and keys
            weight.data = 1.7 + 0.1 * torch.randn(weight.shape, generator=generator)


def tiny_janus(grid: tuple[int, int] = (8, 6), kv_heads: int = 4, seed: int = 0):
    """Two layers of four heads of 16; codes of `grid`, which only a square one can decode."""
    config = transformers.JanusConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=512,
            pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        ),
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 4 * grid[0], "patch_size": 4, "mlp_ratio": 1.0, "projection_dim": 64,
            "depth": 1, "num_image_tokens": grid[0] * grid[1],
        },
        vq_config={
            "embed_dim": 8, "num_embeddings": 64, "latent_channels": 32, "base_channels": 32,
            "channel_multiplier": [1, 2], "num_res_blocks": 1, "projection_dim": 64,
            "image_token_embed_dim": 64,
        },
        image_token_id=4, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    model = transformers.JanusForConditionalGeneration(config).eval().requires_grad_(False)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=True, guidance_scale=5.0,
        generation_kwargs={"boi_token_id": BOI},
    )  # fmt: skip
    sharpen(model, seed)
    return model


def code_name(code: int) -> str:
    """Chameleon's name of an image token: digits as letters."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def tiny_chameleon(kv_heads: int = 4, seed: int = 0):
    """Two layers of four heads of 16; 64 codes with ids 4 to 67, in another order than the codes."""
    names = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<image>": 3}
    names |= {code_name(63 - i): 4 + i for i in range(64)}
    specials = ("<racm3:break>", "<reserved08799>", *(f"<reserved{8800 + i:05}>" for i in range(9)))
    specials += ("<reserved08706>",)
    names |= {name: 68 + i for i, name in enumerate(specials)}
    config = transformers.ChameleonConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=512,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, vocabulary_map=names,
        vq_config={
            "embed_dim": 32, "num_embeddings": 64, "latent_channels": 32, "base_channels": 32,
            "channel_multiplier": [1, 2], "num_res_blocks": 1, "resolution": 32,
        },
    )  # fmt: skip
    model = transformers.ChameleonForConditionalGeneration(config).eval().requires_grad_(False)
    sharpen(model, seed)
    return model


def save_tiny_janus(folder) -> None:
    """Model and processor of 8 x 8 codes, 16 pixels, as save_pretrained writes them."""
    tiny_janus((8, 8)).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)


def tiny_processor(template: str | None = None):
    """A tokenizer of a few words and the processor of a tiny Janus of 8 x 8 codes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<s>", "</s>", "<begin_of_image>", "<image_placeholder>", "<end_of_image>"]
    words += ["a", "red", "disc", "green", "star", "<unk>", "User:", "Assistant:"]
    base = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    base.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={
            "image_token": words[4], "boi_token": words[3], "eoi_token": words[5],
        },
    )  # fmt: skip
    from transformers.models.janus.image_processing_janus import JanusImageProcessor

    size = {"height": 32, "width": 32}
    images = JanusImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return transformers.JanusProcessor(
        images, tokenizer, num_image_tokens=64, chat_template=template
    )


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, P), padded on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


class MaskingOracle:
    """An attention that sees the keys of a full cache, without those a head has forgotten.

    Used with the library's DynamicCache: nothing is dropped, no slot is reused, positions and masks
    are the library's own. One oracle serves the rows of one call of generate.
    """

    def __init__(self, plan: LinePlan, method: str) -> None:
        self.plan, self.method = plan, method
        columns = spaced_columns(plan.spaced, plan.line) if method == "stratified" else set()
        self.columns = columns
        self.seen: dict[int, Tensor] = {}  # layer -> (rows, kv heads, tokens) bool
        self.total: dict[int, Tensor] = {}  # layer -> (rows, kv heads, tokens)
        self.queries: dict[int, list[Tensor]] = {}  # layer -> (rows, kv heads, groups, d) per token
        self.forgotten = 0

    def attention(self, module, query, key, value, attention_mask, **kwargs):
        rows, heads, tokens, width = query.shape
        layer, length = module.layer_idx, key.shape[2]
        if tokens > 1 or layer not in self.seen:  # the prompt
            real = torch.ones(rows, length, dtype=torch.bool)
            if attention_mask is not None:
                real = attention_mask[:, 0, -1]
            self.seen[layer] = real[:, None].repeat(1, key.shape[1], 1)
            self.total[layer] = torch.zeros(rows, key.shape[1], length)
            self.queries[layer] = []
            visible = self.seen[layer][:, :, None].expand(-1, -1, tokens, -1).tril()
            visible = visible | torch.eye(tokens, dtype=torch.bool)  # padding sees itself
        else:
            new = torch.ones(rows, key.shape[1], 1)
            self.seen[layer] = torch.cat([self.seen[layer], new.bool()], dim=2)
            self.total[layer] = torch.cat([self.total[layer], 0 * new], dim=2)
            visible = self.seen[layer][:, :, None]
        grouped = query.unflatten(1, (key.shape[1], -1))  # (rows, kv heads, groups, tokens, d)
        logits = grouped @ key[:, :, None].transpose(-1, -2) * width**-0.5
        weights = logits.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1)
        output = (weights @ value[:, :, None]).flatten(1, 2).transpose(1, 2)
        count = length - self.plan.condition
        if count > 0:
            self.queries[layer].append(grouped[:, :, :, 0])
            if count % self.plan.line == 0:
                self.end_line(layer, key)
        return output.contiguous(), None

    def end_line(self, layer: int, key: Tensor) -> None:
        queries = torch.stack(
            self.queries[layer][-self.plan.line :], 2
        )  # (rows, kv, line, group, d)
        for row, seen in enumerate(self.seen[layer]):
            for head, alive in enumerate(seen):
                slots = [i for i, kept in enumerate(alive.tolist()) if kept]
                keys = key[row, head, slots]
                logits = queries[row, head] @ keys.T * keys.shape[1] ** -0.5
                attention = logits.softmax(-1).mean(1)  # (line, n)
                self.total[layer][row, head, slots] += attention.sum(0)
                position = [slot - self.plan.condition for slot in slots]
                value = worth(
                    self.method, attention, self.total[layer][row, head, slots], position, keys,
                    self.columns, self.plan.line,
                )  # fmt: skip
                newest = key.shape[2] - self.plan.condition - self.plan.recent
                free = [
                    (value[i], slot)
                    for i, slot in enumerate(slots)
                    if self.plan.anchors <= position[i] < newest
                ]
                surplus = sum(at >= 0 for at in position) - self.plan.budget
                for _, slot in sorted(free)[: max(0, surplus)]:
                    alive[slot] = False
                    self.forgotten += 1

    @contextmanager
    def serves(self, model) -> Iterator[None]:
        """Inside, the model attends through the oracle."""
        transformers.AttentionInterface.register(ORACLE, self.attention)
        from transformers.masking_utils import sdpa_mask

        transformers.AttentionMaskInterface.register(ORACLE, sdpa_mask)
        model.set_attn_implementation(ORACLE)
        try:
            yield
        finally:
            model.set_attn_implementation("sdpa")
