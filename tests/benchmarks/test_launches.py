"""Launches are counted: views are none, and CUDA graphs leave one per recorded call."""

import torch

from benchmarks.launches import Calls, counting, gpt_launches, mar_launches
from models.fast_mar import FastMARConfig
from models.lazy_mar import LazyMARConfig


def test_views_and_allocations_are_not_launches():
    x = torch.empty(4, 6, device="meta")
    with counting() as launches:
        x.view(6, 4).t()[1:].unflatten(0, (1, -1))
        torch.empty_like(x)
    assert launches.count == 0
    with counting() as launches:
        (x @ x.t()).relu_()
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert launches.count == 3


def test_a_repeated_call_is_counted_without_running_it():
    x, made = torch.empty(4, device="meta"), []
    with counting() as launches:
        calls = Calls(launches)
        for key in ("a", "b", "a", "a"):
            calls(key, lambda: made.append(x + 1 + 1))
    assert (len(made), launches.count, calls.total, calls.calls) == (2, 0, 8, 4)


def test_the_eager_steps_of_a_gpt_are_counted_as_if_all_were_made(monkeypatch):
    monkeypatch.setattr("benchmarks.launches.LINES", 4)
    eager, graphs = gpt_launches("gpt_tiny", None, 2, 2.0)
    assert graphs < eager / 50
    per_step = (eager - 12) / 16  # the buffers of six layers are filled with zeros once
    again, _ = gpt_launches("gpt_tiny", None, 64, 2.0)
    assert again == eager
    assert 6 * 20 < per_step < 6 * 60


def test_caches_launch_less_than_mar_and_graphs_less_than_both():
    def count(lazy, cfg=3.0):
        settings = FastMARConfig(num_iter=8, lazy=lazy)
        return mar_launches("mar_tiny", settings, 2, cfg, num_sampling_steps="ddim8")

    plain, lazy = count(None), count(LazyMARConfig(warmup=2, interval=3, head_interval=4))
    assert lazy[0] < plain[0]
    assert all(graphs < eager / 5 for eager, graphs in (plain, lazy))
    assert count(None, cfg=1.0)[0] < plain[0]
