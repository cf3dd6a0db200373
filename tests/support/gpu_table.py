"""A table at the end of a test run: outcome, seconds and name of every test, and the card.

python -m pytest -m gpu -p tests.support.gpu_table
"""

import pytest
import torch


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """pytest's hook."""
    rows = []
    for outcome in ("failed", "error", "skipped", "passed"):
        for report in terminalreporter.stats.get(outcome, []):
            rows.append(f"{outcome:8} {report.duration:7.1f} s  {report.nodeid}")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    terminalreporter.write_sep("-", f"{len(rows)} tests on {card}, torch {torch.__version__}")
    for row in rows:
        terminalreporter.write_line(row)
