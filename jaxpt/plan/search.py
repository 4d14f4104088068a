"""Which mesh, micro-batch and remat: by arithmetic over all of them, then compiled from the best one down until one fits."""

from __future__ import annotations

import logging
from typing import Any

from jaxpt.config import Config
from jaxpt.plan import compile, cost, hardware, layouts
from jaxpt.plan.layouts import Layout
from jaxpt.spec import ModelSpec

log = logging.getLogger(__name__)

ESTIMATE_ERROR_FRAC = 0.25  # of flops.temporaries, against what the compilers said
MAX_COMPILED = 4  # on one target; an 8B step takes half a minute and more


def search_layouts(
    settings: Config, target_names: list[str], calibrations: dict[str, float] | None = None
) -> dict[str, Any]:
    """The best settings of each target, and of all: {"targets": [record with "overrides"], "cheapest" and "fastest": one of the targets,
    or None where nothing fits, "tried", "compiled": how many}. Rows and tokens of a step stay what the config says.

    Raises UserError for what is no target.
    """
    targets = [hardware.parse_target(each) for each in target_names]
    spec, _ = cost.resolve_model_spec(settings)
    records, n_tried, n_compiled = [], 0, 0
    for target in targets:
        found = layouts.list_layouts(spec, settings, target)
        best, compiles = find_fitting_layout(spec, target, found)
        n_tried, n_compiled = n_tried + len(found), n_compiled + compiles
        if best:
            record = cost.project_target(
                spec,
                best.config,
                target,
                best.analysis,
                cost.get_token_budget(settings),
                (calibrations or {}).get(target.chip.name, 1.0),
            )
            records.append(record | {"overrides": layouts.list_overrides(settings, best.config)})
        else:
            log.info(
                f"search: {target.name}: none of {len(found):,} settings fits. {layouts.suggest_layout(spec, settings, target)}"
            )
    choose = lambda key: min(
        (each for each in records if each[key] is not None),
        key=lambda each: each[key],
        default=None,
    )
    return {
        "targets": records,
        "cheapest": choose("usd"),
        "fastest": choose("hours"),
        "tried": n_tried,
        "compiled": n_compiled,
    }


def find_fitting_layout(
    spec: ModelSpec, target: hardware.Target, found: list[Layout]
) -> tuple[Layout | None, int]:
    """The fastest layout that the compiler confirms, and how many were compiled. Where its package is missing, arithmetic decides."""
    missing = compile.find_missing_package(target)
    taught = 1.0  # a compiled peak over its estimate, once one did not fit
    for n_compiled in range(MAX_COMPILED):
        room = target.usable_bytes * (1 if missing or n_compiled else 1 + ESTIMATE_ERROR_FRAC)
        found = [each for each in found if each.required_bytes * taught <= room]
        if not found:
            return None, n_compiled
        best = layouts.choose_layout(found)
        if missing:
            return best._replace(analysis=best.analysis | {"missing": missing}), n_compiled
        log.info(f"search: {target.name}: compiling {layouts.format_layout(best)} ...")
        measured = compile.analyze_step(spec, best.config, target)
        needs = max(measured["peak_bytes"], measured["export_bytes"]) / hardware.GIB
        fits = not measured["over_memory"] and needs * hardware.GIB <= target.usable_bytes
        verdict = "fits" if fits else "does not fit"
        log.info(
            f"search: {target.name}: {verdict}: {needs:.1f} of {target.usable_bytes / hardware.GIB:.1f} GiB ({measured['seconds']:.0f} s)"
        )
        if fits:
            return best._replace(analysis=measured), n_compiled + 1
        # where the compiler refused, its number is no peak: then only what needs a tenth less is worth a try
        taught = max(
            taught,
            1.1 * target.usable_bytes / best.required_bytes
            if measured["over_memory"]
            else measured["peak_bytes"] / best.analysis["peak_bytes"],
        )
    return None, MAX_COMPILED


def format_search(found: dict[str, Any]) -> str:
    """The answer in lines to paste: of each target, then of all."""
    lines = [
        f"{found['tried']:,} settings by arithmetic, {found['compiled']} compiled; the best of each target:"
    ]
    lines += [f"  --on {each['on']}: {format_overrides(each)}" for each in found["targets"]]
    for what in ("cheapest", "fastest"):
        each = found[what]
        if each is None:
            lines.append(
                f"{what}: nothing that fits{' and has a price' if what == 'cheapest' else ''}"
            )
        else:
            usd = f", {each['usd']:,.0f} usd" if each["usd"] is not None else ""
            lines.append(
                f"{what} that fits: {each['hours']:,.3g} hours{usd} ({each['method']}): --on {each['on']} {format_overrides(each)}"
            )
    return "\n".join(lines)


def format_overrides(each: dict[str, Any]) -> str:
    return " ".join(each["overrides"]) or "(the config as it is)"
