"""Draw the pictures of README into docs/img.

    python docs/figures.py                        # pipeline.svg
    python docs/figures.py runs/base runs/child   # and quickstart.svg, of the quickstart's two runs

The second needs matplotlib.
"""

import html
import json
import pathlib
import sys

IMAGES = pathlib.Path(__file__).resolve().parent / "img"
STYLE = """
  .box { fill: #eef2ff; stroke: #6366f1; stroke-width: 1.5 }
  .core { fill: #c7d2fe }
  .name { font: 600 14px system-ui, sans-serif; fill: #1e1b4b; text-anchor: middle }
  .note { font: 12px system-ui, sans-serif; fill: #4b5563; text-anchor: middle }
  .arrow { stroke: #6b7280; stroke-width: 1.8; fill: none; marker-end: url(#head) }
  #head path { fill: #6b7280 }
  @media (prefers-color-scheme: dark) {
    .box { fill: #1e1b4b; stroke: #818cf8 }
    .core { fill: #3730a3 }
    .name { fill: #e0e7ff }
    .note { fill: #9ca3af }
  }
"""
HEAD = """<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"
 orient="auto"><path d="M0 0L8 4L0 8z"/></marker>"""
WIDTH, HEIGHT = 128, 40  # of a box
# name, what it does, x and y of the left upper corner, class
BOXES = (
    ("prepare", "rules, duplicates", 10, 40, "box"),
    ("train_tokenizer", "or adopt one", 168, 40, "box"),
    ("pack", "sequences", 326, 40, "box"),
    ("train", "resumes bit-equal", 484, 100, "box core"),
    ("initialize", "and grow", 326, 160, "box core"),
    ("export", "safetensors, GGUF", 642, 40, "box"),
    ("evaluate", "benchmarks, samples", 642, 160, "box"),
    ("report", "one page", 800, 100, "box"),
    ("plan", "memory, hours, cost", 168, 160, "box"),
)
ARROWS = (
    "M138 60H166",
    "M296 60H324",
    "M454 60H468V112H482",
    "M454 180H468V128H482",
    "M612 112H628V60H640",
    "M612 128H628V180H640",
    "M770 180H786V128H798",
    "M770 60H786V112H798",
)


def draw_pipeline() -> str:
    """Return the pipeline as SVG, in the colors of the reader's light or dark mode."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 232" role="img">',
        "<title>The pipeline: prepare, train_tokenizer and pack turn text into sequences; train "
        "reads them, from weights that initialize has grown; export, evaluate and report "
        "follow</title>",
        f"<style>{STYLE}</style><defs>{HEAD}</defs>",
        '<text class="note" x="74" y="24">text</text>',
        '<text class="note" x="390" y="150">weights, or random</text>',
    ]
    parts += [f'<path class="arrow" d="{path}"/>' for path in ARROWS]
    for name, note, x, y, kind in BOXES:
        middle = x + WIDTH / 2
        parts += [
            f'<rect class="{kind}" x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
            f'<text class="name" x="{middle}" y="{y + 25}">{html.escape(name)}</text>',
            f'<text class="note" x="{middle}" y="{y + 56}">{html.escape(note)}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def read_heldout(run: str) -> list[dict]:
    """Return the held-out records of a run's metrics.jsonl."""
    lines = pathlib.Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if record["kind"] == "heldout"]


def draw_quickstart(base: str, child: str, file: pathlib.Path) -> None:
    """Draw the base's layers becoming the child's, and the held-out losses of both."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "jaxpt", "axes.spines.top": False, "font.size": 10})
    plt.rcParams.update({"axes.spines.right": False})
    growth = json.loads(pathlib.Path(child, "growth.json").read_text(encoding="utf-8"))
    layer_map = growth["layer_map"]
    n_layers = growth["spec"]["parent"]["n_layers"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=(1, 2.6)
    )
    for x, layers in enumerate((range(n_layers), layer_map)):
        for y, source in enumerate(layers):
            color = plt.get_cmap("viridis")(0.15 + 0.7 * source / (n_layers - 1))
            left.add_patch(plt.Rectangle((x - 0.32, y), 0.64, 0.9, color=color))
            left.text(x, y + 0.45, source, ha="center", va="center", color="white")
    left.set(xlim=(-0.5, 1.5), ylim=(0, len(layer_map)), yticks=[])
    left.set_xticks((0, 1), ("base", "child"))
    left.spines["left"].set_visible(False)
    left.set_title("each layer's source")
    before, after = read_heldout(base), read_heldout(child)
    grown_at = before[-1]["step"]
    for source, color in (("prose", "tab:blue"), ("code", "tab:orange")):
        for records, offset in ((before, 0), (after, grown_at)):
            steps = [offset + record["step"] for record in records]
            losses = [record["heldout_loss"][source] for record in records]
            right.plot(steps, losses, "o-", color=color, markersize=4)
        right.annotate(f" {source} {losses[-1]:.2f}", (steps[-1], losses[-1]), color=color)
    right.axvline(grown_at, color="gray", linestyle=":")
    right.text(grown_at + 8, right.get_ylim()[1], "grown, then trained on code", va="top")
    right.set(xlabel="step", xlim=(0, 1.18 * steps[-1]), title="held-out loss, nats per token")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Draw the pipeline; with two run directories also the quickstart."""
    (IMAGES / "pipeline.svg").write_text(draw_pipeline(), encoding="utf-8")
    if runs := sys.argv[1:]:
        base, child = runs
        draw_quickstart(base, child, IMAGES / "quickstart.svg")


if __name__ == "__main__":
    main()
