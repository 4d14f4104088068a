"""What plan.py answers: the checks, the plan, the search and the ways that were asked for, said on the terminal and returned as plan.json."""

from __future__ import annotations

import difflib
import pathlib
from typing import Any

from jaxpt.config import Config
from jaxpt.plan import check, cost, scaling, search, ways
from jaxpt.spec import UserError
from jaxpt.stage import say


def answer(
    settings: Config | None,
    *,
    on: list[str],
    searches: bool = False,
    checks: list[str] | tuple[str, ...] = (),
    base: str | None = None,
    base_tokens: float = 0.0,
    base_usd: str | None = None,
    target_loss: float | None = None,
    law: str = "chinchilla",
    fits: list[str] | tuple[str, ...] = (),
) -> dict[str, Any]:
    """{"targets": [...]} of the plan, and "check", "search" and "ways" where they were asked for. settings None: checks alone.

    Raises UserError for what cannot be planned.
    """
    prior = law_named(law)
    usd = price_of_base(base_usd)
    found: dict[str, Any] = {"targets": []}
    calibrations: dict[str, float] = {}
    if checks:
        found["check"] = check.check([pathlib.Path(run) for run in checks])
        calibrations = check.calibration(found["check"])
        say("\n" + check.table(found["check"]) + "\n")
    if settings is None:
        return found
    if searches:
        best = search.search(settings, on, calibrations)
        found |= cost.heading(settings) | {"targets": best["targets"], "search": {key: best[key] for key in best if key != "targets"}}
        found["notes"] += cost.rests_on(best["targets"])
    elif on:
        found |= cost.plan(settings, on, calibrations)
    if found["targets"]:
        say("\n" + cost.table(found))
    if searches:
        say("\n" + search.tell(best))
    if base or target_loss is not None or fits:
        fitted, gains = ways.from_runs([pathlib.Path(run) for run in fits], prior) if fits else (None, {})
        found["ways"] = ways.compare(
            cost.model_of(settings)[0], settings.pack.row_len, cost.tokens_of(settings),
            base=ways.base_of(base, base_tokens, usd) if base else None, target_loss=target_loss,
            law=prior, fitted=fitted, gains=gains, record=found["targets"][0] if found["targets"] else None,
        )  # fmt: skip
        say("\n" + ways.table(found["ways"]))
    return found


def law_named(name: str) -> scaling.Law:
    if name not in scaling.LAWS:
        near = difflib.get_close_matches(name, scaling.LAWS, 1)
        raise UserError(f"--law {name}: there is no such law; " + (f"did you mean {near[0]}?" if near else f"there are: {', '.join(scaling.LAWS)}."))
    return scaling.LAWS[name]


def price_of_base(text: str | None) -> float | None:
    """free -> 0, a number -> US dollars, left out -> None."""
    if text in (None, "free"):
        return None if text is None else 0.0
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--base-usd {text}: wanted US dollars, such as 100000, or free.") from None
