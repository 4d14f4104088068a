"""The rules of the house, kept by reading the source: floors, names of mesh axes, torch behind one door, knobs counted."""

import ast
import dataclasses
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from jaxpt import config

FLOORS = [
    ("spec",),
    ("stage",),
    ("config", "launch"),
    ("sharding",),
    ("data", "model"),
    ("weights",),
    ("lineage",),
    ("export", "evaluate"),
    ("train",),
    ("plan",),
    ("report",),
]
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted((ROOT / "jaxpt").rglob("*.py"))
DOORS = sorted((ROOT / "scripts").glob("*.py"))
# what train.py may need on a machine that only trains
LIGHT = {
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax",
    "grain",
    "ml_collections",
    "pyarrow",
    "numpy",
    "tqdm",
    "tensorboardX",
    "ml_dtypes",
    "absl",
}


def imports(path) -> set[str]:
    """Dotted names of the modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{name.name}" if node.module.startswith("jaxpt") else node.module
                for name in node.names
            }
    return found


def room(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "jaxpt" and len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_stairs_go_down_only(path):
    inside = path.relative_to(ROOT / "jaxpt").parts
    here = inside[0].removesuffix(".py")
    if here == "__init__":
        return
    for dotted in imports(path):
        there = room(dotted)
        if there and there != here:
            assert HEIGHT[there] < HEIGHT[here], (
                f"{path.name} ({here}) imports {dotted} ({there}), which is not below it"
            )


def test_rooms_have_no_cycle_inside():
    graph = {}
    for path in FILES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name] = {
            ".".join(dotted.split(".")[:3])
            for dotted in imports(path)
            if dotted.startswith("jaxpt.")
        } | {
            ".".join(dotted.split(".")[:2])
            for dotted in imports(path)
            if dotted.startswith("jaxpt.")
        }
    done, doing = set(), []

    def visit(name):
        assert name not in doing, " -> ".join([*doing[doing.index(name) :], name])
        if name in graph and name not in done:
            doing.append(name)
            for other in graph[name]:
                visit(other)
            doing.pop()
            done.add(name)

    for name in graph:
        visit(name)


def test_mesh_axes_are_named_in_sharding_and_config_only():
    for path in FILES:
        if path.name in ("sharding.py", "config.py"):
            continue
        tree = ast.parse(path.read_text())
        named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} & {
            "replica",
            "fsdp",
        }  # the other two are common words
        assert not named, f"{path}: names mesh axes {named}; use the logical axes of sharding.TABLE"
        assert "PartitionSpec" not in path.read_text(), (
            f"{path}: makes a PartitionSpec; ask sharding.sharding for it"
        )


def test_torch_stands_behind_one_door():
    for path in FILES + DOORS:
        roots = {dotted.split(".")[0] for dotted in imports(path)}
        if path.name != "reference.py":
            assert "torch" not in roots, path
            used = {
                getattr(node, "id", getattr(node, "attr", ""))
                for node in ast.walk(ast.parse(path.read_text()))
            }
            assert not [name for name in used if name.startswith("AutoModel")], (
                f"{path}: transformers' model code belongs in evaluate/reference.py"
            )


def test_knobs_are_few_and_the_list_of_them_is_current():
    n_knobs = sum(
        len(dataclasses.fields(type(getattr(config.Config(), section.name))))
        for section in dataclasses.fields(config.Config)
    )
    assert n_knobs <= 90
    assert (ROOT / "configs/base.py").read_text() == config.render_base_config(), (
        "run: python -m jaxpt.config > configs/base.py"
    )


def test_every_knob_is_read_somewhere():
    text = "\n".join(path.read_text() for path in FILES + DOORS if path.name != "config.py")
    for section in dataclasses.fields(config.Config):
        for knob in dataclasses.fields(type(getattr(config.Config(), section.name))):
            assert re.search(rf"\b{knob.name}\b", text), (
                f"{section.name}.{knob.name} is stated but nothing reads it"
            )


def test_training_starts_light():
    """What train.py imports before and while it runs is only what a machine that trains must have."""
    code = "import sys; from jaxpt.train import loop, metrics; metrics.summary_writer(); print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    )
    heavy = {
        "torch",
        "transformers",
        "datasets",
        "daft",
        "lm_eval",
        "tokenizers",
        "sentencepiece",
        "pandas",
        "bokeh",
        "plotly",
        "ray",
    }
    assert not loaded & heavy


@pytest.mark.parametrize("path", DOORS, ids=lambda path: path.name)
def test_every_door_answers_help_without_opening_the_house(path):
    code = f"import runpy, sys; sys.argv = [{str(path)!r}, '--help']\ntry: runpy.run_path({str(path)!r}, run_name='__main__')\nexcept SystemExit: pass\nprint('LOADED', *sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    usage, _, loaded = told.partition("LOADED")
    assert "usage" in usage and "python scripts/" in usage, "help shows an example"
    assert "jax" not in loaded.split(), (
        "a door that only prints help must not load jax: it answers in well under two seconds"
    )


@pytest.mark.parametrize(
    ("said", "told"),
    [("3.10", "is Python 3.10, wanted 3.11 or newer"), (None, "is no Python that runs here")],
)
def test_a_python_that_cannot_run_it_is_named(tmp_path, said, told):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{'echo ' + said if said else ''}\nexit 1\n")
    python.chmod(0o755)
    script = ["bash", ROOT / "scripts/quickstart.sh"]
    done = subprocess.run(
        script, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True
    )
    assert done.returncode == 1 and told in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_text_speaks_of_the_project_alone():
    for path in [*FILES, *DOORS, *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        assert not re.search(r"/(?:root|home)/|--\S*index|issue \d", path.read_text()), path
