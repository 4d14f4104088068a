"""Write the pages of the documentation site that are made from other files; run by mkdocs.

One page per module from its docstrings, README, CONTRIBUTING and CHANGELOG as pages, and the
course's notebooks with the outputs that they were committed with.
"""

import base64
import json
import pathlib
import re

import mkdocs_gen_files

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
MAX_LINES = 24  # of an output; longer ones are folded
LINK = re.compile(r"\[([^]]+)\]\(([^)#]+)(#[^)]*)?\)")


def write_api_pages() -> None:
    """Write one page per module, and the navigation."""
    nav = mkdocs_gen_files.Nav()
    for path in sorted((ROOT / "jaxpt").rglob("*.py")):
        if path.name == "__init__.py":
            continue
        module = path.relative_to(ROOT).with_suffix("")
        page = pathlib.Path("api", *module.parts[1:]).with_suffix(".md")
        nav[module.parts[1:]] = str(page.relative_to("api"))
        with mkdocs_gen_files.open(page, "w") as file:
            file.write(f"::: {'.'.join(module.parts)}\n")
    with mkdocs_gen_files.open("api/SUMMARY.md", "w") as file:
        file.writelines(nav.build_literate_nav())


def write_root_pages() -> None:
    """Write README, CONTRIBUTING and CHANGELOG with links that work in the site."""
    for name, page in PAGES.items():
        with mkdocs_gen_files.open(page, "w") as file:
            file.write(LINK.sub(rewrite_link, (ROOT / name).read_text()))


def rewrite_link(match: re.Match[str]) -> str:
    """Point a link of a file in the root at the page it becomes; keep only the text of others."""
    text, target, anchor = match[1], match[2], match[3] or ""
    if target.startswith("http"):
        return match[0]
    if target.startswith("docs/"):
        page = target.removeprefix("docs/").replace(".ipynb", ".md")
        return f"[{text}]({page}{anchor})"
    return f"[{text}]({PAGES[target]}{anchor})" if target in PAGES else text


def write_course_pages() -> None:
    """Write a page per notebook of docs/course, its plots beside it."""
    for notebook in sorted((ROOT / "docs/course").glob("*.ipynb")):
        page = pathlib.Path("course", notebook.name).with_suffix(".md")
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        parts = [render_cell(cell, f"{notebook.stem}-{i}") for i, cell in enumerate(cells)]
        download = f"[This page as a notebook]({notebook.name}){{: download}}"
        with mkdocs_gen_files.open(page, "w") as file:
            file.write("\n\n".join([parts[0], download, *parts[1:]]) + "\n")


def render_cell(cell: dict, name: str) -> str:
    """Return a cell as Markdown, and write its images as course/NAME-N.png."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source.replace(".ipynb)", ".md)")
    language = "python"
    if source.startswith("%%bash\n"):
        language, source = "bash", source.removeprefix("%%bash\n")
    parts = [fence(language, source)]
    if source.startswith("# Set up"):
        parts = [fold("Set up: find jaxpt, or install it", parts[0])]
    text = ""
    for i, output in enumerate(cell["outputs"]):
        text += "".join(output.get("text", ()))
        data = output.get("data", {})
        if "image/png" in data:
            with mkdocs_gen_files.open(f"course/{name}-{i}.png", "wb") as file:
                file.write(base64.b64decode(data["image/png"]))
            parts.append(f"![Plot of the cell above]({name}-{i}.png)")
        elif "text/markdown" in data:
            parts.append("".join(data["text/markdown"]))
    if text:
        parts.insert(1, show_output(text.strip("\n")))
    return "\n\n".join(parts)


def show_output(text: str) -> str:
    """Return an output as a code block; a long one is folded."""
    lines = text.splitlines()
    block = fence("text", text)
    if len(lines) <= MAX_LINES:
        return block
    return fold(f"{len(lines)} lines of output", block)


def fold(title: str, block: str) -> str:
    """Return a block that a click unfolds."""
    indented = "\n".join(f"    {line}" for line in block.splitlines())
    return f'??? quote "{title}"\n\n{indented}'


def fence(language: str, text: str) -> str:
    """Return a code block."""
    return f"```{language}\n{text.rstrip()}\n```"


write_api_pages()
write_root_pages()
write_course_pages()
