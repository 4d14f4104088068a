"""Add up what a run does and spends, step by step: tokens, FLOPs, seconds, money."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from jaxpt import io, stage
from jaxpt.flops import DeviceCost
from jaxpt.io import lock
from jaxpt.spec import Record, UserError
from jaxpt.text import format_duration
from jaxpt.train.records import NOTHING_DONE, RunSums

log = logging.getLogger(__name__)

SIGN_SECONDS = 1.0  # between signs of life: what a kill threw away is known to that
BUCKET_SIGN_SECONDS = 30.0


def measure_process_start() -> float:
    """Return time.monotonic() at the start of this process; now, where it cannot be known."""
    now = time.monotonic()
    ticks = lock.process_start(os.getpid())
    if not ticks.isdecimal():
        return now
    since_boot = int(ticks) / os.sysconf("SC_CLK_TCK")
    return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


class Meter:
    """Sums over the steps of a run. Time runs on; it is productive while steps do.

    Attributes:
        sums: up to the last call.
        cost: of the model as it is, on one device.
        n_devices: over all processes.
    """

    def __init__(self, sums: RunSums, *, started: float, n_devices: int, cost: DeviceCost):
        """Continue sums from time.monotonic() `started` on."""
        self.sums = sums
        self.cost = cost
        self.n_devices = n_devices
        self.last_time = started
        self.before = sums  # this start, then the steps in progress
        self.has_begun = False
        self.in_steps = False
        self.waited_seconds = 0.0  # for batches, since begin_steps

    def begin_steps(self) -> None:
        """Count the time from here on as productive."""
        if self.in_steps:
            return
        self.spend_time()
        if not self.has_begun:
            self.add("start_seconds", self.sums.seconds - self.before.seconds)
        self.before = self.sums
        self.has_begun = self.in_steps = True
        self.waited_seconds = 0.0

    def end_steps(self, n_steps: int, last_seconds: float) -> None:
        """Count the time from here on as spent on something else. The devices are done.

        How long they were idle is not seen, as the host runs ahead of them. But a step takes
        `last_seconds` at most: the rest, as far as the host waited for batches, they were idle.

        Args:
            n_steps: since begin_steps.
            last_seconds: from the last batch to the end of its step.
        """
        self.spend_time()
        self.in_steps = False
        seconds = self.sums.productive_seconds - self.before.productive_seconds
        idle = min(seconds - n_steps * last_seconds, self.waited_seconds)
        self.add("data_seconds", max(idle, 0.0))

    @contextlib.contextmanager
    def wait_for_data(self) -> Iterator[None]:
        """Count the time of the body as the host's waiting for a batch."""
        start = time.monotonic()
        yield
        self.waited_seconds += time.monotonic() - start

    @contextlib.contextmanager
    def spend_on(self, field: str) -> Iterator[None]:
        """Count the time of the body in this field of RunSums too."""
        self.spend_time()
        before = self.sums.seconds
        try:
            yield
        finally:
            self.spend_time()
            self.add(field, self.sums.seconds - before)

    def add(self, field: str, seconds: float) -> None:
        """Add seconds to a field of RunSums."""
        self.sums = dataclasses.replace(self.sums, **{field: getattr(self.sums, field) + seconds})

    def spend_time(self) -> None:
        """Count the time since the last call."""
        now = time.monotonic()
        seconds = now - self.last_time
        self.last_time = now
        usd = self.cost.compute_usd(seconds, self.n_devices)
        sums = dataclasses.replace(
            self.sums, seconds=self.sums.seconds + seconds, usd=add_known(self.sums.usd, usd)
        )
        if self.in_steps:
            sums = dataclasses.replace(
                sums,
                productive_seconds=sums.productive_seconds + seconds,
                productive_usd=add_known(sums.productive_usd, usd),
            )
        self.sums = sums

    def count_step(self, n_tokens: int) -> None:
        """Count a step of so many tokens."""
        flops = None
        if self.cost.flops_per_token is not None:
            flops = n_tokens * self.cost.flops_per_token
        self.sums = dataclasses.replace(
            self.sums,
            n_tokens=self.sums.n_tokens + n_tokens,
            flops=add_known(self.sums.flops, flops),
        )

    def count_trained(self, n_tokens: int) -> None:
        """Count the targets of an update that was not skipped."""
        n_trained = self.sums.n_trained_tokens + n_tokens
        self.sums = dataclasses.replace(self.sums, n_trained_tokens=n_trained)

    def read(self) -> RunSums:
        """Return the sums up to now."""
        self.spend_time()
        return self.sums


def describe_goodput(sums: RunSums) -> str:
    """Return where a run's time went: "goodput: 91% of 12m30s; start 6%, ..."."""
    total = max(sums.seconds, 1e-9)
    parts = {
        "start": sums.start_seconds,
        "data": sums.data_seconds,
        "evaluation": sums.evaluation_seconds,
        "saving": sums.save_seconds,
        "lost to kills": sums.lost_seconds,
    }
    goodput = sums.compute_goodput()
    other = total * (1 - goodput) - sum(parts.values())
    parts["other"] = max(other, 0.0)
    shares = [f"{name} {seconds / total:.0%}" for name, seconds in parts.items()]
    return f"goodput: {goodput:.0%} of {format_duration(total)}; {', '.join(shares)}"


def add_known(total: float | None, amount: float | None) -> float | None:
    """Return the sum; None if a part is not known."""
    if total is None or amount is None:
        return None
    return total + amount


# ---- what a killed start spent


@dataclasses.dataclass(frozen=True)
class SpentTime(Record):
    """RUN/spent.json, a sign of life: what a start that is killed has spent."""

    seconds: float  # of the run, as RunSums.seconds
    n_devices: int  # of this start, over all processes
    at: str  # when it was written, ISO 8601, UTC


class LostWork(NamedTuple):
    """What a killed start left of what it spent after the checkpoint that is resumed."""

    last: RunSums | None = None  # its last record; None: it wrote none
    spent: SpentTime | None = None  # its last sign of life

    @property
    def seconds(self) -> float:
        """Return what the run has spent, as far as they tell."""
        return max(part.seconds for part in (self.last, self.spent, NOTHING_DONE) if part)

    def add_to(self, sums: RunSums, cost: DeviceCost) -> RunSums:
        """Return the checkpoint's sums with it; `cost` is of what came after the last record."""
        last, spent = self.last, self.spent
        before = sums.seconds
        if last and last.seconds > sums.seconds:
            sums = dataclasses.replace(sums, seconds=last.seconds, usd=last.usd)
        if spent and spent.seconds > sums.seconds:
            usd = cost.compute_usd(spent.seconds - sums.seconds, spent.n_devices)
            sums = dataclasses.replace(sums, seconds=spent.seconds, usd=add_known(sums.usd, usd))
        lost = sums.lost_seconds + sums.seconds - before
        return dataclasses.replace(sums, lost_seconds=lost)


class SignOfLife:
    """Writes RUN/spent.json every second, so that a start killed before its first record counts.

    Nothing waits for it, and a failed write is left out.
    """

    def __init__(self, run_dir: io.Path, seconds: float, *, started: float, n_devices: int):
        """Begin.

        Args:
            run_dir: the run directory.
            seconds: that the run had spent before `started`.
            started: time.monotonic() at which this start began.
            n_devices: over all processes.
        """
        self.path = run_dir / "spent.json"
        self.is_first = not io.exists(self.path)
        self.seconds = seconds
        self.since = started
        self.n_devices = n_devices
        self.meter: Meter | None = None  # once there is one, it knows better
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, name="sign of life", daemon=True)
        self.thread.start()

    def run(self) -> None:
        """Write until `end`."""
        is_local = isinstance(self.path, pathlib.Path)
        period = SIGN_SECONDS if is_local else BUCKET_SIGN_SECONDS
        while not self.ended.wait(period):
            seconds, since = self.seconds, self.since
            if self.meter:
                seconds, since = self.meter.sums.seconds, self.meter.last_time
            seconds += time.monotonic() - since
            spent = SpentTime(seconds, self.n_devices, at=stage.now())
            with contextlib.suppress(UserError):  # the next one may succeed
                io.write_unsynced(self.path, spent)

    def end(self) -> None:
        """Write no more."""
        self.ended.set()

    def withdraw(self) -> None:
        """Leave no file of a start that was refused, unless an earlier one had left it."""
        self.end()
        self.thread.join()
        if self.is_first:
            io.remove(self.path)


def read_spent_time(run_dir: io.Path) -> SpentTime | None:
    """Return what the last start had spent at its last sign of life; None: not known."""
    try:
        return SpentTime.from_json(io.read_json(run_dir / "spent.json"))
    except UserError:
        return None
