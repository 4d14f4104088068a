"""Answer jaxpt plan: checks, plan, search and strategies, printed and returned as plan.json."""

from __future__ import annotations

import dataclasses
import difflib

from jaxpt.config import Config
from jaxpt.plan import check, cost, format, grow_or_scratch, scaling, search
from jaxpt.plan.records import ScalingLaw, StrategyComparison, TrainingPlan
from jaxpt.spec import UserError


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """The command line of jaxpt plan."""

    target_names: list[str]  # --on
    with_search: bool = False
    check_run_dirs: tuple[str, ...] | list[str] = ()
    base: str | None = None
    base_tokens: float = 0.0
    base_usd: str | None = None
    target_loss: float | None = None
    law_name: str = "chinchilla"
    fit_run_dirs: tuple[str, ...] | list[str] = ()

    @property
    def compares_strategies(self) -> bool:
        """Whether any flag of "grow or scratch" is set."""
        return bool(self.base or self.fit_run_dirs) or self.target_loss is not None


def run_plan(settings: Config | None, request: PlanRequest) -> TrainingPlan:
    """Return the plan with all that was requested, and print it.

    Args:
        settings: the run's config; None: only check runs.
        request: what to do.

    Raises:
        UserError: it cannot be planned.
    """
    law = get_scaling_law(request.law_name)
    base_usd = parse_base_usd(request.base_usd)
    checks = check.compare_plan_to_runs(request.check_run_dirs)
    calibrations = check.compute_time_calibrations(checks)
    if checks:
        print(f"\n{check.format_plan_checks(checks)}\n")
    if settings is None:
        return TrainingPlan(checks=checks)
    plan = TrainingPlan()
    if request.with_search:
        targets, found = search.search_layouts(settings, request.target_names, calibrations)
        header = cost.make_plan_header(settings)
        notes = header.notes + format.collect_assumptions(targets)
        plan = dataclasses.replace(header, targets=targets, search=found, notes=notes)
    elif request.target_names:
        plan = cost.plan_targets(settings, request.target_names, calibrations)
    if plan.targets:
        print(f"\n{format.format_plan(plan)}")
    if plan.search:
        print(f"\n{search.format_search(plan.targets, plan.search)}")
    comparison = None
    if request.compares_strategies:
        comparison = compare_strategies(settings, request, law, base_usd, plan)
        print(f"\n{grow_or_scratch.format_strategies(comparison)}")
    return dataclasses.replace(plan, checks=checks, comparison=comparison)


def compare_strategies(
    settings: Config,
    request: PlanRequest,
    law: ScalingLaw,
    base_usd: float | None,
    plan: TrainingPlan,
) -> StrategyComparison:
    """Return the strategies to the config's model, priced by the plan's first target."""
    scaling_fit, measured_savings = None, {}
    if request.fit_run_dirs:
        scaling_fit, measured_savings = grow_or_scratch.fit_runs(request.fit_run_dirs, law)
    base = None
    if request.base:
        base = grow_or_scratch.load_base_model(request.base, request.base_tokens, base_usd)
    spec, _ = cost.resolve_model_spec(settings)
    return grow_or_scratch.compare_strategies(
        spec,
        settings.pack.seq_len,
        cost.get_token_budget(settings),
        base=base,
        target_loss=request.target_loss,
        law=law,
        scaling_fit=scaling_fit,
        measured_savings=measured_savings,
        target_plan=plan.targets[0] if plan.targets else None,
    )


def get_scaling_law(name: str) -> ScalingLaw:
    """Return a published law. Raise UserError if there is no such law."""
    if name in scaling.SCALING_LAWS:
        return scaling.SCALING_LAWS[name]
    near = difflib.get_close_matches(name, scaling.SCALING_LAWS, 1)
    hint = f"did you mean {near[0]}?" if near else f"use {', '.join(scaling.SCALING_LAWS)}."
    raise UserError(f"--law {name}: there is no such law; {hint}")


def parse_base_usd(text: str | None) -> float | None:
    """Return US dollars, 0 for "free" and None for None."""
    if text is None:
        return None
    if text == "free":
        return 0.0
    try:
        return float(text)
    except ValueError:
        raise UserError(
            f"--base-usd: expected US dollars, such as 100000, or free, got {text}."
        ) from None
