"""Run stages: publish whole directories, skip or refuse, show progress, fail in one sentence.

A stage is a directory in and a directory out. `run_stage` is its only way to write: into
`OUT.partial`, which becomes `OUT` by one rename after manifest.json was written last. A stage that
died therefore never looks finished, and finds its own partial work again when it is started again
with the same inputs and config.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from jaxpt import logs
from jaxpt.spec import Manifest, Record, UserError, encode_json

log = logging.getLogger(__name__)
T = TypeVar("T")

RECORDED_PACKAGES = "jaxpt jax flax optax orbax-checkpoint grain sentencepiece tokenizers"
RECORDED_PACKAGES += " transformers pyarrow"


@dataclasses.dataclass(frozen=True)
class StageRequest:
    """What a stage was asked to do.

    Attributes:
        name: the stage.
        config: the settings that its result depends on.
        inputs: name -> {"path", "fingerprint"}.
        seed: seed of its randomness, if any.
    """

    name: str
    config: Mapping[str, Any]
    inputs: Mapping[str, dict[str, str]]
    seed: int | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the request: the content of its inputs counts, their place does not."""
        return request_fingerprint(self.name, self.config, self.inputs, self.seed)


def run_stage(
    name: str,
    out: pathlib.Path,
    work: Callable[[pathlib.Path], dict[str, Any]],
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, pathlib.Path],
    seed: int | None = None,
    tokenizer: str | None = None,
    replace: bool = False,
) -> Manifest:
    """Call `work(partial_directory)` and publish the directory as `out`, unless it is done.

    Args:
        name: the stage.
        out: the directory to publish.
        work: writes files into a directory and returns the counts for the manifest; a key
            "tokenizer" among them becomes Manifest.tokenizer. It may find its own unfinished files:
            only a start with equal config and inputs left them.
        config: the settings that the result depends on.
        inputs: name -> path of a stage, file or directory that is read.
        seed: seed of the stage's randomness.
        tokenizer: fingerprint of the tokenizer in use.
        replace: overwrite the result of another config or other inputs.

    Raises:
        UserError: `out` holds another result, and `replace` is not set.
    """
    found = {}
    for key, path in inputs.items():
        found[key] = {"path": str(path), "fingerprint": fingerprint_path(path)}
    request = StageRequest(name, config, found, seed)
    finished = find_finished(out, request, replace)
    if finished:
        log.info(f"{name}: {out} is finished already, nothing to do")
        return finished

    partial = open_partial(out, request.fingerprint)
    start = time.monotonic()
    counts = work(partial)
    tokenizer = counts.pop("tokenizer", tokenizer)
    (partial / ".request").unlink()
    manifest = make_manifest(
        request,
        outputs=hash_files(partial),
        counts=counts,
        tokenizer=tokenizer,
        seconds=time.monotonic() - start,
    )
    write_manifest(manifest, partial)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return manifest


def find_finished(out: pathlib.Path, request: StageRequest, replace: bool) -> Manifest | None:
    """Return the manifest of `out` if it is the requested work; raise if it is other work."""
    if (out / "manifest.json").exists():
        manifest = Manifest.load(out)
        there = request_fingerprint(manifest.stage, manifest.config, manifest.inputs, manifest.seed)
        if there == request.fingerprint:
            return manifest
        if not replace:
            raise UserError(
                f"{request.name}: {out} holds the result of "
                f"{describe_difference(manifest, request)}. "
                "Give another --workdir, or --replace."
            )
    elif out.exists() and any(out.iterdir()) and not replace:
        raise UserError(
            f"{request.name}: {out} holds files that no stage wrote (no manifest.json). "
            "Move them away, give another --workdir, or --replace."
        )
    return None


def open_partial(out: pathlib.Path, request: str) -> pathlib.Path:
    """Return OUT.partial, emptied unless an equal request left it."""
    partial = out.with_name(out.name + ".partial")
    marker = partial / ".request"
    is_ours = marker.exists() and marker.read_text() == request
    if partial.exists() and not is_ours:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    marker.write_text(request)
    return partial


def make_manifest(
    request: StageRequest,
    *,
    outputs: dict[str, str],
    counts: dict[str, Any],
    tokenizer: str | None,
    seconds: float,
) -> Manifest:
    """Return the manifest of a stage that did what was requested."""
    return Manifest(
        stage=request.name,
        fingerprint=fingerprint([request.fingerprint, outputs]),
        config=to_jsonable(request.config),
        inputs=dict(request.inputs),
        outputs=outputs,
        counts=to_jsonable(counts),
        tokenizer=tokenizer,
        seed=request.seed,
        versions=package_versions(),
        created=now(),
        seconds=round(seconds, 3),
    )


def now() -> str:
    """Return the time as ISO 8601, UTC, in seconds."""
    instant = datetime.datetime.now(datetime.UTC)
    return instant.isoformat(timespec="seconds")


def write_manifest(manifest: Manifest, directory: pathlib.Path) -> None:
    """Write manifest.json, whole or not at all."""
    write_json_atomic(directory / "manifest.json", manifest)


def write_json_atomic(path: pathlib.Path, value: Any) -> None:
    """Write a record or plain value as JSON, whole or not at all."""
    text = json.dumps(encode_json(value), indent=1)
    write_atomic(path, f"{text}\n")


def write_atomic(path: pathlib.Path, text: str) -> None:
    """Write a small file so that a reader finds the old one or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def check_output_path(to: pathlib.Path | None, example: str) -> pathlib.Path | None:
    """Return the path of --to, with its directories made, before anything is computed.

    Args:
        to: what --to says, if anything.
        example: a file name for the error message.

    Raises:
        UserError: no file can be written there.
    """
    if to is None:
        return None
    to = local_path(to)
    if to.is_dir():
        raise UserError(
            f"--to {to}: is a directory. Name the file to write, such as {to / example}."
        )
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=to.parent):
            pass
    except OSError as error:
        raise UserError(
            f"--to {to}: cannot be written ({error.strerror}). Name a file in a directory of yours."
        ) from None
    return to


def read_cached_result(path: pathlib.Path | None, request: str) -> dict[str, Any] | None:
    """Return a result file's content if it answers this request (its key "request"), else None."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if isinstance(found, dict) and found.get("request") == request:
        return found
    return None


# ---- fingerprints: what a thing is, whatever its place and time


def fingerprint(value: Any) -> str:
    """Return 16 hex digits for a JSON-able value; equal values have equal ones on any machine."""
    text = json.dumps(to_jsonable(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_path(path: pathlib.Path) -> str:
    """Return a stage's manifest's fingerprint, or the hash of a file or of a directory's files."""
    path = pathlib.Path(path)
    if (path / "manifest.json").exists():
        return Manifest.load(path).fingerprint
    if path.is_file():
        return sha256_file(path)[:16]
    if not path.exists():
        raise UserError(f"{path}: not found. Check the path, or run the stage that writes it.")
    return fingerprint(hash_files(path))


def hash_files(directory: pathlib.Path) -> dict[str, str]:
    """Return relative name -> sha256 of every file below a directory."""
    hashes = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            name = str(file.relative_to(directory))
            hashes[name] = sha256_file(file)
    return hashes


def request_fingerprint(
    name: str, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str]], seed: int | None
) -> str:
    """Return the hash of what a stage was asked to do: content of inputs counts, place does not."""
    contents = {key: found["fingerprint"] for key, found in inputs.items()}
    return fingerprint([name, config, contents, seed])


def describe_difference(manifest: Manifest, request: StageRequest) -> str:
    """Say the first way in which a finished stage differs from what is requested."""
    config = to_jsonable(request.config)
    if config != manifest.config:
        key, there, asked = first_difference(manifest.config, config)
        return f"another config ({key}: {there!r} there, {asked!r} requested)"
    for key in sorted(request.inputs.keys() | manifest.inputs.keys()):
        there = manifest.inputs.get(key, {})
        asked = request.inputs.get(key, {})
        if there.get("fingerprint") != asked.get("fingerprint"):
            return (
                f"another input ({key}: {there.get('path')} there, "
                f"{asked.get('path')} requested, their contents differ)"
            )
    return (
        f"another stage or seed ({manifest.stage}, seed {manifest.seed} there; "
        f"seed {request.seed} requested)"
    )


def first_difference(there: Any, asked: Any, at: str = "") -> tuple[str, Any, Any]:
    """Return (where, one value, other value) of the first place at which two JSON values differ.

    `where` reads "train.steps" or "rules[0]".
    """
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in sorted(there | asked):
            is_in_both = key in there and key in asked
            if not is_in_both or there[key] != asked[key]:
                where = f"{at}.{key}" if at else key
                return first_difference(there.get(key), asked.get(key), where)
    if isinstance(there, list) and isinstance(asked, list) and len(there) == len(asked):
        for i, (one, other) in enumerate(zip(there, asked, strict=True)):
            if one != other:
                return first_difference(one, other, f"{at}[{i}]")
    return at, there, asked


def sha256_file(path: pathlib.Path) -> str:
    """Return the sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DamagedFile(NamedTuple):
    """A file of a stage that is missing or differs from its checksum."""

    name: str
    exists: bool


def find_damaged_file(directory: pathlib.Path, manifest: Manifest) -> DamagedFile | None:
    """Return the first file of a stage that differs from its checksum; None if all are whole."""

    def is_whole(name: str) -> bool:
        path = directory / name
        return path.is_file() and sha256_file(path) == manifest.outputs[name]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing frees the GIL
        checks = list(pool.map(is_whole, manifest.outputs))
    for name, whole in zip(manifest.outputs, checks, strict=True):
        if not whole:
            return DamagedFile(name, (directory / name).is_file())
    return None


def to_jsonable(value: Any) -> Any:
    """Return a value as JSON gives it back, so that both compare equal."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value, default=to_plain_scalar))


def to_plain_scalar(value: Any) -> Any:
    """Return a numpy or jax scalar as a Python number, anything else as text."""
    if hasattr(value, "item"):
        return value.item()
    return str(value)


@functools.cache
def package_versions() -> dict[str, str]:
    """Return name -> version of Python and of the packages that results depend on."""
    found = {"python": sys.version.split()[0]}
    for package in RECORDED_PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@dataclasses.dataclass(frozen=True)
class ProgramRecord(Record):
    """What runs: kept in the run directory as program.json.

    Attributes:
        started: ISO 8601, UTC.
        command: the command line.
        directory: the working directory.
        host: name of the machine.
        versions: package -> version.
        commit: git commit of this code; empty without git or a clone.
    """

    started: str
    command: str
    directory: str
    host: str
    versions: dict[str, str]
    commit: str


def describe_program() -> tuple[ProgramRecord, str]:
    """Return what runs here, and the diff of this code against its commit."""
    record = ProgramRecord(
        started=now(),
        command=shlex.join([sys.executable, *sys.argv]),
        directory=os.getcwd(),
        host=socket.gethostname(),
        versions=package_versions(),
        commit=run_git("rev-parse", "HEAD").strip(),
    )
    return record, run_git("diff", "HEAD")


def run_git(*arguments: str) -> str:
    """Return what git prints about this code; empty without git or a clone."""
    package = pathlib.Path(__file__).resolve().parent
    command = ["git", "-C", str(package), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


# ---- what a person sees


@contextlib.contextmanager
def progress_bar(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], Any]]:
    """Show a bar on a terminal, a line every five seconds elsewhere. Yield `advance(n)`."""
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()
    bar = tqdm(
        total=total,
        desc=label,
        unit=f" {unit}",
        unit_scale=True,
        leave=False,
        dynamic_ncols=on_terminal,
        ncols=None if on_terminal else 80,
        mininterval=0.2 if on_terminal else 5,
        delay=0 if on_terminal else 5,
        file=sys.stderr if on_terminal else LineWriter(),
    )
    try:
        yield bar.update
    finally:
        bar.close()


def track_progress(items: Iterable[T], label: str, total: int | None, unit: str) -> Iterator[T]:
    """Yield the items, with progress shown one step each."""
    with progress_bar(label, total, unit) as advance:
        for item in items:
            yield item
            advance(1)


class LineWriter:
    """A file that turns a bar's carriage returns into lines, for logs and pipes."""

    def write(self, text: str) -> None:
        """Print the text without surrounding blanks, if any is left."""
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Flush stderr."""
        sys.stderr.flush()


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def entry_point(main: Callable[[], None]) -> None:
    """Run a command's main. A UserError becomes one sentence on stderr and exit status 1."""
    logs.set_up_logging()
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # whoever read our output (head, less) has gone
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    except OSError as error:
        if not is_disk_full(error):
            raise
        sys.exit(
            f"error: the disk is full ({str(error)[:300]}). What was finished before is whole; "
            "make room and run the same command again."
        )
    except KeyboardInterrupt:
        log.info("interrupted; finished work is kept, run the same command again to continue")
        sys.exit(130)


def is_disk_full(error: OSError) -> bool:
    """Return whether an error means that no space is left."""
    # what copies whole directories (shutil.Error) has the reason only in its text
    reasons = map(os.strerror, DISK_FULL)
    return error.errno in DISK_FULL or any(reason in str(error) for reason in reasons)


def use_large_pages() -> None:
    """Start this program again with glibc set to use pages of 2 MB. Call it first in a main.

    A training step on a CPU takes gigabytes of fresh memory each time; in pages of 4 kB that alone
    is a tenth of it (1.12 x the tokens per second at 13 and 248 million parameters,
    benchmarks/train_cpu.py). Without glibc it changes nothing.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    # orig_argv: what runs inside another program is not that program's to start again
    is_ours = sys.argv[0] in sys.orig_argv
    is_set = "glibc.malloc.hugetlb" in tunables
    if sys.platform == "linux" and is_ours and not is_set:
        tunables = f"{tunables}:glibc.malloc.hugetlb=1"
        os.environ["GLIBC_TUNABLES"] = tunables.lstrip(":")
        os.execv(sys.executable, sys.orig_argv)


def local_path(text: str | pathlib.Path) -> pathlib.Path:
    """Return a path on this machine's disks or mounts. Raise UserError for an object-store URL."""
    if "://" in str(text):
        raise UserError(
            f"{text}: stages write to disks and mounted buckets only. "
            "Mount it (gcsfuse, s3fs) and give the mount point."
        )
    return pathlib.Path(text).expanduser()
