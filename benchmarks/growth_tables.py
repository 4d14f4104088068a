"""Tables (Markdown) and plots of the growth experiment's results."""

import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

import growth_runs
import matplotlib.pyplot as plt
import numpy as np
from growth_runs import Shape

Results = list[dict[str, Any]]


def print_tables(results: Results, full: str, operators: Iterable[str]) -> None:
    """Print all tables whose results are there.

    Args:
        results: of all parts.
        full: how the names of the full size's arms begin, "4 layers, ".
        operators: of that part, in the table's order.
    """
    print_rates(results, "upcycle rates")
    print_paired(results, "upcycle", "base, trained on")
    print_operators(results, operators)
    print_rates(results, "frontier")
    print_frontier(results)
    print_rates(results, "arm rates")
    print_paired(results, "arms", f"{full}1 of the FLOPs")
    small = {run["arm"] for run in results if run["part"] == "arms" and "never" in run["arm"]}
    print_paired(results, "arms", min(small, key=lambda arm: mean_of_arm(results, arm), default=""))
    print_savings(results, full)
    print_paired(results, "holdout", "8 layers, 1 of the FLOPs")
    print_pretrained(results, full)
    print_rates(results, "transfer")
    print_rates(results, "init")


def print_rates(results: Results, part: str) -> None:
    """Print the loss of each arm at each rate, the mean of its seeds; the best one is bold."""
    found = [result for result in results if result["part"] == part]
    if not found:
        return
    rates = sorted({result["peak_lr"] for result in found})
    arms = dict.fromkeys(result["arm"] for result in found)
    print(f"\n| {part} | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    print("|---|" + "---|" * len(rates))
    for arm in sorted(arms):
        losses: dict[float, float] = {}
        for rate in rates:
            seeds = [r["loss"] for r in found if r["arm"] == arm and r["peak_lr"] == rate]
            if seeds:
                losses[rate] = statistics.mean(seeds)
        cells = [f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates]
        best = rates.index(min(losses, key=lambda rate: losses[rate]))
        cells[best] = f"**{cells[best]}**"
        print(f"| {arm} | " + " | ".join(cells) + " |")


def print_paired(results: Results, part: str, control: str) -> None:
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
    differences = {}
    for arm, runs in arms.items():
        shared = sorted(set(runs) & set(arms[control]))
        if arm != control and len(shared) > 1:
            differences[arm] = [runs[s]["loss"] - arms[control][s]["loss"] for s in shared]
    tests = {arm: growth_runs.paired_interval(values)[2] for arm, values in differences.items()}
    adjusted = adjust_by_holm(tests)
    for arm, runs in sorted(arms.items(), key=lambda item: mean_of(item[1].values(), "loss")):
        first = next(iter(runs.values()))
        difference = format_difference(differences.get(arm, []))
        p = f"{adjusted[arm]:.2g}" if arm in adjusted else ""
        losses = [run["loss"] for run in runs.values()]
        print(
            f"| {arm} | {first['peak_lr']:g} | {first['n_params'] / 1e3:,.0f} k "
            f"| {first['flops']:.2e} | {first['tokens'] / 1e6:.2f} M "
            f"| {mean_of(runs.values(), 'cpu_seconds'):.0f} "
            f"| {statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) "
            f"| {difference} | {p} | {len(runs)} |"
        )


def find_frontier(results: Results) -> dict[tuple[int, int], dict[str, tuple[float, float]]]:
    """Return (width, layers) -> budget -> the lowest loss and its rate."""
    best: dict[tuple[int, int], dict[str, tuple[float, float]]] = {}
    for result in results:
        if result["part"] == "frontier":
            shape = result["shape"]["d_model"], result["shape"]["n_layers"]
            budget = result["arm"].partition(", ")[2]
            found = result["loss"], result["peak_lr"]
            cells = best.setdefault(shape, {})
            cells[budget] = min(cells.get(budget, found), found)
    return best


def print_frontier(results: Results) -> None:
    """Print each shape's lowest loss at each budget, at the best of its rates.

    The lowest loss of a budget is bold. A rate at the edge of those that were tried has a star.
    """
    best = find_frontier(results)
    rates: dict[tuple[int, int], set[float]] = {}
    for result in results:
        if result["part"] == "frontier":
            shape = result["shape"]["d_model"], result["shape"]["n_layers"]
            rates.setdefault(shape, set()).add(result["peak_lr"])
    budgets = list(dict.fromkeys(budget for cells in best.values() for budget in cells))
    if not budgets:
        return
    lowest = {
        budget: min(cells[budget] for cells in best.values() if budget in cells)
        for budget in budgets
    }
    print("\n| layers x width | without embedding | " + " | ".join(budgets) + " |")
    print("|---|---|" + "---|" * len(budgets))
    for (width, depth), cells in sorted(best.items()):
        n_params = growth_runs.count_without_embedding(Shape(depth, width).make_spec())
        texts = []
        for budget in budgets:
            text = ""
            if budget in cells:
                loss, rate = cells[budget]
                tried = rates[width, depth]
                star = "*" if rate in (min(tried), max(tried)) else ""
                bold = "**" if cells[budget] == lowest[budget] else ""
                text = f"{bold}{loss:.3f}{bold} ({rate:g}{star})"
            texts.append(text)
        print(f"| {depth} x {width} | {n_params / 1e3:,.0f} k | " + " | ".join(texts) + " |")


def print_savings(results: Results, full: str) -> None:
    """Print what the full size would have paid for each arm's loss, its base counted and free.

    The price is read from the full size's own losses with parts of the budget, seed by seed, on
    straight lines over the logarithm of the FLOPs; beyond them the last line goes on.
    """
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    laws: dict[int, list[tuple[float, float]]] = {}
    for result in results:
        if result["part"] == "arms":
            arms.setdefault(result["arm"], {})[result["seed"]] = result
            if result["arm"].startswith(full):
                laws.setdefault(result["seed"], []).append((result["loss"], result["flops"]))
    if not laws:
        return
    print(
        "\n| arm | the full size pays, times the arm's FLOPs | saved, the base counted "
        "| saved, the base free | seeds |\n|---|---|---|---|---|"
    )
    for arm, runs in arms.items():
        if arm.startswith(full):
            continue
        prices, free = [], []
        for seed, run in runs.items():
            if len(laws.get(seed, ())) > 1:
                price = find_price(laws[seed], run["loss"])
                prices.append(price / run["flops"])
                free.append(1 - (run["flops"] - count_base_flops(run)) / price)
        counted = [1 - 1 / price for price in prices]
        has_base = any(segment["operator"] for segment in next(iter(runs.values()))["segments"])
        texts = [
            format_interval(prices),
            format_mean(counted),
            format_mean(free) if has_base else "",
        ]
        print(f"| {arm} | " + " | ".join(texts) + f" | {len(prices)} |")


def print_pretrained(results: Results, full: str) -> None:
    """Print what a base that exists is worth: trained on, grown, and the full size without it."""
    bases: dict[str, dict[str, dict[int, float]]] = {}
    fresh: dict[int, float] = {}
    for run in results:
        if run["part"] == "pretrained":
            base, _, name = run["arm"].rpartition(", ")
            bases.setdefault(base, {}).setdefault(name, {})[run["seed"]] = run["loss"]
        elif run["part"] == "arms" and run["arm"] == f"{full}0.5 of the FLOPs":
            fresh[run["seed"]] = run["loss"]
    if not bases:
        return
    names = list(next(iter(bases.values())))
    heads = [*names, "from scratch", *(f"{name} less {names[0]}" for name in names[1:])]
    print("\n| | " + " | ".join(heads) + " | seeds |\n|---|" + "---|" * (len(heads) + 1))
    for base, arms in bases.items():
        cells = [f"{statistics.mean(losses.values()):.3f}" for losses in arms.values()]
        cells.append(f"{statistics.mean(fresh.values()):.3f}" if fresh else "")
        control = arms[names[0]]
        for name in names[1:]:
            both = sorted(set(control) & set(arms.get(name, ())))
            differences = [arms[name][seed] - control[seed] for seed in both]
            cells.append(format_difference(differences))
        print(f"| {base} | " + " | ".join(cells) + f" | {len(control)} |")


def format_difference(values: list[float]) -> str:
    """Return the mean in nats with its 95 % t interval, if there are several."""
    if len(values) < 2:
        return "".join(f"{value:+.3f}" for value in values)
    mean, half, _ = growth_runs.paired_interval(values)
    return f"{mean:+.3f} ± {half:.3f}"


def find_price(law: list[tuple[float, float]], loss: float) -> float:
    """Return the FLOPs at which a law of (loss, FLOPs) points has a loss."""
    losses, flops = map(np.array, zip(*sorted(law), strict=True))  # the lowest loss first
    logs = np.log(flops)
    at = int(np.clip(np.searchsorted(losses, loss), 1, len(losses) - 1))
    slope = (logs[at] - logs[at - 1]) / (losses[at] - losses[at - 1])
    return float(np.exp(logs[at - 1] + slope * (loss - losses[at - 1])))


def count_base_flops(run: dict[str, Any]) -> float:
    """Return the FLOPs of a run before its first growth."""
    return count_flops_at(run, count_steps_before(run))


def format_interval(values: list[float]) -> str:
    """Return the mean with its 95 % t interval, if there are several."""
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    mean, half, _ = growth_runs.paired_interval(values)
    return f"{mean:.2f} ± {half:.2f}"


def format_mean(values: list[float]) -> str:
    """Return the mean with its 95 % t interval, if there are several."""
    if len(values) < 2:
        return "".join(f"{value:+.0%}" for value in values)
    mean, half, _ = growth_runs.paired_interval(values)
    return f"{mean:+.0%} ± {half:.0%}"


def print_operators(results: Results, operators: Iterable[str]) -> None:
    """Print what each operator does to the loss at once, and after the same steps."""
    found = [result for result in results if result["part"] == "operators"]
    if not found:
        return
    print("\n| operator | layers | parameters | at once | after 200 steps |\n|---|---|---|---|---|")
    for arm in (operator or "(the base, trained on)" for operator in operators):
        for result in found:
            if result["arm"] == arm:
                (_, initial_loss), *_ = result["curve"]
                print(
                    f"| `{arm}` | {result['layers']} | {result['n_params'] / 1e3:,.0f} k "
                    f"| {initial_loss:.3f} | {result['loss']:.3f} |"
                )


def mean_of_arm(results: Results, arm: str) -> float:
    return mean_of([run for run in results if run["arm"] == arm], "loss")


def mean_of(results: Iterable[dict[str, Any]], key: str) -> float:
    return statistics.mean(result[key] for result in results)


def adjust_by_holm(values: dict[str, float]) -> dict[str, float]:
    """Return p values adjusted for as many tests (Holm 1979)."""
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(values) - rank) * p))
        adjusted[name] = highest
    return adjusted


# ---- plots


def plot_all(results: Results, full: str, to: pathlib.Path) -> None:
    """Write growth_frontier.svg and growth_trajectory.svg, if their results are there."""
    plt.rcParams.update({"svg.hashsalt": "jaxpt", "font.size": 9, "axes.grid": True})
    to.mkdir(parents=True, exist_ok=True)
    for name, plot in (("frontier", plot_frontier), ("trajectory", plot_trajectory)):
        figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
        if plot(results, full, ax):
            figure.savefig(to / f"growth_{name}.svg", metadata={"Date": None})
        plt.close(figure)


def plot_frontier(results: Results, full: str, ax: Any) -> bool:
    """Draw the lowest loss of each shape over its FLOPs; return whether there is any."""
    best = find_frontier(results)
    budgets = set()
    for (width, depth), cells in sorted(best.items()):
        points = {float(budget.split()[0]): loss for budget, (loss, _) in cells.items()}
        label = f"{depth} layer{'s' * (depth > 1)} x {width}"
        ax.plot(*zip(*sorted(points.items()), strict=True), "o-", label=label)
        budgets |= points.keys()
    ax.set(xscale="log", xlabel="FLOPs of the run", ylabel="held-out loss, nats per token")
    ax.set_xticks(sorted(budgets), [f"{budget:g}" for budget in sorted(budgets)])
    ax.set_xticks([], minor=True)
    ax.legend()
    return bool(best)


def plot_trajectory(results: Results, full: str, ax: Any) -> bool:
    """Draw how far grown arms are from the full size after as many FLOPs; return whether any.

    Over the tokens since the growth, means over seeds: a line while neither rate decays, a dot for
    the end of both decays.
    """
    fulls: dict[int, dict[str, Any]] = {}
    grown: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if result["part"] == "arms" and result["arm"] == f"{full}1 of the FLOPs":
            fulls[result["seed"]] = result
        elif result["part"] == "arms" and result["curve"] and "shuffled" not in result["arm"]:
            grown.setdefault(result["arm"], []).append(result)
    for arm, runs in grown.items():
        paired = [run for run in runs if run["seed"] in fulls]
        if paired:
            steps, differences = zip(
                *[compare_curves(run, fulls[run["seed"]]) for run in paired], strict=True
            )
            tokens = [
                step * paired[0]["batch_size"] * growth_runs.SEQ_LEN / 1e6 for step in steps[0]
            ]
            means = np.mean(differences, axis=0)
            (line,) = ax.plot(tokens[:-1], means[:-1], "-", label=arm, linewidth=1)
            ax.plot(tokens[-1:], means[-1:], "o", color=line.get_color(), markersize=4)
    ax.axhline(0, color="black", linewidth=1)
    ax.set(xlabel="tokens since the growth, millions", ylabel="nats above the full size")
    ax.legend(fontsize=6)
    return bool(fulls and grown)


def compare_curves(run: dict[str, Any], full: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Return steps since the growth, and nats above the full size after as many FLOPs.

    Of the phases where neither rate decays, and last of the end.
    """
    before = count_steps_before(run)
    steps, losses = zip(*full["curve"], strict=True)
    flops = [count_flops_at(full, step) for step in steps]
    full_decay = count_flops_at(full, sum(s["n_steps"] for s in full["segments"] if not s["decay"]))
    own_decay = sum(segment["n_steps"] for segment in run["segments"] if not segment["decay"])
    since, differences = [], []
    for step, loss in run["curve"]:
        at = count_flops_at(run, step)
        if before < step <= own_decay and flops[0] <= at <= full_decay:
            since.append(step - before)
            differences.append(loss - float(np.interp(at, flops, losses)))
    n_steps = sum(segment["n_steps"] for segment in run["segments"])
    return [*since, n_steps - before], [*differences, run["loss"] - full["loss"]]


def count_steps_before(run: dict[str, Any]) -> int:
    """Return the steps of a run before its first growth."""
    steps = 0
    for segment in run["segments"]:
        if segment["operator"]:
            break
        steps += segment["n_steps"]
    return steps


def count_flops_at(run: dict[str, Any], step: int) -> float:
    """Return the FLOPs of a run's first steps."""
    spec = Shape(**run["shape"]).make_spec()
    total, left = 0.0, step
    for segment in run["segments"]:
        if segment["operator"]:
            spec = growth_runs.plan_growth(segment["operator"], growth_runs.Parent(spec)).child
        n = min(segment["n_steps"], left)
        total += n * growth_runs.flops_per_step(spec, run["batch_size"])
        left -= n
    return total
