"""What plan.py answers: the checks, the plan, the search and the ways that were asked for, said on the terminal and returned as plan.json."""

from __future__ import annotations

import difflib
import logging
import pathlib
from typing import Any

from jaxpt.config import Config
from jaxpt.plan import check, cost, grow_or_scratch, scaling, search
from jaxpt.spec import UserError

log = logging.getLogger(__name__)


def run_plan(
    settings: Config | None,
    *,
    target_names: list[str],
    with_search: bool = False,
    check_run_dirs: list[str] | tuple[str, ...] = (),
    base: str | None = None,
    base_tokens: float = 0.0,
    base_usd: str | None = None,
    target_loss: float | None = None,
    law_name: str = "chinchilla",
    fit_run_dirs: list[str] | tuple[str, ...] = (),
) -> dict[str, Any]:
    """{"targets": [...]} of the plan, and "check", "search" and "ways" where they were asked for. settings None: checks alone.

    Raises UserError for what cannot be planned.
    """
    prior = get_scaling_law(law_name)
    usd = parse_base_usd(base_usd)
    found: dict[str, Any] = {"targets": []}
    calibrations: dict[str, float] = {}
    if check_run_dirs:
        found["check"] = check.compare_plan_to_runs([pathlib.Path(run) for run in check_run_dirs])
        calibrations = check.compute_time_calibrations(found["check"])
        log.info("\n" + check.format_plan_checks(found["check"]) + "\n")
    if settings is None:
        return found
    if with_search:
        best = search.search_layouts(settings, target_names, calibrations)
        found |= cost.make_plan_header(settings) | {
            "targets": best["targets"],
            "search": {key: best[key] for key in best if key != "targets"},
        }
        found["notes"] += cost.collect_assumptions(best["targets"])
    elif target_names:
        found |= cost.plan_targets(settings, target_names, calibrations)
    if found["targets"]:
        log.info("\n" + cost.format_plan(found))
    if with_search:
        log.info("\n" + search.format_search(best))
    if base or target_loss is not None or fit_run_dirs:
        fitted, gains = (
            grow_or_scratch.fit_runs([pathlib.Path(run) for run in fit_run_dirs], prior)
            if fit_run_dirs
            else (None, {})
        )
        found["ways"] = grow_or_scratch.compare_strategies(
            cost.resolve_model_spec(settings)[0], settings.pack.seq_len, cost.get_token_budget(settings),
            base=grow_or_scratch.load_base_model(base, base_tokens, usd) if base else None, target_loss=target_loss,
            law=prior, scaling_fit=fitted, measured_savings=gains, target_plan=found["targets"][0] if found["targets"] else None,
        )  # fmt: skip
        log.info("\n" + grow_or_scratch.format_strategies(found["ways"]))
    return found


def get_scaling_law(name: str) -> scaling.ScalingLaw:
    if name not in scaling.SCALING_LAWS:
        near = difflib.get_close_matches(name, scaling.SCALING_LAWS, 1)
        raise UserError(
            f"--law {name}: there is no such law; "
            + (
                f"did you mean {near[0]}?"
                if near
                else f"there are: {', '.join(scaling.SCALING_LAWS)}."
            )
        )
    return scaling.SCALING_LAWS[name]


def parse_base_usd(text: str | None) -> float | None:
    """Free -> 0, a number -> US dollars, left out -> None."""
    if text in (None, "free"):
        return None if text is None else 0.0
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--base-usd {text}: wanted US dollars, such as 100000, or free.") from None
