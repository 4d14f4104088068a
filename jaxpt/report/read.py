"""What a run directory holds, read from the JSON that stages leave, and what several sections of the page ask of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import pyarrow.parquet as pq

from jaxpt import stage
from jaxpt.lineage import STAGES, LineageNode, list_own_stages, read_json, read_lineage
from jaxpt.plan import flops
from jaxpt.report.format import clip_text, is_finite
from jaxpt.spec import ModelSpec, UserError

COMPARED_FIELDS = ("samples", "differences")  # files in eval/ that compare.py writes
MAX_DROPPED = 3  # documents shown that a rule dropped, of each source
MAX_EXCERPT = 600  # characters of each


@dataclasses.dataclass
class RunData:
    """What a run directory's JSON says; None or empty where a file is missing, with a sentence in `notes` where one cannot be read.

    nodes    the lineage, oldest first; the last is the run itself
    stages   each of STAGES -> the manifests of this run's own, not of its parent's;  funnels: of its corpora
    exports  the Hugging Face directories in it, as nodes of its lineage
    train    metrics.jsonl's training records by step;  heldout, skipped: its others;  marks: (step, "resumed" or "grown by ...")
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
    skipped: list[dict]
    marks: list[tuple[int, str]]
    nodes: list[LineageNode]
    exports: list[LineageNode]
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
        raise UserError(
            f"--workdir {directory}: no such directory. Give the run directory that train.py or initialize.py wrote."
        )
    notes: list[str] = []
    read = functools.partial(read_json, notes=notes)
    nodes = read_lineage(directory, notes)
    own = list_own_stages(nodes)
    stages = {kind: [node.manifest for node in own if node.kind == kind] for kind in STAGES}
    settings = read(directory / "config.json")
    return RunData(
        name=directory.name,
        directory=directory,
        **{
            name: read(directory / f"{name}.json")
            for name in ("manifest", "spec", "growth", "plan")
        },
        config=settings,
        **{name: read(directory / "eval" / f"{name}.json") for name in COMPARED_FIELDS},
        evals={
            file.stem: found
            for file in sorted((directory / "eval").glob("*.json"))
            if file.stem not in COMPARED_FIELDS and (found := read(file))
        },
        **read_run_metrics(directory / "metrics.jsonl", notes),
        nodes=nodes,
        exports=[
            read_lineage(place.parent, notes)[-1]
            for place in sorted(directory.glob("*/manifest.json"))
            if (read(place) or {}).get("stage") == "export"
        ],
        stages=stages,
        funnels=[
            {**node.funnel, "dropped": read_dropped(node.path / "dropped", notes)}
            for node in own
            if node.funnel
        ],
        phases=read_phases(directory, settings, stages["packed"], notes),
        devices=read_devices(directory / "starts.jsonl"),
        notes=notes,
    )


def read_run_metrics(path: pathlib.Path, notes: list[str]) -> dict[str, list]:
    """RunData's train, heldout, skipped and marks. A step written twice, before a kill and after it, counts as written last."""
    by_step, marks, broken = {"train": {}, "heldout": {}, "skipped": {}}, [], []
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        record = parse_metric_line(line)
        if record is None:
            broken.append(number)
        elif record.get("resumed"):
            marks.append((record["step"], "resumed"))
        elif record.get("grown"):
            marks.append((record["step"], f"grown by {record['grown']}"))
        else:
            kind = next((kind for kind in ("heldout", "skipped") if kind in record), "train")
            by_step[kind][record["step"]] = record
    if broken == [len(lines)]:
        notes.append(
            f"{path}: the last line is half-written, as a running or killed run leaves it; left out."
        )
    elif broken:
        notes.append(
            f"{path}: {len(broken)} lines cannot be read, the first is line {broken[0]}; left out."
        )
    if wild := [
        step for step, record in by_step["train"].items() if is_finite(record.get("loss")) is None
    ]:
        notes.append(
            f"{path}: the loss is no finite number in {len(wild)} of {len(by_step['train'])} records, first at step {min(wild)}; no curve shows it."
        )
    return {name: [found[step] for step in sorted(found)] for name, found in by_step.items()} | {
        "marks": list(dict.fromkeys(marks))
    }


def parse_metric_line(line: str) -> dict | None:
    """A record of metrics.jsonl; None where the line holds none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    forms = {"step": int, "heldout": dict, "parent": dict, "skipped": dict, "epochs": dict}
    if not isinstance(record, dict) or "step" not in record:
        return None
    return (
        record
        if all(isinstance(record[key], form) for key, form in forms.items() if key in record)
        else None
    )


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
            by_source.setdefault(str(row["source"]), []).append(
                {**row, "text": clip_text(row["text"], MAX_EXCERPT)}
            )
        found[file.stem] = [row for own in by_source.values() for row in own[:MAX_DROPPED]]
    return found


def read_phases(
    directory: pathlib.Path, settings: dict | None, packed: list[dict], notes: list[str]
) -> list[tuple[int, dict[str, float]]]:
    """The shares in force from each step on, together 1: by the run's own account, else by its config, else in proportion to the rows."""
    try:
        account = directory / "phases.json"
        if account.is_file():
            asked = [(each["step"], each["shares"]) for each in json.loads(account.read_text())]
        else:
            rows = {
                name: part["rows"]
                for manifest in packed
                for name, part in manifest["counts"]["train"].items()
            }
            asked = (settings or {})["mixture"]["phases"] or ([(0, rows)] if rows else [])
        return [
            (
                int(step),
                {name: share / sum(shares.values()) for name, share in shares.items() if share},
            )
            for step, shares in asked
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if settings:
            notes.append(
                f"{directory}: its mixture cannot be read from phases.json, config.json or packed/manifest.json ({error!r}); left out."
            )
        return []


def read_devices(path: pathlib.Path) -> tuple[int, str] | None:
    """(number, JAX's name of their kind), of the last start that the file tells of."""
    try:
        number, _, kind = json.loads(path.read_text().splitlines()[-1])["devices"].partition(" x ")
        return int(number), kind
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


# ---- what several sections ask of it


def first_value(records: list[dict], key: str) -> float | None:
    return next(
        (value for record in records if (value := is_finite(record.get(key))) is not None), None
    )


def last_value(records: list[dict], key: str) -> float | None:
    return first_value(records[::-1], key)


def metric_points(
    records: list[dict], key: str, domain: str | None = None
) -> list[tuple[float, float]]:
    """(step, value) of each record that has one; of one domain where the records hold {domain: value}."""
    found = [
        (record["step"], (record.get(key) or {}).get(domain) if domain else record.get(key))
        for record in records
    ]
    return [(step, value) for step, value in found if is_finite(value) is not None]


def list_sources(runs: list[RunData]) -> list[str]:
    """Names of the held-out domains, in one order for the whole page: as the corpora name their sources, then as they turn up."""
    sources = [name for run in runs for found in run.funnels for name in found["sources"]]
    return list(
        dict.fromkeys(
            [
                *sources,
                *(name for run in runs for record in run.heldout for name in record["heldout"]),
            ]
        )
    )


def order_keys(order: list, keys: Iterable) -> list:
    """The keys, each once: those named in `order` first and as there, the others as they come."""
    keys = list(dict.fromkeys(keys))
    return [*(key for key in order if key in keys), *(key for key in keys if key not in order)]


def distinct_values(runs: list[RunData], field: str) -> list[tuple[Any, list[str]]]:
    """Each different value of the field once, with the names of the runs that have it."""
    found: dict[str, tuple[Any, list[str]]] = {}
    for run in runs:
        if value := getattr(run, field):
            found.setdefault(json.dumps(value, sort_keys=True), (value, []))[1].append(run.name)
    return list(found.values())


def n_params(run: RunData) -> int | None:
    """As the manifest counted them, else from the shape."""
    if run.manifest and run.manifest["counts"].get("n_params"):
        return run.manifest["counts"]["n_params"]
    try:
        return flops.count_params(ModelSpec.from_json(run.spec)) if run.spec else None
    except (TypeError, ValueError):  # a spec of another version
        return None


def format_shape(run: RunData) -> str:
    return f"{run.spec['n_layers']} × {run.spec['d_model']}" if run.spec else ""


def short_model_name(path: str) -> str:
    """The run's name of runs/base, runs/base/hf and runs/base/checkpoints/300."""
    place = pathlib.PurePath(path)
    if place.name == "hf":
        place = place.parent
    elif place.parent.name == "checkpoints":
        place = place.parent.parent
    return place.name or path


def model_sort_key(path: str, runs: list[RunData]) -> int:
    names = [run.directory.name for run in runs]
    return names.index(short_model_name(path)) if short_model_name(path) in names else len(names)
