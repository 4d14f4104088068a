"""One HTML page of one or several runs, made only from the JSON that stages leave in their directories, and prepare.py's samples of what it dropped.

The page asks no other host for anything, opens from a file, and stays under 2 MB. It is a list of sections (SECTIONS, below them): a room that
wants to be seen leaves its JSON, and adds here what `load_run` reads of it and one function from runs to HTML, "" where no run has that JSON.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import html
import itertools
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from jaxpt import config, stage
from jaxpt.lineage import STAGES, Node, lineage_of, own_stages, read_json
from jaxpt.plan import flops, hardware
from jaxpt.spec import ModelSpec, UserError

MAX_POINTS = 2_400  # of a figure's curves together; more cannot be told apart on a screen and would make the page heavy
MAX_TEXT = 2_000  # characters shown of a prompt or a sample
MAX_PROMPTS = 24  # shown of all samples
MAX_TWINS = 12  # pairs of copied layers
MAX_TOKENS = 256  # coloured, of each document on which two models differ
MAX_STRETCHES = 8  # of steps with skipped updates
MAX_DROPPED = 3  # documents shown that a rule dropped, of each source
MAX_EXCERPT = 600  # characters of each


def write(directories: Iterable[str | pathlib.Path], to: str | pathlib.Path) -> list[RunData]:
    """Write the page of these run directories, shown in this order, to the file `to`. Returns what was read of each.

    Raises UserError where a directory is not there or `to` is one.
    """
    to = stage.local_path(to)
    if to.is_dir():
        raise UserError(f"--to {to}: is a directory. Name the file to write, such as {to / 'report.html'}.")
    runs = load_runs(directories)
    to.parent.mkdir(parents=True, exist_ok=True)
    stage.write_whole(to, page(runs))
    return runs


# ---- what is read

COMPARED = ("samples", "differences")  # files in eval/ that compare.py writes


@dataclasses.dataclass
class RunData:
    """What a run directory's JSON says; None or empty where a file is missing, with a sentence in `notes` where one cannot be read.

    nodes    the lineage, oldest first; the last is the run itself
    stages   each of STAGES -> the manifests of this run's own, not of its parent's;  funnels: of its corpora
    train    metrics.jsonl's training records by step;  heldout: its held-out records;  marks: (step, "resumed" or "grown by ...")
    evals    eval/*.json by file stem, without samples.json and differences.json
    phases   (from step, {source: share}) of its mixture, [] where it is not known;  devices: of its last start, (number, kind)
    funnels hold "dropped" too: {rule: [{"id", "source", "text", "reason"}, ...]}
    """

    name: str
    directory: pathlib.Path
    manifest: dict | None
    config: dict | None
    spec: dict | None
    growth: dict | None
    plan: dict | None
    samples: dict | None
    differences: dict | None
    evals: dict[str, dict]
    train: list[dict]
    heldout: list[dict]
    marks: list[tuple[int, str]]
    nodes: list[Node]
    stages: dict[str, list[dict]]
    funnels: list[dict]
    phases: list[tuple[int, dict[str, float]]]
    devices: tuple[int, str] | None
    notes: list[str]


def load_runs(directories: Iterable[str | pathlib.Path]) -> list[RunData]:
    """The runs in the order given; those with one name are told apart by the directory above."""
    runs = [load_run(directory) for directory in dict.fromkeys(map(str, directories))]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.directory.parts[-2:])
    return runs


def load_run(directory: str | pathlib.Path) -> RunData:
    """Everything the page and the terminal table know of a run directory. Raises UserError where it is not there."""
    directory = stage.local_path(directory).resolve()
    if not directory.is_dir():
        raise UserError(f"--workdir {directory}: no such directory. Give the run directory that train.py or initialize.py wrote.")
    notes: list[str] = []
    read = functools.partial(read_json, notes=notes)
    nodes = lineage_of(directory, notes)
    own = own_stages(nodes)
    stages = {kind: [node.manifest for node in own if node.kind == kind] for kind in STAGES}
    settings = read(directory / "config.json")
    return RunData(
        name=directory.name,
        directory=directory,
        **{name: read(directory / f"{name}.json") for name in ("manifest", "spec", "growth", "plan")},
        config=settings,
        **{name: read(directory / "eval" / f"{name}.json") for name in COMPARED},
        evals={file.stem: found for file in sorted((directory / "eval").glob("*.json")) if file.stem not in COMPARED and (found := read(file))},
        **read_metrics(directory / "metrics.jsonl", notes),
        nodes=nodes,
        stages=stages,
        funnels=[{**node.funnel, "dropped": read_dropped(node.path / "dropped", notes)} for node in own if node.funnel],
        phases=read_phases(directory, settings, stages["packed"], notes),
        devices=read_devices(directory / "starts.jsonl"),
        notes=notes,
    )


def read_metrics(path: pathlib.Path, notes: list[str]) -> dict[str, list]:
    """RunData's train, heldout and marks. A step written twice, before a kill and after it, counts as written last."""
    train, heldout, marks, broken = {}, {}, [], []
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError, OverflowError):
            broken.append(number)
            continue
        if record.get("resumed"):
            marks.append((step, "resumed"))
        elif record.get("grown"):
            marks.append((step, f"grown by {record['grown']}"))
        elif isinstance(record.get("heldout"), dict):
            heldout[step] = record
        else:
            train[step] = record
    if broken == [len(lines)]:
        notes.append(f"{path}: the last line is half-written, as a running or killed run leaves it; left out.")
    elif broken:
        notes.append(f"{path}: {len(broken)} lines cannot be read, the first is line {broken[0]}; left out.")
    by_step = {"train": train, "heldout": heldout}
    return {name: [found[step] for step in sorted(found)] for name, found in by_step.items()} | {"marks": list(dict.fromkeys(marks))}


def read_dropped(directory: pathlib.Path, notes: list[str]) -> dict[str, list[dict]]:
    """{rule: samples of what it dropped}, MAX_DROPPED of each source, their texts cut at MAX_EXCERPT characters."""
    found = {}
    for file in sorted(directory.glob("*.parquet")):
        try:
            rows = pq.read_table(file, columns=["id", "source", "text", "reason"]).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors are of both kinds
            notes.append(f"{file}: cannot be read ({str(error).splitlines()[0]}); left out.")
            continue
        by_source: dict[str, list[dict]] = {}
        for row in rows:
            by_source.setdefault(str(row["source"]), []).append({**row, "text": clip(row["text"], MAX_EXCERPT)})
        found[file.stem] = [row for own in by_source.values() for row in own[:MAX_DROPPED]]
    return found


def read_phases(directory: pathlib.Path, settings: dict | None, packed: list[dict], notes: list[str]) -> list[tuple[int, dict[str, float]]]:
    """The shares in force from each step on, together 1: by the run's own account, else by its config, else in proportion to the rows."""
    try:
        account = directory / "phases.json"
        if account.is_file():
            asked = [(each["step"], each["shares"]) for each in json.loads(account.read_text())]
        else:
            rows = {name: part["rows"] for manifest in packed for name, part in manifest["counts"]["train"].items()}
            asked = (settings or {})["mixture"]["phases"] or ([(0, rows)] if rows else [])
        return [(int(step), {name: share / sum(shares.values()) for name, share in shares.items() if share}) for step, shares in asked]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if settings:
            notes.append(f"{directory}: its mixture cannot be read from phases.json, config.json or packed/manifest.json ({error!r}); left out.")
        return []


def read_devices(path: pathlib.Path) -> tuple[int, str] | None:
    """(number, JAX's name of their kind), of the last start that the file tells of."""
    try:
        number, _, kind = json.loads(path.read_text().splitlines()[-1])["devices"].partition(" x ")
        return int(number), kind
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


# ---- the numbers that matter, for the head of the page and for the terminal


def summary(runs: list[RunData]) -> list[tuple[str, str, list[str]]]:
    """Rows of (label, unit, one text for each run). A label that starts with two spaces belongs to the group above it."""
    rows = [
        ("parameters", "", [count(n_params(run)) for run in runs]),
        ("layers × width", "", [shape(run) for run in runs]),
        ("steps", "", [whole(last(run.train, "step")) for run in runs]),
        ("tokens", "", [count(last(run.train, "tokens")) for run in runs]),
        ("loss", "nats/token", [arrow(first(run.train, "loss"), last(run.train, "loss")) for run in runs]),
    ]
    groups = {
        "held-out": ("nats/token", [run.heldout[-1]["heldout"] if run.heldout else {} for run in runs], decimal),
        "bits per byte": ("", [bits_per_byte(run) for run in runs], decimal),
        "time": ("", [seconds_by_stage(run) for run in runs], duration),
    }
    order = [*domains_of(runs), *STAGES]
    for label, (unit, values, as_text) in groups.items():
        keys = in_order(order, (key for each in values for key in each))
        if keys:
            rows.append((label, unit, ["" for _ in runs]))
        rows += [("  " + key, "", [as_text(each.get(key)) for each in values]) for key in keys]
    rows.append(("cost", "USD", [decimal(last(run.train, "usd"), 2) for run in runs]))
    return [row for row in rows if any(row[2]) or row[0] in groups]


def table(runs: list[RunData], to: pathlib.Path) -> str:
    """The summary as text at most 100 columns wide, ending in the page's path."""
    lines = []
    for start in range(0, len(runs), 4):
        part = runs[start : start + 4]
        width = max(16, *(len(run.name) + 3 for run in part)) if len(part) < 4 else 18
        width = min(width, 76 // len(part))
        lines += [" " * 24 + "".join(f"{clip(run.name, width - 2):>{width}}" for run in part), "\u2500" * (24 + width * len(part))]
        lines += [
            f"{f'{label}, {unit}' if unit else label:24.24}" + "".join(f"{value:>{width}}" for value in values)
            for label, unit, values in summary(part)
        ]
        lines.append("")
    return "\n".join(line.rstrip() for line in [*lines, f"{to}  ({to.stat().st_size / 1e6:.2f} MB, opens in any browser)"])


def domains_of(runs: list[RunData]) -> list[str]:
    """Names of the held-out domains, in one order for the whole page: as the corpora name their sources, then as they turn up."""
    sources = [name for run in runs for found in run.funnels for name in found["sources"]]
    return list(dict.fromkeys([*sources, *(name for run in runs for record in run.heldout for name in record["heldout"])]))


def in_order(order: list, keys: Iterable) -> list:
    """The keys, each once: those named in `order` first and as there, the others as they come."""
    keys = list(dict.fromkeys(keys))
    return [*(key for key in order if key in keys), *(key for key in keys if key not in order)]


def n_params(run: RunData) -> int | None:
    """As the manifest counted them, else from the shape."""
    if run.manifest and run.manifest["counts"].get("n_params"):
        return run.manifest["counts"]["n_params"]
    try:
        return flops.n_params(ModelSpec.from_dict(run.spec)) if run.spec else None
    except (TypeError, ValueError):  # a spec of another version
        return None


def shape(run: RunData) -> str:
    return f"{run.spec['n_layers']} × {run.spec['d_model']}" if run.spec else ""


def bits_per_byte(run: RunData) -> dict[str, float]:
    """By domain, of the run's own evaluations; ours (jax) before the reference's (hf)."""
    found = {}
    for result in sorted(run.evals.values(), key=lambda result: result.get("backend") != "jax"):
        for task, scores in result.get("results", {}).items():
            if task.startswith("bits_per_byte/") and isinstance(scores, dict):
                found.setdefault(task.partition("/")[2], scores.get("bits_per_byte,none"))
    return found


def seconds_by_stage(run: RunData) -> dict[str, float]:
    found = {kind: sum(finite(manifest.get("seconds")) or 0 for manifest in manifests) for kind, manifests in run.stages.items()}
    found["train"] = (run.manifest or {}).get("seconds") if run.train and run.manifest else last(run.train, "seconds")
    found["eval"] = sum(finite(result.get("seconds")) or 0 for result in run.evals.values())
    return {name: seconds for name, seconds in found.items() if finite(seconds)}


def first(records: list[dict], key: str) -> float | None:
    return next((value for record in records if (value := finite(record.get(key))) is not None), None)


def last(records: list[dict], key: str) -> float | None:
    return first(records[::-1], key)


# ---- sections: runs -> HTML, "" where no run has what the section shows


def headline(runs: list[RunData]) -> str:
    lines = "".join(f'<p class="made">{swatch(i)}<span>{made(run)}</span></p>' for i, run in enumerate(runs))
    body = [[row_head(label, unit), *map(esc, values)] for label, unit, values in summary(runs)]
    caption = "Held-out: text kept out of training, mean over its tokens. Bits per byte: without the tokenizer's part in it, lower is better."
    return lines + grid(["", *(esc(run.name) for run in runs)], body, caption)


def row_head(label: str, unit: str = "") -> str:
    """A row's first cell; a label that starts with two spaces stands under the one above it."""
    unit = f" <small>{esc(unit)}</small>" if unit else ""
    return (f'<span class="in">{esc(label.strip())}</span>' if label.startswith("  ") else esc(label)) + unit


def made(run: RunData) -> str:
    """One sentence on what a run made and from what."""
    what = f"{count(n_params(run))} parameters" if n_params(run) else "a model of unknown size (no spec.json)"
    parts = [f"<strong>{esc(run.name)}</strong>: {esc(what)}"]
    if run.growth:
        step, operators = run.growth["at_step"], ", ".join(map(str, run.growth["operators"]))
        parts.append(esc((f"grown from {model_name(run.growth['parent'])}" if step is None else f"grown at step {whole(step)}") + f" by {operators}"))
    if run.train:
        tokens, seconds = last(run.train, "tokens"), last(run.train, "seconds")
        trained = f"trained {whole(run.train[-1]['step'])} steps"
        trained += f" on {count(tokens)} tokens" if tokens else ""
        parts.append(esc(trained + (f" in {duration(seconds)}" if seconds else "")))
        parts.append("loss " + arrow(first(run.train, "loss"), last(run.train, "loss")).replace(" ", "&nbsp;"))
    return ", ".join(parts) + "."


def lineage(runs: list[RunData]) -> str:
    nodes = list({node.key: node for run in runs for node in run.nodes}.values())
    if not any(node.manifest for node in nodes):
        return ""
    at = {node.key: i for i, node in enumerate(nodes)}
    named = {run.nodes[-1].key: (i, run) for i, run in enumerate(runs)}
    far = max((at[node.key] - at[parent] - 1 for node in nodes for parent in node.parents), default=0)
    row, x = 68, 8 + min(64, 16 * far)
    arcs, dots, items = [], [], []
    for node in nodes:
        y = at[node.key] * row + 22
        for parent in node.parents:
            above, skipped = at[parent] * row + 22, at[node.key] - at[parent] - 1
            bend = (x - 8) * skipped / max(1, far) * 4 / 3  # a cubic reaches 3/4 of the way to its control points
            arcs.append(f'<path d="M{x} {above} C{x - bend} {above + 18} {x - bend} {y - 18} {x} {y}"/>')
        i, run = named.get(node.key, (None, None))
        dots.append(f'<circle cx="{x}" cy="{y}" r="6" style="fill:{color(i) if run else "var(--muted)"}"/>')
        items.append(f"<li>{lineage_entry(node, run)}</li>")
    picture = f'<svg aria-hidden="true" width="{x + 10}" height="{len(nodes) * row}">{"".join(arcs + dots)}</svg>'
    caption = "The oldest at the top; a line leads from what was read to what was made of it. In grey: fingerprint, date (UTC), time it took."
    return f'<div class="lineage">{picture}<ol>{"".join(items)}</ol></div>{small(caption)}'


def lineage_entry(node: Node, run: RunData | None) -> str:
    manifest = node.manifest or {}
    date, _, clock = manifest.get("created", "")[:16].partition("T")
    facts = [
        f'{esc(node.key[:8])}<span class="clock">{esc(node.key[8:])}</span>' if manifest else "no manifest there",
        f'{esc(date)}<span class="clock"> {esc(clock)}</span>' if date else "",
        duration(manifest.get("seconds")),
        "made anew since it was read" if node.changed else "",
    ]
    name = run.name if run else node.path.name
    return f'<b>{esc(name)}</b> <span>{esc(size_of(node, run))}</span><br><small title="{esc(node.path)}">{" · ".join(filter(None, facts))}</small>'


def size_of(node: Node, run: RunData | None) -> str:
    """What a stage made, in a few words."""
    if run:
        return ", ".join(filter(None, [f"{count(n_params(run))} parameters" if n_params(run) else "", shape(run)]))
    counts = (node.manifest or {}).get("counts") or {}
    if node.funnel:
        kept = node.funnel["train"]
        return f"{whole(total(kept, 'rows'))} documents, {brief(total(kept, 'bytes') / 1e6)} MB"
    if node.kind == "tokenizer":
        return f"{whole(counts.get('n_pieces'))} pieces"
    if node.kind == "packed":
        return f"{count(total(counts.get('train') or {}, 'tokens'))} tokens, rows of {whole(counts.get('row_len'))}"
    return f"{count(counts['n_params'])} parameters" if "n_params" in counts else ""


def funnel(runs: list[RunData]) -> str:
    parts = []
    for funnels, names in distinct(runs, "funnels"):
        for found in funnels:
            for source in found["sources"]:
                parts.append(f"<h3>{esc(source)}{of_runs(names, runs)}</h3>{funnel_of(found, source)}{dropped(found, source)}")
    if not parts:
        return ""
    return "".join(parts) + small("Documents and text left after each rule, in the order applied. Share: of the text read, by bytes.")


def funnel_of(found: dict, source: str) -> str:
    """Read, left after each rule, and parted into training and held-out text. Where no rule was applied there is no column of what rules dropped."""
    steps = [(step["rule"].replace("_", " "), step["kept"].get(source, {})) for step in found["steps"]]
    rows = [kept.get("rows", 0) for _, kept in steps]
    dropped = ["", *(whole(before - after) for before, after in itertools.pairwise(rows))]
    labels = {"train": "kept for training", "heldout": "held out"}
    parts = [(label, found[part][source]) for part, label in labels.items() if source in found.get(part, {})]
    read = steps[0][1].get("bytes") if steps else None
    body = []
    for (label, kept), lost in itertools.zip_longest([*steps, *parts], dropped, fillvalue=""):
        share = bar(kept.get("bytes", 0) / read if read else 0)
        body.append([esc(label), whole(kept.get("rows")), *([lost] if len(steps) > 1 else []), decimal(kept.get("bytes", math.nan) / 1e6, 2), share])
    heads = ["rule", "documents", *(["dropped"] if len(steps) > 1 else []), "MB", "share"]
    return grid(heads, body, kind="funnel rules" if len(steps) > 1 else "funnel")


def dropped(found: dict, source: str) -> str:
    """Samples of what each rule dropped, folded, in the order of the rules."""
    parts = []
    for rule in in_order([step["rule"] for step in found["steps"]], found["dropped"]):
        rows = [row for row in found["dropped"][rule] if row["source"] == source]
        parts += [f"<h3>{esc(rule.replace('_', ' '))}</h3>"] if rows else []
        for row in rows:
            why = small(f"{row['id']}: {row['reason'] or 'no reason kept'}")
            parts.append(f'<div class="dropped">{why}<pre>{esc(row["text"])}</pre></div>')
    return details("Samples of what each rule dropped", "".join(parts)) if parts else ""


def mixture(runs: list[RunData]) -> str:
    names = in_order(domains_of(runs), (name for run in runs for _, shares in run.phases for name in shares))
    known = [run for run in runs if run.phases and run.train]
    figures, body = [], []
    for run in known:
        ends = [*(step for step, _ in run.phases[1:]), max(run.phases[-1][0], run.train[-1]["step"])]
        stretches = [(start, end, shares) for (start, shares), end in zip(run.phases, ends, strict=True)]
        series = [(name, [(step, shares.get(name, 0.0)) for start, end, shares in stretches for step in (start, end)]) for name in names]
        if len(stretches) > 1:
            figures.append(
                figure(curves(names, series, "share", 180, shares=True), "Share of the rows of each step.", run.name if len(runs) > 1 else "Shares")
            )
        for start, _, shares in stretches:
            body.append([esc(run.name), whole(start), *(f"{100 * shares[name]:.3g} %" if name in shares else "" for name in names)])
    if not body:
        return ""
    caption = "Share of the rows of each step, from the step named on; how often each source was read stands under Training."
    return (key_of(names) + pairs(figures) if figures else "") + grid(["run", "from step", *map(esc, names)], body, caption)


def losses(runs: list[RunData]) -> str:
    if not any(run.train or run.heldout for run in runs):
        return ""
    figures = []
    if any(run.train for run in runs):
        entropy = [value for run in runs if (value := unigram_entropy(run)) is not None]
        caption = "Training loss, nats per token, at each logged step."
        caption += " Dashed: guessing each token by its frequency alone (unigram entropy of the packed set)." if entropy else ""
        caption += " Dotted upright: the run was taken up again there." if any(what == "resumed" for run in runs for _, what in run.marks) else ""
        grown = [f" Upright: {run.name} was {what} at step {whole(step)}." for run in runs for step, what in run.marks if what != "resumed"]
        series = [(run.name, points(run.train, "loss")) for run in runs]
        figures.append(figure(over_steps(runs, series, "loss", 330, levels=entropy), caption + "".join(grown)))
    domains = [name for name in domains_of(runs) if any(name in record["heldout"] for run in runs for record in run.heldout)]
    small_ones = []
    for domain in domains:
        series, parent = ([(run.name, points(run.heldout, kind, domain)) for run in runs] for kind in ("heldout", "parent"))
        entropy = [value for run in runs if (value := unigram_entropy(run, domain)) is not None]
        caption = "Nats per token." + (" Thin: its parent on the same rows." if any(found for _, found in parent) else "")
        small_ones.append(figure(over_steps(runs, series, domain, 220, levels=entropy, thin_series=parent), caption, f"Held out: {domain}"))
    hint = '<p class="small hint">Drag moves a plot, shift and wheel zoom it, a double click brings the whole back.</p>'
    return key_of([run.name for run in runs]) + "".join(figures) + pairs(small_ones) + hint + details("The numbers", loss_table(runs, domains))


def loss_table(runs: list[RunData], domains: list[str]) -> str:
    body = []
    for run in runs:
        for text in (None, *domains):
            found = points(run.heldout, "heldout", text) if text else points(run.train, "loss")
            parent = points(run.heldout, "parent", text)[-1:] or [(0, None)]
            if found:
                values = [found[0][1], found[-1][1], unigram_entropy(run, text), parent[0][1]]
                body.append([esc(run.name), esc(text or "training"), *map(decimal, values)])
    return grid(["run", "text", "first", "last", "unigram", "parent"], body, "Nats per token.", texts=2)


def unigram_entropy(run: RunData, heldout: str | None = None) -> float | None:
    """Nats per token of the packed training set (mean over its sources, weighted by tokens), or of one held-out source."""
    sets = [manifest["counts"]["heldout" if heldout else "train"] for manifest in run.stages["packed"]]
    if heldout:
        return next((finite(each[heldout]["unigram_nats"]) for each in sets if heldout in each), None)
    parts = [part for each in sets for part in each.values() if finite(part.get("unigram_nats")) is not None]
    tokens = sum(part["tokens"] for part in parts)
    return sum(part["unigram_nats"] * part["tokens"] for part in parts) / tokens if tokens else None


def training(runs: list[RunData]) -> str:
    if not any(run.train for run in runs):
        return ""
    figures = []
    for key, title, says, scale in (
        ("lr", "Learning rate", "Of the update at each logged step.", "linear"),
        ("grad_norm", "Gradient norm", "Of the whole gradient, before clipping. Log scale.", "log"),
        ("tokens_per_second", "Speed", "Tokens per second, all devices together.", "linear"),
        ("mfu", "Model FLOP/s utilisation", "The model's own arithmetic as a share of the devices' peak.", "linear"),
    ):
        series = [(run.name, points(run.train, key)) for run in runs]
        if any(value for _, found in series for _, value in found):
            figures.append(figure(over_steps(runs, series, title.lower(), 200, scale=scale), says, title))
    body = []
    for run in runs:
        epochs = next((record["epochs"] for record in run.train[::-1] if isinstance(record.get("epochs"), dict)), {})
        speeds = sorted(value for record in run.train if (value := finite(record.get("tokens_per_second"))) is not None)
        memory = max((finite(record.get("memory_bytes")) or 0 for record in run.train), default=0)
        body.append([
            esc(run.name), whole(speeds[len(speeds) // 2]) if speeds else "", f"{memory / 1e9:.2f}" if memory else "",
            whole(last(run.train, "n_skipped")), esc(", ".join(f"{name} {decimal(epochs[name], 2)}" for name in in_order(domains_of(runs), epochs) if epochs[name])),
        ])  # fmt: skip
    heads = ["run", "tokens/s, median", "peak memory, GB", "steps skipped", "times each source was read"]
    return key_of([run.name for run in runs]) + pairs(figures) + grid(heads, body) + skips(runs)


def skips(runs: list[RunData]) -> str:
    """Between which logged steps updates were skipped, and how to see the documents that they read."""
    lines = []
    for run in runs:
        counts = [(0, 0), *points(run.train, "n_skipped")]
        stretches = [f"{whole(b - a)} in steps {whole(start + 1)} to {whole(end)}" for (start, a), (end, b) in itertools.pairwise(counts) if b > a]
        more = f" and {len(stretches) - MAX_STRETCHES} stretches more" if len(stretches) > MAX_STRETCHES else ""
        if stretches:
            ask = f"python scripts/trace.py --workdir {run.directory} --step N"
            lines.append(f"{esc(run.name)}: {', '.join(stretches[:MAX_STRETCHES])}{more}. The documents of a step: <code>{esc(ask)}</code>")
    why = "Skipped updates: the loss or the gradient was not finite, or the gradient's norm was a spike; weights and moments stayed as they were."
    return small(why) + '<ul class="small">' + "".join(f"<li>{line}</li>" for line in lines) + "</ul>" if lines else ""


def forgetting(runs: list[RunData]) -> str:
    """How far each domain's held-out loss is from the parent's on the same rows."""
    figures, body = [], []
    domains = [name for name in domains_of(runs) if any(name in (record.get("parent") or {}) for run in runs for record in run.heldout)]
    for run in runs:
        rise = {
            name: [(record["step"], child - parent) for record in run.heldout
                   if (child := finite(record["heldout"].get(name))) is not None and (parent := finite((record.get("parent") or {}).get(name))) is not None]
            for name in domains
        }  # fmt: skip
        if not any(rise.values()):
            continue
        limit = finite(((run.config or {}).get("train") or {}).get("max_forgetting")) or None
        levels = [0.0] if limit is None else [0.0, limit]
        plot = over_steps([run], list(rise.items()), "above the parent", 220, levels=levels, level_name="", names=domains)
        caption = "Held-out loss above the parent's on the same rows, nats per token; below the dashed line it is better than its parent."
        figures.append(figure(plot, caption + (f" Upper dashed line: {limit:g}, what train.max_forgetting allows." if limit else ""), run.name))
        for name, found in rise.items():
            if found:
                worst = max(found, key=lambda point: point[1])
                ends = [f"{found[0][1]:+.3f}", f"{worst[1]:+.3f} <small>step {whole(worst[0])}</small>", f"{found[-1][1]:+.3f}"]
                body.append([esc(run.name), esc(name), *ends])
    if not body:
        return ""
    heads = ["run", "text", "first", "worst", "last"]
    return key_of(domains) + "".join(figures) + grid(heads, body, "Nats per token above the parent; above 0, the child has forgotten.", texts=2)


def growth(runs: list[RunData]) -> str:
    parts = []
    for found, names in distinct(runs, "growth"):
        when = "" if found["at_step"] is None else f", at step {whole(found['at_step'])} of the run"
        parts.append(f"<h3>{esc(', '.join(found['operators']) + when)}{of_runs(names, runs)}</h3>")
        health, _, why = found["verdict"].replace("->", "\u2192").rstrip(".").partition(":")
        parts.append(f"<p><strong>{esc(health[:1].upper() + health[1:])}</strong>{esc(f':{why}' if why else '')}.</p>")
        columns = [growth_map(found), growth_facts(found, domains_of(runs))]
        columns[len(found["layer_map"]) > 14] += growth_twins(found)  # below the shorter of the two
        parts.append(f'<div class="split"><div>{columns[0]}</div><div>{columns[1]}</div></div>' if columns[0] else columns[1])
        parts.append(growth_layers(found))
    return "".join(parts)


def growth_map(found: dict) -> str:
    """A line from each parent layer to the child layers made from it; "" where every layer stayed where it was."""
    sources, new = found["layer_map"], found["new_layers"]
    n_parent, n_child = found["spec"]["parent"]["n_layers"], len(sources)
    if sources == list(range(n_parent)):
        return ""
    n_rows = max(n_parent, n_child)
    row, right, wide = 24 if n_rows <= 24 else 14, 190, 84

    def top(i, n):
        return 24 + row * i + row * (n_rows - n) / 2

    def cell(x, y, label, kind):
        return (
            f'<rect class="{kind}" x="{x + 1}" y="{y:.0f}" width="{wide}" height="{row - 4}" rx="3"/>'
            f'<text x="{x + wide / 2}" y="{y + row / 2 + 2:.0f}" text-anchor="middle">{esc(label)}</text>'
        )

    cells = [cell(0, top(i, n_parent), f"layer {i}", "" if i in sources else "unused") for i in range(n_parent)]
    lines = []
    for i, source in enumerate(sources):
        kind = "new" if i in new else ""
        cells.append(cell(right, top(i, n_child), f"{i} new" if source is None else f"{i} from {source}", kind))
        if source is not None:
            y0, y1, middle = top(source, n_parent) + row / 2 - 2, top(i, n_child) + row / 2 - 2, (wide + right) / 2
            lines.append(f'<path class="{kind}" d="M{wide + 2} {y0:.0f} C{middle} {y0:.0f} {middle} {y1:.0f} {right} {y1:.0f}"/>')
    alt = f"{n_parent} layers became {n_child}; child layers come from parent layers {told(['none' if source is None else source for source in sources])}"
    alt += f"; new are child layers {told(new)}" if new else ""
    heads = f'<text x="0" y="12">parent</text><text x="{right}" y="12">child</text>'
    caption = "Layer 0 reads the embedding." + (" Coloured: new layers." if new else "")
    caption += " Dashed: left out." if set(range(n_parent)) - set(sources) else ""
    size = f'width="{right + wide + 2}" height="{row * n_rows + 24}"'
    picture = f'<svg class="map" role="img" aria-label="{esc(alt)}" {size}>{heads}{"".join(lines + cells)}</svg>'
    return f"<figure>{picture}<figcaption>{esc(caption)}</figcaption></figure>"


def growth_facts(found: dict, domains: list[str]) -> str:
    """Sizes and held-out losses of parent and newborn, and what else is known in a sentence."""
    labels = {"n_layers": "layers", "d_model": "width", "d_ff": "feed-forward width", "n_heads": "heads", "n_kv_heads": "key-value heads"}
    labels |= {"d_head": "head width", "vocab_size": "vocabulary"}
    sizes = [("parameters", count, found["n_params"]), ("FLOPs a token", count, found["flops_per_token"] or {})]
    sizes += [(label, whole, {who: found["spec"][who].get(key) for who in ("parent", "child")}) for key, label in labels.items()]
    rows = []
    for label, as_text, of in sizes:
        before, after = of.get("parent"), of.get("child")
        if before != after or label in ("parameters", "layers"):
            rows.append([label, as_text(before), as_text(after), f"\u00d7 {after / before:.2f}"])
    loss, probe = found["heldout_loss"], found["probe"]
    steps = f"{whole(probe['steps'])} steps" if probe else ""
    for label, both in (("loss at birth", loss), (f"loss after {steps}", probe)):
        rows += [[label, "", "", ""]] if both else []
        for name in in_order(domains, both["parent"]) if both else ():
            before, after = both["parent"][name], both["newborn"][name]
            rows.append([row_head("  " + name), f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"])
    caption = f"Held-out loss, nats per token, on {whole(found['heldout_rows'])} rows, at birth" if loss else "Held-out loss at birth: not measured"
    caption += f"; then after a probe, the same {steps} of training for both." if probe else "."
    facts = [f"The operators {'' if found['preserves_function'] else 'do not '}preserve the function."]
    difference = found["max_logit_difference"]
    facts += [f"Largest difference of a logit from the parent's: {difference:.3g}."] if difference is not None else []
    facts += [f"The optimizer's moments: {found['moments']}."] if found["moments"] else []
    seen = [small(clip(f"Measured {key.replace('_', ' ')}: {told(value)}", MAX_TEXT)) for key, value in found["measured"].items()]
    table = grid(["", "parent", "newborn", "change"], rows, caption + " The loss at birth does not rank operators.")
    return table + small(" ".join(facts)) + "".join(seen)


def growth_layers(found: dict) -> str:
    """What each layer does to the residual stream, the parent's beside the newborn's."""
    layers, who = found["layers"], ["parent", "newborn"]
    if not layers:
        return ""
    figures = []
    for key, title, says, scale in (
        ("rms", "Residual stream", "RMS after each layer. Log scale.", "log"),
        ("influence", "Block influence", "1 \u2212 mean cosine between what enters a layer and what leaves it (ShortGPT).", "linear"),
    ):
        series = [(name, [(i, layer[key]) for i, layer in enumerate(layers[name])]) for name in who]
        dots = [("newborn", [(i, layers["newborn"][i][key]) for i in found["new_layers"]])]
        plot = curves(who, series, title.lower(), 200, x="layer", dots=dots, scale=scale)
        figures.append(figure(plot, says + (" Dots: new layers." if found["new_layers"] else ""), title))
    both = enumerate(itertools.zip_longest(*(layers[name] for name in who), fillvalue={}))
    body = [[str(i), *(decimal(layer.get(key)) for key in ("rms", "influence") for layer in pair)] for i, pair in both]
    heads = ["layer", "RMS, parent", "newborn", "influence, parent", "newborn"]
    return key_of(who) + pairs(figures) + details("The numbers", grid(heads, body))


def growth_twins(found: dict) -> str:
    """Copies of one parent layer, those that differ most first."""
    twins = sorted(found["twins"] or [], key=lambda twin: twin["cosine"])
    body = [[whole(twin["source"]), esc(told(twin["layers"])), f"{twin['cosine']:.3f}"] for twin in twins[:MAX_TWINS]]
    caption = f"Cosine between what both copies write, mean over tokens; 1: they still do the same. Lowest first, {len(body)} of {len(twins)}."
    return grid(["parent layer", "copies", "cosine"], body, caption) if body else ""


def told(value: Any) -> str:
    """JSON in words: real numbers in three digits, lists and objects with commas."""
    if isinstance(value, dict):
        value = [f"{key} {told(each)}" for key, each in value.items()]
    if isinstance(value, list):
        return ", ".join(map(told, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def evaluation(runs: list[RunData]) -> str:
    columns: dict[tuple[str, str], dict] = {}  # (model's path, backend) -> {(task, metric): (score, error, n)}
    seconds: dict[tuple[str, str], float] = {}
    for run in runs:
        for result in run.evals.values():
            key = (str(result.get("model", run.name)), str(result.get("backend", "")))
            seconds[key] = seconds.get(key, 0) + (finite(result.get("seconds")) or 0)
            scores = columns.setdefault(key, {})
            for task, metrics in result.get("results", {}).items():
                scores.update({(task, metric): value for metric, value in scores_of(result, task, metrics)})
    if not columns:
        return ""
    columns = dict(sorted(columns.items(), key=lambda item: (model_order(item[0][0], runs), item[0][1] == "hf")))
    names = column_names(list(columns))
    domains = [(f"bits_per_byte/{name}", "bits_per_byte") for name in domains_of(runs)]
    keys = in_order(domains, (key for scores in columns.values() for key in scores))
    has_error = any(error is not None for scores in columns.values() for _, error, _ in scores.values())
    body = []
    for task, metric in keys:
        found = [scores.get((task, metric)) for scores in columns.values()]
        n = next((each[2] for each in found if each and each[2]), None)
        label = f"{esc(task.removeprefix('bits_per_byte/'))} <small>{esc(metric.replace('_', ' '))}{f', {whole(n)} items' if n else ''}</small>"
        body.append([label, *(score_text(*each) if each else "" for each in found)])
    body.append(["time", *(duration(seconds[key] or None) for key in columns)])
    caption = "Bits per byte: lower is better." + (" Benchmarks: higher is better, ± one standard error." if has_error else "")
    caption += " jax: our code; hf: the exported model in transformers." + backends_differ(columns)
    heads = [f"{esc(name)}<br>{esc(backend)}" for name, backend in names]
    return (
        grid(["", *heads], body, caption)
        + (benchmarks(columns, names) if has_error else "")
        + contaminated(runs, dict(zip(columns, names, strict=True)))
    )


def contaminated(runs: list[RunData], names: dict[tuple[str, str], tuple[str, str]]) -> str:
    """Benchmark items that stand in the text a model was trained on, and its scores without them."""
    body, short, unknown, quotes = [], 0, [], []
    for result in (result for run in runs for result in run.evals.values() if result.get("contamination")):
        found, name = result["contamination"], " ".join(names[str(result["model"]), str(result["backend"])])
        unknown += found["unknown"]
        for task, each in found["tasks"].items():
            short = max(short, each["short"])
            quotes += [f"{task}, item {quote['item']}, in {quote['document']}: {clip(quote['shared'], 200)}" for quote in each["examples"]]
            ours = dict(scores_of(result, task, result["results"][task]))
            without = dict(scores_of(result, task, each["without"]))
            for metric, (score, error, _) in ours.items():
                shown = score_text(*without[metric]) if metric in without and each["overlapping"] else ""
                label = f"{esc(task)} <small>{esc(metric.replace('_', ' '))}</small>"
                body.append([label, esc(name), f"{whole(each['overlapping'])} of {whole(each['items'])}", score_text(score, error, 0), shown])
    if not body:
        return ""
    caption = "Items that share 13 words in a row with a document the model was trained on, found by following its lineage to the corpora."
    caption += f" At most {whole(short)} items of a task have fewer words, so nothing can be found of them." if short else ""
    caption += "".join(f" Not looked at: {why}" for why in dict.fromkeys(unknown))
    table = grid(["", "model", "overlap", "score", "without them"], body, caption, texts=2)
    listed = "".join(f"<li>{esc(quote)}</li>" for quote in dict.fromkeys(quotes))
    return f"<h3>Seen in training</h3>{table}" + (details("What they share", f'<ul class="small">{listed}</ul>') if quotes else "")


def backends_differ(columns: dict) -> str:
    """How far our numbers are from the reference's, where a model was scored by both."""
    differences = []
    for (model, backend), ours in columns.items():
        theirs = columns.get((model, "hf"), {}) if backend == "jax" else {}
        differences += [abs(ours[key][0] - theirs[key][0]) for key in ours.keys() & theirs.keys()]
    if not any(differences):
        return " They are equal." if differences else ""
    return f" They differ by {max(differences):.0e} at most."


def score_text(score: float, error: float | None, n: int) -> str:
    return decimal(score) + (f" <small>± {decimal(error)}</small>" if error is not None else "")


def scores_of(result: dict, task: str, metrics: dict) -> Iterable[tuple[str, tuple]]:
    """("acc", (score, standard error or None, number of items)) for each metric that the harness reports of a task."""
    n = (result.get("n-samples") or {}).get(task) or {}
    for name, value in metrics.items():
        metric, _, rule = name.partition(",")
        if rule and not metric.endswith("_stderr") and finite(value) is not None:
            error = finite(metrics.get(f"{metric}_stderr,{rule}"))
            yield metric if rule == "none" else f"{metric}, {rule}", (value, error, n.get("effective") if isinstance(n, dict) else n)


def benchmarks(columns: dict, names: list[tuple[str, str]]) -> str:
    """Scores with their standard error, drawn: a colour for each model, hollow where transformers computed them."""
    values = []
    for (name, backend), scores in zip(names, columns.values(), strict=True):
        for (task, metric), (score, error, _) in scores.items():
            if error is not None:
                where = {"task": f"{task} {metric}", "column": f"{name} {backend}", "model": name, "backend": backend}
                values.append({**where, "score": score, "low": score - error, "high": score + error})
    models = list(dict.fromkeys(name for name, _ in names))
    by_model = {"field": "model", "type": "nominal", "legend": None, "scale": palette(models)}
    hollow = {"test": "datum.backend === 'hf'", "value": "var(--bg)"}
    axis = {"type": "quantitative", "title": "score", "scale": {"zero": False}}
    tooltip = [{"field": field, "type": "nominal"} for field in ("task", "column")]
    tooltip += [{"field": field, "type": "quantitative", "format": ".3f"} for field in ("score", "low", "high")]
    point = {"x": {"field": "score", **axis}, "fill": {"condition": hollow, **by_model}, "stroke": by_model, "tooltip": tooltip}
    spec = {
        "height": 45 + 14 * len(values) + 20 * len({value["task"] for value in values}),
        "data": {"values": values},
        "encoding": {
            "y": {"field": "task", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 130}},
            "yOffset": {"field": "column", "sort": [f"{name} {backend}" for name, backend in names]},
        },
        "layer": [
            {"mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": {"x": {"field": "low", **axis}, "x2": {"field": "high"}, "color": by_model}},
            {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1, "strokeWidth": 1.5}, "encoding": point},
        ],
    }
    caption = "One standard error to either side; where bars overlap, the difference may be chance."
    return key_of(models) + figure(spec, caption + (" Hollow: hf." if any(value["backend"] == "hf" for value in values) else ""))


def column_names(keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(run's name, backend); with the end of the path where two columns would read the same."""
    names = [(model_name(model), backend) for model, backend in keys]
    ends = ["/".join(pathlib.PurePath(model).parts[-3:]) for model, _ in keys]
    return [(end, name[1]) if names.count(name) > 1 else name for name, end in zip(names, ends, strict=True)]


def model_name(path: str) -> str:
    """The run's name of runs/base, runs/base/hf and runs/base/checkpoints/300."""
    place = pathlib.PurePath(path)
    if place.name == "hf":
        place = place.parent
    elif place.parent.name == "checkpoints":
        place = place.parent.parent
    return place.name or path


def model_order(path: str, runs: list[RunData]) -> int:
    names = [run.directory.name for run in runs]
    return names.index(model_name(path)) if model_name(path) in names else len(names)


def samples(runs: list[RunData]) -> str:
    parts = []
    files = distinct(runs, "samples")
    shown = max(1, MAX_PROMPTS // max(1, len(files)))
    for found, _ in files:
        settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in (found.get("settings") or {}).items() if value is not None)
        for prompt in found["prompts"][:shown]:
            outputs = "".join(sample(output, runs) for output in prompt["outputs"])
            parts.append(f'<div class="prompt"><pre>{esc(clip(prompt["prompt"], MAX_TEXT))}</pre><div class="outputs">{outputs}</div></div>')
        note = f" {more} more prompts are in eval/samples.json." if (more := len(found["prompts"]) - shown) > 0 else ""
        if scores := found.get("bits_per_byte"):
            models = list(dict.fromkeys(name for each in scores.values() for name in each))
            rows = [[code(file), *(decimal(each.get(name)) for name in models)] for file, each in scores.items()]
            parts.append(grid(["bits per byte", *map(esc, models)], rows))
        parts.append(small(f"Each model's continuation of the prompt above it. {settings[:1].upper()}{settings[1:]}.{note}"))
    return "".join(parts)


def differences(runs: list[RunData]) -> str:
    """Documents on which two models differ most, each token coloured by how much likelier or less likely the child finds it."""
    parts = []
    for found, _ in distinct(runs, "differences"):
        parent, child = (esc(model_name(str(name))) for name in found["models"])
        for side, says in (("better", "likelier"), ("worse", "less likely")):
            parts += [f"<h3>What {child} finds {says} than {parent}</h3>"] if found[side] else []
            parts += [different(each) for each in found[side]]
        parts.append(small(
            f"Of {whole(found['documents'])} documents, each read up to {whole(found['max_length'])} tokens, those whose mean loss differs most, "
            f"and of each the {MAX_TOKENS} tokens that differ most. Resting on a token says its loss by both."
        ))  # fmt: skip
    return DIFFERENCE_KEY + "".join(parts) if parts else ""


def different(found: dict) -> str:
    """One document: its mean losses, and its text in colours."""
    cells = []
    for piece, before, after in itertools.islice(zip(found["pieces"], *found["losses"], strict=True), MAX_TOKENS):
        level = min(3, int(abs(after - before) / 0.7))  # nats: each shade is another factor of two
        text = esc(piece)
        cells.append(f'<i class="{"b" if after < before else "w"}{level}" title="{before:.2f} \u2192 {after:.2f}">{text}</i>' if level else text)
    before, after = found["nats"]
    start = f", from token {whole(found['first_token'])}" if found["first_token"] else ""
    head = f"{found['source']}, {found['id']}: {before:.3f} \u2192 {after:.3f} nats a token over {whole(found['tokens'])} tokens{start}"
    return f'<div class="tokens">{small(head)}<pre>{"".join(cells)}</pre></div>'


def sample(output: dict, runs: list[RunData]) -> str:
    tokens, seconds = finite(output.get("tokens")), finite(output.get("seconds"))
    speed = f"{whole(tokens)} tokens, {brief(tokens / seconds)} a second" if tokens and seconds else ""
    name = model_name(str(output["model"]))
    i = model_order(name, runs)
    return f"<div><h3>{swatch(i) if i < len(runs) else ''}{esc(name)}</h3><pre>{esc(clip(output['text'].lstrip(' ').strip(chr(10)), MAX_TEXT))}</pre>{small(speed)}</div>"


def plan(runs: list[RunData]) -> str:
    parts = []
    for found, names in distinct(runs, "plan"):
        body = []
        for target in found["targets"]:
            peak = finite(target.get("peak_bytes_per_device"))
            body.append([
                esc(target.get("on", "")), esc(target.get("method", "")), whole(target.get("devices")), "yes" if target.get("fits") else "no",
                f"{peak / 1e9:,.1f}" if peak is not None else "", span(target, "mfu", percent), span(target, "tokens_per_second", count),
                span(target, "hours", brief), span(target, "usd", brief),
            ])  # fmt: skip
        took = [run for run in runs if run.name in names and finite(last(run.train, "seconds"))]
        body += [spent(run) for run in took]
        priced = [target for target in found["targets"] if finite(target.get("hours")) and finite(target.get("usd"))]
        parts.append(f"<h3>{esc(', '.join(names))}</h3>" if len(runs) > 1 else "")
        if len(priced) > 1:
            parts.append(figure(plan_chart(priced), "Money against hours for the whole run, both on a log scale. Hollow: it does not fit there."))
        caption = "Compiled: the real step, compiled for that machine; estimated: from the shape alone. Ranges: the ends of the assumed efficiency."
        caption += " Measured: what the run has taken so far." + "".join(against_plan(run, found) for run in took) if took else ""
        head = ["on", "how known", "devices", "fits", "GB a device", "MFU", "tokens/s", "hours", "USD"]
        parts.append(grid(head, body, caption, texts=2) if body else "")
        parts += [
            small(f"{what.capitalize()} that fits, by plan.py --search: {best_of(found, what)}")
            for what in ("cheapest", "fastest")
            if best_of(found, what)
        ]
        parts.append(ways(found["ways"]) if isinstance(found.get("ways"), dict) else "")
        parts.append(checked(found["check"]) if isinstance(found.get("check"), list) else "")
        parts += [small(note) for note in found.get("notes", [])]
    return "".join(parts)


def best_of(found: dict, what: str) -> str:
    best = (found.get("search") or {}).get(what) or {}
    return f"{best['on']} {' '.join(best.get('overrides') or [])}" if best.get("on") else ""


def ways(found: dict) -> str:
    """Grow or scratch, as plan.py --base compared them."""
    pair = lambda way, key, as_text: "\u2013".join(dict.fromkeys(esc("never" if end is None else as_text(end)) for end in way.get(key) or [])) or ""  # noqa: E731
    body = [
        [esc(way.get("name", "")), pair(way, "tokens", count), pair(way, "saved", percent), pair(way, "saved_with_base", percent), pair(way, "hours", brief), pair(way, "usd", brief)]
        for way in found.get("ways", [])
    ]  # fmt: skip
    caption = f"Ways to {found.get('target_loss', 0):.3f} nats a token. Shares of FLOPs saved against scratch, from published ranges unless runs were fitted. {found.get('verdict', '')}"
    return grid(["way", "tokens", "saved", "saved, base paid", "hours", "USD"], body, caption, texts=1)


def checked(found: list[dict]) -> str:
    """Plan beside run, as plan.py --check held them."""
    body = [
        [esc(each.get("run", "")), *(brief(each.get(key)) for key in ("planned_step_seconds", "measured_step_seconds", "time_ratio", "calibrated_time_ratio", "memory_ratio", "calibrated_memory_ratio"))]
        for each in found
    ]  # fmt: skip
    head = ["run", "planned s", "measured s", "ratio", "calibrated", "memory ratio", "calibrated"]
    return grid(
        head, body, "The plan held against runs: seconds of a step and peak memory, measured over planned; the first run calibrates.", texts=1
    )


def spent(run: RunData) -> list[str]:
    """What a run took, as a row of the plan's table."""
    number, kind = run.devices or (None, "")
    speed, memory = [value for _, value in points(run.train, "tokens_per_second")], last(run.train, "memory_bytes")
    mfu = finite(last(run.train, "mfu"))
    cells = [
        whole(number),
        "",
        f"{memory / 1e9:,.1f}" if memory else "",
        percent(mfu) if mfu else "",
        count(statistics.median(speed)) if speed else "",
    ]
    return [esc(kind or run.name), "measured", *cells, brief(last(run.train, "seconds") / 3600), brief(last(run.train, "usd"))]


def against_plan(run: RunData, found: dict) -> str:
    """The run's pace beside what was planned for the machine that it ran on; "" where no such machine was planned for."""
    chip = hardware.chip_for(run.devices[1]) if run.devices else None
    trained, asked = last(run.train, "tokens"), finite(found.get("tokens"))
    if not (chip and trained and asked):
        return ""
    pace = last(run.train, "seconds") / 3600 * asked / trained
    for target in found["targets"]:
        if target["on"].partition(":")[0] == chip.name and target.get("devices") == run.devices[0] and finite(target.get("hours")):
            planned = f"planned on {target['on']} were {span(target, 'hours', brief)} hours and {span(target, 'usd', brief) or 'no'} USD"
            price = f" and {brief(pace * run.devices[0] * chip.usd_per_hour)} USD" if chip.usd_per_hour else ""
            return f" {run.name}: {planned} for {count(asked)} tokens; at the measured pace it is {brief(pace)} hours{price}."
    return ""


def span(target: dict, key: str, as_text: Callable) -> str:
    """145–208, or the one number where no range was given."""
    ends = sorted(value for end in ("low", "high") if (value := finite((target.get(end) or {}).get(key))) is not None)
    texts = dict.fromkeys(map(as_text, ends if len(ends) == 2 else [target.get(key)]))
    return "\u2013".join(map(esc, texts))


def plan_chart(targets: list[dict]) -> dict:
    values = [{"on": str(each.get("on")), "hours": each["hours"], "usd": each["usd"], "fits": bool(each.get("fits"))} for each in targets]
    axis = {"type": "quantitative", "scale": {"type": "log", "padding": 40, "nice": False}, "axis": {"values": ROUND, "format": ",.4~r"}}
    fill = {"condition": {"test": "datum.fits", "value": color(0)}, "value": "var(--bg)"}
    tooltip = [{"field": "on", "type": "nominal"}, *({"field": field, "type": "quantitative", "format": ",.3~r"} for field in ("hours", "usd"))]
    return {
        "height": 290,
        "data": {"values": values},
        "encoding": {"x": {"field": "hours", "title": "hours", **axis}, "y": {"field": "usd", "title": "USD", **axis}},
        "layer": [
            {"mark": {"type": "point", "filled": True, "size": 70, "opacity": 1, "stroke": color(0)}, "encoding": {"fill": fill, "tooltip": tooltip}},
            {"mark": {"type": "text", "align": "left", "dx": 9}, "encoding": {"text": {"field": "on", "type": "nominal"}}},
        ],
    }


def settings(runs: list[RunData]) -> str:
    known = {run.name: leaves(run.config) for run in runs if run.config}
    if not known:
        return ""
    caption = "Settings that differ between the runs; all others are the same."
    if len(known) == 1:
        known = {"default": leaves(stage.plain(config.Config())), **known}
        caption = "Settings that differ from the defaults; configs/base.py says what each means."
    rows = {key: [code(each.get(key)) for each in known.values()] for tree in known.values() for key in tree}
    body = [[f"<code>{esc(key).replace('.', '.<wbr>')}</code>", *row] for key, row in rows.items() if len(set(row)) > 1]
    return grid(["", *map(esc, known)], body, caption, texts=1 + len(known)) if body else small("No setting differs.")


def leaves(tree: dict[str, dict]) -> dict[str, Any]:
    """{"train": {"steps": 3}} -> {"train.steps": 3}"""
    return {f"{section}.{knob}": value for section, knobs in tree.items() for knob, value in knobs.items()}


DIFFERENCE_KEY = (
    '<p class="legend tokens"><span><i class="b1">0.7</i> <i class="b2">1.4</i> <i class="b3">2.1</i> nats likelier</span>'
    '<span><i class="w1">0.7</i> <i class="w2">1.4</i> <i class="w3">2.1</i> nats less likely</span></p>'
)


class Section(NamedTuple):
    title: str
    html: Callable[[list[RunData]], str]
    wants: str  # the JSON it shows and what writes it: said where no run has it


SECTIONS = (
    Section("Summary", headline, "a run directory"),
    Section("Lineage", lineage, "manifest.json, written by every stage that finished"),
    Section("Data", funnel, "corpus/funnel.json, written by prepare.py"),
    Section("Mixture", mixture, "metrics.jsonl beside config.json, written by train.py"),
    Section("Loss", losses, "metrics.jsonl, written by train.py"),
    Section("Forgetting", forgetting, "held-out loss beside a parent's in metrics.jsonl, written by train.py of a run that started from a model"),
    Section("Training", training, "metrics.jsonl, written by train.py"),
    Section("Growth", growth, "growth.json, written by initialize.py --grow"),
    Section("Evaluation", evaluation, "eval/NAME.json, written by evaluate.py"),
    Section("Samples", samples, "eval/samples.json, written by compare.py"),
    Section("Differences", differences, "eval/differences.json, written by compare.py --differ"),
    Section("Plan", plan, "plan.json, written by plan.py --json"),
    Section("Settings", settings, "config.json, written by train.py"),
)


# ---- the page


def page(runs: list[RunData]) -> str:
    """The whole HTML. A section whose JSON is missing or of another form becomes a sentence at the end."""
    shown, missing = [], []
    for section in SECTIONS:
        try:
            body, problem = section.html(runs), f"no {section.wants}"
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:  # JSON, but not as our stages write it
            body, problem = "", f"cannot be shown, {section.wants.split(',')[0]} is of another form ({type(error).__name__}: {error})"
        if body:
            shown.append((section.title, body))
        else:
            missing.append(f"{section.title}: {problem}.")
    missing += dict.fromkeys(note for run in runs for note in run.notes)
    if missing:
        shown.append(("Not shown", "<ul>" + "".join(f"<li>{esc(line)}</li>" for line in missing) + "</ul>"))
    names = [run.name for run in runs]
    title = esc(" and ".join(filter(None, [", ".join(names[:-1]), names[-1]])))
    links = "".join(f'<a href="#{anchor(name)}">{name}</a>' for name, _ in shown)
    body = "".join(f'<section id="{anchor(name)}"><h2>{name}</h2>{text}</section>' for name, text in shown)
    made_on = small(f"jaxpt report, {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body><main>'
        f'<header><h1>{title}</h1>{made_on}<nav aria-label="Sections">{links}</nav></header>{body}</main>{scripts() if PLOT in body else ""}</body></html>\n'
    )


def anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def scripts() -> str:
    """Vega-Embed, which brings Vega and Vega-Lite, and the few lines that draw the figures."""
    import vl_convert

    bundle = vl_convert.javascript_bundle().replace("</script", "<\\/script")
    return f"<script>/* Vega, Vega-Lite, Vega-Embed: BSD-3-Clause, University of Washington Interactive Data Lab */{bundle}</script><script>{SCRIPT}</script>"


# ---- plots

PLOT = 'class="plot"'  # what SCRIPT draws
ROUND = [digit * 10.0**power for power in range(-6, 8) for digit in (1, 1.5, 2, 3, 5, 7)]  # marks of a log scale


def over_steps(runs: list[RunData], series, title: str, height: int, names=None, **more) -> dict:
    """`curves` over the runs' steps, coloured by run unless by `names`, with a rule where one was resumed or grown."""
    marks = [{"name": run.name, "step": step, "what": what} for run in runs for step, what in run.marks]
    return curves(names or [run.name for run in runs], series, title, height, marks=marks, **more)


def curves(
    names, series, title: str, height: int, x="step", levels=(), level_name="unigram", thin_series=(), dots=(), marks=(), scale="linear", shares=False
) -> dict:
    """A Vega-Lite figure of series (name, [(x, y)]), coloured by name.

    levels: y drawn dashed, with their name on them; thin_series: drawn thin; dots: drawn as points; marks: {"name", x, "what"} drawn upright; shares: y goes from 0 to 1.
    """
    n_points = max(40, MAX_POINTS // max(1, len(names)))
    edge = {"padding": 5, "nice": False} if dots else {}  # pixels: the edge of the plot would cut a dot
    colors = {"field": "name", "type": "nominal", "legend": None, "scale": palette(names)}
    across = {"field": x, "type": "quantitative", "title": x, "axis": {"tickMinStep": 1}, "scale": edge}
    y = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": bool(dots), **edge}}
    if shares:
        y |= {"scale": {"domain": [0, 1.03], "nice": False}, "axis": {"values": [0, 0.25, 0.5, 0.75, 1], "format": ".0%"}}
    if scale == "log":
        y |= {"scale": {"type": "log", "nice": False, **edge}, "axis": {"values": ROUND, "format": ",.4~r"}}
    tooltip = [
        {"field": "name", "type": "nominal", "title": "title", "formatType": "word", "format": "-"},  # the tooltip's own title
        {"field": x, "type": "quantitative"},
        {"field": "value", "type": "quantitative", "title": title, "format": ".4~g"},
    ]

    def values(chosen):
        found = []
        for name, line in chosen:
            shown = [(at, value) for at, value in line if finite(value) is not None and (scale != "log" or value > 0)]
            found += [{"name": name, x: at, "value": float(f"{value:.5g}")} for at, value in thin(shown, n_points)]
        return found

    at = {"x": across, "y": y, "color": colors}
    line = {"type": "line", "clip": True}
    dot = {"type": "point", "clip": True, "filled": True}
    nearest = {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}
    opacity = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    pan = {"type": "interval", "zoom": "wheel![event.shiftKey]"}
    layers = [
        {"mark": line, "encoding": at, "params": [{"name": "pan", "bind": "scales", "select": pan}]},
        {"mark": {**dot, "size": 50}, "encoding": {**at, "tooltip": tooltip, "opacity": opacity}, "params": [{"name": "near", "select": nearest}]},
    ]
    if dotted := values([*dots, *(one for one in series if len(one[1]) == 1)]):  # one point makes no line
        layers.append({"data": {"values": dotted}, "mark": {**dot, "size": 30, "opacity": 1}, "encoding": at})
    if thin_values := values(thin_series):
        layers.append({"data": {"values": thin_values}, "mark": {**line, "strokeWidth": 1, "opacity": 0.7}, "encoding": at})
    if level_values := [{"value": value} for value in dict.fromkeys(round(level, 4) for level in levels)]:
        rule = {"type": "rule", "clip": True, "strokeDash": [5, 4]}
        label = {"type": "text", "clip": True, "text": level_name, "x": "width", "align": "right", "dy": 10, "fill": "var(--muted)", "fontSize": 11}
        layers += [{"data": {"values": level_values}, "mark": mark, "encoding": {"y": y}} for mark in (rule, label)]
    if marks:
        dash = {"condition": {"test": "datum.what === 'resumed'", "value": [1, 3]}, "value": [1, 0]}
        own = colors if {mark["name"] for mark in marks} <= set(names) else {"value": "var(--muted)"}  # in a plot of domains a run has no colour
        upright = {"x": across, "color": own, "strokeDash": dash, "tooltip": {"field": "what", "type": "nominal"}}
        layers.append({"data": {"values": marks}, "mark": {"type": "rule", "clip": True, "strokeWidth": 1.5}, "encoding": upright})
    return {"height": height, "data": {"values": values(series)}, "layer": layers}


def thin(points: list[tuple[float, float]], n: int) -> list[tuple[float, float]]:
    """At most about n points, of which each stretch keeps its lowest and its highest, so that no spike is lost."""
    if len(points) <= n:
        return points
    stretch = math.ceil(2 * len(points) / n)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return [*kept, *([points[-1]] if kept[-1] != points[-1] else [])]


def points(records: list[dict], key: str, domain: str | None = None) -> list[tuple[float, float]]:
    """(step, value) of each record that has one; of one domain where the records hold {domain: value}."""
    found = [(record["step"], (record.get(key) or {}).get(domain) if domain else record.get(key)) for record in records]
    return [(step, value) for step, value in found if finite(value) is not None]


def pairs(figures: list[str]) -> str:
    """Figures two in a row where there is room."""
    return f'<div class="pairs">{"".join(figures)}</div>'


def figure(spec: dict, caption: str, title: str = "") -> str:
    data = json.dumps(spec, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")  # no text in it can end the script element
    head = f"<h3>{esc(title)}</h3>" if title else ""
    return (
        f'<figure>{head}<div {PLOT} role="img" aria-label="{esc(f"{title}. {caption}" if title else caption)}" style="min-height:{spec["height"]}px">'
        f'<div aria-hidden="true"></div><script type="application/json">{data}</script></div><figcaption>{esc(caption)}</figcaption></figure>'
    )


# ---- pieces of HTML; whatever comes from a file passes through esc


def esc(value: Any) -> str:
    return html.escape(str(value).encode("utf-8", "replace").decode())  # half a surrogate pair cannot be written


def small(text: str) -> str:
    return f'<p class="small">{esc(text)}</p>' if text else ""


def details(title: str, body: str) -> str:
    return f"<details><summary>{esc(title)}</summary>{body}</details>"


def grid(heads: list[str], body: list[list[str]], caption: str = "", texts: int = 1, kind: str = "") -> str:
    """A table of HTML cells; the first `texts` columns are words, the others numbers. It scrolls by itself where it is too wide."""
    head = "".join(f'<th scope="col"{" class=t" if i < texts else ""}>{cell}</th>' if cell else "<td></td>" for i, cell in enumerate(heads))
    rows = "".join("<tr>" + "".join(f"<td{' class=t' if i < texts else ''}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in body)
    region = f'<div class="wide {kind}" role="group" aria-label="{esc(caption or "table")}" tabindex="0">'
    return f"{region}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{small(caption)}"


def bar(share: float) -> str:
    percent = 100 * min(1, max(0, share))
    return f'<span class="bar"><i style="width:{percent:.1f}%"></i></span><span class="pc">{percent:.0f} %</span>'


def key_of(names: list[str]) -> str:
    """Which colour is whose, where there are several."""
    return f'<p class="legend">{"".join(f"<span>{swatch(i)}{esc(name)}</span>" for i, name in enumerate(names))}</p>' if len(names) > 1 else ""


def swatch(i: int) -> str:
    return f'<i class="dot" style="background:{color(i)}"></i>'


def palette(names: list[str]) -> dict:
    """A Vega-Lite scale from names to the page's colours."""
    return {"domain": names, "range": [color(i) for i in range(len(names))]}


def color(i: int) -> str:
    return f"var(--c{i % 8})"


def distinct(runs: list[RunData], field: str) -> list[tuple[Any, list[str]]]:
    """Each different value of the field once, with the names of the runs that have it."""
    found: dict[str, tuple[Any, list[str]]] = {}
    for run in runs:
        if value := getattr(run, field):
            found.setdefault(json.dumps(value, sort_keys=True), (value, []))[1].append(run.name)
    return list(found.values())


def of_runs(names: list[str], runs: list[RunData]) -> str:
    return f" ({esc(', '.join(names))})" if len(names) < len(runs) else ""


# ---- numbers as text


def finite(value: Any) -> float | None:
    """The number, or None where it is none, infinite or missing."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def total(parts: dict[str, dict], key: str) -> float:
    return sum(finite(part.get(key)) or 0 for part in parts.values())


def brief(value: Any) -> str:
    """Three digits where more would promise too much: 1.52, 34.1, 786, 40,400; nothing below a hundredth."""
    if finite(value) is None:
        return ""
    if 0 < value < 0.01:
        return "< 0.01"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def arrow(before: Any, after: Any) -> str:
    return f"{decimal(before)} \u2192 {decimal(after)}" if finite(before) is not None else ""


def decimal(value: Any, digits: int = 3) -> str:
    return f"{value:,.{digits}f}" if finite(value) is not None else ""


whole = functools.partial(decimal, digits=0)  # 12,345


def percent(value: Any) -> str:
    return "" if finite(value) is None else f"{value:.0%}"


def count(value: Any) -> str:
    """1.31 M"""
    if finite(value) is None:
        return ""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e5, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == ' k' else size):.3g}{letter}"
    return whole(value)


def duration(seconds: Any) -> str:
    """3.2 s; 4 min 05 s; 2 h 03 min"""
    if finite(seconds) is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def code(value: Any) -> str:
    return "" if value is None else f"<code>{esc(clip(json.dumps(value), 200)).replace('/', '/<wbr>')}</code>"


def clip(text: Any, n: int) -> str:
    text = str(text)
    return text if len(text) <= n else text[: n - 1] + "\u2026"


# ---- how it looks

STYLE = """
:root { --bg:#fdfdfc; --text:#1c1d1f; --muted:#63666b; --line:#e3e3e0; --soft:#f3f3f0;
  --c0:#2f62c4; --c1:#c25a12; --c2:#13795f; --c3:#a8326e; --c4:#7352c2; --c5:#806a00; --c6:#0f7490; --c7:#5c6470 }
@media screen and (prefers-color-scheme: dark) { :root { --bg:#17181a; --text:#e7e7e4; --muted:#9b9ea4; --line:#2f3135; --soft:#212326;
  --c0:#82a9f5; --c1:#f0985a; --c2:#55c4a1; --c3:#e883b6; --c4:#b39cf2; --c5:#d3ba4c; --c6:#5cc0dd; --c7:#a9b0bb } }
* { box-sizing:border-box }
html { -webkit-text-size-adjust:100%; scroll-behavior:smooth }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior:auto } }
body { margin:0; background:var(--bg); color:var(--text); font:16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric:tabular-nums }
main { max-width:47rem; margin:0 auto; padding:4.5rem 1.25rem 6rem }
h1 { font-size:2.125rem; line-height:1.2; letter-spacing:-.02em; font-weight:650; margin:0 0 .35rem; overflow-wrap:anywhere }
h2 { font-size:1.375rem; line-height:1.3; letter-spacing:-.01em; font-weight:620; margin:0 0 1.1rem }
h3 { font-size:1rem; font-weight:600; margin:2rem 0 .5rem; overflow-wrap:anywhere }
section { margin-top:4.25rem; scroll-margin-top:1.5rem }
p { margin:0 0 .6rem }
ul { margin:0; padding-left:1.1rem; overflow-wrap:anywhere } li { margin:.3rem 0 }
a { color:inherit; text-decoration-color:var(--line); text-underline-offset:.25em } a:hover { text-decoration-color:currentColor }
:focus-visible { outline:2px solid var(--c0); outline-offset:2px }
nav { text-wrap:balance; margin-top:1.5rem; font-size:.875rem; color:var(--muted) } nav a { display:inline-block; margin:0 1rem .35rem 0 }
.small, figcaption, small { font-size:.8125rem; line-height:1.5; color:var(--muted) } .small { margin:.6rem 0 0 }
.made { display:flex } .made .dot { flex:none; margin-top:.5rem }
.dot { display:inline-block; width:.625rem; height:.625rem; border-radius:50%; margin-right:.55rem }
.small + .legend, .split + .legend { margin-top:2.25rem } .legend { display:flex; flex-wrap:wrap; gap:.25rem 1.5rem; font-size:.875rem; margin:0 0 .5rem }
.wide { overflow-x:auto; margin-top:1.1rem; background:linear-gradient(90deg, var(--bg) 30%, transparent), linear-gradient(270deg, var(--bg) 30%, transparent) 100% 0,
  linear-gradient(90deg, var(--line), transparent), linear-gradient(270deg, var(--line), transparent) 100% 0; background-repeat:no-repeat;
  background-size:2rem 100%, 2rem 100%, .5rem 100%, .5rem 100%; background-attachment:local, local, scroll, scroll }
table { border-collapse:collapse; width:100%; font-size:.875rem }
th, td { text-align:right; padding:.36rem 0 .36rem 1.25rem; border-bottom:1px solid var(--line); vertical-align:baseline; white-space:nowrap }
th.t, td.t { text-align:left } th:first-child, td:first-child { padding-left:0 }
th { font-weight:600; color:var(--muted); font-size:.8125rem; vertical-align:bottom }
td i { font-style:normal } .in { padding-left:1.1rem; color:var(--muted) } tr:has(+ tr .in):not(:has(.in)) td { border-bottom-color:transparent; padding-top:.8rem }
code, pre { font-family:ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; font-size:.8125rem }
code { white-space:normal; overflow-wrap:anywhere } td:has(> code) { white-space:normal; min-width:7rem }
pre { margin:0; white-space:pre-wrap; overflow-wrap:anywhere; line-height:1.55 }
.bar { display:inline-block; width:clamp(3rem, 22vw, 11rem); height:.5rem; background:var(--soft); border-radius:2px; overflow:hidden; text-align:left }
.bar i { display:block; height:100%; background:var(--c7) } .pc { display:inline-block; width:3.25rem }
.funnel th { width:5.5rem } .funnel th:first-child { width:auto } .funnel th:last-child { width:1% }
figure { margin:1.25rem 0 0 } figure h3 { margin:0 0 .35rem }
.plot { width:100% } .plot > div { width:100% } .plot svg { display:block; overflow:visible; max-width:100%; height:auto }
figcaption { margin-top:.4rem }
details { margin-top:1.25rem } summary { cursor:pointer; font-size:.875rem; color:var(--muted) }
.pairs { display:grid; grid-template-columns:repeat(2, minmax(0, 1fr)); gap:2rem; margin-top:2rem } .pairs figure { margin:0 }
.pairs figure:last-child:nth-child(odd) { grid-column:1 / -1 }
.lineage { display:flex; gap:.75rem } .lineage svg { flex:none } .lineage path { fill:none; stroke:var(--muted); stroke-width:1.25; opacity:.55 }
.lineage ol { list-style:none; margin:0; padding:0; min-width:0; flex:1 }
.lineage li { height:68px; margin:0; padding-top:9px; line-height:1.45; white-space:nowrap; overflow:hidden; text-overflow:ellipsis }
.lineage li > span { font-size:.875rem; margin-left:.4rem }
.split { display:grid; grid-template-columns:276px minmax(0, 1fr); gap:2.5rem; align-items:start } .split figure { margin:1.1rem 0 0; max-width:276px } .split .wide:first-child { margin-top:.6rem }
.map text { font-size:12px; fill:var(--text) } .map rect { fill:var(--soft); stroke:var(--line) } .map path { fill:none; stroke:var(--muted); opacity:.6 }
.map rect.new { fill:color-mix(in srgb, var(--c1) 22%, var(--bg)); stroke:var(--c1) } .map path.new { stroke:var(--c1); opacity:1; stroke-width:1.5 }
.map rect.unused { fill:none; stroke-dasharray:3 3; stroke:var(--muted) }
.outputs h3 { font-size:.8125rem; color:var(--muted); margin:0 0 .4rem }
.tokens pre, .dropped pre { padding-left:.9rem; border-left:3px solid var(--line); margin:.25rem 0 1rem } .pairs:empty { display:none }
.tokens i { font-style:normal; border-radius:2px; -webkit-print-color-adjust:exact; print-color-adjust:exact } .legend.tokens i { padding:0 .3rem }
.b1 { background:color-mix(in srgb, var(--c0) 14%, var(--bg)) } .b2 { background:color-mix(in srgb, var(--c0) 26%, var(--bg)) } .b3 { background:color-mix(in srgb, var(--c0) 40%, var(--bg)) }
.w1 { background:color-mix(in srgb, var(--c1) 14%, var(--bg)) } .w2 { background:color-mix(in srgb, var(--c1) 26%, var(--bg)) } .w3 { background:color-mix(in srgb, var(--c1) 40%, var(--bg)) }
.prompt { margin-top:2.25rem } .prompt:first-of-type { margin-top:0 } .prompt > pre { font-weight:650; padding-left:.9rem; border-left:3px solid var(--line) }
.outputs { display:grid; grid-template-columns:repeat(auto-fit, minmax(15rem, 1fr)); gap:1.25rem 2rem; margin-top:1rem }
#vg-tooltip-element { background:var(--bg); color:var(--text); border:1px solid var(--line); box-shadow:0 2px 10px rgb(0 0 0 / .12); font:.8125rem/1.4 system-ui, sans-serif;
  font-variant-numeric:tabular-nums; padding:.4rem .6rem; border-radius:4px; position:fixed; z-index:9; pointer-events:none; visibility:hidden }
#vg-tooltip-element.visible { visibility:visible } #vg-tooltip-element table { width:auto }
#vg-tooltip-element h2 { font-size:1em; margin:0 .3rem } #vg-tooltip-element td { border:0; padding:.05rem .3rem; text-align:left } #vg-tooltip-element td.key { color:var(--muted) }
@media (max-width: 40rem) { main { padding-top:2.5rem } section { margin-top:3.25rem } .pairs { grid-template-columns:minmax(0, 1fr) } .split { grid-template-columns:minmax(0, 1fr); gap:1rem }
  table { font-size:.8125rem } th, td { padding-left:.6rem } td.t { white-space:normal } td.t small { display:block } .clock { display:none }
  .bar { width:2.5rem } .pc { width:2.9rem } .funnel th { width:auto } .rules th:nth-child(3), .rules td:nth-child(3) { display:none }
  .lineage { gap:.5rem } }
@media print { :root { --bg:#fff; --text:#000; --muted:#555; --line:#ccc } main { padding-top:0 } nav, .hint { display:none } .wide { overflow:visible; background:none }
  figure, tr, .prompt, .lineage li { break-inside:avoid } h2, h3, .legend, .prompt > pre { break-after:avoid } }
"""

SCRIPT = """
const word = value => value;  // Vega-Lite 6.4 shows a name in the tooltip of a nearest point as "undefined" unless it passes through a format
const quiet = {grid: true, gridColor: "var(--line)", domainColor: "var(--line)", tickColor: "var(--line)", labelColor: "var(--muted)", titleColor: "var(--muted)",
  titleFontWeight: 400, labelFontSize: 12, titleFontSize: 12, tickCount: 5, labelFlush: false};
const config = {aria: false, customFormatTypes: true, background: null, font: "system-ui, sans-serif", view: {stroke: null}, axis: quiet, axisX: {grid: false}, axisY: {domain: false, ticks: false, minExtent: 30},
  axisBand: {grid: false}, line: {strokeWidth: 1.75, strokeJoin: "round"}, rule: {color: "var(--muted)"}, text: {fill: "var(--text)", fontSize: 12}, legend: {labelColor: "var(--text)", labelFontSize: 12}};
for (const plot of document.querySelectorAll(".plot")) {
  const spec = {width: "container", autosize: {type: "fit", contains: "padding"}, ...JSON.parse(plot.querySelector("script").textContent)};
  vegaEmbed(plot.querySelector("div"), spec, {mode: "vega-lite", renderer: "svg", actions: false, config, expressionFunctions: {word}, tooltip: {disableDefaultStyle: true}});
}
"""
