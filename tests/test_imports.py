"""Who may import whom. The text of every file is parsed; nothing is imported or run."""

import ast
import re
import sys
from graphlib import TopologicalSorter

import pytest

from tests.support import PROJECT, ROOT

LAYERS = ("diffusion", "models", "util", "engine")
# Modules of util that know nothing of ours but each other; models may use them.
LEAVES = {
    f"util.{name}"
    for name in (
        *("checkpoint", "config", "data.latent_stats", "device", "dist", "download", "errors"),
        *("data.npz", "files", "images", "streams", "weights"),
    )
}
AVERAGED = "util.training.ema"  # what a checkpoint of a training holds; it imports nothing of ours


def imports(tree: ast.AST, module: str) -> set[str]:
    """Absolute dotted names of everything that a file imports, inside functions too.

    What is imported for the type checker alone does not count.
    """
    names = set()
    unseen = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            names.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
    return names


def read_sources() -> dict[str, str]:
    """Dotted module name => text, for all of the project but its tests."""
    files = [*ROOT.glob("*.py")]
    for folder in (*LAYERS, "benchmarks", "scripts"):
        files += (ROOT / folder).rglob("*.py")
    parts = {file: file.relative_to(ROOT).with_suffix("").parts for file in files}
    return {
        ".".join(name for name in parts[file] if name != "__init__"): file.read_text()
        for file in files
    }


SOURCES = read_sources()
EVERYTHING = {name: imports(ast.parse(text), name) for name, text in SOURCES.items()}
GRAPH = {name: found & SOURCES.keys() for name, found in EVERYTHING.items()}
COMMANDS = {name for name, text in SOURCES.items() if 'if __name__ == "__main__"' in text}
PACKAGES = {name for name in SOURCES if any(other.startswith(f"{name}.") for other in SOURCES)}


def top(name: str) -> str:
    return name.split(".")[0]


def allowed(module: str) -> set[str]:
    """What a module may import of ours."""

    def of(*layers: str) -> set[str]:
        return {name for name in SOURCES if top(name) in layers}

    leaves = LEAVES | {"util"}
    if module in LEAVES:
        return leaves | ({AVERAGED} if module == "util.checkpoint" else set())
    if top(module) == "diffusion":
        return of("diffusion") | leaves
    if top(module) == "models":
        return of("diffusion", "models") | leaves
    if top(module) == "engine":
        return of("diffusion", "engine", "models", "util")
    if module in COMMANDS and module.count(".") == 1:  # python -m util.NAME
        return of("diffusion", "engine", "models", "util")
    if module.startswith("util.tiny"):  # makes the bundled models
        return of("diffusion", "engine", "models", "util")
    return of("util")


def test_every_form_of_import_is_found():
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
    assert {"engine.mar", "models.vae", "util.data.datasets", "util.tiny.assets"} <= GRAPH.keys()
    assert {"diffusion", "engine", "models", "util", "util.evaluation"} <= PACKAGES
    assert GRAPH.keys() >= LEAVES


@pytest.mark.parametrize("module", sorted(name for name in GRAPH if top(name) in LAYERS))
def test_a_module_imports_only_what_is_below_it(module):
    assert GRAPH[module] <= allowed(module)


def test_what_averages_weights_imports_nothing_of_ours():
    assert GRAPH[AVERAGED] == set()


def test_util_reaches_no_model_except_from_its_commands():
    """Not even by way of another module of util."""

    def reached(module: str) -> set[str]:
        found, new = set(), {module}
        while new:
            found |= new
            new = set().union(*(GRAPH[name] for name in new)) - found
        return found

    for module in GRAPH:
        if module.startswith(("util.data", "util.evaluation", "util.training")):
            assert {top(name) for name in reached(module)} <= {"util"}, module


def test_torch_fidelity_is_imported_by_two_modules_alone():
    users = {module for module, names in EVERYTHING.items() if "torch_fidelity" in map(top, names)}
    assert users == {"util.evaluation.extractors", "util.evaluation.scores"}


def test_no_module_imports_itself_in_a_circle():
    TopologicalSorter(GRAPH).prepare()


def test_every_package_that_is_imported_is_declared():
    """Tests run where everything is installed, so a missing declaration would not be seen."""
    extras = [r for k, v in PROJECT["optional-dependencies"].items() if k != "dev" for r in v]
    declared = {
        re.match(r"[\w-]+", requirement)[0].lower().replace("-", "_")
        for requirement in [*PROJECT["dependencies"], *extras]
    }
    named = {"pil": "pillow"}
    optional = {"lpips"}  # util/report.py says how to install it
    ours = {top(name) for name in SOURCES}
    found = {top(name) for name in set().union(*EVERYTHING.values()) if name} - ours
    used = {named.get(name.lower(), name.lower()) for name in found - sys.stdlib_module_names}
    assert used - optional <= declared
    assert declared - used <= {"tensorboard", "playwright"}  # imported by torch, and by a test
