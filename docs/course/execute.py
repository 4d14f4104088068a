"""Run the pages of the course one after another in a folder, and keep their outputs.

    python docs/course/execute.py            # in a temporary folder; writes the outputs in place

A page fails with the cell that failed. The pages need nbclient, ipykernel and matplotlib.
"""

import argparse
import os
import pathlib
import re
import tempfile
import time

import nbclient
import nbformat

HERE = pathlib.Path(__file__).resolve().parent
CLONE = HERE.parent.parent
PAGES = sorted(HERE.glob("lesson?_*.ipynb"))
FIGURES = "application/vnd.jaxpt.figures+json"
CELL_TIMEOUT = 1800  # seconds
PROGRESS = re.compile(r".*(?:\d+%\||\[\d\d:\d\d, ).*\n")  # lines that only a slow machine prints


def execute_page(page: pathlib.Path, folder: pathlib.Path) -> nbformat.NotebookNode:
    """Return a page as it is after all of its cells ran in a folder."""
    notebook = nbformat.read(page, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
    )
    os.environ["JAXPT"] = str(CLONE)
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        for output in cell.get("outputs", ()):
            if "text" in output:
                text = PROGRESS.sub("", output["text"])
                output["text"] = text.replace(f"{folder}/", "").replace(f"{CLONE}/", "")
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    return notebook


def read_figures(notebook: nbformat.NotebookNode) -> dict[str, dict[str, float]]:
    """Return the key figures that a page shows: name -> here and within."""
    found = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            found |= output.get("data", {}).get(FIGURES, {})
    return found


def main() -> None:
    """Execute the pages named, or all."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("pages", nargs="*", type=pathlib.Path, default=PAGES)
    parser.add_argument("--folder", type=pathlib.Path, help="keep what the pages make here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for page in arguments.pages:
            began, cpu = time.monotonic(), sum(os.times()[:4])
            notebook = execute_page(page, folder)
            nbformat.write(notebook, page)
            seconds = time.monotonic() - began
            size = page.stat().st_size / 1e3
            cpu = sum(os.times()[:4]) - cpu
            print(f"{page.name}: {seconds:.0f} s, {cpu:.0f} s of CPU, {size:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
