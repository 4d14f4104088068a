"""Read what a model was made from: follow inputs from manifest to manifest, print, verify."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from jaxpt import doctor, io, stage, xla_settings
from jaxpt.data import teacher_samples
from jaxpt.spec import Manifest, UserError
from jaxpt.weights import checkpoint, hub

JsonObject = dict[str, Any]  # as read from a file, before its keys are known

DATA_STAGES = ("corpus", "tokenizer", "packed")  # stages known by the directory they are in
STAGES = (*DATA_STAGES, "grown")  # what comes before training
STAGE_KINDS = {"initialize": "grown", teacher_samples.STAGE: "samples"}


@dataclasses.dataclass
class LineageNode:
    """One stage in the making of a model.

    Attributes:
        key: its fingerprint, or its path if it has none.
        path: its directory.
        kind: "corpus", "tokenizer", "packed", "grown", "samples" (of a teacher) or "run".
        manifest: None for files that no stage wrote.
        parents: keys.
        teachers: of these, what a run learned from and was not made from.
        step: the checkpoint of it that was read, if one was named.
        has_changed: whether something else is there now than what was read.
        funnel: a corpus's funnel.json.
    """

    key: str
    path: io.Path
    kind: str
    manifest: JsonObject | None
    parents: list[str]
    teachers: set[str] = dataclasses.field(default_factory=set)
    step: io.Path | None = None
    has_changed: bool = False
    funnel: JsonObject | None = None


def format_lineage(directory: str | io.Path, verify: bool = False) -> str:
    """Return lines about what a model was made from, newest first, inputs indented below.

    Args:
        directory: of a finished stage.
        verify: recompute checksums and fingerprints of everything that is still there.

    Raises:
        UserError: the directory is no finished stage; with verify, names the first difference.
    """
    directory = io.resolve(io.path(directory))
    is_model = io.exists(directory / "config.json")
    is_run = io.exists(directory / "checkpoints")
    if is_model and not is_run and not io.exists(directory / "manifest.json"):
        raise UserError(
            f"{directory}: has no manifest.json, so it was not exported by jaxpt or not copied "
            "completely: its lineage is not known."
        )
    stage.read_manifest(directory)  # raises if it is missing
    notes: list[str] = []
    nodes = {node.key: node for node in read_lineage(directory, notes)}
    if notes:
        raise UserError(" ".join(notes))
    lines: list[str] = []
    seen: set[str] = set()
    versions: dict[str, str] = {}

    def visit(key: str, depth: int) -> None:
        node, indent = nodes[key], "  " * depth
        if key in seen:
            lines.append(f"{indent}{describe_node(node)}, as above")
            return
        seen.add(key)
        lines.append(f"{indent}{describe_node(node)}  {node.step or node.path}  {key}")
        lines.extend(f"{indent}    {fact}" for fact in describe_node_facts(node, versions))
        if node.manifest:
            versions.update(node.manifest["versions"])
        if verify:
            lines.append(f"{indent}    {verify_node(node)}")
        for parent in node.parents:
            visit(parent, depth + 1)

    visit(list(nodes)[-1], 0)
    return "\n".join(map(io.printable, lines))


def format_lineage_table(nodes: list[LineageNode]) -> list[str]:
    """Return the lineage as lines of a Markdown table, for a model card."""
    rows: list[str] = []
    versions: dict[str, str] = {}
    for node in nodes:
        manifest = node.manifest
        if not manifest and node.step:
            manifest = read_json(node.step / "manifest.json", [])
        manifest = manifest or {}
        facts = describe_node_facts(node, versions)[1:]
        versions.update(manifest.get("versions", {}))
        place = node.step if node.step and not node.manifest else node.path
        name = hub.recorded_hub_name(place) or shorten_path(place)
        key = "" if node.key == str(node.path) else node.key
        created = manifest.get("created", "")
        cells = (describe_node(node), name, key, created, "; ".join(facts))
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return [
        "| stage | where | fingerprint | created | details |",
        "|---|---|---|---|---|",
        *rows,
    ]


def shorten_path(place: io.Path) -> io.Path:
    """Return a path below the working directory as relative: a card is read elsewhere."""
    here = pathlib.Path.cwd()
    if isinstance(place, io.BucketPath):
        return place
    return place.relative_to(here) if place.is_relative_to(here) else place


def describe_node(node: LineageNode) -> str:
    """Return the name of a node's stage."""
    if node.manifest:
        return node.manifest["stage"]
    if not io.exists(node.path):
        return "gone"
    return "checkpoint" if node.step else "files"


def describe_node_facts(node: LineageNode, versions: dict[str, str]) -> list[str]:
    """Return when a stage ran; then its versions (if not in `versions`), sources and counts."""
    if not node.manifest:
        return []
    manifest = Manifest.from_json(node.manifest)
    facts = [f"created {manifest.created}, tokenizer {manifest.tokenizer or 'none'}"]
    changed = []
    for package, version in manifest.versions.items():
        if versions.get(package) != version:
            changed.append(f"{package} {version}")
    if changed:
        facts.append(f"with {', '.join(changed)}")
    step = node.step or find_output_checkpoint(node, manifest)
    if step:
        fingerprint = fingerprint_of_place(step)
        facts.append(f"checkpoint {step.name} {fingerprint or ''}".strip())
    facts += describe_counts(manifest)
    machine = doctor.read_summary(node.path) if doctor.FILE in manifest.outputs else ""
    if machine:
        facts.append(f"measured before: {machine}")
    variables = read_variables(node.path) if manifest.stage == "train" else {}
    if variables:
        facts.append(f"environment: {xla_settings.format_variables(variables)}")
    if node.has_changed:
        facts.append("made again since it was read: something else is there now")
    return facts


def read_variables(run_dir: io.Path) -> dict[str, str]:
    """Return the variables for XLA and JAX of a run's last start, by its starts.jsonl."""
    for line in reversed(io.read_lines(run_dir / "starts.jsonl")):
        try:
            return json.loads(line)["variables"]
        except (ValueError, KeyError):
            continue
    return {}


def find_output_checkpoint(node: LineageNode, manifest: Manifest) -> io.Path | None:
    """Return the checkpoint that a stage wrote, if it wrote one."""
    for name in sorted(manifest.outputs):
        if name.startswith("checkpoints/"):
            return node.path / "checkpoints" / pathlib.PurePath(name).parts[1]
    return None


def describe_counts(manifest: Manifest) -> list[str]:
    """Return how much a stage made, from what."""
    counts, config = manifest.counts, manifest.config
    if manifest.stage == "prepare":
        sizes = []
        for split in ("train", "heldout"):
            n_documents = sum(source["rows"] for source in counts[split].values())
            sizes.append(f"{split} {n_documents:,} documents")
        sources = f"from {', '.join(config['sources'])}; rules: {config['preset']}"
        return [sources, "; ".join(sizes)]
    if manifest.stage == "pack":
        sizes = []
        for name, source in counts["train"].items():
            sequences = f"{source['n_sequences']:,} sequences of {counts['seq_len']:,}"
            sizes.append(f"{name} {sequences}, {source['n_tokens']:,} tokens")
        return ["; ".join(sizes)]
    if manifest.stage == "train":
        sequences = f"{counts['n_sequences']:,} sequences, {counts['n_tokens']:,} tokens"
        return [f"{counts['n_steps']:,} steps, {sequences}"]
    if manifest.stage == "initialize":
        operators = config["initialize"]["grow"]
        return [f"grown by {', '.join(operators)}" if operators else "not grown"]
    return []


def verify_node(node: LineageNode) -> str:
    """Recompute a stage's checksums and fingerprints. Return a sentence that they match.

    Raises:
        UserError: something differs.
    """
    if not io.exists(node.path):
        return "not verified: no longer there"
    damage = checkpoint.find_damage(node.step) if node.step else None
    if damage:
        raise UserError(f"{node.step}: {damage}. Get it again from where it came.")
    if not node.manifest and node.step:
        return "verified: the checkpoint; its run has not finished"
    if not node.manifest:
        found = stage.fingerprint_path(node.path)
        if found != node.key:
            raise UserError(
                f"{node.path}: expected fingerprint {node.key}, as when it was read, got {found}. "
                "It is not what the model was made from."
            )
        return f"verified: {node.key}"
    manifest = Manifest.from_json(node.manifest)
    verify_files(node.path, manifest)
    if node.has_changed:
        raise UserError(
            f"{node.path}: was made again since it was read; what the model was made from is no "
            "longer there."
        )
    files = f"{len(manifest.outputs):,} files and the fingerprint"
    if node.kind != "corpus":  # inputs of other stages have lines of their own
        return f"verified: {files}"
    raw = list(manifest.inputs.values())
    remaining = [given for given in raw if io.exists(io.path(given["path"]))]
    for given in remaining:
        if stage.fingerprint_path(io.path(given["path"])) != given["fingerprint"]:
            raise UserError(
                f"{given['path']}: is not what {node.path} was made from: changed since "
                f"{manifest.created}."
            )
    return f"verified: {files}; of {len(raw):,} source files {len(remaining):,} remain and match"


def verify_files(directory: io.Path, manifest: Manifest) -> None:
    """Raise UserError unless every file of a stage and its manifest are as they were written."""
    damage = io.find_damage(directory, verify=True)
    if damage and not io.exists(directory / damage.name):
        raise UserError(
            f"{directory / damage.name}: missing, though the manifest names it. Copy it from "
            "where the rest came from."
        )
    if damage:
        raise UserError(
            f"{directory / damage.name}: its checksum differs from the manifest's: changed since "
            f"{manifest.created}. Get it again from where it came."
        )
    request = stage.request_fingerprint(
        manifest.stage, manifest.config, manifest.inputs, manifest.seed
    )
    if stage.fingerprint([request, manifest.outputs]) != manifest.fingerprint:
        raise UserError(
            f"{directory / 'manifest.json'}: its fingerprint does not match its content: edited by "
            "hand. Get it again from where it came."
        )


def read_lineage(directory: io.Path, notes: list[str]) -> list[LineageNode]:
    """Return a run and all it was made from, oldest first, by following manifests' inputs.

    `notes` receives a sentence for every file that cannot be used.
    """
    nodes: dict[str, LineageNode] = {}

    def visit(home: io.Path, fingerprint: str | None) -> str:
        step = home if home.parent.name == "checkpoints" else None
        if step:
            home = home.parent.parent  # a checkpoint stands for its run
        manifest = read_json(home / "manifest.json", notes) or {}
        key = manifest.get("fingerprint") or fingerprint or str(home)
        if key in nodes:
            return key
        kind = find_kind(home, manifest)
        node = LineageNode(key, home, kind, manifest or None, [], step=step)
        nodes[key] = node
        if node.kind == "corpus":  # its inputs are raw text, which the data section shows
            node.funnel = read_json(home / "funnel.json", notes)
            return key
        sources = set()
        for name, path, recorded in read_input_nodes(home, node.manifest, notes):
            place = locate_input(path, recorded, home)
            parent = visit(place, recorded)
            if recorded is not None and fingerprint_of_place(place) not in (None, recorded):
                nodes[parent].has_changed = True
            if parent not in node.parents and parent != key:
                node.parents.append(parent)
            if not name.startswith("teacher"):
                sources.add(parent)
        node.teachers = set(node.parents) - sources
        nodes[key] = nodes.pop(key)  # after its parents
        return key

    visit(directory, fingerprint_of_place(directory))
    return list(nodes.values())


def find_kind(home: io.Path, manifest: JsonObject) -> str:
    """Return a node's kind, by its directory and stage."""
    if home.name in DATA_STAGES:
        return home.name
    return STAGE_KINDS.get(manifest.get("stage", ""), "run")


def read_input_nodes(
    home: io.Path, manifest: JsonObject | None, notes: list[str]
) -> list[tuple[str, str, str | None]]:
    """Return (name, path, fingerprint) of what a stage read.

    An unfinished run has them in its config, or its data stages in its directory.
    """
    inputs: list[tuple[str, str, str | None]] = []
    if manifest:
        for name, found in manifest["inputs"].items():
            if isinstance(found, dict) and isinstance(found.get("path"), str):
                inputs.append((name, found["path"], found.get("fingerprint")))
        return inputs
    settings = read_json(home / "config.json", notes) or {}
    packed = (settings.get("mixture") or {}).get("packed_paths")
    if not packed:
        own = [home / kind for kind in DATA_STAGES]
        packed = [path for path in own if io.exists(path / "manifest.json")]
    inputs += [("packed", str(path), None) for path in packed]
    source = (settings.get("initialize") or {}).get("source", "random")
    if source != "random":
        inputs.append(("initialize", source, None))
    teacher = (settings.get("distill") or {}).get("teacher")
    if teacher:
        inputs.append(("teacher", teacher, None))
    return inputs


def list_own_stages(nodes: list[LineageNode]) -> list[LineageNode]:
    """Return the finished stages of the last node's data and growth, none behind another run."""
    by_key = {node.key: node for node in nodes}
    own: list[LineageNode] = []
    queue = [nodes[-1].key]
    for key in queue:  # grows while it is walked
        node = by_key[key]
        if node.kind in STAGES and node.manifest and node not in own:
            own.append(node)
        if node.kind in DATA_STAGES or node is nodes[-1]:
            queue += [parent for parent in node.parents if parent not in node.teachers]
    return own


def locate_input(path: str, fingerprint: str | None, home: io.Path) -> io.Path:
    """Return where an input is now.

    That is its path or, if a whole tree was moved, the end of its path below a directory above
    what was made from it.
    """
    named = io.path(path)
    candidates = [named]
    for above in (home, *home.parents[:2]):
        for i in range(1, len(named.parts)):
            candidates.append(above / "/".join(named.parts[i:]))
    existing = []
    for place in candidates:
        if io.exists(place):
            if fingerprint_of_place(place) == fingerprint:
                return io.resolve(place)
            existing.append(place)
    return io.resolve((existing or [named])[0])


def fingerprint_of_place(place: io.Path) -> str | None:
    """Return the fingerprint of the finished stage in a directory, if there is one."""
    return (read_json(place / "manifest.json", []) or {}).get("fingerprint")


SIZES = ("n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "d_head", "vocab_size")
# the keys that a file must have to be of use, and their types
REQUIRED_KEYS: dict[str, dict[str, Any]] = {
    "manifest.json": {"fingerprint": str, "inputs": dict, "counts": dict},
    "spec.json": dict.fromkeys(SIZES, int),
    "growth.json": {
        "parent": str,
        "operators": list,
        "at_step": int | None,
        "layer_map": list,
        "n_params": dict,
        "spec": dict,
        "verdict": str,
    },
    "funnel.json": {"sources": list, "steps": list},
    "samples.json": {"prompts": list},
    "differences.json": {"models": list, "better": list, "worse": list},
    "plan.json": {"targets": list},
    "config.json": {},
}
EVALUATION_KEYS = {"results": dict}  # of any other file


def read_json(path: io.Path, notes: list[str]) -> JsonObject | None:
    """Return the object in a file; None if there is no file or it is of no use, which is noted."""
    try:
        found = io.read_json(path)
    except io.MissingFileError:
        return None
    except UserError as error:
        notes.append(str(error))
        return None
    wrong = []
    if not isinstance(found, dict):
        wrong = ["an object"]
        found = None
    else:
        for key, kind in REQUIRED_KEYS.get(path.name, EVALUATION_KEYS).items():
            if not isinstance(found.get(key, ...), kind):
                wrong.append(repr(key))
    if wrong:
        notes.append(f"{path}: expected {', '.join(wrong)} in it; left out.")
        return None
    return found
