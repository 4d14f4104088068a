"""Search mesh, micro-batch and remat: estimate all, compile from the best down until one fits."""

from __future__ import annotations

import dataclasses
import logging

from jaxpt.config import Config
from jaxpt.plan import compile, cost, hardware, layouts
from jaxpt.plan.hardware import GIB, Target
from jaxpt.plan.layouts import Layout
from jaxpt.plan.records import LayoutSearch, TargetPlan
from jaxpt.spec import ModelSpec

log = logging.getLogger(__name__)

ESTIMATE_ERROR_FRAC = 0.25  # of flops.estimate_temporary_bytes against the compilers
MAX_COMPILED = 4  # per target; an 8B step takes half a minute and more


def search_layouts(
    settings: Config, target_names: list[str], calibrations: dict[str, float]
) -> tuple[tuple[TargetPlan, ...], LayoutSearch]:
    """Return the plan of each target's best layout, and the best of all.

    Sequences and tokens per step stay as in the config. Targets that nothing fits are left out.

    Raises:
        UserError: a target is unknown.
    """
    targets = [hardware.parse_target(name) for name in target_names]
    spec, _ = cost.resolve_model_spec(settings)
    tokens = cost.get_token_budget(settings)
    plans: list[TargetPlan] = []
    n_tried = n_compiled = 0
    for target in targets:
        candidates = layouts.list_layouts(spec, settings, target)
        best, n_compiled_here = find_fitting_layout(spec, target, candidates)
        n_tried += len(candidates)
        n_compiled += n_compiled_here
        if best is None:
            suggestion = layouts.suggest_layout(spec, settings, target)
            log.warning(
                f"search: {target.name}: none of {len(candidates):,} layouts fits. {suggestion}"
            )
            continue
        calibration = calibrations.get(target.chip.name, 1.0)
        plan = cost.project_target(spec, best.settings, target, best.analysis, tokens, calibration)
        overrides = layouts.list_overrides(settings, best.settings)
        plans.append(dataclasses.replace(plan, overrides=tuple(overrides)))
    priced = [plan for plan in plans if plan.expected.usd is not None]
    return tuple(plans), LayoutSearch(
        cheapest=min(priced, key=lambda plan: plan.expected.usd or 0.0, default=None),
        fastest=min(plans, key=lambda plan: plan.expected.hours, default=None),
        n_tried=n_tried,
        n_compiled=n_compiled,
    )


def find_fitting_layout(
    spec: ModelSpec, target: Target, candidates: list[Layout]
) -> tuple[Layout | None, int]:
    """Return the fastest layout that the compiler confirms, and how many were compiled.

    Without the compiler's package, arithmetic decides.
    """
    missing = compile.find_missing_package(target)
    usable_bytes = target.usable_bytes
    # until something was compiled, drop only what needs more than the estimate can be wrong by
    limit = usable_bytes if missing else usable_bytes * (1 + ESTIMATE_ERROR_FRAC)
    correction = 1.0  # compiled peak / estimated peak, once a layout did not fit
    for n_compiled in range(MAX_COMPILED):
        candidates = layouts.select_fitting(candidates, limit / correction)
        if not candidates:
            return None, n_compiled
        best = layouts.choose_layout(candidates)
        if missing:
            analysis = dataclasses.replace(best.analysis, missing_package=missing)
            return best._replace(analysis=analysis), n_compiled
        log.info(f"search: {target.name}: compiling")
        log.info(f"  {layouts.format_layout(best)}")
        compiled = best._replace(analysis=compile.analyze_step(spec, best.settings, target))
        analysis = compiled.analysis
        fits = not analysis.exceeds_memory and compiled.required_bytes <= usable_bytes
        verdict = "fits" if fits else "does not fit"
        memory = f"{compiled.required_bytes / GIB:.1f} of {usable_bytes / GIB:.1f} GiB"
        log.info(f"  {verdict}: {memory} ({analysis.analysis_seconds:.0f} s)")
        if fits:
            return compiled, n_compiled + 1
        error = analysis.peak_bytes / best.analysis.peak_bytes
        if analysis.exceeds_memory:
            # the refused program's number is no peak: try only what needs a tenth less
            error = 1.1 * usable_bytes / best.required_bytes
        correction = max(correction, error)
        limit = usable_bytes
    return None, MAX_COMPILED


def format_search(plans: tuple[TargetPlan, ...], search: LayoutSearch) -> str:
    """Return the overrides to paste: of each target, then of the best ones."""
    lines = [f"{search.n_tried:,} layouts estimated, {search.n_compiled} compiled"]
    lines.append("best of each target:")
    for plan in plans:
        lines.append(f"  {format_flags(plan)}")
    for name, plan in (("cheapest", search.cheapest), ("fastest", search.fastest)):
        if plan is None:
            lines.append(f"{name}: nothing fits{' and has a price' if name == 'cheapest' else ''}")
            continue
        usd = plan.expected.usd
        price = "" if usd is None else f", {usd:,.0f} usd"
        lines.append(f"{name}: {plan.expected.hours:,.3g} hours{price} ({plan.method})")
        lines.append(f"  {format_flags(plan)}")
    return "\n".join(lines)


def format_flags(plan: TargetPlan) -> str:
    """Return the flags that select a target and its layout."""
    overrides = " ".join(plan.overrides) or "(the config as it is)"
    return f"--on {plan.target} {overrides}"
