"""Trains gpt_tiny, the bundled LlamaGen, on codes of the shapes data set.

    python -m util.tiny.gpt --output_dir output_dir/gpt_tiny

The data set is turned into codes once (codes.safetensors in the output folder). Step i is seeded by
i, so the same command continues after a stop.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.llamagen import GPT, gpt_tiny
from models.vq import VQModel, vq_tiny
from util.errors import UserError, run_main
from util.files import sha256_of
from util.shapes import label_of
from util.tiny.training import load_checkpoint, save_checkpoint, save_weights
from util.tiny.vq import BUNDLE as TOKENIZER
from util.tiny.vq import Pictures, learning_rate, load_tokenizer, pictures
from util.training.step import attention_for_training
from util.weights import read_safetensors, save_safetensors

BUNDLE = Path("pretrained_models/gpt_tiny/model.safetensors")
PICTURES = 20_000
STEPS = 4200
BATCH = 16  # pictures
PEAK_LR = 2e-3
WARMUP = 200  # steps
LABEL_DROP = 0.1  # LlamaGen, train_c2i.py: class_dropout_prob
WEIGHT_DECAY = 0.05  # LlamaGen, train_c2i.py
BETAS = (0.9, 0.95)  # the same
GRAD_CLIP = 1.0  # the same
SAVE_EVERY = 100  # steps
ENCODE_BATCH = 50  # pictures
CPU = torch.device("cpu")


@torch.no_grad()
def encode_pictures(tokenizer: VQModel, count: int, draw: Pictures) -> Tensor:
    """Codes (count, N) int16 of pictures 0 .. count - 1."""
    parts = []
    for start in tqdm(range(0, count, ENCODE_BATCH), desc="codes", unit="batch", disable=None):
        codes = tokenizer.encode(draw(start, min(ENCODE_BATCH, count - start)))
        parts.append(codes.flatten(1).to(torch.int16))
    return torch.cat(parts)


def load_codes(
    output_dir: Path,
    count: int,
    tokenizer_path: Path = TOKENIZER,
    make: Callable[[], VQModel] = vq_tiny,
    draw: Pictures = pictures,
) -> Tensor:
    """Codes (count, N) int64, made once and kept. UserError if there are too few, or of another tokenizer.

    make: the tokenizer of that path, with other weights. draw: pictures by start and count.
    """
    path, digest = output_dir / "codes.safetensors", sha256_of(tokenizer_path)
    if not path.exists():
        made = {"codes": encode_pictures(load_tokenizer(tokenizer_path, make), count, draw)}
        save_safetensors(path, made, {"tokenizer_sha256": digest})
    tensors, made_by = read_safetensors(path)
    codes = tensors.get("codes", torch.empty(0)).long()
    if len(codes) < count:
        raise UserError(f"{path} has codes of {len(codes)} pictures, not {count}: delete it")
    if made_by.get("tokenizer_sha256") != digest:
        raise UserError(f"{path} has codes of another tokenizer than {tokenizer_path}: delete it")
    return codes[:count]


def loss_of(model: GPT, codes: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy, nats per token; codes (B, N), labels (B,)."""
    logits = model(codes[:, :-1], labels)
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def fit(
    model: nn.Module, loss_of_step: Callable[[int], Tensor], output_dir: Path, steps: int
) -> float:
    """Train the parameters that require gradients, or continue from the checkpoint in output_dir.

    loss_of_step: the loss of step i; random numbers are seeded by i before the call. It runs under
    bf16 autocast. Returns the running mean of the loss, nats per token.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=BETAS, weight_decay=WEIGHT_DECAY)
    checkpoint, done, mean = output_dir / "checkpoint-last.pth", 0, 0.0
    if state := load_checkpoint(checkpoint, model, optimizer, "step", "loss"):
        done, mean = state["step"], state["loss"]
    bar = tqdm(range(done, steps), initial=done, total=steps, unit="step", disable=None)
    for step in bar:
        torch.manual_seed(step)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, PEAK_LR, WARMUP)
        with attention_for_training(CPU):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of_step(step)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % SAVE_EVERY == 0:
            bar.write(f"step {step + 1}: loss {mean:.4f}")
            save_checkpoint(checkpoint, model, optimizer, step=step + 1, loss=mean)
    return mean


def train(output_dir: Path, steps: int, count: int) -> tuple[GPT, float]:
    """Train, or continue from the checkpoint in output_dir; the model and its last mean loss."""
    output_dir.mkdir(parents=True, exist_ok=True)
    codes = load_codes(output_dir, count)
    labels = torch.tensor([label_of(i) for i in range(count)])
    torch.manual_seed(0)
    model = gpt_tiny()

    def loss_of_step(step: int) -> Tensor:
        rows = torch.randint(count, (BATCH,))
        dropped = torch.rand(BATCH) < LABEL_DROP
        return loss_of(model, codes[rows], labels[rows].masked_fill(dropped, model.num_classes))

    mean = fit(model, loss_of_step, output_dir, steps)
    return model.eval(), mean


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m util.tiny.gpt", description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="for codes and checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--num_images", type=int, default=PICTURES)
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="file to write at the end")
    args = parser.parse_args()
    model, loss = train(args.output_dir, args.steps, args.num_images)
    metadata = {
        "training_loss_nats": round(loss, 4),
        "made_by": f"python -m util.tiny.gpt --steps {args.steps} --num_images {args.num_images}",
    }
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_weights(args.bundle, weights, metadata)
    print(json.dumps({"training_loss_nats": round(loss, 4)}))


if __name__ == "__main__":
    run_main(main)
