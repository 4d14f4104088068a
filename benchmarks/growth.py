"""What growing a model is worth, with its controls: which way to a lower loss costs least.

    python benchmarks/growth.py rates upcycle operators --text 'gutenberg/*.txt' --to runs/growth
    python benchmarks/growth.py tables --to runs/growth

`rates`     each arm of `upcycle` at several peak rates, on a seed that is not used again
`upcycle`   a dense model trained on, made a mixture of experts, or a mixture from scratch, all with
            the same FLOPs in all, the base's included
`operators` every operator on one trained base, then the same steps from a fresh optimizer
`tables`    what the results say, with 95 % intervals of paired differences

Every arm has a decay of its own to 0 and is measured after it. FLOPs are of the active parameters
and of attention, forward and backward. A seed is that of the initialization and of the data's order,
so arms are compared seed by seed. What has a result is not trained again: give the same command to
go on after a kill.
"""

import argparse
import glob
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Iterable
from typing import Any

import scipy.stats

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import growth_runs
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
    "upcycle(granularity=2, expansion=4, top_k=2)": "upcycle(granularity=2, expansion=4, top_k=2)",
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
    n_steps = count_steps(shape, "", budget, batch_size)
    n_decay = round(DECAY_FRAC * n_steps)
    segments = (Segment(n_steps - n_decay), Segment(n_decay, decay=True))
    return Run(part, arm, shape, segments, rate, seed, batch_size)


def count_steps(shape: Shape, operator: str, budget: float, batch_size: int) -> int:
    """Return the steps that a budget of FLOPs pays for, of a shape after an operator."""
    spec = shape.make_spec()
    if operator:
        spec = growth_runs.plan_growth(operator, growth_runs.Parent(spec)).child
    return round(budget / growth_runs.flops_per_step(spec, batch_size))


def plan_rates() -> list[Run]:
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


def plan_operators() -> list[Run]:
    """Return a run for each operator, after 1,000 steps of the base."""
    runs = []
    for operator in OPERATORS:
        segments = (Segment(1000), Segment(200, operator, restart=True))
        arm = operator or "(the base, trained on)"
        runs.append(Run("operators", arm, OPERATORS_BASE, segments, 3e-3, 0, 8))
    return runs


# ---- tables


def print_rates(results: list[dict[str, Any]], part: str) -> None:
    """Print the loss of each arm at each rate."""
    found = [result for result in results if result["part"] == part]
    if not found:
        return
    rates = sorted({result["peak_lr"] for result in found})
    arms = dict.fromkeys(result["arm"] for result in found)
    print(f"\n| {part} | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    print("|---|" + "---|" * len(rates))
    for arm in sorted(arms):
        losses = {r["peak_lr"]: r["loss"] for r in found if r["arm"] == arm}
        cells = [f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates]
        print(f"| {arm} | " + " | ".join(cells) + " |")


def print_paired(results: list[dict[str, Any]], part: str, control: str) -> None:
    """Print each arm's loss, and its difference to a control seed by seed."""
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        if result["part"] == part:
            arms.setdefault(result["arm"], {})[result["seed"]] = result
    if control not in arms:
        return
    print(
        f"\n| arm | rate | parameters | FLOPs | tokens | CPU seconds | loss | less {control} "
        "| p (Holm) | seeds |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    tests = {}
    for arm, runs in arms.items():
        shared = sorted(set(runs) & set(arms[control]))
        if arm != control and len(shared) > 1:
            differences = [runs[s]["loss"] - arms[control][s]["loss"] for s in shared]
            tests[arm] = paired_interval(differences)
    adjusted = adjust_by_holm({arm: p for arm, (_, _, p) in tests.items()})
    for arm, runs in sorted(arms.items(), key=lambda item: mean_of(item[1].values(), "loss")):
        first = next(iter(runs.values()))
        difference, p = "", ""
        if arm in tests:
            mean, half, _ = tests[arm]
            difference, p = f"{mean:+.3f} ± {half:.3f}", f"{adjusted[arm]:.2g}"
        losses = [run["loss"] for run in runs.values()]
        print(
            f"| {arm} | {first['peak_lr']:g} | {first['n_params'] / 1e3:,.0f} k "
            f"| {first['flops']:.2e} | {first['tokens'] / 1e6:.2f} M "
            f"| {mean_of(runs.values(), 'cpu_seconds'):.0f} "
            f"| {statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) "
            f"| {difference} | {p} | {len(runs)} |"
        )


def print_operators(results: list[dict[str, Any]]) -> None:
    """Print what each operator does to the loss at once, and after the same steps."""
    found = [result for result in results if result["part"] == "operators"]
    if not found:
        return
    print("\n| operator | layers | parameters | at once | after 200 steps |\n|---|---|---|---|---|")
    for arm in (operator or "(the base, trained on)" for operator in OPERATORS):
        for result in found:
            if result["arm"] == arm:
                (_, initial_loss), *_ = result["curve"]
                print(
                    f"| `{arm}` | {result['layers']} | {result['n_params'] / 1e3:,.0f} k "
                    f"| {initial_loss:.3f} | {result['loss']:.3f} |"
                )


def mean_of(results: Iterable[dict[str, Any]], key: str) -> float:
    return statistics.mean(result[key] for result in results)


def paired_interval(differences: list[float]) -> tuple[float, float, float]:
    """Return (mean, half of its 95 % t interval, p of a mean of 0)."""
    n = len(differences)
    error = statistics.stdev(differences) / n**0.5
    half = float(scipy.stats.t.ppf(0.975, n - 1)) * error
    p = float(scipy.stats.ttest_1samp(differences, 0).pvalue)
    return statistics.mean(differences), half, p


def adjust_by_holm(values: dict[str, float]) -> dict[str, float]:
    """Return p values adjusted for as many tests (Holm 1979)."""
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(values) - rank) * p))
        adjusted[name] = highest
    return adjusted


# ---- the command


def cut_into_documents(pattern: str, out: pathlib.Path) -> pathlib.Path:
    """Write whole books as documents of about 4,000 characters, cut between paragraphs.

    A few books leave none to hold out.
    """
    out.mkdir(parents=True, exist_ok=True)
    file_path = out / "documents.jsonl"
    if file_path.exists():
        return file_path
    with open(file_path, "w", encoding="utf-8") as file:
        for book in sorted(glob.glob(pattern)):
            piece: list[str] = []
            for paragraph in pathlib.Path(book).read_text(encoding="utf-8").split("\n\n"):
                piece.append(paragraph)
                if sum(map(len, piece)) > 4000:
                    file.write(json.dumps({"text": "\n\n".join(piece)}) + "\n")
                    piece = []
    return file_path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=["rates", "upcycle", "operators", "tables"])
    parser.add_argument("--text", help="text files as a glob, beside Python's own prose")
    parser.add_argument("--to", type=pathlib.Path, required=True)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    sources = ["python:prose"]
    if arguments.text:
        documents = cut_into_documents(arguments.text, arguments.to)
        sources.append(f"books=jsonl:{documents}#text")
    text = Text(tuple(sources), str(arguments.to))
    results = arguments.to / "results"
    if arguments.parts != ["tables"]:
        text.make()
    for part in arguments.parts:
        found = growth_runs.read_results(results)
        if part == "rates":
            growth_runs.train_all(plan_rates(), text, results, arguments.processes)
        elif part == "upcycle":
            growth_runs.train_all(plan_upcycle(found), text, results, arguments.processes)
        elif part == "operators":
            growth_runs.train_all(plan_operators(), text, results, arguments.processes)
        else:
            print_rates(found, "upcycle rates")
            print_paired(found, "upcycle", "base, trained on")
            print_operators(found)


if __name__ == "__main__":
    stage.entry_point(main)
