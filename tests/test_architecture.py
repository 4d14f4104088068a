"""The architecture, checked in the source: layers, mesh axes, torch, knobs, words, density."""

import ast
import dataclasses
import importlib
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from jaxpt import config

LAYERS = [
    ("spec", "text"),
    ("io",),
    ("logs",),
    ("stage",),
    ("config", "cluster", "launch"),
    ("sharding",),
    ("hardware",),
    ("xla_settings",),
    ("data", "model"),
    ("families", "flops", "doctor"),
    ("weights",),
    ("growth",),
    ("initialize",),
    ("lineage",),
    ("export", "evaluate"),
    ("train",),
    ("plan",),
    ("report", "sweep"),
    ("cli",),
    ("__main__",),
]
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
FILES = sorted((ROOT / "jaxpt").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
TEMPLATES = sorted((ROOT / "jaxpt/report/templates").glob("*.html"))


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


def package_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "jaxpt" and len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    inside = path.relative_to(ROOT / "jaxpt").parts
    here = inside[0].removesuffix(".py")
    if here == "__init__":
        return
    for dotted in imports(path):
        there = package_of(dotted)
        if there and there != here:
            assert LEVEL[there] < LEVEL[here], (
                f"{path.name} ({here}) imports {dotted} ({there}), which is not below it"
            )


def test_modules_have_no_import_cycle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}

    def modules_of(dotted):
        """The module itself, or the one that a name is imported from."""
        return {name for name in (dotted, dotted.rpartition(".")[0]) if name in names}

    graph = {}
    for name, path in names.items():
        graph[name] = set().union(*map(modules_of, imports(path)))
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


def test_the_model_reads_no_config():
    for path in FILES:
        if "model" in path.parts:
            assert not [name for name in imports(path) if name.startswith("jaxpt.config")], path


def test_mesh_axes_are_named_in_sharding_and_config_only():
    for path in FILES:
        if path.name in ("sharding.py", "config.py"):
            continue
        tree = ast.parse(path.read_text())
        named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} & {
            "replica",
            "fsdp",
        }  # the other two are common words
        assert not named, (
            f"{path}: names mesh axes {named}; use the logical axes of sharding.LOGICAL_AXIS_RULES"
        )
        assert "PartitionSpec" not in path.read_text(), (
            f"{path}: makes a PartitionSpec; ask sharding.make_logical_sharding"
        )


def test_torch_is_imported_in_one_module_only():
    for path in FILES + SCRIPTS:
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


def test_html_is_written_in_templates_which_escape_all_but_the_projects_own_files():
    for path in (ROOT / "jaxpt/report").glob("*.py"):
        tag = re.search(r"</?(?:p|div|span|table|tr|td|h\d|ul|li|svg|figure|i)\b", path.read_text())
        assert not tag, f"{path}: {tag and tag[0]}"
    unescaped = [path.name for path in TEMPLATES if re.search(r"\|\s*safe", path.read_text())]
    assert unescaped == ["page.html"]


def test_knobs_are_few_and_the_list_of_them_is_current():
    n_knobs = sum(
        len(dataclasses.fields(type(getattr(config.Config(), section.name))))
        for section in dataclasses.fields(config.Config)
    )
    assert n_knobs <= 106
    assert (ROOT / "configs/base.py").read_text() == config.render_base_config(), (
        "run: python -m jaxpt.config > configs/base.py"
    )


def test_every_knob_is_read_somewhere():
    text = "\n".join(path.read_text() for path in FILES + SCRIPTS if path.name != "config.py")
    for section in dataclasses.fields(config.Config):
        for knob in dataclasses.fields(type(getattr(config.Config(), section.name))):
            assert re.search(rf"\b{knob.name}\b", text), (
                f"{section.name}.{knob.name} is defined but nothing reads it"
            )


def test_data_workers_start_light():
    """Each process of prepare and pack imports these anew: no jax, no scipy, no grain."""
    code = "import sys; from jaxpt.data import pack, prepare; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"jax", "scipy", "grain", "transformers"} & set(done.stdout.split())


def test_training_starts_light():
    """jaxpt train imports only what a machine that trains must have, and nothing of the planner."""
    code = "import sys; from jaxpt.train import loop, writers; writers.import_tensorboard()\n"
    code += "from jaxpt import flops; print(*sys.modules)"
    loaded = set(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    )
    heavy = {
        "torch",
        "transformers",
        "datasets",
        "lm_eval",
        "tokenizers",
        "sentencepiece",
        "pandas",
        "bokeh",
        "plotly",
        "ray",
    }
    assert not {name.split(".")[0] for name in loaded} & heavy
    unused = ("jaxpt.plan", "jaxpt.report", "jaxpt.cli")
    assert not {name for name in loaded if name.startswith(unused)}


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("3.10", "expected Python 3.11 or newer, got Python 3.10"),
        (None, "got one that does not run"),
    ],
)
def test_a_python_that_cannot_run_it_is_named(tmp_path, version, message):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{'echo ' + version if version else ''}\nexit 1\n")
    python.chmod(0o755)
    script = ["bash", ROOT / "scripts/quickstart.sh"]
    done = subprocess.run(
        script, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True
    )
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1


BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case)
MAX_LINES, MAX_COMPLEXITY = 60, 15


def measure_complexity(function: ast.FunctionDef) -> int:
    """Cyclomatic complexity: 1 and every branch, functions inside included."""
    complexity = 1
    for node in ast.walk(function):
        if isinstance(node, BRANCHES):
            complexity += 1
        elif isinstance(node, ast.BoolOp):
            complexity += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            complexity += 1 + len(node.ifs)
    return complexity


def test_no_function_of_train_is_long_or_branches_much():
    found = []
    for path in FILES:
        name = str(path.relative_to(ROOT))
        if not name.startswith("jaxpt/train/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                n_lines = node.end_lineno - node.lineno + 1
                complexity = measure_complexity(node)
                if n_lines > MAX_LINES or complexity > MAX_COMPLEXITY:
                    found.append(f"{name}: {node.name}")
    assert not found


def test_complexity_counts_every_branch():
    code = "def f(a):\n  for b in a:\n    if b and a or not b:\n      return [c for c in a if c]\n"
    (function,) = ast.parse(code).body
    assert measure_complexity(function) == 7


def test_the_text_speaks_of_the_project_alone():
    for path in [*FILES, *SCRIPTS, *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        assert not re.search(r"/(?:root|home)/|--\S*index|issue \d", path.read_text()), path


# ---- words: jaxpt speaks the field's language (docs/glossary.md has its own few terms)

# a rate takes "per": bytes per step, tokens per device
RATE = r"\b(tokens|bytes|flops|nats|bits|seconds|rows|sequences|usd|products)\ an?\ "
RATE += r"(step|second|device|token|byte|host|hour|layer|parameter|document|row|sequence)\b"
WORDS = r"\b(births?|born|newborns?|young|culprits?|hindered|undeal|dealt|rehears\w+|twins?|doors?"
WORDS += r"|wanted|muted?|told|row_len|batch_rows|n_pieces|n_in_a_row|max_positions)\b|\bsays="
WORDS += r"|\b(neuro|save)[nr]s?\b"


def read_prose_and_names():
    """Return path -> text of everything that a user reads: code, recipes, docs, scripts."""
    paths = [*FILES, *SCRIPTS, *(ROOT / "configs").glob("*.py"), *(ROOT / "docs").glob("*.md")]
    paths += [*(ROOT / "scripts").glob("*.sh"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    paths += [*(ROOT / "docs").rglob("*.py"), *(ROOT / "docs/course").glob("*.ipynb")]
    paths += [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    paths.remove(ROOT / "tests/test_architecture.py")  # it holds the list
    paths += [*(ROOT / "jaxpt/report").glob("page.*"), *TEMPLATES]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def test_no_private_word_is_left():
    found = []
    for name, text in read_prose_and_names().items():
        for i, line in enumerate(text.splitlines(), 1):
            words = re.search(f"{WORDS}|{RATE}", line, re.IGNORECASE)
            if words:
                found.append(f"{name}:{i}: {words[0]!r} in {line.strip()[:80]}")
    assert not found, "\n".join(found)


# ---- files: jaxpt/io alone opens, renames, removes, maps and lists them

FILE_CALLS = {"open", "rename", "rmtree", "copytree", "copyfile", "mmap", "memmap", "unlink"}
FILE_CALLS |= {"mkdir", "rmdir", "makedirs", "touch", "write_text", "write_bytes", "read_text"}
FILE_CALLS |= {"read_bytes", "iterdir", "glob", "rglob", "NamedTemporaryFile", "TemporaryDirectory"}
FILE_CALLS |= {"from_uri"}
EXEMPT_FILES = {
    "jaxpt/stage.py": "os.open of /dev/null",
    "jaxpt/plan/compile.py": "temporary files, for XLA's dumps",
    "jaxpt/config.py": "the clone's own configs/",
    "jaxpt/data/language.py": "files of a package",
    "jaxpt/train/distributed.py": "/proc and /dev",
    "jaxpt/xla_settings.py": "/proc and /dev",
}


def file_calls(path) -> list[str]:
    """Return "name:line" of calls that open, rename, remove, map or list files but through io."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = getattr(function, "id", getattr(function, "attr", ""))
        through_io = isinstance(getattr(function, "value", None), ast.Name)
        through_io = through_io and function.value.id in ("io", "self", "tensorstore")
        if name in FILE_CALLS and not through_io:
            found.append(f"{name}:{node.lineno}")
    return found


def test_files_are_opened_by_io_alone():
    found = {}
    for path in FILES:
        name = str(path.relative_to(ROOT))
        if not name.startswith("jaxpt/io/"):
            found[name] = file_calls(path)
    found = {name for name in found if found[name]}
    assert found == EXEMPT_FILES.keys(), found ^ EXEMPT_FILES.keys()


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="an f-string is many tokens since 3.12")
def test_a_line_holds_one_thought(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    counts = [importlib.import_module("count_density").count_file(file) for file in FILES]
    n_tokens, n_lines, n_statements = (sum(column) for column in zip(*counts, strict=True))
    limits = re.search(
        r"at most ([\d.]+) tokens per code line and ([\d.]+) per statement",
        (ROOT / "CONTRIBUTING.md").read_text(),
    )
    assert n_tokens / n_lines <= float(limits[1])
    assert n_tokens / n_statements <= float(limits[2])
