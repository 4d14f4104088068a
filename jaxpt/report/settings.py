"""Section: the settings in which runs differ."""

from __future__ import annotations

from typing import Any

from jaxpt import config, stage
from jaxpt.report.markup import code, esc, grid, small
from jaxpt.report.read import RunData


def section(runs: list[RunData]) -> str:
    known = {run.name: leaves(run.config) for run in runs if run.config}
    if not known:
        return ""
    caption = "Settings that differ between the runs; all others are the same."
    if len(known) == 1:
        known = {"default": leaves(stage.plain(config.Config())), **known}
        caption = "Settings that differ from the defaults; configs/base.py says what each means."
    rows = {key: [code(each.get(key)) for each in known.values()] for tree in known.values() for key in tree}
    body = [[f"<code>{esc(key).replace('.', '.<wbr>')}</code>", *row] for key, row in rows.items() if len(set(row)) > 1]
    return grid(["", *map(esc, known)], body, caption, texts=1 + len(known)) if body else small("No setting differs.")


def leaves(tree: dict[str, dict]) -> dict[str, Any]:
    """{"train": {"steps": 3}} -> {"train.steps": 3}"""
    return {f"{section}.{knob}": value for section, knobs in tree.items() for knob, value in knobs.items()}
