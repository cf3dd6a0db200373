"""The benchmarks compare the same pictures, and run."""

import json
import sys

import pytest
import torch

from benchmarks import eager_mar, latency, training, waterfall
from benchmarks.common import markdown
from benchmarks.eager_training import masked_loss
from benchmarks.mar_work import MODES, Work, count, count_work
from models.plan import DecodingPlan
from tests.golden_data import relative_error
from tests.test_sampling import CLOSE, noise_of, sample, small_mar


def test_the_eager_baseline_makes_the_same_latents():
    model = small_mar()
    plan = DecodingPlan.create(model.seq_len, 12, 3.0)
    latents = eager_mar.sample_tokens(model, plan, [1, 2], noise_of(model, (3, 4)))
    assert relative_error(latents, sample(model)) < CLOSE


def test_the_eager_training_step_has_the_same_loss():
    model = small_mar(diffusion_batch_mul=2, attn_dropout=0.0, proj_dropout=0.0).train()
    latents, labels = torch.randn(3, 4, 8, 8), torch.tensor([0, 1, 2])
    noise = model.training_noise(3, seed=5)
    rank = noise.orders.argsort(dim=1)
    t = torch.zeros(3, 2, 64, dtype=torch.long)
    head = torch.zeros(3, 2, 64, 4)
    t[:, :, noise.known :], head[:, :, noise.known :] = noise.timesteps, noise.head
    at = rank[:, None].expand(-1, 2, -1)  # from the order of decoding to raster order
    t = t.gather(2, at).transpose(0, 1).flatten()
    head = head.gather(2, at[..., None].expand(-1, -1, -1, 4)).transpose(0, 1).flatten(0, 2)
    mask = (rank >= noise.known).float()
    loss = masked_loss(model, latents, labels, noise.dropped, mask, t, head)
    assert loss.item() == pytest.approx(model(latents, labels, noise).item(), rel=1e-5)


def test_operations_are_counted_twice_per_multiply_add():
    x, weight = torch.zeros(3, 5, device="meta"), torch.zeros(7, 5, device="meta")
    assert count(lambda: torch.nn.functional.linear(x, weight)) == 2 * 3 * 5 * 7


def test_a_lazy_image_is_less_work_than_a_plain_one():
    plain, lazy = (count_work("mar_tiny", MODES[m], 8, 3.0, 4) for m in ("plain", "lazy"))
    assert lazy.transformer_flops < plain.transformer_flops
    assert lazy.head_flops < plain.head_flops
    assert lazy.head_bytes < plain.head_bytes


def test_limits_are_work_over_rates():
    work = Work(transformer_flops=60.0, head_flops=30.0, head_bytes=80.0)
    assert work.limits(batch=2, rate=10.0, bandwidth=4.0) == (18.0, 12.0 + 20.0)


def test_tables_show_three_digits():
    assert markdown(["a", "b"], [[0.123456, None]]).splitlines()[2] == "| 0.123 |  |"


@pytest.mark.parametrize("script", [latency, waterfall])
def test_a_benchmark_ends_in_one_json_document_and_writes_its_results(
    one_thread, monkeypatch, capsys, tmp_path, script
):
    model = "--models" if script is latency else "--model"
    flags = [model, "mar_tiny", "--num_iter", "1", "--device", "cpu", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["script.py", *flags, "--output", str(tmp_path / "result")])
    script.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((tmp_path / "result.json").read_text())
    assert len(document["rows"]) == (2 if script is latency else 7)
    row = "| mar_tiny |" if script is latency else "| + head cache |"
    assert row in (tmp_path / "result.md").read_text()


def test_the_training_benchmark_compares_its_rows(monkeypatch, capsys, tmp_path):
    output = tmp_path / "training"
    command = ["training", "--model", "mar_tiny", "--batch", "1", "--repeats", "1", "--warmup", "0"]
    command += ["--rows", "eager,ours", "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    training.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(output.with_suffix(".json").read_text())
    assert [row["step"] for row in document["rows"]] == ["eager", "ours"]
    assert all(row["images_per_s"] > 0 for row in document["rows"])
