"""One HTML page of one or several runs, made only from the JSON that stages leave in their directories, and prepare.py's samples of what it dropped.

The page asks no other host for anything, opens from a file, and stays under 2 MB. It is a list of sections (SECTIONS, below): a room that
wants to be seen leaves its JSON, and adds what `read.load_run` reads of it and one function from runs to HTML, "" where no run has that JSON.
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
from jaxpt.report.figures import PLOT_CONFIG, plot_scripts
from jaxpt.report.html import escape, small_text
from jaxpt.report.read import RunData, load_runs


def write_report(
    directories: Iterable[str | pathlib.Path], to: str | pathlib.Path
) -> list[RunData]:
    """Write the page of these run directories, shown in this order, to the file `to`. Returns what was read of each.

    Raises UserError where a directory is not there or `to` cannot be written.
    """
    to = stage.check_output_path(pathlib.Path(to), "report.html")
    runs = load_runs(directories)
    stage.write_atomic(to, render_page(runs))
    return runs


STYLESHEET = pathlib.Path(__file__).with_name("page.css")


class ReportSection(NamedTuple):
    title: str
    html: Callable[[list[RunData]], str]
    required_files: str  # the JSON it shows and what writes it: said where no run has it


SECTIONS = (
    ReportSection("Summary", summary.summary_section, "a run directory"),
    ReportSection(
        "Lineage", lineage.lineage_section, "manifest.json, written by every stage that finished"
    ),
    ReportSection("Data", data.data_section, "corpus/funnel.json, written by prepare.py"),
    ReportSection(
        "Mixture", data.mixture_section, "metrics.jsonl beside config.json, written by train.py"
    ),
    ReportSection("Loss", training.losses_section, "metrics.jsonl, written by train.py"),
    ReportSection(
        "Forgetting",
        training.forgetting_section,
        "held-out loss beside a parent's in metrics.jsonl, written by train.py of a run that started from a model",
    ),
    ReportSection("Training", training.training_section, "metrics.jsonl, written by train.py"),
    ReportSection("Growth", growth.growth_section, "growth.json, written by initialize.py --grow"),
    ReportSection(
        "Evaluation", evaluation.evaluation_section, "eval/NAME.json, written by evaluate.py"
    ),
    ReportSection("Samples", samples.samples_section, "eval/samples.json, written by compare.py"),
    ReportSection(
        "Differences",
        differences.differences_section,
        "eval/differences.json, written by compare.py --differ",
    ),
    ReportSection("Plan", plan.plan_section, "plan.json, written by plan.py --json"),
    ReportSection("Settings", settings.settings_section, "config.json, written by train.py"),
)


def render_page(runs: list[RunData]) -> str:
    """The whole HTML. A section whose JSON is missing or of another form becomes a sentence at the end."""
    shown, missing = [], []
    for section in SECTIONS:
        try:
            body, problem = section.html(runs), f"no {section.required_files}"
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            ArithmeticError,
        ) as error:  # JSON, but not as our stages write it
            body, problem = (
                "",
                f"cannot be shown, {section.required_files.split(',')[0]} is of another form ({type(error).__name__}: {error})",
            )
        if body:
            shown.append((section.title, body))
        else:
            missing.append(f"{section.title}: {problem}.")
    missing += dict.fromkeys(note for run in runs for note in run.notes)
    if missing:
        shown.append(
            (
                "Not shown",
                "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in missing) + "</ul>",
            )
        )
    names = [run.name for run in runs]
    title = escape(" and ".join(filter(None, [", ".join(names[:-1]), names[-1]])))
    links = "".join(f'<a href="#{anchor_id(name)}">{name}</a>' for name, _ in shown)
    body = "".join(
        f'<section id="{anchor_id(name)}"><h2>{name}</h2>{text}</section>' for name, text in shown
    )
    made_on = small_text(f"jaxpt report, {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title><link rel="icon" href="data:,"><style>{STYLESHEET.read_text()}</style></head><body>'
        f'<header><h1>{title}</h1>{made_on}</header><nav aria-label="Sections">{links}</nav><main>{body}</main>{plot_scripts(PLOT_CONFIG in body)}</body></html>\n'
    )


def anchor_id(name: str) -> str:
    return name.lower().replace(" ", "-")
