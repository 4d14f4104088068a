"""Answer jaxpt plan: checks, plan, search and strategies, printed and returned as plan.json."""

from __future__ import annotations

import dataclasses
import difflib
import logging

from jaxpt import hardware
from jaxpt.config import Config
from jaxpt.model import transformer
from jaxpt.plan import check, compile, cost, grow_or_scratch, scaling, search
from jaxpt.plan.check import PlanCheck
from jaxpt.plan.cost import TargetPlan
from jaxpt.plan.grow_or_scratch import StrategyComparison
from jaxpt.plan.scaling import ScalingLaw
from jaxpt.plan.search import LayoutSearch
from jaxpt.spec import ModelSpec, Record, UserError
from jaxpt.text import format_table, wrap_notes
from jaxpt.train.shapes import plan_largest

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PlannedModel(Record):
    """The model and batch that a plan is for."""

    n_params: int
    seq_len: int
    batch_size: int  # sequences per step, over all devices
    grad_accum_steps: int
    spec: ModelSpec


@dataclasses.dataclass(frozen=True)
class TrainingPlan(Record):
    """plan.json."""

    targets: tuple[TargetPlan, ...] = ()
    model: PlannedModel | None = None  # None: only runs were checked, or strategies compared
    tokens: float | None = None  # token budget of the run
    notes: tuple[str, ...] = ()
    checks: tuple[PlanCheck, ...] = ()  # --check
    search: LayoutSearch | None = None  # --search
    comparison: StrategyComparison | None = None  # --base, --target-loss or --fit


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
    plan, left_out = TrainingPlan(), []
    if settings.train.shape_schedule:
        left_out.append("train.shape_schedule: every step is planned as its largest one.")
        settings = plan_largest(settings)
    if request.with_search:
        targets, found = search.search_layouts(settings, request.target_names, calibrations)
        header = make_plan_header(settings)
        notes = header.notes + cost.collect_assumptions(targets)
        plan = dataclasses.replace(header, targets=targets, search=found, notes=notes)
    elif request.target_names:
        plan = plan_targets(settings, request.target_names, calibrations)
    if plan.targets:
        plan = dataclasses.replace(plan, notes=(*left_out, *plan.notes))
        print(f"\n{format_plan(plan)}")
    if plan.search:
        print(f"\n{search.format_search(plan.targets, plan.search)}")
    comparison = None
    if request.compares_strategies:
        comparison = compare_strategies(settings, request, law, base_usd, plan)
        print(f"\n{grow_or_scratch.format_strategies(comparison)}")
    return dataclasses.replace(plan, checks=checks, comparison=comparison)


def plan_targets(
    settings: Config, target_names: list[str], calibrations: dict[str, float] | None = None
) -> TrainingPlan:
    """Return the plan of a config on each target.

    Args:
        settings: the run's config.
        target_names: as in --on.
        calibrations: chip -> measured / planned step seconds, see check.py.

    Raises:
        UserError: a chip is unknown, a slice is not offered, or a target cannot divide the sizes.
    """
    targets = [hardware.parse_target(name) for name in target_names]
    spec, _ = cost.resolve_model_spec(settings)
    header = make_plan_header(settings)
    tokens = cost.get_token_budget(settings)
    calibrations = calibrations or {}
    plans: list[TargetPlan] = []
    notes = list(header.notes)
    for target in targets:
        name = target.name
        missing = compile.find_missing_package(target)
        if missing:
            log.warning(f"plan: {name}: estimating; to compile, install {missing}")
        else:
            log.info(f"plan: {name}: compiling the train step ...")
        analysis = compile.analyze_step(spec, settings, target)
        outcome = analysis.method
        if analysis.exceeds_memory:
            outcome = "refused by the compiler"
        log.info(f"plan: {name}: {outcome} in {analysis.analysis_seconds:.0f} s")
        calibration = calibrations.get(target.chip.name, 1.0)
        plan = cost.project_target(spec, settings, target, analysis, tokens, calibration)
        plans.append(plan)
        if not plan.fits:
            suggestion = search.suggest_layout(spec, settings, target)
            notes.append(f"{name}: {suggestion}")
    notes += cost.collect_assumptions(plans)
    return dataclasses.replace(header, targets=tuple(plans), notes=tuple(notes))


def make_plan_header(settings: Config) -> TrainingPlan:
    """Return a plan without targets."""
    spec, notes = cost.resolve_model_spec(settings)
    tokens = cost.get_token_budget(settings)
    model = PlannedModel(
        n_params=transformer.count_params(spec),
        seq_len=settings.pack.seq_len,
        batch_size=settings.train.batch_size,
        grad_accum_steps=settings.train.grad_accum_steps,
        spec=spec,
    )
    return TrainingPlan(model=model, tokens=tokens, notes=tuple(notes))


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


def format_plan(plan: TrainingPlan) -> str:
    """Return the plan as text."""
    lines = []
    model = plan.model
    if model and plan.tokens:
        step_tokens = model.batch_size * model.seq_len
        size = transformer.describe_params(model.spec)
        lines += [
            f"{size}; {cost.abbreviate_count(plan.tokens)} tokens in all",
            f"{step_tokens:,} tokens per step "
            f"({model.batch_size:,} sequences of {model.seq_len:,} tokens)",
            "",
        ]
    columns = [cost.make_column(target) for target in plan.targets]
    rows = [["", *(target.target for target in plan.targets)]]
    for label in columns[0]:
        rows.append([label, *(column[label] for column in columns)])
    return "\n".join([*lines, format_table(rows), "", wrap_notes(plan.notes)])
