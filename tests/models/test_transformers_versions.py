"""The oldest supported transformers and the installed one draw the same codes. Run with `make test-slow`.

The oldest one goes into a folder of its own, with its dependencies, in front of the installed packages.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

OLDEST = "5.12.1"
DRAWING = """
import json, transformers
from models import janus, lumina
from models.line_config import LineARConfig
from tests.support.transformers_data import BOI, BOS, padded, tiny_chameleon, tiny_janus

prompts = padded([[BOS, 9, 8, BOI], [BOS, 5, 6, 7, 8, 11, BOI]])
codes = {}
for name in ("none", "linear", "h2o", "rkv", "stratified"):
    config = LineARConfig(3, anchors=2, recent=1, method=name)
    drawn = (
        janus.sample_tokens(tiny_janus(kv_heads=2), **prompts, grid=(8, 6), seeds=[1, 2], line_ar=config),
        lumina.sample_tokens(tiny_chameleon(), **prompts, grid=(8, 4), seeds=[1, 2], line_ar=config),
    )
    codes[name] = [part.tolist() for part in drawn]
print(json.dumps({"version": transformers.__version__, "codes": codes}))
"""


def drawn(packages: str) -> dict:
    """What DRAWING prints, with a folder of packages in front of the installed ones."""
    paths = os.pathsep.join(filter(None, (packages, str(ROOT))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRAWING]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_oldest_supported_version_draws_the_codes_of_the_installed_one(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path]
    if subprocess.run([*install, f"transformers=={OLDEST}"], capture_output=True).returncode:
        pytest.skip(f"pip could not fetch transformers {OLDEST}")
    old, new = drawn(str(tmp_path)), drawn("")
    assert old["version"] == OLDEST != new["version"]
    assert old["codes"] == new["codes"]
    assert new["codes"]["linear"] != new["codes"]["none"]
