"""Read what a run directory holds, and what several sections of the page need of it."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from io import BufferedIOBase
from typing import Any, TypeVar

import pyarrow.parquet as pq

from jaxpt import io, stage
from jaxpt.lineage import STAGES, LineageNode, list_own_stages, read_lineage
from jaxpt.model import transformer
from jaxpt.report.format import clip_text, finite_or_none
from jaxpt.report.records import (
    Differences,
    DroppedDocument,
    Evaluation,
    Funnel,
    Growth,
    HeldoutPoint,
    PackedCounts,
    Phase,
    Plan,
    RunEvent,
    RunStart,
    Samples,
    SignOfLife,
    Sizes,
    SkippedPoint,
    StageSummary,
    TaskPoint,
    TrainPoint,
    View,
    parse_metric,
)
from jaxpt.spec import ModelSpec, UserError, encode_json

COMPARISONS = ("samples", "differences")  # files in eval/ that jaxpt compare writes
# what shows that a directory is a run's, however far it has come
RUN_MARKS = ("metrics.jsonl", "starts.jsonl", "spec.json", "manifest.json", "plan.json", "eval")
RUN_MARKS += ("corpus", "tokenizer", "packed", "checkpoints")
MAX_DROPPED = 3  # documents shown that a rule dropped, per source
MAX_EXCERPT = 600  # characters shown of each
Point = tuple[float, float]  # (step, value)
T = TypeVar("T")
V = TypeVar("V", bound=View)


@dataclasses.dataclass
class Metrics:
    """Records of metrics.jsonl in order of steps."""

    train: list[TrainPoint]
    heldout: list[HeldoutPoint]
    tasks: list[TaskPoint]
    skipped: list[SkippedPoint]
    events: list[RunEvent]


@dataclasses.dataclass
class RunData:
    """Everything that the page shows of a run directory.

    A file that is missing leaves None or an empty value; one that cannot be read leaves a sentence
    in `warnings` too.
    """

    name: str
    directory: io.Path
    manifest: StageSummary | None
    settings: dict[str, Any]  # "section.knob" -> value, from config.json
    sizes: Sizes | None
    n_params: int | None
    growth: Growth | None
    plan: Plan | None
    samples: Samples | None
    differences: Differences | None
    evaluations: dict[str, Evaluation]  # file stem -> results
    metrics: Metrics
    lineage_nodes: list[LineageNode]  # oldest first; the last is the run itself
    export_nodes: list[LineageNode]  # Hugging Face directories inside it
    stages: dict[str, list[StageSummary]]  # of each of STAGES, the run's own, not its parent's
    packed: list[PackedCounts]
    funnels: list[Funnel]
    phases: list[Phase]  # shares sum to 1; empty: unknown
    start: RunStart | None  # the last one
    last_sign: str  # of life, ISO 8601, UTC; empty: unknown
    warnings: list[str]


Readers = dict[io.Path, "MetricsReader"]  # run directory -> what has read its records


def load_runs(
    directories: Iterable[str | io.Path], readers: Readers | None = None
) -> list[RunData]:
    """Load runs in the order given. Runs of one name are named with the directory above.

    Args:
        directories: run directories.
        readers: kept by who loads them again and again, so that only new records are read.
    """
    distinct = dict.fromkeys(map(str, directories))
    runs = [load_run(directory, readers) for directory in distinct]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.directory.parts[-2:])
    return runs


def find_runs(directories: Iterable[str | io.Path]) -> list[io.Path]:
    """Return run directories: those given, and of one that is none the runs in it.

    Raises:
        UserError: a directory holds other things, but no run.
    """
    found: list[io.Path] = []
    for directory in map(io.path, directories):
        is_run = any(io.exists(directory / name) for name in RUN_MARKS)
        is_empty = not io.list_names(directory)  # as of a run that has just begun
        if is_run or is_empty or io.size(directory) is not None:
            found.append(directory)
            continue
        inside: list[io.Path] = []
        for depth in ("*", "*/*"):
            inside += [file.parent for file in io.find(directory, f"{depth}/metrics.jsonl")]
        if not inside:
            raise UserError(
                f"--workdir {directory}: is no run directory, and has no run that was trained in "
                "it. Give the directory that jaxpt train or jaxpt initialize wrote, or one that "
                "holds such."
            )
        found += sorted(inside)
    return found


def load_run(directory: str | io.Path, readers: Readers | None = None) -> RunData:
    """Load a run directory; see `load_runs`. Raise UserError if it does not exist."""
    directory = io.resolve(io.path(directory))
    if io.size(directory) is not None or not io.exists(directory):
        raise UserError(
            f"--workdir {directory}: no such directory. "
            "Give the run directory that jaxpt train or jaxpt initialize wrote."
        )
    warnings: list[str] = []
    nodes = read_lineage(directory, warnings)
    own_nodes = list_own_stages(nodes)
    stages: dict[str, list[StageSummary]] = {kind: [] for kind in STAGES}
    for node in own_nodes:
        summary = summarize_stage(node)
        if summary and node.kind in stages:
            stages[node.kind].append(summary)
    packed = []
    for summary in stages["packed"]:
        counts = parse_packed(summary, warnings)
        if counts:
            packed.append(counts)
    manifest = read_view(StageSummary, directory / "manifest.json", warnings)
    sizes = read_view(Sizes, directory / "spec.json", warnings)
    settings = read_settings(directory / "config.json", warnings)
    evaluations = directory / "eval"
    reader = MetricsReader(directory / "metrics.jsonl")
    if readers is not None:
        reader = readers.setdefault(directory, reader)
    return RunData(
        name=directory.name,
        directory=directory,
        manifest=manifest,
        settings=settings,
        sizes=sizes,
        n_params=get_n_params(directory / "spec.json", manifest),
        growth=read_view(Growth, directory / "growth.json", warnings),
        plan=read_view(Plan, directory / "plan.json", warnings),
        samples=read_view(Samples, evaluations / "samples.json", warnings),
        differences=read_view(Differences, evaluations / "differences.json", warnings),
        evaluations=read_evaluations(evaluations, warnings),
        metrics=reader.read(warnings),
        lineage_nodes=nodes,
        export_nodes=read_exports(directory, warnings),
        stages=stages,
        packed=packed,
        funnels=read_funnels(own_nodes, warnings),
        phases=read_phases(directory, settings, packed, warnings),
        start=read_last_start(directory / "starts.jsonl"),
        last_sign=read_last_sign(directory),
        warnings=list(dict.fromkeys(warnings)),
    )


def read_object(path: io.Path, warnings: list[str]) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is none, or it is unreadable."""
    try:
        fields = io.read_record(path)
    except io.MissingFileError:
        return None
    except io.FileError as error:
        warnings.append(f"{error} Left out.")
        return None
    if not isinstance(fields, dict):
        warnings.append(f"{path}: expected a JSON object; left out.")
        return None
    if not stage.is_as_written(fields):
        warnings.append(f"{path}: was changed since it was written (its checksum differs).")
    return fields


def read_view(view: type[V], path: io.Path, warnings: list[str]) -> V | None:
    """Return a file as a record; None if it is missing, or has another form."""
    fields = read_object(path, warnings)
    if fields is None:
        return None
    try:
        return view.from_json(fields)
    except UserError as error:
        warnings.append(f"{path}: has an unexpected form ({error}); left out.")
        return None


def read_settings(path: io.Path, warnings: list[str]) -> dict[str, Any]:
    """Return config.json as "section.knob" -> value."""
    sections = read_object(path, warnings) or {}
    if not all(isinstance(section, dict) for section in sections.values()):
        warnings.append(f"{path}: has an unexpected form (a section is no object); left out.")
        return {}
    return flatten_settings(sections)


def flatten_settings(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return {"train": {"steps": 3}} as {"train.steps": 3}."""
    settings = {}
    for section, knobs in sections.items():
        for knob, value in knobs.items():
            settings[f"{section}.{knob}"] = value
    return settings


def summarize_stage(node: LineageNode) -> StageSummary | None:
    """Return the manifest of a stage; None if it has not finished, or is malformed."""
    try:
        return StageSummary.from_json(encode_json(node.manifest))
    except UserError:
        return None


def parse_packed(manifest: StageSummary, warnings: list[str]) -> PackedCounts | None:
    """Return the counts of packed sequences; None if they have an unexpected form."""
    try:
        return PackedCounts.from_json(manifest.counts)
    except UserError as error:
        warnings.append(f"packed/manifest.json: has an unexpected form ({error}); left out.")
        return None


def read_evaluations(directory: io.Path, warnings: list[str]) -> dict[str, Evaluation]:
    """Return eval/*.json by file stem, without the files that jaxpt compare writes."""
    evaluations = {}
    for file in io.find(directory, "*.json"):
        if file.stem in COMPARISONS:
            continue
        evaluation = read_view(Evaluation, file, warnings)
        if evaluation:
            evaluations[file.stem] = evaluation
    return evaluations


def read_exports(directory: io.Path, warnings: list[str]) -> list[LineageNode]:
    """Return the Hugging Face directories inside a run as lineage nodes."""
    exports = []
    for path in io.find(directory, "*/manifest.json"):
        manifest = read_view(StageSummary, path, warnings)
        if manifest and manifest.stage == "export":
            exports.append(read_lineage(path.parent, warnings)[-1])
    return exports


def read_funnels(nodes: list[LineageNode], warnings: list[str]) -> list[Funnel]:
    """Return the funnels of a run's corpora, with samples of what their rules dropped."""
    funnels = []
    for node in nodes:
        if node.kind != "corpus":
            continue
        funnel = read_view(Funnel, node.path / "funnel.json", warnings)
        if funnel:
            dropped = read_dropped(node.path / "dropped", warnings)
            funnels.append(dataclasses.replace(funnel, dropped=dropped))
    return funnels


def read_dropped(directory: io.Path, warnings: list[str]) -> dict[str, tuple[DroppedDocument, ...]]:
    """Return rule -> samples of what it dropped, MAX_DROPPED per source."""
    dropped = {}
    for file in io.find(directory, "*.parquet"):
        try:
            table = pq.read_table(io.local_copy(file), columns=["id", "source", "text", "reason"])
            documents = [DroppedDocument.from_json(fields) for fields in table.to_pylist()]
        except (OSError, ValueError) as error:  # pyarrow raises both
            reason = str(error).splitlines()[0]
            warnings.append(f"{file}: cannot be read ({reason}); left out.")
            continue
        shown = []
        n_shown = collections.Counter()
        for document in documents:
            if n_shown[document.source] < MAX_DROPPED:
                text = clip_text(document.text, MAX_EXCERPT)
                shown.append(dataclasses.replace(document, text=text))
                n_shown[document.source] += 1
        dropped[file.stem] = tuple(shown)
    return dropped


class MetricsReader:
    """Reads a metrics.jsonl, and later only what was appended to it since."""

    def __init__(self, path: io.Path):
        """Read nothing yet."""
        self.path = path
        self.forget()

    def forget(self) -> None:
        """Begin at the file's start."""
        self.n_bytes = self.n_lines = 0
        self.last_line = b""
        self.train: dict[int, TrainPoint] = {}
        self.heldout: dict[int, HeldoutPoint] = {}
        self.tasks: dict[int, TaskPoint] = {}
        self.skipped: dict[int, SkippedPoint] = {}
        self.events: dict[RunEvent, None] = {}
        self.broken: list[int] = []

    def read(self, warnings: list[str]) -> Metrics:
        """Return all records. A step that was repeated after a crash counts as written last."""
        is_cut = False
        if io.size(self.path) is not None:
            try:
                io.check_published([self.path])
            except io.FileError as error:
                warnings.append(str(error))
            with io.open_read(self.path) as file, io.explain("read", self.path):
                is_cut = self.read_new_lines(file)
        self.list_warnings(is_cut, warnings)
        return Metrics(
            train=sort_by_step(self.train),
            heldout=sort_by_step(self.heldout),
            tasks=sort_by_step(self.tasks),
            skipped=sort_by_step(self.skipped),
            events=list(self.events),
        )

    def read_new_lines(self, file: BufferedIOBase) -> bool:
        """Take the lines after those that were read. Return whether a last one is half-written."""
        file.seek(self.n_bytes - len(self.last_line))
        if file.read(len(self.last_line)) != self.last_line:  # a resumed run cut and rewrote it
            self.forget()
            file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                return not self.take_line(line)
            self.n_lines += 1
            if not self.take_line(line):
                self.broken.append(self.n_lines)
            self.n_bytes += len(line)
            self.last_line = line
        return False

    def take_line(self, line: bytes) -> bool:
        """Keep a line's record. Return False if it is none."""
        try:
            record = parse_metric(json.loads(line))
        except (ValueError, AttributeError, TypeError, UserError, RecursionError):
            return False
        if isinstance(record, TrainPoint):
            self.train[record.step] = record
        elif isinstance(record, HeldoutPoint):
            self.heldout[record.step] = record
        elif isinstance(record, TaskPoint):
            self.tasks[record.step] = record
        elif isinstance(record, SkippedPoint):
            self.skipped[record.step] = record
        else:
            self.events[record] = None
        return True

    def list_warnings(self, is_cut: bool, warnings: list[str]) -> None:
        """Say what cannot be read, or is not finite."""
        if is_cut:
            warnings.append(
                f"{self.path}: the last line is half-written, as by a running or killed run; "
                "left out."
            )
        if self.broken:
            warnings.append(
                f"{self.path}: {len(self.broken)} lines cannot be read, the first is line "
                f"{self.broken[0]}; left out."
            )
        not_finite = [step for step, point in self.train.items() if is_lost(point.loss)]
        if not_finite:
            warnings.append(
                f"{self.path}: the loss is not finite in {len(not_finite)} of {len(self.train)} "
                f"records, first at step {min(not_finite)}; the curves leave them out."
            )


def is_lost(loss: float | None) -> bool:
    """Return whether a loss is not finite."""
    return finite_or_none(loss) is None


def sort_by_step(records: dict[int, T]) -> list[T]:
    """Return the records in order of steps."""
    return [records[step] for step in sorted(records)]


def read_phases(
    directory: io.Path,
    settings: dict[str, Any],
    packed: list[PackedCounts],
    warnings: list[str],
) -> list[Phase]:
    """Return the mixture from each step on, with shares that sum to 1.

    What the run recorded in phases.json counts, else its config, else the number of sequences.
    """
    path = directory / "phases.json"
    try:
        has_phases = io.exists(path)
        if has_phases:
            phases = [Phase.from_json(fields) for fields in io.read_record(path)]
        else:
            configured = settings["mixture.phases"]
            phases = [Phase(int(step), shares) for step, shares in configured]
        if not phases and not has_phases:
            phases = count_sequences(packed)
        return [normalize_shares(phase) for phase in phases]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if settings:
            warnings.append(
                f"{directory}: its mixture cannot be read from phases.json, config.json or "
                f"packed/manifest.json ({error!r}); left out."
            )
        return []


def count_sequences(packed: list[PackedCounts]) -> list[Phase]:
    """Return one phase in proportion to the number of sequences; none if nothing is packed."""
    shares: dict[str, float] = {}
    for counts in packed:
        for name, source in counts.train.items():
            shares[name] = source.n_sequences
    if not shares:
        return []
    return [Phase(0, shares)]


def normalize_shares(phase: Phase) -> Phase:
    """Return the phase with positive shares that sum to 1."""
    total = sum(phase.shares.values())
    shares = {name: share / total for name, share in phase.shares.items() if share}
    return Phase(phase.step, shares)


def read_last_sign(directory: io.Path) -> str:
    """Return when a run last said that it goes on; empty if it never did."""
    try:
        return SignOfLife.from_json(io.read_json(directory / "spent.json")).at
    except UserError:  # missing, or just being written
        return ""


def read_last_start(path: io.Path) -> RunStart | None:
    """Return the last start in starts.jsonl."""
    try:
        last_start = json.loads(io.read_lines(path)[-1])
        return RunStart.from_json(last_start)
    except (OSError, ValueError, TypeError, IndexError, AttributeError):
        return None


def get_n_params(path: io.Path, manifest: StageSummary | None) -> int | None:
    """Return the number of parameters that the manifest counted, else that of spec.json."""
    if manifest and manifest.counts.get("n_params"):
        return manifest.counts["n_params"]
    try:
        fields = io.read_json(path)
        return transformer.count_params(ModelSpec.from_json(fields))
    except (OSError, TypeError, ValueError):  # missing, or of another version
        return None


# ---- what several sections need


def first_value(records: Sequence[TrainPoint], field: str) -> float | None:
    """Return the first finite value of a metric."""
    for _, value in get_points(records, field):
        return value
    return None


def last_value(records: Sequence[TrainPoint], field: str) -> float | None:
    """Return the last finite value of a metric."""
    return first_value(records[::-1], field)


def get_points(records: Sequence[TrainPoint], field: str) -> list[Point]:
    """Return (step, value) wherever a metric is finite."""
    return keep_finite((record.step, getattr(record, field)) for record in records)


def get_scalar_points(records: Sequence[TrainPoint], name: str) -> list[Point]:
    """Return (step, value) wherever a further scalar of the step is finite."""
    return keep_finite((record.step, record.scalars.get(name)) for record in records)


def get_heldout_points(run: RunData, source: str) -> list[Point]:
    """Return (step, held-out loss) of one source wherever it is finite."""
    records = run.metrics.heldout
    return keep_finite((record.step, record.heldout_loss.get(source)) for record in records)


def get_task_points(run: RunData, task: str, metric: str) -> list[Point]:
    """Return (step, score) of one metric of a benchmark wherever it is finite."""
    records = run.metrics.tasks
    return keep_finite((record.step, record.scores.get(task, {}).get(metric)) for record in records)


def get_parent_points(run: RunData, source: str) -> list[Point]:
    """Return (step, the parent's held-out loss) of one source wherever it is finite."""
    records = run.metrics.heldout
    losses = ((record.step, record.parent_loss or {}) for record in records)
    return keep_finite((step, loss.get(source)) for step, loss in losses)


def keep_finite(points: Iterable[tuple[int, float | None]]) -> list[Point]:
    """Return the points whose value is a finite number."""
    kept = []
    for step, value in points:
        number = finite_or_none(value)
        if number is not None:
            kept.append((step, number))
    return kept


def list_sources(runs: list[RunData]) -> list[str]:
    """Return the sources in one order for the whole page: the corpora's, then as they turn up."""
    names: list[str] = []
    for run in runs:
        for funnel in run.funnels:
            names += funnel.sources
    for run in runs:
        for record in run.metrics.heldout:
            names += record.heldout_loss
    return list(dict.fromkeys(names))


def order_keys(order: Iterable[T], keys: Iterable[T]) -> list[T]:
    """Return each key once: those in `order` first, the others as they come."""
    keys = list(dict.fromkeys(keys))
    ordered = [key for key in order if key in keys]
    return list(dict.fromkeys([*ordered, *keys]))


def group_distinct_values(
    runs: list[RunData], get: Callable[[RunData], T | None]
) -> list[tuple[T, list[str]]]:
    """Return each different value once, with the names of the runs that have it."""
    groups: dict[str, tuple[T, list[str]]] = {}
    for run in runs:
        value = get(run)
        if value:
            key = json.dumps(encode_json(value), sort_keys=True)
            _, names = groups.setdefault(key, (value, []))
            names.append(run.name)
    return list(groups.values())


def name_owners(names: list[str], runs: list[RunData]) -> str:
    """Return " (run, ...)" where a value is not that of all runs."""
    return f" ({', '.join(names)})" if len(names) < len(runs) else ""


def format_shape(run: RunData) -> str:
    """Return layers x width."""
    return f"{run.sizes.n_layers} × {run.sizes.d_model}" if run.sizes else ""


def short_model_name(path: str) -> str:
    """Return the run's name in runs/base, runs/base/hf and runs/base/checkpoints/300."""
    place = pathlib.PurePath(path)
    if place.name == "hf":
        place = place.parent
    elif place.parent.name == "checkpoints":
        place = place.parent.parent
    return place.name or path


def get_run_index(path: str, runs: list[RunData]) -> int:
    """Return which run a model path belongs to; the number of runs if none."""
    names = [run.directory.name for run in runs]
    name = short_model_name(path)
    return names.index(name) if name in names else len(names)
