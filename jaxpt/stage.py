"""What every stage of the road shares: run once, publish whole, skip or refuse, show progress, fail in one sentence.

A stage is a directory in and a directory out. `run` is its only way to write: into `OUT.partial`, which becomes `OUT`
by one rename after manifest.json was written last. A stage that died therefore never looks finished, and finds its own
partial work again when it is started again with the same inputs and config.
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
from typing import Any

from jaxpt.spec import Manifest, UserError

PACKAGES = ("jaxpt", "jax", "flax", "optax", "orbax-checkpoint", "grain", "daft", "sentencepiece", "tokenizers", "transformers", "pyarrow")


def run(
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
    """Do `work(partial_directory)` and publish the directory as `out`, or say that `out` holds this very work already.

    work returns the counts for the manifest; a key "tokenizer" among them is taken out and becomes Manifest.tokenizer.
    It may find its own unfinished files in the partial directory: only a start with equal config and inputs left them.
    Raises UserError when `out` holds the result of another config or other inputs, unless replace.
    """
    inputs_found = {key: {"path": str(path), "fingerprint": fingerprint_path(path)} for key, path in inputs.items()}
    asked = request_fingerprint(name, config, inputs_found, seed)
    if (out / "manifest.json").exists():
        manifest = Manifest.load(out)
        if request_fingerprint(manifest.stage, manifest.config, manifest.inputs, manifest.seed) == asked:
            say(f"{name}: {out} is finished already, nothing to do")
            return manifest
        if not replace:
            raise UserError(
                f"{name}: {out} holds the result of {difference(manifest, config, inputs_found, seed)}. Give another --workdir, or --replace."
            )
    elif out.exists() and any(out.iterdir()) and not replace:
        raise UserError(f"{name}: {out} holds files that no stage wrote (no manifest.json). Move them away, give another --workdir, or --replace.")

    partial = out.with_name(out.name + ".partial")
    request = partial / ".request"
    if partial.exists() and not (request.exists() and request.read_text() == asked):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    request.write_text(asked)

    start = time.monotonic()
    counts = work(partial)
    tokenizer = counts.pop("tokenizer", tokenizer)
    request.unlink()
    outputs = {str(file.relative_to(partial)): sha256(file) for file in sorted(partial.rglob("*")) if file.is_file()}
    manifest = make_manifest(
        name, config, inputs_found, outputs=outputs, counts=counts, tokenizer=tokenizer, seed=seed, seconds=time.monotonic() - start
    )
    write_manifest(manifest, partial)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return manifest


def make_manifest(name, config, inputs, *, outputs, counts, tokenizer, seed, seconds) -> Manifest:
    asked = request_fingerprint(name, config, inputs, seed)
    return Manifest(
        stage=name,
        fingerprint=fingerprint([asked, outputs]),
        config=plain(config),
        inputs=inputs,
        outputs=outputs,
        counts=plain(counts),
        tokenizer=tokenizer,
        seed=seed,
        versions=versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
    )


def write_manifest(manifest: Manifest, directory: pathlib.Path) -> None:
    """Write manifest.json so that it is either whole or not there."""
    write_whole(directory / "manifest.json", json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def write_whole(path: pathlib.Path, text: str) -> None:
    """Write a small file so that a reader finds the old one or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def result_path(to: pathlib.Path | None, example: str) -> pathlib.Path | None:
    """Where --to sends a result, tried before anything is computed; directories on the way are made. Raises UserError where no file can be written there."""
    if to is None:
        return None
    to = local_path(to)
    if to.is_dir():
        raise UserError(f"--to {to}: is a directory. Name the file to write, such as {to / example}.")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=to.parent):
            pass
    except OSError as error:
        raise UserError(f"--to {to}: cannot be written there ({error.strerror}). Name a file in a directory of your own.") from None
    return to


def answered(path: pathlib.Path | None, request: str) -> dict[str, Any] | None:
    """What a result file holds, when it was written for this very request (its key "request"); else None."""
    try:
        found = json.loads(path.read_text()) if path else None
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) and found.get("request") == request else None


# ---- fingerprints: what a thing is, whatever its place and time


def fingerprint(value: Any) -> str:
    """16 hex digits over a JSON-able value; equal values have equal fingerprints on any machine."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]


def fingerprint_path(path: pathlib.Path) -> str:
    """Of a finished stage: its manifest's. Of a file: its bytes'. Of another directory: its files' names and bytes."""
    path = pathlib.Path(path)
    if (path / "manifest.json").exists():
        return Manifest.load(path).fingerprint
    if path.is_file():
        return sha256(path)[:16]
    if not path.exists():
        raise UserError(f"{path}: not there. Check the path, or run the stage that makes it.")
    return fingerprint({str(file.relative_to(path)): sha256(file) for file in sorted(path.rglob("*")) if file.is_file()})


def request_fingerprint(name: str, config: Mapping, inputs: Mapping[str, Mapping], seed: int | None) -> str:
    """Of what a stage was asked to do: the place of its inputs does not count, their content does."""
    return fingerprint([name, config, {key: found["fingerprint"] for key, found in inputs.items()}, seed])


def difference(manifest: Manifest, config: Mapping, inputs: Mapping[str, Mapping], seed: int | None) -> str:
    """The first way in which a finished stage was another one, in words."""
    config = plain(config)
    if config != manifest.config:
        key, there, asked = first_difference(manifest.config, config)
        return f"another config ({key}: {there!r} there, {asked!r} asked)"
    for key in sorted(set(inputs) | set(manifest.inputs)):
        there, asked = manifest.inputs.get(key), inputs.get(key)
        if there is None or asked is None or there["fingerprint"] != asked["fingerprint"]:
            return f"another input ({key}: {(there or {}).get('path')} there, {(asked or {}).get('path')} asked, their contents differ)"
    return f"another stage or seed ({manifest.stage}, seed {manifest.seed} there; seed {seed} asked)"


def first_difference(there: Any, asked: Any, at: str = "") -> tuple[str, Any, Any]:
    """(where, value there, value asked) of the first place at which two that differ do; "train.steps", "rules[0]"."""
    if isinstance(there, dict) and isinstance(asked, dict):
        key = next(key for key in sorted(there | asked) if key not in there or key not in asked or there[key] != asked[key])
        return first_difference(there.get(key), asked.get(key), f"{at}.{key}" if at else key)
    if isinstance(there, list) and isinstance(asked, list) and len(there) == len(asked):
        i = next(i for i, pair in enumerate(zip(there, asked, strict=True)) if pair[0] != pair[1])
        return first_difference(there[i], asked[i], f"{at}[{i}]")
    return at, there, asked


def sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_damaged(directory: pathlib.Path, manifest: Manifest) -> tuple[str, bool] | None:
    """(name, whether it is there) of the first file of a stage that is not what the manifest's checksum says; None when all are whole."""

    def is_whole(name: str) -> bool:
        return (directory / name).is_file() and sha256(directory / name) == manifest.outputs[name]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves the interpreter free
        broken = [name for name, whole in zip(manifest.outputs, pool.map(is_whole, manifest.outputs), strict=True) if not whole]
    return (broken[0], (directory / broken[0]).is_file()) if broken else None


def plain(value: Any) -> Any:
    """A config section, a dataclass, a tuple or a numpy number as what JSON gives back, so that both compare equal."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value, default=lambda other: other.item() if hasattr(other, "item") else str(other)))


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def program() -> tuple[dict[str, Any], str]:
    """(what runs here: command, directory, host, versions, commit of this code; how the code differs from that commit, as a diff)."""

    def git(*words: str) -> str:
        try:
            house = pathlib.Path(__file__).resolve().parent
            return subprocess.run(["git", "-C", str(house), *words], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):  # no git, or no clone: the versions remain
            return ""

    found = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "directory": os.getcwd(),
        "host": socket.gethostname(),
        "versions": versions(),
        "commit": git("rev-parse", "HEAD").strip(),
    }
    return found, git("diff", "HEAD")


# ---- what a person sees


def say(line: str) -> None:
    """One line on the terminal, at once, above a progress bar if there is one."""
    if not _muted:
        from tqdm import tqdm

        tqdm.write(line)
        sys.stdout.flush()


_muted = False


def mute() -> None:
    """From here on this process says nothing (errors apart): of a run's processes only the first speaks."""
    global _muted
    _muted = True


@contextlib.contextmanager
def progress(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line every five seconds elsewhere. Yields `advance(n)`."""
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()
    bar = tqdm(
        total=total, desc=label, unit=" " + unit, unit_scale=True, leave=False, dynamic_ncols=on_terminal, ncols=None if on_terminal else 80,
        mininterval=0.2 if on_terminal else 5, delay=0 if on_terminal else 5, file=sys.stderr if on_terminal else _Lines(),
    )  # fmt: skip
    try:
        yield bar.update
    finally:
        bar.close()


def track(items: Iterable, label: str, total: int | None, unit: str) -> Iterator:
    """The items, with progress shown one step each."""
    with progress(label, total, unit) as advance:
        for item in items:
            yield item
            advance(1)


class _Lines:
    """Turns a bar's carriage returns into lines, for logs and pipes."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def door(main: Callable[[], None]) -> None:
    """Run a script's main; a UserError becomes one sentence on stderr and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # the reader of our output (head, less) has gone; that is no failure of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        # what copies whole directories (shutil.Error) has the reason in its text alone
        if not any(error.errno == full or os.strerror(full) in str(error) for full in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
            raise
        sys.exit(f"error: the disk is full ({str(error)[:300]}). What was finished before is whole; make room and run the same command again.")
    except KeyboardInterrupt:
        say("interrupted; what was finished is kept, run the same command again to go on")
        sys.exit(130)


def use_large_pages() -> None:
    """Start this program again, as it was called, with glibc told to ask for pages of 2 MB: call it first in a main.

    A training step on a CPU takes gigabytes of fresh memory each time; in pages of 4 kB that alone is a tenth of it
    (1.12 x the tokens a second at 13 and 248 million parameters, benchmarks/train_cpu.py). Where there is no glibc it changes nothing.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    # orig_argv: what runs inside another program is not that program's to start again
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in tunables and sys.argv[0] in sys.orig_argv:
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:glibc.malloc.hugetlb=1".lstrip(":")
        os.execv(sys.executable, sys.orig_argv)


def local_path(text: str | pathlib.Path) -> pathlib.Path:
    """A directory or file on this machine's disks or mounts. Raises UserError for an object-store address."""
    if "://" in str(text):
        raise UserError(f"{text}: stages write to disks and mounted buckets only. Mount it (gcsfuse, s3fs) and give the mount point.")
    return pathlib.Path(text).expanduser()
