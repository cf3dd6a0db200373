"""Decoding steps can be CUDA graphs: replayed as recorded, they give the images of fresh ones."""

from dataclasses import replace

import pytest
import torch

from models import decoding, gpt_sampler, sampling_copy
from models.fast_mar import FastMARConfig
from models.gpt_sampler import GPTSampler
from models.head_config import HeadConfig
from models.lazy_mar import LazyMARConfig
from models.line_config import LineARConfig
from models.line_methods import METHODS
from models.sampler import Sampler
from models.step_cache import BUCKET
from tests.support.llamagen_data import small_gpt
from tests.support.replay import CpuGraphs
from tests.support.sampling import CONFIGS, noise_of, small_mar

LOCAL = LazyMARConfig(warmup=2, interval=4, lazy_step="local")
MARS = {
    "mar": {},
    **{name: {"lazy_mar": config} for name, config in CONFIGS.items()},
    "random": {"lazy_mar": replace(CONFIGS["all"], token_selection="random")},
    "oldest": {"lazy_mar": replace(CONFIGS["all"], token_selection="oldest")},
    "oldest, both branches": {
        "lazy_mar": replace(CONFIGS["all"], token_selection="oldest", condition_cache=False)
    },
    "from the first step": {"lazy_mar": LazyMARConfig(warmup=0)},
    "without guidance": {"lazy_mar": CONFIGS["all"], "cfg": 1.0},
    "local": {"lazy_mar": LOCAL},
    "local, frozen buffer": {"lazy_mar": replace(LOCAL, buffer_refresh=False)},
    "local, both branches": {"lazy_mar": replace(LOCAL, condition_cache=False)},
    "probe, frozen buffer": {"lazy_mar": replace(CONFIGS["all"], buffer_refresh=False)},
    "guidance inside": {
        "lazy_mar": LOCAL,
        "head": HeadConfig((5, 3), guidance_interval=(225, 807)),
    },
    "forecast": {"lazy_mar": replace(CONFIGS["head"], forecast_order=1)},
    "annealed": {"head": HeadConfig(steps=(5, 3), guidance_start=0.25)},
    "fast": {**FastMARConfig.fast().arguments(), "num_iter": 8, "head": HeadConfig((5, 3))},
}
BATCHES = (((3, 4), (1, 2)), ((5, 6), (0, 1)), ((7, 8), (4, 4)))  # as it is, recorded, replayed
GRID = (6, 4)


@pytest.fixture(autouse=True)
def no_packed_weights(monkeypatch):
    """As on CUDA: packed weights, which AMD processors get, have no memory that a replay could refill."""
    monkeypatch.setattr(sampling_copy, "mkl_lacks_avx512", lambda: False)


GPTS = {"full": None, **{m: LineARConfig(budget=3, anchors=2, recent=1, method=m) for m in METHODS}}


@pytest.fixture
def graphs(monkeypatch):
    """CpuGraphs in place of CudaGraphs, as they are made: of the steps, the head and the classes."""
    made = []

    def make():
        # A step of LazyMAR leaves its residual behind for the next ones, which come in the same order.
        made.append(CpuGraphs(forgets=len(made) % 3 != 0))
        return made[-1]

    monkeypatch.setattr(decoding, "CudaGraphs", make)
    return made


@pytest.mark.parametrize("kind", MARS)
def test_replayed_batches_of_mar_are_those_of_a_fresh_sampler(graphs, kind):
    model = small_mar(num_sampling_steps="ddim6")
    replayed, fresh = (Sampler(model, torch.float32) for _ in range(2))
    replayed.graphs = True
    for seeds, labels in BATCHES:
        arguments = {"num_iter": 8, "cfg": 3.0, "labels": labels, **MARS[kind]}
        arguments["noise"] = noise_of(model, seeds)
        latents = replayed.sample_tokens(2, **arguments)
        assert torch.equal(latents, fresh.sample_tokens(2, **arguments))
    steps, head, classes = graphs
    assert steps.replays and head.replays and bool(classes.replays) == bool(classes.warm)


@pytest.mark.parametrize("cfg_interval", [-1, 9], ids=["", "interval"])
@pytest.mark.parametrize("kind", GPTS)
def test_replayed_batches_of_a_gpt_are_those_of_a_fresh_sampler(monkeypatch, kind, cfg_interval):
    monkeypatch.setattr(gpt_sampler, "CudaGraphs", CpuGraphs)
    model = small_gpt(GRID)
    replayed = GPTSampler(model)
    replayed.graphs = True
    for seeds, labels in BATCHES:
        arguments = {"cfg_interval": cfg_interval, "seeds": seeds, "line_ar": GPTS[kind]}
        codes = replayed.sample_tokens(labels, 2.0, top_k=40, **arguments)
        assert torch.equal(codes, model.sample_tokens(labels, 2.0, top_k=40, **arguments))
    graphs = replayed._last[1].run
    assert graphs.replays > len(BATCHES) * GRID[0] * GRID[1] // 2


def test_the_steps_of_a_gpt_are_one_program_per_bucket_and_one_per_full_line(monkeypatch):
    monkeypatch.setattr(gpt_sampler, "CudaGraphs", CpuGraphs)
    model = small_gpt((8, 8))
    for line_ar, line_programs in ((None, 0), (LineARConfig(budget=3, anchors=2, recent=1), 4)):
        sampler = GPTSampler(model)
        sampler.graphs = True
        sampler.sample_tokens((1, 2), 2.0, seeds=(3, 4), line_ar=line_ar)
        decoding = sampler._last[1]
        slots = decoding.cache.plan.slots
        lines = [key for key in decoding.run.warm if key[0] == "line"]
        assert len(decoding.run.warm) - len(lines) == -(-slots // BUCKET)
        assert len(lines) == line_programs  # of 1, 2, 3 lines, and of the full buffer


def test_other_settings_are_recorded_again(monkeypatch):
    monkeypatch.setattr(gpt_sampler, "CudaGraphs", CpuGraphs)
    model = small_gpt(GRID)
    sampler = GPTSampler(model)
    sampler.graphs = True
    for settings in ({}, {"temperature": 0.5}, {"top_k": 2}, {"greedy": True}, {"cfg": 4.0}, {}):
        arguments = {"cfg": 2.0, "seeds": (3, 4), **settings}
        codes = sampler.sample_tokens((1, 2), **arguments)
        assert torch.equal(codes, model.sample_tokens((1, 2), **arguments))


def test_a_broken_image_does_not_break_the_next_batch(monkeypatch):
    monkeypatch.setattr(gpt_sampler, "CudaGraphs", CpuGraphs)
    model = small_gpt(GRID)
    model.cls_embedding.embedding_table.weight.data[3] = torch.nan
    sampler = GPTSampler(model)
    sampler.graphs = True
    assert (sampler.sample_tokens((3, 1), seeds=(3, 4))[0] == -1).all()
    again = sampler.sample_tokens((1, 1), seeds=(3, 4))
    assert torch.equal(again, model.sample_tokens((1, 1), seeds=(3, 4)))


def test_graphs_are_refused_on_a_cpu():
    with pytest.raises(ValueError, match="CUDA, not on cpu"):
        GPTSampler(small_gpt(GRID), graphs=True)
