"""Laws of scaling as data, and the same form fitted to one's own runs with an interval by bootstrap.

A law says the loss, in nats a token, that N parameters reach on D tokens of text: L = E + A / N^alpha + B / D^beta. Its numbers
belong to its text and its tokenizer: differences between two losses carry over better than the losses themselves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jaxpt.spec import UserError


class ScalingLaw(NamedTuple):
    """L = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    source: str
    params_range: tuple[float, float]  # least and most parameters of the runs that it was fitted to
    max_tokens: float  # and the longest of them

    def predict_loss(self, n_params: float, tokens: float) -> float:
        """Nats a token; tokens 0 is a model that has learned nothing, which no power law knows: infinite."""
        return (
            self.compute_loss_floor(n_params) + self.B / tokens**self.beta if tokens else math.inf
        )

    def compute_loss_floor(self, n_params: float) -> float:
        """What the size alone does not go below, whatever the tokens."""
        return self.E + self.A / n_params**self.alpha

    def describe_extrapolation(self, n_params: float, tokens: float) -> list[str]:
        """In words, how far outside of its runs a size and a budget lie."""
        least, most = self.params_range
        far = (
            []
            if least <= n_params <= most
            else [
                f"{n_params / (most if n_params > most else least):.3g} times the size of its runs"
            ]
        )
        return far + (
            [f"{tokens / self.max_tokens:.3g} times their tokens"]
            if tokens > self.max_tokens
            else []
        )

    def compute_tokens_to_loss(self, n_params: float, loss: float) -> float:
        """Tokens to a loss; infinite where the size does not reach it."""
        left = loss - self.compute_loss_floor(n_params)
        return (self.B / left) ** (1 / self.beta) if left > 0 else math.inf


MASSIVE_TEXT_RANGE = (70e6, 16e9), 5e11
SCALING_LAWS = {
    "chinchilla": ScalingLaw(
        1.69,
        406.4,
        0.34,
        410.7,
        0.28,
        "Hoffmann et al., 2203.15556, approach 3: MassiveText, 70M to 16B",
        *MASSIVE_TEXT_RANGE,
    ),
    "chinchilla-refit": ScalingLaw(
        1.8172,
        482.01,
        0.3478,
        2085.43,
        0.3658,
        "Besiroglu et al., 2404.10102: the same runs fitted again",
        *MASSIVE_TEXT_RANGE,
    ),
    "c4": ScalingLaw(
        1.87,
        521.0,
        0.353,
        1488.0,
        0.353,
        "Muennighoff et al., 2305.16264: C4, up to 8.7B, first epoch",
        (7e6, 8.7e9),
        1.8e11,
    ),
}


class LossPoint(NamedTuple):
    """One measured loss."""

    n_params: int
    tokens: float
    loss: float


class ScalingFit(NamedTuple):
    """A law fitted to points, and as many again as were drawn with replacement."""

    law: ScalingLaw
    bootstrap_laws: list[ScalingLaw]
    points: list[LossPoint]
    n_sizes: int

    def predict_loss_interval(self, n_params: float, tokens: float) -> tuple[float, float, float]:
        """(5 %, fitted, 95 %)"""
        low, high = np.percentile(
            [law.predict_loss(n_params, tokens) for law in self.bootstrap_laws], (5, 95)
        )
        return float(low), self.law.predict_loss(n_params, tokens), float(high)


def fit_scaling_law(
    points: list[LossPoint], prior: ScalingLaw, *, n_bootstrap: int = 200, seed: int = 0
) -> ScalingFit:
    """E, B and beta by least squares of relative loss, and A where the runs have several sizes; alpha is the prior's, and A too
    with one size. Intervals: whole fits over points drawn with replacement, which are not independent within a run: they are too
    narrow rather than too wide.

    Raises UserError where there are too few points.
    """
    n_sizes = len({p.n_params for p in points})
    least = 4 if n_sizes == 1 else 5
    if len({(p.n_params, p.tokens) for p in points}) < least:
        raise UserError(
            f"--fit: found {len(points)} held-out losses, wanted at least {least} at different tokens. Set a smaller train.eval_every, or give more runs."
        )
    rng = np.random.default_rng(seed)
    law = solve_scaling_law(points, prior, n_sizes)
    drawn = []
    while len(drawn) < n_bootstrap:
        again = [points[i] for i in rng.integers(0, len(points), len(points))]
        if (
            len({p.n_params for p in again}) == n_sizes
            and len({(p.n_params, p.tokens) for p in again}) >= least - 1
        ):
            drawn.append(solve_scaling_law(again, prior, n_sizes, initial_law=law))
    return ScalingFit(law, drawn, points, n_sizes)


def solve_scaling_law(
    points: list[LossPoint], prior: ScalingLaw, n_sizes: int, initial_law: ScalingLaw | None = None
) -> ScalingLaw:
    from scipy.optimize import least_squares

    sizes, tokens, losses = (np.array(column, float) for column in zip(*points, strict=True))
    # in units of the middle of the runs, so that the numbers to be found are of the size of a loss
    N, D = np.exp(np.mean(np.log(sizes))), np.exp(np.mean(np.log(tokens)))
    by_size = (sizes / N) ** -prior.alpha

    def predicted(x):
        E, b, beta, a = x if n_sizes > 1 else (*x, prior.A / N**prior.alpha)
        return np.maximum(E, 0) + a * by_size + b * (tokens / D) ** -beta

    def guess(law: ScalingLaw | None) -> list[float]:
        known = (
            [law.E, law.B / D**law.beta, law.beta]
            if law
            else [0.5 * losses.min(), 0.4 * losses.mean(), prior.beta]
        )
        return known + (
            [law.A / N**prior.alpha if law else 0.2 * losses.mean()] if n_sizes > 1 else []
        )

    low, high = [0, 1e-6, 0.02], [losses.min(), 10 * losses.max(), 2.0]
    if (
        n_sizes == 1 and prior.A / N**prior.alpha >= losses.min()
    ):  # the prior's share of the size alone is more than all there is
        prior = prior._replace(A=0.0)
    if n_sizes > 1:
        low, high = [*low, 0], [*high, 10 * losses.max()]
    x0 = np.clip(guess(initial_law), np.array(low) + 1e-9, np.array(high) - 1e-9)
    found = least_squares(
        lambda x: predicted(x) / losses - 1,
        x0,
        bounds=(low, high),
        loss="soft_l1",
        f_scale=0.01,
        max_nfev=400,
    ).x
    E, b, beta = found[:3]
    A = found[3] * N**prior.alpha if n_sizes > 1 else prior.A
    source = f"fitted to {len(points)} held-out losses; alpha from {prior.source}"
    return ScalingLaw(
        float(E),
        float(A),
        prior.alpha,
        float(b * D**beta),
        float(beta),
        source,
        (float(sizes.min()), float(sizes.max())),
        float(tokens.max()),
    )


def describe_scaling_fit(found: ScalingFit) -> list[str]:
    """Lines: what was fitted with its interval, and what was taken from the prior."""

    def interval(name: str) -> str:
        low, high = np.percentile([getattr(law, name) for law in found.bootstrap_laws], (5, 95))
        return f"{name} {getattr(found.law, name):.4g} (90 % {low:.4g} to {high:.4g})"

    fitted = ["E", "B", "beta"] + (["A"] if found.n_sizes > 1 else [])
    taken = "alpha" if found.n_sizes > 1 else "A and alpha"
    return [
        f"fitted to {len(found.points)} held-out losses of {found.n_sizes} size{'s' if found.n_sizes > 1 else ''}: {', '.join(map(interval, fitted))}; "
        f"{taken} {'are' if found.n_sizes == 1 else 'is'} the prior's.",
        "Losses within one run are not independent, and those before the learning rate has fallen are above what a run of that length ends at: "
        "the intervals are too narrow.",
    ]
