"""Grow or scratch: the ways to a model of a size, or to a loss, held against each other by FLOPs, hours, money and expected loss.

What is published of growing is a range of tokens saved to the same loss. How far a case lies outside of what was published is said,
and how the range shrinks there is this planner's assumption. One's own runs (`--fit`) replace both law and range.
"""

from __future__ import annotations

import json
import logging
import math
import pathlib
import textwrap
from typing import Any, NamedTuple

import numpy as np

from jaxpt import config, stage
from jaxpt.config import Config
from jaxpt.plan import cost, flops, scaling
from jaxpt.plan.scaling import LossPoint, ScalingFit, ScalingLaw
from jaxpt.spec import ModelSpec, UserError
from jaxpt.train.metrics import read_metrics

log = logging.getLogger(__name__)


class PublishedSavings(NamedTuple):
    """What is known of one way to grow."""

    name: str
    operators: tuple[str, ...]  # of weights/growth.py
    saved_frac: tuple[
        float, float
    ]  # share of the tokens that the same size needs from scratch to the same loss, the base apart
    source: str


DEPTH_UPSCALING = PublishedSavings(
    "depth up-scaling", ("depth_upscale", "stack_middle", "insert_identity", "predict_layers"), (0.0, 0.546),
    "SOLAR, 2312.15166, has no comparison with scratch; at best what stacking saved",
)  # fmt: skip
STACKING = PublishedSavings(
    "stacking",
    ("stack", "interleave"),
    (0.22, 0.546),
    "G_stack, 2405.15319: 54.6 % at 7B; LiGO, 2303.00980: 22 to 55 % by a learned map",
)
WIDTH_GROWTH = PublishedSavings(
    "width growth",
    ("widen", "widen_rms"),
    (0.35, 0.75),
    "HyperCloning, 2409.12903: 2.2 to 4 times fewer steps; 2602.02472: up to 35 %",
)
GROWTH_STRATEGIES = (DEPTH_UPSCALING, STACKING, WIDTH_GROWTH)
LATE_DEEPENING = PublishedSavings(
    "late jump from one layer",
    ("deepen",),
    (0.0, 0.8),
    "2511.04981: about 80 % of the compute at 124M and 7B, one jump at 80 % of the steps",
)
PRUNING = PublishedSavings(
    "pruning a larger one",
    ("drop_layers", "narrow"),
    (0.0, 0.975),
    "Minitron, 2407.14679: up to 40 times fewer tokens, distilled",
)

# The limits that are published (2605.13405, 2510.06548): a factor of 2 is reliable, G_stack went to 4; gains are best below 20 tokens
# a parameter; a base trained for longer than that saturates, with the log of its tokens.
RELIABLE_GROWTH_FACTOR, MAX_GROWTH_FACTOR, SATURATION_TOKENS_PER_PARAM = 2.0, 4.0, 20.0
MAX_SAVED_FRAC = 0.99  # a grown run below what its size reaches from scratch, by a fitted law, would save everything


class BaseModel(NamedTuple):
    """What exists."""

    spec: ModelSpec
    tokens: float  # that it was trained for
    usd: float | None  # what it cost; 0 is free, None is reckoned from its tokens

    @property
    def n_params(self) -> int:
        return flops.count_matmul_params(self.spec)


def compare_strategies(
    child: ModelSpec,
    seq_len: int,
    token_budget: float,
    *,
    base: BaseModel | None = None,
    target_loss: float | None = None,
    law: ScalingLaw = scaling.SCALING_LAWS["chinchilla"],
    scaling_fit: ScalingFit | None = None,
    measured_savings: dict[str, tuple[float, float]] | None = None,
    target_plan: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Every way to the child's size, and continuing the base: {"target_loss", "ways": [...], "notes", "verdict"}, plain numbers.

    budget       tokens that one may spend; without target_loss the target is what scratch reaches with them
    base         None: there is nothing to grow
    fitted       takes the place of the law
    gains        {way: (low, high) share of tokens saved} that one's own runs showed, in place of the published
    record       a target of the plan (cost.record), for hours and money

    A way: name, tokens and flops [few, many] to the target loss (None: never), loss [low, high] with the whole budget, saved and
    saved_with_base [least, most] share of scratch's FLOPs, hours and usd and usd_with_base where a record is given, and notes.
    """
    law = scaling_fit.law if scaling_fit else law
    n = flops.count_matmul_params(child)
    goal = law.predict_loss(n, token_budget) if target_loss is None else target_loss
    per_token = flops.count_flops_per_token(child, seq_len)
    from_scratch = law.compute_tokens_to_loss(n, goal)
    base_flops = flops.count_flops_per_token(base.spec, seq_len) * base.tokens if base else 0.0
    scratch_flops = per_token * from_scratch
    spent = base.usd if base else 0.0

    def way(
        name: str,
        saved: tuple[float, float],
        each_token: float,
        source: str,
        *,
        needs_base: bool,
        notes=(),
    ):
        """A way that saves a share of scratch's tokens, most first."""
        left = [1 - share for share in sorted(saved, reverse=True)]
        tokens = [from_scratch * x for x in left]
        return finished(
            name,
            tokens,
            [each_token * t for t in tokens],
            source,
            needs_base,
            [law.predict_loss(n, token_budget / x) for x in left],
            notes,
        )

    def finished(name, tokens, work, source, needs_base, loss, notes):
        with_base = [w + base_flops * needs_base for w in work]
        answer = {
            "name": name,
            "tokens": replace_infinite(tokens),
            "flops": replace_infinite(work),
            "flops_with_base": replace_infinite(with_base),
            "saved": replace_infinite([1 - w / scratch_flops for w in reversed(work)])
            if math.isfinite(scratch_flops)
            else None,
            "saved_with_base": replace_infinite(
                [1 - w / scratch_flops for w in reversed(with_base)]
            )
            if math.isfinite(scratch_flops)
            else None,
            "loss": replace_infinite(loss),
            "source": source,
            "notes": list(notes),
        }
        if target_plan:
            speed = (
                target_plan["tokens_per_second"] * target_plan["flops_per_token"]
            )  # of the model's own FLOPs
            usd = target_plan["usd_per_hour"]
            price = None if usd is None else target_plan["devices"] * usd / 3600 / speed
            dearer = (
                None
                if price is None
                else (base_flops * price if spent is None else spent) * needs_base
            )
            answer |= {
                "hours": replace_infinite([w / speed / 3600 for w in work]),
                "usd": None if price is None else replace_infinite([w * price for w in work]),
                "usd_with_base": None
                if price is None
                else replace_infinite([w * price + dearer for w in work]),
            }
        return answer

    ways = [way("scratch", (0.0, 0.0), per_token, law.source, needs_base=False)]
    # all of scratch's tokens, most of them by a model of one layer: within 0.5 % of scratch's loss
    work = [
        scratch_flops * (1 - share)
        for share in reversed(
            (measured_savings or {}).get(LATE_DEEPENING.name, LATE_DEEPENING.saved_frac)
        )
    ]
    ways.append(
        finished(
            LATE_DEEPENING.name,
            [from_scratch] * 2,
            work,
            LATE_DEEPENING.source,
            False,
            [law.predict_loss(n, token_budget), 1.005 * law.predict_loss(n, token_budget)],
            [],
        )
    )
    if base and base.n_params < n:
        for known in GROWTH_STRATEGIES:
            measured = (measured_savings or {}).get(known.name)
            saved, notes = (
                (measured, []) if measured else limit_savings(known, n, token_budget, base)
            )
            ways.append(
                way(
                    known.name,
                    saved,
                    per_token,
                    "the runs of --fit" if measured else known.source,
                    needs_base=True,
                    notes=notes,
                )
            )
    if base and base.n_params > n:
        distilling = per_token + flops.count_forward_flops_per_token(
            base.spec, seq_len
        )  # the larger one answers every token
        ways.append(
            way(
                PRUNING.name,
                (measured_savings or {}).get(PRUNING.name, PRUNING.saved_frac),
                distilling,
                PRUNING.source,
                needs_base=True,
            )
        )
    if base:
        more = law.compute_tokens_to_loss(base.n_params, goal) - base.tokens
        ways.append(
            finished(
                "continuing the base", [max(more, 0.0)] * 2, [max(more, 0.0) * flops.count_flops_per_token(base.spec, seq_len)] * 2, law.source, True,
                [law.predict_loss(base.n_params, base.tokens + token_budget)] * 2, [] if math.isfinite(more) else ["its size alone keeps it above that loss"],
            )
        )  # fmt: skip
    return {
        "n_params": n,
        "budget": token_budget,
        "target_loss": goal,
        "target_given": target_loss is not None,
        "law": law._asdict(),
        "base": None
        if base is None
        else {
            "n_params": base.n_params,
            "tokens": base.tokens,
            "usd": base.usd,
            "tokens_per_param": base.tokens / base.n_params,
        },
        "ways": ways,
        "stack_at": compute_stack_tokens(n, per_token * token_budget),
        "notes": describe_comparison_basis(
            n, token_budget, base, law, scaling_fit, measured_savings
        ),
        "verdict": format_verdict(ways),
    }


def limit_savings(
    known: PublishedSavings, n: int, budget: float, base: BaseModel
) -> tuple[tuple[float, float], list[str]]:
    """(least, most) share of tokens saved in this case, and why it is less than what is published."""
    low, high = known.saved_frac
    notes = []
    factor, per_param, theirs = n / base.n_params, budget / n, base.tokens / base.n_params
    if factor > RELIABLE_GROWTH_FACTOR * 1.05:  # layers come in whole numbers
        low = 0.0
        notes.append(
            f"{factor:.2g} times the base: beyond 2, which is reliable (2605.13405), it may save nothing"
        )
    if factor > MAX_GROWTH_FACTOR * 1.05:
        high = 0.0
        notes.append("and beyond 4 nothing is published: counted as scratch")
    if per_param > SATURATION_TOKENS_PER_PARAM:
        low, high = (share * SATURATION_TOKENS_PER_PARAM / per_param for share in (low, high))
        notes.append(
            f"{per_param:.3g} tokens a parameter: gains shrink beyond 20 (2605.13405); here in proportion, an assumption"
        )
    if theirs > SATURATION_TOKENS_PER_PARAM:
        low, high = 0.0, high / (1 + math.log10(theirs / SATURATION_TOKENS_PER_PARAM))
        notes.append(
            f"a base of {theirs:.3g} tokens a parameter saturates (2510.06548); here with the log, an assumption"
        )
    return (low, high), notes


def compute_stack_tokens(n_params: float, budget_flops: float) -> float:
    """Tokens after which to stack on the way to n_params, by G_stack's fit. 2405.15319: log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74."""
    return 10 ** (0.88 * math.log10(n_params) + 163.27 / math.log10(budget_flops) - 5.74)


def format_verdict(ways: list[dict[str, Any]]) -> str:
    """One sentence: which way needs the fewest FLOPs to the target, cautiously and hopefully, with the base for nothing and paid for."""

    def best(key: str, end: int) -> str:
        reaching = [each for each in ways if each[key][end] is not None]
        return min(reaching, key=lambda each: each[key][end])["name"] if reaching else "none"

    free, paid = ([best(key, end) for end in (1, 0)] for key in ("flops", "flops_with_base"))
    told = lambda pair: (
        pair[0]
        if pair[0] == pair[1]
        else f"{pair[0]} if little of what is published holds here, {pair[1]} if all of it does"
    )
    return f"Fewest FLOPs with the base for nothing: {told(free)}. With the base paid for: {told(paid)}."


def describe_comparison_basis(
    n: int,
    budget: float,
    base: BaseModel | None,
    law: ScalingLaw,
    fitted: ScalingFit | None,
    gains: dict | None,
) -> list[str]:
    notes = []
    if fitted:
        notes += scaling.describe_scaling_fit(fitted)
        low, middle, high = fitted.predict_loss_interval(n, budget)
        notes.append(
            f"Scratch with the whole budget: {middle:.3f} nats a token (90 % {low:.3f} to {high:.3f})."
        )
    else:
        notes.append(
            "The law is published for other text and another tokenizer: differences of losses carry over better than losses. Fit your own runs with --fit."
        )
    if far := law.describe_extrapolation(n, budget):
        notes.append(f"The law is extrapolated: {' and '.join(far)}.")
    if base and (far := law.describe_extrapolation(base.n_params, base.tokens + budget)):
        notes.append(f"It is extrapolated for continuing the base: {' and '.join(far)}.")
    measured = sorted(gains or {})
    notes.append(
        f"Shares of tokens saved are published ranges, not fitted here{', but for ' + ', '.join(measured) if measured else ''}; "
        "their low end is what the most cautious reading leaves."
    )
    if base and base.tokens == 0:
        notes.append(
            "The base's tokens are not known (--base-tokens): counted as 0, so that it has learned nothing and cost nothing."
        )
    return notes


# ---- what one's own runs say


def fit_runs(
    run_dirs: list[pathlib.Path], prior: ScalingLaw
) -> tuple[ScalingFit, dict[str, tuple[float, float]]]:
    """A law fitted to the runs from random weights, and for each way that the grown ones show: the share of tokens saved, 90 % interval.

    A grown run's last held-out loss is held against the tokens that its size needs from scratch by the fitted law, over all draws.
    Raises UserError where there is too little to fit.
    """
    points, grown, read_by = [], [], {}
    for run_dir in map(stage.local_path, run_dirs):
        settings, shares, found = read_heldout_losses(run_dir)
        if (run_dir / "growth.json").is_file():
            grown.append(
                (
                    run_dir,
                    settings,
                    shares,
                    json.loads((run_dir / "growth.json").read_text()),
                    found,
                )
            )
        else:
            points += found
            read_by[run_dir] = shares
    if not points:
        raise UserError(
            "--fit: none of the runs began at random and measured held-out losses, and a law needs at least one that did."
        )
    shares = next(iter(read_by.values()))
    if other := next((run_dir for run_dir, theirs in read_by.items() if theirs != shares), None):
        raise UserError(
            f"--fit {other}: trained on {read_by[other]}, the runs before it on {shares}; one law holds for one mixture. Fit them apart."
        )
    fitted = scaling.fit_scaling_law(points, prior)
    gains: dict[str, tuple[float, float]] = {}
    for run_dir, settings, theirs, story, found in grown:
        operator = story["operators"][-1].partition("(")[0]
        name = next(
            (way.name for way in (*GROWTH_STRATEGIES, PRUNING) if operator in way.operators), None
        )
        before = (
            (story["at_step"] or 0) * settings.train.batch_size * settings.pack.seq_len
        )  # tokens that the parent took, inside a run
        reasons = {
            f"{operator} is none of the ways that a base is grown": name is None,
            f"it read {theirs}, the runs from scratch {shares}": theirs != shares,
            "it goes on counting its parent's steps (initialize.mode)": settings.initialize.mode
            != "continue",
            "it has no held-out loss after its growth": not found or found[-1].tokens <= before,
        }
        if reason := next((text for text, applies in reasons.items() if applies), None):
            log.info(f"fit: {run_dir}: what growing saved is left out: {reason}.")
            continue
        last = found[-1]
        saved = [
            1 - (last.tokens - before) / law.compute_tokens_to_loss(last.n_params, last.loss)
            for law in fitted.bootstrap_laws
        ]
        low, high = np.clip(np.percentile(saved, (5, 95)), -1, MAX_SAVED_FRAC)
        asked = fitted.law.compute_tokens_to_loss(last.n_params, last.loss)
        far = fitted.law.describe_extrapolation(last.n_params, asked)
        log.info(
            f"fit: {run_dir}: {name} saved {low:.0%} to {high:.0%} of the {cost.abbreviate_count(asked)} tokens that its size needs from scratch to "
            f"{last.loss:.3f} nats{', which is extrapolated: ' + far[0] if far else ''}."
        )
        before_it = gains.get(name, (low, high))
        gains[name] = (float(min(low, before_it[0])), float(max(high, before_it[1])))
    return fitted, gains


def read_heldout_losses(run_dir: pathlib.Path) -> tuple[Config, dict[str, float], list[LossPoint]]:
    """(settings, shares of the sources that a run trained on, empty for all in proportion; its held-out losses after its warm-up,
    weighted by them).
    """
    try:
        settings = config.build_config(json.loads((run_dir / "config.json").read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"--fit {run_dir}: no config.json there. Give run directories that train.py wrote."
        ) from None
    n = flops.count_matmul_params(ModelSpec.load(run_dir / "spec.json"))
    shares = settings.mixture.phases[-1][1] if settings.mixture.phases else {}
    points = []
    for record in read_metrics(run_dir / "metrics.jsonl"):
        losses = {
            name: loss
            for name, loss in record.get("heldout", {}).items()
            if not shares or shares.get(name)
        }
        if losses and record["step"] > settings.optim.warmup_steps:
            weights = [shares.get(name, 1.0) for name in losses]
            loss = sum(w * x for w, x in zip(weights, losses.values(), strict=True)) / sum(weights)
            points.append(
                LossPoint(
                    n,
                    float(record["step"] * settings.train.batch_size * settings.pack.seq_len),
                    loss,
                )
            )
    return settings, shares, points


def load_base_model(source: str, tokens: float, usd: float | None) -> BaseModel:
    """A base by a recipe (its model), a run, a checkpoint or a Hugging Face directory."""
    if source.partition(":")[0].endswith(".py"):
        return BaseModel(cost.resolve_model_spec(config.load_config(source))[0], tokens, usd)
    return BaseModel(cost.read_source_spec(source), tokens, usd)


# ---- on the terminal


def format_strategies(found: dict[str, Any]) -> str:
    base = found["base"]
    lines = [
        f"to {found['target_loss']:.3f} nats a token with {cost.abbreviate_count(found['n_params'])} parameters"
        + (
            ""
            if found["target_given"]
            else f", which scratch reaches with {cost.abbreviate_count(found['budget'])} tokens"
        )
    ]
    if base:
        cost_of_it = (
            "reckoned from its tokens"
            if base["usd"] is None
            else "free"
            if not base["usd"]
            else f"{base['usd']:,.0f} usd"
        )
        lines.append(
            f"base: {cost.abbreviate_count(base['n_params'])} parameters, {cost.abbreviate_count(base['tokens'])} tokens ({base['tokens_per_param']:.3g} a parameter), {cost_of_it}"
        )
    columns = [
        ("", lambda each: each["name"]),
        ("tokens", lambda each: format_low_high(each["tokens"], cost.abbreviate_count)),
        ("FLOPs", lambda each: format_low_high(each["flops"], "{:.2g}".format)),
        ("saved", lambda each: format_low_high(each["saved"], format_saved_frac)),
        ("with the base", lambda each: format_low_high(each["saved_with_base"], format_saved_frac)),
        ("loss at the budget", lambda each: format_low_high(each["loss"], "{:.3f}".format)),
    ]
    if "hours" in found["ways"][0]:
        columns += [
            ("hours", lambda each: format_low_high(each["hours"], cost.format_significant)),
            ("usd", lambda each: format_low_high(each["usd"], cost.format_significant)),
            (
                "usd with the base",
                lambda each: format_low_high(each["usd_with_base"], cost.format_significant),
            ),
        ]
    cells = [
        [label for label, _ in columns],
        *[[show(each) for _, show in columns] for each in found["ways"]],
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines += [
        "",
        *(
            "  ".join(
                f"{cell:<{w}}" if not i else f"{cell:>{w}}"
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ),
        "",
    ]
    notes = [
        f"{each['name']}: {'; '.join([each['source'], *each['notes']])}." for each in found["ways"]
    ]
    if found["stack_at"] < found["budget"]:
        notes.append(
            f"G_stack's fit would stack after {cost.abbreviate_count(found['stack_at'])} tokens of the smaller model (2405.15319)."
        )
    else:
        notes.append(
            "G_stack's fit of when to stack (2405.15319) does not reach down to this budget: it asks for more tokens than there are."
        )
    return "\n".join(
        [
            *lines,
            *(
                textwrap.fill(note, 120, initial_indent="- ", subsequent_indent="  ")
                for note in [*notes, *found["notes"]]
            ),
            "",
            found["verdict"],
        ]
    )


def format_saved_frac(value: float) -> str:
    return f"{round(value, 2) + 0.0:.0%}"  # adding 0 turns -0 into 0


def format_low_high(pair: list[float | None] | None, show) -> str:
    if pair is None:
        return "unknown"
    texts = ["never" if value is None else show(value) for value in pair]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def replace_infinite(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]
