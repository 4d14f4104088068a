"""What growing a model is worth, with its controls: which way to a lower loss costs least.

    python benchmarks/growth.py frontier arms --text gutenberg/*.txt --to runs/growth
    python benchmarks/growth.py tables --to benchmarks/growth_results

`rates`     each arm of `upcycle` at several peak rates, on a seed that is not used again
`upcycle`   a dense model trained on, made a mixture of experts, or a mixture from scratch, all with
            the same FLOPs in all, the base's included
`operators` every operator on one trained base, then the same steps from a fresh optimizer
`frontier`  loss against FLOPs: depths and widths at several budgets, each at several peak rates
`arms`      a full size, the same with less, small models left alone, and ways to grow, at equal
            FLOPs with the base's included
`pretrained` a finished base of 5, 20 and 80 tokens per parameter: trained on, or grown, on text
            that it has not read
`holdout`   twice the depth at 1.5 times the FLOPs of `arms`, to test what was fitted to `arms`
`transfer`  five rates at seven shapes, with and without model.base_shape
`init`      five initializations at three sizes
`speed`     CPU seconds of a step of each shape of `arms`, before and after its growth, on one core
`tables`    tables of all results, with 95 % intervals of paired differences, and plots

Every arm has a decay of its own to 0 and is measured after it, but for `operators`, whose rate is
constant. FLOPs are of the active parameters and of attention, forward and backward. A seed is that
of the initialization and of the data's order, so arms are compared seed by seed. What has a result
is not trained again: give the same command to go on after a kill.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import growth_forecast
import growth_runs
import growth_tables
from growth_runs import Run, Segment, Shape, Text

from jaxpt import stage

DECAY_FRAC = 0.2  # of an arm's steps
TUNING_SEED = 100
SEEDS = (0, 1, 2, 3, 4)

# ---- upcycling: a base of UNIT FLOPs, and as much again
UNIT = 3e12
UPCYCLE_BATCH = 16
UPCYCLE_BASE = Shape(4, 64)
UPCYCLE_RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
UPCYCLE_OPERATORS = {
    "base, trained on": "",
    "upcycle(experts=8, top_k=2)": "upcycle(experts=8, top_k=2)",
    "upcycle(experts=8, top_k=2, drop=0.5)": "upcycle(experts=8, top_k=2, drop=0.5)",
}
UPCYCLE_SCRATCH = "mixture from scratch, 8 experts, 2 for a token"


def make_upcycle_arms(rate: float, seed: int, part: str) -> list[Run]:
    """Return the runs of one seed at one rate."""
    runs = []
    for arm, operator in UPCYCLE_OPERATORS.items():
        base_steps = count_steps(UPCYCLE_BASE, "", UNIT, UPCYCLE_BATCH)
        more_steps = count_steps(UPCYCLE_BASE, operator, UNIT, UPCYCLE_BATCH)
        n_decay = round(DECAY_FRAC * (base_steps + more_steps))
        segments = (
            Segment(base_steps),
            Segment(more_steps - n_decay, operator),
            Segment(n_decay, decay=True),
        )
        runs.append(Run(part, arm, UPCYCLE_BASE, segments, rate, seed, UPCYCLE_BATCH, n_curve=100))
    mixture = Shape(UPCYCLE_BASE.n_layers, UPCYCLE_BASE.d_model, experts=8)
    runs.append(make_plain(part, UPCYCLE_SCRATCH, mixture, 2 * UNIT, rate, seed, UPCYCLE_BATCH))
    return runs


def make_plain(
    part: str, arm: str, shape: Shape, budget: float, rate: float, seed: int, batch_size: int
) -> Run:
    """Return a run from scratch that spends a budget of FLOPs."""
    segments = make_plain_segments(count_steps(shape, "", budget, batch_size))
    return Run(part, arm, shape, segments, rate, seed, batch_size)


def count_steps(shape: Shape, operator: str, budget: float, batch_size: int) -> int:
    """Return the steps that a budget of FLOPs pays for, of a shape after an operator."""
    spec = shape.make_spec()
    if operator:
        spec = growth_runs.plan_growth(operator, growth_runs.Parent(spec)).child
    return round(budget / growth_runs.flops_per_step(spec, batch_size))


def plan_rates(results: list[dict[str, Any]]) -> list[Run]:
    """Return the runs that find each arm's rate."""
    runs = []
    for rate in UPCYCLE_RATES:
        runs += make_upcycle_arms(rate, TUNING_SEED, "upcycle rates")
    return runs


def plan_upcycle(results: list[dict[str, Any]]) -> list[Run]:
    """Return the runs of all seeds, each arm at the best of its rates."""
    best = find_best_rates(results, "upcycle rates")
    runs = []
    for seed in SEEDS:
        for rate in sorted(set(best.values())):
            arms = make_upcycle_arms(rate, seed, "upcycle")
            runs += [run for run in arms if best[run.arm] == rate]
    return runs


def find_best_rates(results: list[dict[str, Any]], part: str) -> dict[str, float]:
    """Return arm -> the rate of its lowest loss."""
    best: dict[str, tuple[float, float]] = {}
    for result in results:
        if result["part"] == part:
            found = result["loss"], result["peak_lr"]
            best[result["arm"]] = min(best.get(result["arm"], found), found)
    return {arm: rate for arm, (_, rate) in best.items()}


# ---- the frontier: which depth and width has the lowest loss for its FLOPs

WIDTHS = (64, 96)
DEPTHS = (1, 2, 4, 8)
BUDGETS = (2e12, 6e12, 1.8e13)
RATES = (4e-3, 8e-3, 2e-3)
BATCH = 16


def plan_frontier(results: list[dict[str, Any]]) -> list[Run]:
    """Return a run for each shape, budget and rate, the middle rate first.

    The budgets of a shape and rate share their trunk. Once all are there, a shape whose best rate
    is the highest or the lowest of a budget gets one beyond it.
    """
    runs = []
    done = {result["key"]: result["loss"] for result in results}
    for width in WIDTHS:
        for rate in RATES:
            for depth in DEPTHS:
                runs += make_frontier_runs(Shape(depth, width), rate)
        for depth in DEPTHS:
            runs += extend_rates(Shape(depth, width), done)
    return runs


def make_frontier_runs(shape: Shape, rate: float) -> list[Run]:
    """Return a shape's runs at one rate, one for each budget."""
    runs = []
    for budget in BUDGETS:
        arm = f"{shape.n_layers} x {shape.d_model}, {budget:g} FLOPs"
        segments = make_plain_segments(
            count_steps(shape, "", budget, BATCH), stops_at(shape, budget)
        )
        runs.append(Run("frontier", arm, shape, segments, rate, TUNING_SEED, BATCH))
    return runs


def extend_rates(shape: Shape, done: dict[str, float]) -> list[Run]:
    """Return the runs beyond RATES that a shape needs, given the losses of finished runs by key."""
    rates = sorted(RATES)
    runs: list[Run] = []
    while True:
        tried = {rate: make_frontier_runs(shape, rate) for rate in rates}
        if any(run.key not in done for group in tried.values() for run in group):
            return runs
        best = set()
        for i in range(len(BUDGETS)):
            best.add(min(rates, key=lambda rate: done[tried[rate][i].key]))
        beyond = [2 * rates[-1]] if rates[-1] in best else []
        beyond += [rates[0] / 2] if rates[0] in best else []
        if not beyond:
            return runs
        for rate in beyond:
            runs += make_frontier_runs(shape, rate)
        rates = sorted([*rates, *beyond])


def stops_at(shape: Shape, budget: float) -> list[int]:
    """Return where the stable phases of lower budgets end, so that a trunk has these states."""
    lower = [each for each in BUDGETS if each < budget]
    return [stable_steps(count_steps(shape, "", each, BATCH)) for each in lower]


# ---- arms: a full size, its parts, the small models left alone, and growing

FULL = Shape(4, 64)
BUDGET = 1.2e13  # FLOPs: about where the full size is the best, with 28 tokens per parameter
ARM_RATES = (4e-3, 8e-3)  # and beyond them where one of these two is the best
ARM_RATE_SEED = 0  # which is for their choice alone
ARM_SEEDS = (1, 2, 3, 4, 5)
SHORTER = (0.25, 0.4, 0.5)  # of the budget, for the full size alone
SMALL = {
    "1 layer, never grown": Shape(1, 64),
    "2 layers, never grown": Shape(2, 64),
    "3 layers, never grown": Shape(3, 64),
    "half the width, never grown": Shape(4, 32),
}
# arm -> (the shape before, its operator, the share of the tokens before it)
GROWN = {
    "1 layer, jump at 50 %": (Shape(1, 64), "deepen(L=4)", 0.5),
    "1 layer, jump at 70 %": (Shape(1, 64), "deepen(L=4)", 0.7),
    "1 layer, jump at 80 %": (Shape(1, 64), "deepen(L=4)", 0.8),
    "2 layers, stack at 50 %": (Shape(2, 64), "stack(g=2)", 0.5),
    "2 layers, deepen at 50 %": (Shape(2, 64), "deepen(L=4)", 0.5),
    "2 layers, identity layers at 50 %": (Shape(2, 64), "insert_identity(every=1)", 0.5),
    "3 layers, depth up-scaling at 50 %": (Shape(3, 64), "depth_upscale(m=1)", 0.5),
    "half the width, widened at 50 %": (
        Shape(4, 32),
        "widen(d=64, ff=176, heads=4, noise=0.2)",
        0.5,
    ),
}
CURVE_STEPS = 250
ALSO_FRESH = ("1 layer, jump at 70 %", "2 layers, stack at 50 %")
ALSO_SHUFFLED = ("2 layers, stack at 50 %",)  # a base that learns nothing of order: no gain


FRESH, SHUFFLED = ", fresh moments", ", its base on shuffled tokens"
# of the frontier, whose best of both is not at the edge
FRONTIER_RATES = {"1 layer, never grown": 4e-3, "2 layers, never grown": 4e-3}
# What is made first, for all seeds: the rivals, which are the full size and the best small model
# left alone, and what may win. The others explain it.
RIVAL = "3 layers, never grown"
DECIDING = (
    "1 layer, jump at 50 %",
    "1 layer, jump at 70 %",
    "2 layers, stack at 50 %",
    "2 layers, deepen at 50 %",
    "3 layers, depth up-scaling at 50 %",
)


def plan_arms(results: list[dict[str, Any]]) -> list[Run]:
    """Return every arm at several rates on one seed; then all arms at their best on the others.

    What decides trains at both of ARM_RATES there, rivals first, if one of them was its best. What
    does not decide waits until all that is done.
    """
    runs = plan_tuned(make_arms, "arms", ARM_SEEDS, FRONTIER_RATES, results)
    best = find_arm_rates(results, "arms", FRONTIER_RATES)
    rivals, others = [], []
    for rate in ARM_RATES:
        for seed in ARM_SEEDS:
            for run in make_arms(rate, seed):
                if is_rival(run.arm):
                    rivals.append(run)
                elif is_deciding(run.arm) and best.get(run.arm) in ARM_RATES:
                    others.append(run)
    runs = list({run.key: run for run in (*runs, *rivals, *others)}.values())
    deciding = [run for run in runs if is_deciding(run.arm)]
    done = {result["key"] for result in results}
    return runs if all(run.key in done for run in deciding) else deciding


def is_rival(arm: str) -> bool:
    """Return whether growing must beat this arm."""
    return arm == RIVAL or arm.endswith("of the FLOPs")


def is_deciding(arm: str) -> bool:
    """Return whether a seed of `arms` counts only if it has this arm."""
    return arm in DECIDING or is_rival(arm)


def plan_tuned(
    make: Callable[[float, int], list[Run]],
    part: str,
    seeds: Iterable[int],
    known: dict[str, float],
    results: list[dict[str, Any]],
) -> list[Run]:
    """Return every arm of a part at several rates on one seed; then all at their best on others.

    An arm whose rate is still to be found has no others yet.

    Args:
        make: a rate and a seed -> all arms.
        part: its name.
        seeds: the others.
        known: rates of arms that need no search.
        results: of all parts.
    """
    tried = collect_tried(results, part)
    to_try = {}
    for run in make(ARM_RATES[0], ARM_RATE_SEED):
        if run.arm == name_tuned(run.arm) and run.arm not in known:
            to_try[run.arm] = list_rates(tried.get(run.arm, {}))
    runs = []
    for rate in sorted({rate for rates in to_try.values() for rate in rates}):
        runs += [run for run in make(rate, ARM_RATE_SEED) if rate in to_try.get(run.arm, ())]
    best = find_arm_rates(results, part, known)
    for seed in seeds:
        for rate in sorted(set(best.values())):
            runs += [run for run in make(rate, seed) if best.get(name_tuned(run.arm)) == rate]
    return runs


TUNED_PARTS: dict[str, dict[str, float]] = {"arms": FRONTIER_RATES, "pretrained": {}}


def select_compared(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return results for tables: of `arms` and `pretrained` the seeds at the best rates.

    A seed counts once all arms have it; of `arms`, all that decide. Until one does, tables are of
    the seed that chooses rates. Its runs at all rates are a part of their own, "arms, rates" or
    "pretrained, rates".
    """
    chosen = [result for result in results if result["part"] not in TUNED_PARTS]
    for part, known in TUNED_PARTS.items():
        of_part = [result for result in results if result["part"] == part]
        for result in of_part:
            if result["seed"] == ARM_RATE_SEED:
                chosen.append({**result, "part": f"{part}, rates"})
        tuned = find_arm_rates(results, part, known)
        arms = {result["arm"] for result in of_part}
        best = {arm: tuned[name_tuned(arm)] for arm in arms if name_tuned(arm) in tuned}
        seeds = group_by_seed(of_part, best)
        needed = {arm for found in seeds.values() for arm in found}
        if part == "arms":
            needed = {arm for arm in needed if is_deciding(arm)}
        whole = [seed for seed in seeds if seed != ARM_RATE_SEED and seeds[seed].keys() >= needed]
        seeds = group_by_seed(of_part, best | find_rates_in_hindsight(of_part, whole))
        for seed in whole or [ARM_RATE_SEED]:
            chosen += seeds.get(seed, {}).values()
    return chosen


def group_by_seed(
    results: list[dict[str, Any]], best: dict[str, float]
) -> dict[int, dict[str, dict[str, Any]]]:
    """Return seed -> arm -> its result at the best rate; of the seed that chooses, the lowest."""
    seeds: dict[int, dict[str, dict[str, Any]]] = {}
    for result in results:
        arm = result["arm"]
        found = seeds.setdefault(result["seed"], {})
        if result["seed"] == ARM_RATE_SEED:
            if result["loss"] <= found.get(arm, result)["loss"]:
                found[arm] = result
        elif result["peak_lr"] == best.get(arm):
            found[arm] = result
    return seeds


def find_rates_in_hindsight(
    results: list[dict[str, Any]], seeds: Collection[int]
) -> dict[str, float]:
    """Return arm that decides -> its best rate over the very seeds that compare.

    One seed cannot distinguish rates that are within 0.03 nats. Rates that some of the seeds lack
    do not count.
    """
    losses: dict[str, dict[float, list[float]]] = {}
    for result in results:
        if is_deciding(result["arm"]) and result["seed"] in seeds:
            rates = losses.setdefault(result["arm"], {})
            rates.setdefault(result["peak_lr"], []).append(result["loss"])
    best = {}
    for arm, rates in losses.items():
        means = {rate: statistics.mean(of) for rate, of in rates.items() if len(of) == len(seeds)}
        best[arm] = min(means, key=lambda rate: means[rate])
    return best


def list_rates(losses: dict[float, float]) -> list[float]:
    """Return the rates that an arm needs, given the losses of those that are done."""
    rates = sorted(ARM_RATES)
    while set(rates) <= losses.keys():
        best = min(rates, key=lambda rate: losses[rate])
        if rates[0] < best < rates[-1]:
            break
        rates = [*rates, 2 * best] if best == rates[-1] else [best / 2, *rates]
    return rates


def find_arm_rates(
    results: list[dict[str, Any]], part: str, known: dict[str, float]
) -> dict[str, float]:
    """Return arm -> its best rate, of arms whose best is not at the edge of those tried."""
    best = dict(known)
    for arm, losses in collect_tried(results, part).items():
        if arm == name_tuned(arm) and set(list_rates(losses)) <= losses.keys():
            best[arm] = min(losses, key=lambda rate: losses[rate])
    return best


def collect_tried(results: list[dict[str, Any]], part: str) -> dict[str, dict[float, float]]:
    """Return arm -> rate -> loss of the seed on which rates are chosen."""
    tried: dict[str, dict[float, float]] = {}
    for result in results:
        if result["part"] == part and result["seed"] == ARM_RATE_SEED:
            tried.setdefault(result["arm"], {})[result["peak_lr"]] = result["loss"]
    return tried


def name_tuned(arm: str) -> str:
    """Return the arm whose rate an arm takes: a control that of what it controls."""
    return arm.removesuffix(FRESH).removesuffix(SHUFFLED)


def make_arms(rate: float, seed: int) -> list[Run]:
    """Return all arms at equal FLOPs, and the full size with less."""
    runs = []
    for share in (*SHORTER, 1.0):
        n_steps = count_steps(FULL, "", share * BUDGET, BATCH)
        stops = [
            stable_steps(count_steps(FULL, "", each * BUDGET, BATCH))
            for each in SHORTER
            if each < share
        ]
        arm = f"{FULL.n_layers} layers, {share:g} of the FLOPs"
        segments = make_plain_segments(n_steps, stops)
        n_curve = CURVE_STEPS if share == 1 else 0
        runs.append(Run("arms", arm, FULL, segments, rate, seed, BATCH, n_curve))
    for arm, small in SMALL.items():
        runs.append(make_plain("arms", arm, small, BUDGET, rate, seed, BATCH))
    for arm, (small, operator, share) in GROWN.items():
        segments = make_grown_segments(small, operator, share, BUDGET)
        segments_of = {arm: segments}
        if arm in ALSO_FRESH:
            fresh = make_grown_segments(small, operator, share, BUDGET, "fresh")
            segments_of[arm + FRESH] = fresh
        if arm in ALSO_SHUFFLED:
            base = dataclasses.replace(segments[0], shuffled=True)
            segments_of[arm + SHUFFLED] = (base, *segments[1:])
        for name, each in segments_of.items():
            runs.append(Run("arms", name, small, each, rate, seed, BATCH, CURVE_STEPS))
    return runs


def list_speed_runs() -> list[Run]:
    """Return the runs whose steps are those of `arms`: each shape, and each growth of it."""
    runs = [Run("speed", "", FULL, (Segment(1),), ARM_RATES[0], ARM_RATE_SEED, BATCH)]
    for small in SMALL.values():
        runs.append(dataclasses.replace(runs[0], shape=small))
    for small, operator in dict.fromkeys(
        (small, operator) for small, operator, _ in GROWN.values()
    ):
        segments = Segment(1), Segment(1, operator)
        runs.append(dataclasses.replace(runs[0], shape=small, segments=segments))
    return runs


def make_grown_segments(
    small: Shape, operator: str, share: float, budget: float, moments: str = "reset_new"
) -> tuple[Segment, ...]:
    """Return a run that grows after a share of its tokens and spends a budget of FLOPs in all."""
    small_cost = budget / count_steps(small, "", budget, BATCH)
    full_cost = budget / count_steps(small, operator, budget, BATCH)
    n_steps = round(budget / (share * small_cost + (1 - share) * full_cost))
    n_before = round(share * n_steps)
    n_decay = min(n_steps - stable_steps(n_steps), n_steps - n_before)
    return (
        Segment(n_before),
        Segment(n_steps - n_before - n_decay, operator, moments=moments),
        Segment(n_decay, decay=True),
    )


def stable_steps(n_steps: int) -> int:
    """Return the steps before the decay of a run of so many."""
    return n_steps - round(DECAY_FRAC * n_steps)


def make_plain_segments(n_steps: int, stops: Iterable[int] = ()) -> tuple[Segment, ...]:
    """Return a run without growth, its stable phase cut where shorter ones leave it."""
    segments = []
    done = 0
    for stop in (*sorted(stops), stable_steps(n_steps)):
        segments.append(Segment(stop - done))
        done = stop
    return (*segments, Segment(n_steps - done, decay=True))


# ---- a base that exists and is paid for

PRETRAINED = Shape(2, 64)  # its child by "stack" is FULL
TOKENS_PER_PARAM = (5, 20, 80)  # that the base was trained on, with a decay to 0
PRETRAINED_RATE = 4e-3  # of the base: the frontier's best
PRETRAINED_SEEDS = (1, 2, 3, 4, 5)
PRETRAINED_BUDGET = 6e12  # FLOPs after that
PRETRAINED_OPERATORS = {
    "trained on": "",
    "stack": "stack(g=2)",
    "identity layers": "insert_identity(every=1)",
}
FROM_SCRATCH = f"{FULL.n_layers} layers from scratch"
# The base reads one part of the text, at most 3.6 times; all that is compared reads the other.
BASE_TEXT, LATER_TEXT = (0.0, 0.4), (0.4, 1.0)


def plan_pretrained(results: list[dict[str, Any]]) -> list[Run]:
    """Return what is made of each base at several rates on one seed, then at the best on others."""
    return plan_tuned(make_pretrained, "pretrained", PRETRAINED_SEEDS, {}, results)


def make_pretrained(rate: float, seed: int) -> list[Run]:
    """Return a run for each base and operator, and the child's size without a base.

    After the base, optimizer and schedule are fresh, with a warm-up; the rate is of that schedule.
    """
    n_params = growth_runs.transformer.count_params(PRETRAINED.make_spec())
    base_steps = {
        ratio: round(ratio * n_params / (BATCH * growth_runs.SEQ_LEN)) for ratio in TOKENS_PER_PARAM
    }

    def make_later(operator: str, shape: Shape = PRETRAINED) -> tuple[Segment, ...]:
        n_steps = count_steps(shape, operator, PRETRAINED_BUDGET, BATCH)
        n_stable = stable_steps(n_steps)
        return (
            Segment(n_stable, operator, restart=True, text=LATER_TEXT),
            Segment(n_steps - n_stable, decay=True, text=LATER_TEXT),
        )

    part = "pretrained"
    runs = [Run(part, FROM_SCRATCH, FULL, make_later("", FULL), rate, seed, BATCH)]
    for ratio, n_base in base_steps.items():
        stops = [stable_steps(n) for n in base_steps.values() if n < n_base]
        base = [
            dataclasses.replace(segment, peak_lr=PRETRAINED_RATE, text=BASE_TEXT)
            for segment in make_plain_segments(n_base, stops)
        ]
        for name, operator in PRETRAINED_OPERATORS.items():
            arm = f"base of {ratio} tokens per parameter, {name}"
            segments = (*base, *make_later(operator))
            runs.append(Run(part, arm, PRETRAINED, segments, rate, seed, BATCH))
    return runs


# ---- a size and a budget to which nothing was fitted

HOLDOUT = Shape(8, 64)
HOLDOUT_BUDGET = 1.8e13  # FLOPs: about where HOLDOUT is the best size, by the frontier
HOLDOUT_SEEDS = (1, 2, 3)
# arm -> shape and the frontier's best rate
HOLDOUT_PLAIN = {
    "8 layers, 1 of the FLOPs": (HOLDOUT, 4e-3),
    "4 layers, never grown": (Shape(4, 64), 8e-3),
    "2 layers, never grown": (Shape(2, 64), 4e-3),
}
# arm -> the shape before, its operator, and the one of `arms` whose rate it takes
HOLDOUT_GROWN = {
    "4 layers, stack at 50 %": (Shape(4, 64), "stack(g=2)", "2 layers, stack at 50 %"),
    "4 layers, deepen at 50 %": (Shape(4, 64), "deepen(L=8)", "2 layers, deepen at 50 %"),
    "4 layers, identity layers at 50 %": (
        Shape(4, 64),
        "insert_identity(every=1)",
        "2 layers, identity layers at 50 %",
    ),
    "1 layer, jump at 50 %": (Shape(1, 64), "deepen(L=8)", "1 layer, jump at 50 %"),
    "6 layers, depth up-scaling at 50 %": (
        Shape(6, 64),
        "depth_upscale(m=2)",
        "3 layers, depth up-scaling at 50 %",
    ),
}


def plan_holdout(results: list[dict[str, Any]]) -> list[Run]:
    """Return the full size, smaller ones left alone and grown ones, for three seeds."""
    best = find_arm_rates(results, "arms", FRONTIER_RATES)
    runs = []
    for seed in HOLDOUT_SEEDS:
        for arm, (shape, rate) in HOLDOUT_PLAIN.items():
            runs.append(make_plain("holdout", arm, shape, HOLDOUT_BUDGET, rate, seed, BATCH))
        for arm, (small, operator, like) in HOLDOUT_GROWN.items():
            segments = make_grown_segments(small, operator, 0.5, HOLDOUT_BUDGET)
            if like in best:
                runs.append(Run("holdout", arm, small, segments, best[like], seed, BATCH))
    return runs


# ---- every operator on one base

OPERATORS_BASE = Shape(6, 96)
OPERATORS = (
    "",
    "depth_upscale(m=2)",
    "stack(g=2)",
    "interleave(g=2)",
    "stack_middle(m=2)",
    "deepen(L=8)",
    "deepen(L=8, new='copy')",
    "insert_identity(every=3)",
    "predict_layers(m=2)",
    "widen(d=192)",
    "widen(ff=512, heads=12)",
    "widen(d=192, ff=512, heads=12)",
    "widen(d=192, ff=512, heads=12, noise=0.2)",
    "widen_rms(d=144, ff=384)",
    "drop_layers(n=1)",
    "narrow(ff=192)",
    "narrow(d=72, ff=192, heads=4)",
    "upcycle(experts=8, top_k=2)",
    "upcycle(granularity=2, expansion=4, top_k=2)",
)


def plan_operators(results: list[dict[str, Any]]) -> list[Run]:
    """Return a run for each operator, after 1,000 steps of the base."""
    runs = []
    for operator in OPERATORS:
        segments = (Segment(1000), Segment(200, operator, restart=True))
        arm = operator or "(the base, trained on)"
        runs.append(Run("operators", arm, OPERATORS_BASE, segments, 3e-3, 0, 8))
    return runs


# ---- one rate for all sizes, and what it starts from

TRANSFER_BASE = (4, 64)  # layers, width
TRANSFER_SHAPES = ((2, 64), (8, 64), (16, 64), (4, 32), (4, 128), (4, 256))
TRANSFER_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
TRANSFER_STEPS = 300


def plan_transfer(results: list[dict[str, Any]]) -> list[Run]:
    """Return a run for each shape and rate, with and without model.base_shape."""
    depth, width = TRANSFER_BASE
    base = f"{depth}x{width}"
    pairs = [(TRANSFER_BASE, "")]  # which is its own base
    for text in ("", base):
        pairs += [(shape, text) for shape in TRANSFER_SHAPES]
    runs = []
    for (depth, width), text in pairs:
        shape = Shape(depth, width, base=text)
        arm = f"{depth} x {width}, {f'base {text}' if text else 'standard'}"
        runs += make_rate_runs("transfer", arm, shape, TRANSFER_RATES, TUNING_SEED)
    return runs


def make_rate_runs(
    part: str, arm: str, shape: Shape, rates: Sequence[float], seed: int
) -> list[Run]:
    """Return a run of TRANSFER_STEPS at each rate."""
    segments = make_plain_segments(TRANSFER_STEPS)
    return [Run(part, arm, shape, segments, rate, seed, BATCH) for rate in rates]


INIT_SHAPES = ((4, 64), (8, 96), (8, 128))  # 0.2M, 0.8M and 1.5M parameters without embedding


def plan_init(results: list[dict[str, Any]]) -> list[Run]:
    """Return a run for each shape, initialization, rate and two seeds, the cheapest first."""
    runs = []
    for depth, width in INIT_SHAPES:
        for seed in SEEDS[:2]:
            for init in ("", *growth_runs.INITS):
                shape = Shape(depth, width, init=init)
                arm = f"{depth} x {width}, {init or 'embedding 0.02, 1/sqrt(2L)'}"
                runs += make_rate_runs("init", arm, shape, RATES, seed)
    return runs


# what the command trains, by name: the results that are there -> all runs that follow from them
PARTS = {
    "rates": plan_rates,
    "upcycle": plan_upcycle,
    "operators": plan_operators,
    "frontier": plan_frontier,
    "arms": plan_arms,
    "pretrained": plan_pretrained,
    "holdout": plan_holdout,
    "transfer": plan_transfer,
    "init": plan_init,
}

# ---- the command


def cut_into_documents(books: list[pathlib.Path], to: pathlib.Path) -> None:
    """Write books as documents of about 4,000 characters, cut between paragraphs.

    A book's last characters, up to so many, are left out. Cut, one book has documents to hold out.
    The text is that of the books alone: what is installed differs from machine to machine, and
    results of two texts cannot be compared.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    with open(to, "w", encoding="utf-8") as file:
        for book in sorted(books, key=lambda book: book.name):
            paragraphs: list[str] = []
            for paragraph in book.read_text(encoding="utf-8").split("\n\n"):
                paragraphs.append(paragraph)
                if sum(map(len, paragraphs)) > 4000:
                    file.write(json.dumps({"text": "\n\n".join(paragraphs)}) + "\n")
                    paragraphs = []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "speed", "tables"])
    parser.add_argument("--text", nargs="+", type=pathlib.Path, help="books to train on")
    parser.add_argument("--to", type=pathlib.Path, required=True)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    results = arguments.to / "results.jsonl"
    documents = arguments.to / "documents.jsonl"
    text = Text((f"books=jsonl:{documents}#text",), str(arguments.to))
    if arguments.parts != ["tables"]:
        if not arguments.text:
            parser.error(f"{' '.join(arguments.parts)}: expected --text with books to train on")
        cut_into_documents(arguments.text, documents)
        text.make()
    for part in arguments.parts:
        if part == "tables":
            found = growth_runs.read_results(results)
            found = select_compared(found)
            full = f"{FULL.n_layers} layers, "
            growth_tables.print_tables(found, full, len(SHORTER) + 1, OPERATORS)
            growth_tables.plot_all(found, full, arguments.to)
            growth_forecast.print_forecast(found, HOLDOUT.n_layers, full)
        elif part == "speed":
            growth_runs.measure_all(list_speed_runs(), text, results)
        else:
            growth_runs.train_all(PARTS[part], text, results, arguments.processes)


if __name__ == "__main__":
    stage.entry_point(main)
