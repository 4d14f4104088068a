"""Read what the planner needs of a run directory."""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

from jaxpt import config, stage
from jaxpt.config import Config
from jaxpt.spec import ModelSpec, UserError
from jaxpt.train.metrics import read_metrics
from jaxpt.train.records import MetricRecord


class Run(NamedTuple):
    """A run directory that jaxpt train wrote."""

    path: pathlib.Path
    settings: Config
    spec: ModelSpec
    metrics: list[MetricRecord]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch, padding included."""
        return self.settings.train.batch_size * self.settings.pack.seq_len


class Growth(NamedTuple):
    """How a run's model was grown."""

    operator: str  # the last one's name
    at_step: int  # of the run; 0: before training


def read_run(run_dir: str | pathlib.Path, flag: str) -> Run:
    """Read a run directory.

    Args:
        run_dir: the directory.
        flag: of the command line, for the error message.

    Raises:
        UserError: there is no run.
    """
    path = stage.local_path(run_dir)
    try:
        settings = config.build_config(json.loads((path / "config.json").read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{flag} {path}: no config.json there. Give run directories that jaxpt train wrote."
        ) from None
    spec = ModelSpec.load(path / "spec.json")
    return Run(path, settings, spec, read_metrics(path / "metrics.jsonl"))


def read_devices(run: Run) -> tuple[int, str]:
    """Return the number of devices of the run's last start, and JAX's name of their kind."""
    path = run.path / "starts.jsonl"
    if not path.exists():
        raise UserError(f"{path}: not found. Give a run directory that jaxpt train wrote.")
    start = json.loads(path.read_text().splitlines()[-1])
    return start["n_devices"], start["device_kind"]


def read_growth(run: Run) -> Growth | None:
    """Return how the run's model was grown; None if it was not."""
    path = run.path / "growth.json"
    if not path.is_file():
        return None
    report = json.loads(path.read_text())
    operator, _, _ = report["operators"][-1].partition("(")
    return Growth(operator, report["at_step"] or 0)
