"""Hold published scaling laws, and fit the same form to one's own runs with bootstrap intervals.

A law gives the loss, in nats per token, that N parameters reach on D tokens of text:
L = E + A / N^alpha + B / D^beta. Its numbers belong to its text and its tokenizer: differences
between two losses carry over better than the losses themselves.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from jaxpt.spec import Record, UserError


@dataclasses.dataclass(frozen=True)
class ScalingLaw(Record):
    """L = E + A / N^alpha + B / D^beta: nats per token of N parameters after D tokens."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    source: str
    params_range: tuple[float, float]  # fewest and most parameters of the runs it was fitted to
    max_tokens: float  # of the longest of these runs

    def predict_loss(self, n_params: float, tokens: float) -> float:
        """Return the loss in nats per token; infinite for 0 tokens."""
        if not tokens:
            return math.inf
        return self.compute_loss_floor(n_params) + self.B / tokens**self.beta

    def compute_loss_floor(self, n_params: float) -> float:
        """Return the loss that a model of this size approaches with infinite tokens."""
        return self.E + self.A / n_params**self.alpha

    def compute_tokens_to_loss(self, n_params: float, loss: float) -> float:
        """Return the tokens needed to reach a loss; infinite if the size cannot reach it."""
        left = loss - self.compute_loss_floor(n_params)
        if left <= 0:
            return math.inf
        try:
            return (self.B / left) ** (1 / self.beta)
        except OverflowError:  # a flat law, close above its floor
            return math.inf

    def describe_extrapolation(self, n_params: float, tokens: float) -> list[str]:
        """Describe how far a size and a token budget lie outside of the fitted runs."""
        smallest, largest = self.params_range
        notes = []
        if not smallest <= n_params <= largest:
            nearest = largest if n_params > largest else smallest
            notes.append(f"{n_params / nearest:.3g} times the size of its runs")
        if tokens > self.max_tokens:
            notes.append(f"{tokens / self.max_tokens:.3g} times their tokens")
        return notes


SCALING_LAWS = {
    "chinchilla": ScalingLaw(
        1.69,
        406.4,
        0.34,
        410.7,
        0.28,
        "Hoffmann et al., 2203.15556, approach 3: MassiveText, 70M to 16B",
        (70e6, 16e9),
        5e11,
    ),
    "chinchilla-refit": ScalingLaw(
        1.8172,
        482.01,
        0.3478,
        2085.43,
        0.3658,
        "Besiroglu et al., 2404.10102: the same runs fitted again",
        (70e6, 16e9),
        5e11,
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
    loss: float  # nats per token


class ScalingFit(NamedTuple):
    """A law fitted to points, and the laws fitted to bootstrap samples of them."""

    law: ScalingLaw
    bootstrap_laws: list[ScalingLaw]
    points: list[LossPoint]
    n_sizes: int

    def predict_loss_interval(self, n_params: float, tokens: float) -> tuple[float, float, float]:
        """Return the loss as (5th percentile, fitted, 95th percentile)."""
        losses = [law.predict_loss(n_params, tokens) for law in self.bootstrap_laws]
        low, high = np.percentile(losses, (5, 95))
        fitted = self.law.predict_loss(n_params, tokens)
        return float(low), fitted, float(high)


def fit_scaling_law(
    points: list[LossPoint], prior: ScalingLaw, *, n_bootstrap: int = 200
) -> ScalingFit:
    """Fit E, B and beta by least squares of relative loss, and A if the runs have several sizes.

    alpha is the prior's, and so is A with one size. The intervals come from fits to points drawn
    with replacement, which are not independent within a run: too narrow rather than too wide.

    Raises:
        UserError: there are too few points.
    """
    n_sizes = count_sizes(points)
    min_points = 4 if n_sizes == 1 else 5
    if count_distinct(points) < min_points:
        raise UserError(
            f"--fit: expected at least {min_points} held-out losses at different tokens, "
            f"got {len(points)}. Set a smaller train.eval_every, or give more runs."
        )
    law = solve_scaling_law(points, prior)
    rng = np.random.default_rng(0)
    bootstrap_laws = []
    while len(bootstrap_laws) < n_bootstrap:
        indices = rng.integers(0, len(points), len(points))
        drawn = [points[i] for i in indices]
        if count_sizes(drawn) != n_sizes:
            continue
        if count_distinct(drawn) >= min_points - 1:
            fitted = solve_scaling_law(drawn, prior, initial_law=law)
            bootstrap_laws.append(fitted)
    return ScalingFit(law, bootstrap_laws, points, n_sizes)


def count_sizes(points: list[LossPoint]) -> int:
    """Return the number of different model sizes."""
    sizes = {point.n_params for point in points}
    return len(sizes)


def count_distinct(points: list[LossPoint]) -> int:
    """Return the number of different (size, tokens)."""
    distinct = {(point.n_params, point.tokens) for point in points}
    return len(distinct)


def solve_scaling_law(
    points: list[LossPoint], prior: ScalingLaw, initial_law: ScalingLaw | None = None
) -> ScalingLaw:
    """Return the law fitted to points, from the initial law or a guess."""
    from scipy.optimize import least_squares

    fits_size = count_sizes(points) > 1
    sizes, tokens, losses = np.array(points, float).T.copy()
    # in units of the middle of the runs, so that the unknowns are of the size of a loss
    N = compute_geometric_mean(sizes)
    D = compute_geometric_mean(tokens)
    alpha = prior.alpha
    size_factor = (sizes / N) ** -alpha
    size_loss = prior.A / N**alpha
    smallest = losses.min()
    if not fits_size and size_loss >= smallest:
        size_loss = 0.0  # the prior's share of the size alone is more than the whole loss

    def predict(x: np.ndarray) -> np.ndarray:
        E, b, beta = x[:3]
        a = size_loss
        if fits_size:
            a = x[3]
        from_size = np.maximum(E, 0) + a * size_factor
        from_tokens = b * (tokens / D) ** -beta
        return from_size + from_tokens

    def relative_error(x: np.ndarray) -> np.ndarray:
        return predict(x) / losses - 1

    mean = losses.mean()
    initial = [0.5 * smallest, 0.4 * mean, prior.beta, 0.2 * mean]
    if initial_law:
        beta = initial_law.beta
        a = initial_law.A / N**alpha
        b = initial_law.B / D**beta
        initial = [initial_law.E, b, beta, a]
    most = 10 * losses.max()
    low = np.array([0, 1e-6, 0.02, 0])
    high = np.array([smallest, most, 2.0, most])
    if not fits_size:
        initial = initial[:3]
        low = low[:3]
        high = high[:3]
    start = np.clip(initial, low + 1e-9, high - 1e-9)
    solution = least_squares(
        relative_error,
        start,
        bounds=(low, high),
        loss="soft_l1",
        f_scale=0.01,
        max_nfev=400,
    ).x
    E, b, beta = map(float, solution[:3])
    B = float(b * D**beta)
    if fits_size:
        A = float(solution[3] * N**alpha)
    elif size_loss:
        A = prior.A
    else:
        A = 0.0
    source = f"fitted to {len(points)} held-out losses; alpha from {prior.source}"
    params_range = float(sizes.min()), float(sizes.max())
    max_tokens = float(tokens.max())
    return ScalingLaw(E, A, alpha, B, beta, source, params_range, max_tokens)


def compute_geometric_mean(values: np.ndarray) -> float:
    """Return the geometric mean of positive numbers."""
    logs = np.log(values)
    return np.exp(np.mean(logs))


def describe_scaling_fit(fit: ScalingFit) -> list[str]:
    """Return what was fitted with its interval, what is the prior's, and a caveat."""
    names = ["E", "B", "beta"]
    sizes = "1 size"
    prior = "A and alpha are the prior's"
    if fit.n_sizes > 1:
        names.append("A")
        sizes = f"{fit.n_sizes} sizes"
        prior = "alpha is the prior's"
    fitted = []
    for name in names:
        value = getattr(fit.law, name)
        values = [getattr(law, name) for law in fit.bootstrap_laws]
        low, high = np.percentile(values, (5, 95))
        fitted.append(f"{name} {value:.4g} (90 % {low:.4g} to {high:.4g})")
    return [
        f"fitted to {len(fit.points)} held-out losses of {sizes}: {', '.join(fitted)}; {prior}.",
        "Losses within one run are not independent, and those before the learning rate has decayed "
        "are above what a run of that length ends at: the intervals are too narrow.",
    ]
