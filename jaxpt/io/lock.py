"""Let one process at a time write a directory: `hold`. A second start learns who holds it.

Beside DIRECTORY lies .DIRECTORY.lock, with a file per holder, numbered. A holder takes the number
after the last by `files.create`, which gives it to one caller only: by a hard link on a disk, which
is atomic on NFS too (flock is not on every mount), by if-generation-match or if-none-match in a
bucket. The last file is never removed, so that a number is never given twice; ending a hold marks
it as released.

A holder on this machine lives if its process does. One elsewhere rewrites N.beat; who waits watches
it for LEASE_SECONDS by a clock of its own, so that clocks need not agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import pathlib
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator

from jaxpt.io import files
from jaxpt.io.errors import MissingFileError, explain, printable
from jaxpt.io.paths import Path
from jaxpt.spec import Record, UserError

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0  # a holder elsewhere that shows no sign of life for so long is dead
BEAT_SECONDS = 15.0
MAX_ROUNDS = 30  # one for each process that is quicker

held: set[str] = set()  # tokens of what this process holds


@dataclasses.dataclass(frozen=True)
class Holder(Record):
    """Who holds a directory.

    Attributes:
        host: name of the machine.
        machine: what tells a boot of a machine, and a container on it, from all others.
        pid: of the process.
        process_start: when the process started, in clock ticks since the machine did.
        since: ISO 8601, UTC.
        command: the command line.
        token: a random number, so that no two holders are equal.
        is_released: the hold has ended.
    """

    host: str
    machine: str
    pid: int
    process_start: str
    since: str
    command: str
    token: str
    is_released: bool = False


class Lock:
    """A directory that this process holds. `hold` makes and ends it."""

    def __init__(self, directory: Path, number: int, holder: Holder):
        """Start to show signs of life."""
        self.directory, self.number, self.holder = directory, number, holder
        self.place = lock_place(directory)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.beat, name="lock", daemon=True)
        with contextlib.suppress(UserError):  # the next one may succeed
            self.beat_once(0)
        self.thread.start()

    def check(self) -> None:
        """Raise UserError if another process has taken over.

        That happens to a process that stood still for longer than the lease, as after SIGSTOP. Call
        it before something is published.
        """
        last = find_last(self.place)
        if last is None or last[0] != self.number:
            raise UserError(
                f"{printable(self.directory)}: this process stood still, and another one has taken "
                "it over. Nothing more is written here."
            )

    def beat(self) -> None:
        """Show signs of life until the hold ends."""
        n_beats = 0
        while not self.ended.wait(BEAT_SECONDS):
            n_beats += 1
            with contextlib.suppress(UserError):  # the next one may succeed
                self.beat_once(n_beats)

    def beat_once(self, n_beats: int) -> None:
        """Write one sign of life."""
        files.write_unsynced(self.place / f"{self.number:08d}.beat", str(n_beats))

    def release(self) -> None:
        """End the hold."""
        self.ended.set()
        self.thread.join()
        held.discard(self.holder.token)
        released = dataclasses.replace(self.holder, is_released=True)
        try:
            files.write_json(holder_file(self.place, self.number), released)
        except UserError as error:  # the next start finds that this process has ended
            log.warning(f"{error}")


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[Lock]:
    """Hold a directory while the block runs.

    Raises:
        UserError: another process holds it.
    """
    lock = take(directory)
    try:
        yield lock
    finally:
        lock.release()


def take(directory: Path) -> Lock:
    """Hold a directory until `release`. Raise UserError if another process holds it."""
    place = lock_place(directory)
    me = describe_this_process()
    held.add(me.token)  # before another thread can find it
    try:
        number = claim(directory, me)
        remove_earlier(place, number)
        return Lock(directory, number, me)
    except UserError:
        held.discard(me.token)
        raise


def claim(directory: Path, me: Holder) -> int:
    """Write the next holder's file. Return its number."""
    place = lock_place(directory)
    data = json.dumps(me.to_json()).encode()
    for _ in range(MAX_ROUNDS):
        last = find_last(place)
        number = 0
        if last:
            number, other = last
            if not other.is_released and is_alive(place, number, other):
                raise UserError(
                    f"{printable(directory)}: in use by process {other.pid} on "
                    f"{printable(other.host)} since {other.since} ({printable(other.command)}). "
                    "Wait until it has ended, or give another directory."
                )
        # two that found the same dead holder ask for the same number, and one gets it
        if files.create(holder_file(place, number + 1), data):
            return number + 1
    raise UserError(
        f"{printable(place)}: {MAX_ROUNDS} attempts to take this lock were refused, and nobody "
        "holds it. Does this disk or bucket create files as others do? Try another directory."
    )


def lock_place(directory: Path) -> Path:
    """Return where the holders of a directory are written: beside it, as it may not exist yet."""
    if isinstance(directory, pathlib.Path):
        with explain("found", directory):
            directory = directory.resolve()
    if not directory.name:
        raise UserError(f"{printable(directory)}: expected a directory below it, such as a run's.")
    return directory.with_name(f".{directory.name}.lock")


def holder_file(place: Path, number: int) -> Path:
    """Return the file of a holder."""
    return place / f"{number:08d}.json"


def find_last(place: Path) -> tuple[int, Holder] | None:
    """Return the last holder and its number; None if there was none."""
    while True:
        numbers = [name[:8] for name in files.list_names(place) if name.endswith(".json")]
        numbers = [int(number) for number in numbers if number.isdecimal()]
        if not numbers:
            return None
        number = max(numbers)
        file = holder_file(place, number)
        try:
            return number, Holder.from_json(json.loads(files.read_bytes(file)), str(file))
        except MissingFileError:
            continue  # the next holder has removed it meanwhile
        except json.JSONDecodeError:
            raise UserError(
                f"{printable(file)}: does not say who holds {printable(place.parent)}. If no "
                "process uses it, remove this file."
            ) from None


def is_alive(place: Path, number: int, other: Holder) -> bool:
    """Return whether a holder lives; of one elsewhere that may take LEASE_SECONDS to see."""
    if other.machine == this_machine():
        if other.pid == os.getpid():
            return other.token in held
        return process_start(other.pid) == other.process_start
    log.info(f"{printable(place)}: looking whether {printable(other.host)} is still at work")
    beat = place / f"{number:08d}.beat"
    first = files.read_text_if_there(beat)
    start = time.monotonic()
    while time.monotonic() - start < LEASE_SECONDS:
        time.sleep(LEASE_SECONDS / 60)
        if files.read_text_if_there(beat) != first:
            return True
        if find_last(place) != (number, other):
            return False  # it has ended, or somebody else was quicker
    return False


def remove_earlier(place: Path, number: int) -> None:
    """Remove what earlier holders left."""
    for name in files.list_names(place):
        if name[:8].isdecimal() and int(name[:8]) < number:
            files.remove(place / name)


def describe_this_process() -> Holder:
    """Return what a second start says of this process."""
    now = datetime.datetime.now(datetime.UTC)
    return Holder(
        host=socket.gethostname(),
        machine=this_machine(),
        pid=os.getpid(),
        process_start=process_start(os.getpid()),
        since=now.isoformat(timespec="seconds"),
        command=shlex.join([pathlib.Path(sys.executable).name, *sys.argv])[:300],
        token=secrets.token_hex(8),
    )


def this_machine() -> str:
    """Return what tells this boot and this container from all others.

    A process in another container of this machine has a number that means nothing here.
    """
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process_start(pid: int) -> str:
    """Return when a process started; empty if there is none. A number is used again in time."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
        after_name = text.rpartition(")")[2]
        state, *fields = after_name.split()
        return "" if state == "Z" else fields[18]
    except (OSError, IndexError):
        pass
    if sys.platform == "linux":
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"
