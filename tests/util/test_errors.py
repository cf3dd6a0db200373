"""User errors end commands with one sentence and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest
from models.presets import PRESETS
from util.flags import make_parser, resolve

from util.errors import UserError

ROOT = Path(__file__).parents[2]


def resolved(program, *arguments):
    args = make_parser(program).parse_args(list(arguments))
    resolve(args, program, PRESETS)
    return args


@pytest.mark.parametrize(
    ("program", "arguments", "named"),
    [
        ("eval", ["--num_images", "0"], "--num_images is 0"),
        ("eval", ["--eval_bsz", "-1"], "--eval_bsz is -1"),
        ("eval", ["--seed", "-1"], "--seed is -1"),
        ("eval", ["--threads", "-1"], "--threads is -1"),
        ("eval", ["--temperature", "-1"], "--temperature is -1.0"),
        ("eval", ["--temperature", "nan"], "--temperature is nan"),
        ("eval", ["--keep", "abc"], "'abc' is no schedule"),
        ("eval", ["--head_skip", "a"], "'a' is no list of blocks"),
        ("eval", ["--no_such_flag"], "--no_such_flag"),
        ("main_mar", ["--batch_size", "0"], "--batch_size is 0"),
        ("main_mar", ["--log_freq", "0"], "--log_freq is 0"),
        ("main_mar", ["--lr", "-1"], "--lr is -1.0"),
        ("main_mar", ["--save_last_freq", "0"], "--save_last_freq is 0"),
        ("main_cache", ["--num_workers", "-1"], "--num_workers is -1"),
    ],
)
def test_a_nonsensical_flag_is_named_with_its_value(program, arguments, named):
    with pytest.raises(UserError) as error:
        resolved(program, *arguments)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["eval.py", "main_mar.py", "main_cache.py"])
def test_a_command_prints_one_line_and_exits_with_2(command, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / command), "--model", "mar_tiny", "--world_size", "8"],
        cwd=tmp_path, env={"PATH": "", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: 8 processes are stated")
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())
