"""Render one HTML page of one or several runs.

It is made from the JSON that stages leave in their directories, and the samples that jaxpt
prepare keeps of what it dropped. The page asks no other host for anything, opens from a file, and
stays under 2 MB. It is a list of sections (SECTIONS): a package that wants to be shown leaves its
JSON, and adds to `read.load_run` and one function from runs to HTML, "" where no run has that JSON.
"""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxpt import stage
from jaxpt.report import (
    data,
    differences,
    evaluation,
    growth,
    lineage,
    plan,
    samples,
    settings,
    summary,
    training,
)
from jaxpt.report.figures import PLOT_ATTRIBUTE, render_scripts
from jaxpt.report.html import escape, small_text
from jaxpt.report.read import RunData, load_runs

STYLESHEET = pathlib.Path(__file__).with_name("page.css")


class ReportSection(NamedTuple):
    """A section of the page."""

    title: str
    render: Callable[[list[RunData]], str]
    source_file: str  # the JSON that it shows
    writer: str  # what writes the file


SECTIONS = (
    ReportSection("Summary", summary.render_summary, "a run directory", ""),
    ReportSection(
        "Lineage", lineage.render_lineage, "manifest.json", "every stage that has finished"
    ),
    ReportSection("Data", data.render_data, "corpus/funnel.json", "jaxpt prepare"),
    ReportSection(
        "Mixture", data.render_mixture, "metrics.jsonl beside config.json", "jaxpt train"
    ),
    ReportSection("Loss", training.render_losses, "metrics.jsonl", "jaxpt train"),
    ReportSection(
        "Forgetting",
        training.render_forgetting,
        "parent's held-out loss in metrics.jsonl",
        "jaxpt train of a run that started from a model",
    ),
    ReportSection("Training", training.render_training, "metrics.jsonl", "jaxpt train"),
    ReportSection("Growth", growth.render_growth, "growth.json", "jaxpt initialize --grow"),
    ReportSection("Evaluation", evaluation.render_evaluation, "eval/NAME.json", "jaxpt evaluate"),
    ReportSection("Samples", samples.render_samples, "eval/samples.json", "jaxpt compare"),
    ReportSection(
        "Differences",
        differences.render_differences,
        "eval/differences.json",
        "jaxpt compare --differ",
    ),
    ReportSection("Plan", plan.render_plan, "plan.json", "jaxpt plan --json"),
    ReportSection("Settings", settings.render_settings, "config.json", "jaxpt train"),
)
# what a section raises on JSON that has not the form in which our stages write it
FORM_ERRORS = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)


def write_report(
    directories: Iterable[str | pathlib.Path], output_path: str | pathlib.Path
) -> list[RunData]:
    """Write the page of these run directories, shown in this order.

    Returns:
        What was read of each run.

    Raises:
        UserError: a directory does not exist, or the page cannot be written.
    """
    path = stage.local_path(output_path)
    stage.check_output_path(path, "report.html")
    runs = load_runs(directories)
    stage.write_atomic(path, render_page(runs))
    return runs


def render_page(runs: list[RunData]) -> str:
    """Return the whole HTML. A section without its JSON becomes a sentence at the end."""
    shown, missing = [], []
    for section in SECTIONS:
        body, problem = render_section(section, runs)
        if body:
            shown.append((section.title, body))
        else:
            missing.append(f"{section.title}: {problem}.")
    for run in runs:
        missing += run.warnings
    if missing:
        items = [f"<li>{escape(line)}</li>" for line in dict.fromkeys(missing)]
        shown.append(("Not shown", f"<ul>{''.join(items)}</ul>"))
    links, main = "", ""
    for name, body in shown:
        anchor = name.lower().replace(" ", "-")
        links += f'<a href="#{anchor}">{name}</a>'
        main += f'<section id="{anchor}"><h2>{name}</h2>{body}</section>'
    *first, last = [run.name for run in runs]
    title = escape(f"{', '.join(first)} and {last}" if first else last)
    now = datetime.datetime.now(datetime.UTC)
    made_on = small_text(f"jaxpt report, {now:%Y-%m-%d %H:%M} UTC")
    return (
        f'<!doctype html><html lang="en"><head>{render_head(title)}</head><body>'
        f"<header><h1>{title}</h1>{made_on}</header>"
        f'<nav aria-label="Sections">{links}</nav><main>{main}</main>'
        f"{render_scripts(PLOT_ATTRIBUTE in main)}</body></html>\n"
    )


def render_section(section: ReportSection, runs: list[RunData]) -> tuple[str, str]:
    """Return a section's HTML, or "" and why it is not shown."""
    try:
        writer = f", written by {section.writer}" if section.writer else ""
        return section.render(runs), f"no {section.source_file}{writer}"
    except FORM_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        return "", f"{section.source_file} has an unexpected form ({reason})"


def render_head(title: str) -> str:
    """Return the content of the page's head."""
    return (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<title>{title}</title><link rel="icon" href="data:,">'
        f"<style>{STYLESHEET.read_text()}</style>"
    )
