"""Standard streams that are closed, full, piped away or ASCII cost nothing but what they cannot show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

# A command that writes to both streams before, in the middle of and after its work.
COMMAND = """
import sys
from pathlib import Path
from util.errors import run_main

def main():
    print("score 1.5 \\u00b1 0.5 of n\\udcff", flush=True)
    print("note: \\u00b1", file=sys.stderr)
    with open(sys.argv[1], "w") as file:
        assert file.fileno() > 2, "the next file took the place of a standard stream"
        for line in range(20000):
            print("line", line)
        file.write("done")
    print('{"fid": 1}')

run_main(main)
"""
ASCII = {"PYTHONIOENCODING": "ascii"}


def run(tmp_path: Path, redirection: str, code: str = COMMAND, **env: str):
    """The shell's word on a command with this redirection; stdout and stderr are what is left of them."""
    script = tmp_path / "command.py"
    script.write_text(code)
    work = tmp_path / "work"
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" "$1" "$2" {redirection}', sys.executable, script, work],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("redirection", "env"),
    [
        ("", {}),
        ("2>&-", {}),
        ("2>/dev/full", {}),
        ("0<&- 2>&-", {}),
        ("", ASCII),
        ("2>&-", {"PYTHONUNBUFFERED": "1"}),
        ("", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ],
)
def test_the_json_line_comes_last_where_stdout_works(tmp_path, redirection, env):
    done = run(tmp_path, redirection, **env)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == '{"fid": 1}'
    assert done.stdout.count("\n") == 20002
    assert (tmp_path / "work").read_text() == "done"


@pytest.mark.parametrize(
    "redirection",
    [">&-", ">/dev/full", "| head -n 1", "| true", ">&- 2>&-", ">/dev/full 2>/dev/full", "0<&- >&- 2>&-"],
)  # fmt: skip
@pytest.mark.parametrize("env", [{}, ASCII, {"PYTHONUNBUFFERED": "1"}], ids=str)
def test_a_command_finishes_though_nobody_can_read_it(tmp_path, redirection, env):
    done = run(tmp_path, redirection, **env)
    assert done.returncode == 0
    assert (tmp_path / "work").read_text() == "done"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_lost_stdout_is_reported_once_on_stderr(tmp_path):
    said = run(tmp_path, ">/dev/full").stderr
    assert said.count("note: stdout is lost (No space left on device)") == 1


def test_text_that_cannot_be_encoded_is_escaped(tmp_path):
    assert "score 1.5 \\xb1 0.5 of n\\udcff" in run(tmp_path, "", **ASCII).stdout
    assert "score 1.5 ± 0.5 of n\\udcff" in run(tmp_path, "", PYTHONIOENCODING="utf-8").stdout


def test_a_pipe_that_does_not_block_gets_every_line(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    command = [sys.executable, str(script), str(tmp_path / "work")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.DEVNULL, env=env) as process:
        os.close(writer)
        with open(reader) as pipe:
            lines = pipe.read().splitlines()
    assert process.returncode == 0
    assert (len(lines), lines[-1]) == (20002, '{"fid": 1}')


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        ("MemoryError()", "memory ran out: use a smaller batch"),
        ("RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", "use a smaller batch"),
        ("OSError(24, 'Too many open files')", "ulimit -n"),
        ("OSError(12, 'Cannot allocate memory')", "use a smaller batch"),
        ('RuntimeError("can\'t start new thread")', "ulimit -u"),
        ("OSError(28, 'No space left on device')", "has free space, or choose another"),
        ("OSError(30, 'Read-only file system', 'data/x')", "cannot use data/x (Read-only"),
        ("OSError(27, 'File too large', 'data/x')", "cannot use data/x (File too large)"),
        ("OSError(116, 'Stale file handle', 'data/x')", "cannot use data/x (Stale"),
        ("OSError(107, 'Transport endpoint is not connected', 'x')", "cannot use x (Transport"),
    ],
)
def test_an_exhausted_machine_is_one_sentence_with_a_remedy(tmp_path, raised, words):
    code = f"from util.errors import run_main\ndef main():\n    raise {raised}\nrun_main(main)"
    done = run(tmp_path, "", code)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_defect_of_the_program_keeps_its_traceback(tmp_path):
    code = "from util.errors import run_main\ndef main():\n    {}['a']\nrun_main(main)"
    done = run(tmp_path, "", code)
    assert done.returncode == 1
    assert "KeyError: 'a'" in done.stderr
