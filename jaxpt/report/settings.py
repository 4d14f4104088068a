"""Render the section Settings: the settings in which runs differ."""

from __future__ import annotations

from jaxpt import config, stage
from jaxpt.report.html import code_text, escape, html_table, small_text
from jaxpt.report.read import RunData, flatten_settings


def render_settings(runs: list[RunData]) -> str:
    """Render the settings that differ between runs, or of one run from the defaults."""
    settings = {run.name: run.settings for run in runs if run.settings}
    if not settings:
        return ""
    caption = "Settings that differ between the runs; all others are equal."
    if len(settings) == 1:
        defaults = flatten_settings(stage.to_jsonable(config.Config()))
        settings = {"default": defaults, **settings}
        caption = "Settings that differ from the defaults; configs/base.py explains each."
    keys = []
    for values in settings.values():
        keys += values
    body = []
    for key in dict.fromkeys(keys):
        row = [code_text(values.get(key)) for values in settings.values()]
        if len(set(row)) > 1:
            body.append([f"<code>{escape(key).replace('.', '.<wbr>')}</code>", *row])
    if not body:
        return small_text("No setting differs.")
    heads = ["", *map(escape, settings)]
    return html_table(heads, body, caption, n_text_columns=len(heads))
