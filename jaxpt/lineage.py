"""What a model was made from: the stages behind a run or an export, followed from manifest to manifest, told and checked again."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from jaxpt import stage
from jaxpt.spec import Manifest, UserError
from jaxpt.weights import checkpoint, hub


def format_lineage(directory: str | pathlib.Path, verify: bool = False) -> str:
    """What a model was made from, as lines for a terminal: the newest first, what each was made from beneath it.

    verify   check everything again that still lies where it was: bytes against checksums, and each stage's fingerprint

    Raises UserError where the directory is no finished stage, and, with verify, naming the first thing that does not hold.
    """
    directory = stage.local_path(directory).resolve()
    if (
        (directory / "config.json").is_file()
        and not (directory / "manifest.json").exists()
        and not (directory / "checkpoints").is_dir()
    ):
        raise UserError(
            f"{directory}: has no manifest.json, so it was not exported by jaxpt, or not all of it was copied: its lineage is not known."
        )
    Manifest.load(directory)  # says what is missing
    notes: list[str] = []
    nodes = {node.key: node for node in read_lineage(directory, notes)}
    if notes:
        raise UserError(" ".join(notes))
    *_, newest = nodes
    lines, told, versions = [], set(), {}

    def visit(key: str, depth: int) -> None:
        node, indent = nodes[key], "  " * depth
        if key in told:
            lines.append(f"{indent}{describe_node(node)}, as above")
            return
        told.add(key)
        lines.append(f"{indent}{describe_node(node)}  {node.step or node.path}  {key}")
        lines.extend(f"{indent}    {fact}" for fact in describe_node_facts(node, versions))
        versions.update(node.manifest["versions"] if node.manifest else {})
        if verify:
            lines.append(f"{indent}    {verify_node(node)}")
        for parent in node.parents:
            visit(parent, depth + 1)

    visit(newest, 0)
    return "\n".join(lines)


def format_lineage_table(nodes: list[LineageNode]) -> list[str]:
    """The same as lines of Markdown, for a model's card; nodes in the order in which they are told."""
    rows, versions = [], {}
    for node in nodes:
        made = (
            node.manifest
            or (read_json(node.step / "manifest.json", []) if node.step else None)
            or {}
        )
        _, *told = describe_node_facts(node, versions) or [""]
        versions.update(made.get("versions", {}))
        place, key = (
            node.step if node.step and not node.manifest else node.path,
            "" if node.key == str(node.path) else node.key,
        )
        rows.append(
            f"| {describe_node(node)} | {hub.recorded_hub_name(place) or shorten_path(place)} | {key} | {made.get('created', '')} | {'; '.join(told)} |"
        )
    return ["| what | where | fingerprint | made | of it |", "|---|---|---|---|---|", *rows]


def shorten_path(place: pathlib.Path) -> pathlib.Path:
    """Seen from here, where it lies below: a card is read elsewhere."""
    return (
        place.relative_to(pathlib.Path.cwd()) if place.is_relative_to(pathlib.Path.cwd()) else place
    )


def describe_node(node: LineageNode) -> str:
    if node.manifest:
        return node.manifest["stage"]
    return "gone" if not node.path.exists() else "checkpoint" if node.step else "files"


def describe_node_facts(node: LineageNode, versions: dict[str, str]) -> list[str]:
    """What a person asks of a stage: when; then how much, from which sources by which rules, with which versions, unless told already."""
    if not node.manifest:
        return []
    manifest = Manifest(**node.manifest)
    counts, asked = manifest.counts, manifest.config
    others = [
        f"{package} {version}"
        for package, version in manifest.versions.items()
        if versions.get(package) != version
    ]
    found = [f"made {manifest.created}, tokenizer {manifest.tokenizer or 'none'}"]
    if others:
        found.append(f"with {', '.join(others)}")
    ends = sorted(
        {
            pathlib.PurePath(name).parts[1]
            for name in manifest.outputs
            if name.startswith("checkpoints/")
        }
    )
    if step := node.step or next((node.path / "checkpoints" / end for end in ends), None):
        found.append(
            " ".join(filter(None, [f"checkpoint {step.name}", fingerprint_of_place(step)]))
        )
    if manifest.stage == "prepare":
        found.append(f"from {', '.join(asked['sources'])}; rules: {asked['preset']}")
        found.append(
            "; ".join(
                f"{split} {sum(each['rows'] for each in counts[split].values()):,} documents"
                for split in ("train", "heldout")
            )
        )
    if manifest.stage == "pack":
        found.append(
            "; ".join(
                f"{name} {each['rows']:,} rows of {counts['seq_len']:,}, {each['tokens']:,} tokens"
                for name, each in counts["train"].items()
            )
        )
    if manifest.stage == "train":
        found.append(
            f"{counts['steps']:,} steps, {counts['rows']:,} rows, {counts['tokens']:,} tokens"
        )
    if manifest.stage == "initialize":
        found.append(
            f"grown by {', '.join(asked['initialize']['grow'])}"
            if asked["initialize"]["grow"]
            else "taken as it is"
        )
    if node.has_changed:
        found.append("made anew since it was read: something else lies there now")
    return found


def verify_node(node: LineageNode) -> str:
    """Recompute what a stage says of itself and of what it read; a sentence that it holds. Raises UserError where it does not."""
    if not node.path.exists():
        return "not checked: it does not lie there any more"
    if node.step and (wrong := checkpoint.find_damage(node.step)):
        raise UserError(f"{node.step}: {wrong}. Get it again from where it came.")
    if node.step and not node.manifest:
        return "holds: the checkpoint; its run has not finished"
    if not node.manifest:
        if (found := stage.fingerprint_path(node.path)) != node.key:
            raise UserError(
                f"{node.path}: its files' fingerprint is {found}, and {node.key} when it was read. It is not what the model was made from."
            )
        return f"holds: {node.key}"
    manifest = Manifest(**node.manifest)
    if damaged := stage.find_damaged_file(node.path, manifest):
        name, there = damaged
        if not there:
            raise UserError(
                f"{node.path / name}: gone, though the manifest names it. Copy it from where the rest came from."
            )
        raise UserError(
            f"{node.path / name}: its checksum is not the manifest's: changed since {manifest.created}. Get it again from where it came."
        )
    asked = stage.request_fingerprint(
        manifest.stage, manifest.config, manifest.inputs, manifest.seed
    )
    if stage.fingerprint([asked, manifest.outputs]) != manifest.fingerprint:
        raise UserError(
            f"{node.path / 'manifest.json'}: its fingerprint is not that of what it says: edited by hand. Get it again from where it came."
        )
    if node.has_changed:
        raise UserError(
            f"{node.path}: was made anew since it was read; what the model was made from does not lie there any more."
        )
    raw = (
        list(manifest.inputs.values()) if node.kind == "corpus" else []
    )  # what others were made from has lines of its own
    there = [given for given in raw if pathlib.Path(given["path"]).exists()]
    for given in there:
        if stage.fingerprint_path(given["path"]) != given["fingerprint"]:
            raise UserError(
                f"{given['path']}: is not what {node.path} was made from: changed since {manifest.created}."
            )
    inputs = (
        f"; of {len(raw):,} files that it was made from, {len(there):,} are there and hold"
        if raw
        else ""
    )
    return f"holds: {len(manifest.outputs):,} files and the fingerprint{inputs}"


@dataclasses.dataclass
class LineageNode:
    """One stage in the making of a model. path: where it lies; key: its fingerprint or, for want of one, its path; parents: keys.

    step: the checkpoint of it that was read, where one was named; changed: something else lies there now than what was read from there;
    funnel: a corpus's.
    """

    key: str
    path: pathlib.Path
    kind: str
    manifest: dict | None
    parents: list[str]
    step: pathlib.Path | None = None
    has_changed: bool = False
    funnel: dict | None = None


def read_lineage(directory: pathlib.Path, notes: list[str]) -> list[LineageNode]:
    """The run and all it was made from, oldest first, by following the inputs that manifests name."""
    nodes: dict[str, LineageNode] = {}

    def visit(home: pathlib.Path, fingerprint: str | None) -> str:
        step = (
            home if home.parent.name == "checkpoints" else None
        )  # a checkpoint stands for its run
        home = home.parent.parent if step else home
        manifest = read_json(home / "manifest.json", notes) or {}
        key = manifest.get("fingerprint") or fingerprint or str(home)
        if key in nodes:
            return key
        kind = (
            home.name
            if home.name in DATA_STAGES
            else "grown"
            if manifest.get("stage") == "initialize"
            else "run"
        )
        node = nodes[key] = LineageNode(key, home, kind, manifest or None, [], step)
        if node.kind == "corpus":  # its inputs are raw text, which the data section tells of
            node.funnel = read_json(home / "funnel.json", notes)
            return key
        for path, recorded in read_input_nodes(home, node.manifest, notes):
            place = locate_input(path, recorded, home)
            parent = visit(place, recorded)
            nodes[parent].has_changed |= recorded is not None and fingerprint_of_place(
                place
            ) not in (None, recorded)
            if parent not in node.parents and parent != key:
                node.parents.append(parent)
        nodes[key] = nodes.pop(key)  # behind its parents
        return key

    visit(directory, fingerprint_of_place(directory))
    return list(nodes.values())


def read_input_nodes(
    home: pathlib.Path, manifest: dict | None, notes: list[str]
) -> list[tuple[str, str | None]]:
    """(path, fingerprint) of what a stage read. Of a run that still goes on, its config tells, or the stages in its directory do."""
    if manifest:
        return [
            (found["path"], found.get("fingerprint"))
            for found in manifest["inputs"].values()
            if isinstance(found, dict) and isinstance(found.get("path"), str)
        ]
    settings = read_json(home / "config.json", notes) or {}
    packed = (settings.get("mixture") or {}).get("packed") or [
        home / kind for kind in DATA_STAGES if (home / kind / "manifest.json").is_file()
    ]
    source = (settings.get("initialize") or {}).get("source", "random")
    return [(str(path), None) for path in (*packed, *([] if source == "random" else [source]))]


def list_own_stages(nodes: list[LineageNode]) -> list[LineageNode]:
    """The finished stages that the last node needed: those of its data and its own growth, none that lie behind another run."""
    at = {node.key: node for node in nodes}
    own, waiting = [], [nodes[-1].key]
    for key in waiting:  # it grows while it is walked
        node = at[key]
        if node.kind in STAGES and node.manifest and node not in own:
            own.append(node)
        if node.kind in DATA_STAGES or node is nodes[-1]:
            waiting += node.parents
    return own


def locate_input(path: str, fingerprint: str | None, home: pathlib.Path) -> pathlib.Path:
    """Where an input lies now: as its path says or, when a whole tree was moved, at the end of its path from a directory above what it made."""
    named = pathlib.Path(path)
    ends = [pathlib.Path(*named.parts[i:]) for i in range(1, len(named.parts))]
    there = [
        place
        for place in (named, *(above / end for above in (home, *home.parents[:2]) for end in ends))
        if place.exists()
    ]
    same = [place for place in there if fingerprint_of_place(place) == fingerprint]
    return (same or there or [named])[0].resolve()


def fingerprint_of_place(place: pathlib.Path) -> str | None:
    """Of the finished stage there; None where there is none."""
    return (read_json(place / "manifest.json", []) or {}).get("fingerprint")


DATA_STAGES = ("corpus", "tokenizer", "packed")  # stages known by the directory they lie in
STAGES = (*DATA_STAGES, "grown")  # what comes before training
NODE_KINDS = {  # what a file must hold at least to be of use
    "manifest.json": {"fingerprint": str, "inputs": dict, "counts": dict},
    "spec.json": dict.fromkeys(
        ("n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "d_head", "vocab_size"), int
    ),
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


def read_json(path: pathlib.Path, notes: list[str]) -> dict | None:
    """The object in the file; None where there is no file, or where it is of no use, which is noted."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        notes.append(f"{path}: cannot be read ({error}); left out.")
        return None
    form = NODE_KINDS.get(path.name, {"results": dict})  # others are evaluations
    wrong = (
        ["an object"]
        if not isinstance(found, dict)
        else [repr(key) for key in form if not isinstance(found.get(key, ...), form[key])]
    )
    if wrong:
        notes.append(f"{path}: does not hold {', '.join(wrong)} as wanted; left out.")
        return None
    return found
