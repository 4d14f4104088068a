"""Which mesh, micro-batch and remat: by arithmetic over all of them, then compiled from the best one down until one fits."""

from __future__ import annotations

from typing import Any

from jaxpt.config import Config
from jaxpt.plan import compile, cost, hardware, layouts
from jaxpt.plan.layouts import Layout
from jaxpt.spec import ModelSpec
from jaxpt.stage import say

ARITHMETIC_ERROR = 0.25  # of flops.temporaries, against what the compilers said
MOST_COMPILED = 4  # on one target; an 8B step takes half a minute and more


def search(settings: Config, on: list[str], calibrations: dict[str, float] | None = None) -> dict[str, Any]:
    """The best settings of each target, and of all: {"targets": [record with "overrides"], "cheapest" and "fastest": one of the targets,
    or None where nothing fits, "tried", "compiled": how many}. Rows and tokens of a step stay what the config says.

    Raises UserError for what is no target.
    """
    targets = [hardware.target(each) for each in on]
    spec, _ = cost.model_of(settings)
    records, n_tried, n_compiled = [], 0, 0
    for target in targets:
        found = layouts.candidates(spec, settings, target)
        best, compiles = first_that_fits(spec, target, found)
        n_tried, n_compiled = n_tried + len(found), n_compiled + compiles
        if best:
            record = cost.record(spec, best.asked, target, best.measured, cost.tokens_of(settings), (calibrations or {}).get(target.chip.name, 1.0))
            records.append(record | {"overrides": layouts.overrides(settings, best.asked)})
        else:
            say(f"search: {target.on}: none of {len(found):,} settings fits. {layouts.advice(spec, settings, target)}")
    choose = lambda key: min((each for each in records if each[key] is not None), key=lambda each: each[key], default=None)  # noqa: E731
    return {"targets": records, "cheapest": choose("usd"), "fastest": choose("hours"), "tried": n_tried, "compiled": n_compiled}


def first_that_fits(spec: ModelSpec, target: hardware.Target, found: list[Layout]) -> tuple[Layout | None, int]:
    """The fastest layout that the compiler confirms, and how many were compiled. Where its package is missing, arithmetic decides."""
    missing = compile.missing_package(target)
    taught = 1.0  # a compiled peak over its estimate, once one did not fit
    for n_compiled in range(MOST_COMPILED):
        room = target.usable * (1 if missing or n_compiled else 1 + ARITHMETIC_ERROR)
        found = [each for each in found if each.needs * taught <= room]
        if not found:
            return None, n_compiled
        best = layouts.choose(found)
        if missing:
            return best._replace(measured=best.measured | {"missing": missing}), n_compiled
        say(f"search: {target.on}: compiling {layouts.tell(best)} ...")
        measured = compile.measure(spec, best.asked, target)
        needs = max(measured["peak_bytes"], measured["export_bytes"]) / hardware.GIB
        fits = not measured["over_memory"] and needs * hardware.GIB <= target.usable
        verdict = "fits" if fits else "does not fit"
        say(f"search: {target.on}: {verdict}: {needs:.1f} of {target.usable / hardware.GIB:.1f} GiB ({measured['seconds']:.0f} s)")
        if fits:
            return best._replace(measured=measured), n_compiled + 1
        # where the compiler refused, its number is no peak: then only what needs a tenth less is worth a try
        taught = max(taught, 1.1 * target.usable / best.needs if measured["over_memory"] else measured["peak_bytes"] / best.measured["peak_bytes"])
    return None, MOST_COMPILED


def tell(found: dict[str, Any]) -> str:
    """The answer in lines to paste: of each target, then of all."""
    lines = [f"{found['tried']:,} settings by arithmetic, {found['compiled']} compiled; the best of each target:"]
    lines += [f"  --on {each['on']}: {pasted(each)}" for each in found["targets"]]
    for what in ("cheapest", "fastest"):
        each = found[what]
        if each is None:
            lines.append(f"{what}: nothing that fits{' and has a price' if what == 'cheapest' else ''}")
        else:
            usd = f", {each['usd']:,.0f} usd" if each["usd"] is not None else ""
            lines.append(f"{what} that fits: {each['hours']:,.3g} hours{usd} ({each['method']}): --on {each['on']} {pasted(each)}")
    return "\n".join(lines)


def pasted(each: dict[str, Any]) -> str:
    return " ".join(each["overrides"]) or "(the config as it is)"
