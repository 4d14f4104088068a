"""Measure what a model makes of a long context: loss by position, and needles in a haystack."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpt.data.tokenizer import Tokenizer
from jaxpt.evaluate import likelihood
from jaxpt.evaluate.likelihood import TokenPair
from jaxpt.spec import UserError
from jaxpt.weights.load import LoadedModel

FIRST_BUCKET = 64  # tokens; each further bucket ends at twice as many
N_NEEDLES = 100  # items without --limit
N_DOCUMENTS = 1_000  # of a source that make up haystacks, at most
N_CANDIDATES = 10  # numbers to choose from: chance is 1 in 10
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the haystack before the needle
NEEDLE = "\nThe secret number of {name} is {number}.\n"
QUESTION = "\nThe secret number of {name} is"
NAMES = ("Alice", "Bruno", "Carla", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jonas")


def measure_by_position(
    model: LoadedModel, token_ids: Sequence[list[int]], first_id: int, max_length: int, label: str
) -> dict[str, float]:
    """Return the loss by position over the first max_length tokens of long documents.

    All buckets are of the same documents, so that their losses compare.

    Args:
        model: the model.
        token_ids: of each document; those of fewer than max_length tokens are left out.
        first_id: the token in front of each.
        max_length: tokens that the model sees at once.
        label: of the progress bar and the errors.

    Returns:
        "nats_0-63,none" -> mean nats per token, and "nats_0-63_stderr,none" -> its standard error
        over the documents, for positions 0 to 63 and so on.
    """
    pairs: list[TokenPair] = []
    for ids in token_ids:
        if len(ids) >= max_length:
            pairs.append(([first_id], ids[:max_length]))
    if not pairs:
        longest = max(map(len, token_ids))
        raise UserError(
            f"--by-position: {label} has no document of {max_length:,} tokens, the longest has "
            f"{longest:,}. Use --max-length {longest} or less, or another source."
        )
    losses = np.zeros((len(pairs), max_length))
    scored = likelihood.compute_token_log_likelihoods(
        model.spec, model.params, pairs, max_length=max_length, label=label
    )
    for place, log_likelihoods, _ in scored:
        losses[place] = -log_likelihoods
    metrics = {}
    edges = [0, *make_bucket_ends(max_length)]
    for start, stop in itertools.pairwise(edges):
        means = losses[:, start:stop].mean(axis=1)
        name = f"nats_{start}-{stop - 1}"
        metrics |= describe_mean(name, means)
    return metrics


def make_bucket_ends(max_length: int) -> list[int]:
    """Return where buckets of positions end: 64, 128, 256, ..., max_length."""
    ends = itertools.takewhile(
        lambda end: end < max_length, (FIRST_BUCKET << i for i in itertools.count())
    )
    return [*ends, max_length]


def describe_mean(name: str, values: np.ndarray) -> dict[str, float]:
    """Return a mean and its standard error, as the harness names them."""
    metrics = {f"{name},none": float(values.mean())}
    if len(values) > 1:
        error = values.std(ddof=1) / len(values) ** 0.5
        metrics[f"{name}_stderr,none"] = float(error)
    return metrics


def find_needles(
    model: LoadedModel,
    encoder: Tokenizer,
    token_ids: Sequence[list[int]],
    n_items: int,
    max_length: int,
    label: str,
) -> dict[str, float]:
    """Return how often a model knows a number that stands somewhere in its context.

    A sentence with a name and a number is put into max_length tokens of text; behind it the model
    rates ten numbers by their likelihood. Chance is 0.1.

    Args:
        model: the model.
        encoder: its tokenizer.
        token_ids: of the documents that make up the haystacks, one after the other.
        n_items: haystacks; depths take turns.
        max_length: tokens that the model sees at once.
        label: of the progress bar and the errors.

    Returns:
        "acc,none" and its standard error, and "acc_depth_0.25,none" and so on.
    """
    text = list(itertools.chain.from_iterable(token_ids))
    pairs: list[TokenPair] = []
    for i in range(n_items):
        pairs += make_needle_item(encoder, text, i, max_length, label)
    scores = likelihood.compute_continuation_log_likelihoods(
        model.spec, model.params, pairs, max_length=max_length, label=label
    )
    found = np.array([score for score, _ in scores]).reshape(n_items, N_CANDIDATES)
    is_right = (found.argmax(axis=1) == 0).astype(np.float64)
    metrics = describe_mean("acc", is_right)
    for k, depth in enumerate(DEPTHS[:n_items]):
        metrics |= describe_mean(f"acc_depth_{depth:g}", is_right[k :: len(DEPTHS)])
    return metrics


def make_needle_item(
    encoder: Tokenizer, text: list[int], i: int, max_length: int, label: str
) -> list[TokenPair]:
    """Return (context, candidate) of item i, the right number first."""
    chance = random.Random(i)
    name = chance.choice(NAMES)
    numbers = chance.sample(range(10_000, 100_000), N_CANDIDATES)
    needle, question, *candidates = encoder.encode_batch(
        [
            NEEDLE.format(name=name, number=numbers[0]),
            QUESTION.format(name=name),
            *(f" {number}" for number in numbers),
        ]
    )
    longest = max(map(len, candidates))
    n_text = max_length - 1 - len(needle) - len(question) - longest
    if n_text < len(needle) or len(text) < n_text:
        raise UserError(
            f"{label}: expected at least {n_text:,} tokens of text and a context much longer than "
            f"the needle's {len(needle)}, got {len(text):,} and {max_length:,}. Set --max-length."
        )
    start = chance.randrange(len(text) - n_text + 1)
    depth = round(DEPTHS[i % len(DEPTHS)] * n_text)
    before, after = text[start : start + depth], text[start + depth : start + n_text]
    context = [encoder.first_id, *before, *needle, *after, *question]
    return [(context, candidate) for candidate in candidates]


def score_long_context(
    name: str, metrics: dict[str, Any], n_items: int, higher_is_better: bool
) -> dict[str, Any]:
    """Return metrics of a task as results of the harness."""
    names = [key.removesuffix(",none") for key in metrics if "_stderr" not in key]
    return {
        "results": {name: {"alias": name, **metrics}},
        "versions": {name: 1},
        "n-samples": {name: {"original": n_items, "effective": n_items}},
        "higher_is_better": {name: dict.fromkeys(names, higher_is_better)},
    }
