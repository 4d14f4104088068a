"""Count tokens per code line and per statement; docstrings, comments and layout do not count.

    python scripts/count_density.py jaxpt
    python scripts/count_density.py jaxpt/train/step.py jaxpt/train/loop.py

Run it with Python 3.11: from 3.12 on an f-string is many tokens instead of one.
"""

import argparse
import ast
import io
import pathlib
import tokenize

LAYOUT = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
}


def find_docstring_lines(text: str) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if has_docstring and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines |= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return lines


def count_file(path: pathlib.Path) -> tuple[int, int, int]:
    """Return the numbers of tokens, code lines and statements (else: and decorators count)."""
    text = path.read_text(encoding="utf-8")
    skipped = find_docstring_lines(text)
    n_tokens, n_statements, lines = 0, 0, set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.start[0] in skipped:
            continue
        n_statements += token.type == tokenize.NEWLINE
        if token.type not in LAYOUT:
            n_tokens += 1
            lines.add(token.start[0])
    return n_tokens, len(lines), n_statements


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=pathlib.Path, help="files or directories")
    files = []
    for path in parser.parse_args().paths:
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    counts = [count_file(file) for file in files]
    n_tokens, n_lines, n_statements = (sum(column) for column in zip(*counts, strict=True))
    print(f"{n_tokens:,} tokens on {n_lines:,} code lines in {n_statements:,} statements:")
    print(f"{n_tokens / n_lines:.2f} per line, {n_tokens / n_statements:.2f} per statement")


if __name__ == "__main__":
    main()
