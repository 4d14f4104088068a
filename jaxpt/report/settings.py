"""Section: the settings in which runs differ."""

from __future__ import annotations

from typing import Any

from jaxpt import config, stage
from jaxpt.report.html import code_text, escape, html_table, small_text
from jaxpt.report.read import RunData


def settings_section(runs: list[RunData]) -> str:
    known = {run.name: flatten_settings(run.config) for run in runs if run.config}
    if not known:
        return ""
    caption = "Settings that differ between the runs; all others are the same."
    if len(known) == 1:
        known = {"default": flatten_settings(stage.to_jsonable(config.Config())), **known}
        caption = "Settings that differ from the defaults; configs/base.py says what each means."
    rows = {
        key: [code_text(each.get(key)) for each in known.values()]
        for tree in known.values()
        for key in tree
    }
    body = [
        [f"<code>{escape(key).replace('.', '.<wbr>')}</code>", *row]
        for key, row in rows.items()
        if len(set(row)) > 1
    ]
    return (
        html_table(["", *map(escape, known)], body, caption, texts=1 + len(known))
        if body
        else small_text("No setting differs.")
    )


def flatten_settings(tree: dict[str, dict]) -> dict[str, Any]:
    """{"train": {"steps": 3}} -> {"train.steps": 3}"""
    return {
        f"{section}.{knob}": value
        for section, knobs in tree.items()
        for knob, value in knobs.items()
    }
