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
Arms = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> result


def print_tables(results: Results, full: str, n_full: int, operators: Iterable[str]) -> None:
    """Print all tables whose results are there.

    Args:
        results: of all parts.
        full: how the names of the full size's arms begin, "4 layers, ".
        n_full: how many arms those are.
        operators: of that part, in the table's order.
    """
    print_rates(results, "upcycle rates")
    print_paired(results, "upcycle", "base, trained on")
    print_operators(results, operators)
    print_rates(results, "frontier")
    print_frontier(results)
    print_rates(results, "arms, rates")
    print_paired(results, "arms", f"{full}1 of the FLOPs")
    losses = {
        arm: mean_of(runs.values(), "loss")
        for arm, runs in group_by_arm(results, "arms").items()
        if "never" in arm
    }
    print_paired(results, "arms", min(losses, key=lambda arm: losses[arm], default=""))
    print_savings(results, full, n_full)
    print_paired(results, "holdout", "8 layers, 1 of the FLOPs")
    print_rates(results, "pretrained, rates")
    print_pretrained(results)
    print_rates(results, "transfer")
    print_rates(results, "init")


def group_by_arm(results: Results, part: str) -> Arms:
    """Return a part's results by arm and seed."""
    arms: Arms = {}
    for result in results:
        if result["part"] == part:
            arms.setdefault(result["arm"], {})[result["seed"]] = result
    return arms


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
    arms = group_by_arm(results, part)
    if control not in arms:
        return
    print(
        f"\n| arm | peak rate | parameters | FLOPs | tokens | loss | less {control} "
        "| p (Holm) | seeds |\n|---|---|---|---|---|---|---|---|---|"
    )
    differences = {}
    for arm, runs in arms.items():
        shared = sorted(set(runs) & set(arms[control]))
        if arm != control and len(shared) > 1:
            differences[arm] = [runs[s]["loss"] - arms[control][s]["loss"] for s in shared]
    tests = {arm: growth_runs.paired_interval(values)[2] for arm, values in differences.items()}
    adjusted = adjust_by_holm(tests, len(arms) - 1)
    for arm, runs in sorted(arms.items(), key=lambda item: mean_of(item[1].values(), "loss")):
        first = next(iter(runs.values()))
        difference = format_mean(differences.get(arm, []), "+.3f")
        p = f"{adjusted[arm]:.2g}" if arm in adjusted else ""
        losses = [run["loss"] for run in runs.values()]
        print(
            f"| {arm} | {first['peak_lr']:g} | {first['n_params'] / 1e3:,.0f} k "
            f"| {first['flops']:.2e} | {first['tokens'] / 1e6:.2f} M "
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


def print_savings(results: Results, full: str, n_full: int) -> None:
    """Print what the full size would have paid for each arm's loss, its base counted and free.

    The price is read from the full size's own losses with parts of the budget, seed by seed, on
    straight lines over the logarithm of the FLOPs; beyond them the last line goes on. A seed counts
    if it has all of these losses. CPU time is that of all steps, by the speed of each shape.
    """
    arms = group_by_arm(results, "arms")
    laws = find_laws(arms, full, n_full)
    speeds = {
        result["arm"]: result["step_cpu_seconds"] for result in results if result["part"] == "speed"
    }
    if not laws:
        return
    print(
        "\n| arm | the full size pays, times the arm's FLOPs | saved, the base counted "
        "| saved, the base free | CPU time saved, the base counted | seeds |\n"
        "|---|---|---|---|---|---|"
    )
    a_full = next(iter(arms[f"{full}1 of the FLOPs"].values()))
    for arm, runs in arms.items():
        if arm.startswith(full):
            continue
        prices, free, seconds = [], [], []
        for seed, run in runs.items():
            if seed in laws:
                price = solve_log_line(laws[seed], run["loss"])
                prices.append(price / run["flops"])
                free.append(1 - (run["flops"] - count_base_flops(run)) / price)
                if speeds:
                    full_seconds = count_cpu_seconds(a_full, speeds) * price / a_full["flops"]
                    seconds.append(1 - count_cpu_seconds(run, speeds) / full_seconds)
        counted = [1 - 1 / price for price in prices]
        has_base = any(segment["operator"] for segment in next(iter(runs.values()))["segments"])
        texts = [
            format_mean(prices, ".2f"),
            format_mean(counted, "+.0%"),
            format_mean(free, "+.0%") if has_base else "",
            format_mean(seconds, "+.0%"),
        ]
        print(f"| {arm} | " + " | ".join(texts) + f" | {len(prices)} |")


def find_laws(arms: Arms, full: str, n_full: int) -> dict[int, list[tuple[float, float]]]:
    """Return seed -> (loss, FLOPs) of the full size with each part of the budget."""
    laws: dict[int, list[tuple[float, float]]] = {}
    for arm, runs in arms.items():
        if arm.startswith(full):
            for seed, run in runs.items():
                laws.setdefault(seed, []).append((run["loss"], run["flops"]))
    return {seed: law for seed, law in laws.items() if len(law) == n_full}


def print_pretrained(results: Results) -> None:
    """Print what a base that exists is worth: less the child's size from scratch, less itself."""
    arms = group_by_arm(results, "pretrained")
    scratch = next((arm for arm in arms if "base" not in arm), "")
    print_paired(results, "pretrained", scratch)
    for base in dict.fromkeys(arm.rpartition(", ")[0] for arm in arms if arm != scratch):
        of_base = [run for run in results if run["arm"].startswith(f"{base}, ")]
        print_paired(of_base, "pretrained", f"{base}, trained on")


def format_mean(values: list[float], form: str) -> str:
    """Return the mean with its 95 % t interval, if there are several, in a number format."""
    if len(values) < 2:
        return "".join(format(value, form) for value in values)
    mean, half, _ = growth_runs.paired_interval(values)
    return f"{format(mean, form)} ± {format(half, form.removeprefix('+'))}"


def solve_log_line(points: list[tuple[float, float]], loss: float) -> float:
    """Return x where straight lines through points of (loss, log x) have a loss."""
    losses, amounts = map(np.array, zip(*sorted(points), strict=True))  # the lowest loss first
    logs = np.log(amounts)
    at = int(np.clip(np.searchsorted(losses, loss), 1, len(losses) - 1))
    slope = (logs[at] - logs[at - 1]) / (losses[at] - losses[at - 1])
    return float(np.exp(logs[at - 1] + slope * (loss - losses[at - 1])))


def count_base_flops(run: dict[str, Any]) -> float:
    """Return the FLOPs of a run before its first growth."""
    return count_flops_at(run, count_steps_before(run))


def count_cpu_seconds(run: dict[str, Any], speeds: dict[str, float]) -> float:
    """Return the CPU seconds of a run's steps, by the speed of each shape."""
    shape, operator, seconds = Shape(**run["shape"]), "", 0.0
    for segment in run["segments"]:
        operator = segment["operator"] or operator
        seconds += segment["n_steps"] * speeds[growth_runs.name_shape(shape, operator)]
    return seconds


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


def mean_of(results: Iterable[dict[str, Any]], key: str) -> float:
    return statistics.mean(result[key] for result in results)


def adjust_by_holm(values: dict[str, float], n_tests: int) -> dict[str, float]:
    """Return p values adjusted for a number of tests (Holm 1979); some may still be to come."""
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (n_tests - rank) * p))
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

    Over the tokens since the growth, means over the seeds, all of which an arm must have: a line
    while neither rate decays, a dot for the end of both decays.
    """
    arms = group_by_arm(results, "arms")
    fulls = arms.pop(f"{full}1 of the FLOPs", {})
    grown = {
        arm: runs
        for arm, runs in arms.items()
        if "shuffled" not in arm and any(run["curve"] for run in runs.values())
    }
    for arm, runs in grown.items():
        paired = [run for seed, run in runs.items() if seed in fulls]
        if paired and len(paired) == len(fulls):
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
    full_decay = sum(segment["n_steps"] for segment in full["segments"] if not segment["decay"])
    steps, losses = zip(*[each for each in full["curve"] if each[0] <= full_decay], strict=True)
    flops = [count_flops_at(full, step) for step in steps]
    own_decay = sum(segment["n_steps"] for segment in run["segments"] if not segment["decay"])
    since, differences = [], []
    for step, loss in run["curve"]:
        at = count_flops_at(run, step)
        if before < step <= own_decay and flops[0] <= at <= flops[-1]:
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
