"""What the pages of the course share: where they work, a model or its stand-in, tables, plots."""

import hashlib
import json
import os
import pathlib
import sys
import urllib.request
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from IPython.display import Markdown, display

FIGURES = "application/vnd.jaxpt.figures+json"  # type of the output that tests read
HUB_TIMEOUT = 3.0  # seconds
PLACE = pathlib.Path.cwd()  # where the page was opened; texts have folders there
plt.rcParams.update({"figure.figsize": (7, 3), "figure.dpi": 90, "axes.spines.top": False})
plt.rcParams.update({"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})


class KeyFigure(NamedTuple):
    """What a page measured, beside what the lesson reports.

    Attributes:
        what: is measured.
        lesson: its value in the lesson, as text.
        here: its value in this run.
        within: how far another run may be from it; 0: not at all.
    """

    what: str
    lesson: str
    here: float
    within: float


def start(jaxpt: str, text: str) -> None:
    """Enter the folder of a text, in which pages find what others have made, and set $TEXT.

    It may be run again, for another text.

    Args:
        jaxpt: a clone, from where the page was opened; its recipes become $RECIPES.
        text: KIND:WHERE, as in prepare.sources.
    """
    kind, _, where = text.partition(":")
    if kind in ("text", "jsonl", "parquet", "warc") and "://" not in where:
        text = f"{kind}:{PLACE / where}"
    folder = PLACE / f"course-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    programs = pathlib.Path(sys.executable).parent
    os.environ.update(
        TEXT=text,
        RECIPES=str((PLACE / jaxpt / "configs").resolve()),
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}",
        PYTHONWARNINGS="ignore",
    )
    folder.mkdir(exist_ok=True)
    os.chdir(folder)


def download(*names: str) -> list[str]:
    """Return links to models of the Hugging Face hub, or [] where it cannot be reached."""
    from jaxpt.spec import UserError
    from jaxpt.weights.hub import download_model

    if is_hub_reachable():
        try:
            return [link(download_model(f"hf:{name}"), name.split("/")[-1]) for name in names]
        except UserError as error:
            print(error)
    print("no model from the Hugging Face hub: this page makes a stand-in")
    return []


def link(directory: object, name: str) -> str:
    """Return the name of a link to a directory, made here."""
    if not os.path.lexists(name):
        os.symlink(str(directory), name)
    return name


def is_hub_reachable() -> bool:
    """Return whether the hub answers within HUB_TIMEOUT seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except OSError:
        return False
    return True


def choose_base() -> None:
    """Set $BASE: TinySolar from the hub, else its stand-in, runs/general.

    And what goes with it: $TOKENIZER; $SHAPE, a recipe with its sizes; $BATCH, sequences per step
    that a CPU trains on in a second.
    """
    found = download("upstage/TinySolar-248m-4k")
    base = found[0] if found else "runs/general"
    recipes = os.environ["RECIPES"]
    os.environ.update(
        BASE=base,
        TOKENIZER=base if found else "runs/general/tokenizer",
        SHAPE=f"{recipes}/course.py" if found else f"{recipes}/tiny_solar.py",
        BATCH="2" if found else "32",
    )
    print("base:", "TinySolar-248m-4k" if found else base)


def read_json(file: str) -> dict:
    """Return the content of a JSON file."""
    return json.loads(pathlib.Path(file).read_text(encoding="utf-8"))


def read_records(run: str, kind: str) -> list[dict]:
    """Return the records of a kind, train or heldout, of a run's metrics.jsonl."""
    lines = pathlib.Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if record["kind"] == kind]


def read_score(file: str, text: str) -> float:
    """Return bits per byte of a text in a results file of jaxpt evaluate."""
    return read_json(file)["results"][f"bits_per_byte/{text}"]["bits_per_byte,none"]


def show_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Show a table; numbers are grouped by thousands."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(format_cell(cell) for cell in row) + " |")
    display(Markdown("\n".join(lines)))


def format_cell(cell: object) -> str:
    """Return a cell's text."""
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell).replace("|", "\\|")


def show_key_figures(*figures: KeyFigure) -> None:
    """Show the page's figures beside the lesson's, and store them for the test of the pages."""
    lines = ["| | the lesson | this run | another run may differ by |", "|---|---|---|---|"]
    for what, lesson, here, within in figures:
        bound = f"± {format_cell(within)}" if within else "not at all"
        lines.append(f"| {what} | {lesson} | {format_cell(here)} | {bound} |")
    stored = {figure.what: {"here": figure.here, "within": figure.within} for figure in figures}
    display({"text/markdown": "\n".join(lines), FIGURES: stored}, raw=True)


def plot_losses(runs: dict[str, str]) -> None:
    """Plot each run's training loss, and its held-out losses by source, over the steps."""
    _, (left, right) = plt.subplots(1, 2, sharey=True, layout="constrained")
    for name, run in runs.items():
        records = read_records(run, "train")
        left.plot([r["step"] for r in records], [r["loss"] for r in records], label=name)
        heldout = read_records(run, "heldout")
        for source in sorted(heldout[0]["heldout_loss"]):
            losses = [r["heldout_loss"][source] for r in heldout]
            right.plot([r["step"] for r in heldout], losses, "o-", label=f"{name}, {source}")
    left.set(xlabel="step", ylabel="nats per token", title="training")
    right.set(xlabel="step", title="held out")
    left.legend()
    right.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    plt.show()


def plot_bars(unit: str, scores: dict[str, dict[str, float]]) -> None:
    """Plot a group of bars per text: scores[text][model]."""
    _, ax = plt.subplots(layout="constrained")
    models = list(next(iter(scores.values())))
    width = 0.8 / len(models)
    for i, model in enumerate(models):
        places = [x + (i - (len(models) - 1) / 2) * width for x in range(len(scores))]
        heights = [by_model[model] for by_model in scores.values()]
        bars = ax.bar(places, heights, width * 0.95, label=model)
        ax.bar_label(bars, fmt="%.2f", fontsize=8)
    ax.set_xticks(range(len(scores)), list(scores))
    ax.grid(visible=False, axis="x")
    ax.set(ylabel=unit)
    ax.margins(y=0.15)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    plt.show()


def plot_layers(maps: dict[str, Sequence[int]]) -> None:
    """Plot models as columns of layers, each colored by the layer that it comes from."""
    highest = max(max(layers) for layers in maps.values())
    _, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for x, layers in enumerate(maps.values()):
        for y, source in enumerate(layers):
            color = plt.get_cmap("viridis")(source / highest)
            ax.add_patch(plt.Rectangle((x - 0.3, y), 0.6, 0.9, color=color))
            ink = "black" if source > 0.6 * highest else "white"
            ax.text(x, y + 0.45, source, ha="center", va="center", color=ink, fontsize=8)
    ax.set_xticks(range(len(maps)), list(maps))
    ax.set(xlim=(-0.5, len(maps) - 0.5), ylim=(0, max(map(len, maps.values()))), ylabel="layer")
    ax.grid(visible=False)
    plt.show()
