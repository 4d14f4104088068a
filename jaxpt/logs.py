"""Set up logging: progress on the terminal of rank 0, warnings of every rank in a file of its own.

Modules log by `log = logging.getLogger(__name__)`. Results (tables, samples) are printed instead.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator

from jaxpt import io
from jaxpt.spec import UserError
from jaxpt.text import printable

PACKAGE = "jaxpt"
SLOW_SECONDS = 5.0  # a wait that is longer has a line
FORMAT = "%(asctime)s %(levelname).1s %(message)s"
TIME = "%H:%M:%S"


class TerminalHandler(logging.Handler):
    """Writes to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        from tqdm import tqdm  # after --help was answered

        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


class LineLogHandler(logging.Handler):
    """Appends to a file; a line that cannot be written is left out."""

    def __init__(self, path: io.Path):
        """Open the file."""
        super().__init__()
        self.lines = io.LineLog(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Append one record."""
        with contextlib.suppress(UserError):
            self.lines.append(self.format(record))

    def close(self) -> None:
        """Write what is left."""
        with contextlib.suppress(UserError):
            self.lines.close()
        super().close()


class PrintableFormatter(logging.Formatter):
    """Formats a record without the control characters of data."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's lines."""
        return printable(super().format(record), keep="\n")


def set_up_logging() -> None:
    """Send the package's messages, from INFO on, to this process's terminal."""
    logger = logging.getLogger(PACKAGE)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library may give the root a handler, and lines would come twice
    if not any(isinstance(handler, TerminalHandler) for handler in logger.handlers):
        add_handler(TerminalHandler(), FORMAT)


def set_rank(rank: int, n_processes: int, directory: io.Path) -> None:
    """Let rank 0 alone speak on the terminal, and each rank write its warnings to a file.

    Args:
        rank: index of this process.
        n_processes: how many processes take part; with one, nothing changes.
        directory: the run directory; warnings go to `logs/rank-RANK.log` in it.
    """
    if n_processes == 1:
        return
    logger = logging.getLogger(PACKAGE)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    with_rank = f"%(asctime)s %(levelname).1s [rank {rank}] %(message)s"
    if rank == 0:
        add_handler(TerminalHandler(), with_rank)
    to_file = LineLogHandler(directory / "logs" / f"rank-{rank}.log")
    to_file.setLevel(logging.WARNING)
    add_handler(to_file, with_rank)


def add_handler(handler: logging.Handler, layout: str) -> None:
    """Attach a handler to the package's logger."""
    handler.setFormatter(PrintableFormatter(layout, TIME))
    logging.getLogger(PACKAGE).addHandler(handler)


@contextlib.contextmanager
def announce_if_slow(log: logging.Logger, message: str) -> Iterator[None]:
    """Log what is going on, once it has taken SLOW_SECONDS."""
    timer = threading.Timer(SLOW_SECONDS, log.info, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
