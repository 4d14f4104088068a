"""Write the pages of the documentation site that are made from other files; run by mkdocs.

One page per module from its docstrings, and README, CONTRIBUTING and CHANGELOG as pages.
"""

import pathlib
import re

import mkdocs_gen_files

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
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
        return f"[{text}]({target.removeprefix('docs/')}{anchor})"
    return f"[{text}]({PAGES[target]}{anchor})" if target in PAGES else text


write_api_pages()
write_root_pages()
