"""Who may import whom. The text of every file is parsed; nothing is imported or run."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "diffusion", "util")
ALLOWED = {
    "diffusion": {"diffusion"},
    "util": {"util"},
    "models": {"models", "diffusion", "util"},
    "engine": {"models", "diffusion", "util"},
}
# Commands that make the bundled files, or count the work of models; nothing else may import them.
COMMANDS_ON_MODELS = {"util.tiny.assets", "util.tiny.vq", "util.tiny.gpt", "util.flops"}
ONLY_HOME = {"torchvision": "util.data.datasets", "torch_fidelity": "util.metrics"}


def imports(tree: ast.AST, module: str) -> set[str]:
    """Absolute dotted names of everything that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            names.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
    return names


def read_graph() -> dict[str, set[str]]:
    """Dotted module name => what it imports, for all of the project but its tests."""
    files = [*ROOT.glob("*.py")]
    for folder in (*PACKAGES, "scripts", "benchmarks"):
        files += (ROOT / folder).rglob("*.py")
    graph = {}
    for file in files:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        graph[module] = imports(ast.parse(file.read_text()), module)
    return graph


GRAPH = read_graph()
OWN = {module.split(".")[0] for module in GRAPH}
LAYERED = sorted(module for module in GRAPH if module.split(".")[0] in ALLOWED)


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_every_form_of_import_is_seen():
    code = """
import engine, numpy as np
from models import mar
def later():
    from . import errors
    from .shapes import draw
"""
    found = imports(ast.parse(code), "util.images")
    assert {"engine", "numpy", "models.mar", "util.errors", "util.shapes.draw"} <= found


def test_the_packages_are_found():
    assert set(PACKAGES) <= OWN
    assert {"models.vae", "util.download"} <= GRAPH.keys()


@pytest.mark.parametrize("module", LAYERED)
def test_a_layer_imports_only_the_layers_below_it(module):
    allowed = ALLOWED[module.split(".")[0]]
    if module in COMMANDS_ON_MODELS:
        allowed = allowed | {"models"}
    assert tops(GRAPH[module]) & OWN <= allowed


def test_models_import_four_leaves_of_util_and_nothing_else():
    leaves = {"util.config", "util.weights", "util.data.latent_stats", "util.errors"}
    for module in (module for module in LAYERED if module.startswith("models.")):
        taken = {name for name in GRAPH[module] if name in GRAPH and name.startswith("util.")}
        assert taken <= leaves, module


def test_commands_on_models_are_imported_by_each_other_and_benchmarks_alone():
    users = {module for module, names in GRAPH.items() if names & COMMANDS_ON_MODELS}
    assert {user for user in users if not user.startswith("benchmarks.")} <= COMMANDS_ON_MODELS


def test_engine_is_imported_by_top_level_scripts_and_benchmarks_alone():
    users = {module for module, names in GRAPH.items() if "engine" in tops(names)}
    assert {user for user in users if "." in user and not user.startswith("benchmarks.")} == set()


@pytest.mark.parametrize("library", sorted(ONLY_HOME))
def test_a_heavy_library_is_imported_in_its_one_home_alone(library):
    users = {module for module, names in GRAPH.items() if library in tops(names)}
    assert users <= {ONLY_HOME[library]}


def test_no_module_imports_itself_in_a_circle():
    TopologicalSorter({module: names & GRAPH.keys() for module, names in GRAPH.items()}).prepare()
