"""Run the pages of the course in a folder, two at a time, and keep their outputs.

    python docs/course/execute.py            # in a temporary folder; writes the outputs in place

A page fails with the cell that failed. The pages need nbclient, ipykernel and matplotlib.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import sys
import tempfile
import threading
import time

import nbclient
import nbformat

HERE = pathlib.Path(__file__).resolve().parent
CLONE = HERE.parent.parent
PAGES = sorted(HERE.glob("lesson?_*.ipynb"))
FIGURES = "application/vnd.jaxpt.figures+json"
# lesson -> those before it that make what it would make itself
NEEDS = {3: (1, 2), 4: (3,), 5: (3,), 6: (1,)}
AT_ONCE = 2  # a small model keeps little more than a core busy
CELL_TIMEOUT = 1800  # seconds
PROGRESS = re.compile(r".*(?:\d+%\||\[\d\d:\d\d, ).*\n")  # lines that only a slow machine prints


def execute_pages(folder: pathlib.Path) -> dict[pathlib.Path, nbformat.NotebookNode]:
    """Return all pages as they are after they ran in a folder, and print what each took."""
    slots = threading.Semaphore(AT_ONCE)
    runs: dict[int, concurrent.futures.Future[nbformat.NotebookNode]] = {}

    def run(number: int) -> nbformat.NotebookNode:
        for before in NEEDS.get(number, ()):
            runs[before].result()
        with slots:
            began = time.monotonic()
            notebook = execute_page(PAGES[number - 1], folder)
            seconds = time.monotonic() - began
            print(f"{PAGES[number - 1].name}: {seconds:.0f} s", file=sys.stderr, flush=True)
            return notebook

    with concurrent.futures.ThreadPoolExecutor(len(PAGES)) as pool:
        for number in range(1, len(PAGES) + 1):
            runs[number] = pool.submit(run, number)
        return {page: future.result() for page, future in zip(PAGES, runs.values(), strict=True)}


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
    """Execute all pages, and write their outputs in place."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, help="keep what the pages make here")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for page, notebook in execute_pages(folder).items():
            nbformat.write(notebook, page)
    print(f"all pages: {time.monotonic() - began:.0f} s, {sum(os.times()[:4]):.0f} s of CPU")


if __name__ == "__main__":
    main()
