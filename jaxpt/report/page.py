"""Render one HTML page of one or several runs.

It is made from the JSON that stages leave in their directories, and the samples that jaxpt
prepare keeps of what it dropped. The page asks no other host for anything, opens from a file, and
stays under 2 MB. It is a list of sections (SECTIONS): a package that wants to be shown leaves its
JSON, and adds to `read.load_run`, one function from runs to what the section shows, and a template.
"""

from __future__ import annotations

import datetime
import functools
import pathlib
import resource
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from jaxpt import io, stage
from jaxpt.report import evaluation, experiment, growth, head, plan, summary, training
from jaxpt.report.figures import PLOT_ATTRIBUTE, series_color
from jaxpt.report.format import format_whole
from jaxpt.report.read import RunData, load_runs
from jaxpt.spec import UserError

HERE = pathlib.Path(__file__).parent
V8_ADDRESS_BYTES = 70e9  # V8 reserves 64 GB of addresses, and aborts where it cannot


class ReportSection(NamedTuple):
    """A section of the page; its template is named after it."""

    title: str
    make: Callable[[list[RunData]], Any]  # what the template shows; empty: nothing
    source_file: str  # the JSON that it shows
    writer: str  # what writes the file


class ShownSection(NamedTuple):
    """A section as HTML."""

    title: str
    body: Markup

    @property
    def anchor(self) -> str:
        """Its id on the page."""
        return self.title.lower().replace(" ", "-")


SECTIONS = (
    ReportSection("Summary", head.make_heads, "a run directory", ""),
    ReportSection("Loss", training.make_losses, "metrics.jsonl", "jaxpt train"),
    ReportSection("Numbers", summary.make_summary, "a run directory", ""),
    ReportSection(
        "Lineage",
        summary.make_lineage,
        "manifest.json",
        "every stage that has finished",
    ),
    ReportSection("Data", training.make_data, "corpus/funnel.json", "jaxpt prepare"),
    ReportSection(
        "Mixture",
        training.make_mixture,
        "metrics.jsonl beside config.json",
        "jaxpt train",
    ),
    ReportSection(
        "Forgetting",
        training.make_forgetting,
        "parent's held-out loss in metrics.jsonl",
        "jaxpt train of a run that started from a model",
    ),
    ReportSection("Training", training.make_training, "metrics.jsonl", "jaxpt train"),
    ReportSection("Growth", growth.make_growth, "growth.json", "jaxpt initialize --grow"),
    ReportSection(
        "Evaluation",
        evaluation.make_evaluation,
        "eval/NAME.json",
        "jaxpt evaluate",
    ),
    ReportSection("Samples", evaluation.make_samples, "eval/samples.json", "jaxpt compare"),
    ReportSection(
        "Differences",
        evaluation.make_differences,
        "eval/differences.json",
        "jaxpt compare --differ",
    ),
    ReportSection("Plan", plan.make_plan, "plan.json", "jaxpt plan --json"),
    ReportSection("Settings", summary.make_settings, "config.json", "jaxpt train"),
)
# what a section raises on JSON that has not the form in which our stages write it
FORM_ERRORS = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)


def write_report(
    directories: Iterable[str | io.Path],
    output_path: str | io.Path,
    compared: experiment.Experiment | None = None,
) -> list[RunData]:
    """Write the page of these run directories, shown in this order, after what they compare.

    Returns:
        What was read of each run.

    Raises:
        UserError: a directory does not exist, or the page cannot be written.
    """
    path = io.path(output_path)
    stage.check_output_path(path, "report.html")
    runs = load_runs(directories)
    io.write_text(path, render_page(runs, compared))
    return runs


def render_page(runs: list[RunData], compared: experiment.Experiment | None = None) -> str:
    """Return the whole HTML. A section without its JSON becomes a sentence at the end."""
    environment = make_environment()
    shown, missing = [], []
    sections = SECTIONS
    if compared:
        view = experiment.make_experiment(compared)
        first = ReportSection("Experiment", lambda runs: view, "sweep.json", "jaxpt sweep")
        sections = (first, *SECTIONS)
    for section in sections:
        body, problem = render_section(section, runs, environment)
        if body:
            shown.append(ShownSection(section.title, body))
        else:
            missing.append(f"{section.title}: {problem}.")
    for run in runs:
        missing += run.warnings
    if missing:
        template = environment.get_template("not_shown.html")
        body = Markup(template.render(shown=dict.fromkeys(missing)))
        shown.append(ShownSection("Not shown", body))
    *first, last = [run.name for run in runs]
    now = datetime.datetime.now(datetime.UTC)
    has_plots = any(PLOT_ATTRIBUTE in section.body for section in shown)
    html = environment.get_template("page.html").render(
        title=f"{', '.join(first)} and {last}" if first else last,
        made_on=f"jaxpt report, {now:%Y-%m-%d %H:%M} UTC",
        sections=shown,
        stylesheet=io.read_text(HERE / "page.css"),
        scripts=list_scripts(has_plots),
    )
    # half of a surrogate pair cannot be encoded
    return html.encode("utf-8", "replace").decode() + "\n"


def render_section(
    section: ReportSection, runs: list[RunData], environment: jinja2.Environment
) -> tuple[Markup, str]:
    """Return a section's HTML, or "" and why it is not shown."""
    writer = f", written by {section.writer}" if section.writer else ""
    try:
        found = section.make(runs)
        if not found:
            return Markup(""), f"no {section.source_file}{writer}"
        template = environment.get_template(f"{section.title.lower()}.html")
        return Markup(template.render(shown=found)), ""
    except FORM_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        return Markup(""), f"{section.source_file} has an unexpected form ({reason})"


@functools.cache
def make_environment() -> jinja2.Environment:
    """Return the templates. They escape whatever comes from a file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["series_color"] = series_color
    environment.filters["break_after"] = break_after
    environment.filters["whole"] = format_whole
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


def break_after(text: str, mark: str) -> Markup:
    """Return text that a browser may break into lines after each mark."""
    return Markup(f"{mark}<wbr>").join(text.split(mark))


def check_address_space() -> None:
    """Raise UserError where V8, which holds the plots' scripts, would end this process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if resource.RLIM_INFINITY != limit < V8_ADDRESS_BYTES:
        raise UserError(
            f"report: its plots need {V8_ADDRESS_BYTES / 1e9:.0f} GB of address space, little of "
            f"it as memory; this shell allows {limit / 1e9:.1f} GB. Raise that limit for this "
            "command (ulimit -v unlimited), or start it elsewhere."
        )


def list_scripts(has_plots: bool) -> list[str]:
    """Return the page's script, after Vega, Vega-Lite and Vega-Embed if there are plots."""
    page_script = io.read_text(HERE / "page.js")
    if not has_plots:
        return [page_script]
    check_address_space()
    import vl_convert

    # its stub requires a snippet, which is optional
    make_bundle: Callable[..., str] = vl_convert.javascript_bundle
    bundle = make_bundle().replace("</script", "<\\/script")
    license = "BSD-3-Clause, University of Washington Interactive Data Lab"
    credit = f"/* Vega, Vega-Lite, Vega-Embed: {license} */"
    return [credit + bundle, page_script]
