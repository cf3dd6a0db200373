"""Ablations: rows are runs that go on, tables and sentences say what the numbers say."""

import json
from dataclasses import fields

import pytest

from benchmarks import ablations, frontier
from benchmarks.ablation_rows import Row, beyond_rows, changed, frontier_series, groups, scaled
from models.fast_mar import FastMARConfig
from models.head_config import HeadConfig
from models.lazy_mar import KEEP_SCHEDULE, LazyMARConfig
from tests.support.runs import NUM_IMAGES, flags_for, snapshot
from util.errors import UserError
from util.images import is_complete_png

BASE = LazyMARConfig()
LAZY = Row("LazyMAR, 2 steps", BASE, 2)
SHORT = {
    "caches": [Row("MAR", None, 2), Row("head", BASE.with_caches(["head"]), 2), LAZY],
    "frontier": [Row("MAR", None, 2), Row("head, 1", BASE.with_caches(["head"]), 1), LAZY],
}
SERIES = {"MAR": SHORT["frontier"][:2], "LazyMAR": [LAZY]}


@pytest.fixture
def ablate(one_thread, monkeypatch, weights, tmp_path, document_of):
    """Calls the command with rows of two steps; returns the last line, parsed, and measured peaks."""
    measured = []

    def peak_gb(batch):
        measured.append(batch.task.lazy)
        return 0.5

    monkeypatch.setattr(ablations, "STEPS", 2)
    monkeypatch.setattr(frontier, "STEPS", 2)
    monkeypatch.setattr(ablations, "groups", lambda base, steps_at: SHORT)
    monkeypatch.setattr(ablations, "frontier_series", lambda base, steps_at: SERIES)
    monkeypatch.setattr(ablations, "peak_gb", peak_gb)

    def call(*more: str) -> tuple[dict, list]:
        images = ["--num_images", str(NUM_IMAGES), "--eval_bsz", str(NUM_IMAGES)]
        flags = flags_for(weights / "official", tmp_path / "out", *images, *more)
        at = flags.index("--num_iter")  # the rows decide it
        del flags[at : at + 2]
        results = ["--results", str(tmp_path / "results"), "--timing_bsz", "2", "--repeats", "2"]
        return document_of(ablations, *flags, *results), measured

    return call


def untimed(document):
    """Its rows without what is measured again each time."""
    return [
        {key: value for key, value in row.items() if key not in ("s_per_image", "speedup")}
        for row in document["rows"]
    ]


def test_rows_become_runs_and_tables_and_are_not_made_again(ablate, tmp_path):
    document, measured = ablate("--group", "caches,frontier")
    runs = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(runs) == len(measured) == 4  # MAR and LazyMAR are in both groups
    assert {row["folder"] for row in document["rows"]} < set(runs)
    for group in ("caches", "frontier"):
        path = tmp_path / "results" / f"ablations_mar_tiny_{group}"
        written = json.loads(path.with_suffix(".json").read_text())
        mar, *others = written["rows"]
        assert (mar["psnr"], mar["speedup"], mar["lazy_mar"]) == (None, 1.0, None)
        assert all(5 < row["psnr"] < 140 and row["fid"] > 0 for row in others)
        assert all(row["identical"] == 0 and row["s_per_image"] > 0 for row in others)
        assert mar["patch_difference"] is None
        for row in others:
            difference, low, high = row["patch_difference"]
            assert difference == pytest.approx(row["patch_frechet"] - mar["patch_frechet"])
            assert low < high
        assert all(row["tflops_executed"] < mar["tflops_executed"] for row in others)
        assert written["about"]["num_images"] == NUM_IMAGES
        text = path.with_suffix(".md").read_text()
        assert [line.split(" | ")[0] for line in text.splitlines()[2:5]] == [
            f"| {row['name']}" for row in written["rows"]
        ]
    assert document["conclusion"] in text
    assert is_complete_png(tmp_path / "results" / "ablations_mar_tiny_frontier.png")

    before = snapshot(tmp_path / "out")
    again, measured = ablate("--group", "frontier")
    assert untimed(again) == untimed(document)
    assert (snapshot(tmp_path / "out"), len(measured)) == (before, 4)
    (tmp_path / "out" / mar["folder"] / "images" / "00003.png").unlink()
    assert ablate("--group", "caches")[0]["rows"]
    assert sorted(snapshot(tmp_path / "out")) == sorted(before)


def test_rows_take_turns_and_the_fastest_counts(ablate, monkeypatch, tmp_path):
    seconds = iter([8.0, 6.0, 4.0, 4.0, 2.0, 6.0])  # two turns of three rows

    def timed(call, device):
        call()
        return next(seconds)

    monkeypatch.setattr(ablations, "timed", timed)
    rows = ablate("--group", "caches")[0]["rows"]
    assert [row["s_per_image"] for row in rows] == [2.0, 1.0, 2.0]  # batches of two
    assert [row["speedup"] for row in rows] == [1.0, 2.0, 1.0]


def test_turns_and_timed_batches_are_at_least_one():
    for flag in ("--repeats", "--timing_bsz"):
        with pytest.raises(UserError, match=f"{flag} is 0"):
            ablations.parse(["--model", "mar_tiny", flag, "0"])


def test_a_row_that_the_model_cannot_sample_is_refused_before_the_first_image(
    ablate, monkeypatch, tmp_path
):
    rows = [*SHORT["caches"], Row("long head", None, 2, head=HeadConfig(steps=500))]
    monkeypatch.setattr(ablations, "groups", lambda base, steps_at: {"caches": rows})
    with pytest.raises(UserError, match="the row 'long head' cannot be sampled: 500 denoising"):
        ablate("--group", "caches")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(ablate, tmp_path):
    document, _ = ablate("--group", "caches", "--dry_run")
    assert (document["rows"], list(tmp_path.iterdir())) == (3, [])
    assert document["seconds"] > 0


def test_the_default_is_in_every_sweep_and_named():
    rows = changed(BASE, "interval", (1, 18))
    assert [row.name for row in rows] == ["interval 1", "interval 9, the default", "interval 18"]
    assert [row.config.interval for row in rows] == [1, 9, 18]
    skipped = changed(BASE, "head_skip", ((1, 2), ()))
    names = ["head_skip none", "head_skip 1,2", "head_skip 1,2,3,4, the default"]
    assert [row.name for row in skipped] == names


def test_a_scaled_keep_schedule_stays_whole_where_it_is_whole():
    assert scaled(BASE, 1) == BASE
    halved, doubled = scaled(BASE, 0.5).keep, scaled(BASE, 2).keep
    assert [ratio for _, ratio in halved] == [1.0] + [r / 2 for _, r in KEEP_SCHEDULE[1:]]
    assert [ratio for _, ratio in doubled][:4] == [1.0, 1.0, 1.0, 0.8]


def test_the_frontier_has_all_rows_of_its_lines():
    def steps_at(row, config):
        return 20 if config else None

    series = frontier_series(BASE, steps_at)
    rows = groups(BASE, steps_at)["frontier"]
    tasks = {row.task for line in series.values() for row in line}
    assert {row.task for row in rows} == tasks
    assert sum(len(line) for line in series.values()) > len(rows)
    head = BASE.with_caches(["head"])
    assert {Row("", *task).task for task in ((head, 20), (head, 16), (None, 16))} < tasks
    assert Row("", None, 20).task not in tasks
    assert {FastMARConfig.balanced(), FastMARConfig.fast()} < tasks


def test_steps_at_equal_cost_cost_the_same(one_thread):
    ablation = ablations.Ablation(ablations.parse(["--model", "mar_tiny", "--device", "cpu"]))
    lazy, head = Row("", ablation.base), ablation.base.with_caches(["head"])
    steps = ablation.steps_at(lazy, head)
    near = [ablation.tflops(Row("", head, n), executed=True) for n in (steps - 1, steps, steps + 1)]
    assert near[0] < ablation.tflops(lazy, executed=True) < near[2]
    assert ablation.steps_at(Row("", None, 33), None) == 33
    # mar_tiny's head alone costs more than LazyMAR, whatever the number of steps.
    assert ablation.steps_at(lazy, None) is None


def result(name, fid, cost, config=None, steps=64):
    config = None if config is None else ablations.asdict(config)
    costs = {"tflops_executed": cost, "s_per_image": cost}
    published = {"head": ablations.asdict(HeadConfig()), "order": "random"}
    return {"name": name, "fid": fid, "num_iter": steps, "lazy_mar": config, **published, **costs}


def test_every_technique_has_a_row_that_differs_from_fast_in_it_alone():
    rows = {row.name: row.task for row in beyond_rows()}
    fast = rows["fast"]
    assert fast == FastMARConfig.fast() and rows["balanced"] == FastMARConfig.balanced()
    for name, task in rows.items():
        if name.startswith("fast, "):
            assert sum(getattr(task, f.name) != getattr(fast, f.name) for f in fields(fast)) == 1, (
                name
            )


def test_a_row_with_a_shorter_head_costs_less_and_has_its_own_run(one_thread):
    ablation = ablations.Ablation(ablations.parse(["--model", "mar_tiny", "--device", "cpu"]))
    plain, short = (Row("", None, head=HeadConfig(steps=steps)) for steps in (None, 20))
    assert ablation.tflops(short, executed=True) < 0.7 * ablation.tflops(plain, executed=True)
    assert ablation.host_of(plain).sampling == ablation.host_of(Row("", None)).sampling
    assert ablation.folder(short) != ablation.folder(plain)


def test_patch_distances_are_compared_where_they_are_known():
    rows = [
        result("MAR", 0.10, 9.0),
        result("LazyMAR", 0.12, 4.5, BASE),
        result("head", 1, 8, BASE.with_caches(["head"])),
    ]
    intervals = (None, (-0.1, -0.3, 0.1), (0.1, 0.05, 0.2))
    measured = [
        {**row, "patch_frechet": distance, "patch_difference": interval}
        for row, distance, interval in zip(rows, (0.3, 0.2, 0.4), intervals, strict=True)
    ]
    text = frontier.conclusion(measured, BASE)
    assert "has patch FD 0.200 at" in text
    assert text.endswith("Rows whose 95% interval lies above MAR's patch FD: head.\n")


def test_the_conclusion_compares_at_equal_cost_and_names_the_undominated():
    head = BASE.with_caches(["head"])
    rows = [
        result("MAR", 0.10, 9.0),
        result("MAR, 24 steps", 0.40, 5.0, steps=24),
        result("LazyMAR", 0.12, 4.5, BASE),
        result("slower", 0.12, 4.6, LazyMARConfig(interval=3)),
        result("head, 24 steps", 0.35, 4.4, head, steps=24),
        result("head, 8 steps", 2.0, 1.0, head, steps=8),
    ]
    names = [row["name"] for row in frontier.undominated(rows, "s_per_image")]
    assert names == ["head, 8 steps", "head, 24 steps", "LazyMAR", "MAR"]
    lines = frontier.conclusion(rows, BASE).split("\n\n")
    cost = "at 4.5 TFLOPs per image as executed"
    assert lines[0] == f"LazyMAR with 64 steps has FID 0.120 {cost}, MAR 0.100 at 9."
    assert "of MAR, the row with 24 steps: FID 0.400 at 5 TFLOPs" in lines[1]
    assert "of head cache alone, the row with 24 steps: FID 0.350 at 4.4 TFLOPs" in lines[2]
    assert "fewer FLOPs than: head, 8 steps; head, 24 steps; LazyMAR; MAR." in lines[3]
