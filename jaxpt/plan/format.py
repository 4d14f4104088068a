"""Format plans for the terminal: one column per target, then what the numbers rest on."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable

from jaxpt.plan import hlo, layouts
from jaxpt.plan.hardware import DEFAULT_MEM_FRAC, GIB, MAX_MEM_FRAC
from jaxpt.plan.records import RunProjection, TargetPlan, TrainingPlan

Formatter = Callable[[float], str]


def format_plan(plan: TrainingPlan) -> str:
    """Return the plan as text."""
    lines = []
    model = plan.model
    if model and plan.tokens:
        step_tokens = model.batch_size * model.seq_len
        lines += [
            f"{model.n_params:,} parameters; {abbreviate_count(plan.tokens)} tokens in all",
            f"{step_tokens:,} tokens per step "
            f"({model.batch_size:,} sequences of {model.seq_len:,} tokens)",
            "",
        ]
    columns = [make_column(target) for target in plan.targets]
    rows = [["", *(target.target for target in plan.targets)]]
    for label in columns[0]:
        rows.append([label, *(column[label] for column in columns)])
    lines += align_columns(rows)
    return "\n".join([*lines, "", *wrap_notes(plan.notes)])


def align_columns(rows: list[list[str]]) -> list[str]:
    """Return rows of cells as lines, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return lines


def wrap_notes(notes: Iterable[str]) -> list[str]:
    """Return notes as list items of at most 80 columns."""
    items = []
    for note in notes:
        item = textwrap.fill(note, 80, initial_indent="- ", subsequent_indent="  ")
        items.append(item)
    return items


def make_column(plan: TargetPlan) -> dict[str, str]:
    """Return label -> cell of one target."""
    bound = "> " if plan.peak_is_lower_bound else ""
    mfu = format_range([plan.slow.mfu, plan.fast.mfu], "{:.0%}".format)
    low, high = plan.efficiency_range

    def span(get: Callable[[RunProjection], float | None]) -> str:
        ends = [get(plan.slow), get(plan.fast)]
        return format_range(ends, format_significant)

    return {
        "method": format_method(plan),
        "devices": f"{plan.n_devices:,}",
        "mesh": layouts.format_mesh(plan.mesh),
        "parameters": format_memory(plan.params_bytes),
        "optimizer state": format_memory(plan.opt_state_bytes),
        "gradients, activations": format_memory(plan.temporary_bytes),
        "  saved activations, about": format_memory(plan.saved_activation_bytes),
        "peak per device": bound + format_memory(plan.peak_bytes),
        "  while restoring": format_memory(plan.restore_bytes),
        "  while exporting": format_memory(plan.export_bytes),
        "  per host, saving": format_memory(plan.host_save_bytes),
        "  per host, restoring": format_memory(plan.host_restore_bytes),
        "  per host, exporting": format_memory(plan.host_export_bytes),
        "memory per device": format_memory(plan.usable_bytes),
        "fits": format_fit(plan),
        "FLOPs per token, model": f"{plan.flops_per_token:.3g}",
        "FLOPs per token, executed": f"{plan.executed_flops_per_token:.3g}",
        "FLOPs, each loop body once": format_flops(plan.loop_body_flops),
        "  by the compiler": format_flops(plan.compiler_flops),
        "step at full speed: matmuls, s": format_significant(plan.compute_seconds),
        "  memory, s": format_significant(plan.memory_seconds),
        "  links, s": format_significant(plan.network_seconds),
        "assumed efficiency": f"{low:.0%} to {high:.0%}",
        "expected MFU": mfu,
        "step, s": span(lambda run: run.step_seconds),
        "tokens/s": span(lambda run: run.tokens_per_second),
        "hours": span(lambda run: run.hours),
        "usd": span(lambda run: run.usd),
        "kWh": span(lambda run: run.kwh),
    }


def format_method(plan: TargetPlan) -> str:
    """Return how the numbers were found."""
    if plan.missing_package:
        return "estimated, not compiled"
    if plan.peak_is_lower_bound:
        return "refused by the compiler"
    return "compiled"


def format_fit(plan: TargetPlan) -> str:
    """Return whether the step fits, and by how much."""
    spare = (plan.usable_bytes - plan.peak_bytes) / GIB
    if plan.fits:
        return f"yes, {spare:.1f} GiB to spare"
    bound = "at least " if plan.peak_is_lower_bound else ""
    return f"no, {bound}{-spare:.1f} GiB too much"


def format_memory(n_bytes: float | None) -> str:
    """Return bytes in GiB, or in MiB below 0.1 GiB."""
    if n_bytes is None:
        return "unknown"
    if n_bytes >= GIB / 10:
        return f"{n_bytes / GIB:.2f} GiB"
    return f"{n_bytes / 2**20:.1f} MiB"


def format_flops(n: float | None) -> str:
    """Return a count with three digits."""
    if n is None:
        return "unknown"
    return f"{n:.3g}"


def format_range(ends: list[float | None], format_value: Formatter) -> str:
    """Return both ends of a range, smaller first."""
    values = sorted(end for end in ends if end is not None)
    if not values:
        return "unknown"
    return " to ".join(map(format_value, values))


def format_significant(n: float) -> str:
    """Return three significant digits, or whole numbers from 100 on."""
    if n >= 100:
        return f"{n:,.0f}"
    return f"{n:.3g}"


def abbreviate_count(n: float) -> str:
    """Return 40,265,318,400 as "40.3B"."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if n >= unit:
            return f"{n / unit:.3g}{letter}"
    return f"{n:,.0f}"


def collect_assumptions(plans: Iterable[TargetPlan]) -> tuple[str, ...]:
    """Return what the plans rest on, each sentence once: targets of one chip share some."""
    notes: dict[str, None] = {}
    for plan in plans:
        notes |= dict.fromkeys(describe_assumptions(plan))
    return tuple(notes)


def describe_assumptions(plan: TargetPlan) -> list[str]:
    """Return the assumptions of one plan, its price with the date, and what its layers move."""
    name = plan.target
    chip = name.partition(":")[0]
    low, high = plan.efficiency_range
    notes = [
        f"{chip}: matmuls are assumed to run at {low:.0%} to {high:.0%} {plan.efficiency_source}."
    ]
    if chip == "cpu":
        notes.append("cpu: a device stands for one core with 4 GiB.")
    if plan.time_calibration != 1:
        notes.append(
            f"{name}: times are multiplied by {plan.time_calibration:.3g}, from a measured run."
        )
    if plan.layer_collectives:
        collectives = hlo.format_collectives(plan.layer_collectives)
        notes.append(f"{name}: each layer runs {collectives} (forward; backward).")
    elif plan.n_devices > 1:
        notes.append(
            f"{name}: each layer moves {plan.comm_bytes_per_layer / 1e6:,.0f} MB to each device "
            "per step, by arithmetic."
        )
    matmul_seconds = plan.compute_seconds / high
    if plan.network_seconds > matmul_seconds:
        notes.append(
            f"{name}: communication takes {plan.network_seconds:.3g} s per step, the matmuls "
            f"{matmul_seconds:.3g} s: it is the bottleneck. A larger train.batch_size, a smaller "
            "train.grad_accum_steps or weights sharded over fewer devices help."
        )
    if plan.usd_per_hour is None:
        notes.append(
            f"{chip}: {plan.price_source}. Give yours: --config.plan.usd_per_hour=PRICE "
            "(per device and hour)."
        )
    else:
        notes.append(
            f"{chip}: {plan.usd_per_hour:.2f} usd per device and hour ({plan.price_source})."
        )
    if plan.missing_package:
        notes.append(
            f"{chip}: estimated, not compiled: install {plan.missing_package} to compile. "
            "Parameters and optimizer state are exact, the rest to about 25 %."
        )
    if plan.fits and plan.needs_mem_fraction:
        notes.append(
            f"{name}: needs more than the {DEFAULT_MEM_FRAC:.0%} of a card that JAX takes: "
            f"set XLA_PYTHON_CLIENT_MEM_FRACTION={MAX_MEM_FRAC}."
        )
    return notes
