"""python:prose, python:code, python:tasks: text that every Python installation has.

python:prose   documentation that this Python installation contains, in English
python:code    the standard library's source files
python:tasks   a prompt and its completion: the summary of a function of the standard library,
               and the function
"""

from __future__ import annotations

import ast
import email.message
import functools
import gc
import importlib.metadata
import pathlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from jaxpt import io, stage
from jaxpt.data.sources.source import Document, Reading, SourceKind, TextSource
from jaxpt.spec import UserError

# packages with the most docstrings that every installation of jaxpt has: 8 MB of prose, not 3
PROSE_PACKAGES = ("flax", "jax", "numpy", "optax")
# directories of tests, data tables, and programs that are no library code
NOT_LIBRARY = {"test", "tests", "testing", "idlelib", "lib2to3", "pydoc_data"}
NOT_LIBRARY |= {"site-packages", "turtledemo"}


def read_python(source: TextSource, _: str) -> Reading:
    """Yield text of this Python installation."""
    return READERS[source.pattern]()


def read_code() -> Iterator[Document]:
    """Yield the files of the standard library."""
    for file in list_stdlib_files():
        text = io.read_bytes(file).decode("utf-8", "replace")
        yield Document(file.relative_to(stdlib_dir()).as_posix(), text)


def read_prose() -> Iterator[Document]:
    """Yield docstrings per module, packages' README texts, and the language reference's topics."""
    import pydoc_data.topics

    packages = pathlib.Path(sysconfig.get_path("purelib"))
    modules = {file.relative_to(stdlib_dir()).as_posix(): file for file in list_stdlib_files()}
    for name in PROSE_PACKAGES:
        for file in list_source_files(packages / name):
            modules[file.relative_to(packages).as_posix()] = file
    for name, file in sorted(modules.items()):
        docstrings = [text for text in extract_docstrings(file) if is_prose(text)]
        if docstrings:
            yield Document(f"docstrings/{name}", "\n\n".join(dict.fromkeys(docstrings)))
    for name, metadata in sorted(get_installed_packages().items()):
        readme = (get_readme(metadata) or "").strip()
        if readme:
            yield Document(f"readme/{name}", readme.encode("utf-8", "replace").decode())
    for name, topic in sorted(pydoc_data.topics.topics.items()):
        yield Document(f"topics/{name}", topic.strip())


def get_readme(metadata: email.message.Message) -> str | None:
    """Return the README text in a package's metadata."""
    payload: Any = metadata.get_payload()
    return payload or metadata.get("Description")


def read_tasks() -> Iterator[Document]:
    """Yield short functions with a short summary: the prompt asks for it, the code answers."""
    for file in list_stdlib_files():
        name = file.relative_to(stdlib_dir()).as_posix()
        lines = io.read_bytes(file).decode("utf-8", "replace").splitlines(keepends=True)
        for node in parse_module(file).body:
            if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
                continue
            docstring = ast.get_docstring(node)
            if not docstring:
                continue
            summary = " ".join(docstring.partition("\n\n")[0].split())
            statement = node.body[0]  # the docstring
            head = lines[node.lineno - 1 : statement.lineno - 1]
            body = lines[statement.end_lineno : node.end_lineno]
            function = "".join(head + body)
            if 20 <= len(summary) <= 120 and len(function) <= 500:
                prompt = f"Write a Python function. {summary}\n\n"
                yield Document(f"{name}:{node.name}", prompt + function, len(prompt))


def get_installed_packages() -> dict[str, Any]:
    """Return name -> metadata of the installed packages.

    The remains of an interrupted pip, which have no name, are left out.
    """
    packages = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        if metadata and metadata["Name"]:
            packages[metadata["Name"].lower()] = metadata
    return packages


def stdlib_dir() -> pathlib.Path:
    """Return the directory of the standard library."""
    return pathlib.Path(sysconfig.get_path("stdlib"))


@functools.cache
def list_stdlib_files() -> list[pathlib.Path]:
    """Return the files of the standard library, without the build settings of this machine."""
    files = list_source_files(stdlib_dir())
    return [file for file in files if not file.name.startswith("_sysconfigdata")]


def list_source_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Return the Python files below root, sorted, without tests."""
    files = []
    for file in io.find(root, "**/*.py"):
        is_library = not NOT_LIBRARY & set(file.relative_to(root).parts[:-1])
        if is_library and not re.match(r"test_|.*_test\.py", file.name):
            files.append(file)
    return sorted(files, key=lambda file: file.as_posix())


def extract_docstrings(file: pathlib.Path) -> list[str]:
    """Return the docstrings of a module, its classes and functions, outermost first, dedented."""
    docstrings = []
    nodes: list[ast.AST] = [parse_module(file)]
    # The list grows while it is read: breadth first, through statements only, which is all that can
    # hold a definition.
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                docstrings.append(text)
        for block in ("body", "orelse", "handlers", "finalbody"):
            nodes += getattr(node, block, ())
    return docstrings


def parse_module(file: pathlib.Path) -> ast.Module:
    """Return a file's syntax tree, an empty one if it was written for another Python."""
    is_collecting = gc.isenabled()
    gc.disable()  # a tree is many objects and no cycle: 0.87 x the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(io.read_bytes(file))
    except (SyntaxError, ValueError):
        return ast.Module([], [])
    finally:
        if is_collecting:
            gc.enable()


def is_prose(docstring: str) -> bool:
    """Return whether a docstring has 80 characters, three quarters of them letters or spaces."""
    n_prose = sum(map(str.isalpha, docstring)) + docstring.count(" ")
    return len(docstring) >= 80 and n_prose >= 0.75 * len(docstring)


def check_text(text: str, where: str) -> None:
    """Raise UserError unless there is such text."""
    if where not in READERS:
        raise UserError(
            f"prepare.sources: {text!r}: expected python:prose, python:code or python:tasks."
        )


def describe_python(source: TextSource) -> dict[str, str]:
    """Return the versions of Python and, for prose, of the packages."""
    versions = {"python": sys.version.split()[0]}
    if source.pattern == "prose":
        packages = get_installed_packages().items()
        installed = sorted((name, metadata["Version"]) for name, metadata in packages)
        versions["packages"] = stage.fingerprint(installed)
    return versions


READERS: dict[str, Callable[[], Reading]] = {
    "prose": read_prose,
    "code": read_code,
    "tasks": read_tasks,
}
KIND = SourceKind(
    "python",
    read_python,
    has_files=False,
    check_where=check_text,
    default_name=str,
    describe_versions=describe_python,
)
