"""Compare growing with training from scratch: FLOPs, hours, money and expected loss.

What is published about growing is a range of tokens saved to the same loss. It is stated how far a
case lies outside of what was published; how the range shrinks there is this planner's assumption.
Beside it stands what jaxpt's small runs forecast (transfer.py). One's own runs (`--fit`) replace
the law and both.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxpt import config, flops, io
from jaxpt.growth.growth import Parent
from jaxpt.growth.parse import plan_growth
from jaxpt.model import transformer
from jaxpt.plan import check, cost, scaling, transfer
from jaxpt.plan.check import Growth, Run
from jaxpt.plan.cost import TargetPlan, abbreviate_count, format_cents
from jaxpt.plan.scaling import LossPoint, ScalingFit, ScalingLaw
from jaxpt.plan.transfer import JUMP_AFTER, TRANSFERS
from jaxpt.spec import ModelSpec, Record, UserError
from jaxpt.text import choose_time_unit, format_significant, format_table, wrap_notes
from jaxpt.train.records import HeldoutMetrics
from jaxpt.train.schedule import count_warmup_steps

log = logging.getLogger(__name__)

Range = tuple[float, float]
Ends = tuple[float | None, float | None]  # None: never


@dataclasses.dataclass(frozen=True)
class BaseModelSummary(Record):
    """The model that could be grown."""

    n_params: int
    tokens: float  # trained on
    tokens_per_param: float
    usd: float | None  # what it cost; 0: free; None: computed from its tokens


@dataclasses.dataclass(frozen=True)
class StrategyCost(Record):
    """Cost of one strategy to the target loss, as (best case, worst case) unless stated.

    A None inside a pair means never.
    """

    name: str  # such as "scratch", "stacking" or "stacking (small runs)"
    tokens: tuple[float | None, float | None]
    flops: tuple[float | None, float | None]
    flops_with_base: tuple[float | None, float | None]  # the base's training included
    # share of the FLOPs from scratch (worst case, best case); None: scratch never gets there
    saved_frac: tuple[float | None, float | None] | None
    saved_with_base_frac: tuple[float | None, float | None] | None
    loss: tuple[float | None, float | None]  # nats per token after the whole token budget
    source: str
    basis: str  # PUBLISHED, SMALL_RUNS, OWN_RUNS, or LAW: of the scaling law alone
    notes: tuple[str, ...] = ()
    hours: tuple[float | None, float | None] | None = None  # None: no target was planned for
    usd: tuple[float | None, float | None] | None = None  # None: no target, or no price
    usd_with_base: tuple[float | None, float | None] | None = None


@dataclasses.dataclass(frozen=True)
class StrategyComparison(Record):
    """Strategies to train or grow a model of one size."""

    n_params: int
    token_budget: float
    target_loss: float  # nats per token
    target_loss_given: bool  # False: what scratch reaches with token_budget
    law: ScalingLaw
    base: BaseModelSummary | None
    strategies: tuple[StrategyCost, ...]
    stack_tokens: float  # of the smaller model before stacking, by G_stack's fit (2405.15319)
    notes: tuple[str, ...]
    verdict: str


PUBLISHED, SMALL_RUNS, OWN_RUNS, LAW = "published", "small runs", "own runs", "law"
OF_SMALL_RUNS = f" ({SMALL_RUNS})"  # behind a strategy's name


class PublishedSavings(NamedTuple):
    """What is known of one growth strategy."""

    name: str
    operators: tuple[str, ...]  # of growth/operators.py
    # share of the tokens that the same size needs from scratch to the same loss, without the base's
    saved_frac: Range
    source: str


DEPTH_UPSCALING = PublishedSavings(
    "depth up-scaling",
    ("depth_upscale", "stack_middle", "insert_identity", "predict_layers"),
    (0.0, 0.45),
    "SOLAR, 2312.15166, has no comparison with scratch; at best what stacking saved",
)
STACKING = PublishedSavings(
    "stacking",
    ("stack", "interleave"),
    (0.22, 0.45),
    "G_stack, 2405.15319: 194B tokens for 300B at 7B, 35 % (a speed-up of 54.6 %); LiGO, "
    "2303.00980: 22 % (GPT-2) to 45 % (BERT) by a learned map",
)
RANDOM_LAYERS = PublishedSavings(
    "random layers",
    ("deepen",),
    (0.0, 0.45),
    "2511.04981 starts from one layer; for a base of several nothing is published: at best what "
    "stacking saved",
)
WIDTH_GROWTH = PublishedSavings(
    "width growth",
    ("widen", "widen_rms"),
    (0.35, 0.75),
    "HyperCloning, 2409.12903: 2.2 to 4 times fewer steps; 2602.02472: up to 35 %",
)
GROWTH_STRATEGIES = (DEPTH_UPSCALING, STACKING, RANDOM_LAYERS, WIDTH_GROWTH)
LATE_DEEPENING = PublishedSavings(
    "late jump from one layer",
    ("deepen",),
    (0.0, 0.8),
    "2511.04981: about 80 % of the compute at 124M and 7B, one jump at 80 % of the steps. "
    "Tried again by others (marin #7836, 48 layers, 6.7B tokens, one seed) it lost to the full "
    "depth trained for half the steps: 2.135 to 2.058 nats",
)
PRUNING = PublishedSavings(
    "pruning a larger one",
    ("drop_layers", "narrow"),
    (0.0, 0.975),
    "Minitron, 2407.14679: up to 40 times fewer tokens, distilled",
)

# Published limits (2605.13405, 2510.06548): a factor of 2 is reliable, G_stack went to 4; gains are
# best below 20 tokens per parameter; a base trained longer saturates with the log of its tokens.
RELIABLE_GROWTH_FACTOR = 2.0
MAX_GROWTH_FACTOR = 4.0
SATURATION_TOKENS_PER_PARAM = 20.0
ROUNDING_TOLERANCE = 1.05  # layers come in whole numbers
# a grown run below what its size reaches from scratch, by a fitted law, would save everything
MAX_SAVED_FRAC = 0.99


class BaseModel(NamedTuple):
    """A model that exists."""

    spec: ModelSpec
    tokens: float  # trained on
    usd: float | None  # what it cost; 0: free; None: computed from its tokens

    @property
    def n_params(self) -> int:
        """Number of all parameters."""
        return transformer.count_params(self.spec)


@dataclasses.dataclass(frozen=True)
class Case:
    """The model to reach, and what is given: what all strategies share."""

    child: ModelSpec
    seq_len: int
    token_budget: float
    target_loss: float  # nats per token
    law: ScalingLaw
    base: BaseModel | None
    target_plan: TargetPlan | None  # for hours and money
    measured_savings: dict[str, Range]

    @property
    def n_params(self) -> int:
        """Parameters of the child."""
        return transformer.count_params(self.child)

    @property
    def flops_per_token(self) -> float:
        """FLOPs to train the child on one token."""
        return flops.count_flops_per_token(self.child, self.seq_len)

    @property
    def scratch_tokens(self) -> float:
        """Tokens to the target loss from scratch; infinite if the child cannot reach it."""
        return self.law.compute_tokens_to_loss(self.n_params, self.target_loss)

    @property
    def scratch_flops(self) -> float:
        """FLOPs to the target loss from scratch."""
        return self.flops_per_token * self.scratch_tokens

    @property
    def base_flops(self) -> float:
        """FLOPs that the base was trained with."""
        if self.base is None:
            return 0.0
        return flops.count_flops_per_token(self.base.spec, self.seq_len) * self.base.tokens

    def predict_loss(self, tokens: float) -> float:
        """Return the child's loss from scratch."""
        return self.law.predict_loss(self.n_params, tokens)


class Outcome(NamedTuple):
    """What a strategy takes and reaches, as (best case, worst case)."""

    name: str
    tokens: Range  # to the target loss
    flops: Range
    loss: Range  # after the whole token budget
    source: str
    basis: str
    needs_base: bool = True
    notes: tuple[str, ...] = ()


def compare_strategies(
    child: ModelSpec,
    seq_len: int,
    token_budget: float,
    *,
    base: BaseModel | None = None,
    target_loss: float | None = None,
    law: ScalingLaw = scaling.SCALING_LAWS["chinchilla"],
    scaling_fit: ScalingFit | None = None,
    measured_savings: dict[str, Range] | None = None,
    target_plan: TargetPlan | None = None,
) -> StrategyComparison:
    """Return every strategy to the child's size, and continuing the base.

    Args:
        child: the model to reach.
        seq_len: tokens per sequence.
        token_budget: tokens that may be spent.
        base: None: there is nothing to grow.
        target_loss: None: what scratch reaches with the token budget.
        law: scaling law.
        scaling_fit: replaces the law.
        measured_savings: strategy -> (least, most) share of tokens that one's own runs saved;
            replaces the published range.
        target_plan: for hours and money.
    """
    if scaling_fit:
        law = scaling_fit.law
    n_params = transformer.count_params(child)
    goal = target_loss
    if goal is None:
        goal = law.predict_loss(n_params, token_budget)
    savings = measured_savings or {}
    case = Case(child, seq_len, token_budget, goal, law, base, target_plan, savings)
    outcomes = [estimate_scratch(case)]
    if base:
        outcomes.append(estimate_continuation(case, base))
    outcomes += estimate_late_jump(case)
    if base:
        if base.n_params < n_params:
            for known in GROWTH_STRATEGIES:
                outcomes += estimate_growth(case, base, known)
        if base.n_params > n_params:
            outcomes.append(estimate_pruning(case, base))
    strategies = tuple(price_outcome(case, outcome) for outcome in outcomes)
    return StrategyComparison(
        n_params=n_params,
        token_budget=token_budget,
        target_loss=goal,
        target_loss_given=target_loss is not None,
        law=law,
        base=summarize_base(base) if base else None,
        strategies=strategies,
        stack_tokens=compute_stack_tokens(n_params, case.flops_per_token * token_budget),
        notes=tuple(describe_comparison_basis(case, scaling_fit)),
        verdict=format_verdict(strategies),
    )


def summarize_base(base: BaseModel) -> BaseModelSummary:
    """Return the base's record."""
    tokens_per_param = base.tokens / base.n_params
    return BaseModelSummary(base.n_params, base.tokens, tokens_per_param, base.usd)


def estimate_scratch(case: Case) -> Outcome:
    """Return the cost of training the child from scratch."""
    scratch = PublishedSavings("scratch", (), (0.0, 0.0), case.law.source)
    outcome = estimate_saving(case, scratch, scratch.saved_frac, case.flops_per_token)
    return outcome._replace(needs_base=False, basis=LAW)


def estimate_late_jump(case: Case) -> list[Outcome]:
    """Return the cost of a run most of whose tokens train a model of one layer.

    Published: with all of scratch's tokens. By small runs: with half of its tokens before it grows.
    """
    name = LATE_DEEPENING.name
    least, most = LATE_DEEPENING.saved_frac
    tokens = case.scratch_tokens
    total = case.scratch_flops
    loss = case.predict_loss(case.token_budget)
    published = Outcome(
        name,
        tokens=(tokens, tokens),
        flops=(total * (1 - most), total * (1 - least)),
        loss=(loss, 1.005 * loss),  # within 0.5 % of scratch's
        source=LATE_DEEPENING.source,
        basis=PUBLISHED,
        needs_base=False,
    )
    if case.child.n_layers < 2:
        return [published]
    small = plan_growth("layers([0])", Parent(case.child)).child
    small_params = transformer.count_params(small)
    small_flops = flops.count_flops_per_token(small, case.seq_len)
    flops_per_token = JUMP_AFTER * small_flops + (1 - JUMP_AFTER) * case.flops_per_token
    sizes = case.law, small_params, case.n_params
    tokens, losses = [], []
    ends, far = transfer.limit_factor(TRANSFERS[name], case.n_params / small_params)
    for factor in ends:
        tokens.append(transfer.solve_late_jump(*sizes, case.scratch_tokens, factor))
        worth = transfer.count_jump_tokens(*sizes, case.token_budget, factor)
        losses.append(case.predict_loss(worth))
    by_transfer = make_transfer_outcome(name, tokens, losses, flops_per_token)
    return [published, by_transfer._replace(needs_base=False, notes=far)]


def estimate_growth(case: Case, base: BaseModel, known: PublishedSavings) -> list[Outcome]:
    """Return the cost of growing the base by one strategy, as published and by small runs."""
    measured = case.measured_savings.get(known.name)
    if measured:
        known = known._replace(source="the runs of --fit")
        outcome = estimate_saving(case, known, measured, case.flops_per_token)
        return [outcome._replace(basis=OWN_RUNS)]
    saved, notes = limit_savings(known, case, base)
    outcome = estimate_saving(case, known, saved, case.flops_per_token)
    ends, far = transfer.limit_factor(TRANSFERS[known.name], case.n_params / base.n_params)
    worth = transfer.compute_worth(case.law, base.n_params, base.tokens, case.n_params)
    tokens, losses = [], []
    for factor in ends:
        tokens.append(transfer.count_tokens_after_growth(case.scratch_tokens, worth, factor))
        effective = transfer.count_effective_tokens(case.token_budget, worth, factor)
        losses.append(case.predict_loss(effective))
    by_transfer = make_transfer_outcome(known.name, tokens, losses, case.flops_per_token)
    return [outcome._replace(notes=notes), by_transfer._replace(notes=far)]


def make_transfer_outcome(
    name: str, tokens: Sequence[float], losses: Sequence[float], flops_per_token: float
) -> Outcome:
    """Return a strategy's outcome by small runs, each given as (best case, worst case)."""
    fewest, most = tokens
    low_loss, high_loss = losses
    high, low = TRANSFERS[name].ends
    factors = format_ends((low, high), "{:.2f}".format)
    return Outcome(
        name + OF_SMALL_RUNS,
        tokens=(fewest, most),
        flops=(flops_per_token * fewest, flops_per_token * most),
        loss=(low_loss, high_loss),
        source=f"the base counts {factors} times the tokens to its loss from scratch",
        basis=SMALL_RUNS,
    )


def estimate_pruning(case: Case, base: BaseModel) -> Outcome:
    """Return the cost of pruning the base, which then answers every token (distillation)."""
    measured = case.measured_savings.get(PRUNING.name)
    teacher = flops.count_forward_flops_per_token(base.spec, case.seq_len)
    saved = measured or PRUNING.saved_frac
    outcome = estimate_saving(case, PRUNING, saved, case.flops_per_token + teacher)
    return outcome._replace(basis=OWN_RUNS if measured else PUBLISHED)


def estimate_continuation(case: Case, base: BaseModel) -> Outcome:
    """Return the cost of training the base on."""
    law = case.law
    total_tokens = law.compute_tokens_to_loss(base.n_params, case.target_loss)
    tokens = max(total_tokens - base.tokens, 0.0)
    continued_flops = tokens * flops.count_flops_per_token(base.spec, case.seq_len)
    loss = law.predict_loss(base.n_params, base.tokens + case.token_budget)
    notes = () if math.isfinite(tokens) else ("its size alone keeps it above that loss",)
    return Outcome(
        "continuing the base",
        tokens=(tokens, tokens),
        flops=(continued_flops, continued_flops),
        loss=(loss, loss),
        source=law.source,
        basis=LAW,
        notes=notes,
    )


def estimate_saving(
    case: Case, known: PublishedSavings, saved: Range, flops_per_token: float
) -> Outcome:
    """Return the cost of a strategy that saves a share (least, most) of scratch's tokens."""
    least, most = saved
    few = case.scratch_tokens * (1 - most)
    many = case.scratch_tokens * (1 - least)
    most_tokens = case.token_budget / (1 - most)
    least_tokens = case.token_budget / (1 - least)
    low_loss = case.predict_loss(most_tokens)
    high_loss = case.predict_loss(least_tokens)
    return Outcome(
        known.name,
        tokens=(few, many),
        flops=(flops_per_token * few, flops_per_token * many),
        loss=(low_loss, high_loss),
        source=known.source,
        basis=PUBLISHED,
    )


def limit_savings(
    known: PublishedSavings, case: Case, base: BaseModel
) -> tuple[Range, tuple[str, ...]]:
    """Return the share of tokens saved in this case, and why it is less than published."""
    low, high = known.saved_frac
    notes = []
    factor = case.n_params / base.n_params
    tokens_per_param = case.token_budget / case.n_params
    base_tokens_per_param = base.tokens / base.n_params
    if factor > RELIABLE_GROWTH_FACTOR * ROUNDING_TOLERANCE:
        low = 0.0
        notes.append(
            f"{factor:.2g} times the base: beyond 2, which is reliable (2605.13405), "
            "it may save nothing"
        )
    if factor > MAX_GROWTH_FACTOR * ROUNDING_TOLERANCE:
        high = 0.0
        notes.append("and beyond 4 nothing is published: counted as scratch")
    if tokens_per_param > SATURATION_TOKENS_PER_PARAM:
        shrinkage = SATURATION_TOKENS_PER_PARAM / tokens_per_param
        low *= shrinkage
        high *= shrinkage
        notes.append(
            f"{tokens_per_param:.3g} tokens per parameter: gains shrink beyond 20 (2605.13405); "
            "here in proportion, an assumption"
        )
    if base_tokens_per_param > SATURATION_TOKENS_PER_PARAM:
        low = 0.0
        high /= 1 + math.log10(base_tokens_per_param / SATURATION_TOKENS_PER_PARAM)
        notes.append(
            f"a base of {base_tokens_per_param:.3g} tokens per parameter saturates (2510.06548); "
            "here with the log, an assumption"
        )
    return (low, high), tuple(notes)


def price_outcome(case: Case, outcome: Outcome) -> StrategyCost:
    """Return a strategy's cost with shares of scratch, and hours and money if a target is given."""
    best, worst = outcome.flops
    base_flops = case.base_flops if outcome.needs_base else 0.0
    with_base = (best + base_flops, worst + base_flops)
    priced = StrategyCost(
        name=outcome.name,
        tokens=replace_infinite(outcome.tokens),
        flops=replace_infinite(outcome.flops),
        flops_with_base=replace_infinite(with_base),
        saved_frac=compute_saved_frac(case, outcome.flops),
        saved_with_base_frac=compute_saved_frac(case, with_base),
        loss=replace_infinite(outcome.loss),
        source=outcome.source,
        basis=outcome.basis,
        notes=outcome.notes,
    )
    plan = case.target_plan
    if plan is None:
        return priced
    model_flops_per_second = plan.expected.tokens_per_second * plan.flops_per_token
    seconds = (best / model_flops_per_second, worst / model_flops_per_second)
    hours = (seconds[0] / 3600, seconds[1] / 3600)
    priced = dataclasses.replace(priced, hours=replace_infinite(hours))
    if plan.usd_per_hour is None:
        return priced
    usd_per_flop = plan.n_devices * plan.usd_per_hour / 3600 / model_flops_per_second
    base_usd = base_flops * usd_per_flop
    if outcome.needs_base and case.base and case.base.usd is not None:
        base_usd = case.base.usd
    usd = (best * usd_per_flop, worst * usd_per_flop)
    usd_with_base = (usd[0] + base_usd, usd[1] + base_usd)
    return dataclasses.replace(
        priced, usd=replace_infinite(usd), usd_with_base=replace_infinite(usd_with_base)
    )


def compute_saved_frac(case: Case, strategy_flops: Range) -> Ends | None:
    """Return the (least, most) share of scratch's FLOPs saved; None if scratch never gets there."""
    scratch_flops = case.scratch_flops
    if not math.isfinite(scratch_flops):
        return None
    best, worst = strategy_flops
    return replace_infinite((1 - worst / scratch_flops, 1 - best / scratch_flops))


def replace_infinite(values: Range) -> Ends:
    """Return both values, None for infinite ones."""
    low, high = values
    finite_low = low if math.isfinite(low) else None
    finite_high = high if math.isfinite(high) else None
    return finite_low, finite_high


def compute_stack_tokens(n_params: float, budget_flops: float) -> float:
    """Return the tokens after which to stack on the way to n_params, by G_stack's fit.

    Source: 2405.15319, log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74.
    """
    size_term = 0.88 * math.log10(n_params)
    budget_term = 163.27 / math.log10(budget_flops)
    return 10 ** (size_term + budget_term - 5.74)


def format_verdict(strategies: Sequence[StrategyCost]) -> str:
    """Return which strategy needs the fewest FLOPs, with the base for free and paid for."""
    free = choose_strategy(strategies, lambda strategy: strategy.flops)
    paid = choose_strategy(strategies, lambda strategy: strategy.flops_with_base)
    return f"Fewest FLOPs with the base for free: {free}. With the base paid for: {paid}."


def choose_strategy(
    strategies: Sequence[StrategyCost], get_flops: Callable[[StrategyCost], Ends]
) -> str:
    """Return the cheapest strategy by what is published, and by small runs where they differ."""

    def choose(other_basis: str) -> tuple[str, str]:
        known = [strategy for strategy in strategies if strategy.basis != other_basis]
        ends = [get_flops(strategy) for strategy in known]
        best_case = find_cheapest(known, [best for best, _ in ends])
        worst_case = find_cheapest(known, [worst for _, worst in ends])
        return worst_case, best_case

    worst_case, best_case = choose(SMALL_RUNS)
    answer = worst_case
    if best_case != worst_case:
        answer += f" if little of what is published holds here, {best_case} if all of it does"
    by_runs = " or ".join(dict.fromkeys(choose(PUBLISHED))).replace(OF_SMALL_RUNS, "")
    return answer if by_runs == answer else f"{answer}; by small runs, {by_runs}"


def find_cheapest(strategies: Sequence[StrategyCost], costs: list[float | None]) -> str:
    """Return the name of the strategy with the least cost; None costs never reach the target."""
    cheapest = "none"
    least = math.inf
    for strategy, flops_needed in zip(strategies, costs, strict=True):
        if flops_needed is not None and flops_needed < least:
            cheapest = strategy.name
            least = flops_needed
    return cheapest


def describe_comparison_basis(case: Case, scaling_fit: ScalingFit | None) -> list[str]:
    """Return what the comparison rests on."""
    law, base, budget = case.law, case.base, case.token_budget
    notes = []
    if scaling_fit:
        notes += scaling.describe_scaling_fit(scaling_fit)
        low, loss, high = scaling_fit.predict_loss_interval(case.n_params, budget)
        notes.append(
            f"Scratch with the whole budget: {loss:.3f} nats per token "
            f"(90 % {low:.3f} to {high:.3f})."
        )
    else:
        notes.append(
            "The law is published for other text and another tokenizer: differences between "
            "losses carry over better than losses. Fit your own runs with --fit."
        )
    extrapolation = law.describe_extrapolation(case.n_params, budget)
    if extrapolation:
        notes.append(f"The law is extrapolated: {' and '.join(extrapolation)}.")
    if base:
        extrapolation = law.describe_extrapolation(base.n_params, base.tokens + budget)
        if extrapolation:
            far = " and ".join(extrapolation)
            notes.append(f"It is extrapolated for continuing the base: {far}.")
    if TRANSFERS.keys() - case.measured_savings.keys():
        notes.append(
            "Small runs: factors fitted to models of 0.25M parameters, see docs/growth.md; "
            "the law is what carries them to this size."
        )
    measured = ", ".join(sorted(case.measured_savings))
    exception = f", but for {measured}" if measured else ""
    notes.append(
        f"Shares of tokens saved are published ranges, not fitted here{exception}; "
        "their low end is the most cautious reading."
    )
    if base and base.tokens == 0:
        notes.append(
            "The base's tokens are not known (--base-tokens): counted as 0, so that it has "
            "learned nothing and cost nothing."
        )
    return notes


# ---- one's own runs


class GrownRun(NamedTuple):
    """A run whose model was grown, and its losses."""

    run: Run
    growth: Growth
    points: list[LossPoint]


def fit_runs(
    run_dirs: Iterable[str | io.Path], prior: ScalingLaw
) -> tuple[ScalingFit, dict[str, Range]]:
    """Return a law fitted to the runs from scratch, and what the grown ones saved.

    A grown run's last held-out loss is compared with the tokens that its size needs from scratch,
    by every bootstrap law of the fit: strategy -> 90 % interval of the share of tokens saved.

    Raises:
        UserError: there is too little to fit, or the runs read different mixtures.
    """
    points: list[LossPoint] = []
    scratch_runs: list[Run] = []
    grown_runs: list[GrownRun] = []
    for run_dir in run_dirs:
        run = check.read_run(run_dir, "--fit")
        growth, losses = check.read_growth(run), read_heldout_losses(run)
        if growth:
            grown_runs.append(GrownRun(run, growth, losses))
        else:
            scratch_runs.append(run)
            points += losses
    if not points:
        raise UserError(
            "--fit: expected at least one run from scratch with held-out losses, got none."
        )
    shares = get_source_shares(scratch_runs[0])
    for run in scratch_runs:
        if get_source_shares(run) != shares:
            raise UserError(
                f"--fit {run.path}: trained on {get_source_shares(run)}, the runs before it on "
                f"{shares}; one law holds for one mixture. Fit them apart."
            )
    fit = scaling.fit_scaling_law(points, prior)
    savings: dict[str, Range] = {}
    for grown in grown_runs:
        name = find_strategy_name(grown.growth)
        reason = explain_exclusion(grown, name, shares)
        if reason or name is None:
            log.warning(f"fit: {grown.run.path}: what growing saved is left out: {reason}.")
            continue
        low, high = measure_saved_frac(fit, grown, name)
        before_low, before_high = savings.get(name, (low, high))
        savings[name] = (min(low, before_low), max(high, before_high))
    return fit, savings


def find_strategy_name(growth: Growth) -> str | None:
    """Return the name of the strategy that an operator belongs to."""
    if growth.operator == "deepen" and "copy" in growth.call:  # of the stack, in its order
        return STACKING.name
    for known in (*GROWTH_STRATEGIES, PRUNING):
        if growth.operator in known.operators:
            return known.name
    return None


def explain_exclusion(grown: GrownRun, name: str | None, shares: dict[str, float]) -> str | None:
    """Return why a grown run cannot be compared with the runs from scratch; None if it can."""
    run = grown.run
    points = grown.points
    own_shares = get_source_shares(run)
    if name is None:
        return f"{grown.growth.operator} is no operator of a growth strategy"
    if own_shares != shares:
        return f"it read {own_shares}, the runs from scratch {shares}"
    if run.settings.initialize.mode != "continue":
        return "it continues to count its parent's steps (initialize.mode)"
    if not points or points[-1].tokens <= grown.growth.n_tokens:
        return "it has no held-out loss after its growth"
    return None


def measure_saved_frac(fit: ScalingFit, grown: GrownRun, name: str) -> Range:
    """Return the 90 % interval of the share of scratch's tokens that a grown run saved."""
    last = grown.points[-1]
    child_tokens = last.tokens - grown.growth.n_tokens
    shares = []
    for law in fit.bootstrap_laws:
        scratch_tokens = law.compute_tokens_to_loss(last.n_params, last.loss)
        shares.append(1 - child_tokens / scratch_tokens)
    interval = np.percentile(shares, (5, 95))
    low, high = np.clip(interval, -1, MAX_SAVED_FRAC)
    scratch_tokens = fit.law.compute_tokens_to_loss(last.n_params, last.loss)
    saved = format_ends((float(low), float(high)), format_saved_frac)
    log.info(f"fit: {grown.run.describe()}: {name} saved {saved}")
    log.info(f"  of {abbreviate_count(scratch_tokens)} tokens from scratch to {last.loss:.3f} nats")
    extrapolation = fit.law.describe_extrapolation(last.n_params, scratch_tokens)
    if extrapolation:
        log.info(f"  which is extrapolated: {extrapolation[0]}")
    return float(low), float(high)


def get_source_shares(run: Run) -> dict[str, float]:
    """Return the last phase's shares of the sources; empty: all in proportion to their size."""
    phases = run.settings.mixture.phases
    if not phases:
        return {}
    _, shares = phases[-1]
    return shares


def read_heldout_losses(run: Run) -> list[LossPoint]:
    """Return a run's held-out losses after its warm-up, weighted by the shares of the sources."""
    n_params = transformer.count_params(run.spec)
    shares = get_source_shares(run)
    n_warmup = count_warmup_steps(run.settings.optim, run.settings.train.steps)
    points = []
    for record in run.stream_records():
        is_heldout = isinstance(record, HeldoutMetrics)
        if not is_heldout or record.step <= n_warmup:
            continue
        loss_sum = share_sum = 0.0
        for name, loss in record.heldout_loss.items():
            share = shares.get(name, 0.0) if shares else 1.0
            loss_sum += share * loss
            share_sum += share
        if share_sum:
            mean = loss_sum / share_sum
            points.append(LossPoint(n_params, float(record.n_tokens), mean))
    return points


def load_base_model(source: str, tokens: float, usd: float | None) -> BaseModel:
    """Return the base of a recipe (its model), a run, a checkpoint or a Hugging Face directory."""
    recipe_path, _, _ = source.partition(":")
    if recipe_path.endswith(".py"):
        spec, _ = cost.resolve_model_spec(config.load_config(source))
    else:
        spec = cost.read_source_spec(source)
    return BaseModel(spec, tokens, usd)


# ---- on the terminal


def format_strategies(comparison: StrategyComparison) -> str:
    """Return the comparison as text: a table, its sources and notes, and the verdict."""
    n_params = abbreviate_count(comparison.n_params)
    budget = abbreviate_count(comparison.token_budget)
    lines = [f"to {comparison.target_loss:.3f} nats per token with {n_params} parameters"]
    if not comparison.target_loss_given:
        lines[0] += f", as scratch with {budget} tokens"
    if comparison.base:
        lines.append(describe_base(comparison.base))
    columns = [make_column(strategy) for strategy in comparison.strategies]
    rows = [["", *columns[0]]]
    for strategy, column in zip(comparison.strategies, columns, strict=True):
        rows.append([strategy.name, *column.values()])
    lines += ["", format_table(rows), ""]
    notes = []
    for strategy in comparison.strategies:
        sources = "; ".join([strategy.source, *strategy.notes])
        notes.append(f"{strategy.name}: {sources}.")
    if comparison.stack_tokens < comparison.token_budget:
        stack_tokens = abbreviate_count(comparison.stack_tokens)
        notes.append(
            f"G_stack's fit would stack after {stack_tokens} tokens of the smaller model "
            "(2405.15319)."
        )
    else:
        notes.append(
            "G_stack's fit of when to stack (2405.15319) does not reach down to this budget: "
            "it takes more tokens than there are."
        )
    lines.append(wrap_notes([*notes, *comparison.notes]))
    return "\n".join([*lines, "", comparison.verdict])


def describe_base(base: BaseModelSummary) -> str:
    """Return the base's size, tokens and cost in words."""
    usd = "free"
    if base.usd is None:
        usd = "cost computed from its tokens"
    elif base.usd:
        usd = f"{base.usd:,.0f} usd"
    return (
        f"base: {abbreviate_count(base.n_params)} parameters, {abbreviate_count(base.tokens)} "
        f"tokens ({base.tokens_per_param:.3g} per parameter), {usd}"
    )


def make_column(strategy: StrategyCost) -> dict[str, str]:
    """Return heading -> cell of one strategy."""
    cells = {
        "tokens": format_ends(strategy.tokens, abbreviate_count),
        "FLOPs": format_ends(strategy.flops, "{:.2g}".format),
        "saved": format_ends(strategy.saved_frac, format_saved_frac),
        "with the base": format_ends(strategy.saved_with_base_frac, format_saved_frac),
        "loss at the budget": format_ends(strategy.loss, "{:.3f}".format),
    }
    if strategy.hours:
        unit, per_hour = choose_time_unit(strategy.hours)
        hours = format_ends(strategy.hours, lambda end: format_significant(per_hour * end))
        cells["time"] = f"{hours} {unit}"
        cells["usd"] = format_ends(strategy.usd, format_cents)
        cells["usd with the base"] = format_ends(strategy.usd_with_base, format_cents)
    return cells


def format_ends(ends: Ends | None, format_value: Callable[[float], str]) -> str:
    """Return both ends of a range, one if they read the same."""
    if ends is None:
        return "unknown"
    low, high = ("never" if end is None else format_value(end) for end in ends)
    if low == high:
        return low
    return f"{low} to {high}"


def format_saved_frac(value: float) -> str:
    """Return a share in percent; -0.4 % is 0%."""
    return f"{round(value, 2) + 0.0:.0%}"  # adding 0 turns -0 into 0
