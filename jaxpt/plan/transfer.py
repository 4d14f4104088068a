"""Predict what a grown model keeps of its base, by factors fitted to small runs.

The child from scratch reaches its base's loss after some tokens: the base's worth. A grown model is
as good after D tokens as one from scratch after D + factor x worth, as weights of other text count
as so much text of one's own (Hernandez et al., 2102.01293). With a factor of 1 the child keeps what
the base knows and no more: growing saves where the small model's tokens to that loss cost less.
What a factor adds beyond 1 comes with training: in proportion, until D is the worth (an assumption;
in the runs it was fitted to, D was more).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxpt.plan.scaling import ScalingLaw


class Transfer(NamedTuple):
    """The factor of one strategy.

    Attributes:
        low: end of the 95 % interval of its mean over seeds, at least 0.
        high: the other end.
        growth: the child's parameters in those of the base, in the runs that it was fitted to.
        arm: of benchmarks/growth.py, which these runs are.
    """

    low: float
    high: float
    growth: float
    arm: str

    @property
    def ends(self) -> tuple[float, float]:
        """The factor as (best case, worst case)."""
        return self.high, self.low


# Growth to 4 layers of width 64 after half of the tokens: 0.25M parameters, bases of 19 to 70
# tokens per parameter, five seeds; width growth one, with what five would leave open
# (docs/growth.md). A test holds them to the results.
TRANSFERS = {
    "depth up-scaling": Transfer(0.76, 1.10, 1.23, "3 layers, depth up-scaling at 50 %"),
    "stacking": Transfer(1.26, 1.44, 1.58, "2 layers, stack at 50 %"),
    "random layers": Transfer(0.99, 1.17, 1.58, "2 layers, deepen at 50 %"),
    "width growth": Transfer(0.0, 0.67, 3.29, "half the width, widened at 50 %"),
    "late jump from one layer": Transfer(0.94, 1.32, 2.24, "1 layer, jump at 50 %"),
}
JUMP_AFTER = 0.5  # of the tokens
MAX_BEYOND = 1.5  # times a factor's growth; beyond it the base may count nothing


def limit_factor(known: Transfer, growth: float) -> tuple[tuple[float, float], tuple[str, ...]]:
    """Return a strategy's factor as (best case, worst case) for a growth, with a note if it is far.

    Args:
        known: the strategy's.
        growth: the child's parameters in those of the base.
    """
    best, worst = known.ends
    if growth <= MAX_BEYOND * known.growth:
        return (best, worst), ()
    note = f"{growth:.2g} times the base, small runs {known.growth:.2g} times: it may count nothing"
    return (best, 0.0), (note,)


def compute_worth(law: ScalingLaw, base_params: int, base_tokens: float, n_params: int) -> float:
    """Return the tokens that n_params need from scratch to the loss of a smaller base."""
    if not base_tokens:
        return 0.0
    return law.compute_tokens_to_loss(n_params, law.predict_loss(base_params, base_tokens))


def count_effective_tokens(tokens: float, worth: float, factor: float) -> float:
    """Return the tokens from scratch after which a model is as good as a grown one after tokens."""
    return tokens + min(factor, 1.0) * worth + max(factor - 1, 0.0) * min(tokens, worth)


def count_tokens_after_growth(scratch_tokens: float, worth: float, factor: float) -> float:
    """Return the tokens after growth that are as good as scratch_tokens; 0 if the base is."""
    if factor <= 1:
        return max(scratch_tokens - factor * worth, 0.0)
    tokens = max(scratch_tokens - worth, 0.0) / factor
    return tokens if tokens < worth else scratch_tokens - factor * worth


def solve_late_jump(
    law: ScalingLaw, small_params: int, n_params: int, scratch_tokens: float, factor: float
) -> float:
    """Return the tokens of a run that starts small and is as good as scratch_tokens from scratch.

    It grows after JUMP_AFTER of them.
    """
    from scipy.optimize import root_scalar

    def surplus(tokens: float) -> float:
        return count_jump_tokens(law, small_params, n_params, tokens, factor) - scratch_tokens

    if not math.isfinite(scratch_tokens):
        return math.inf
    ends = (0.0, scratch_tokens / (1 - JUMP_AFTER))
    return root_scalar(surplus, bracket=ends).root


def count_jump_tokens(
    law: ScalingLaw, small_params: int, n_params: int, tokens: float, factor: float
) -> float:
    """Return the tokens from scratch that a run of `tokens` is worth, JUMP_AFTER of them small."""
    worth = compute_worth(law, small_params, JUMP_AFTER * tokens, n_params)
    return count_effective_tokens((1 - JUMP_AFTER) * tokens, worth, factor)
