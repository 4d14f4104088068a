"""What the planner's law of growth forecasts for runs to which it was not fitted.

Fitted: the scaling law, to what never grew of the frontier and of `arms`, without the held-out
depth; then one factor for each strategy, to the arms that grow at 50 %, against the full size of
the same seed. Held out, and stated before these runs were made: bases of other tokens
(`pretrained`), and another size at another budget (`holdout`). The arms that grow later are held
out too, but one seed of them was there before. The rival is what papers report: a share of the
tokens saved.
"""

import statistics
from typing import Any, NamedTuple

import growth_runs
import growth_tables
import numpy as np
from growth_runs import Shape

from jaxpt.model import transformer
from jaxpt.plan import scaling, transfer
from jaxpt.plan.scaling import LossPoint, ScalingLaw

Results = growth_tables.Results
METHODS = ("stack", "deepen", "identity layers", "jump", "depth up-scaling", "widened")
FITTED_SHARE = "at 50 %"
ONE_SEED_HALF = 0.4  # of a factor's interval, of one seed: two standard deviations between five


class Sizes(NamedTuple):
    """Parameters and tokens of a run before and after its growth; no base: 0 of both."""

    base_params: int
    base_tokens: int
    n_params: int
    tokens: int


def measure_sizes(run: dict[str, Any]) -> Sizes:
    """Return the sizes of a result."""
    if not any(segment["operator"] for segment in run["segments"]):
        return Sizes(0, 0, run["n_params"], run["tokens"])
    n_before = growth_tables.count_steps_before(run)
    base_tokens = n_before * run["batch_size"] * growth_runs.SEQ_LEN
    base_params = transformer.count_params(Shape(**run["shape"]).make_spec())
    return Sizes(base_params, base_tokens, run["n_params"], run["tokens"] - base_tokens)


def find_method(arm: str) -> str:
    """Return the strategy of an arm; "" if it does not grow, or is a control."""
    if "shuffled" in arm or "fresh" in arm:
        return ""
    return next((method for method in METHODS if method in arm), "")


def fit_law(results: Results, held_out_layers: int) -> ScalingLaw:
    """Return the scaling law of runs that never grew, at the best of their rates."""
    points = []
    for (width, depth), cells in growth_tables.find_frontier(results).items():
        if depth == held_out_layers:
            continue
        for budget, (loss, rate) in cells.items():
            arm = f"{depth} x {width}, {budget}"
            run = next(r for r in results if r["arm"] == arm and r["peak_lr"] == rate)
            points.append(LossPoint(run["n_params"], run["tokens"], loss))
    for run in results:
        if run["part"] == "arms" and not any(s["operator"] for s in run["segments"]):
            points.append(LossPoint(run["n_params"], run["tokens"], run["loss"]))
    return scaling.solve_scaling_law(points, scaling.SCALING_LAWS["chinchilla"])


class Fitted(NamedTuple):
    """What the growth of a base was worth in the fitted arms, seed by seed."""

    factors: list[float]  # times the tokens to the base's loss from scratch
    saved: list[float]  # of scratch's tokens to the same loss that the child did not need


def fit_methods(results: Results, law: ScalingLaw, full: str) -> dict[str, Fitted]:
    """Return strategy -> what it was worth in the arms that grow at 50 %.

    Tokens from scratch are those of the seed's own full size: what the law misses of its losses,
    with parts of the budget too, is added to the law. So neither the law's error there nor the
    seed's chance is taken for growth's. The base's loss is the law's.
    """
    missed: dict[int, list[tuple[float, float]]] = {}
    for run in results:
        if run["part"] == "arms" and run["arm"].startswith(full):
            expected = law.predict_loss(run["n_params"], run["tokens"])
            missed.setdefault(run["seed"], []).append((run["loss"], run["loss"] - expected))
    found: dict[str, Fitted] = {}
    for run in results:
        method = find_method(run["arm"])
        if run["part"] == "arms" and method and FITTED_SHARE in run["arm"]:
            sizes = measure_sizes(run)
            base_loss = law.predict_loss(sizes.base_params, sizes.base_tokens)
            losses, misses = zip(*sorted(missed[run["seed"]]), strict=True)
            from_scratch, worth = (
                law.compute_tokens_to_loss(
                    sizes.n_params, loss - float(np.interp(loss, losses, misses))
                )
                for loss in (run["loss"], base_loss)
            )
            fitted = found.setdefault(method, Fitted([], []))
            fitted.factors.append((from_scratch - sizes.tokens) / worth)
            fitted.saved.append(1 - sizes.tokens / from_scratch)
    return found


def forecast_losses(law: ScalingLaw, run: dict[str, Any], fitted: Fitted | None) -> list[float]:
    """Return a run's loss by its base's worth and by a share saved; the law's if it never grew."""
    sizes = measure_sizes(run)
    if not sizes.base_tokens or fitted is None:
        return [law.predict_loss(sizes.n_params, sizes.tokens)] * 2
    worth = transfer.compute_worth(law, *sizes[:3])
    factor = statistics.mean(fitted.factors)
    by_worth = transfer.count_effective_tokens(sizes.tokens, worth, factor)
    by_share = sizes.tokens / (1 - statistics.mean(fitted.saved))
    return [law.predict_loss(sizes.n_params, tokens) for tokens in (by_worth, by_share)]


def group_held_out(results: Results) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return group -> arm -> runs: what competes, of runs that nothing was fitted to.

    Beside what comes of a free base competes the child's size from scratch.
    """
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in results:
        part, arm = run["part"], run["arm"]
        is_late = part == "arms" and find_method(arm) and FITTED_SHARE not in arm
        if part in ("pretrained", "holdout") or is_late:
            group = arm.rpartition(", ")[0] if part == "pretrained" else part
            groups.setdefault(group, {}).setdefault(arm, []).append(run)
    from_scratch = groups.pop("", {})
    for name, arms in groups.items():
        if name.startswith("base"):
            arms |= from_scratch
    return groups


def find_full_size(arms: dict[str, list[dict[str, Any]]]) -> str:
    """Return the arm of the largest size that never grew; "": none."""
    sizes = {arm: runs[0]["n_params"] for arm, runs in arms.items() if not find_method(arm)}
    return max(sizes, key=lambda arm: sizes[arm], default="")


def print_forecast(results: Results, held_out_layers: int, full: str) -> None:
    """Print the fitted factors, each held-out arm with its forecasts, and how good they are."""
    if not any(run["part"] == "arms" for run in results):
        return
    law = fit_law(results, held_out_layers)
    fitted = fit_methods(results, law, full)
    print(f"\n{law}\n\n| grown by | factor | share of tokens saved | seeds |\n|---|---|---|---|")
    for method, found in fitted.items():
        texts = [growth_tables.format_mean(each, ".2f") for each in found]
        print(f"| {method} | " + " | ".join(texts) + f" | {len(found.factors)} |")
    groups = group_held_out(results)
    for i, name in enumerate(("the base's worth", "a share saved")):
        n_right, ratios, grown_ratios = 0, [], []
        print(
            f"\n| by {name} | loss | forecast | tokens to it | without the law's miss of the full "
            "size | seeds |\n|---|---|---|---|---|---|"
        )
        for arms in groups.values():
            losses: dict[str, tuple[float, float]] = {}
            missed: dict[str, float] = {}  # tokens to the forecast, in those to the loss
            for arm, runs in arms.items():
                loss = growth_tables.mean_of(runs, "loss")
                forecast = forecast_losses(law, runs[0], fitted.get(find_method(arm)))[i]
                losses[arm] = loss, forecast
                n_params = runs[0]["n_params"]
                missed[arm] = law.compute_tokens_to_loss(n_params, forecast)
                missed[arm] /= law.compute_tokens_to_loss(n_params, loss)
            by_law = missed.get(find_full_size(arms), 1.0)
            for arm, ratio in missed.items():
                is_grown = bool(find_method(arm))
                beside = ratio / by_law if is_grown else 1.0
                ratios.append(max(ratio, 1 / ratio))
                if is_grown:
                    grown_ratios.append(max(beside, 1 / beside))
                loss, forecast = losses[arm]
                print(
                    f"| {arm} | {loss:.3f} | {forecast:.3f} | x {ratio:.2f} "
                    f"| {f'x {beside:.2f}' if is_grown else ''} | {len(arms[arm])} |"
                )
            best, forecast_best = (min(losses, key=lambda arm: losses[arm][j]) for j in range(2))
            n_right += len(losses) > 1 and best == forecast_best
        if grown_ratios:
            n_groups = sum(len(arms) > 1 for arms in groups.values())  # where anything competes
            print(
                f"\nThe lowest loss right in {n_right} of {n_groups} groups; tokens within "
                f"{max(ratios):.2f} x, the middle one {statistics.median(ratios):.2f} x; of what "
                f"grew, without the law's miss of the full size, within {max(grown_ratios):.2f} x, "
                f"the middle one {statistics.median(grown_ratios):.2f} x."
            )


def find_transfer_ends(
    results: Results, held_out_layers: int, full: str
) -> dict[str, tuple[float, float]]:
    """Return strategy of the planner -> the ends of its factor, as transfer.py has them."""
    fitted = fit_methods(results, fit_law(results, held_out_layers), full)
    ends = {}
    for name, known in transfer.TRANSFERS.items():
        factors = fitted[find_method(known.arm)].factors
        mean, half = factors[0], ONE_SEED_HALF
        if len(factors) > 1:
            mean, half, _ = growth_runs.paired_interval(factors)
        ends[name] = max(mean - half, 0.0), mean + half
    return ends
