"""The benchmarks compare the same pictures, and run."""

import json
import sys
import time
from dataclasses import asdict

import pytest
import torch

from benchmarks import (
    eager_mar,
    latency,
    line_latency,
    tiny_references,
    training,
    waterfall,
)
from benchmarks.common import clock_of
from benchmarks.eager_training import masked_loss
from benchmarks.mar_work import MODELS, MODES, Work, build, count, work_of
from engine import cli
from models.plan import DecodingPlan
from tests.support import ROOT
from tests.support.golden_data import relative_error
from tests.support.sampling import CLOSE, noise_of, sample, small_mar
from util.errors import UserError
from util.report import markdown_table


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
    model = build("mar_tiny", "meta", num_sampling_steps="ddim10")
    plan = DecodingPlan.create(model.seq_len, 8, 3.0)
    plain, lazy = (work_of(model, MODES[mode].lazy, plan, 4) for mode in ("plain", "lazy"))
    assert lazy.transformer_flops < plain.transformer_flops
    assert lazy.head_flops < plain.head_flops
    assert lazy.head_bytes < plain.head_bytes


def test_limits_are_work_over_rates():
    work = Work(transformer_flops=60.0, head_flops=30.0, head_bytes=80.0)
    assert work.limits(batch=2, rate=10.0, bandwidth=4.0) == (18.0, 12.0 + 20.0)


def test_models_have_the_geometry_of_their_host_and_the_heads_the_published_sizes():
    published = {"mar_base": (6, 1024), "mar_large": (8, 1280), "mar_huge": (12, 1536)}
    for name in MODELS:
        geometry = cli.named(name).host().geometry
        head = geometry.diffloss_d, geometry.diffloss_w
        assert head == published.get(name, head)
        for model in (build(name, "meta"), build(name, "meta", **asdict(geometry))):
            net = model.diffloss.net
            assert (len(net.res_blocks), net.cond_embed.out_features) == head
            assert len(model.decoder_blocks) == geometry.decoder_depth


def test_one_thread_is_clocked_by_its_own_seconds(one_thread):
    torch.set_num_threads(1)
    assert clock_of(torch.device("cpu")) is time.process_time
    torch.set_num_threads(2)
    assert clock_of(torch.device("cpu")) is time.perf_counter


def test_tables_show_three_digits():
    assert markdown_table(["a", "b"], [[0.123456, None]]).splitlines()[2] == "| 0.123 |  |"


@pytest.mark.parametrize("script", [latency, waterfall])
def test_a_benchmark_ends_in_one_json_document_and_writes_its_results(
    one_thread, document_of, tmp_path, script
):
    model = "--models" if script is latency else "--model"
    flags = [model, "mar_tiny", "--num_iter", "1", "--device", "cpu", "--repeats", "1"]
    document = document_of(script, *flags, "--output", tmp_path / "result")
    assert document == json.loads((tmp_path / "result.json").read_text())
    assert len(document["rows"]) == (4 if script is latency else 7)
    row = "| mar_tiny |" if script is latency else "| + head cache |"
    assert row in (tmp_path / "result.md").read_text()


def test_the_training_benchmark_compares_its_rows(document_of, tmp_path):
    output = tmp_path / "training"
    words = "--model mar_tiny --batch 1 --repeats 1 --warmup 0 --rows eager,ours --device cpu"
    document = document_of(training, *words.split(), "--output", output)
    assert document == json.loads(output.with_suffix(".json").read_text())
    assert [row["step"] for row in document["rows"]] == ["eager", "ours"]
    assert all(row["images_per_s"] > 0 for row in document["rows"])


def test_cache_sizes_follow_from_shapes_alone(document_of):
    words = "--model gpt_xl --batches 4 --budgets 1,1/4,3 --sizes_only"
    rows = document_of(line_latency, *words.split())["rows"]
    assert [row["slots"] for row in rows] == [576, 1 + 6 * 24 + 24, 1 + 3 * 24 + 24]
    for row in rows:  # keys and values, bytes of bf16, width, layers, sequences with guidance
        assert row["cache_gb"] * 1e9 == 2 * 2 * 1280 * 36 * row["slots"] * 4 * 2
        assert "images_per_s" not in row
    assert rows[0]["workspace_gb"] == 0 < rows[1]["workspace_gb"]


def test_cache_sizes_of_janus_pro_are_those_of_its_shapes(monkeypatch, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    command = "line_latency --model janus_pro_1b --batches 128 --sizes_only"
    monkeypatch.setattr(sys, "argv", command.split())
    line_latency.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["budget"] for row in rows] == ["dynamic", "static", "1", "1/4", "1/6"]
    slots = [round(row["cache_gb"] * 1e9 / (2 * 128 * 196_608), 6) for row in rows]
    assert slots == [20 + 575, 20 + 576, 20 + 576 + 24, 20 + 144 + 24, 20 + 96 + 24]
    assert rows[4]["cache_over_theory"] == 1


def test_a_benchmark_that_samples_nothing_finds_no_largest_batch(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["line_latency", "--sizes_only", "--max_batch"])
    with pytest.raises(UserError, match="remove one of them"):
        line_latency.main()


def test_the_caches_of_transformers_are_measured_beside_ours(one_thread, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from models import janus_original

    tiny = janus_original.published(64, 2, 4, 128)
    monkeypatch.setitem(janus_original.PUBLISHED, "janus_pro_1b", tiny)
    monkeypatch.setattr(janus_original, "VQ_CHANNELS", {"base_channels": 32, "latent_channels": 32})
    command = "line_latency --model janus_pro_1b --lines 4 --batches 1,2 --method streaming"
    command += " --budgets dynamic,static,1,1/2 --repeats 1 --device cpu"
    monkeypatch.setattr(sys, "argv", command.split())
    line_latency.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["budget"] for row in document["rows"]] == ["dynamic", "static", "1", "1/2"] * 2
    assert all(row["images_per_s"] > 0 for row in document["rows"])
    assert (document["about"]["condition"], document["about"]["cfg"]) == (20, 5.0)


def test_the_cache_benchmark_measures_its_budgets(one_thread, document_of):
    words = "--model gpt_tiny --lines 8 --batches 1 --budgets 1,1/2 --repeats 1 --device cpu"
    document = document_of(line_latency, *words.split())
    assert [row["budget"] for row in document["rows"]] == ["1", "1/2"]
    assert all(row["images_per_s"] > 0 for row in document["rows"])


def test_the_references_see_damage(monkeypatch, document_of, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(tiny_references.DEFAULT_IMAGES, "tokenizer", 100)
    monkeypatch.setattr(tiny_references, "psnr", lambda tokenizer: 30.0)
    words = ["--num_images", 200, "--output", tmp_path / "result"]
    document = document_of(tiny_references, *words)
    fid = {row["name"]: row["fid"] for row in document["rows"]}
    assert fid["no triangles"] > 2 * fid["as rendered"]
    assert fid["3% of the 4x4 patches from another picture"] > 1.5 * fid["as rendered"]
    assert len(document["channels"]) == 8
    assert {"device", "dtype", "seeds"} <= document["about"].keys()
    assert (tmp_path / "result.md").exists()
