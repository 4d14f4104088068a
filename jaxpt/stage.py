"""Run stages: publish whole directories, skip or refuse, show progress, fail in one sentence.

A stage is a directory in and a directory out. `run_stage` is its only way to write: into the
working directory OUT.partial, whose files become those of OUT by `io.publish`, manifest.json last.
A stage that died therefore never looks finished, and finds its own work again when it is started
with the same inputs and config. While it runs it holds OUT: a second start learns who does.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import errno
import functools
import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import TextIOWrapper
from types import FrameType
from typing import Any, TypeVar

from jaxpt import io, logs
from jaxpt.spec import Manifest, ModelSpec, Record, UserError
from jaxpt.text import printable

log = logging.getLogger(__name__)
T = TypeVar("T")

RECORDED_PACKAGES = "jaxpt jax flax optax orbax-checkpoint grain sentencepiece tokenizers"
RECORDED_PACKAGES += " transformers pyarrow"
MAX_MESSAGE = 1600  # characters
WRITERS = {"corpus": "prepare", "tokenizer": "train_tokenizer", "packed": "pack"}  # in this order
INTERRUPTED = 130  # exit status
RETRY_SECONDS = 0.1  # until an interrupt that would do harm is tried again
REQUEST = ".request"  # in a working directory: the fingerprint of the request it serves


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
    out: io.Path,
    work: Callable[[pathlib.Path], dict[str, Any]],
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, io.Path],
    seed: int | None = None,
    tokenizer: str | None = None,
    replace: bool = False,
    verify: bool = False,
    flag: str = "--workdir",
) -> Manifest:
    """Call `work(working_directory)` and publish the directory as `out`, unless it is done.

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
        replace: overwrite this stage's result of another config or other inputs.
        verify: before it is called done, compare checksums too, which reads every byte.
        flag: the one that gives `out`, for errors.

    Raises:
        UserError: `out` holds another result and `replace` is not set, or what no such stage
            wrote; it is or holds an input; or another process is writing it.
    """
    out = io.path(out)
    io.check_output(out, inputs.values())
    found = {}
    for key, path in inputs.items():
        found[key] = {"path": str(path), "fingerprint": fingerprint_path(path)}
    request = StageRequest(name, config, found, seed)
    finished = find_finished(out, request, replace, verify)
    if finished:
        return finished
    with io.hold(out) as lock:
        io.finish_publishing(out)
        finished = find_finished(out, request, replace, verify)
        if finished:
            return finished
        check_replaceable(out, request, replace, flag)
        working = open_working(out, request)
        start = time.monotonic()
        counts = work(working)
        manifest = make_manifest(
            request,
            sealed=io.seal(working, [REQUEST]),
            tokenizer=counts.pop("tokenizer", tokenizer),
            counts=counts,
            seconds=time.monotonic() - start,
        )
        lock.check()
        io.publish(working, out, manifest.to_json())
    return manifest


def find_finished(
    out: io.Path, request: StageRequest, replace: bool, verify: bool
) -> Manifest | None:
    """Return the manifest of `out` if it is the requested work, and log that it is.

    Raises:
        UserError: it is the requested work, but damaged, and is not to be replaced.
    """
    if not io.exists(out / "manifest.json"):
        return None
    manifest = read_manifest(out)
    there = request_fingerprint(manifest.stage, manifest.config, manifest.inputs, manifest.seed)
    if there != request.fingerprint:
        return None
    damage = io.find_damage(out, verify)
    if damage is None:
        verified = " (checksums verified)" if verify else ""
        log.info(f"{request.name}: {out} is finished already{verified}, nothing to do")
        return manifest
    if not replace:
        raise UserError(
            f"{request.name}: {out} was finished, but {io.printable(damage.name)} "
            f"{damage.reason}. Copy it from where there is another, or make all anew by --replace."
        )
    return None


def check_replaceable(out: io.Path, request: StageRequest, replace: bool, flag: str) -> None:
    """Raise UserError if `out` holds what this start may not overwrite; log what it overwrites."""
    if not io.exists(out / "manifest.json"):
        if io.size(out) is not None or io.list_files(out):
            raise UserError(
                f"{request.name}: {out} holds files that no stage wrote (no manifest.json). "
                f"Move them away, or give another {flag}."
            )
        return
    manifest = read_manifest(out)
    if not replace:
        raise UserError(
            f"{request.name}: {out} holds the result of {describe_difference(manifest, request)}. "
            f"Give another {flag}, or --replace."
        )
    if manifest.stage != request.name:
        raise UserError(
            f"{request.name}: {out} holds the result of {manifest.stage}, and --replace overwrites "
            f"only what {request.name} wrote. Move it away, or give another directory."
        )
    n_bytes = sum(manifest.sizes.values())
    log.info(
        f"{request.name}: replacing the {len(manifest.sizes):,} files ({n_bytes / 1e6:,.1f} MB) "
        f"that {manifest.created} left in {out}"
    )


def open_working(out: io.Path, request: StageRequest) -> pathlib.Path:
    """Return the working directory of `out`, emptied unless an equal request left it."""
    working = io.working_directory(out)
    marker = working / REQUEST
    try:
        is_ours = io.read_text_if_there(marker) == request.fingerprint
    except UserError:
        is_ours = False
    if not is_ours:
        io.remove_working(working)
        io.write_text(marker, request.fingerprint)
    return working


def make_manifest(
    request: StageRequest,
    *,
    sealed: Mapping[str, io.SealedFile],
    counts: dict[str, Any],
    tokenizer: str | None,
    seconds: float,
) -> Manifest:
    """Return the manifest of a stage that did what was requested and wrote the sealed files."""
    outputs = {name: file.checksum for name, file in sealed.items()}
    manifest = Manifest(
        stage=request.name,
        fingerprint=fingerprint([request.fingerprint, outputs]),
        config=to_jsonable(request.config),
        inputs=dict(request.inputs),
        outputs=outputs,
        sizes={name: file.n_bytes for name, file in sealed.items()},
        counts=to_jsonable(counts),
        tokenizer=tokenizer,
        seed=request.seed,
        versions=package_versions(),
        created=now(),
        seconds=round(seconds, 3),
    )
    return seal_manifest(manifest)


def seal_manifest(manifest: Manifest) -> Manifest:
    """Return a manifest with the checksum of its other fields."""
    return dataclasses.replace(manifest, checksum=checksum_fields(manifest.to_json()))


def now() -> str:
    """Return the time as ISO 8601, UTC, in seconds."""
    instant = datetime.datetime.now(datetime.UTC)
    return instant.isoformat(timespec="seconds")


def read_manifest(directory: io.Path) -> Manifest:
    """Return the manifest of a finished stage. Raise UserError if it is missing or unreadable."""
    file = directory / "manifest.json"
    try:
        return parse_manifest(io.read_bytes(file), file)
    except io.MissingFileError:
        raise UserError(
            f"{directory}: no manifest.json, so no stage has finished in this directory. "
            f"{suggest_stages(directory)}"
        ) from None


def parse_manifest(data: bytes, where: io.Path | str) -> Manifest:
    """Return the manifest in a file's bytes. Raise UserError if they hold none."""
    try:
        fields = json.loads(data)
        manifest = Manifest.from_json(fields)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not a manifest ({io.printable(error)}). Move its directory away and run "
            "its stage again."
        ) from None
    if not is_as_written(fields):
        raise UserError(
            f"{where}: its fingerprint does not match its content: damaged, or edited by hand. Get "
            "it again from where it came, or move its directory away and run its stage again."
        )
    return manifest


def read_spec(file: io.Path) -> ModelSpec:
    """Return the architecture in spec.json. Raise UserError if it is missing or not a spec."""
    try:
        return ModelSpec.from_json(io.read_json(file))
    except io.MissingFileError:
        raise UserError(
            f"{file}: not found. A run directory or checkpoint has a spec.json; "
            f"is {file.parent} one?"
        ) from None
    except UserError as error:
        raise UserError(
            f"{file}: not a model spec ({error}). "
            "Restore it from another checkpoint of the same run."
        ) from None


def check_output_path(to: io.Path | None, example: str) -> io.Path | None:
    """Return the path of --to, with its directories made, before anything is computed.

    Args:
        to: what --to says, if anything.
        example: a file name for the error message.

    Raises:
        UserError: no file can be written there.
    """
    if to is None:
        return None
    if isinstance(to, pathlib.Path) and to.is_dir():
        raise UserError(
            f"--to {to}: is a directory. Name the file to write, such as {to / example}."
        )
    try:
        io.check_writable(to.parent)
    except io.FileError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise UserError(
            f"--to {to}: cannot be written ({reason}). Name a file in a directory of yours."
        ) from None
    return to


def read_cached_result(path: io.Path | None, request: str) -> dict[str, Any] | None:
    """Return a result file's content if it answers this request (its key "request"), else None."""
    if path is None:
        return None
    try:
        found = io.read_json(path)
    except io.FileError:
        return None
    if isinstance(found, dict) and found.get("request") == request and is_as_written(found):
        found.pop("checksum", None)
        return found
    return None


def write_result(path: io.Path, result: Mapping[str, Any]) -> None:
    """Write a result file with a checksum of its own, as no manifest names it."""
    sealed = {**result, "checksum": checksum_fields(result)}
    io.write_text(path, json.dumps(sealed, indent=1, ensure_ascii=False) + "\n")


# ---- fingerprints: what a thing is, whatever its place and time


def fingerprint(value: Any) -> str:
    """Return 16 hex digits for a JSON-able value; equal values have equal ones on any machine."""
    text = json.dumps(to_jsonable(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def checksum_fields(fields: Mapping[str, Any]) -> str:
    """Return the fingerprint of a file's fields but "checksum", which holds it."""
    return fingerprint({key: fields[key] for key in fields if key != "checksum"})


def is_as_written(fields: Mapping[str, Any]) -> bool:
    """Return whether a file's fields match the checksum among them, if there is one."""
    checksum = fields.get("checksum")
    return not checksum or checksum == checksum_fields(fields)


def fingerprint_path(path: io.Path) -> str:
    """Return a stage's manifest's fingerprint, or the hash of a file or of a directory's files."""
    if io.exists(path / "manifest.json"):
        return read_manifest(path).fingerprint
    if io.size(path) is not None:
        return io.sha256(path)[:16]
    if not io.exists(path):
        raise UserError(f"{path}: not found. {suggest_stages(path)}")
    directory = io.local_copy(path)  # a bucket's files are fetched once, for what reads them too
    return fingerprint({name: io.sha256(directory / name) for name in io.list_files(directory)})


def suggest_stages(missing: io.Path) -> str:
    """Return the end of an error message: the commands that make what is not there, in order."""
    if missing.name not in WRITERS:
        return "Check the path, or run the stage that writes it."
    names = list(WRITERS)
    needed = names[: names.index(missing.name) + 1]
    workdir = missing.parent
    commands = [WRITERS[name] for name in needed if not io.exists(workdir / name)]
    commands = commands or [WRITERS[missing.name]]
    listed = ", then ".join(f"jaxpt {command}" for command in commands)
    return f"Run {listed} with --config FILE --workdir {workdir}."


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
            where = [found.get("path", "none") for found in (there, asked)]
            differ = ", their contents differ" if there and asked else ""
            return f"another input ({key}: {where[0]} there, {where[1]} requested{differ})"
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
        commit: git commit of this code; without a clone what JAXPT_COMMIT says, as launch sets it.
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
        commit=run_git("rev-parse", "HEAD").strip() or os.environ.get("JAXPT_COMMIT", ""),
    )
    return record, run_git("diff", "HEAD")


def run_git(*arguments: str) -> str:
    """Return what git prints about this code; empty without git or a clone."""
    package = pathlib.Path(__file__).resolve().parent
    command = ["git", "-C", str(package), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
        return done.stdout.decode("utf-8", "replace")
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


def entry_point(main: Callable[[], None]) -> None:
    """Run a command's main. A UserError becomes one sentence on stderr and exit status 1."""
    logs.set_up_logging()
    interrupted: list[int] = []
    atexit.register(leave_at_once, interrupted)  # first, so it is called last
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt_when_safe)
    if isinstance(sys.stdout, TextIOWrapper):  # what the terminal's encoding lacks is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        message = printable(error, keep="\n")
        if len(message) > MAX_MESSAGE:  # such as a list of a million names
            half = MAX_MESSAGE // 2
            message = f"{message[:half]} ... {message[-half:]}"
        sys.exit(f"error: {message}")
    except BrokenPipeError:  # whoever read our output (head, less) has gone
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    except OSError as error:  # a library's own reading or writing
        log.debug("an error of the system", exc_info=True)
        where = error.filename or "this machine"
        sys.exit(f"error: {io.file_error(error, 'read or written', where)}")
    except KeyboardInterrupt:
        sys.unraisablehook = lambda unraisable: None  # of what was being made, such as a bar
        log.info("interrupted; finished work is kept, run the same command again to continue")
        interrupted.append(INTERRUPTED)
        sys.exit(INTERRUPTED)
    finally:
        # registered last, it is called first: what is left is done in a moment
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def leave_at_once(interrupted: list[int]) -> None:
    """End an interrupted process: what XLA was compiling crashes it later (signal 11)."""
    if interrupted:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(*interrupted)


def interrupt_when_safe(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, after a moment where it would do harm.

    It crashes an import of jax (signal 11), and is lost in a callback of the garbage collector.
    """
    gc_callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while frame:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code in gc_callbacks:
            again = (threading.main_thread().ident, number)
            timer = threading.Timer(RETRY_SECONDS, signal.pthread_kill, again)
            timer.daemon = True
            timer.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


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
