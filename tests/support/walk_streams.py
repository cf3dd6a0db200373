"""Runs commands in forks of one process, each with other standard streams, as a shell would start them.

    python -m tests.support.walk_streams FOLDER < COMMANDS

A line of COMMANDS is a JSON list: module, flags. Prints one JSON line per command and state of the
streams: [module, state, exit code, what it wrote to stdout, to stderr].
"""

import importlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

from util.errors import run_main

STATES = {  # stdout, stderr, encoding; None: what the command writes is kept
    "stdout closed": ("closed", None, "utf-8"),
    "stderr closed": (None, "closed", "utf-8"),
    "both closed": ("closed", "closed", "utf-8"),
    "stdout full": ("full", None, "utf-8"),
    "stderr full": (None, "full", "utf-8"),
    "stdout piped away": ("pipe", None, "utf-8"),
    "ASCII": (None, None, "ascii"),
}


def redirect(descriptor: int, state: str | None, kept: Path, encoding: str) -> io.TextIOBase | None:
    """What sys.stdout or sys.stderr is when Python starts with such a descriptor."""
    os.close(descriptor)
    if state == "closed":
        return None
    if state == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        target = "/dev/full" if state == "full" else str(kept)
        writer = os.open(target, os.O_WRONLY | os.O_CREAT, 0o644)
    if writer != descriptor:
        os.dup2(writer, descriptor)
        os.close(writer)
    errors = "strict" if descriptor == 1 else "backslashreplace"
    return open(descriptor, "w", encoding=encoding, errors=errors, closefd=False)


def run(module: str, flags: list[str], state: str, kept: list[Path]) -> None:
    """In a child: run the command and leave with its exit code."""
    stdout, stderr, encoding = STATES[state]
    sys.stderr = sys.__stderr__ = redirect(2, stderr, kept[1], encoding)
    sys.stdout = sys.__stdout__ = redirect(1, stdout, kept[0], encoding)
    sys.argv = [module, *flags]
    code = 0
    try:
        run_main(importlib.import_module(module).main)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        code = 99
        if sys.stderr is not None:
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            code = 120  # as of Python, whose last flush fails
    os._exit(code)


def main() -> None:
    """All commands from stdin in all states."""
    folder = Path(sys.argv[1])
    commands = [json.loads(line) for line in sys.stdin]
    for module, _ in commands:
        importlib.import_module(module)
    for number, (module, flags) in enumerate(commands):
        for state in STATES:
            kept = [folder / f"{number}-{state}-{name}" for name in ("out", "err")]
            words = [word.replace("STATE", state.replace(" ", "_")) for word in flags]
            sys.stdout.flush()
            child = os.fork()
            if not child:
                run(module, words, state, kept)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = [file.read_text(encoding="utf-8") if file.exists() else "" for file in kept]
            print(json.dumps([module, state, code, *texts]), flush=True)


if __name__ == "__main__":
    main()
